"""The layer around any function between its two GEMMs, and before the sum: differentiable ops, one after another."""

from __future__ import annotations

from ..reference import Gate, apply_gate
from . import blocks


def forward(hidden_states, top_k_index, top_k_weights, gate_up, down, gate, norm=None):
    """(T, H) -> (T, H). gate: one of ours or a function of z; norm: a function of y, or None."""
    offsets, slots, positions = blocks.route(top_k_index, gate_up.weight.shape[0])
    positions = positions.view(top_k_index.shape)
    x = blocks.gather(hidden_states, slots, positions)
    z = _product(x, gate_up, offsets)
    a = apply_gate(z, gate) if isinstance(gate, Gate) else gate(z)
    y = _product(a.to(x.dtype), down, offsets)
    if norm is not None:
        y = norm(y).to(x.dtype)
    return blocks.combine(y, top_k_weights, slots, positions)


def _product(x, projection, offsets):
    """y[r] = (W[e] + B[e] @ A[e]) @ x[r] + bias[e] for the rows r of expert e; A and B may be None."""
    weight, bias, scale, A, B = projection
    y = blocks.grouped_gemm(x, weight, bias, scale, offsets, False)
    if A is None:
        return y
    u = blocks.grouped_gemm(x, A, None, None, offsets, False)
    return y + blocks.grouped_gemm(u, B, None, None, offsets, False)
