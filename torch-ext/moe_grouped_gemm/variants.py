"""The experts modules of Transformers: what each computes, and how we compute it.

Modules that carry `@use_experts_implementation` differ in `has_gate`, `has_bias`, `is_transposed`,
`has_post_expert_norm` and in `_apply_gate`, their own function (S, 2I) -> (S, I) between the GEMMs. If that is one of
our gates, the whole layer is `moe_experts`; any other function runs as it is between our grouped GEMMs.
"""

from __future__ import annotations

import inspect
import itertools
from types import SimpleNamespace
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from . import functional, lora, reference
from .reference import Gate

# What Transformers' experts have as `act_fn` -> our names.
_ACTIVATIONS = {
    "torch.nn.functional.silu": "silu",
    "transformers.activations.SiLUActivation": "silu",
    "torch.nn.modules.activation.SiLU": "silu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_pytorch_tanh",
    "torch.nn.modules.activation.ReLU": "relu",
}


class GateKind(NamedTuple):
    """How a class's `_apply_gate` makes a Gate of its modules' attributes."""

    activation: str | None  # None: that of `act_fn`
    limit: str | None  # name of the attribute, as is alpha
    alpha: str | None
    interleaved: bool


# Of each `_apply_gate` that was met, None if it is none of our gates. Filled ahead of any forward: torch.compile could
# not trace the trial.
_KINDS: dict[Callable, GateKind | None] = {}


def learn_gate(apply_gate: Callable) -> None:
    """Find out by trial which of our gates the `_apply_gate` of an experts class is, under which names of attributes.

    On 4 x 16 numbers, with a different value for each attribute that may matter.
    """
    if apply_gate in _KINDS:
        return
    values = {"limit": 1.5, "swiglu_limit": 1.25, "alpha": 1.3, "swiglu_alpha": 1.9}
    limits, alphas = (None, "limit", "swiglu_limit"), ("alpha", "swiglu_alpha")
    activations = [(None, None), *((name, None) for name in ("silu", "relu")), *(("swigluoai", a) for a in alphas)]
    kind = None
    # Transformers may be building a model around us, on "meta".
    with torch.device("cpu"), torch.no_grad():
        z = 3 * torch.sin(torch.arange(64, dtype=torch.float64)).view(4, 16)
        try:
            a = apply_gate(SimpleNamespace(act_fn=F.gelu, **values), z)
        except Exception:  # it reads an attribute that we do not know
            a = z
        for (activation, alpha), limit, interleaved in itertools.product(activations, limits, (False, True)):
            gate = Gate(activation or "gelu", values.get(limit), values.get(alpha, 0.0), interleaved)
            expected = reference.apply_gate(z, gate)
            # Some gates compute in fp32.
            if a.shape == expected.shape and torch.allclose(a.double(), expected, rtol=1e-6, atol=1e-6):
                kind = GateKind(activation, limit, alpha, interleaved)
    _KINDS[apply_gate] = kind


def fused_gate(module: nn.Module) -> Gate | None:
    """The gate with which `moe_experts` computes what `module` defines; None if it cannot."""
    if not getattr(module, "has_gate", True) or getattr(module, "has_post_expert_norm", False):
        return None
    kind = _KINDS.get(type(module)._apply_gate)
    if kind is None:
        return None
    act = activation(module) if kind.activation is None else kind.activation
    limit = None if kind.limit is None else getattr(module, kind.limit)
    if act is None or (kind.limit is not None and not (limit and limit > 0)):
        return None
    alpha = Gate().alpha if kind.alpha is None else getattr(module, kind.alpha)
    return Gate(act, limit if limit is None else float(limit), float(alpha), kind.interleaved)


def activation(module: nn.Module) -> str | None:
    """Our name of `act_fn`, if there is one."""
    act = getattr(module, "act_fn", None)
    if not inspect.isfunction(act):
        act = type(act)
    return _ACTIVATIONS.get(f"{act.__module__}.{act.__qualname__}")


def weight_names(module: nn.Module) -> tuple[str, str]:
    return ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"), "down_proj"


def can_serve(module: nn.Module) -> bool:
    """Whether the module is an experts module as Transformers' own implementations expect one."""
    weights = [getattr(module, name, None) for name in weight_names(module)]
    return hasattr(type(module), "_apply_gate") and all(getattr(w, "ndim", None) == 3 for w in weights)


def experts(
    module: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    adapters: tuple[tuple[str, lora.LoraFactors], ...],
) -> torch.Tensor:
    """What `module` computes, its weights dense: (T, H) -> (T, H), in the dtype of the weights.

    adapters: (name of a weight, factors of an adapter of it in the weight's own layout).
    """
    names = weight_names(module)
    weights = [getattr(module, name) for name in names]
    biases = [None, None]
    if getattr(module, "has_bias", False):
        biases = [getattr(module, f"{name}_bias").to(weight.dtype) for name, weight in zip(names, weights)]
    factors = [tuple(f for name, f in adapters if name == weight) for weight in names]
    if getattr(module, "is_transposed", False):
        weights = [weight.mT for weight in weights]
        factors = [tuple(lora.LoraFactors(f.B.mT, f.A.mT, f.scaling) for f in fs) for fs in factors]
    inputs = (hidden_states.to(weights[0].dtype), top_k_index, top_k_weights, *weights)
    gate = fused_gate(module)
    if gate is not None and not adapters:
        activation, limit, alpha, interleaved = gate
        return functional.moe_experts(*inputs, activation, *biases, limit=limit, alpha=alpha, interleaved=interleaved)
    gated = getattr(module, "has_gate", True)
    if gate is None:
        gate = module._apply_gate if gated else module.act_fn
    norm = module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None
    return lora.moe_experts_lora(*inputs, *factors, gate, *biases, norm, gated)
