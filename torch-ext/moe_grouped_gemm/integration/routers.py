"""The routers of Transformers, on `topk_router`: those whose forward is one of its forms."""

from __future__ import annotations

import inspect
from typing import Callable

import torch
from torch import nn

from .. import router
from ..torch_ops import are_transforms_active, is_autocast
from .kinds import Kind
from .modules import is_plain
from .router_forms import DTYPES, get, learn, may_be_router, router_of
from .router_inputs import ARGUMENT
from .router_trial import Router

# For `kernelize`: routers of hidden states alone, and those that are given their correction bias with them.
LAYER, LAYER_WITH_BIAS = "MoERouter", "MoERouterWithBias"
# A layer of its own, from before there were others.
OF_DEEPSEEK_V3 = "DeepseekV3TopkRouter"
# The name that Transformers itself gives to some, for whatever kernel there is.
OF_TRANSFORMERS = "SoftmaxTopKRouter"

# There both are plain PyTorch, and the class's own takes fewer calls.
SERVES_CPU = False


def router_forward(module: nn.Module, hidden_states: torch.Tensor, *correction) -> tuple[torch.Tensor, ...]:
    """Forward of a router, as a layer has it: what that of its class returns."""
    return serve(module, type(module).forward, hidden_states, *correction)


def serve(module: nn.Module, stock: Callable, *args, **kwargs) -> tuple[torch.Tensor, ...]:
    """What `module` computes, by us or, on a CPU or where it is none of our forms, by `stock(module, ...)`."""
    hidden_states = args[0] if args else kwargs.get("hidden_states")
    if isinstance(hidden_states, torch.Tensor) and (SERVES_CPU or not hidden_states.is_cpu):
        given = [x for x in (*args, *kwargs.values()) if x is not hidden_states]
        results = _computed(module, hidden_states, given)
        if results is not None:
            return results
    return stock(module, *args, **kwargs)


def _computed(module: nn.Module, hidden_states: torch.Tensor, given: list) -> tuple[torch.Tensor, ...] | None:
    """What the module returns for hidden states, and what else its forward is given; None where we do not know."""
    found = router_of(module, hidden_states.dtype)
    if found is None or hidden_states.ndim not in found.ranks or are_transforms_active():
        return None
    operands = operands_of(module, found, hidden_states, given)
    if operands is None:
        return None
    if is_autocast(hidden_states) and not _is_in_fp32(module, hidden_states.device.type):
        return None
    rows = hidden_states if hidden_states.ndim == 2 else hidden_states.reshape(-1, hidden_states.shape[-1])
    results = router.route_tokens(rows, *operands, found.form)
    return tuple(results[role] for role in found.order)


def operands_of(module: nn.Module, found: Router, hidden_states: torch.Tensor, given: list) -> tuple | None:
    """The module's weight (E, H), correction bias and bias (E,) or None; None where they are not what was tried."""
    weight, bias, correction = (None if path in (None, ARGUMENT) else get(module, path) for path in found[1:4])
    if found.correction == ARGUMENT:
        # As in the trial, and no other.
        (correction,) = given if len(given) == 1 else (None,)
        is_as_tried = isinstance(correction, torch.Tensor) and correction.dtype == torch.float32
        if not is_as_tried or correction.shape != weight.shape[:1]:
            return None
    elif any(x is not None for x in given):
        return None
    operands = [x for x in (hidden_states, weight, bias, correction) if x is not None]
    if not all(map(is_plain, operands)) or hidden_states.shape[-1] != weight.shape[1]:
        return None
    bias, correction = (x if x is None or x.ndim == 1 else x.flatten() for x in (bias, correction))
    return weight, correction, bias


def _is_in_fp32(module: nn.Module, device_type: str) -> bool:
    """Whether its class asks for fp32 logits, which autocast then does not change here."""
    found = router_of(module, torch.get_autocast_dtype(device_type))
    return found is not None and found.form.product_dtype is None


def is_served(module: nn.Module) -> bool:
    """Whether it is one of our forms for hidden states of some dtype."""
    return any(router_of(module, dtype) is not None for dtype in DTYPES)


def _layer_of(cls: type) -> str:
    if cls.__name__ == OF_DEEPSEEK_V3:
        return OF_DEEPSEEK_V3
    return LAYER if len(inspect.signature(cls.forward).parameters) == 2 else LAYER_WITH_BIAS


KIND = Kind(
    "routers",
    (LAYER, LAYER_WITH_BIAS, OF_DEEPSEEK_V3, OF_TRANSFORMERS),
    _layer_of,
    may_be_router,
    serve,
    learn,
    is_served,
)
