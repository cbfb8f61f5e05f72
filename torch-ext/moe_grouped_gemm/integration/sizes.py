"""The sizes of a model's experts layers, for the tuner."""

from __future__ import annotations

from torch import nn

from ..weights import are_quantized
from . import modules

# Under one of these a config says how many experts a token takes.
_TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_topk")


def layers_of(model: nn.Module) -> list[tuple]:
    """(E, H, I, top_k, dtype) of each kind of experts layer that runs on the GEMMs for dense weights.

    Raises:
        ValueError: there is none, or a config that does not say top_k.
    """
    found = {}
    for name, module in model.named_modules():
        if not modules.is_experts(module) or modules.is_empty(module) or modules.peek(module) is not None:
            continue
        gate_up, down, *_ = modules.read(module, modules.unparametrized)
        if are_quantized(gate_up, down):
            continue
        experts, hidden_dim, inter = down.shape
        top_k = next((getattr(module.config, field) for field in _TOP_K if hasattr(module.config, field)), None)
        if top_k is None:
            raise ValueError(f"{name}: its config does not say top_k; give (E, H, I, top_k) in place of the model")
        found[(experts, hidden_dim, inter, top_k, down.weight.dtype)] = None
    if not found:
        raise ValueError(f"{type(model).__name__} has no experts layer with dense weights: nothing to tune")
    return list(found)
