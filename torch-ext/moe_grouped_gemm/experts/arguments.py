"""The layer's arguments: each error names the argument, what was given and what is allowed."""

from __future__ import annotations

from .. import reference
from ..checks import check_index, shape
from ..weights import Projection, format_of_both


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
    biases = {}
    if gate_up.bias is not None:
        biases["gate_up_proj_bias"] = gate_up.bias
    if down.bias is not None:
        biases["down_proj_bias"] = down.bias
    _check_layer(
        hidden_states, top_k_index, top_k_weights, gate_up.weight, down.weight, activation, biases, limit, gated
    )
    weights.check_scales(gate_up, down, gated)


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
