"""Which gate an experts module computes between its GEMMs, found out by trial.

An experts module has `_apply_gate`, its own function (S, 2I) -> (S, I). It is run on a grid of magnitudes, infinities
and NaN, with the module's real attributes, and compared with each of our gates. What it reads of the module is
remembered: the answer holds for every module with the same function and the same values, and for no other.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from contextlib import contextmanager
from types import MethodType
from typing import Callable

import torch
from torch import nn

from ..reference import Gate, apply_gate

# What Transformers' experts have as `act_fn` -> our names.
_ACTIVATIONS = {
    "torch.nn.functional.silu": "silu",
    "transformers.activations.SiLUActivation": "silu",
    "torch.nn.modules.activation.SiLU": "silu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_pytorch_tanh",
    "torch.nn.modules.activation.ReLU": "relu",
}
MISSING, OPAQUE = "<missing>", "<opaque>"
_LIBRARIES = {"torch", "transformers", "math", "builtins", "contextlib"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# Of each `_apply_gate` that was tried: what it read, and which gate it then was; None if none of ours. Of the newest
# trials alone, as an attribute may be new in every step; more than a model has layers, each of which may have its own.
_MOST_TRIALS = 256
_TRIED: dict[Callable, list[tuple[dict[str, object], Gate | None]]] = {}


def gate_of(module: nn.Module) -> Gate | None:
    """The gate of ours that `module._apply_gate` computes; None if it is none, or if that is not sure.

    While torch.compile traces, which could not see through a trial, only what was found out before counts: as a module
    is built, switched on, or first called.
    """
    function = _function(module)
    if function is None:
        return None
    for reads, gate in _TRIED.get(function, ()):
        if all(plain(getattr(module, name, MISSING)) == value for name, value in reads.items()):
            return gate
    if torch.compiler.is_compiling():
        return None
    reads, gate = _try(function, module)
    tried = _TRIED.setdefault(function, [])
    tried.append((reads, gate))
    del tried[:-_MOST_TRIALS]
    return gate


def activation_name(act: object) -> str | None:
    """Our name of an activation; None if there is none, or if somebody hooked the module or replaced its forward."""
    if isinstance(act, nn.Module) and not is_as_its_class(act):
        return None
    kind = act if inspect.isfunction(act) else type(act)
    return _ACTIVATIONS.get(f"{kind.__module__}.{kind.__qualname__}")


def is_as_its_class(module: nn.Module, is_idle: Callable | None = None) -> bool:
    """Whether nobody hooked the module, but with hooks that are idle, or replaced its forward."""
    for hooks in (getattr(module, name) for name in _HOOKS):
        if hooks and not (is_idle is not None and all(map(is_idle, hooks.values()))):
            return False
    return _has_own_forward(module)


def _has_own_forward(act: nn.Module) -> bool:
    """Its class's, also in its place the same function of a kernel's layer: `kernelize` puts either on the instance."""
    if not isinstance(act.forward, MethodType):
        return False
    function = act.forward.__func__
    if function is type(act).forward:
        return True
    owner = getattr(sys.modules.get(function.__module__), function.__qualname__.partition(".")[0], None)
    return hasattr(type(act), "kernel_layer_name") and isinstance(owner, type) and owner.forward is function


def _function(module: nn.Module) -> Callable | None:
    """The `_apply_gate` of the module's class; None if one was put on the instance, of which nothing is known."""
    return None if "_apply_gate" in module.__dict__ else type(module)._apply_gate


def is_closed(function: Callable, *callers: Callable) -> bool:
    """Whether it depends on nothing but its arguments, libraries, and functions of which the same holds."""
    if not inspect.isfunction(function) or {"vars", "__dict__", "globals"} & set(function.__code__.co_names):
        return False
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    named = [function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__]
    return all(_is_known(value, function, *callers) for value in (*cells, *named))


def _is_known(value: object, *callers: Callable) -> bool:
    """Whether it will be tomorrow what it is today: what a class or a module of the user's holds may not."""
    name = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None)
    if (inspect.ismodule(value) or callable(value)) and (name or "builtins").partition(".")[0] in _LIBRARIES:
        return True
    if inspect.isclass(value) and issubclass(value, nn.Module):
        return True  # the `__class__` of a `super()`
    return value in callers or is_closed(value, *callers)


def plain(value: object) -> object:
    """What a read of this value is remembered as."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return activation_name(value) or OPAQUE


class Recorder:
    """Takes the module's place in its own `_apply_gate`, and remembers what that reads."""

    def __init__(self, module: nn.Module):
        self.__dict__.update(_module=module, reads={})

    def __setattr__(self, name: str, value: object):
        raise TypeError(f"{name} is written: more than a function")

    def __getattr__(self, name: str):
        value = getattr(self._module, name, MISSING)
        if isinstance(value, MethodType) and value.__self__ is self._module:
            if not is_closed(value.__func__):
                self.reads[name] = OPAQUE
            return MethodType(value.__func__, self)  # a helper of the class
        self.reads[name] = plain(value)
        if value is MISSING:
            raise AttributeError(name)
        if isinstance(value, nn.Module) and self.reads[name] is not OPAQUE:
            return MethodType(type(value).forward, value)  # a kernel in its place may run on a GPU alone
        return value


def _try(function: Callable, module: nn.Module) -> tuple[dict[str, object], Gate | None]:
    """What `function` reads of the module, and the gate that it is; with an opaque read it is none of ours."""
    recorder = Recorder(module)
    if not is_closed(function):
        return recorder.reads, None
    with undisturbed():
        try:
            inputs = [grid(interleaved) for interleaved in (False, True)]
            # Twice: dropout differs.
            results = [[function(recorder, z.clone()) for z in inputs] for _ in range(2)]
            moderates = [(moderate(z), dtype) for z in inputs for dtype in (torch.bfloat16, torch.float16)]
            in_16_bits = [function(recorder, z.to(dtype)) for z, dtype in moderates]
        except Exception:  # it is not written for what it was given
            return recorder.reads, None
        reads = recorder.reads
        if OPAQUE in reads.values() or not all(map(same, *results)):
            return reads, None
        for gate in _candidates(reads):
            exactly = all(same(a, apply_gate(z, gate)) for z, a in zip(inputs, results[0]))
            if exactly and all(is_near(a, apply_gate(z, gate)) for (z, _), a in zip(moderates, in_16_bits)):
                return reads, gate
    return reads, None


@contextmanager
def undisturbed():
    """In no mode of the caller's: Transformers may be building a model around us, on "meta", or somebody may trace."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            yield


def _candidates(reads: dict[str, object]):
    """Our gates with the activation and the numbers that were read; any activation, if none was."""
    numbers = [value for value in reads.values() if type(value) in (int, float)]
    named = [value for value in reads.values() if value in _ACTIVATIONS.values()]
    activations = named or ["silu", "gelu", "gelu_pytorch_tanh", "relu"]
    limits = [None, *(value for value in numbers if value > 0)]
    kinds = [*((name, Gate().alpha) for name in activations), *(("swigluoai", alpha) for alpha in numbers)]
    for (name, alpha), limit, interleaved in itertools.product(kinds, limits, (False, True)):
        yield Gate(name, limit if limit is None else float(limit), float(alpha), interleaved)


def grid(interleaved: bool) -> torch.Tensor:
    """Every pair of gate and up out of zero, both signs of 2^-24 to 2^124, numbers of -12 to 12, infinities and NaN."""
    fp32 = {"dtype": torch.float32}  # whatever a model that is being loaded has made the default
    magnitudes = 1.3 * 2.0 ** torch.arange(-24, 128, 4, **fp32)
    special = torch.tensor([0.0, float("inf"), float("-inf"), float("nan")], **fp32)
    values = torch.cat([magnitudes, -magnitudes, torch.linspace(-12, 12, 49, **fp32), special])
    gate, up = torch.meshgrid(values, values, indexing="ij")
    return torch.stack([gate, up], dim=-1).flatten(1) if interleaved else torch.cat([gate, up], dim=1)


def moderate(z: torch.Tensor) -> torch.Tensor:
    return z.nan_to_num(0.0).clamp(-12, 12)


def is_near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Up to the rounding of 16 bits: that a gate is another function in another dtype is larger."""
    return a.shape == b.shape and torch.allclose(a.float(), b, rtol=0.1, atol=0.1)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Up to the rounding of another order of the same products; not where a number is denormal."""
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-35, equal_nan=True)
