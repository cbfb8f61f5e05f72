"""Between the two GEMMs: a = act(gate) * up, and its gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Gate(NamedTuple):
    """a = act(g) * u, where g and u are gate and up, clamped to g <= limit and -limit <= u <= limit if limit is given.

    "swigluoai": a = g * sigmoid(alpha * g) * (u + 1). Interleaved: rows of gate_up_proj are gate, up, gate, up, ...
    """

    activation: str = "silu"
    limit: float | None = None
    alpha: float = 1.702
    interleaved: bool = False


def _swigluoai_backward(dy, x, alpha):
    s = torch.sigmoid(alpha * x)
    return dy * s * (1 + alpha * x * (1 - s))


# name -> (function (x, alpha), its backward (dy, x, alpha) -> dx)
ACTIVATIONS = {
    "silu": (lambda x, _: F.silu(x), lambda dy, x, _: torch.ops.aten.silu_backward(dy, x)),
    "gelu": (lambda x, _: F.gelu(x), lambda dy, x, _: torch.ops.aten.gelu_backward(dy, x)),
    "gelu_pytorch_tanh": (
        lambda x, _: F.gelu(x, approximate="tanh"),
        lambda dy, x, _: torch.ops.aten.gelu_backward(dy, x, approximate="tanh"),
    ),
    "relu": (lambda x, _: F.relu(x), lambda dy, x, _: torch.ops.aten.threshold_backward(dy, x, 0)),
    "swigluoai": (lambda x, alpha: x * torch.sigmoid(alpha * x), _swigluoai_backward),
}


def _split(z: torch.Tensor, gate: Gate) -> tuple[torch.Tensor, torch.Tensor]:
    """gate and up of each row of z, neither clamped."""
    return (z[:, ::2], z[:, 1::2]) if gate.interleaved else z.chunk(2, dim=-1)


def apply_gate(z: torch.Tensor, gate: Gate) -> torch.Tensor:
    """(S, 2I) -> (S, I)."""
    g, u = _split(z, gate)
    if gate.limit is not None:
        g, u = g.clamp(max=gate.limit), u.clamp(-gate.limit, gate.limit)
    act_fn, _ = ACTIVATIONS[gate.activation]
    return act_fn(g, gate.alpha) * (u + 1 if gate.activation == "swigluoai" else u)


def gate_backward(da: torch.Tensor, z: torch.Tensor, gate: Gate) -> torch.Tensor:
    """(S, I), (S, 2I) -> the gradient of z."""
    g, u = _split(z, gate)
    limit = gate.limit
    g_clamped, u_clamped = (g, u) if limit is None else (g.clamp(max=limit), u.clamp(-limit, limit))
    act_fn, act_backward = ACTIVATIONS[gate.activation]
    dg = act_backward(da * (u_clamped + 1 if gate.activation == "swigluoai" else u_clamped), g_clamped, gate.alpha)
    du = da * act_fn(g_clamped, gate.alpha)
    if limit is not None:
        dg, du = dg.masked_fill(g > limit, 0), du.masked_fill(u.abs() > limit, 0)
    return torch.stack([dg, du], dim=-1).flatten(1) if gate.interleaved else torch.cat([dg, du], dim=-1)
