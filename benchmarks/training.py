#!/usr/bin/env python3
"""Times forward and backward of one expert layer, and what they keep in memory, against Transformers' grouped_mm.

    python benchmarks/training.py        # on a GPU: the table, and docs/measurements/<gpu>-training.json

Gradients of hidden states, routing weights and both weights. Roof: three times the forward's FLOPs at the sustained
matmul rate of the same run. Gradients are compared with stock's before anything is timed. Memory is what lies between
the two passes beyond inputs and weights ("saved"), and the peak of both beyond inputs, weights and gradients ("peak").
"""

from __future__ import annotations

from functools import partial

import torch
import transformers

import common
from benchmark import WORKLOADS, expert_weights, routed_tokens

CASES = [(name, tokens) for name in ("qwen3-30b", "moonlight", "glm45-air") for tokens in (4096, 16384)]


def step(layer, inputs, wanted, dout):
    """One forward and backward; returns the gradients of the tensors wanted."""
    return torch.autograd.grad(layer(*inputs), wanted, dout)


def memory(layer, inputs, wanted, dout) -> tuple[int, int]:
    """Bytes that lie between forward and backward, and the peak, gradients and result not counted."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = layer(*inputs)
    saved = torch.cuda.memory_allocated() - before - out.numel() * out.element_size()
    grads = torch.autograd.grad(out, wanted, dout)
    kept = sum(g.numel() * g.element_size() for g in (*grads, out))
    return saved, torch.cuda.max_memory_allocated() - before - kept


def compare(what, layers, inputs, dout, allowed) -> dict:
    """Checks the gradients of ours against stock's, then measures both; layers: name -> (layer, tensors wanted)."""
    ours, stock = (step(layers[name][0], inputs, layers[name][1], dout) for name in ("ours", "stock"))
    case = {"relative_differences": [common.check(f"{what}: a gradient", a, b, allowed) for a, b in zip(ours, stock)]}
    del ours, stock
    for name, (layer, wanted) in layers.items():
        saved, peak = memory(layer, inputs, wanted, dout)
        us = common.eager_time([lambda layer=layer, wanted=wanted: step(layer, inputs, wanted, dout)])
        case |= {f"{name}_us": us, f"{name}_saved_bytes": saved, f"{name}_peak_bytes": peak}
    return case


def run_cases(run_case, cases, result, out) -> None:
    """Runs each (workload, tokens), and writes the result so far and a row of the table."""
    print(f"{'workload':12} {'T':>6} {'ours us':>9} {'stock us':>9} {'speed-up':>9}", end="")
    print("   saved MB: ours, stock   peak MB: ours, stock   roof us (roof / ours)")
    result["cases"] = []
    for workload, tokens in cases:
        case = run_case(workload, tokens)
        result["cases"].append(case)
        common.write(out, result)
        ours, stock, roof = case["ours_us"], case["stock_us"], case.get("roof_us")
        megabytes = [case[f"{name}_{what}_bytes"] / 1e6 for what in ("saved", "peak") for name in ("ours", "stock")]
        print(f"{workload:12} {tokens:6} {ours:9.0f} {stock:9.0f} {stock / ours:8.2f}x   ", end="")
        print("  ".join(f"{mb:9.0f}" for mb in megabytes), end="")
        print(f"   {roof:9.0f} ({roof / ours:.2f})" if roof else "", flush=True)


def run_case(kernel, rate, workload, tokens) -> dict:
    hidden_dim, inter, experts, top_k, _ = WORKLOADS[workload]
    weights = [w.requires_grad_() for w in expert_weights(hidden_dim, inter, experts, "cuda")]
    x, index, top_k_weights = routed_tokens(tokens, hidden_dim, experts, top_k, "cuda")
    inputs = (x.requires_grad_(), index, top_k_weights.requires_grad_(), *weights)
    module = common.stock_module(hidden_dim, inter, experts, top_k, [w.detach() for w in weights])
    module.gate_up_proj, module.down_proj = (torch.nn.Parameter(w) for w in weights)
    module.config._experts_implementation = "grouped_mm"

    def stock(x, index, top_k_weights, gate_up_proj, down_proj):
        return torch.func.functional_call(
            module, {"gate_up_proj": gate_up_proj, "down_proj": down_proj}, (x, index, top_k_weights)
        )

    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    layers = {"ours": (kernel.moe_experts, wanted), "stock": (stock, wanted)}
    roof_us = 3 * common.forward_flops(workload, tokens) / rate * 1e6
    measured = compare(f"{workload} T={tokens}", layers, inputs, torch.randn_like(x), allowed=2e-2)
    return {"workload": workload, "tokens": tokens, "roof_us": roof_us, **measured}


def main() -> None:
    args = common.argument_parser(__doc__, "docs/measurements/<gpu>-training.json").parse_args()
    common.need_gpu()
    kernel = common.staged_kernel()
    torch.manual_seed(0)
    rate = common.matmul_rate()
    run_cases(partial(run_case, kernel, rate), CASES, common.header(transformers, flops=rate), args.out)


if __name__ == "__main__":
    main()
