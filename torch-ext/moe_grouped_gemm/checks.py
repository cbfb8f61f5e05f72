"""Checks of arguments: each error names the argument, what was given and what is allowed."""

from __future__ import annotations

import torch

from . import reference
from .weights import Projection, are_fp8, quantize

FLOATS = {
    "cuda": (torch.bfloat16, torch.float16, torch.float32),
    "cpu": (torch.bfloat16, torch.float16, torch.float32, torch.float64),
    "meta": (torch.bfloat16, torch.float16, torch.float32, torch.float64),
}


def device_type(name: str, x: torch.Tensor) -> str:
    kind = x.device.type
    if kind not in FLOATS:
        raise ValueError(f"{name}: expected on cpu or cuda, got {x.device}")
    return kind


def shape(x: torch.Tensor) -> tuple:
    return tuple(x.shape)


def check_floats(**tensors: torch.Tensor) -> None:
    """All tensors share the device and the supported dtype of the first."""
    names = iter(tensors)
    first = next(names)
    x = tensors[first]
    kind = device_type(first, x)
    allowed = FLOATS[kind]
    if x.dtype not in allowed:
        raise TypeError(f"{first}: expected one of {', '.join(map(str, allowed))} on {kind}, got {x.dtype}")
    dtype, device = x.dtype, x.device
    for name in names:
        if tensors[name].dtype != dtype:
            raise TypeError(f"{name}: expected {dtype} like {first}, got {tensors[name].dtype}")
        if tensors[name].device != device:
            raise ValueError(f"{name}: expected on {device} like {first}, got {tensors[name].device}")


def check_index(top_k_index: torch.Tensor) -> None:
    if top_k_index.dtype not in (torch.int32, torch.int64):
        # A float tensor that asks for gradients lands here as well.
        raise TypeError(f"top_k_index: expected int32 or int64, got {top_k_index.dtype}")
    if top_k_index.ndim != 2:
        raise ValueError(f"top_k_index: expected (T, top_k), got {shape(top_k_index)}")


def check_experts(
    hidden_states,
    top_k_index,
    top_k_weights,
    gate_up: Projection,
    down: Projection,
    activation,
    limit=None,
    gated=True,
    block_size=(quantize.BLOCK, quantize.BLOCK),
) -> None:
    biases = {}
    if gate_up.bias is not None:
        biases["gate_up_proj_bias"] = gate_up.bias
    if down.bias is not None:
        biases["down_proj_bias"] = down.bias
    fp8 = are_fp8(gate_up, down)
    if fp8:
        refuse_with_fp8(**biases)
        check_floats(hidden_states=hidden_states)
        _check_fp8(hidden_states, gate_up, down, block_size)
    else:
        check_floats(hidden_states=hidden_states, gate_up_proj=gate_up.weight, down_proj=down.weight, **biases)
    weights = (gate_up.weight, down.weight)
    _check_layer(hidden_states, top_k_index, top_k_weights, *weights, activation, biases, limit, gated)
    if fp8:
        _check_scales(gate_up, down)


def refuse_with_fp8(**given) -> None:
    """Weights in fp8 take none of these."""
    for name, value in given.items():
        if value is not None and value is not False:
            got = shape(value) if isinstance(value, torch.Tensor) else value
            raise ValueError(f"{name}: expected {False if value is True else None} with weights in fp8, got {got}")


def _check_fp8(hidden_states, gate_up, down, block_size) -> None:
    if tuple(block_size) != (quantize.BLOCK, quantize.BLOCK):
        raise ValueError(f"block_size: expected (128, 128), got {tuple(block_size)}")
    for name, (weight, _, scale, *_) in {"gate_up_proj": gate_up, "down_proj": down}.items():
        if scale is None:
            raise ValueError(f"{name}_scale: expected a scale for each block, as the other weight has, got None")
        if weight.dtype != quantize.FP8:
            raise TypeError(f"{name}: expected {quantize.FP8}, since {name}_scale is given, got {weight.dtype}")
        if scale.dtype not in quantize.SCALES:
            raise TypeError(f"{name}_scale: expected {' or '.join(map(str, quantize.SCALES))}, got {scale.dtype}")
        if torch.is_grad_enabled() and (weight.requires_grad or scale.requires_grad):
            raise ValueError(f"{name}: fp8 weights are frozen, expected requires_grad=False for it and its scale")
        for tensor_name, tensor in ((name, weight), (f"{name}_scale", scale)):
            if tensor.device != hidden_states.device:
                raise ValueError(
                    f"{tensor_name}: expected on {hidden_states.device} like hidden_states, got {tensor.device}"
                )


def _check_scales(gate_up, down) -> None:
    experts, rows, hidden_dim = gate_up.weight.shape
    expected = quantize.scale_shape(*gate_up.weight.shape)
    of_halves = (experts, 2 * quantize.scale_shape(rows // 2, hidden_dim)[0], expected[2])
    if gate_up.scale.shape not in (expected, of_halves):
        or_halves = "" if of_halves == expected else f" or, with blocks of gate and up apart, {of_halves}"
        raise ValueError(f"gate_up_proj_scale: expected {expected}{or_halves}, got {shape(gate_up.scale)}")
    expected = quantize.scale_shape(*down.weight.shape)
    if down.scale.shape != expected:
        raise ValueError(f"down_proj_scale: expected {expected} to fit down_proj, got {shape(down.scale)}")


def _check_layer(
    hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, activation, biases, limit, gated
) -> None:
    check_index(top_k_index)
    if hidden_states.ndim != 2:
        raise ValueError(f"hidden_states: expected (T, H), got {shape(hidden_states)}")
    tokens, hidden_dim = hidden_states.shape
    if top_k_index.shape[0] != tokens:
        raise ValueError(f"top_k_index: expected ({tokens}, top_k) to fit hidden_states, got {shape(top_k_index)}")
    if top_k_weights.shape != top_k_index.shape:
        raise ValueError(f"top_k_weights: expected {shape(top_k_index)} like top_k_index, got {shape(top_k_weights)}")
    if not top_k_weights.is_floating_point():
        raise TypeError(f"top_k_weights: expected a float dtype, got {top_k_weights.dtype}")
    halves = 2 if gated else 1
    experts, rows, columns = gate_up_proj.shape if gate_up_proj.ndim == 3 else (0, 0, None)
    if columns != hidden_dim or rows % halves:
        raise ValueError(
            f"gate_up_proj: expected (E, 2I, {hidden_dim}) to fit hidden_states, got {shape(gate_up_proj)}"
        )
    if experts == 0:
        raise ValueError(f"gate_up_proj: expected at least one expert, got {shape(gate_up_proj)}")
    if down_proj.shape != (experts, hidden_dim, rows // halves):
        raise ValueError(
            f"down_proj: expected {(experts, hidden_dim, rows // halves)} to fit gate_up_proj, got {shape(down_proj)}"
        )
    for name, bias in biases.items():
        expected = (experts, rows if name == "gate_up_proj_bias" else hidden_dim)
        if bias.shape != expected:
            raise ValueError(f"{name}: expected {expected} to fit the weights, got {shape(bias)}")
    device = hidden_states.device
    for name, x in (("top_k_index", top_k_index), ("top_k_weights", top_k_weights)):
        if x.device != device:
            raise ValueError(f"{name}: expected on {device} like hidden_states, got {x.device}")
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(reference.ACTIVATIONS)}, got {activation!r}")
    if limit is not None and not limit > 0:
        raise ValueError(f"limit: expected a positive number or None, got {limit}")
