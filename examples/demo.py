#!/usr/bin/env python3
"""Runs one model twice, stock and with `use_kernels=True`, and compares logits and speed. `make demo` calls this.

Without MODEL (a checkpoint folder or Hub id, as argument or environment variable) it makes a DeepSeek-V3 with random
weights: a small one that goes through a checkpoint on disk or, on a GPU, as many layers of the 16B "moonlight" size as
fit, made in place. Both models are in memory at once.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import time
from pathlib import Path

# Read when Transformers is imported: its own Hub kernels (RMSNorm, ...) stay off, so that only the experts differ.
os.environ.setdefault("USE_HUB_KERNELS", "NO")

import torch
from kernels import get_kernel
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DeepseekV3Config, PreTrainedModel
from transformers.generation import BaseStreamer

ROOT = Path(__file__).resolve().parent.parent
REPO_ID = "org/moe-grouped-gemm"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, LENGTH, NEW_TOKENS = (4, 512, 64) if DEVICE == "cuda" else (1, 256, 16)
ROUNDS = 3


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
    path = ROOT / "demo-model"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(small_config()).save_pretrained(path)
    return str(path)


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


def speeds(models: dict[str, PreTrainedModel]) -> dict[str, tuple[float, float]]:
    """Tokens per second of prefill and of decoding: the best of three rounds, after one to warm up.

    The models take turns, so that whatever else runs on the machine slows all of them.
    """
    seconds = {name: ([], []) for name in models}
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
                prefill, decode = seconds[name]
                prefill.append(clock.times[1] - clock.times[0])
                decode.append(clock.times[-1] - clock.times[1])
    return {
        name: (BATCH * LENGTH / min(prefill), BATCH * NEW_TOKENS / min(decode))
        for name, (prefill, decode) in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("MODEL"))
    model = parser.parse_args().model or default_model()

    # Unless told otherwise, `get_kernel` takes the build staged here for the one on the Hub.
    os.environ.setdefault("LOCAL_KERNELS", f"{REPO_ID}={ROOT}")
    kernel = get_kernel(REPO_ID, version=1)
    print(f"kernel    {REPO_ID} version 1, LOCAL_KERNELS={os.environ['LOCAL_KERNELS']}")

    stock = load(model, use_kernels=False)
    kernel.register()
    ours = load(model, use_kernels=True)
    size = sum(weight.numel() for weight in stock.parameters())
    origin = model if isinstance(model, str) else "random weights"
    print(f"model     {type(stock).__name__}, {size / 1e9:.2f}B parameters, {stock.dtype} on {DEVICE}, {origin}")
    replaced = [name for name, served in kernel.status(ours).items() if served == "moe_grouped_gemm"]
    replaced = [name for name in replaced if name.endswith(".experts")]
    print(f"replaced  {len(replaced)} layers:", *(replaced if len(replaced) < 4 else [replaced[0], "to", replaced[-1]]))

    print(f"speed     {BATCH} x {LENGTH} tokens of prefill, then {BATCH} x {NEW_TOKENS} of decoding; tokens/s:")
    rates = speeds({"stock": stock, "use_kernels": ours})
    for name, stock_rate, rate in zip(("prefill", "decode"), rates["stock"], rates["use_kernels"]):
        print(f"{name:9} stock {stock_rate:9.1f}   use_kernels {rate:9.1f}   ({rate / stock_rate:.2f}x)")

    stock_logits = logits(stock)
    difference = (logits(ours) - stock_logits).abs().max()
    stock.set_experts_implementation("eager")
    noise = (logits(stock) - stock_logits).abs().max()
    print(f"logits    max difference {difference:.1e}; largest logit {stock_logits.abs().max():.1f}")
    print(f"          for scale: stock's own grouped_mm and eager differ by {noise:.1e}")


if __name__ == "__main__":
    main()
