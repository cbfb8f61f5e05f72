"""What weights in codes have in common: they get no gradient, and a scale comes with each block."""

from __future__ import annotations

import torch

from ..checks import check_floats, shape
from .projection import Projection, biases_of


def check_frozen(hidden_states, gate_up: Projection, down: Projection, codes, scales) -> None:
    """codes, scales: the dtypes that are allowed."""
    check_floats(hidden_states=hidden_states, **biases_of(gate_up, down))
    for name, projection in {"gate_up_proj": gate_up, "down_proj": down}.items():
        if projection.scale is None:
            raise ValueError(f"{name}_scale: expected a scale for each block, as the other weight has, got None")
        check_codes(name, projection, "hidden_states", hidden_states.device, codes, scales)


def check_codes(name, projection: Projection, like, device, codes, scales) -> None:
    """like: the tensor whose device it has to be on."""
    weight, _, scale, *_ = projection
    if weight.dtype not in codes:
        raise TypeError(f"{name}: expected {_either(codes)}, since {name}_scale is given, got {weight.dtype}")
    if scale.dtype not in scales:
        raise TypeError(f"{name}_scale: expected {_either(scales)}, got {scale.dtype}")
    if torch.is_grad_enabled() and (weight.requires_grad or scale.requires_grad):
        raise ValueError(f"{name}: weights in codes are frozen, expected requires_grad=False for it and its scale")
    for tensor_name, tensor in ((name, weight), (f"{name}_scale", scale)):
        if tensor.device != device:
            raise ValueError(f"{tensor_name}: expected on {device} like {like}, got {tensor.device}")


def check_scale(name, projection: Projection, expected: tuple[int, ...]) -> None:
    if projection.scale.shape != expected:
        raise ValueError(f"{name}_scale: expected {expected} to fit {name}, got {shape(projection.scale)}")


def _either(dtypes) -> str:
    return " or ".join(map(str, dtypes))
