"""When a module is served by this kernel, and how it is given back.

`kernelize` puts a forward on a module by assigning it. A bound method would compute with that one module's weights
wherever a copy of the module's attributes goes (a replica of nn.DataParallel, a pickle), and would throw away a wrapper
that sits there already (accelerate's offload hook, expert or tensor parallelism). So a class that we serve takes the
assignment of one of our layers' forwards as a mark on the module, plain data, and its own forward, below all wrappers,
goes by the mark. Nothing else is touched: no config, which models may share, and no other module.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Iterable, Iterator
from types import MethodType
from typing import Callable

from torch import nn

# On a module: the build of this kernel that serves it; "" if it was told to stay off.
_MARK = "_moe_grouped_gemm"
# On a function: the build whose layer's forward it is; the function itself, and the builds that take part in it.
_BUILD, _BUILDS = "_moe_grouped_gemm_build", "_moe_grouped_gemm_builds"
# On a module: the forward of another library's layer that `kernelize` bound to it.
_BOUND = "_moe_grouped_gemm_bound"
_OWN = __name__.partition(".")[0]

_OFF = ""


def switches_on(forward: Callable) -> Callable:
    """Decorates the forward of one of our layers: assigned to a module that we can serve, it marks the module."""
    setattr(forward, _BUILD, _OWN)
    return forward


class Layer(nn.Module):
    """What our layers say of themselves to kernels."""

    can_torch_compile = True
    has_backward = True


def make_switchable(
    cls: type, serve: Callable, learn: Callable | None = None, learn_built: Callable | None = None
) -> None:
    """From now on modules of `cls` can be switched on.

    Args:
        serve: (module, stock forward, *inputs) -> output, for a module that is switched on.
        learn: called with a module as it is switched on, ahead of any forward that torch.compile may trace.
        learn_built: called with a module as it is built, for what is served without being switched on.
    """
    if not is_own(cls.forward):
        setattr(cls, _MARK, _OFF)  # of modules without one: as cheap to read, and plain to torch.compile
        cls.forward = _forward(cls.forward, serve)
        # These two stay where they are if somebody decorates the class anew.
        if not any(map(is_own, _unwrapped(cls.__setattr__))):
            cls.__setattr__ = _setattr(cls.__setattr__, learn)
        if learn_built is not None and not any(map(is_own, _unwrapped(cls.__init__))):
            cls.__init__ = _init(cls.__init__, learn_built)


def is_switchable(module: nn.Module) -> bool:
    """Whether its class's forward is still ours: no subclass's own, nor somebody else's patch."""
    return is_own(type(module).forward)


def is_switched_on(module: nn.Module) -> bool:
    """Whether this build serves the module, wherever its own forward is reached."""
    if not is_switchable(module):
        return False
    forward = type(module).forward
    mark = getattr(module, _MARK)
    # A mark of no build that is here counts for the one registered last.
    return mark == _OWN or (_serves(module, _builds(forward)) and not is_own(forward.__wrapped__))


def switch_on(module: nn.Module) -> None:
    """As `kernelize` does, unless the module has been switched off for good, or is another build's."""
    if is_switchable(module):
        module.__dict__.setdefault(_MARK, _OWN)


def switch_off(module: nn.Module, for_good: bool) -> None:
    """Give the module back to what it ran on before; for good: a `kernelize` does not switch it on again."""
    if module.__dict__.pop(_MARK, None) is not None and for_good:
        module.__dict__[_MARK] = _OFF


def is_unwrapped(module: nn.Module) -> bool:
    """Whether `module(...)` reaches the forward of its class; accelerate's hook, which does, counts as no wrapper."""
    forward = getattr(module, "_old_forward", module.forward)
    return isinstance(forward, MethodType) and forward.__func__ is type(module).forward


def _builds(function: Callable) -> frozenset:
    """The builds that take part in a function of somebody else's class that we replaced; none, if it is not ours."""
    owner, builds = getattr(function, _BUILDS, (None, frozenset()))
    return builds if owner is function else frozenset()  # functools.wraps copies attributes


def foreign_forward(module: nn.Module) -> Callable | None:
    """Another library's forward in the place of ours, on the class or bound to the module. Wrappers are none."""
    own, bound = type(module).forward, module.__dict__.get("forward")
    if not is_ours(own):
        return own
    return bound.__func__ if isinstance(bound, MethodType) and bound.__func__ is not own else None


def is_ours(function: Callable) -> bool:
    """Whether some build of this kernel put the function where it is."""
    return bool(_builds(function))


def is_own(function: Callable) -> bool:
    """Whether this build takes part in it."""
    return _OWN in _builds(function)


def below_ours(function: Callable) -> Callable:
    """What was there before any build of this kernel."""
    while is_ours(function):
        function = function.__wrapped__
    return function


def _unwrapped(function: Callable) -> Iterator[Callable]:
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def sign(function: Callable, replaced: Callable) -> None:
    """Note that this build put `function` in the place of `replaced`."""
    setattr(function, _BUILDS, (function, _builds(replaced) | {_OWN}))


def _serves(module: nn.Module, others: frozenset) -> bool:
    """Whether the mark is ours: this build's, or of none that is here, in a module from another process."""
    mark = getattr(module, _MARK)
    return bool(mark) and mark not in others


def _forward(stock: Callable, serve: Callable) -> Callable:
    others = _builds(stock)

    @functools.wraps(stock)
    def forward(self, *args, **kwargs):
        if _serves(self, others):
            return serve(self, stock, *args, **kwargs)
        return stock(self, *args, **kwargs)

    sign(forward, stock)
    return forward


def _unbind(module: nn.Module) -> None:
    """Take off another layer that `kernelize` bound to the module, and nothing that somebody else put there."""
    layer, forward = module.__dict__.pop(_BOUND, None), module.__dict__.get("forward")
    if layer is not None and isinstance(forward, MethodType) and forward.__func__ is layer:
        del module.__dict__["forward"]


def _setattr(inherited: Callable, learn: Callable | None) -> Callable:
    @functools.wraps(inherited)
    def __setattr__(self, name, value):
        if name == "forward" and isinstance(value, MethodType) and value.__self__ is self:
            build = getattr(value.__func__, _BUILD, None)
            by_kernelize = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] == "kernels"
            if build is not None:
                _unbind(self)
                self.__dict__.setdefault(_MARK, build)
                if learn is not None:
                    learn(self)
                return
            if value.__func__ is type(self).forward:
                if by_kernelize:  # no layer is mapped for this mode: wrappers and the mark stay
                    _unbind(self)
                else:  # somebody takes a wrapper off
                    self.__dict__.pop("forward", None)
                return
            if by_kernelize:
                self.__dict__[_BOUND] = value.__func__
        inherited(self, name, value)

    sign(__setattr__, inherited)
    return __setattr__


def _init(inherited: Callable, learn: Callable) -> Callable:
    @functools.wraps(inherited)
    def __init__(self, *args, **kwargs):
        inherited(self, *args, **kwargs)
        learn(self)

    sign(__init__, inherited)
    return __init__


def name_for_kernelize(cls: type, layer_name: str, condition: Callable) -> None:
    """From now on `kernelize` takes modules of `cls` for such layers, if `condition(module)`."""
    from kernels import replace_kernel_forward_from_hub

    if "condition" in inspect.signature(replace_kernel_forward_from_hub).parameters:
        replace_kernel_forward_from_hub(cls, layer_name, condition)
        return
    # kernels 0.16, which Transformers 5.17 wants: what later ones do with a condition is added to it.
    replace_kernel_forward_from_hub(cls, layer_name)
    cls.kernel_condition = staticmethod(condition)
    _teach_conditions()


@functools.cache
def _teach_conditions() -> None:
    kernelize = importlib.import_module("kernels.layer.kernelize")
    kernelize_layer = kernelize.kernelize_layer

    @functools.wraps(kernelize_layer)
    def kernelize_layer_on_condition(module, **options):
        condition = getattr(type(module), "kernel_condition", None)
        if condition is None or condition(module):
            kernelize_layer(module, **options)

    kernelize.kernelize_layer = kernelize_layer_on_condition


# --- models -----------------------------------------------------------------------------------------------------------


def let_models_switch_off(is_experts: Callable, learn: Callable, check_choice: Callable) -> None:
    """Transformers' own switches reach our marks: `set_use_kernels(False)`, and the choice of an implementation.

    `check_choice(module, name)` raises if that implementation cannot compute this experts module.
    """
    from transformers import PreTrainedModel

    if is_own(PreTrainedModel.set_use_kernels):
        return
    set_use_kernels, set_implementation = PreTrainedModel.set_use_kernels, PreTrainedModel.set_experts_implementation
    use_kernels = PreTrainedModel.use_kernels

    @functools.wraps(set_use_kernels)
    def set_and_switch(self, use_kernels, *args, **kwargs):
        if not use_kernels:
            for module in self.modules():
                switch_off(module, for_good=False)
        return set_use_kernels(self, use_kernels, *args, **kwargs)

    @functools.wraps(set_implementation)
    def set_implementation_and_switch(self, experts_implementation):
        # `generate` changes grouped_mm for batched_mm while it decodes, and back: that is no choice of the user's.
        if sys._getframe(1).f_globals.get("__name__", "").startswith("transformers.generation"):
            set_implementation(self, experts_implementation)
            return
        chosen = dict(_chosen(filter(is_experts, self.modules()), self.config, experts_implementation))
        for module, name in chosen.items():
            check_choice(module, name)
        set_implementation(self, experts_implementation)
        for module in chosen:
            switch_off(module, for_good=True)
            learn(module)

    def assign_use_kernels(self, value):
        if not value:
            set_and_switch(self, False)
        use_kernels.__set__(self, value)

    sign(set_and_switch, set_use_kernels)
    PreTrainedModel.set_use_kernels = set_and_switch
    PreTrainedModel.set_experts_implementation = set_implementation_and_switch
    PreTrainedModel.use_kernels = property(use_kernels.__get__, assign_use_kernels, doc=use_kernels.__doc__)


def _chosen(experts: Iterable[nn.Module], whole: object, implementation: str | dict | None) -> Iterator[tuple]:
    """The experts modules that are given an implementation, and which: a dict has one for the config of each part."""
    for module in experts:
        if not isinstance(implementation, dict):
            yield module, implementation
            continue
        for key, name in implementation.items():
            if module.config is (getattr(whole, key, None) if key else whole):
                yield module, name
