"""Frozen weights in 4 bits with one scale for each 32 columns of a row, as in quantize_fp4.py.

Activations keep their dtype. Codes are turned into weights of that dtype, rounded once, in registers or shared memory.
"""

from __future__ import annotations

import torch

from .. import gpu, tuning
from ..checks import shape
from . import dense, quantize_fp4
from .frozen import check_frozen
from .layout import as_readable, by_rows, contiguous
from .projection import Plan
from .quantize_fp4 import dequantize  # noqa: F401, an answer

BLOCK_SIZE = (1, quantize_fp4.GROUP)

_DEFAULT_BLOCK_SIZE = (128, 128)  # of the argument: nothing was said


def check(hidden_states, gate_up, down, block_size):
    if block_size is not None and tuple(block_size) not in (BLOCK_SIZE, _DEFAULT_BLOCK_SIZE):
        raise ValueError(f"block_size: expected {BLOCK_SIZE} with weights in 4 bits, got {tuple(block_size)}")
    check_frozen(hidden_states, gate_up, down, quantize_fp4.DTYPES, quantize_fp4.SCALES)


def check_scales(gate_up, down, gated):
    for name, projection in {"gate_up_proj": gate_up, "down_proj": down}.items():
        experts, N, K = projection.shape
        if K % quantize_fp4.GROUP:
            raise ValueError(f"{name}: expected columns in groups of {quantize_fp4.GROUP} in 4 bits, got {K}")
        expected = (experts, N, K // quantize_fp4.GROUP)
        if projection.scale.shape != expected:
            raise ValueError(f"{name}_scale: expected {expected} to fit {name}, got {shape(projection.scale)}")


def decode(x, top_k_index, top_k_weights, gate_up, down, gate):
    return None


def plan(slots, gate_up, down, gate, dtype, quantize_activations):
    config = row_config(slots, down.weight, dtype)
    return Plan(config, config, dtype, gathered=True)


def row_config(rows, weight, dtype, transposed=False):
    capability = gpu.capability(weight.device.index)
    if transposed:
        return tuning.FP4_DGRAD.of(dtype, capability)
    return tuning.fp4_config(rows, weight.shape[0], dtype, capability)


def row_gemm(x, projection, schedule, config, transposed=False, low_rank=None, out=None):
    """What an adapter adds is a product of its own."""
    kernels, (weight, scale) = gpu.launchers(), _as_bytes(projection)
    config, precision = as_readable(config, x, weight), gpu.input_precision(x.dtype)
    if transposed:
        y = kernels.dgrad_fp4(x.contiguous(), weight, scale, schedule, precision, config)
    else:
        y = x.new_empty(x.shape[0], weight.shape[1]) if out is None else out
        kernels.grouped_gemm_fp4(x, weight, scale, schedule, precision, config, y, contiguous(projection.bias))
    if low_rank is not None:
        y += dense.gemm(*low_rank, schedule, config._replace(USE_TMA=False, WARP_SPECIALIZED=False))
    return y


def _as_bytes(projection):
    """What the kernels read: codes by rows, contiguous exponents or fp32 scales."""
    scale = projection.scale
    if scale.dtype == torch.float8_e8m0fnu:
        scale = scale.view(torch.uint8)
    return by_rows(projection.weight.view(torch.uint8)), scale.contiguous()
