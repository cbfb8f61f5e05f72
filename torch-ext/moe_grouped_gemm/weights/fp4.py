"""Frozen weights in 4 bits with one scale for each 32 columns of a row, as in quantize_fp4.py.

Activations keep their dtype, but in decoding in 16 bits, where they become integers of 15 bits. Elsewhere codes are
turned into weights of that dtype, rounded once, in registers or shared memory.
"""

from __future__ import annotations

import torch

from .. import gpu, tuning
from . import dense, quantize_fp4
from .frozen import check_codes, check_frozen, check_scale
from .layout import as_readable, by_rows, contiguous, tma_can_read
from .projection import Plan
from .quantize_fp4 import dequantize  # noqa: F401, an answer
from .shared import addend_of

BLOCK_SIZE = (1, quantize_fp4.GROUP)

MOST_COLUMNS = 2**15  # of hidden_states, a row of which kernels/decode_fp4.py keeps in shared memory
FEW_ROWS = 8  # of a tile: what kernels/fp4_registers.py multiplies at the speed of memory
_DEFAULT_BLOCK_SIZE = (128, 128)  # of the argument: nothing was said


def check(hidden_states, gate_up, down, block_size):
    if block_size is not None and tuple(block_size) not in (BLOCK_SIZE, _DEFAULT_BLOCK_SIZE):
        raise ValueError(f"block_size: expected {BLOCK_SIZE} with weights in 4 bits, got {tuple(block_size)}")
    check_frozen(hidden_states, gate_up, down, quantize_fp4.DTYPES, quantize_fp4.SCALES)


def check_scales(gate_up, down, gated):
    _check_scale(("gate_up_proj", "gate_up_proj_scale"), gate_up)
    _check_scale(("down_proj", "down_proj_scale"), down)


def check_one(projection, x):
    names = ("weight", "scale")
    check_codes(names, projection, "x", x.device, quantize_fp4.DTYPES, quantize_fp4.SCALES)
    _check_scale(names, projection)


def _check_scale(names, projection):
    experts, N, K = projection.shape
    if K % quantize_fp4.GROUP:
        raise ValueError(f"{names[0]}: expected columns in groups of {quantize_fp4.GROUP} in 4 bits, got {K}")
    check_scale(names, projection, (experts, N, K // quantize_fp4.GROUP))


def decode(x, top_k_index, top_k_weights, gate_up, down, gate, shared):
    rows, experts = top_k_index.numel(), down.weight.shape[0]
    expert_bytes = 3 * down.weight.stride(0)
    if not tuning.is_decode(rows, top_k_index.shape[0], experts, expert_bytes) or x.shape[1] > MOST_COLUMNS:
        return None
    if not (_fits_registers(x, gate_up.weight) and _fits_registers(x, down.weight)):
        return None
    kernels = gpu.launchers()
    up_config, down_config = tuning.DECODE_FP4
    up_bias, down_bias = contiguous(gate_up.bias), contiguous(down.bias)
    addend = addend_of(x, shared, gate)
    a = kernels.gate_up_decode_fp4(x, *_codes(gate_up), top_k_index, gate, up_config, up_bias)
    args = (a, *_codes(down), top_k_index, top_k_weights, down_config, x.dtype, down_bias, addend)
    return kernels.down_decode_fp4(*args)


def plan(slots, gate_up, down, gate, dtype, quantize_activations):
    traits = gpu.traits(down.weight.device.index)
    can_order = all(_can_specialize(p) and p.scale.dtype != torch.float32 for p in (gate_up, down))
    config = tuning.fp4_config(slots, down.weight.shape[0], dtype, traits, can_order)
    return Plan(config, config, dtype, gathered=True, ordered=can_order and config.WARP_SPECIALIZED)


def row_config(rows, weight, dtype, transposed=False):
    traits = gpu.traits(weight.device.index)
    if transposed:
        return tuning.FP4_DGRAD.of(dtype, traits)
    return tuning.fp4_config(rows, weight.shape[0], dtype, traits)


def ordered_gemm(x, projection, schedule, config):
    codes = projection.weight, projection.scale.contiguous()
    y = x.new_empty(x.shape[0], projection.shape[1])
    return gpu.launchers().grouped_gemm_fp4_hopper(x, *codes, schedule, config, y, contiguous(projection.bias))


def row_gemm(x, projection, schedule, config, transposed=False, low_rank=None, out=None):
    """What an adapter adds is a product of its own."""
    kernels, codes = gpu.launchers(), _codes(projection)
    config, precision = as_readable(config, x, codes[0]), gpu.input_precision(x.dtype)
    bias = None if transposed else contiguous(projection.bias)
    # Transposed, a box past the N rows of an expert would hold rows of the next one.
    specialized = bias is None and _can_specialize(projection) and not (transposed and x.shape[1] % 64)
    y = x.new_empty(x.shape[0], projection.shape[2 if transposed else 1]) if out is None else out
    if config.WARP_SPECIALIZED and specialized:
        kernels.codes_gemm_hopper(x, *codes, schedule, config, y, transposed)
    elif transposed:
        kernels.dgrad_fp4(x.contiguous(), *codes, schedule, precision, config, y)
    elif config.BLOCK_M <= FEW_ROWS and _fits_registers(x, codes[0]):
        kernels.grouped_gemm_fp4_few(x, *codes, schedule, config, y, bias)
    else:
        kernels.grouped_gemm_fp4(x, *codes, schedule, precision, config, y, bias)
    if low_rank is not None:
        y += dense.gemm(*low_rank, schedule, config._replace(USE_TMA=False, WARP_SPECIALIZED=False))
    return y


def _fits_registers(x, weight) -> bool:
    """Whether kernels/fp4_registers.py can multiply this: by NVIDIA's tensor cores, in 16 bits, from 16-byte rows."""
    if x.element_size() != 2 or gpu.traits(x.device.index).mma == "mfma":
        return False
    return weight.stride(2) == 1 and weight.data_ptr() % 16 == weight.stride(0) % 16 == weight.stride(1) % 16 == 0


def _can_specialize(projection) -> bool:
    """Whether the warp-specialized kernel can read this: by TMA, and more than one step of its columns and rows."""
    weight = projection.weight
    return weight.is_contiguous() and tma_can_read(weight) and min(projection.shape[1:]) > 64


def _codes(projection):
    """What the kernels read: codes by rows, and contiguous scales."""
    return by_rows(projection.weight), projection.scale.contiguous()
