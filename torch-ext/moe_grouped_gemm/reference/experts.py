"""The expert layer, with its gradients."""

from __future__ import annotations

import torch

from ..weights.projection import Projection
from .gate import Gate, apply_gate, gate_backward
from .grouped import acc_dtype, empty_gradient, grouped_linear, matrix, sort_slots
from .shared import SharedExperts, shared_experts


def moe_experts(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    activation: str = "silu",
    gate_up_proj_bias: torch.Tensor | None = None,
    down_proj_bias: torch.Tensor | None = None,
    limit: float | None = None,
    alpha: float = 1.702,
    interleaved: bool = False,
    gate_up_proj_scale: torch.Tensor | None = None,
    down_proj_scale: torch.Tensor | None = None,
    shared: SharedExperts | None = None,
) -> torch.Tensor:
    """y[t] = sum_k weight[t, k] * down[e] @ (act(gate[e] @ x[t]) * (up[e] @ x[t])),  e = top_k_index[t, k].

    Arguments and result as `moe_grouped_gemm.moe_experts`; differentiable, but for weights in codes. Weighting and the
    sum are in at least fp32. What `shared` experts give, if there are any, is part of that sum.
    """
    gate_up = Projection(gate_up_proj, gate_up_proj_bias, gate_up_proj_scale)
    down = Projection(down_proj, down_proj_bias, down_proj_scale)
    gate = Gate(activation, limit, alpha, interleaved)
    return _forward(hidden_states, top_k_index, top_k_weights, gate_up, down, gate, shared)[0]


def _forward(hidden_states, top_k_index, top_k_weights, gate_up, down, gate, shared=None):
    """The layer; z and slots of the rows that belong to an expert; all sorted slots; expert_offsets."""
    sorted_slots, expert_offsets = sort_slots(top_k_index, gate_up.weight.shape[0])
    slots = sorted_slots[: int(expert_offsets[-1])]
    tokens = slots // max(1, top_k_index.shape[1])
    z = grouped_linear(hidden_states[tokens], gate_up.weight, expert_offsets, gate_up.bias, gate_up.scale)
    y = grouped_linear(apply_gate(z, gate), down.weight, expert_offsets, down.bias, down.scale)
    y = y * top_k_weights.reshape(-1, 1)[slots].to(acc_dtype(y))
    if shared is None:
        out = torch.zeros(hidden_states.shape, dtype=y.dtype, device=y.device)
    else:
        out = shared_experts(hidden_states, shared, gate).to(y.dtype)
    # In expert order: the order of every sum is fixed.
    out = out.index_add_(0, tokens, y)
    return out.to(hidden_states.dtype), z, slots, sorted_slots, expert_offsets


def moe_experts_training(hidden_states, top_k_index, top_k_weights, gate_up: Projection, down: Projection, gate: Gate):
    """`moe_experts`, z (S, 2I) before the gate of each sorted row, expert_offsets, sorted_slots and slot_positions.

    Rows of z that belong to no expert are zero here, and anything on a GPU.
    """
    inputs = (hidden_states, top_k_index, top_k_weights, gate_up, down, gate)
    out, routed_z, slots, sorted_slots, expert_offsets = _forward(*inputs)
    z = routed_z.new_zeros(sorted_slots.numel(), gate_up.weight.shape[1])
    z[: slots.numel()] = routed_z
    positions = torch.full_like(sorted_slots, -1)
    positions[slots] = torch.arange(slots.numel(), device=slots.device)
    return out, z, expert_offsets, sorted_slots.int(), positions.int()


def moe_experts_backward(
    dout, hidden_states, top_k_weights, gate_up, down, z, expert_offsets, sorted_slots, needs_grad, gate
):
    """Gradients of hidden_states, top_k_weights, gate_up and down, those of fields of the two: None where not needed.

    z and the routing as `moe_experts_training` returns them; needs_grad: four, as the gradients. Weights in codes have
    none. hidden_states is read for that of gate_up's weight alone.
    """
    needs_x, needs_weights, needs_gate_up, needs_down = needs_grad
    top_k, dtype = top_k_weights.shape[1], acc_dtype(dout)
    weights = top_k_weights.reshape(-1, 1).to(dtype)

    def zeros(*shape):
        return torch.zeros(shape, dtype=dtype, device=dout.device)

    dx = zeros(*dout.shape) if needs_x else None
    dweights = zeros(weights.numel()) if needs_weights else None
    dgate_up, ddown = (
        Projection(
            empty_gradient(p.weight).zero_() if needs.weight else None, zeros(*p.bias.shape) if needs.bias else None
        )
        for p, needs in ((gate_up, needs_gate_up), (down, needs_down))
    )
    bounds = expert_offsets.tolist()
    for expert, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        if begin == end:
            continue
        slots = sorted_slots[begin:end].long()
        tokens = slots // top_k
        a = apply_gate(z[begin:end], gate)
        b = dout[tokens] @ matrix(down.weight, down.scale, expert, dout.dtype)
        if needs_weights:
            dweights[slots] = (b.to(dtype) * a).sum(-1)
            if down.bias is not None:
                dweights[slots] += dout[tokens].to(dtype) @ down.bias[expert].to(dtype)
        if needs_down.weight:
            ddown.weight[expert] = dout[tokens].T @ (a * weights[slots]).to(a.dtype)
        if needs_down.bias:
            ddown.bias[expert] = (dout[tokens] * weights[slots]).sum(0)
        if not (needs_x or needs_gate_up.weight or needs_gate_up.bias):
            continue
        dz = gate_backward((b * weights[slots]).to(a.dtype), z[begin:end], gate)
        if needs_gate_up.weight:
            dgate_up.weight[expert] = dz.T @ hidden_states[tokens]
        if needs_gate_up.bias:
            dgate_up.bias[expert] = dz.to(dtype).sum(0)
        if needs_x:
            # Not index_add_: on CUDA that is atomic, and a token may come to one expert twice.
            rows = (dz @ matrix(gate_up.weight, gate_up.scale, expert, dz.dtype)).to(dtype)
            dx.index_put_((tokens,), rows, accumulate=True)
    dgate_up, ddown = (p if p.bias is None else p._replace(bias=p.bias.to(dout.dtype)) for p in (dgate_up, ddown))
    dx = None if dx is None else dx.to(dout.dtype)
    dweights = None if dweights is None else dweights.view(top_k_weights.shape).to(top_k_weights.dtype)
    return dx, dweights, dgate_up, ddown
