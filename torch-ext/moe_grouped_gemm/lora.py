"""Low-rank adapters on the weights of experts, without ever making W + scaling * B A."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import fp8, functional, reference
from .checks import check_experts, check_fp8_experts
from .torch_ops import rejects_transforms


class LoraFactors(NamedTuple):
    """One adapter of a weight W (E, N, K): each expert's weight becomes W[e] + scaling * B[e] @ A[e].

    Attributes:
        A: (E, R, K), any float dtype.
        B: (E, N, R), any float dtype.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float


@rejects_transforms
def moe_experts_lora(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    gate_up_lora: tuple[LoraFactors, ...],
    down_lora: tuple[LoraFactors, ...],
    activation: str = "silu",
    gate_up_proj_scale: torch.Tensor | None = None,
    down_proj_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """`moe_experts` with adapters on its weights; differentiable in every float input, factors included.

    Result, autocast and the other arguments as in `moe_experts`; ranks may differ. Over weights in fp8 activations are
    not quantised, and the weights get no gradient. Nothing of a weight's size is made,
    but for the gradient of a weight that requires one, and the cast of one that has another dtype than autocast's.

    Saved for backward: the inputs, by reference, and per routed slot the rows of both GEMMs (H + I), gate, up and
    act(gate) (3I), the outputs (H) and the low-rank products. `moe_experts` computes these again; here they are kept.
    """
    scales = (gate_up_proj_scale, down_proj_scale)
    if gate_up_proj_scale is None and down_proj_scale is None:
        hidden_states, gate_up_proj, down_proj = functional._autocast(hidden_states, gate_up_proj, down_proj)
        check_experts(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, activation)
    else:
        (hidden_states,) = functional._autocast(hidden_states)
        inputs = (hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj)
        check_fp8_experts(*inputs, *scales, activation, (128, 128))
    act_fn, _ = reference.ACTIVATIONS[activation]
    offsets, sorted_slots, slot_positions = functional.route(top_k_index, gate_up_proj.shape[0])
    slot_positions = slot_positions.view(top_k_index.shape)
    x = _Gather.apply(hidden_states, sorted_slots, slot_positions)
    gate, up = _grouped_gemm_lora(x, gate_up_proj, gate_up_proj_scale, gate_up_lora, offsets).chunk(2, dim=-1)
    y = _grouped_gemm_lora(act_fn(gate) * up, down_proj, down_proj_scale, down_lora, offsets)
    return _Combine.apply(y, top_k_weights, sorted_slots, slot_positions)


def _grouped_gemm_lora(x, weight, scale, adapters, expert_offsets):
    """y[r] = (W[e] + sum of scaling * B[e] @ A[e] over the adapters) @ x[r] for the rows r of expert e.

    All adapters are one, of the sum of their ranks: its A has theirs as rows, its B theirs, scaled, as columns.
    """
    if scale is None:
        y = functional.grouped_gemm(x, weight, expert_offsets)
    else:
        y = fp8.grouped_gemm(x, weight, scale, expert_offsets)
    if not adapters:
        return y
    A = torch.cat([adapter.A.to(x.dtype) for adapter in adapters], dim=1)
    B = torch.cat([(adapter.scaling * adapter.B).to(x.dtype) for adapter in adapters], dim=2)
    return y + functional.grouped_gemm(functional.grouped_gemm(x, A, expert_offsets), B, expert_offsets)


# Autograd's own gradient of indexing adds rows one by one, in their dtype. But the inverse order is known: the gradient
# of a gather is a sum over a token's slots, in fp32 and in the order of k, and that of the sum is a gather.


class _Gather(torch.autograd.Function):
    """(T, H) tokens -> (S, H) rows in expert order; rows that no expert owns hold anything."""

    @staticmethod
    def forward(ctx, hidden_states, sorted_slots, slot_positions):
        ctx.save_for_backward(slot_positions)
        return hidden_states[_tokens(sorted_slots, slot_positions)]

    @staticmethod
    def backward(ctx, dx):
        (slot_positions,) = ctx.saved_tensors
        return _weighted_sum(dx, torch.ones_like(slot_positions, dtype=dx.dtype), slot_positions), None, None


class _Combine(torch.autograd.Function):
    """(S, H) rows in expert order, (T, top_k) weights -> (T, H), each token the weighted sum of its rows."""

    @staticmethod
    def forward(ctx, y, top_k_weights, sorted_slots, slot_positions):
        ctx.save_for_backward(y, top_k_weights, sorted_slots, slot_positions)
        return _weighted_sum(y, top_k_weights, slot_positions)

    @staticmethod
    def backward(ctx, dout):
        y, top_k_weights, sorted_slots, slot_positions = ctx.saved_tensors
        dy = dweights = None
        if ctx.needs_input_grad[0]:
            row_weights = top_k_weights.reshape(-1, 1)[sorted_slots]
            dy = (dout[_tokens(sorted_slots, slot_positions)] * row_weights.to(reference._acc_dtype(y))).to(y.dtype)
        if ctx.needs_input_grad[1]:
            dweights = torch.zeros_like(top_k_weights)
            for k, positions in enumerate(slot_positions.unbind(1)):
                products = (dout.to(reference._acc_dtype(y)) * y[positions.clamp(min=0)]).sum(dim=1)
                dweights[:, k] = products.masked_fill(positions < 0, 0)
        return dy, dweights, None, None


def _tokens(sorted_slots, slot_positions):
    """The token of each row; top_k is 0 only where there are no slots."""
    return sorted_slots // max(slot_positions.shape[1], 1)


def _weighted_sum(rows, weights, slot_positions):
    """out[t] = sum over k of weights[t, k] * rows[slot_positions[t, k]], where that is not negative."""
    out = rows.new_zeros(slot_positions.shape[0], rows.shape[1], dtype=reference._acc_dtype(rows))
    for positions, weight in zip(slot_positions.unbind(1), weights.unbind(1)):
        products = rows[positions.clamp(min=0)] * weight[:, None].to(out.dtype)
        out += products.masked_fill(positions[:, None] < 0, 0)  # not weight 0: rows and weights may be NaN
    return out.to(rows.dtype)
