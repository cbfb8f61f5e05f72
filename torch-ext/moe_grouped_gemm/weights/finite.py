"""What a quantiser asks of a weight."""

from __future__ import annotations

import itertools

import torch


def check_quantizable(weight: torch.Tensor) -> None:
    if not weight.is_floating_point():
        raise TypeError(f"weight: expected a float dtype, got {weight.dtype}")
    if weight.ndim < 2:
        raise ValueError(f"weight: expected (..., N, K), got {tuple(weight.shape)}")


def raise_if_not_finite(weight: torch.Tensor, are_finite: torch.Tensor) -> None:
    """Names the first number that is none in fp32. are_finite: one answer for all; to ask it is a host sync."""
    # Fake tensors, and what torch.compile traces, have no numbers to look at.
    has_numbers = type(are_finite) is torch.Tensor and not are_finite.is_meta and not torch.compiler.is_compiling()
    if not has_numbers or are_finite:
        return
    for matrix in itertools.product(*map(range, weight.shape[:-2])):
        others = (~weight[matrix].float().isfinite()).nonzero()
        if len(others):
            index = (*matrix, *others[0].tolist())
            raise ValueError(f"weight: expected finite numbers, got {weight[index].item()} at {index}")
