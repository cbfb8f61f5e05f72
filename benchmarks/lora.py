#!/usr/bin/env python3
"""Times LoRA on one expert layer through stock PEFT: this kernel against Transformers' grouped_mm.

    python benchmarks/lora.py        # on a GPU: the table, and docs/measurements/<gpu>-lora.json

r = 16 on both weights, which are frozen; forward and backward, with gradients of the hidden states and of A and B. The
two are compared before anything is timed. Memory is what training.py measures: what lies between the two passes
("saved"), and the peak of both, gradients and result not counted.
"""

from __future__ import annotations

import peft
import torch
import transformers
from torch import nn

from benchmark import WORKLOADS, expert_weights, routed_tokens
from common import argument_parser, header, need_gpu, staged_kernel, stock_module
from training import compare, run_cases

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
    x, *routing = routed_tokens(tokens, hidden_dim, experts, top_k, device)
    inputs = (x.requires_grad_(), *routing)
    layers = {}
    for name, implementation in (("ours", "moe_grouped_gemm"), ("stock", "grouped_mm")):
        layer = with_adapter(stock_module(hidden_dim, inter, experts, top_k, weights), implementation).to(device)
        layers[name] = layer, [x, *(p for p in layer.parameters() if p.requires_grad)]
    measured = compare(f"{workload} T={tokens}", layers, inputs, torch.randn_like(x), allowed=5e-2)
    return {"workload": workload, "tokens": tokens, "rank": RANK, **measured}


def main() -> None:
    args = argument_parser(__doc__, "docs/measurements/<gpu>-lora.json").parse_args()
    need_gpu()
    staged_kernel().register()
    torch.manual_seed(0)
    run_cases(run_case, CASES, header(transformers, peft), args.out)


if __name__ == "__main__":
    main()
