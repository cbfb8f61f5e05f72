"""The public functions: checks, and the choice of path."""

from __future__ import annotations

from typing import Callable

import torch

from .checks import check_floats, check_index, shape
from .experts import blocks, composed, ops
from .experts.arguments import check_experts, given
from .experts.lora import RANK_MULTIPLE, LoraFactors, adapted
from .reference import Gate
from .routing import Routing
from .torch_ops import (
    autocast,
    is_autocast,
    needs_gradients,
    needs_op,
    refuse_dtensors,
    refuse_dtensors_for,
    rejects_transforms,
)
from .weights import Projection, are_adapted, format_of

_SILU = Gate("silu")

# --- moe_experts ------------------------------------------------------------------------------------------------------


@rejects_transforms
def moe_experts(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    activation: str = "silu",
    gate_up_proj_bias: torch.Tensor | None = None,
    down_proj_bias: torch.Tensor | None = None,
    *,
    limit: float | None = None,
    alpha: float = 1.702,
    interleaved: bool = False,
    gate_up_proj_scale: torch.Tensor | None = None,
    down_proj_scale: torch.Tensor | None = None,
    block_size: tuple[int, int] = (128, 128),
    quantize_activations: bool = True,
) -> torch.Tensor:
    """Gated experts over routed tokens; differentiable in every float input, weights in codes aside.

    y[t] = sum_k weight[t, k] * down[e] @ (act(gate[e] @ x[t]) * (up[e] @ x[t])),  e = top_k_index[t, k].

    Args:
        hidden_states: (T, H) bf16, fp16 or fp32 (fp64 on CPU).
        top_k_index: (T, top_k) int32 or int64. A slot whose id lies outside [0, E) is skipped and contributes exactly
            nothing, whatever its weight.
        top_k_weights: (T, top_k), any float dtype.
        gate_up_proj: (E, 2I, H), rows [0, I) are gate and [I, 2I) up; dtype of hidden_states, float8_e4m3fn, or in 4
            bits. Weights stored as (E, H, 2I) come as `.mT` and are read in place; not so in 4 bits: those are (E, 2I,
            H / 2) int8, uint8 or float4_e2m1fn_x2, two e2m1 numbers a byte, the lower column in the low nibble.
        down_proj: (E, H, I), dtype of gate_up_proj.
        activation: "silu", "gelu", "gelu_pytorch_tanh" or "relu", applied to gate; or "swigluoai", gpt-oss's gate
            gate * sigmoid(alpha * gate) * (up + 1).
        gate_up_proj_bias: (E, 2I) in the order of the weight's rows, added to the first product; or None.
        down_proj_bias: (E, H), added to the second; or None.
        limit: clamps gate to at most limit and up to [-limit, limit], before the activation. None: not at all.
        alpha: of "swigluoai"; others ignore it.
        interleaved: rows 0, 2, 4, ... of gate_up_proj are gate, rows 1, 3, 5, ... up.
        gate_up_proj_scale: a weight in codes is code * scale. In fp8 of its block of 128 x 128, (E, ceil(2I / 128),
            ceil(H / 128)) fp32 or float8_e8m0fnu. Or, if that is more, (E, 2 * ceil(I / 128), ...): then blocks of up
            start at its first row. In 4 bits of its 32 columns, (E, 2I, H / 32) float8_e8m0fnu, uint8 with that type's
            bits, or fp32; H and I are multiples of 32 then. On a GPU exponents of 4-bit weights count in bf16 from
            2^-94 to 2^33; greater ones may be NaN.
        down_proj_scale: (E, ceil(H / 128), ceil(I / 128)); in 4 bits (E, H, I / 32).
        block_size: of those blocks of fp8; of 4 bits, if it is given, (1, 32).
        quantize_activations: with weights in fp8, whether a GPU that multiplies fp8 may quantise activations too, with
            a scale for each 128 columns of each row. It does so for more than a few rows, if neither hidden_states nor
            top_k_weights requires a gradient, whether it is asked for or, as under no_grad, not.
    Returns:
        (T, H) in hidden_states.dtype. Products with the weights and the sum over k are accumulated in fp32, in a fixed
        order: two calls give bitwise equal results, but for rounding if only one is to have gradients. No host sync on
        a GPU.
    Raises:
        ValueError: shapes, devices or ids do not fit together, or the activation is unknown.
        TypeError: a dtype is not supported or differs from hidden_states.
        ImportError: on a GPU without Triton >= 3.6.

    Under `torch.autocast` the three float operands of the GEMMs are cast first, as `torch.nn.functional.linear` does.
    """
    gate = Gate(activation, limit, alpha, interleaved)
    gate_up = Projection(gate_up_proj, gate_up_proj_bias, gate_up_proj_scale)
    down = Projection(down_proj, down_proj_bias, down_proj_scale)
    hidden_states, gate_up, down = _in_one_dtype(hidden_states, gate_up, down)
    inputs = (hidden_states, top_k_index, top_k_weights, gate_up, down)
    check_experts(*inputs, activation, limit, True, block_size)
    return _experts(*inputs, gate, quantize_activations)


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

    Result, autocast and the other arguments as in `moe_experts`; ranks may differ. Over codes activations are not
    quantised, and weights get no gradient. Nothing of a weight's size is made, but for the gradient of a weight
    that requires one, and the cast of one that has another dtype than autocast's.

    gate: one of ours, or any function (S, 2I) -> (S, I); with gated=False (S, I) -> (S, I), and gate_up_proj is
    (E, I, H). norm: a function of the rows (S, H) of the second product. Rows of skipped slots are zero in both.

    Saved for backward, besides the inputs and the factors, joined: on a GPU with a gate of ours, gated and without a
    norm, what `moe_experts` saves, gate and up (2I) of each routed slot, and the low-rank products (R of each adapted
    weight), in rows padded to at most 63 more an expert. Else per routed slot the rows of both GEMMs (H + I), gate, up
    and act(gate) (3I), the outputs (H) and the low-rank products.
    """
    is_ours = isinstance(gate, Gate)
    gate_up = Projection(gate_up_proj, gate_up_proj_bias, gate_up_proj_scale)
    down = Projection(down_proj, down_proj_bias, down_proj_scale)
    activation, limit = (gate.activation, gate.limit) if is_ours else ("silu", None)
    hidden_states, gate_up, down = _in_one_dtype(hidden_states, gate_up, down)
    check_experts(hidden_states, top_k_index, top_k_weights, gate_up, down, activation, limit, gated)
    on_gpu = hidden_states.device.type == "cuda"
    join = (hidden_states.dtype, RANK_MULTIPLE if on_gpu else 1)
    gate_up = adapted("gate_up_lora", gate_up, gate_up_lora, *join)
    down = adapted("down_lora", down, down_lora, *join)
    inputs = (hidden_states, top_k_index, top_k_weights, gate_up, down)
    if is_ours and gated and norm is None and (on_gpu or not are_adapted(gate_up, down)):
        return _experts(*inputs, gate, quantize_activations=False)
    refuse_dtensors_for(ops.moe_experts, (*inputs[:3], *gate_up, *down))
    return composed.forward(*inputs, gate, norm)


def _in_one_dtype(hidden_states, gate_up, down):
    """The dtype that autocast asks for, of all operands; weights in codes and their scales stay as they are."""
    if is_autocast(hidden_states):
        hidden_states, *operands = autocast(hidden_states, *gate_up[:2], *down[:2])
        gate_up = gate_up._replace(weight=operands[0], bias=operands[1])
        down = down._replace(weight=operands[2], bias=operands[3])
    return hidden_states, gate_up, down


def _experts(hidden_states, top_k_index, top_k_weights, gate_up, down, gate, quantize_activations):
    """The layer: as an op only for those who need its opacity or its gradient, as its dispatch takes a while."""
    inputs = (hidden_states, top_k_index, top_k_weights, *gate_up, *down)
    as_op, on_cpu = needs_op(ops.moe_experts, inputs), hidden_states.is_cpu
    in_torch = on_cpu and not as_op and gate_up.scale is None  # which has gradients of its own
    if not in_torch and needs_gradients(inputs):
        return ops.moe_experts_training(*inputs, *gate)[0] if as_op else ops.training(*inputs, *gate)
    if quantize_activations and (hidden_states.requires_grad or top_k_weights.requires_grad):
        # Reentrant checkpointing, say, whose second pass is with gradients.
        quantize_activations = False
    if as_op:
        return ops.moe_experts(*inputs, *gate, quantize_activations)
    forward = ops.forward_on_cpu if on_cpu else ops.forward_on_gpu
    return forward(hidden_states, top_k_index, top_k_weights, gate_up, down, gate, quantize_activations)


# --- building blocks --------------------------------------------------------------------------------------------------


def route(top_k_index: torch.Tensor, num_experts: int) -> Routing:
    """Sort routed slots by expert: on the device, stably, without host sync.

    Args:
        top_k_index: (T, top_k) int32 or int64; ids outside [0, num_experts) are skipped.
        num_experts: E, at least 1.
    Returns:
        Routing with expert_offsets (E + 1,), sorted_slots (S,) and slot_positions (S,), all int32; S = T * top_k.
    """
    check_index(top_k_index)
    if num_experts < 1:
        raise ValueError(f"num_experts: expected at least 1, got {num_experts}")
    refuse_dtensors([("top_k_index", top_k_index)])
    return Routing(*blocks.route(top_k_index, num_experts))


@rejects_transforms
def grouped_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    expert_offsets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """y[r] = weight[e] @ x[r] + bias[e] for expert_offsets[e] <= r < expert_offsets[e + 1].

    Differentiable in x, weight and bias; not in a weight in codes.

    Args:
        x: (S, K) bf16, fp16 or fp32 (fp64 on CPU), rows sorted by expert.
        weight: (E, N, K), dtype of x; stored as (E, K, N) it comes as `.mT` and is read in place. Or in codes, fp8 or 4
            bits, as `moe_experts` takes down_proj.
        expert_offsets: (E + 1,) int32 on x.device, leading 0, ascending, exclusive; as `route` returns it.
        bias: (E, N), dtype of x; or None.
        scale: of a weight in codes, as `moe_experts` takes down_proj_scale.
    Returns:
        (S, N) in x.dtype, accumulated in fp32. Rows from expert_offsets[E] on belong to no expert and are zero.
    Raises:
        ValueError: shapes or devices do not fit together.
        TypeError: a dtype is not supported or differs from x.
    """
    projection = Projection(weight, bias, scale)
    check_floats(x=x, **({"weight": weight} if scale is None else {}))
    if x.ndim != 2:
        raise ValueError(f"x: expected (S, K), got {shape(x)}")
    if weight.ndim != 3 or projection.shape[2] != x.shape[1] or weight.shape[0] < 1:
        raise ValueError(
            f"weight: expected (E, N, {x.shape[1]}) with E >= 1 to fit x {shape(x)}, got {given(projection)}"
        )
    format_of(projection).check_one(projection, x)
    if expert_offsets.dtype != torch.int32:
        raise TypeError(f"expert_offsets: expected int32, got {expert_offsets.dtype}")
    if expert_offsets.shape != (weight.shape[0] + 1,) or not expert_offsets.is_contiguous():
        raise ValueError(
            f"expert_offsets: expected contiguous ({weight.shape[0] + 1},) to fit weight {shape(weight)}, "
            f"got {shape(expert_offsets)}"
        )
    if expert_offsets.device != x.device:
        raise ValueError(f"expert_offsets: expected on {x.device} like x, got {expert_offsets.device}")
    if bias is not None:
        check_floats(x=x, bias=bias)
        if bias.shape != weight.shape[:2]:
            raise ValueError(f"bias: expected {shape(weight)[:2]} to fit weight {shape(weight)}, got {shape(bias)}")
    tensors = {"x": x, "weight": weight, "expert_offsets": expert_offsets, "bias": bias, "scale": scale}
    refuse_dtensors(tensors.items())
    return blocks.grouped_gemm(x, weight, bias, scale, expert_offsets, False)
