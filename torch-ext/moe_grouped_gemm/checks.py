"""Checks of tensors: each error names the argument, what was given and what is allowed."""

from __future__ import annotations

import torch

FLOATS = {
    "cuda": (torch.bfloat16, torch.float16, torch.float32),
    "cpu": (torch.bfloat16, torch.float16, torch.float32, torch.float64),
    "meta": (torch.bfloat16, torch.float16, torch.float32, torch.float64),
}


def device_type(name: str, x: torch.Tensor) -> str:
    kind = "cuda" if x.is_cuda else x.device.type  # whose name is made anew at every call
    if kind not in FLOATS:
        raise ValueError(f"{name}: expected on cpu or cuda, got {x.device}")
    return kind


def shape(x: torch.Tensor) -> tuple:
    return tuple(x.shape)


def check_floats(**tensors: torch.Tensor) -> None:
    """All tensors share the device and the supported dtype of the first."""
    (first, x), *others = tensors.items()
    kind = device_type(first, x)
    allowed = FLOATS[kind]
    dtype, device = x.dtype, x.device
    if dtype not in allowed:
        raise TypeError(f"{first}: expected one of {', '.join(map(str, allowed))} on {kind}, got {dtype}")
    for name, x in others:
        if x.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype} like {first}, got {x.dtype}")
        if x.device != device:
            raise ValueError(f"{name}: expected on {device} like {first}, got {x.device}")


def check_index(top_k_index: torch.Tensor) -> None:
    if top_k_index.dtype not in (torch.int32, torch.int64):
        # A float tensor that asks for gradients lands here as well.
        raise TypeError(f"top_k_index: expected int32 or int64, got {top_k_index.dtype}")
    if top_k_index.ndim != 2:
        raise ValueError(f"top_k_index: expected (T, top_k), got {shape(top_k_index)}")
