#!/usr/bin/env python3
"""Runs one model twice, stock and with `use_kernels=True`, and compares logits and speed. `make demo` calls this.

Without --model (a checkpoint folder or Hub id) it makes a DeepSeek-V3 with random weights: a small one that goes
through a checkpoint, kept in .cache/ for the next time, or, on a GPU, as many layers of the 16B "moonlight" size as
fit, made in place. Both models are in memory at once. A GPU that multiplies fp8 also times one layer with fp8 weights.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import os
import shutil
import statistics
import time
from pathlib import Path

import one_line_errors  # noqa: F401

# Read when Transformers is imported: its own Hub kernels (RMSNorm, ...) stay off, so that only the experts differ.
os.environ.setdefault("USE_HUB_KERNELS", "NO")

import torch
from kernels import get_kernel
from torch.utils.benchmark import Timer
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DeepseekV3Config, PreTrainedModel
from transformers.generation import BaseStreamer

ROOT = Path(__file__).resolve().parent.parent
REPO_ID = "org/moe-grouped-gemm"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, LENGTH, NEW_TOKENS = (4, 512, 64) if DEVICE == "cuda" else (1, 256, 16)
ROUNDS = 5


def small_config() -> DeepseekV3Config:
    """80M parameters, of which 57M in three layers of experts."""
    return DeepseekV3Config(
        vocab_size=8192,
        hidden_size=768,
        intermediate_size=2048,
        moe_intermediate_size=256,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        n_routed_experts=32,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        q_lora_rank=192,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        num_mtp_layers=0,
    )


def moonlight_config(free_bytes: int) -> DeepseekV3Config:
    """The dimensions of Moonlight-16B-A3B: 27 layers if two copies fit into `free_bytes`, else fewer."""
    expert_layer_bytes = 2 * 64 * 3 * 2048 * 1408
    return DeepseekV3Config(
        vocab_size=163840,
        hidden_size=2048,
        intermediate_size=11264,
        moe_intermediate_size=1408,
        num_hidden_layers=max(2, min(27, int(0.85 * free_bytes) // (2 * expert_layer_bytes))),
        first_k_dense_replace=1,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.446,
        num_attention_heads=16,
        num_key_value_heads=16,
        q_lora_rank=None,
        num_mtp_layers=0,
        initializer_range=0.006,  # DeepSeek-V3's
    )


def default_model() -> str | DeepseekV3Config:
    """A config stands for random weights made on the GPU: no 30 GB checkpoint on disk."""
    if DEVICE == "cuda":
        return moonlight_config(torch.cuda.mem_get_info()[0])
    return str(small_checkpoint(ROOT / ".cache"))


def small_checkpoint(cache: Path) -> Path:
    """Written once for a config, in which Transformers notes its version; that of an earlier one goes."""
    config = small_config()
    path = cache / f"demo-model-{hashlib.sha256(config.to_json_string().encode()).hexdigest()[:8]}"
    if not path.exists():
        for old in cache.glob("demo-model-*"):
            shutil.rmtree(old)
        part = path.with_suffix(".part")
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(part)
        part.rename(path)  # whole, or not there
    return path


def random_model(config: DeepseekV3Config) -> PreTrainedModel:
    """The same weights every time."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def load(model: str | DeepseekV3Config, use_kernels: bool) -> PreTrainedModel:
    if isinstance(model, str):
        return AutoModelForCausalLM.from_pretrained(model, dtype="auto", device_map=DEVICE, use_kernels=use_kernels)
    loaded = random_model(copy.deepcopy(model))
    loaded.set_use_kernels(use_kernels)
    return loaded


def prompt(model: PreTrainedModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (BATCH, LENGTH), generator=generator).to(DEVICE)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(prompt(model)).logits.float()


class Clock(BaseStreamer):
    """Notes when `generate` hands over the prompt, and then each token."""

    def __init__(self, progress: tqdm):
        self.progress, self.times = progress, []

    def put(self, value):
        self.times.append(time.perf_counter())
        self.progress.update()

    def end(self):
        pass


def speeds(models: dict[str, PreTrainedModel]) -> dict[str, dict[str, list[float]]]:
    """Tokens per second of prefill and of decoding, by model and round, after a round to warm up.

    The models take turns, so that whatever else runs on the machine slows all of them.
    """
    rates = {name: {"prefill": [], "decode": []} for name in models}
    with tqdm(total=len(models) * (1 + ROUNDS) * (2 + NEW_TOKENS), desc="Generating", unit="token") as progress:
        for turn, (name, model) in itertools.product(range(1 + ROUNDS), models.items()):
            clock = Clock(progress)
            tokens = prompt(model)
            model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=1 + NEW_TOKENS,
                min_new_tokens=1 + NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
                streamer=clock,
            )
            if turn > 0:
                rates[name]["prefill"].append(BATCH * LENGTH / (clock.times[1] - clock.times[0]))
                rates[name]["decode"].append(BATCH * NEW_TOKENS / (clock.times[-1] - clock.times[1]))
    return rates


def with_spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def compare_speed(models: dict[str, PreTrainedModel]) -> str:
    """Prints medians and spreads; returns the verdict."""
    print(f"speed     {BATCH} x {LENGTH} tokens of prefill, then {BATCH} x {NEW_TOKENS} of decoding; {ROUNDS} rounds")
    stock, ours = speeds(models).values()
    print(f"tokens/s  {'stock':24} {'use_kernels':24} times as fast: median (lowest to highest)")
    verdicts = []
    for phase in stock:
        ratios = [rate / stock_rate for stock_rate, rate in zip(stock[phase], ours[phase])]
        columns = with_spread(stock[phase], 0), with_spread(ours[phase], 0), with_spread(ratios, 2)
        print(f"{phase:9} {columns[0]:24} {columns[1]:24} {columns[2]}")
        times = f"{statistics.median(ratios):.2f} times as fast"
        verdicts.append(f"{phase} is {'as fast (within the spread)' if min(ratios) <= 1 <= max(ratios) else times}")
    return ", ".join(verdicts)


def compare_logits(stock: PreTrainedModel, ours: PreTrainedModel) -> str:
    """Prints how far ours are from stock's; returns the verdict. How far is far, two of stock's own ways tell."""
    expected = logits(stock)
    difference = ((logits(ours) - expected).norm() / expected.norm()).item()
    stock.set_experts_implementation("eager")
    noise = ((logits(stock) - expected).norm() / expected.norm()).item()
    print(f"logits    relative difference {difference:.1e}; stock's own grouped_mm and eager differ by {noise:.1e}")
    if not difference <= 3 * noise + torch.finfo(stock.dtype).eps:
        raise SystemExit(
            "verdict   With use_kernels=True the logits are not stock's: please report this, with the lines above"
        )
    return "the same up to rounding"


@torch.no_grad()
def compare_fp8(kernel, experts: torch.nn.Module) -> None:
    """Prints times of one layer of experts with its weights in bf16 and in fp8."""
    weights = experts.gate_up_proj, experts.down_proj
    codes, scales = zip(*(kernel.quantize_fp8(weight) for weight in weights))
    options = {"gate_up_proj_scale": scales[0], "down_proj_scale": scales[1]}
    size, size_fp8 = (sum(tensor.nbytes for tensor in tensors) / 1e6 for tensors in (weights, codes + scales))
    print(f"fp8       one layer of experts: {size:.0f} MB in bf16, {size_fp8:.0f} MB in fp8")
    num_experts, hidden_dim, _ = experts.down_proj.shape
    for tokens in (64, BATCH * LENGTH):
        x = torch.randn(tokens, hidden_dim, dtype=torch.bfloat16, device=DEVICE)
        top_k_weights, top_k_index = torch.rand(tokens, num_experts, device=DEVICE).topk(6)
        inputs = x, top_k_index, top_k_weights
        calls = {
            "bf16": lambda inputs=inputs: kernel.moe_experts(*inputs, *weights),
            "fp8": lambda inputs=inputs: kernel.moe_experts(*inputs, *codes, **options),
        }
        difference = ((calls["fp8"]() - calls["bf16"]()).norm() / calls["bf16"]().norm()).item()
        bf16, fp8 = (
            1e6 * Timer("call()", globals={"call": call}).blocked_autorange().median for call in calls.values()
        )
        times = f"{tokens:5} tokens: {bf16:.0f} us in bf16, {fp8:.0f} us in fp8 ({bf16 / fp8:.2f}x)"
        print(f"          {times}; results differ by {difference:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint folder or Hub id")
    model = parser.parse_args().model or default_model()

    if DEVICE == "cpu":  # threads wait for each other where something else has a core: half of them lose little
        torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    # Unless told otherwise, `get_kernel` takes the build staged here for the one on the Hub.
    os.environ.setdefault("LOCAL_KERNELS", f"{REPO_ID}={ROOT}")
    kernel = get_kernel(REPO_ID, version=1)
    print(f"kernel    {REPO_ID} version 1, LOCAL_KERNELS={os.environ['LOCAL_KERNELS']}")

    kernel.register()
    ours = load(model, use_kernels=True)
    size = sum(weight.numel() for weight in ours.parameters())
    origin = model if isinstance(model, str) else "random weights"
    print(f"model     {type(ours).__name__}, {size / 1e9:.2f}B parameters, {ours.dtype} on {DEVICE}, {origin}")
    routers = (".gate", ".router")
    status = {name: served for name, served in kernel.status(ours).items() if not name.endswith(routers)}
    replaced = [name for name, served in status.items() if served.split(",")[0] == "moe_grouped_gemm"]
    if not replaced:
        reasons = "; ".join(dict.fromkeys(status.values())) or "it has no experts"
        raise SystemExit(f"verdict   Nothing to compare, no layer of this model runs on the kernel: {reasons}")
    print(f"replaced  {len(replaced)} layers:", *(replaced if len(replaced) < 4 else [replaced[0], "to", replaced[-1]]))

    models = {"stock": load(model, use_kernels=False), "use_kernels": ours}
    speed = compare_speed(models)
    agreement = compare_logits(*models.values())
    if isinstance(model, DeepseekV3Config) and torch.cuda.get_device_capability() >= (8, 9):
        compare_fp8(kernel, ours.get_submodule(replaced[0]))
    print(f"verdict   With use_kernels=True the logits are {agreement}, {speed}.")
    if DEVICE == "cpu":
        print("          On a CPU both are plain PyTorch: the speed of the kernels shows on a GPU alone.")


if __name__ == "__main__":
    main()
