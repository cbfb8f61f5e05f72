"""What stands between the public functions and the launchers of kernels/: which GPU, which tiles, what TMA can read."""

from __future__ import annotations

import functools
import os

import torch

from . import tuning
from .reference import Gate, is_transposed

MIN_TRITON = (3, 6)


@functools.cache
def missing_triton() -> str | None:
    """Why no kernel can be launched; None if Triton is there."""
    wanted = "moe_grouped_gemm needs Triton {}.{} or newer to run on a GPU".format(*MIN_TRITON)
    try:
        import triton
    except ImportError:
        return f"{wanted}; none is installed: pip install triton"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MIN_TRITON:
        return f"{wanted}, found {triton.__version__}: pip install -U triton (torch 2.11 brings 3.6)"
    return None


@functools.cache
def launchers():
    """The Triton launchers. Imported at the first call on a GPU: the package must load without Triton."""
    if missing_triton() is not None:
        raise ImportError(missing_triton())
    from . import kernels

    return kernels


@functools.cache
def capability(device: int) -> tuple[int, int]:
    """What tuning.py chooses by. MOE_GROUPED_GEMM_PORTABLE=1, for debugging: as on a GPU that it has no table for.

    It has none for AMD's, whose numbers mean something else: (9, 4) is an MI300, no Hopper.
    """
    if torch.version.hip is not None or os.environ.get("MOE_GROUPED_GEMM_PORTABLE") == "1":
        return (0, 0)
    return torch.cuda.get_device_capability(device)


@functools.cache
def device_name(device: int) -> str:
    """Empty for a GPU that is run as an unknown one: tuned files are for the GPU that it is."""
    return torch.cuda.get_device_name(device) if capability(device) != (0, 0) else ""


def config(rows: int, down_proj: torch.Tensor) -> tuning.ExpertsConfig:
    device = down_proj.device.index
    return tuning.experts_config(rows, down_proj.shape, down_proj.dtype, capability(device), device_name(device))


def input_precision(dtype: torch.dtype = torch.float32) -> str:
    """Of GEMMs over this dtype: fp32 ones follow the switch that torch.matmul follows. CDNA4 has no tf32.

    Both of torch's APIs end in `fp32_precision`; the older one, `allow_tf32`, raises once the newer has been used.
    """
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def launch_grouped_gemm(x, weight, schedule, precision, config, *destination, bias=None, low_rank=None):
    kernels = launchers()
    config = as_readable(config, x, weight)
    if config.WARP_SPECIALIZED and (bias is not None or not kernels.can_specialize(weight)):
        config = config._replace(WARP_SPECIALIZED=False)
    return kernels.grouped_gemm(x, weight, schedule, precision, config, *destination, bias=bias, low_rank=low_rank)


def launch_wgrad(p, q, padded_offsets, precision, config, transposed):
    """In the order of the weight's memory: a gradient in another order would be copied as it is accumulated."""
    config = as_readable(config, p, q)
    p, q = (q, p) if transposed else (p, q)
    dw = launchers().wgrad(p, q, padded_offsets, precision, config)
    return dw.mT if transposed else dw


def as_readable(config: tuning.GemmConfig, *tensors: torch.Tensor) -> tuning.GemmConfig:
    """Without what the tensors rule out; plain loads take anything."""
    if config.USE_TMA and not all(tma_can_read(x) for x in tensors):
        return config._replace(USE_TMA=False, WARP_SPECIALIZED=False)
    return config


def as_readable_gate(config: tuning.GemmConfig, gate_up_proj: torch.Tensor, gate: Gate) -> tuning.GemmConfig:
    """As `as_readable` for the first GEMM, one of whose tiles takes rows of gate and of up."""
    if is_transposed(gate_up_proj) and not gate.interleaved:
        return config._replace(USE_TMA=False)
    return as_readable(config, gate_up_proj)


def tma_can_read(x: torch.Tensor) -> bool:
    """TMA wants 16-byte aligned bases and strides and, in one order of the last two dimensions, a last stride of 1."""
    *strides, last = x.mT.stride() if x.ndim == 3 and is_transposed(x) else x.stride()
    return last == 1 and x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in strides)


def down_and_combine(a, down_proj, bias, sorted_slots, slot_positions, schedule, top_k_weights, precision, config):
    """The down GEMM and each token's weighted sum. A sum of one is no sum: the GEMM stores it, and y is never made."""
    kernels = launchers()
    if top_k_weights.shape[1] > 1:
        y = launch_grouped_gemm(a, down_proj, schedule, precision, config, bias=bias)
        return kernels.combine(y, slot_positions, top_k_weights)
    out = a.new_empty(a.shape[0], down_proj.shape[1])
    kernels.zero_skipped(out, slot_positions)
    destination = (out, sorted_slots, top_k_weights)
    return launch_grouped_gemm(a, down_proj, schedule, precision, config, *destination, bias=bias)


def contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return x if x is None else x.contiguous()
