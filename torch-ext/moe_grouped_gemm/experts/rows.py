"""The routed rows of a pass: token t stands once for each of its slots t * top_k + k, in expert order."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import gpu
from ..launch_configs import PAD


class Rows(NamedTuple):
    """`Routing`, perhaps with each expert's rows padded to a multiple of PAD (padding rows have slot -1), and more.

    Attributes:
        schedule: the tiles of a GEMM over these rows, as `route` of kernels/routing.py; or None.
        weights: (T, top_k) of the slots.
    """

    offsets: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    schedule: torch.Tensor | None
    weights: torch.Tensor

    @property
    def top_k(self) -> int:
        return self.weights.shape[1]

    def padded(self) -> Rows:
        return Rows(*gpu.launchers().pad(self.offsets, self.slots), None, self.weights)

    def scheduled(self, block_m: int) -> Rows:
        schedule = gpu.launchers().tile_schedule(self.offsets, self.slots.numel(), block_m)
        return self._replace(schedule=schedule)

    def gather(self, x: torch.Tensor, ordered: bool = False) -> torch.Tensor:
        """(T, H) -> a row for each slot; padding rows are zero. ordered: as `ordered_gemm` of weights/ takes them."""
        return gpu.launchers().gather(x, self.slots, self.offsets, self.top_k, ordered=ordered)

    def combine(
        self, y: torch.Tensor, weights: torch.Tensor | None = None, addend: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A row for each slot -> (T, H), each token's weighted sum, and its row of `addend`."""
        return gpu.launchers().combine(y, self.positions, self.weights if weights is None else weights, addend)


def route(top_k_index: torch.Tensor, top_k_weights: torch.Tensor, num_experts: int, block_m: int) -> Rows:
    return Rows(*gpu.launchers().route(top_k_index, num_experts, block_m), top_k_weights)


def padded_size(slots: int, num_experts: int) -> int:
    """Rows after padding, at most: it is the experts' counts that decide, which only the device knows."""
    return (slots // PAD + torch.sym_min(num_experts, slots)) * PAD
