"""`moe_experts` and `grouped_gemm` over frozen fp8 weights: the choice of path, and gradients of the activations.

With gradients, and for GPUs that do not multiply fp8, activations keep their dtype and weights are dequantised in
registers. Otherwise more than a few rows are quantised, once a token and once by the first GEMM's own epilogue.
"""

from __future__ import annotations

import math

import torch

from . import gpu, reference, training, tuning
from .checks import check_fp8_experts
from .reference import Gate
from .routing import route_torch
from .torch_ops import autocast, needs_gradients, needs_op, register_autograd, register_op


def moe_experts(
    hidden_states,
    top_k_index,
    top_k_weights,
    gate_up_proj,
    down_proj,
    gate_up_proj_scale,
    down_proj_scale,
    activation,
    block_size,
    quantize_activations,
):
    """See `functional.moe_experts`."""
    (hidden_states,) = autocast(hidden_states)
    inputs = (hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, gate_up_proj_scale, down_proj_scale)
    check_fp8_experts(*inputs, activation, block_size)
    as_op = needs_op(_experts_op, inputs)
    if needs_gradients((hidden_states, top_k_weights)):
        return _training_op(*inputs, activation)[0]
    if hidden_states.requires_grad or top_k_weights.requires_grad:
        # Reentrant checkpointing, say, whose second pass is with gradients.
        quantize_activations = False
    return (_experts_op if as_op else _experts_forward)(*inputs, activation, quantize_activations)


def _experts_forward(hidden_states, *args):
    if hidden_states.device.type == "cpu":
        *inputs, gate_up_scale, down_scale, activation, _ = args
        scales = {"gate_up_proj_scale": gate_up_scale, "down_proj_scale": down_scale}
        return reference.moe_experts(hidden_states, *inputs, activation, **scales)
    return _experts_gpu(hidden_states, *args)


def _experts_gpu(
    hidden_states,
    top_k_index,
    top_k_weights,
    gate_up_proj,
    down_proj,
    gate_up_proj_scale,
    down_proj_scale,
    activation,
    quantize_activations,
):
    """Few slots: two launches. Else up to six: (count), route, quantise, gate_up GEMM, down GEMM, combine."""
    rows, num_experts = top_k_index.numel(), gate_up_proj.shape[0]
    if rows == 0 or hidden_states.numel() == 0:
        return hidden_states.new_zeros(hidden_states.shape)
    device = hidden_states.device.index
    if device != torch.cuda.current_device():
        weights = (gate_up_proj, down_proj, gate_up_proj_scale, down_proj_scale)
        with torch.cuda.device(device):
            return _experts_gpu(hidden_states, top_k_index, top_k_weights, *weights, activation, quantize_activations)
    kernels = gpu.launchers()
    if hidden_states.stride(1) != 1:
        hidden_states = hidden_states.contiguous()
    top_k_index, top_k_weights = top_k_index.contiguous(), top_k_weights.contiguous()
    gate_up_proj, gate_up_proj_scale = _as_bits(gate_up_proj, gate_up_proj_scale)
    down_proj, down_proj_scale = _as_bits(down_proj, down_proj_scale)
    is_decode = tuning.is_decode(rows, top_k_index.shape[0], num_experts, 3 * down_proj.stride(0))
    if is_decode and gate_up_proj.stride(2) == down_proj.stride(2) == 1:
        up_config, down_config = tuning.DECODE_FP8
        a = kernels.gate_up_decode_fp8(
            hidden_states, gate_up_proj, gate_up_proj_scale, top_k_index, Gate(activation), up_config
        )
        return kernels.down_decode_fp8(a, down_proj, down_proj_scale, top_k_index, top_k_weights, down_config)
    quantized = quantize_activations and _multiplies_fp8(device)
    configs = _config(rows, num_experts, torch.float8_e4m3fn if quantized else hidden_states.dtype, device)
    *routing, schedule = kernels.route(top_k_index, num_experts, configs.gate_up.BLOCK_M)
    weights = (gate_up_proj, gate_up_proj_scale, down_proj, down_proj_scale)
    y = hidden_states.new_empty(rows, hidden_states.shape[1])
    _both_gemms(hidden_states, *weights, routing, schedule, Gate(activation), configs, quantized, y)
    return kernels.combine(y, routing[2], top_k_weights)


def _both_gemms(x, gate_up, gate_up_scale, down, down_scale, routing, schedule, gate, configs, quantized, y, z=None):
    """Fills y (S, H), and z (S, 2I) if it is given; rows of skipped slots stay unwritten."""
    kernels, precision = gpu.launchers(), gpu.input_precision(x.dtype)
    up_config, down_config = configs
    offsets, slots, positions = routing
    top_k = slots.numel() // x.shape[0]
    shift = kernels.scale_shift(down.shape[2], gate_up_scale.shape[1])
    specialized = down_config.WARP_SPECIALIZED and all(_can_specialize(weight) for weight in (gate_up, down))
    if specialized and quantized and (down.shape[2] + shift) % 128 == 0:
        a = kernels.quantize_slots(x, positions)
        a = kernels.gate_up_fp8_hopper(*a, gate_up, gate_up_scale, schedule, gate, up_config)
        kernels.grouped_gemm_fp8_hopper(*a, down, down_scale, schedule, down_config, y)
        return
    if specialized and not quantized and shift == 0:
        x = kernels.gather(x, slots, offsets, top_k, out=y)
        z = x.new_empty(x.shape[0], gate_up.shape[1]) if z is None else z
        kernels.fp8_weights_gemm_hopper(x, gate_up, gate_up_scale, schedule, up_config, z)
        a = kernels.glu(z, slots, offsets, gate)
        kernels.fp8_weights_gemm_hopper(a, down, down_scale, schedule, down_config, y)
        return
    x, x_scale = kernels.quantize_rows(x) if quantized else (x, None)
    up_config = _as_readable(up_config, gate_up)
    a, a_scale = kernels.gate_up_fp8(
        x, x_scale, gate_up, gate_up_scale, slots, schedule, top_k, gate, precision, up_config, z
    )
    down_config = _as_readable(down_config, a, down)
    kernels.grouped_gemm_fp8(a, a_scale, down, down_scale, schedule, precision, down_config, y)


def _dgrad(x, weight, scale, schedule, config, shift=0):
    """x (S, K) contiguous, weight (E, K, N) -> (S, N); rows of nobody stay unwritten."""
    kernels = gpu.launchers()
    config = _as_readable(config, x, weight)
    # A box past the K rows of an expert would hold rows of the next one.
    if config.WARP_SPECIALIZED and _can_specialize(weight) and shift == 0 and x.shape[1] % 64 == 0:
        y = x.new_empty(x.shape[0], weight.shape[2])
        return kernels.fp8_weights_gemm_hopper(x, weight, scale, schedule, config, y, transposed=True)
    return kernels.dgrad_fp8(x, weight, scale, schedule, gpu.input_precision(x.dtype), config, shift)


_SCHEMA = (
    "Tensor hidden_states, Tensor top_k_index, Tensor top_k_weights, Tensor gate_up_proj, Tensor down_proj,"
    " Tensor gate_up_proj_scale, Tensor down_proj_scale, str activation"
)

_experts_op = register_op(
    "moe_experts_fp8",
    f"({_SCHEMA}, bool quantize_activations) -> Tensor",
    _experts_forward,
    fake=lambda hidden_states, *_: torch.empty_like(hidden_states, memory_format=torch.contiguous_format),
    flops=training.experts_flops,
)


# --- gradients of hidden_states and top_k_weights ---------------------------------------------------------------------


def _training_gpu(
    hidden_states,
    top_k_index,
    top_k_weights,
    gate_up_proj,
    down_proj,
    gate_up_proj_scale,
    down_proj_scale,
    activation,
):
    """The layer, z (S, 2I) before the activation, and the routing."""
    experts, rows, _ = gate_up_proj.shape
    z = hidden_states.new_empty(top_k_index.numel(), rows)
    if z.numel() == 0 or hidden_states.numel() == 0:
        return hidden_states.new_zeros(hidden_states.shape), z, *route_torch(top_k_index, experts)
    kernels = gpu.launchers()
    with torch.cuda.device_of(hidden_states):
        if hidden_states.stride(1) != 1:
            hidden_states = hidden_states.contiguous()
        configs = _config(z.shape[0], experts, z.dtype, z.device.index)
        *routing, schedule = kernels.route(top_k_index.contiguous(), experts, configs[0].BLOCK_M)
        weights = (*_as_bits(gate_up_proj, gate_up_proj_scale), *_as_bits(down_proj, down_proj_scale))
        y = hidden_states.new_empty(z.shape[0], hidden_states.shape[1])
        _both_gemms(hidden_states, *weights, routing, schedule, Gate(activation), configs, False, y, z)
        return kernels.combine(y, routing[2], top_k_weights.contiguous()), z, *routing


def _training_forward(hidden_states, *args):
    if hidden_states.device.type == "cpu":
        *inputs, gate_up_scale, down_scale, activation = args
        gate, scales = Gate(activation), (gate_up_scale, down_scale)
        return reference.moe_experts_training(hidden_states, *inputs, None, None, *gate, scales=scales)
    return _training_gpu(hidden_states, *args)


_training_op = register_op(
    "moe_experts_fp8_training",
    f"({_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _training_forward,
    fake=training.training_fake,
    flops=training.experts_flops,
)


def _backward_gpu(
    dout, top_k_weights, gate_up_proj, down_proj, gate_up_scale, down_scale, z, offsets, slots, positions, activation
):
    """As `_backward_gpu` of training.py, without gradients of weights."""
    if z.numel() == 0 or dout.numel() == 0:
        return torch.zeros_like(dout), torch.zeros_like(top_k_weights)
    kernels = gpu.launchers()
    with torch.cuda.device_of(dout):
        dout, gate_up_proj, down_proj = (
            t if t.stride(-1) == 1 else t.contiguous() for t in (dout, gate_up_proj, down_proj)
        )
        gate_up_proj, gate_up_scale = _as_bits(gate_up_proj, gate_up_scale)
        down_proj, down_scale = _as_bits(down_proj, down_scale)
        top_k_weights = top_k_weights.contiguous()
        config = tuning.fp8_dgrad_config(z.dtype, gpu.capability(dout.device.index))
        padded_offsets, padded_slots, padded_positions = kernels.pad(offsets, slots)
        schedule = kernels.tile_schedule(padded_offsets, padded_slots.numel(), config.BLOCK_M)
        rows = kernels.gather(dout, padded_slots, padded_offsets, top_k_weights.shape[1])
        b = _dgrad(rows, down_proj, down_scale, schedule, config)
        del rows
        order = (padded_slots, positions, padded_offsets)
        dz, _, dweights = kernels.glu_backward(b, z, top_k_weights, *order, Gate(activation), needs_a=False)
        del b
        shift = kernels.scale_shift(z.shape[1] // 2, gate_up_scale.shape[1])
        rows = _dgrad(dz, gate_up_proj, gate_up_scale, schedule, config, shift)
        dx = kernels.combine(rows, padded_positions, torch.ones_like(top_k_weights, dtype=torch.float32))
        return dx, dweights.view(top_k_weights.shape).to(top_k_weights.dtype)


def _backward_impl(dout, *args):
    if dout.device.type == "cpu":
        *weights, gate_up_scale, down_scale, z, offsets, slots, positions, activation = args
        # Of hidden_states, whose form dout has, only that is asked for: no weight gets a gradient.
        inputs = (dout, dout, *weights, None, None, z, offsets, slots, positions)
        needs_grad = [True, True, False, False, False, False]
        scales = (gate_up_scale, down_scale)
        return reference.moe_experts_backward(*inputs, needs_grad, *Gate(activation), scales=scales)[:2]
    return _backward_gpu(dout, *args)


_backward_op = register_op(
    "moe_experts_fp8_backward",
    "(Tensor dout, Tensor top_k_weights, Tensor gate_up_proj, Tensor down_proj, Tensor gate_up_proj_scale,"
    " Tensor down_proj_scale, Tensor z, Tensor expert_offsets, Tensor sorted_slots, Tensor slot_positions,"
    " str activation) -> (Tensor, Tensor)",
    _backward_impl,
    fake=lambda dout, top_k_weights, *_: tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (dout, top_k_weights)
    ),
    flops=lambda dout, top_k_weights, *weights_and_others, **_: (
        2 * math.prod(top_k_weights) * sum(math.prod(weight[1:]) for weight in weights_and_others[:2])
    ),
)


def _training_setup_context(ctx, inputs, output):
    _, _, *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _training_backward(ctx, dout, *_):
    dx, dweights = _backward_op(dout, *ctx.saved_tensors, ctx.activation)
    return dx, None, dweights, None, None, None, None, None


register_autograd(_training_op, _training_backward, _training_setup_context)


# --- grouped_gemm, for adapters ---------------------------------------------------------------------------------------


def grouped_gemm(x, weight, scale, expert_offsets):
    """`functional.grouped_gemm` with an fp8 weight (E, N, K) and its scale; differentiable in x."""
    return _grouped_gemm_op(x, weight, scale, expert_offsets, False)


def _grouped_gemm_forward(x, weight, scale, expert_offsets, transposed):
    """transposed: y[r] = W[e]^T @ x[r]."""
    if x.device.type == "cpu":
        if transposed:
            return reference.grouped_gemm_transposed(x, weight, expert_offsets, scale)
        return reference.grouped_gemm(x, weight, expert_offsets, scale=scale)
    y = x.new_empty(x.shape[0], weight.shape[2 if transposed else 1])
    if y.numel() == 0 or x.shape[1] == 0:
        return y.zero_()
    kernels = gpu.launchers()
    x = x if x.stride(1) == 1 else x.contiguous()
    weight, scale = _as_bits(weight, scale)
    # Of a weight that is [gate; up]; others have one way to count blocks.
    shift = kernels.scale_shift(weight.shape[1] // 2, scale.shape[1]) if weight.shape[1] % 2 == 0 else 0
    with torch.cuda.device_of(x):
        if transposed:
            weight = weight if weight.stride(2) == 1 else weight.contiguous()
            config = tuning.fp8_dgrad_config(x.dtype, gpu.capability(x.device.index))
            schedule = kernels.tile_schedule(expert_offsets, x.shape[0], config.BLOCK_M)
            y = _dgrad(x.contiguous(), weight, scale, schedule, config, shift)
            kernels.zero_tail(y, expert_offsets)
            return y
        kernels.zero_tail(y, expert_offsets)
        config = _config(x.shape[0], weight.shape[0], x.dtype, x.device.index).down
        schedule = kernels.tile_schedule(expert_offsets, x.shape[0], config.BLOCK_M)
        config = _as_readable(config, x, weight)
        if config.WARP_SPECIALIZED and _can_specialize(weight) and shift == 0:
            return kernels.fp8_weights_gemm_hopper(x, weight, scale, schedule, config, y)
        precision = gpu.input_precision(x.dtype)
        return kernels.grouped_gemm_fp8(x, None, weight, scale, schedule, precision, config, y, shift)


_grouped_gemm_op = register_op(
    "grouped_gemm_fp8",
    "(Tensor x, Tensor weight, Tensor scale, Tensor expert_offsets, bool transposed) -> Tensor",
    _grouped_gemm_forward,
    fake=lambda x, weight, scale, expert_offsets, transposed: x.new_empty(
        x.shape[0], weight.shape[2 if transposed else 1]
    ),
    flops=lambda x, weight, *_, **__: 2 * x[0] * math.prod(weight[1:]),
)


def _grouped_gemm_setup_context(ctx, inputs, output):
    _, *tensors, ctx.transposed = inputs
    ctx.save_for_backward(*tensors)


def _grouped_gemm_backward(ctx, dy):
    return _grouped_gemm_op(dy, *ctx.saved_tensors, not ctx.transposed), None, None, None, None


register_autograd(_grouped_gemm_op, _grouped_gemm_backward, _grouped_gemm_setup_context)


# --- choices ----------------------------------------------------------------------------------------------------------


def _multiplies_fp8(device: int) -> bool:
    """Whether the GPU knows float8_e4m3fn, and its tensor cores multiply it: NVIDIA's from Ada and Hopper on."""
    return torch.version.hip is None and gpu.capability(device) >= (8, 9)


def _as_bits(weight, scale):
    """What the kernels read: bytes in place of a type that Triton, or this GPU, does not know; contiguous scales."""
    if not _multiplies_fp8(weight.device.index):
        weight = weight.view(torch.uint8)
    if scale.dtype == torch.float8_e8m0fnu:
        scale = scale.view(torch.uint8)
    return weight, scale.contiguous()


def _config(rows, num_experts, dtype, device) -> tuning.ExpertsConfig:
    return tuning.fp8_config(rows, num_experts, dtype, gpu.capability(device))


def _can_specialize(weight) -> bool:
    """Whether the warp-specialized kernels can read this: by TMA, and more than one step of its columns and rows."""
    return weight.is_contiguous() and gpu.tma_can_read(weight) and min(weight.shape[1:]) > 64


def _as_readable(config, *tensors):
    """As gpu.py's; these kernels read weights, which come last, by rows alone."""
    if tensors[-1].stride(-1) != 1:
        return config._replace(USE_TMA=False, WARP_SPECIALIZED=False)
    return gpu.as_readable(config, *tensors)
