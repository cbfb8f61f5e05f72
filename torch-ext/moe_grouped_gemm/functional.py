"""The public functions: checks and the choice of path; what the layer is made of, with its gradients."""

from __future__ import annotations

import torch

from . import fp8, gpu, reference, training, tuning
from .checks import check_experts, check_floats, check_index, shape
from .reference import Gate, is_transposed
from .routing import Routing, route_fake, route_torch
from .torch_ops import (
    autocast,
    needs_gradients,
    needs_op,
    refuse_dtensors,
    register_autograd,
    register_op,
    rejects_transforms,
)

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
    """Gated experts over routed tokens; differentiable in every float input, fp8 weights aside.

    y[t] = sum_k weight[t, k] * down[e] @ (act(gate[e] @ x[t]) * (up[e] @ x[t])),  e = top_k_index[t, k].

    Args:
        hidden_states: (T, H) bf16, fp16 or fp32 (fp64 on CPU).
        top_k_index: (T, top_k) int32 or int64. A slot whose id lies outside [0, E) is skipped and contributes exactly
            nothing, whatever its weight.
        top_k_weights: (T, top_k), any float dtype.
        gate_up_proj: (E, 2I, H), rows [0, I) are gate and [I, 2I) up; dtype of hidden_states, or float8_e4m3fn. Weights
            stored as (E, H, 2I) come as `.mT` and are read in place.
        down_proj: (E, H, I), dtype of gate_up_proj.
        activation: "silu", "gelu", "gelu_pytorch_tanh" or "relu", applied to gate; or "swigluoai", gpt-oss's gate
            gate * sigmoid(alpha * gate) * (up + 1).
        gate_up_proj_bias: (E, 2I) in the order of the weight's rows, added to the first product; or None.
        down_proj_bias: (E, H), added to the second; or None.
        limit: clamps gate to at most limit and up to [-limit, limit], before the activation. None: not at all.
        alpha: of "swigluoai"; others ignore it.
        interleaved: rows 0, 2, 4, ... of gate_up_proj are gate, rows 1, 3, 5, ... up.
        gate_up_proj_scale: of weights in fp8, which take neither biases nor any of the last three, (E, ceil(2I / 128),
            ceil(H / 128)) fp32 or float8_e8m0fnu: a weight is code * scale of its block of 128 x 128. Or, if that is
            more, (E, 2 * ceil(I / 128), ...): then blocks of up start at its first row.
        down_proj_scale: (E, ceil(H / 128), ceil(I / 128)).
        block_size: of those blocks.
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
    if gate_up_proj_scale is not None or down_proj_scale is not None:
        given = dict(gate_up_proj_bias=gate_up_proj_bias, down_proj_bias=down_proj_bias, limit=limit)
        for name, value in {**given, "interleaved": interleaved or None}.items():
            if value is not None:
                got = shape(value) if isinstance(value, torch.Tensor) else value
                raise ValueError(f"{name}: expected {None if name in given else False} with weights in fp8, got {got}")
        inputs = (hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj)
        scales = (gate_up_proj_scale, down_proj_scale)
        return fp8.moe_experts(*inputs, *scales, activation, block_size, quantize_activations)
    biases = gate_up_proj_bias, down_proj_bias
    hidden_states, gate_up_proj, down_proj, *biases = autocast(hidden_states, gate_up_proj, down_proj, *biases)
    check_experts(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, activation, *biases, limit)
    inputs = (hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, *biases)
    gate = Gate(activation, limit, alpha, interleaved)
    # A custom op costs tens of microseconds of dispatch: only those who need its opacity or its gradient pay for it.
    as_op = needs_op(_moe_experts_op, inputs)
    if hidden_states.device.type == "cpu" and not as_op:
        return reference.moe_experts(*inputs[:5], activation, *biases, *gate[1:])
    if needs_gradients(inputs):
        return training.training_op(*inputs, *gate)[0]
    return (_moe_experts_op if as_op else _experts_gpu)(*inputs, *gate)


def _experts_gpu(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, up_bias, down_bias, *gate):
    """Few slots: two launches. Else four or five: route, gate_up GEMM with the activation, down GEMM, combine."""
    rows, num_experts = top_k_index.numel(), gate_up_proj.shape[0]
    if rows == 0 or hidden_states.numel() == 0:
        return hidden_states.new_zeros(hidden_states.shape)
    device = hidden_states.device.index
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _experts_gpu(
                hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, up_bias, down_bias, *gate
            )
    kernels = gpu.launchers()
    gate, up_bias, down_bias = Gate(*gate), gpu.contiguous(up_bias), gpu.contiguous(down_bias)
    if hidden_states.stride(1) != 1:
        hidden_states = hidden_states.contiguous()
    top_k_index, top_k_weights = top_k_index.contiguous(), top_k_weights.contiguous()
    expert_bytes = 3 * down_proj.stride(0) * down_proj.element_size()
    is_decode = tuning.is_decode(rows, top_k_index.shape[0], num_experts, expert_bytes)
    transposed = is_transposed(gate_up_proj) and is_transposed(down_proj)
    if is_decode and (transposed or gate_up_proj.stride(2) == down_proj.stride(2) == 1):
        up_config, down_config = tuning.decode_config(hidden_states.dtype, transposed)
        a = kernels.gate_up_decode(hidden_states, gate_up_proj, top_k_index, gate, up_config, up_bias)
        return kernels.down_decode(a, down_proj, top_k_index, top_k_weights, down_config, down_bias)
    precision = gpu.input_precision(hidden_states.dtype)
    up_config, down_config = gpu.config(rows, down_proj)
    _, sorted_slots, slot_positions, schedule = kernels.route(top_k_index, num_experts, up_config.BLOCK_M)
    up_config = gpu.as_readable_gate(up_config, gate_up_proj, gate)
    top_k = top_k_index.shape[1]
    inputs = (hidden_states, gate_up_proj, sorted_slots, schedule, top_k)
    a = kernels.gate_up(*inputs, gate, precision, up_config, bias=up_bias)
    return gpu.down_and_combine(
        a, down_proj, down_bias, sorted_slots, slot_positions, schedule, top_k_weights, precision, down_config
    )


def _experts_forward(x, top_k_index, top_k_weights, gate_up_proj, down_proj, up_bias, down_bias, activation, *gate):
    inputs = (x, top_k_index, top_k_weights, gate_up_proj, down_proj)
    if x.device.type == "cpu":
        return reference.moe_experts(*inputs, activation, up_bias, down_bias, *gate)
    return _experts_gpu(*inputs, up_bias, down_bias, activation, *gate)


_moe_experts_op = register_op(
    "moe_experts",
    f"({training.INPUTS}, {training.GATE}) -> Tensor",
    _experts_forward,
    fake=lambda hidden_states, *_: torch.empty_like(hidden_states, memory_format=torch.contiguous_format),
    flops=training.experts_flops,
)


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
    return Routing(*_route_op(top_k_index, num_experts))


def _route_forward(top_k_index, num_experts):
    if top_k_index.device.type == "cpu" or top_k_index.numel() == 0:
        return route_torch(top_k_index, num_experts)
    with torch.cuda.device_of(top_k_index):
        return gpu.launchers().route(top_k_index.contiguous(), num_experts, block_m=128)[:3]


_route_op = register_op(
    "route", "(Tensor top_k_index, int num_experts) -> (Tensor, Tensor, Tensor)", _route_forward, fake=route_fake
)


@rejects_transforms
def grouped_gemm(
    x: torch.Tensor, weight: torch.Tensor, expert_offsets: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """y[r] = weight[e] @ x[r] + bias[e] for expert_offsets[e] <= r < expert_offsets[e + 1].

    Differentiable in x, weight and bias.

    Args:
        x: (S, K) bf16, fp16 or fp32 (fp64 on CPU), rows sorted by expert.
        weight: (E, N, K), dtype of x; stored as (E, K, N) it comes as `.mT` and is read in place.
        expert_offsets: (E + 1,) int32 on x.device, leading 0, ascending, exclusive; as `route` returns it.
        bias: (E, N), dtype of x; or None.
    Returns:
        (S, N) in x.dtype, accumulated in fp32. Rows from expert_offsets[E] on belong to no expert and are zero.
    Raises:
        ValueError: shapes or devices do not fit together.
        TypeError: a dtype is not supported or differs from x.
    """
    check_floats(x=x, weight=weight)
    if x.ndim != 2:
        raise ValueError(f"x: expected (S, K), got {shape(x)}")
    if weight.ndim != 3 or weight.shape[2] != x.shape[1] or weight.shape[0] < 1:
        raise ValueError(f"weight: expected (E, N, {x.shape[1]}) with E >= 1 to fit x {shape(x)}, got {shape(weight)}")
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
    refuse_dtensors([("x", x), ("weight", weight), ("expert_offsets", expert_offsets), ("bias", bias)])
    return _grouped_gemm_op(x, weight, expert_offsets, bias)


def _grouped_gemm_forward(x, weight, expert_offsets, bias):
    if x.device.type == "cpu":
        return reference.grouped_gemm(x, weight, expert_offsets, bias)
    y = x.new_empty(x.shape[0], weight.shape[1])
    if y.numel() == 0 or (x.shape[1] == 0 and bias is None):
        return y.zero_()
    kernels = gpu.launchers()
    if x.stride(1) != 1:
        x = x.contiguous()
    with torch.cuda.device_of(x):
        kernels.zero_tail(y, expert_offsets)
        config = gpu.config(x.shape[0], weight).down
        schedule = kernels.tile_schedule(expert_offsets, x.shape[0], config.BLOCK_M)
        precision = gpu.input_precision(x.dtype)
        return gpu.launch_grouped_gemm(x, weight, schedule, precision, config, y, bias=gpu.contiguous(bias))


_grouped_gemm_op = register_op(
    "grouped_gemm",
    "(Tensor x, Tensor weight, Tensor expert_offsets, Tensor? bias) -> Tensor",
    _grouped_gemm_forward,
    fake=lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[1]),
    flops=lambda x, weight, *_, **__: 2 * x[0] * weight[1] * weight[2],
)


def _grouped_gemm_dw(dy, x, expert_offsets):
    if x.device.type == "cpu":
        return reference.grouped_gemm_dw(dy, x, expert_offsets)
    experts = expert_offsets.shape[0] - 1
    if x.numel() == 0 or dy.numel() == 0:
        return x.new_zeros(experts, dy.shape[1], x.shape[1])
    dy, x = (t if t.stride(1) == 1 else t.contiguous() for t in (dy, x))
    with torch.cuda.device_of(x):
        config = tuning.wgrad_config(x.shape[0], experts, x.dtype, gpu.capability(x.device.index))
        config = config._replace(WARP_SPECIALIZED=False)  # these rows are not padded
        return gpu.launchers().wgrad(dy, x, expert_offsets, gpu.input_precision(x.dtype), config)


_grouped_gemm_dw_op = register_op(
    "grouped_gemm_dw",
    "(Tensor dy, Tensor x, Tensor expert_offsets) -> Tensor",
    _grouped_gemm_dw,
    fake=lambda dy, x, expert_offsets: x.new_empty(expert_offsets.shape[0] - 1, dy.shape[1], x.shape[1]),
    flops=lambda dy, x, *_, **__: 2 * x[0] * dy[1] * x[1],
)


def _row_sums(y, expert_offsets):
    if y.device.type == "cpu" or y.numel() == 0:
        return reference.row_sums(y, expert_offsets)
    with torch.cuda.device_of(y):
        return gpu.launchers().row_sums(y if y.stride(1) == 1 else y.contiguous(), expert_offsets, expert_offsets)


_row_sums_op = register_op(
    "row_sums",
    "(Tensor y, Tensor expert_offsets) -> Tensor",
    _row_sums,
    fake=lambda y, expert_offsets: y.new_empty(expert_offsets.shape[0] - 1, y.shape[1]),
)


def _grouped_gemm_backward(ctx, dy):
    x, weight, expert_offsets = ctx.saved_tensors
    needs_x, needs_weight, _, needs_bias = ctx.needs_input_grad
    # The transposed weight is read in place; no copy is made.
    dx = _grouped_gemm_op(dy, weight.transpose(1, 2), expert_offsets, None) if needs_x else None
    dweight = None
    if needs_weight and is_transposed(weight):
        dweight = _grouped_gemm_dw_op(x, dy, expert_offsets).mT
    elif needs_weight:
        dweight = _grouped_gemm_dw_op(dy, x, expert_offsets)
    return dx, dweight, None, _row_sums_op(dy, expert_offsets) if needs_bias else None


register_autograd(
    _grouped_gemm_op,
    _grouped_gemm_backward,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:3]),
)
