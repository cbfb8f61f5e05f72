"""Whether a module is as it was: what a decision about it was made of, compared in a few microseconds."""

from __future__ import annotations

from itertools import chain
from operator import is_
from typing import Callable
from weakref import WeakKeyDictionary

import torch
from torch import nn

_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_CONTENTS = ("_modules", "_parameters", "_buffers")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Snapshot:
    """Of a module and all below it: classes and their forwards, attributes, children, tensors, and whether hooked.

    Attributes are compared by identity, tensors also by their memory, dtype and shape: a Parameter may be given other
    data. Not seen are changes inside other objects, and of what a class has besides its forward.
    """

    @classmethod
    def of(cls, module: nn.Module) -> Snapshot | None:
        """None where there is more than can be compared: a tensor of a subclass, a module that is no Python."""
        tensors = chain(module.parameters(), module.buffers())
        if any(type(t) not in (torch.Tensor, nn.Parameter) for t in tensors):
            return None
        return None if any(isinstance(m, torch.jit.ScriptModule) for m in module.modules()) else cls(module)

    def __init__(self, module: nn.Module):
        _, *below = module.modules()
        self._below = tuple(below)  # not the module itself: it is let go though its snapshot is kept
        self._types = [type(m) for m in (module, *below)]
        self._forwards = [cls.forward for cls in self._types]
        self._owners = tuple(vars(m) for m in (module, *below))
        contents = tuple(owner[name] for owner in self._owners for name in _CONTENTS)
        entries = [(owner, name, owner[name]) for owner in self._owners for name in owner if name not in _INTERNAL]
        entries += [(content, name, value) for content in contents for name, value in content.items()]
        self._dicts, self._names, self._values = zip(*entries)
        self._sized = self._owners + contents
        self._sizes = list(map(len, self._sized))
        self._hooks = tuple(owner[name] for owner in self._owners for name in _HOOKS)
        self._hooked = list(map(bool, self._hooks))
        self._tensors = tuple(t for t in chain(module.parameters(), module.buffers()))
        self._places = self._where()

    def holds(self, module: nn.Module) -> bool:
        return (
            all(map(is_, map(dict.get, self._dicts, self._names), self._values))
            and list(map(len, self._sized)) == self._sizes
            and list(map(bool, self._hooks)) == self._hooked
            and list(map(type, (module, *self._below))) == self._types
            and [cls.forward for cls in self._types] == self._forwards
            and self._where() == self._places
        )

    def _where(self) -> list[tuple[int, torch.dtype, torch.Size]]:
        return [(t.data_ptr(), t.dtype, t.shape) for t in self._tensors]


class Decisions:
    """What `decide(module, *args)` says, for as long as the module is as it was and `like`, of the caller's, is equal.

    None where it cannot be told whether that is so.
    """

    def __init__(self, decide: Callable):
        self._decide = decide
        self._kept: WeakKeyDictionary[nn.Module, tuple[tuple, Snapshot, object]] = WeakKeyDictionary()

    def of(self, module: nn.Module, like: tuple, *args) -> object:
        kept = self._kept.get(module)
        if kept is not None and kept[0] == like and kept[1].holds(module):
            return kept[2]
        snapshot = Snapshot.of(module)
        if snapshot is None:
            return None
        decision = self._decide(module, *args)
        self._kept[module] = like, snapshot, decision
        return decision
