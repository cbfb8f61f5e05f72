#!/usr/bin/env python3
"""Times one DeepSeek-V3 expert layer with fp8 weights: against our bf16, and torch's dequantisation and grouped_mm.

    python benchmarks/fp8.py        # on a GPU: the table, and docs/measurements/<gpu>-fp8.json

Weights in both precisions take 34 GB, torch's dequantised copies as much as bf16's again. Roof of a case: max(FLOPs /
sustained fp8 rate, bytes of the distinct experts hit / read bandwidth), both measured in the same run, the rate through
`torch._scaled_mm` of 8192^3. Results are checked before anything is timed: fp8 products may be off by the rounding of
activations, and without it (`quantize_activations=False`) by bf16's alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from kernels import get_kernel

from benchmark_moe import (
    WORKLOADS,
    commit,
    eager_time,
    expert_weights,
    graph_time,
    matmul_rate,
    read_bandwidth,
    routed_tokens,
    timed,
)

TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)


def fp8_rate():
    """FLOP per second of back-to-back fp8 matmuls on random data, after a second of them."""
    a, b = (torch.randn(8192, 8192, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    scale = torch.ones((), device="cuda")

    def matmul():
        return torch._scaled_mm(a, b.t(), scale, scale, out_dtype=torch.bfloat16)

    for _ in range(1200):
        matmul()
    return 2 * 8192**3 / (timed(matmul, 1) * 1e-6)


def dequantized(codes, scale):
    """The whole stack (E, N, K) in bf16, as one would do without a kernel for it."""
    blocks = codes.to(torch.bfloat16).unflatten(2, (-1, 128)).unflatten(1, (-1, 128))
    return (blocks * scale.to(torch.bfloat16)[:, :, None, :, None]).flatten(3).flatten(1, 2)


def dequantize_and_grouped_mm(x, index, top_k_weights, codes, scales):
    """The layer by torch alone, for one token and more."""
    slots = index.flatten()
    order = slots.argsort(stable=True)
    offsets = torch.bincount(slots, minlength=codes[0].shape[0]).cumsum(0).int()
    gate_up_proj, down_proj = (dequantized(c, s) for c, s in zip(codes, scales))
    gate, up = F.grouped_mm(x[order // index.shape[1]], gate_up_proj.mT, offs=offsets).chunk(2, dim=1)
    y = F.grouped_mm(F.silu(gate) * up, down_proj.mT, offs=offsets)
    rows = torch.empty_like(y)
    rows[order] = y
    return (rows.view(*index.shape, -1) * top_k_weights[..., None]).sum(1).to(x.dtype)


def check(name, out, expected, allowed):
    error = ((out.float() - expected.float()).norm() / expected.float().norm()).item()
    if not error < allowed:
        raise SystemExit(f"{name}: relative error {error:.2g}: nothing is timed")
    return error


def run_case(kernel, tokens, dense, codes, scales, ceilings):
    hidden_dim, inter, experts, top_k, _ = WORKLOADS["dsv3"]
    sets = [routed_tokens(tokens, hidden_dim, experts, top_k, "cuda") for _ in range(4 if tokens <= 64 else 1)]
    options = {"gate_up_proj_scale": scales[0], "down_proj_scale": scales[1]}
    expected = kernel.reference.moe_experts(*sets[0], *codes, **options)
    errors = [
        check(f"T={tokens}, quantize_activations={quantize}", out, expected, allowed)
        for quantize, allowed in ((True, 6e-2), (False, 1e-2))
        for out in [kernel.moe_experts(*sets[0], *codes, quantize_activations=quantize, **options)]
    ]
    hit = statistics.mean(index.unique().numel() for _, index, _ in sets)
    flops = 2 * tokens * top_k * 3 * hidden_dim * inter
    case = {
        "tokens": tokens,
        "experts_hit": hit,
        "relative_errors": errors,
        "roof_us": max(flops / ceilings["fp8_flops"], hit * 3 * hidden_dim * inter / ceilings["bytes"]) * 1e6,
    }
    layers = {
        "fp8": lambda args: kernel.moe_experts(*args, *codes, **options),
        "fp8_weights": lambda args: kernel.moe_experts(*args, *codes, quantize_activations=False, **options),
        "bf16": lambda args: kernel.moe_experts(*args, *dense),
    }
    for name, layer in layers.items():
        calls = [lambda args=args, layer=layer: layer(args) for args in sets]
        case |= {f"{name}_graph_us": graph_time(calls), f"{name}_eager_us": eager_time(calls)}
    check(f"torch, T={tokens}", dequantize_and_grouped_mm(*sets[0], codes, scales), expected, 2e-2)
    case["torch_eager_us"] = timed(lambda: dequantize_and_grouped_mm(*sets[0], codes, scales), 1)
    return case


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--out", type=Path, help="default: docs/measurements/<gpu>-fp8.json")
    args = parser.parse_args()
    root = Path(__file__).resolve().parent.parent
    os.environ.setdefault("LOCAL_KERNELS", f"org/moe-grouped-gemm={root}")
    kernel = get_kernel("org/moe-grouped-gemm", version=1)
    torch.manual_seed(0)
    gpu = torch.cuda.get_device_name()
    ceilings = {"fp8_flops": fp8_rate(), "bf16_flops": matmul_rate(), "bytes": read_bandwidth()}
    torch.cuda.empty_cache()
    dense = expert_weights(*(WORKLOADS["dsv3"][i] for i in (0, 1, 2)), "cuda")
    codes, scales = zip(*(kernel.quantize_fp8(weight) for weight in dense))
    result = {
        "gpu": gpu,
        "commit": commit(),
        "versions": {m.__name__: m.__version__ for m in (torch, triton)},
        "ceilings": ceilings,
        "cases": [],
    }
    out = args.out or root / "docs/measurements" / f"{gpu.replace(' ', '-')}-fp8.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    rates = ", ".join(f"{name} {value / 1e12:.4g}e12" for name, value in ceilings.items())
    print(f"{gpu}: {rates} per second, sustained")
    print(f"{'T':>6} {'roof':>9} {'fp8 graph':>10} {'eager':>9} {'of roof':>8} {'weights':>9} {'bf16':>9}", end="")
    print(f" {'bf16/fp8':>9} {'torch':>10}   microseconds")
    for tokens in args.tokens:
        with torch.no_grad():
            case = run_case(kernel, tokens, dense, codes, scales, ceilings)
        torch.cuda.empty_cache()
        result["cases"].append(case)
        out.write_text(json.dumps(result, indent=1) + "\n")
        ours, bf16 = (min(case[f"{name}_graph_us"], case[f"{name}_eager_us"]) for name in ("fp8", "bf16"))
        print(
            f"{tokens:6} {case['roof_us']:9.1f} {case['fp8_graph_us']:10.1f} {case['fp8_eager_us']:9.1f} "
            f"{case['roof_us'] / ours:8.2f} {case['fp8_weights_graph_us']:9.1f} {bf16:9.1f} {bf16 / ours:8.2f}x "
            f"{case['torch_eager_us']:10.1f}",
            flush=True,
        )
    print(out)


if __name__ == "__main__":
    main()
