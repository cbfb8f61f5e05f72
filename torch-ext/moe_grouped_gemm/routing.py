"""Tokens to expert-sorted order, and back."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import reference


class Routing(NamedTuple):
    """Where each routed slot `t * top_k + k` goes.

    Attributes:
        expert_offsets: (E + 1,) int32, leading 0, exclusive: expert e owns the sorted rows
            [expert_offsets[e], expert_offsets[e + 1]).
        sorted_slots: (S,) int32, the slots in expert order, ascending within an expert; skipped slots come last.
        slot_positions: (S,) int32, the sorted row of each slot; -1 for a skipped slot.
    """

    expert_offsets: torch.Tensor
    sorted_slots: torch.Tensor
    slot_positions: torch.Tensor


def route_torch(top_k_index: torch.Tensor, num_experts: int) -> Routing:
    """`moe_grouped_gemm.route` in plain torch."""
    sorted_slots, expert_offsets = reference.sort_slots(top_k_index, num_experts)
    positions = torch.arange(sorted_slots.numel(), dtype=torch.int32, device=top_k_index.device)
    slot_positions = torch.empty_like(positions)
    slot_positions[sorted_slots] = torch.where(positions < expert_offsets[-1], positions, -1)
    return Routing(expert_offsets, sorted_slots.int(), slot_positions)
