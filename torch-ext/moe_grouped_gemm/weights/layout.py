"""How tensors lie in memory, and which kernels can read that."""

from __future__ import annotations

import torch

from ..launch_configs import GemmConfig


def is_transposed(weight: torch.Tensor) -> bool:
    """Whether (E, N, K) is a view of (E, K, N), as experts with `is_transposed` have it."""
    return weight.stride(1) == 1 and weight.stride(2) != 1


def by_rows(x: torch.Tensor) -> torch.Tensor:
    """Activations are read row by row."""
    return x if x.stride(-1) == 1 else x.contiguous()


def contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return x if x is None else x.contiguous()


def as_readable(config: GemmConfig, *tensors: torch.Tensor) -> GemmConfig:
    """Without what the tensors rule out; plain loads take anything."""
    if config.USE_TMA:
        for x in tensors:
            if not tma_can_read(x):
                return config._replace(USE_TMA=False, WARP_SPECIALIZED=False)
    return config


def tma_can_read(x: torch.Tensor) -> bool:
    """TMA wants 16-byte aligned bases and strides and, in one order of the last two dimensions, a last stride of 1."""
    *strides, last = x.stride()
    if x.ndim == 3 and last != 1:
        strides[1], last = last, strides[1]
    if last != 1 or x.data_ptr() % 16 != 0:
        return False
    size = x.element_size()
    for stride in strides:
        if stride <= 0 or stride * size % 16 != 0:
            return False
    return True
