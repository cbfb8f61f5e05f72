"""The routers of Transformers, on `topk_router`: those whose forward is one of its forms."""

from __future__ import annotations

import importlib
import inspect
from typing import Callable

import torch
from torch import nn

from .. import router
from ..torch_ops import are_transforms_active, is_autocast
from . import switching
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

_stock: set[type] = set()  # that a stand-in stands for


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


def others(layer: type) -> dict[str, type]:
    """What else `layer` is to take: the name that Transformers has, unless the user has mapped it."""
    return {OF_TRANSFORMERS: layer} if is_free(OF_TRANSFORMERS) else {}


def is_free(layer_name: str, transformers_own: dict | None = None) -> bool:
    """Whether no user has mapped a layer of this name: nobody has, or we have, or Transformers with its own mapping."""
    try:
        mapped = importlib.import_module("kernels.layer.kernelize")._KERNEL_MAPPING.get().get(layer_name, {})
        devices = [of_device for device, of_device in mapped.items() if device in ("cuda", "cpu")]
        repositories = [repo for of_device in devices for repo in _repositories(of_device)]
    except (ImportError, AttributeError):  # a `kernels` to come: what is mapped there nobody can tell
        return False
    own = {id(repo) for modes in (transformers_own or {}).get(layer_name, {}).values() for repo in modes.values()}
    return all(id(repo) in own or hasattr(repo, "is_of_moe_grouped_gemm") for repo in repositories)


def _repositories(of_device: object) -> list:
    """All that `kernels` keeps for a device: by mode, and on a GPU by ranges of its capability, in a tree."""
    kept = vars(of_device).values()
    nodes = [x.root for x in kept if hasattr(x, "root")]
    by_mode = [x for x in kept if isinstance(x, dict)]
    while nodes:
        node = nodes.pop()
        if node is not None:
            by_mode.append(node.data)
            nodes += [node.left, node.right]
    return [repo for modes in by_mode for repo in modes.values()]


def meet(modeling: str) -> None:
    """Let `kernelize` switch on the routers of a modeling file that has been imported."""
    for cls in _classes(modeling):
        make_switchable(cls)


def _classes(modeling: str) -> list[type]:
    """Not by name: a stand-in may have it."""
    return [cls for cls in nn.Module.__subclasses__() if cls.__module__ == modeling and may_be_router(cls)]


def make_switchable(cls: type, layer_name: str | None = None) -> type:
    """Let `kernelize` switch modules of `cls` on, as layers of this name; by default the class's own, if it has one."""
    own_name = getattr(cls, "kernel_layer_name", None)
    if own_name not in (None, LAYER, LAYER_WITH_BIAS, OF_DEEPSEEK_V3, OF_TRANSFORMERS):
        return cls  # another kernel's
    switching.make_switchable(cls, serve, learn)
    if layer_name is None and own_name is None:
        takes_one = len(inspect.signature(cls.forward).parameters) == 2
        by_form = LAYER if takes_one else LAYER_WITH_BIAS
        layer_name = OF_DEEPSEEK_V3 if cls.__name__ == OF_DEEPSEEK_V3 else by_form
    if layer_name is not None:  # under Transformers' name, whatever kernel takes it is asked as before
        switching.name_for_kernelize(cls, layer_name, _may_switch_on)
    return cls


def _may_switch_on(module: nn.Module) -> bool:
    return switching.is_switchable(module) and is_served(module)


def is_one(module: nn.Module) -> bool:
    return switching.is_switchable(module) and may_be_router(type(module))


def is_served(module: nn.Module) -> bool:
    """Whether it is one of our forms for hidden states of some dtype."""
    return any(router_of(module, dtype) is not None for dtype in DTYPES)


def stock_router_class(layer_name: str, config) -> type:
    """The router of the model that `config` belongs to, ready for `kernelize` as a layer of this name."""
    for config_class in type(config).__mro__:
        classes = _classes(config_class.__module__.replace("configuration_", "modeling_"))
        if len(classes) == 1:
            _stock.update(classes)
            return make_switchable(classes[0], layer_name)
    raise TypeError(f"{type(config).__name__} is not the config of a Transformers model with one class of routers")


def is_stock_router(module: object) -> bool:
    """Whether the module is what some `stock_router_class` makes."""
    return isinstance(module, tuple(_stock))
