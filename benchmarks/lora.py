#!/usr/bin/env python3
"""Times LoRA on one expert layer through stock PEFT: this kernel against Transformers' grouped_mm.

    python benchmarks/lora.py        # on a GPU: the table, and docs/measurements/<gpu>-lora.json

r = 16 on both weights, which are frozen; forward and backward, with gradients of the hidden states and of A and B. The
two are compared before anything is timed. Memory is what training.py measures: what lies between the two passes
("saved"), and the peak of both, gradients and result not counted.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import peft
import torch
import transformers
import triton
from kernels import get_kernel
from torch import nn

from benchmark_moe import WORKLOADS, commit, expert_weights, routed_tokens, stock_module, timed
from training import memory, step

CASES = [(name, tokens) for name in ("qwen3-30b", "moonlight") for tokens in (4096, 16384)]
RANK = 16


class Layer(nn.Module):
    def __init__(self, experts: nn.Module):
        super().__init__()
        self.experts = experts

    def forward(self, *args):
        return self.experts(*args)


def with_adapter(experts: nn.Module, implementation: str) -> nn.Module:
    """The layer on one implementation, with an adapter whose factors are the same for each."""
    experts.config._experts_implementation = implementation
    torch.manual_seed(1)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(target_parameters=names, r=RANK, init_lora_weights=False)
    return peft.get_peft_model(Layer(experts), config)


def run_case(workload, tokens, device="cuda") -> dict:
    hidden_dim, inter, experts, top_k, _ = WORKLOADS[workload]
    weights = expert_weights(hidden_dim, inter, experts, device)
    x, index, top_k_weights = routed_tokens(tokens, hidden_dim, experts, top_k, device)
    inputs, dout = (x.requires_grad_(), index, top_k_weights), torch.randn_like(x)
    layers, trained, grads = {}, {}, {}
    for name, implementation in (("ours", "moe_grouped_gemm"), ("stock", "grouped_mm")):
        experts_module = stock_module(hidden_dim, inter, experts, top_k, weights)
        layers[name] = with_adapter(experts_module, implementation).to(device)
        trained[name] = [p for p in layers[name].parameters() if p.requires_grad]
        grads[name] = step(layers[name], inputs, dout, trained[name])
    errors = [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(grads["ours"], grads["stock"])]
    if not max(errors) < 5e-2:
        raise SystemExit(f"{workload} T={tokens}: gradients differ from stock's by {errors}: nothing is timed")
    grads.clear()
    case = {"workload": workload, "tokens": tokens, "rank": RANK, "relative_differences": errors}
    for name, layer in layers.items():
        saved, peak = memory(layer, inputs, dout, trained[name])
        us = timed(lambda name=name: step(layers[name], inputs, dout, trained[name]), 1)
        case |= {f"{name}_us": us, f"{name}_saved_bytes": saved, f"{name}_peak_bytes": peak}
    return case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: docs/measurements/<gpu>-lora.json")
    args = parser.parse_args()
    root = Path(__file__).resolve().parent.parent
    os.environ.setdefault("LOCAL_KERNELS", f"org/moe-grouped-gemm={root}")
    get_kernel("org/moe-grouped-gemm", version=1).register()
    torch.manual_seed(0)
    gpu = torch.cuda.get_device_name()
    result = {
        "gpu": gpu,
        "commit": commit(),
        "versions": {m.__name__: m.__version__ for m in (torch, triton, transformers, peft)},
        "cases": [],
    }
    out = args.out or root / "docs/measurements" / f"{gpu.replace(' ', '-')}-lora.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{'workload':12} {'T':>6} {'ours us':>9} {'stock us':>9} {'speed-up':>9}", end="")
    print("   saved MB: ours, stock   peak MB: ours, stock")
    for workload, tokens in CASES:
        case = run_case(workload, tokens)
        result["cases"].append(case)
        out.write_text(json.dumps(result, indent=1) + "\n")
        megabytes = [case[f"{name}_{what}_bytes"] / 1e6 for what in ("saved", "peak") for name in ("ours", "stock")]
        print(
            f"{workload:12} {tokens:6} {case['ours_us']:9.0f} {case['stock_us']:9.0f} "
            f"{case['stock_us'] / case['ours_us']:8.2f}x   " + "  ".join(f"{mb:9.0f}" for mb in megabytes),
            flush=True,
        )


if __name__ == "__main__":
    main()
