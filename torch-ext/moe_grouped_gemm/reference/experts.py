"""The expert layer, with its gradients."""

from __future__ import annotations

import torch

from .gate import Gate, apply_gate, gate_backward
from .grouped import acc_dtype, empty_gradient, grouped_linear, matrix, sort_slots

_NONE = (None, None)


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
) -> torch.Tensor:
    """y[t] = sum_k weight[t, k] * down[e] @ (act(gate[e] @ x[t]) * (up[e] @ x[t])),  e = top_k_index[t, k].

    Arguments and result as `moe_grouped_gemm.moe_experts`; differentiable, but for weights in fp8. Weighting and the
    sum are in at least fp32.
    """
    inputs = (hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj)
    biases, scales = (gate_up_proj_bias, down_proj_bias), (gate_up_proj_scale, down_proj_scale)
    return _forward(*inputs, biases, scales, Gate(activation, limit, alpha, interleaved))[0]


def _forward(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, biases, scales, gate):
    """The layer; z and slots of the rows that belong to an expert; all sorted slots; expert_offsets."""
    sorted_slots, expert_offsets = sort_slots(top_k_index, gate_up_proj.shape[0])
    slots = sorted_slots[: int(expert_offsets[-1])]
    tokens = slots // max(1, top_k_index.shape[1])
    z = grouped_linear(hidden_states[tokens], gate_up_proj, expert_offsets, biases[0], scales[0])
    y = grouped_linear(apply_gate(z, gate), down_proj, expert_offsets, biases[1], scales[1])
    y = y * top_k_weights.reshape(-1, 1)[slots].to(acc_dtype(y))
    # In expert order: the order of every sum is fixed.
    out = torch.zeros(hidden_states.shape, dtype=y.dtype, device=y.device).index_add_(0, tokens, y)
    return out.to(hidden_states.dtype), z, slots, sorted_slots, expert_offsets


def moe_experts_training(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    gate_up_proj_bias: torch.Tensor | None,
    down_proj_bias: torch.Tensor | None,
    *gate,
    scales: tuple[torch.Tensor | None, torch.Tensor | None] = _NONE,
) -> tuple[torch.Tensor, ...]:
    """`moe_experts`, z (S, 2I) before the gate of each sorted row, expert_offsets, sorted_slots and slot_positions.

    Rows of z that belong to no expert are zero here, and anything on a GPU.
    """
    inputs = (hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj)
    biases = (gate_up_proj_bias, down_proj_bias)
    out, routed_z, slots, sorted_slots, expert_offsets = _forward(*inputs, biases, scales, Gate(*gate))
    z = routed_z.new_zeros(sorted_slots.numel(), gate_up_proj.shape[1])
    z[: slots.numel()] = routed_z
    positions = torch.full_like(sorted_slots, -1)
    positions[slots] = torch.arange(slots.numel(), device=slots.device)
    return out, z, expert_offsets, sorted_slots.int(), positions.int()


def moe_experts_backward(
    dout: torch.Tensor,
    hidden_states: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    gate_up_proj_bias: torch.Tensor | None,
    down_proj_bias: torch.Tensor | None,
    z: torch.Tensor,
    expert_offsets: torch.Tensor,
    sorted_slots: torch.Tensor,
    slot_positions: torch.Tensor,
    needs_grad: list[bool],
    *gate,
    scales: tuple[torch.Tensor | None, torch.Tensor | None] = _NONE,
) -> tuple[torch.Tensor, ...]:
    """Gradients of hidden_states, top_k_weights, gate_up_proj, down_proj and the two biases; empty where not needed.

    z and the routing as `moe_experts_training` returns them. Weights in fp8 have none.
    """
    gate = Gate(*gate)
    top_k = top_k_weights.shape[1]
    dtype = acc_dtype(hidden_states)
    weights = top_k_weights.reshape(-1, 1).to(dtype)
    dx = torch.zeros(hidden_states.shape if needs_grad[0] else 0, dtype=dtype, device=dout.device)
    dweights = torch.zeros(weights.numel() if needs_grad[1] else 0, dtype=dtype, device=dout.device)
    dgate_up, ddown = (
        empty_gradient(weight).zero_() if needed else weight.new_empty(0)
        for weight, needed in zip((gate_up_proj, down_proj), needs_grad[2:4])
    )
    dgate_up_bias, ddown_bias = (
        torch.zeros(bias.shape if needed else 0, dtype=dtype, device=dout.device)
        for bias, needed in zip((gate_up_proj_bias, down_proj_bias), needs_grad[4:])
    )
    bounds = expert_offsets.tolist()
    for expert, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        if begin == end:
            continue
        slots = sorted_slots[begin:end].long()
        tokens = slots // top_k
        a = apply_gate(z[begin:end], gate)
        b = dout[tokens] @ matrix(down_proj, scales[1], expert, dout.dtype)
        if needs_grad[1]:
            dweights[slots] = (b.to(dtype) * a).sum(-1)
            if down_proj_bias is not None:
                dweights[slots] += dout[tokens].to(dtype) @ down_proj_bias[expert].to(dtype)
        if needs_grad[3]:
            ddown[expert] = dout[tokens].T @ (a * weights[slots]).to(a.dtype)
        if needs_grad[5]:
            ddown_bias[expert] = (dout[tokens] * weights[slots]).sum(0)
        if not (needs_grad[0] or needs_grad[2] or needs_grad[4]):
            continue
        dz = gate_backward((b * weights[slots]).to(a.dtype), z[begin:end], gate)
        if needs_grad[2]:
            dgate_up[expert] = dz.T @ hidden_states[tokens]
        if needs_grad[4]:
            dgate_up_bias[expert] = dz.to(dtype).sum(0)
        if needs_grad[0]:
            # Not index_add_: on CUDA that is atomic, and a token may come to one expert twice.
            rows = (dz @ matrix(gate_up_proj, scales[0], expert, dz.dtype)).to(dtype)
            dx.index_put_((tokens,), rows, accumulate=True)
    return (
        dx.to(hidden_states.dtype),
        dweights.view(top_k_weights.shape if needs_grad[1] else 0).to(top_k_weights.dtype),
        dgate_up,
        ddown,
        dgate_up_bias.to(dout.dtype),
        ddown_bias.to(dout.dtype),
    )
