#!/usr/bin/env python3
"""Fine-tunes a small DeepSeek-V3 with Transformers' Trainer and PEFT's LoRA on the experts. `make finetune` calls this.

The model has random weights and reads bytes, so nothing is downloaded; the text is an almanac written for this example.
The same model is trained twice, stock and with `use_kernels=True`; both loss curves go to finetune.png. Adapters are
saved and loaded again. --experts fp4 holds experts in 4 bits, and compares with stock over the numbers that these stand
for, both under gradient checkpointing. --full trains all weights instead of adapters.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import one_line_errors  # noqa: F401

# Read when Transformers is imported: its own Hub kernels (RMSNorm, ...) stay off, so that only the experts differ.
os.environ.setdefault("USE_HUB_KERNELS", "NO")

import torch
from kernels import get_kernel
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, DeepseekV3Config, PreTrainedModel, Trainer, TrainingArguments

ROOT = Path(__file__).resolve().parent.parent
REPO_ID = "org/moe-grouped-gemm"
CURVE = ROOT / "finetune.png"
CACHE = ROOT / ".cache/finetune"
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# How a model is trained first, and then by this kernel, for each choice of --experts.
WAYS = {"dense": ("stock", "use_kernels"), "fp4": ("dequantized", "fp4")}
ON_GPU = torch.cuda.is_available()


def config() -> DeepseekV3Config:
    """2.3M parameters on a CPU, 278M on a GPU; a vocabulary of bytes."""
    hidden_size, inter, experts, layers, heads = (1024, 512, 32, 6, 16) if ON_GPU else (192, 96, 8, 4, 6)
    return DeepseekV3Config(
        vocab_size=256,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        moe_intermediate_size=inter,
        num_hidden_layers=layers,
        first_k_dense_replace=1,
        n_routed_experts=experts,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        q_lora_rank=hidden_size // 2,
        kv_lora_rank=hidden_size // 4,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        num_mtp_layers=0,
        # Frozen random features are of use to adapters only if they are not close to zero.
        initializer_range=hidden_size**-0.5,
    )


def dataset(length: int) -> list[dict[str, torch.Tensor]]:
    """The text as pieces of `length` bytes, each overlapping the next by half."""
    tokens = torch.tensor(list((ROOT / "examples/data/almanac.txt").read_bytes()))
    return [{"input_ids": piece, "labels": piece} for piece in tokens.unfold(0, length, length // 2)]


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(E, N, K / 2) and (E, N, K / 32) bytes -> (E, N, K)."""
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    numbers = torch.cat([numbers, -numbers])
    groups = torch.stack([codes & 15, codes >> 4], dim=-1).view(*scale.shape, 32)
    return (numbers[groups.int()] * scale.view(torch.float8_e8m0fnu).float()[..., None]).flatten(-2)


def base(moe, way: str) -> PreTrainedModel:
    """The same weights every time; "dequantized" and "fp4" have the same numbers in their experts."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config())
    if way == "use_kernels":
        model.set_use_kernels(True)
    if way in WAYS["fp4"]:
        model.save_pretrained(CACHE / "model")
        quantized = AutoModelForCausalLM.from_pretrained(CACHE / "model", quantization_config=moe.fp4_config())
        if way == "fp4":
            return quantized
        codes = dict(quantized.named_parameters())
        for name, weight in model.named_parameters():
            if name.endswith(tuple(EXPERTS)):
                weight.data = dequantize(codes[name], codes[f"{name}_scale_inv"])
    return model


def build(moe, way: str, full: bool) -> PreTrainedModel:
    """With all weights to be trained, or with adapters on the experts."""
    model = base(moe, way)
    if full:
        return model
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=[], target_parameters=EXPERTS))


def train(
    model: PreTrainedModel, full: bool, checkpointing: bool, steps: int, logging_steps: int
) -> tuple[dict[int, float], float]:
    """Runs the Trainer; the mean loss of each `logging_steps` steps, by the last one's number, and the seconds."""
    length, batch = (256, 16) if ON_GPU else (128, 8)
    arguments = TrainingArguments(
        output_dir=CACHE,
        use_cpu=not ON_GPU,
        bf16=ON_GPU,
        gradient_checkpointing=checkpointing,
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=1e-3 if full else 3e-3,
        lr_scheduler_type="cosine",
        logging_steps=logging_steps,
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(model, arguments, train_dataset=dataset(length))
    seconds = trainer.train().metrics["train_runtime"]
    return {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}, seconds


@torch.no_grad()
def loss(model: PreTrainedModel) -> float:
    """On the beginning of the text."""
    batch = {name: tensor[None].to(model.device) for name, tensor in dataset(128)[0].items()}
    return model.eval()(**batch).loss.item()


def save_and_reload(moe, way: str, model: PeftModel) -> str:
    """Says where the adapters are, and how well they came back."""
    model.save_pretrained(CACHE / "adapter")
    megabytes = (CACHE / "adapter/adapter_model.safetensors").stat().st_size / 1e6
    again = PeftModel.from_pretrained(base(moe, way).to(model.device), CACHE / "adapter")
    return f"{CACHE / 'adapter'}, {megabytes:.1f} MB; loaded again, the loss changes by {loss(again) - loss(model):.1e}"


def plot(title: str, curves: dict[str, dict[int, float]]) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (label, losses), style in zip(curves.items(), ({"linewidth": 5, "alpha": 0.4}, {"marker": "."})):
        axes.plot(list(losses), list(losses.values()), label=label, **style)
    axes.set(title=title, xlabel="step", ylabel="loss (nats per byte)", ylim=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(CURVE, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="train all weights, not adapters")
    parser.add_argument("--experts", choices=WAYS, default="dense", help="default: %(default)s")
    args = parser.parse_args()
    if args.full and args.experts == "fp4":
        parser.error("--full: experts in 4 bits are frozen, train adapters on them")

    # Two threads gain a quarter on such small matrices. On busy cores they wait for each other: 5 minutes, not 30 s.
    torch.set_num_threads(1)
    # Unless told otherwise, `get_kernel` takes the build staged here for the one on the Hub.
    os.environ.setdefault("LOCAL_KERNELS", f"{REPO_ID}={ROOT}")
    moe = get_kernel(REPO_ID, version=1)
    moe.register()
    steps = 300 if ON_GPU else 200
    print(f"time      two runs of {steps} steps{'' if ON_GPU else ': about a minute on a CPU core'}")

    curves, seconds = {}, {}
    for way in WAYS[args.experts]:
        model = build(moe, way, args.full)
        if not curves:
            sizes = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
            total, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
            print(f"model     {total:,} parameters, {trained:,} of them trained")
        curves[way], seconds[way] = train(model, args.full, args.experts == "fp4", steps, logging_steps=10)
        first, *_, last = curves[way].values()
        print(f"{way:12}{seconds[way]:.0f} s; loss {first:.3f} over the first ten steps, {last:.3f} over the last")
    if not args.full:
        print(f"adapter   {save_and_reload(moe, way, model)}")

    what = "All weights" if args.full else "LoRA on the experts"
    bits = " in 4 bits" if args.experts == "fp4" else ""
    labels = {f"{way}, {seconds[way]:.0f} s": losses for way, losses in curves.items()}
    plot(f"{what}{bits} of a DeepSeek-V3 with {total / 1e6:.1f}M parameters", labels)
    apart = max(abs(a - b) for a, b in zip(*(losses.values() for losses in curves.values())))
    print(f"verdict   the curves lie within {apart:.1e} of each other: {CURVE}")


if __name__ == "__main__":
    main()
