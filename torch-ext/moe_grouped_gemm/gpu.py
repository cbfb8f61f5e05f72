"""What there is to launch kernels with: Triton, and which GPU."""

from __future__ import annotations

import functools
import os

import torch

from .launch_configs import TRAITS, Traits

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
def traits(device: int) -> Traits:
    """What tuning.py chooses by. MOE_GROUPED_GEMM_AS=sm_80, for debugging: as if it were that GPU of TRAITS."""
    name = os.environ.get("MOE_GROUPED_GEMM_AS")
    if name is not None:
        if name not in TRAITS:
            raise ValueError(f"MOE_GROUPED_GEMM_AS: expected one of {', '.join(TRAITS)}, got {name}")
        return TRAITS[name]
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:  # where (9, 4) is an MI300, no Hopper; all have 64 KiB, if PyTorch does not say
        shared = getattr(properties, "shared_memory_per_block", 64 * 1024)
        return Traits(shared, "mfma", warp_size=properties.warp_size)
    major, minor = properties.major, properties.minor
    mma = {9: "wgmma", 10: "tcgen05", 11: "tcgen05"}.get(major, "mma.sync")
    has_fp8 = (major, minor) >= (8, 9)
    return Traits(properties.shared_memory_per_block_optin, mma, has_tma=major >= 9, has_fp8=has_fp8)


@functools.cache
def device_name(device: int) -> str:
    """Empty for a GPU that is run as another: tuned files are for the GPU that it is."""
    return "" if "MOE_GROUPED_GEMM_AS" in os.environ else torch.cuda.get_device_name(device)


def input_precision(dtype: torch.dtype = torch.float32) -> str:
    """Of GEMMs over this dtype: fp32 ones follow the switch that torch.matmul follows. CDNA4 has no tf32.

    Both of torch's APIs end in `fp32_precision`; the older one, `allow_tf32`, raises once the newer has been used.
    """
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def on_its_device(function):
    """Decorates what launches kernels for its first tensor. To enter its device costs microseconds: not if it is on."""

    @functools.wraps(function)
    def on_device(x, *args):
        # torch.cuda.current_device() looks first whether CUDA has been set up: a tensor is there.
        if x.get_device() == torch._C._cuda_getDevice():
            return function(x, *args)
        with torch.cuda.device_of(x):
            return function(x, *args)

    return on_device
