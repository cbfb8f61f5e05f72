"""Adapters of `moe_experts_lora`, random and of several ranks, as plain tensors."""

import torch


def adapters(weight, ranks, seed):
    """In turn A (E, R, K) and B (N, R, E), each pair about as large as the weight; B lies as PEFT's does."""
    generator = torch.Generator().manual_seed(seed)
    experts, rows, columns = weight.shape
    for rank in ranks:
        yield torch.randn(experts, rank, columns, generator=generator).to(weight) / columns**0.5
        yield torch.randn(rows, rank, experts, generator=generator).to(weight) / rank**0.5


SCALINGS = [0.7, 2.0, -1.3]


def low_rank(lora, args, up, down):
    factors = [
        tuple(lora.LoraFactors(A, B.permute(2, 0, 1), s) for A, B, s in zip(ts[::2], ts[1::2], SCALINGS))
        for ts in (up, down)
    ]
    return lora.moe_experts_lora(*args, *factors)
