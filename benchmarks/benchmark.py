"""One expert layer, as `kernels benchmark` times it: against plain PyTorch, which also checks the result.

    kernels benchmark .                       # in a checkout, after `make build`
    kernels benchmark . --visual moe          # and the pictures media/moe_*.svg

Plain PyTorch is the kernel's `reference`, whose matmuls are torch's own grouped_mm where torch has it. Without a GPU a
layer with 1/128 of the weights is timed, and `moe_experts` is the reference itself.

The Hub has this file alone, so it imports nothing beside it; the other benchmarks take their layers from it.
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


class Qwen3MoE(Benchmark):
    """The experts of Qwen3-30B-A3B for one token, for 64 and for 4096."""

    seed = 0

    def prepare(self, tokens):
        hidden_dim, inter, experts, top_k, _ = WORKLOADS["qwen3-30b"]
        if self.device == "cpu":
            hidden_dim, inter, experts = hidden_dim // 8, inter // 4, experts // 4
        self.weights = expert_weights(hidden_dim, inter, experts, self.device)
        self.inputs = routed_tokens(tokens, hidden_dim, experts, top_k, self.device)

    def setup_1_token(self):
        self.prepare(1)

    def setup_64_tokens(self):
        self.prepare(64)

    def setup_4096_tokens(self):
        self.prepare(4096)

    def benchmark_1_token(self):
        self.out = self.kernel.moe_experts(*self.inputs, *self.weights)

    def verify_1_token(self):
        return self.kernel.reference.moe_experts(*self.inputs, *self.weights)

    benchmark_64_tokens = benchmark_4096_tokens = benchmark_1_token
    verify_64_tokens = verify_4096_tokens = verify_1_token
