"""Weights in the dtype of the activations, (E, N, K) or, without a copy, a view of (E, K, N)."""

from __future__ import annotations

from .. import gpu, tuning
from ..checks import check_floats
from .layout import as_readable, contiguous, is_transposed
from .projection import Plan, biases_of


def check(hidden_states, gate_up, down, block_size):
    check_floats(
        hidden_states=hidden_states, gate_up_proj=gate_up.weight, down_proj=down.weight, **biases_of(gate_up, down)
    )


def check_one(projection, x):
    pass  # its dtype is that of x


def check_scales(gate_up, down, gated):
    pass


def decode(x, top_k_index, top_k_weights, gate_up, down, gate, shared):
    rows, experts = top_k_index.numel(), down.weight.shape[0]
    expert_bytes = 3 * down.weight.stride(0) * down.weight.element_size()
    if not tuning.is_decode(rows, top_k_index.shape[0], experts, expert_bytes):
        return None
    transposed = not gate_up.weight.stride(2) == down.weight.stride(2) == 1
    if transposed and not (is_transposed(gate_up.weight) and is_transposed(down.weight)):
        return None
    kernels = gpu.launchers()
    up_config, down_config = tuning.decode_config(x.dtype, transposed)
    up_bias, down_bias = contiguous(gate_up.bias), contiguous(down.bias)
    a = kernels.gate_up_decode(x, gate_up.weight, top_k_index, gate, up_config, up_bias, shared)
    return kernels.down_decode(a, down.weight, top_k_index, top_k_weights, down_config, down_bias, shared)


def plan(slots, gate_up, down, gate, dtype, quantize_activations):
    up_config, down_config = _experts_config(slots, down.weight)
    if is_transposed(gate_up.weight) and not gate.interleaved:  # one tile takes rows of gate and of up
        up_config = up_config._replace(USE_TMA=False, WARP_SPECIALIZED=False)
    return Plan(as_readable(up_config, gate_up.weight), down_config, dtype)


def _experts_config(rows, weight):
    device = weight.device.index
    return tuning.experts_config(rows, weight.shape, weight.dtype, gpu.traits(device), gpu.device_name(device))


def first_gemm(x, gate_up, rows, gate, plan, z=None):
    kernels, config = gpu.launchers(), plan.gate_up
    if config.WARP_SPECIALIZED and not kernels.can_specialize_gate_up(x, gate_up.weight, gate, gate_up.bias):
        config = config._replace(WARP_SPECIALIZED=False)
    order = (rows.slots, rows.schedule, rows.top_k)
    how = (gpu.input_precision(x.dtype), config)
    return kernels.gate_up(x, gate_up.weight, *order, gate, *how, z, contiguous(gate_up.bias))


def second_gemm(a, down, rows, plan, addend):
    """A sum of one is no sum: with top_k = 1 and nothing to add the GEMM itself stores the result."""
    if rows.top_k > 1 or addend is not None:
        y = gemm(a, down.weight, rows.schedule, plan.down, bias=down.bias)
        return rows.combine(y, addend=addend)
    out = a.new_empty(a.shape[0], down.weight.shape[1])
    gpu.launchers().zero_skipped(out, rows.positions)
    return gemm(a, down.weight, rows.schedule, plan.down, out, rows.slots, rows.weights, bias=down.bias)


def row_config(rows, weight, dtype, transposed=False):
    return _experts_config(rows, weight).down


def row_gemm(x, projection, schedule, config, transposed=False, low_rank=None, out=None):
    weight, bias = (projection.weight.mT, None) if transposed else projection[:2]
    return gemm(x, weight, schedule, config, out, bias=bias, low_rank=low_rank)


def gemm(x, weight, schedule, config, *destination, bias=None, low_rank=None):
    """kernels.grouped_gemm, by a kernel that can read this weight."""
    kernels = gpu.launchers()
    config = as_readable(config, x, weight)
    if config.WARP_SPECIALIZED and (bias is not None or not kernels.can_specialize(weight)):
        config = config._replace(WARP_SPECIALIZED=False)
    precision, bias = gpu.input_precision(x.dtype), contiguous(bias)
    return kernels.grouped_gemm(x, weight, schedule, precision, config, *destination, bias=bias, low_rank=low_rank)


def wgrad(dy, x, rows, weight):
    """dW[e] = sum of dy[r] x[r]^T over e's rows, padded ones, in the order of the weight's memory.

    In another order a gradient would be copied as it is accumulated.
    """
    slots, experts = rows.positions.numel(), weight.shape[0]
    config = tuning.wgrad_config(slots, experts, x.dtype, gpu.traits(x.device.index))
    config = as_readable(config, dy, x)
    transposed = is_transposed(weight)
    p, q = (x, dy) if transposed else (dy, x)
    dw = gpu.launchers().wgrad(p, q, rows.offsets, gpu.input_precision(x.dtype), config)
    return dw.mT if transposed else dw
