"""Experts that every token has, beside the routed ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..torch_ops import without_autocast
from .gate import ACTIVATIONS, Gate


class SharedExperts(NamedTuple):
    """y[t] = sigmoid(gate_weight @ x[t]) * down @ (act(gate @ x[t]) * (up @ x[t])), act that of the routed experts.

    Their Gate has no limit and is not "swigluoai". Weights in the dtype of x, each in memory of its own, rows
    contiguous.

    Attributes:
        gate_proj: (Is, H).
        up_proj: (Is, H).
        down_proj: (H, Is).
        gate_weight: (1, H), or None: then without the sigmoid.
    """

    gate_proj: torch.Tensor
    up_proj: torch.Tensor
    down_proj: torch.Tensor
    gate_weight: torch.Tensor | None = None

    def of(self, x: torch.Tensor, gate: Gate) -> torch.Tensor:
        return shared_experts(x, self, gate)


def shared_experts(x: torch.Tensor, shared: SharedExperts, gate: Gate) -> torch.Tensor:
    """(T, H) -> (T, H), each operation in the dtype of x, as the modules of a model have it; differentiable."""
    act_fn, _ = ACTIVATIONS[gate.activation]
    with without_autocast(x):
        a = act_fn(F.linear(x, shared.gate_proj), gate.alpha) * F.linear(x, shared.up_proj)
        y = F.linear(a, shared.down_proj)
        return y if shared.gate_weight is None else torch.sigmoid(F.linear(x, shared.gate_weight)) * y
