#!/usr/bin/env python3
"""Times forward and backward of one expert layer, and what they keep in memory, against Transformers' grouped_mm.

    python benchmarks/training.py        # on a GPU: the table, and docs/measurements/<gpu>-training.json

Gradients of hidden states, routing weights and both weights. Roof: three times the forward's FLOPs at the sustained
matmul rate of the same run. Gradients are compared with stock's before anything is timed. Memory is what lies between
the two passes beyond inputs and weights ("saved"), and the peak of both beyond inputs, weights and gradients ("peak").
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
import transformers
import triton
from kernels import get_kernel

from benchmark_moe import WORKLOADS, commit, expert_weights, matmul_rate, routed_tokens, stock_module, timed

CASES = [(name, tokens) for name in ("qwen3-30b", "moonlight", "glm45-air") for tokens in (4096, 16384)]


def step(layer, inputs, dout, parameters=()):
    """One forward and backward; returns the gradients of inputs and parameters."""
    return torch.autograd.grad(layer(*inputs), [*(x for x in inputs if x.requires_grad), *parameters], dout)


def memory(layer, inputs, dout, parameters=()) -> tuple[int, int]:
    """Bytes that lie between forward and backward, and the peak, gradients and result not counted."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = layer(*inputs)
    saved = torch.cuda.memory_allocated() - before - out.numel() * out.element_size()
    grads = torch.autograd.grad(out, [*(x for x in inputs if x.requires_grad), *parameters], dout)
    kept = sum(g.numel() * g.element_size() for g in (*grads, out))
    return saved, torch.cuda.max_memory_allocated() - before - kept


def run_case(kernel, workload, tokens, rate):
    hidden_dim, inter, experts, top_k, _ = WORKLOADS[workload]
    weights = [w.requires_grad_() for w in expert_weights(hidden_dim, inter, experts, "cuda")]
    x, index, top_k_weights = routed_tokens(tokens, hidden_dim, experts, top_k, "cuda")
    inputs = (x.requires_grad_(), index, top_k_weights.requires_grad_(), *weights)
    dout = torch.randn_like(x)
    module = stock_module(hidden_dim, inter, experts, top_k, [w.detach() for w in weights])
    module.gate_up_proj, module.down_proj = (torch.nn.Parameter(w) for w in weights)
    module.config._experts_implementation = "grouped_mm"

    def stock(x, index, top_k_weights, gate_up_proj, down_proj):
        return torch.func.functional_call(
            module, {"gate_up_proj": gate_up_proj, "down_proj": down_proj}, (x, index, top_k_weights)
        )

    layers = {"ours": kernel.moe_experts, "stock": stock}
    ours, theirs = (step(layer, inputs, dout) for layer in layers.values())
    errors = [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(ours, theirs)]
    if not max(errors) < 2e-2:
        raise SystemExit(f"{workload} T={tokens}: gradients differ from stock's by {errors}: nothing is timed")
    del ours, theirs
    case = {
        "workload": workload,
        "tokens": tokens,
        "relative_differences": errors,
        "roof_us": 3 * 2 * tokens * top_k * 3 * hidden_dim * inter / rate * 1e6,
    }
    for name, layer in layers.items():
        saved, peak = memory(layer, inputs, dout)
        us = timed(lambda layer=layer: step(layer, inputs, dout), 1)
        case |= {f"{name}_us": us, f"{name}_saved_bytes": saved, f"{name}_peak_bytes": peak}
    return case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: docs/measurements/<gpu>-training.json")
    args = parser.parse_args()
    root = Path(__file__).resolve().parent.parent
    os.environ.setdefault("LOCAL_KERNELS", f"org/moe-grouped-gemm={root}")
    kernel = get_kernel("org/moe-grouped-gemm", version=1)
    torch.manual_seed(0)
    gpu = torch.cuda.get_device_name()
    rate = matmul_rate()
    result = {
        "gpu": gpu,
        "commit": commit(),
        "versions": {m.__name__: m.__version__ for m in (torch, triton, transformers)},
        "flops": rate,
        "cases": [],
    }
    out = args.out or root / "docs/measurements" / f"{gpu.replace(' ', '-')}-training.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{'workload':12} {'T':>6} {'roof us':>9} {'ours us':>9} {'of roof':>8} {'stock':>9} {'speed-up':>9}", end="")
    print("   saved MB: ours, stock   peak MB: ours, stock")
    for workload, tokens in CASES:
        case = run_case(kernel, workload, tokens, rate)
        result["cases"].append(case)
        out.write_text(json.dumps(result, indent=1) + "\n")
        megabytes = [case[f"{name}_{what}_bytes"] / 1e6 for what in ("saved", "peak") for name in ("ours", "stock")]
        print(
            f"{workload:12} {tokens:6} {case['roof_us']:9.0f} {case['ours_us']:9.0f} "
            f"{case['roof_us'] / case['ours_us']:8.2f} {case['stock_us']:9.0f} "
            f"{case['stock_us'] / case['ours_us']:8.2f}x   " + "  ".join(f"{mb:9.0f}" for mb in megabytes),
            flush=True,
        )


if __name__ == "__main__":
    main()
