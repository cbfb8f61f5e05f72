"""The expert layer over fp8 weights in plain torch: the CPU path, its backward, and what tests compare with.

As reference.py over dequantised weights, but only one expert's are there at a time, and activations stay as they are.
"""

from __future__ import annotations

import torch

from .quant import dequantize
from .reference import Gate, _acc_dtype, apply_gate, gate_backward, sort_slots


def grouped_gemm(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, expert_offsets: torch.Tensor, transposed: bool = False
) -> torch.Tensor:
    """y[r] = W[e] @ x[r], or W[e]^T @ x[r], for the rows r of expert e; other rows are zero."""
    y = x.new_zeros(x.shape[0], weight.shape[2 if transposed else 1])
    bounds = expert_offsets.tolist()
    for expert, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        if begin < end:
            w = dequantize(weight[expert], scale[expert], x.dtype)
            torch.mm(x[begin:end], w if transposed else w.t(), out=y[begin:end])
    return y


def moe_experts(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    gate_up_proj_scale: torch.Tensor,
    down_proj_scale: torch.Tensor,
    activation: str = "silu",
) -> torch.Tensor:
    """`moe_grouped_gemm.moe_experts` with fp8 weights; not differentiable."""
    return moe_experts_training(
        hidden_states,
        top_k_index,
        top_k_weights,
        gate_up_proj,
        down_proj,
        gate_up_proj_scale,
        down_proj_scale,
        activation,
    )[0]


def moe_experts_training(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    gate_up_proj_scale: torch.Tensor,
    down_proj_scale: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, ...]:
    """`moe_experts`, and z, expert_offsets, sorted_slots and slot_positions as `reference.moe_experts_training`."""
    sorted_slots, expert_offsets = sort_slots(top_k_index, gate_up_proj.shape[0])
    routed = int(expert_offsets[-1])
    slots = sorted_slots[:routed]
    x = hidden_states[sorted_slots // max(1, top_k_index.shape[1])]
    z = grouped_gemm(x, gate_up_proj, gate_up_proj_scale, expert_offsets)
    y = grouped_gemm(apply_gate(z, Gate(activation)), down_proj, down_proj_scale, expert_offsets)[:routed]
    y = y * top_k_weights.reshape(-1, 1)[slots].to(_acc_dtype(y))
    out = torch.zeros(hidden_states.shape, dtype=y.dtype, device=y.device)
    out.index_add_(0, slots // max(1, top_k_index.shape[1]), y)
    positions = torch.full_like(sorted_slots, -1)
    positions[slots] = torch.arange(routed, device=slots.device)
    return out.to(hidden_states.dtype), z, expert_offsets, sorted_slots.int(), positions.int()


def moe_experts_backward(
    dout: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    gate_up_proj_scale: torch.Tensor,
    down_proj_scale: torch.Tensor,
    z: torch.Tensor,
    expert_offsets: torch.Tensor,
    sorted_slots: torch.Tensor,
    slot_positions: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of (hidden_states, top_k_weights)."""
    gate = Gate(activation)
    acc_dtype = _acc_dtype(dout)
    tokens, top_k = top_k_weights.shape
    slots = sorted_slots.long()
    b = grouped_gemm(dout[slots // max(1, top_k)], down_proj, down_proj_scale, expert_offsets, transposed=True)
    row_dweights = (b.to(acc_dtype) * apply_gate(z, gate)).sum(-1)
    da = (b * top_k_weights.reshape(-1, 1)[slots].to(acc_dtype)).to(b.dtype)
    dz = gate_backward(da, z, gate)
    rows = grouped_gemm(dz, gate_up_proj, gate_up_proj_scale, expert_offsets, transposed=True)
    # Back to tokens by gathers: the order of every sum is fixed.
    positions = slot_positions.long().view(tokens, top_k)
    skipped = positions < 0
    positions = positions.clamp(min=0)
    dweights = row_dweights[positions]
    dx = torch.zeros(dout.shape, dtype=acc_dtype, device=dout.device)
    for k in range(top_k):
        dx += rows[positions[:, k]].to(acc_dtype).masked_fill(skipped[:, k, None], 0)
    return dx.to(dout.dtype), dweights.masked_fill(skipped, 0).to(top_k_weights.dtype)
