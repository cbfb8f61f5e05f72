#!/usr/bin/env python3
"""One expert layer: its inputs, and two cases of it in the form that the Hub collects.

    python benchmarks/benchmark_moe.py                     # on a GPU: the table of layer.py
    kernels benchmark org/moe-grouped-gemm --version 1     # the two cases

The Hub has this file alone: only what runs as a script may import those beside it.
"""

from __future__ import annotations

import torch
from kernels.benchmark import Benchmark

WORKLOADS = {  # H, I, E, top_k, T
    "qwen3-30b": (2048, 768, 128, 8, (1, 64, 1024, 8192)),
    "moonlight": (2048, 1408, 64, 6, (1, 64, 1024, 8192)),
    "glm45-air": (4096, 1408, 128, 8, (1, 64, 1024, 8192)),
    "dsv3": (7168, 2048, 256, 8, (1, 16, 64, 256, 1024, 4096, 16384)),
}


def expert_weights(hidden_dim, inter, experts, device):
    """gate_up_proj (E, 2I, H) and down_proj (E, H, I) in bf16, N(0, 0.02)."""
    return [
        torch.empty(experts, *shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
        for shape in ((2 * inter, hidden_dim), (hidden_dim, inter))
    ]


def routed_tokens(tokens, hidden_dim, experts, top_k, device, zipf=False):
    """hidden_states, top_k_index (each token picks top_k distinct experts) and top_k_weights."""
    odds = torch.ones(experts, device=device)
    if zipf:
        odds = 1 / torch.arange(1, experts + 1, device=device)
    index = torch.multinomial(odds.expand(tokens, -1), top_k)
    weights = torch.softmax(torch.randn(tokens, top_k, device=device), dim=-1)
    return torch.randn(tokens, hidden_dim, device=device, dtype=torch.bfloat16), index, weights


class MoEExpertsBenchmark(Benchmark):
    """Two cases of the moonlight layer for `kernels benchmark`."""

    seed = 0

    def prepare(self, tokens):
        hidden_dim, inter, experts, top_k, _ = WORKLOADS["moonlight"]
        self.weights = expert_weights(hidden_dim, inter, experts, self.device)
        self.inputs = routed_tokens(tokens, hidden_dim, experts, top_k, self.device)

    def setup_decode(self):
        self.prepare(1)

    def benchmark_decode(self):
        self.out = self.kernel.moe_experts(*self.inputs, *self.weights)

    def verify_decode(self):
        return self.kernel.reference.moe_experts(*self.inputs, *self.weights)

    def setup_prefill(self):
        self.prepare(4096)

    benchmark_prefill = benchmark_decode
    verify_prefill = verify_decode


if __name__ == "__main__":
    import layer

    layer.main()
