#!/usr/bin/env python3
"""Times one DeepSeek-V3 expert layer with weights in 4 bits: against our fp8 and bf16, and torch's dequantisation.

    python benchmarks/fp4.py        # on a GPU: the table, and docs/measurements/<gpu>-fp4.json

Weights in the three precisions take 40 GB, torch's dequantised copies 23 GB. Roof of a case: max(FLOPs / sustained
bf16 rate, bytes of the distinct experts hit / read bandwidth), 4.25 bits a weight, both measured in the same run.
Results are checked before anything is timed. Steps of training, at 4096 tokens, have frozen weights: gradients of the
hidden states, and with adapters (r = 16 on both weights) those of the adapters.
"""

from __future__ import annotations

import statistics
from importlib import import_module

import torch

import common
from benchmark import WORKLOADS, expert_weights, routed_tokens
from fp8 import TOKENS, dequantize_and_grouped_mm

WEIGHT_BYTES = 4.25 / 8
TRAINING_TOKENS, RANK = 4096, 16


def dequantized(codes, scale):
    """The whole stack (E, N, K) in bf16, as one would do without a kernel for it."""
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.bfloat16, device=codes.device)
    numbers = torch.cat([numbers, -numbers])
    out = torch.empty(*codes.shape[:2], 2 * codes.shape[2], dtype=torch.bfloat16, device=codes.device)
    for expert, (bytes_, exponents) in enumerate(zip(codes.view(torch.uint8), scale)):
        nibbles = torch.stack([bytes_ & 15, bytes_ >> 4], dim=-1).flatten(1)
        groups = numbers[nibbles.int()].unflatten(1, (-1, 32)) * exponents.to(torch.bfloat16)[:, :, None]
        out[expert] = groups.flatten(1)
    return out


def run_case(kernel, tokens, dense, fp8, fp4, ceilings):
    sets = common.input_sets("dsv3", tokens)

    def layer(args, codes, scales, **options):
        return kernel.moe_experts(*args, *codes, gate_up_proj_scale=scales[0], down_proj_scale=scales[1], **options)

    expected = kernel.reference.moe_experts(*sets[0], *fp4[0], gate_up_proj_scale=fp4[1][0], down_proj_scale=fp4[1][1])
    hit = statistics.mean(index.unique().numel() for _, index, _ in sets)
    case = {
        "tokens": tokens,
        "experts_hit": hit,
        "relative_error": common.check(f"T={tokens}", layer(sets[0], *fp4), expected, 1e-2),
        "roof_us": common.roof("dsv3", tokens, hit, ceilings["bf16_flops"], ceilings["bytes"], WEIGHT_BYTES),
    }
    layers = {
        "fp4": lambda args: layer(args, *fp4),
        "fp8": lambda args: layer(args, *fp8),
        "bf16": lambda args: kernel.moe_experts(*args, *dense),
    }
    for name, function in layers.items():
        case |= common.all_times(name, [lambda args=args, function=function: function(args) for args in sets])
    if tokens in (64, 4096):
        by_torch = lambda: dequantize_and_grouped_mm(*sets[0], *fp4, dequantized)  # noqa: E731
        common.check(f"torch, T={tokens}", by_torch(), expected, 2e-2)
        case["torch_eager_us"] = common.eager_time([by_torch])
    return case


def training_steps(kernel, dense, fp4) -> dict[str, float]:
    """Microseconds of forward and backward, over 4-bit and over bf16 weights, without and with adapters."""
    functional = import_module(f"{kernel.__name__}.functional")
    LoraFactors = import_module(f"{kernel.__name__}.experts.lora").LoraFactors
    hidden_dim, inter, experts, top_k, _ = WORKLOADS["dsv3"]
    x, *routing = routed_tokens(TRAINING_TOKENS, hidden_dim, experts, top_k, "cuda")
    dout, times = torch.randn_like(x), {}
    adapters = []
    for weight in dense:
        A, B = torch.randn(experts, RANK, weight.shape[2]), torch.randn(experts, weight.shape[1], RANK)
        factors = (t.to(weight).mul_(0.02).requires_grad_() for t in (A, B))
        adapters.append((LoraFactors(*factors, 1.0),))
    scales = dict(zip(("gate_up_proj_scale", "down_proj_scale"), fp4[1]))
    x.requires_grad_()
    for name, lora in (("data_gradients", ((), ())), ("lora", adapters)):
        wanted = [x, *(t for factors in lora for f in factors for t in f[:2])]
        for format_name, weights, options in (("fp4", fp4[0], scales), ("bf16", dense, {})):

            def step(weights=weights, options=options, lora=lora, wanted=wanted):
                out = functional.moe_experts_lora(x, *routing, *weights, *lora, **options)
                torch.autograd.grad(out, wanted, dout)

            times[f"{name}_{format_name}_us"] = common.eager_time([step])
    return times


def row(case) -> str:
    fp4, fp8, bf16 = (min(case[f"{name}_graph_us"], case[f"{name}_eager_us"]) for name in ("fp4", "fp8", "bf16"))
    return (
        f"{case['tokens']:6} {case['roof_us']:9.1f} {case['fp4_graph_us']:10.1f} {case['fp4_eager_us']:9.1f} "
        f"{case['roof_us'] / fp4:8.2f} {fp8:9.1f} {fp8 / fp4:8.2f}x {bf16:9.1f} {bf16 / fp4:8.2f}x "
        f"{case.get('torch_eager_us', float('nan')):10.1f}"
    )


def main() -> None:
    parser = common.argument_parser(__doc__, "docs/measurements/<gpu>-fp4.json")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    args = parser.parse_args()
    common.need_gpu()
    kernel = common.staged_kernel()
    ceilings = common.measure_ceilings(bf16_flops=common.matmul_rate)
    dense = expert_weights(*WORKLOADS["dsv3"][:3], "cuda")
    fp8, fp4 = (tuple(zip(*map(quantize, dense))) for quantize in (kernel.quantize_fp8, kernel.quantize_fp4))
    result = common.header(ceilings=ceilings, cases=[])
    print(
        f"{'T':>6} {'roof':>9} {'fp4 graph':>10} {'eager':>9} {'of roof':>8} {'fp8':>9} {'fp8/fp4':>9} {'bf16':>9}",
        end="",
    )
    print(f" {'bf16/fp4':>9} {'torch':>10}   microseconds")
    for tokens in args.tokens:
        with torch.no_grad():
            case = run_case(kernel, tokens, dense, fp8, fp4, ceilings)
        torch.cuda.empty_cache()
        result["cases"].append(case)
        common.write(args.out, result)
        print(row(case), flush=True)
    result["training"] = training_steps(kernel, dense, fp4)
    common.write(args.out, result)
    print(result["training"])
    print(args.out)


if __name__ == "__main__":
    main()
