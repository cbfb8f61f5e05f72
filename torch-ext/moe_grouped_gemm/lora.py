"""The layer with low-rank adapters on the weights, without ever making W + scaling * B A: on a GPU with a gate of ours
by the ops of lora_ops.py; else composed of grouped GEMMs, around any function between the two."""

from __future__ import annotations

from typing import Callable, NamedTuple

import torch

from . import fp8, functional, gpu, lora_ops, reference
from .checks import check_experts, check_fp8_experts, shape
from .reference import Gate
from .torch_ops import autocast, refuse_dtensors, register_autograd, register_op, rejects_transforms

_SILU = Gate("silu")


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
    gate: Gate | Callable[[torch.Tensor], torch.Tensor] = _SILU,
    gate_up_proj_bias: torch.Tensor | None = None,
    down_proj_bias: torch.Tensor | None = None,
    norm: Callable[[torch.Tensor], torch.Tensor] | None = None,
    gated: bool = True,
    gate_up_proj_scale: torch.Tensor | None = None,
    down_proj_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """`moe_experts` with adapters on its weights; differentiable in every float input, factors included.

    Result, autocast and the other arguments as in `moe_experts`; ranks may differ. Over weights in fp8 activations are
    not quantised, and the weights get no gradient. Nothing of a weight's size is made,
    but for the gradient of a weight that requires one, and the cast of one that has another dtype than autocast's.

    gate: one of ours, or any function (S, 2I) -> (S, I); with gated=False (S, I) -> (S, I), and gate_up_proj is
    (E, I, H). norm: a function of the rows (S, H) of the second product. Rows of skipped slots are zero in both.

    Saved for backward, besides the inputs and the factors, joined: on a GPU with a gate of ours, gated and without a
    norm, what `moe_experts` saves, gate and up (2I) of each routed slot, and the low-rank products (R of each adapted
    weight), in rows padded to at most 63 more an expert. Else per routed slot the rows of both GEMMs (H + I), gate, up
    and act(gate) (3I), the outputs (H) and the low-rank products.
    """
    biases = gate_up_proj_bias, down_proj_bias
    name, limit = (gate.activation, gate.limit) if isinstance(gate, Gate) else ("silu", None)
    scales = (gate_up_proj_scale, down_proj_scale)
    is_fp8 = any(scale is not None for scale in scales)
    if is_fp8:
        (hidden_states,) = autocast(hidden_states)
    else:
        hidden_states, gate_up_proj, down_proj, *biases = autocast(hidden_states, gate_up_proj, down_proj, *biases)
    inputs = (hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj)
    if is_fp8:
        check_fp8_experts(*inputs, *scales, name, (128, 128))
    else:
        check_experts(*inputs, name, *biases, limit, gated)
    names = ("hidden_states", "top_k_index", "top_k_weights", "gate_up_proj", "down_proj")
    names += ("gate_up_proj_bias", "down_proj_bias", "gate_up_proj_scale", "down_proj_scale")
    refuse_dtensors(zip(names, (*inputs, *biases, *scales)))
    on_gpu = hidden_states.device.type == "cuda"
    multiple = lora_ops.RANK_MULTIPLE if on_gpu else 1
    up_factors = _join("gate_up_lora", gate_up_lora, gate_up_proj, hidden_states.dtype, multiple)
    down_factors = _join("down_lora", down_lora, down_proj, hidden_states.dtype, multiple)
    if on_gpu and not is_fp8 and isinstance(gate, Gate) and gated and norm is None:
        return lora_ops.moe_experts_lora(*inputs, *biases, *up_factors, *down_factors, *gate)
    offsets, sorted_slots, slot_positions = functional.route(top_k_index, gate_up_proj.shape[0])
    slot_positions = slot_positions.view(top_k_index.shape)
    x = gather(hidden_states, sorted_slots, slot_positions)
    z = _grouped_gemm_lora(x, gate_up_proj, gate_up_proj_scale, *up_factors, offsets, biases[0])
    a = reference.apply_gate(z, gate) if isinstance(gate, Gate) else gate(z)
    y = _grouped_gemm_lora(a.to(x.dtype), down_proj, down_proj_scale, *down_factors, offsets, biases[1])
    if norm is not None:
        y = norm(y).to(x.dtype)
    return combine(y, top_k_weights, sorted_slots, slot_positions)


def _join(name, adapters, weight, dtype, multiple):
    """All adapters as one, of the sum of their ranks: its A has theirs as rows, its B theirs, scaled, as columns.

    Zeros bring the rank to a multiple. Without adapters: None, None.
    """
    if not adapters:
        return None, None
    refuse_dtensors((name, factor) for adapter in adapters for factor in adapter[:2])
    As = [adapter.A.to(dtype) for adapter in adapters]
    Bs = [(adapter.scaling * adapter.B).to(dtype) for adapter in adapters]
    experts, N, K = weight.shape
    rank = sum(A.shape[1] for A in As)
    for A, B in zip(As, Bs):
        if A.shape != (experts, A.shape[1], K) or B.shape != (experts, N, A.shape[1]):
            raise ValueError(
                f"{name}: expected A ({experts}, R, {K}) and B ({experts}, {N}, R) to fit the weight, "
                f"got {shape(A)} and {shape(B)}"
            )
        if A.device != weight.device or B.device != weight.device:
            raise ValueError(f"{name}: expected factors on {weight.device}, got {A.device} and {B.device}")
    padding = max(1, -(-rank // multiple)) * multiple - rank
    if padding:
        As.append(As[0].new_zeros(experts, padding, K))
        Bs.append(Bs[0].new_zeros(experts, N, padding))
    return torch.cat(As, dim=1), torch.cat(Bs, dim=2)


def _grouped_gemm_lora(x, weight, scale, A, B, expert_offsets, bias):
    """y[r] = (W[e] + B[e] @ A[e]) @ x[r] + bias[e] for the rows r of expert e; A and B may be None."""
    if scale is None:
        y = functional.grouped_gemm(x, weight, expert_offsets, bias)
    else:
        y = fp8.grouped_gemm(x, weight, scale, expert_offsets)
    if A is None:
        return y
    return y + functional.grouped_gemm(functional.grouped_gemm(x, A, expert_offsets), B, expert_offsets)


# Autograd's own gradient of indexing adds rows one by one, in their dtype. But the inverse order is known: the gradient
# of a gather is a sum over a token's slots, in fp32 and in the order of k, and that of the sum is a gather.


def _gather_forward(hidden_states, sorted_slots, slot_positions):
    return hidden_states[_tokens(sorted_slots, slot_positions)]


# (T, H) tokens -> (S, H) rows in expert order; rows that no expert owns hold anything.
gather = register_op(
    "gather",
    "(Tensor hidden_states, Tensor sorted_slots, Tensor slot_positions) -> Tensor",
    _gather_forward,
    fake=lambda hidden_states, sorted_slots, _: hidden_states.new_empty(sorted_slots.shape[0], hidden_states.shape[1]),
)


def _gather_backward(ctx, dx):
    sorted_slots, slot_positions = ctx.saved_tensors
    weights = torch.ones_like(slot_positions, dtype=reference.acc_dtype(dx))
    return combine(dx, weights, sorted_slots, slot_positions), None, None


def _combine_forward(y, top_k_weights, _, slot_positions):
    slot_positions = slot_positions.view(-1)
    if y.device.type == "cpu" or y.numel() == 0:
        return reference.combine(y, slot_positions, top_k_weights)
    with torch.cuda.device_of(y):
        return gpu.launchers().combine(y.contiguous(), slot_positions, top_k_weights.contiguous())


# (S, H) rows in expert order, (T, top_k) weights -> (T, H), each token the weighted sum of its rows.
combine = register_op(
    "combine",
    "(Tensor y, Tensor top_k_weights, Tensor sorted_slots, Tensor slot_positions) -> Tensor",
    _combine_forward,
    fake=lambda y, top_k_weights, *_: y.new_empty(top_k_weights.shape[0], y.shape[1]),
)


def _combine_backward(ctx, dout):
    y, top_k_weights, sorted_slots, slot_positions = ctx.saved_tensors
    dy = dweights = None
    if ctx.needs_input_grad[0]:
        row_weights = top_k_weights.reshape(-1, 1)[sorted_slots]
        dy = (dout[_tokens(sorted_slots, slot_positions)] * row_weights.to(reference.acc_dtype(y))).to(y.dtype)
        # Rows that no expert owns: a norm's own gradient would take them in, and they may be NaN.
        dy = dy.masked_fill(slot_positions.view(-1, 1)[sorted_slots] < 0, 0)
    if ctx.needs_input_grad[1]:
        dweights = torch.zeros_like(top_k_weights)
        for k, positions in enumerate(slot_positions.unbind(1)):
            products = (dout.to(reference.acc_dtype(y)) * y[positions.clamp(min=0)]).sum(dim=1)
            dweights[:, k] = products.masked_fill(positions < 0, 0)
    return dy, dweights, None, None


register_autograd(gather, _gather_backward, lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:]))
register_autograd(combine, _combine_backward, lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def _tokens(sorted_slots, slot_positions):
    """The token of each row; top_k is 0 only where there are no slots."""
    return sorted_slots // max(slot_positions.shape[1], 1)
