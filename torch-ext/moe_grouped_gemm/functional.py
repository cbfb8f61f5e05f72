"""The public functions: checks, the choice of path, and gradients."""

from __future__ import annotations

import functools
import os

import torch

from . import fp8, reference, tuning
from .checks import check_experts, check_floats, check_index, device_type, shape
from .reference import Gate, is_transposed
from .routing import Routing, route_torch
from .torch_ops import register_op, rejects_transforms

MIN_TRITON = (3, 6)


@functools.cache
def _kernels():
    """The Triton launchers. Imported at the first call on a GPU: the package must load without Triton."""
    wanted = "moe_grouped_gemm needs Triton {}.{} or newer to run on a GPU".format(*MIN_TRITON)
    try:
        import triton
    except ImportError as error:
        raise ImportError(f"{wanted}; none is installed: pip install triton") from error
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MIN_TRITON:
        raise ImportError(f"{wanted}, found {triton.__version__}: pip install -U triton (torch 2.11 brings 3.6)")
    from . import kernels

    return kernels


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
            a scale for each 128 columns of each row. It does so for more than a few rows, if no gradient is asked for.
    Returns:
        (T, H) in hidden_states.dtype. Products with the weights and the sum over k are accumulated in fp32, in a fixed
        order: two calls give bitwise equal results. No host sync on a GPU.
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
                raise ValueError(
                    f"{name}: expected {None if name in given else False} with weights in fp8, got {value}"
                )
        inputs = (hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj)
        scales = (gate_up_proj_scale, down_proj_scale)
        return fp8.moe_experts(*inputs, *scales, activation, block_size, quantize_activations)
    biases = gate_up_proj_bias, down_proj_bias
    hidden_states, gate_up_proj, down_proj, *biases = _autocast(hidden_states, gate_up_proj, down_proj, *biases)
    check_experts(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, activation, *biases, limit)
    inputs = (hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, *biases)
    gate = Gate(activation, limit, alpha, interleaved)
    # A custom op costs tens of microseconds of dispatch: only those who need its opacity or its gradient pay for it.
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if torch.compiler.is_compiling():
        return _training_op(*inputs, *gate)[0] if needs_grad else _moe_experts_op(*inputs, *gate)
    if hidden_states.device.type == "cpu":
        return reference.moe_experts(*inputs[:5], activation, *biases, *gate[1:])
    return _training_op(*inputs, *gate)[0] if needs_grad else _experts_gpu(*inputs, *gate)


def _autocast(hidden_states, *weights):
    """The operands of the GEMMs in the dtype that `torch.autocast` asks for, if it is on."""
    device = device_type("hidden_states", hidden_states)
    if not torch.is_autocast_enabled(device):
        return hidden_states, *weights
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x is None else x.to(dtype) for x in (hidden_states, *weights))


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
    kernels = _kernels()
    gate, up_bias, down_bias = Gate(*gate), _contiguous(up_bias), _contiguous(down_bias)
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
    precision = _input_precision()
    up_config, down_config = _config(rows, down_proj)
    _, sorted_slots, slot_positions, schedule = kernels.route(top_k_index, num_experts, up_config.BLOCK_M)
    up_config = _as_readable_gate(up_config, gate_up_proj, gate)
    top_k = top_k_index.shape[1]
    inputs = (hidden_states, gate_up_proj, sorted_slots, schedule, top_k)
    a = kernels.gate_up(*inputs, gate, precision, up_config, bias=up_bias)
    return _down(a, down_proj, down_bias, sorted_slots, slot_positions, schedule, top_k_weights, precision, down_config)


def _down(a, down_proj, bias, sorted_slots, slot_positions, schedule, top_k_weights, precision, config):
    """The down GEMM and each token's weighted sum. A sum of one is no sum: the GEMM stores it, and y is never made."""
    kernels = _kernels()
    if top_k_weights.shape[1] > 1:
        y = _launch_grouped_gemm(a, down_proj, schedule, precision, config, bias=bias)
        return kernels.combine(y, slot_positions, top_k_weights)
    out = a.new_empty(a.shape[0], down_proj.shape[1])
    kernels.zero_skipped(out, slot_positions)
    destination = (out, sorted_slots, top_k_weights)
    return _launch_grouped_gemm(a, down_proj, schedule, precision, config, *destination, bias=bias)


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return x if x is None else x.contiguous()


def _experts_forward(x, top_k_index, top_k_weights, gate_up_proj, down_proj, up_bias, down_bias, activation, *gate):
    inputs = (x, top_k_index, top_k_weights, gate_up_proj, down_proj)
    if x.device.type == "cpu":
        return reference.moe_experts(*inputs, activation, up_bias, down_bias, *gate)
    return _experts_gpu(*inputs, up_bias, down_bias, activation, *gate)


_INPUTS = (
    "Tensor hidden_states, Tensor top_k_index, Tensor top_k_weights, Tensor gate_up_proj, Tensor down_proj,"
    " Tensor? gate_up_proj_bias, Tensor? down_proj_bias"
)
_GATE = "str activation, float? limit, float alpha, bool interleaved"

_moe_experts_op = register_op(
    "moe_experts",
    f"({_INPUTS}, {_GATE}) -> Tensor",
    _experts_forward,
    fake=lambda hidden_states, *_: torch.empty_like(hidden_states, memory_format=torch.contiguous_format),
)


# --- moe_experts with gradients ---------------------------------------------------------------------------------------


def _training_gpu(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, up_bias, down_bias, *gate):
    """As `_experts_gpu` for many slots; also z (S, 2I) before the gate, and the routing."""
    experts, rows, _ = gate_up_proj.shape
    z = hidden_states.new_empty(top_k_index.numel(), rows)
    if z.numel() == 0 or hidden_states.numel() == 0:
        return hidden_states.new_zeros(hidden_states.shape), z, *route_torch(top_k_index, experts)
    kernels = _kernels()
    gate, up_bias, down_bias = Gate(*gate), _contiguous(up_bias), _contiguous(down_bias)
    with torch.cuda.device_of(hidden_states):
        if hidden_states.stride(1) != 1:
            hidden_states = hidden_states.contiguous()
        precision = _input_precision()
        up_config, down_config = _config(z.shape[0], down_proj)
        *routing, schedule = kernels.route(top_k_index.contiguous(), experts, up_config.BLOCK_M)
        _, sorted_slots, slot_positions = routing
        up_config = _as_readable_gate(up_config, gate_up_proj, gate)
        inputs = (hidden_states, gate_up_proj, sorted_slots, schedule, top_k_index.shape[1])
        a = kernels.gate_up(*inputs, gate, precision, up_config, z, up_bias)
        order = (sorted_slots, slot_positions, schedule)
        out = _down(a, down_proj, down_bias, *order, top_k_weights.contiguous(), precision, down_config)
        return out, z, *routing


def _training_forward(hidden_states, *args):
    forward = reference.moe_experts_training if hidden_states.device.type == "cpu" else _training_gpu
    return forward(hidden_states, *args)


def _training_fake(hidden_states, top_k_index, top_k_weights, gate_up_proj, *_):
    out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    z = hidden_states.new_empty(top_k_index.numel(), gate_up_proj.shape[1])
    return out, z, *_route_fake(top_k_index, gate_up_proj.shape[0])


_training_op = register_op(
    "moe_experts_training",
    f"({_INPUTS}, {_GATE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _training_forward,
    fake=_training_fake,
)


def _backward_gpu(
    dout,
    hidden_states,
    top_k_weights,
    gate_up_proj,
    down_proj,
    up_bias,
    down_bias,
    z,
    offsets,
    slots,
    positions,
    needs_grad,
    *gate,
):
    """Gradients by kernels, as in kernels/backward.py; of what is (rows, H) there is one at a time."""
    inputs = (hidden_states, top_k_weights, gate_up_proj, down_proj, up_bias, down_bias)
    if z.numel() == 0 or hidden_states.numel() == 0:
        return tuple(t.zero_() for t in _empty_gradients(dout, inputs, needs_grad))
    needs_x, needs_weights, needs_gate_up, needs_down, needs_up_bias, needs_down_bias = needs_grad
    dx, dweights, dgate_up, ddown, dup_bias, ddown_bias = (dout.new_empty(0) for _ in inputs)
    kernels = _kernels()
    with torch.cuda.device_of(dout):
        # What the kernels read row by row.
        dout, hidden_states = (t if t.stride(-1) == 1 else t.contiguous() for t in (dout, hidden_states))
        top_k_weights = top_k_weights.contiguous()
        precision = _input_precision()
        experts, top_k = gate_up_proj.shape[0], top_k_weights.shape[1]
        gemm_config = _config(z.shape[0], down_proj).down
        wgrad_config = tuning.wgrad_config(z.shape[0], experts, z.dtype, _capability(dout.device.index))
        padded_offsets, padded_slots, padded_positions = kernels.pad(offsets, slots)
        schedule = kernels.tile_schedule(padded_offsets, padded_slots.numel(), gemm_config.BLOCK_M)

        rows = kernels.gather(dout, padded_slots, padded_offsets, top_k)
        b = _launch_grouped_gemm(rows, down_proj.mT, schedule, precision, gemm_config)
        dz, weighted_a, dweights_of_slots = kernels.glu_backward(
            b, z, top_k_weights, padded_slots, positions, padded_offsets, Gate(*gate), needs_down
        )
        del b
        if needs_weights:
            if down_bias is not None:
                of_bias = _dout_times_bias(dout, down_bias, offsets, positions)
                dweights_of_slots += torch.where(positions >= 0, of_bias, 0.0)
            dweights = dweights_of_slots.view(top_k_weights.shape).to(top_k_weights.dtype)
        if needs_down:
            ddown = _launch_wgrad(rows, weighted_a, padded_offsets, precision, wgrad_config, is_transposed(down_proj))
        del rows, weighted_a
        if needs_down_bias:
            ddown_bias = kernels.row_sums(dout, slots, offsets, top_k_weights)
        if needs_up_bias:
            dup_bias = kernels.row_sums(dz, padded_slots, padded_offsets)
        if needs_gate_up:
            rows = kernels.gather(hidden_states, padded_slots, padded_offsets, top_k)
            transposed = is_transposed(gate_up_proj)
            dgate_up = _launch_wgrad(dz, rows, padded_offsets, precision, wgrad_config, transposed)
            del rows
        if needs_x:
            rows = _launch_grouped_gemm(dz, gate_up_proj.mT, schedule, precision, gemm_config)
            dx = kernels.combine(rows, padded_positions, torch.ones_like(top_k_weights, dtype=torch.float32))
    return dx, dweights, dgate_up, ddown, dup_bias, ddown_bias


def _dout_times_bias(dout, down_bias, offsets, positions):
    """<dout[t], down_bias[e]> of each slot, in fp32: what the bias adds to the gradient of its weight."""
    products = dout.float() @ down_bias.float().T
    slots = torch.arange(positions.shape[0], device=dout.device)
    experts = torch.searchsorted(offsets[1:], positions, right=True, out_int32=True)
    return products[slots // (positions.shape[0] // dout.shape[0]), experts]


def _backward_impl(dout, *args):
    backward = reference.moe_experts_backward if dout.device.type == "cpu" else _backward_gpu
    return backward(dout, *args)


def _empty_gradients(dout, inputs, needs_grad):
    """Uninitialised, of (hidden_states, top_k_weights, gate_up_proj, down_proj, others or None); size 0 if unneeded."""
    x, top_k_weights, gate_up_proj, down_proj, *others = inputs
    empty = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, top_k_weights)]
    empty += [reference.empty_gradient(weight) for weight in (gate_up_proj, down_proj)]
    empty += [None if t is None else t.new_empty(t.shape) for t in others]
    return tuple(t if needed else dout.new_empty(0) for t, needed in zip(empty, needs_grad))


_backward_op = register_op(
    "moe_experts_backward",
    "(Tensor dout, Tensor hidden_states, Tensor top_k_weights, Tensor gate_up_proj, Tensor down_proj,"
    " Tensor? gate_up_proj_bias, Tensor? down_proj_bias, Tensor z, Tensor expert_offsets, Tensor sorted_slots,"
    f" Tensor slot_positions, bool[] needs_grad, {_GATE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    fake=lambda dout, *args: _empty_gradients(dout, args[:6], args[10]),
)


def register_backward(forward_op, backward_op, tensors: int) -> None:
    """The gradients of `forward_op` are what `backward_op` returns.

    Of the forward's first `tensors` inputs the second, the ids, has none and is not saved; those after them describe
    the gate. The backward takes dout, the saved inputs, the forward's outputs but the first, needs_grad, and the gate.
    """

    def setup_context(ctx, inputs, output):
        hidden_states, _, *others = inputs[:tensors]
        ctx.gate = inputs[tensors:]
        ctx.save_for_backward(hidden_states, *others, *output[1:])

    def backward(ctx, dout, *_):
        needs_x, _, *needs_others = ctx.needs_input_grad[:tensors]
        needs_grad = [needs_x, *needs_others]
        grads = backward_op(dout, *ctx.saved_tensors, needs_grad, *ctx.gate)
        dx, *others = (grad if needed else None for grad, needed in zip(grads, needs_grad))
        return dx, None, *others, *(None for _ in ctx.gate)

    forward_op.register_autograd(backward, setup_context=setup_context)


register_backward(_training_op, _backward_op, tensors=7)


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
    return Routing(*_route_op(top_k_index, num_experts))


def _route_forward(top_k_index, num_experts):
    if top_k_index.device.type == "cpu" or top_k_index.numel() == 0:
        return route_torch(top_k_index, num_experts)
    with torch.cuda.device_of(top_k_index):
        return _kernels().route(top_k_index.contiguous(), num_experts, block_m=128)[:3]


def _route_fake(top_k_index, num_experts):
    slots = top_k_index.numel()
    return tuple(top_k_index.new_empty(n, dtype=torch.int32) for n in (num_experts + 1, slots, slots))


_route_op = register_op(
    "route", "(Tensor top_k_index, int num_experts) -> (Tensor, Tensor, Tensor)", _route_forward, fake=_route_fake
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
    return _grouped_gemm_op(x, weight, expert_offsets, bias)


def _grouped_gemm_forward(x, weight, expert_offsets, bias):
    if x.device.type == "cpu":
        return reference.grouped_gemm(x, weight, expert_offsets, bias)
    y = x.new_zeros(x.shape[0], weight.shape[1])
    if y.numel() == 0 or (x.shape[1] == 0 and bias is None):
        return y
    kernels = _kernels()
    if x.stride(1) != 1:
        x = x.contiguous()
    with torch.cuda.device_of(x):
        config = _config(x.shape[0], weight).down
        schedule = kernels.tile_schedule(expert_offsets, x.shape[0], config.BLOCK_M)
        return _launch_grouped_gemm(x, weight, schedule, _input_precision(), config, y, bias=_contiguous(bias))


_grouped_gemm_op = register_op(
    "grouped_gemm",
    "(Tensor x, Tensor weight, Tensor expert_offsets, Tensor? bias) -> Tensor",
    _grouped_gemm_forward,
    fake=lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[1]),
)


def _grouped_gemm_dw(dy, x, expert_offsets):
    if x.device.type == "cpu":
        return reference.grouped_gemm_dw(dy, x, expert_offsets)
    experts = expert_offsets.shape[0] - 1
    if x.numel() == 0 or dy.numel() == 0:
        return x.new_zeros(experts, dy.shape[1], x.shape[1])
    dy, x = (t if t.stride(1) == 1 else t.contiguous() for t in (dy, x))
    with torch.cuda.device_of(x):
        config = tuning.wgrad_config(x.shape[0], experts, x.dtype, _capability(x.device.index))
        config = config._replace(WARP_SPECIALIZED=False)  # these rows are not padded
        return _kernels().wgrad(dy, x, expert_offsets, _input_precision(), config)


_grouped_gemm_dw_op = register_op(
    "grouped_gemm_dw",
    "(Tensor dy, Tensor x, Tensor expert_offsets) -> Tensor",
    _grouped_gemm_dw,
    fake=lambda dy, x, expert_offsets: x.new_empty(expert_offsets.shape[0] - 1, dy.shape[1], x.shape[1]),
)


def _row_sums(y, expert_offsets):
    if y.device.type == "cpu" or y.numel() == 0:
        return reference.row_sums(y, expert_offsets)
    with torch.cuda.device_of(y):
        return _kernels().row_sums(y if y.stride(1) == 1 else y.contiguous(), expert_offsets, expert_offsets)


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


_grouped_gemm_op.register_autograd(
    _grouped_gemm_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:3])
)


def _combine(y, slot_positions, top_k_weights):
    """(S, H) rows in expert order, (S,) -1 for a skipped slot, (T, top_k) -> (T, H), each token its weighted sum."""
    if y.device.type == "cpu" or y.numel() == 0:
        return reference.combine(y, slot_positions, top_k_weights)
    with torch.cuda.device_of(y):
        return _kernels().combine(y.contiguous(), slot_positions, top_k_weights.contiguous())


combine = register_op(
    "combine",
    "(Tensor y, Tensor slot_positions, Tensor top_k_weights) -> Tensor",
    _combine,
    fake=lambda y, slot_positions, top_k_weights: y.new_empty(top_k_weights.shape[0], y.shape[1]),
)


# --- choices ----------------------------------------------------------------------------------------------------------


@functools.cache
def _capability(device: int) -> tuple[int, int]:
    """What tuning.py chooses by. MOE_GROUPED_GEMM_PORTABLE=1, for debugging: as on a GPU that it has no table for."""
    if os.environ.get("MOE_GROUPED_GEMM_PORTABLE") == "1":
        return (0, 0)
    return torch.cuda.get_device_capability(device)


@functools.cache
def _device_name(device: int) -> str:
    """Empty for a GPU that is run as an unknown one: tuned files are for the GPU that it is."""
    return torch.cuda.get_device_name(device) if _capability(device) != (0, 0) else ""


def _config(rows: int, down_proj: torch.Tensor) -> tuning.ExpertsConfig:
    device = down_proj.device.index
    return tuning.experts_config(rows, down_proj.shape, down_proj.dtype, _capability(device), _device_name(device))


def _input_precision() -> str:
    """fp32 GEMMs follow the switch that torch's own follow; 16-bit ones ignore it. CDNA4 has no tf32."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 and torch.version.hip is None else "ieee"


def _launch_grouped_gemm(x, weight, schedule, precision, config, *destination, bias=None, accumulate=False):
    kernels = _kernels()
    config = _as_readable(config, x, weight)
    if config.WARP_SPECIALIZED and (bias is not None or accumulate or not kernels.can_specialize(weight)):
        config = config._replace(WARP_SPECIALIZED=False)
    options = {"bias": bias, "accumulate": accumulate}
    return kernels.grouped_gemm(x, weight, schedule, precision, config, *destination, **options)


def _launch_wgrad(p, q, padded_offsets, precision, config, transposed):
    """In the order of the weight's memory: a gradient in another order would be copied as it is accumulated."""
    config = _as_readable(config, p, q)
    p, q = (q, p) if transposed else (p, q)
    dw = _kernels().wgrad(p, q, padded_offsets, precision, config)
    return dw.mT if transposed else dw


def _as_readable(config: tuning.GemmConfig, *tensors: torch.Tensor) -> tuning.GemmConfig:
    """Without what the tensors rule out; plain loads take anything."""
    if config.USE_TMA and not all(_tma_can_read(x) for x in tensors):
        return config._replace(USE_TMA=False, WARP_SPECIALIZED=False)
    return config


def _as_readable_gate(config: tuning.GemmConfig, gate_up_proj: torch.Tensor, gate: Gate) -> tuning.GemmConfig:
    """As `_as_readable` for the first GEMM, one of whose tiles takes rows of gate and of up."""
    if is_transposed(gate_up_proj) and not gate.interleaved:
        return config._replace(USE_TMA=False)
    return _as_readable(config, gate_up_proj)


def _tma_can_read(x: torch.Tensor) -> bool:
    """TMA wants 16-byte aligned bases and strides and, in one order of the last two dimensions, a last stride of 1."""
    *strides, last = x.mT.stride() if x.ndim == 3 and is_transposed(x) else x.stride()
    return last == 1 and x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in strides)
