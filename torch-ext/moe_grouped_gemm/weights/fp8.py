"""Frozen weights in float8_e4m3fn with one scale for each block of 128 x 128.

With gradients or adapters, and for GPUs that do not multiply fp8, activations keep their dtype and weights are
dequantised in registers or shared memory. Otherwise more than a few rows are quantised, once a token and once by the
first GEMM's own epilogue; what stands between the two GEMMs is then the codes and their scales.
"""

from __future__ import annotations

import torch

from .. import gpu, tuning
from ..checks import shape
from . import dense, quantize_fp8
from .frozen import check_codes, check_frozen, check_scale
from .layout import as_readable, by_rows, contiguous, tma_can_read
from .projection import Plan
from .quantize_fp8 import FP8, dequantize  # noqa: F401, an answer
from .shared import addend_of

BLOCK_SIZE = (quantize_fp8.BLOCK, quantize_fp8.BLOCK)


def check(hidden_states, gate_up, down, block_size):
    if block_size is not None and tuple(block_size) != BLOCK_SIZE:
        raise ValueError(f"block_size: expected {BLOCK_SIZE}, got {tuple(block_size)}")
    check_frozen(hidden_states, gate_up, down, (FP8,), quantize_fp8.SCALES)


def check_scales(gate_up, down, gated):
    experts, rows, hidden_dim = gate_up.weight.shape
    allowed = [quantize_fp8.scale_shape(*gate_up.weight.shape)]
    if gated:
        of_halves = (experts, 2 * quantize_fp8.scale_shape(rows // 2, hidden_dim)[0], allowed[0][2])
        if of_halves != allowed[0]:
            allowed.append(of_halves)
    if gate_up.scale.shape not in allowed:
        expected = " or, with blocks of gate and up apart, ".join(map(str, allowed))
        raise ValueError(f"gate_up_proj_scale: expected {expected}, got {shape(gate_up.scale)}")
    check_scale(("down_proj", "down_proj_scale"), down, quantize_fp8.scale_shape(*down.weight.shape))


def check_one(projection, x):
    names = ("weight", "scale")
    check_codes(names, projection, "x", x.device, (FP8,), quantize_fp8.SCALES)
    check_scale(names, projection, quantize_fp8.scale_shape(*projection.weight.shape))


def decode(x, top_k_index, top_k_weights, gate_up, down, gate, shared):
    rows, experts = top_k_index.numel(), down.weight.shape[0]
    if gate.interleaved or _is_biased(gate_up, down) or not gate_up.weight.stride(2) == down.weight.stride(2) == 1:
        return None
    if not tuning.is_decode(rows, top_k_index.shape[0], experts, 3 * down.weight.stride(0)):
        return None
    kernels = gpu.launchers()
    up_config, down_config = tuning.DECODE_FP8
    addend = addend_of(x, shared, gate)
    a = kernels.gate_up_decode_fp8(x, *_as_bits(gate_up), top_k_index, gate, up_config)
    return kernels.down_decode_fp8(a, *_as_bits(down), top_k_index, top_k_weights, down_config, addend)


def plan(slots, gate_up, down, gate, dtype, quantize_activations):
    """Kernels that apply the gate take halves of rows, and no bias; specialized ones that dequantise have no gate."""
    device = down.weight.device.index
    apart = gate.interleaved or _is_biased(gate_up, down)
    quantized = quantize_activations and not apart and gpu.traits(device).has_fp8
    experts, _, inter = down.weight.shape
    up_config, down_config = _experts_config(slots, experts, FP8 if quantized else dtype, device)
    specialized = down_config.WARP_SPECIALIZED and all(_can_specialize(p.weight) for p in (gate_up, down))
    if specialized:
        shift = _scale_shift(gate_up)
        specialized = (inter + shift) % 128 == 0 if quantized else shift == 0
    if not specialized:
        down_config = down_config._replace(WARP_SPECIALIZED=False)
    return Plan(up_config, down_config, dtype, quantized, gathered=not quantized and (specialized or apart))


def _experts_config(rows, experts, dtype, device):
    return tuning.fp8_config(rows, experts, dtype, gpu.traits(device))


def first_gemm(x, gate_up, rows, gate, plan, z=None):
    """Returns codes and their scales, or a and None."""
    kernels, (weight, scale) = gpu.launchers(), _as_bits(gate_up)
    if plan.down.WARP_SPECIALIZED:
        codes = kernels.quantize_slots(x, rows.positions)
        return kernels.gate_up_fp8_hopper(*codes, weight, scale, rows.schedule, gate, plan.gate_up)
    x, x_scale = kernels.quantize_rows(x) if plan.quantized else (x, None)
    order = (rows.slots, rows.schedule, rows.top_k)
    config = _as_readable(plan.gate_up, weight)
    precision = gpu.input_precision(plan.dtype)
    return kernels.gate_up_fp8(x, x_scale, weight, scale, *order, gate, precision, config, z)


def second_gemm(a, down, rows, plan, addend):
    kernels, (weight, scale), (a, a_scale) = gpu.launchers(), _as_bits(down), a
    y = a.new_empty(a.shape[0], weight.shape[1], dtype=plan.dtype)
    if plan.down.WARP_SPECIALIZED:
        kernels.grouped_gemm_fp8_hopper(a, a_scale, weight, scale, rows.schedule, plan.down, y)
    else:
        config = _as_readable(plan.down, a, weight)
        precision = gpu.input_precision(plan.dtype)
        kernels.grouped_gemm_fp8(a, a_scale, weight, scale, rows.schedule, precision, config, y)
    return rows.combine(y, addend=addend)


def row_config(rows, weight, dtype, transposed=False):
    device = weight.device.index
    if transposed:
        return tuning.FP8_DGRAD.of(dtype, gpu.traits(device))
    return _experts_config(rows, weight.shape[0], dtype, device).down


def row_gemm(x, projection, schedule, config, transposed=False, low_rank=None, out=None):
    """What an adapter adds is a product of its own."""
    weight, scale = _as_bits(projection)
    if transposed:
        y = _transposed_gemm(x, by_rows(weight), scale, schedule, config, _scale_shift(projection))
    else:
        y = x.new_empty(x.shape[0], weight.shape[1]) if out is None else out
        _gemm(x, weight, scale, schedule, config, _scale_shift(projection), y, projection.bias)
    if low_rank is not None:
        y += dense.gemm(*low_rank, schedule, config._replace(USE_TMA=False, WARP_SPECIALIZED=False))
    return y


def _gemm(x, weight, scale, schedule, config, shift, y, bias):
    kernels, config = gpu.launchers(), _as_readable(config, x, weight)
    if config.WARP_SPECIALIZED and _can_specialize(weight) and shift == 0 and bias is None:
        return kernels.codes_gemm_hopper(x, weight, scale, schedule, config, y)
    precision, bias = gpu.input_precision(x.dtype), contiguous(bias)
    return kernels.grouped_gemm_fp8(x, None, weight, scale, schedule, precision, config, y, shift, bias)


def _transposed_gemm(x, weight, scale, schedule, config, shift):
    kernels, config = gpu.launchers(), _as_readable(config, x, weight)
    # A box past the K rows of an expert would hold rows of the next one.
    if config.WARP_SPECIALIZED and _can_specialize(weight) and shift == 0 and x.shape[1] % 64 == 0:
        y = x.new_empty(x.shape[0], weight.shape[2])
        return kernels.codes_gemm_hopper(x, weight, scale, schedule, config, y, transposed=True)
    return kernels.dgrad_fp8(x.contiguous(), weight, scale, schedule, gpu.input_precision(x.dtype), config, shift)


def _is_biased(gate_up, down) -> bool:
    return gate_up.bias is not None or down.bias is not None


def _as_bits(projection):
    """What the kernels read: bytes in place of a type that Triton, or this GPU, does not know; contiguous scales."""
    weight, scale = projection.weight, projection.scale
    if not gpu.traits(weight.device.index).has_fp8:
        weight = weight.view(torch.uint8)
    if scale.dtype == torch.float8_e8m0fnu:
        scale = scale.view(torch.uint8)
    return weight, scale.contiguous()


def _scale_shift(projection):
    """Of a weight that is [gate; up]; others have one way to count blocks."""
    rows = projection.weight.shape[1]
    return gpu.launchers().scale_shift(rows // 2, projection.scale.shape[1]) if rows % 2 == 0 else 0


def _can_specialize(weight) -> bool:
    """Whether the warp-specialized kernels can read this: by TMA, and more than one step of its columns and rows."""
    return weight.is_contiguous() and tma_can_read(weight) and min(weight.shape[1:]) > 64


def _as_readable(config, *tensors):
    """As layout.py's; these kernels read weights, which come last, by rows alone."""
    if tensors[-1].stride(-1) != 1:
        return config._replace(USE_TMA=False, WARP_SPECIALIZED=False)
    return as_readable(config, *tensors)
