"""The experts classes of Transformers: which there are, and what a KernelConfig's stand-in stands for."""

from __future__ import annotations

import functools
import importlib.util
import sys

from torch import nn

from . import blocks, modules, routers, switching
from .gates import gate_of
from .peft import meet_peft

# For `kernelize`; given a KernelConfig, Transformers takes the name of the layer's class.
EXPERTS_LAYER = "MoEExperts"
FP8_EXPERTS_LAYER = "FP8Experts"

_is_registered = False
_met: set[str] = set()  # modeling files


def register() -> None:
    """From now on meet the routers and blocks of every modeling file that has experts."""
    global _is_registered
    _is_registered = True


def meet(modeling: str) -> None:
    """Let `kernelize` switch on the routers and blocks of a modeling file that has been imported."""
    if _is_registered and modeling not in _met:
        _met.add(modeling)
        routers.KIND.meet(modeling)
        blocks.KIND.meet(modeling)


def learn(module: nn.Module) -> None:
    """Find out about the module's gate before torch.compile asks, if it has one; and meet what is beside it."""
    meet(type(module).__module__)
    if getattr(module, "has_gate", True):
        gate_of(module)


def make_switchable(cls: type) -> type:
    """Let `kernelize` switch modules of `cls` on, if its forward is the one of Transformers' decorator."""
    if "_apply_gate" in vars(cls):
        is_fp8 = cls.__module__.startswith("transformers.integrations.")
        if not _let_switch(cls) and not is_fp8:  # which is decorated as a model is quantised
            return cls
        name = FP8_EXPERTS_LAYER if is_fp8 else EXPERTS_LAYER
        switching.name_for_kernelize(cls, name, functools.partial(_may_switch_on, cls))
    return cls


def _let_switch(cls: type) -> bool:
    """By whoever knows its modules, but not by `kernelize`; whether its forward is the one of that decorator."""
    is_dispatch = modules.is_dispatch(cls.forward)
    if is_dispatch:
        switching.make_switchable(cls, modules.serve, learn, learn)
    return is_dispatch


def _may_switch_on(cls: type, module: nn.Module) -> bool:
    """Not where a subclass, or somebody else's patch, has put another forward in the place of ours."""
    make_switchable(cls)  # somebody may have decorated it anew, as Transformers does with FP8's for each module
    return switching.is_switchable(module)


def stock_experts_class(config) -> type:
    """The experts class of the model that `config` belongs to, ready for `kernelize`."""
    register_interface()
    meet_peft()
    for config_class in type(config).__mro__:
        classes = _experts_classes(config_class.__module__.replace("configuration_", "modeling_"))
        if len(classes) == 1:
            return make_switchable(classes[0])
    raise TypeError(f"{type(config).__name__} is not the config of a Transformers model with one experts class")


def stock_block_class(layer_name: str, config) -> type:
    """The same for its blocks, which switch on router and experts: those need no entry of their own."""
    register_interface()
    meet_peft()
    cls = blocks.KIND.stock_class(layer_name, config)
    for experts in _experts_classes(cls.__module__):
        _let_switch(experts)
    routers.KIND.let_switch(cls.__module__)
    return cls


def is_stock_experts(module: object) -> bool:
    """Whether the module is what some `stock_experts_class` makes."""
    return getattr(type(module), "kernel_layer_name", None) == EXPERTS_LAYER


def let_models_switch_off() -> None:
    switching.let_models_switch_off(modules.is_experts, learn, modules.check_choice)


def register_interface() -> None:
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    # FP8 models accept every name of the first interface, then look it up in the second.
    for interface in (ALL_EXPERTS_FUNCTIONS, ALL_FP8_EXPERTS_FUNCTIONS):
        interface.register(modules.EXPERTS_IMPLEMENTATION, modules.experts_forward)


def _experts_classes(modeling: str) -> list[type]:
    """The classes of a modeling file that carry Transformers' decorator; their names may point at stand-ins."""

    def decorated():
        return [cls for cls in nn.Module.__subclasses__() if cls.__module__ == modeling and "_apply_gate" in vars(cls)]

    names = vars(sys.modules[modeling]).values() if modeling in sys.modules else ()
    if not decorated() and any(hasattr(value, "stock_class") for value in names if isinstance(value, type)):
        # A load that failed while its model was built left the stand-in in place, and nothing else held the class.
        spec = importlib.util.find_spec(modeling)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return decorated()
