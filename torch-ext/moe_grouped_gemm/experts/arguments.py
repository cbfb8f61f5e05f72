"""The layer's arguments: each error names the argument, what was given and what is allowed."""

from __future__ import annotations

from .. import reference
from ..checks import check_index, shape
from ..weights import Projection, biases_of, format_of_both


def check_experts(
    hidden_states,
    top_k_index,
    top_k_weights,
    gate_up: Projection,
    down: Projection,
    activation,
    limit=None,
    gated=True,
    block_size=None,
) -> None:
    """block_size: of scales, if the caller says so; else what their format has."""
    weights = format_of_both(gate_up, down)
    weights.check(hidden_states, gate_up, down, block_size)
    _check_layer(hidden_states, top_k_index, top_k_weights, gate_up, down, activation, limit, gated)
    weights.check_scales(gate_up, down, gated)


def _check_layer(hidden_states, top_k_index, top_k_weights, gate_up, down, activation, limit, gated) -> None:
    check_index(top_k_index)
    if hidden_states.ndim != 2:
        raise ValueError(f"hidden_states: expected (T, H), got {shape(hidden_states)}")
    (tokens, hidden_dim), index_shape = hidden_states.shape, top_k_index.shape
    if index_shape[0] != tokens:
        raise ValueError(f"top_k_index: expected ({tokens}, top_k) to fit hidden_states, got {shape(top_k_index)}")
    if top_k_weights.shape != index_shape:
        raise ValueError(f"top_k_weights: expected {shape(top_k_index)} like top_k_index, got {shape(top_k_weights)}")
    if not top_k_weights.is_floating_point():
        raise TypeError(f"top_k_weights: expected a float dtype, got {top_k_weights.dtype}")
    halves = 2 if gated else 1
    experts, rows, columns = gate_up.shape if gate_up.weight.ndim == 3 else (0, 0, None)
    if columns != hidden_dim or rows % halves:
        raise ValueError(f"gate_up_proj: expected (E, 2I, {hidden_dim}) to fit hidden_states, got {given(gate_up)}")
    if experts == 0:
        raise ValueError(f"gate_up_proj: expected at least one expert, got {given(gate_up)}")
    expected = (experts, hidden_dim, rows // halves)
    if down.weight.ndim != 3 or down.shape != expected:
        raise ValueError(f"down_proj: expected {expected} to fit gate_up_proj, got {given(down)}")
    for name, bias in biases_of(gate_up, down).items():
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


def given(projection: Projection) -> str:
    """The shape of a weight for an error."""
    weight = projection.weight
    is_packed = weight.ndim == 3 and projection.shape != tuple(weight.shape)
    return f"{projection.shape} in bytes {shape(weight)} of two" if is_packed else shape(weight)
