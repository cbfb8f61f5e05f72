"""Whether a module is as it was: what a decision about it was made of, compared in a few microseconds."""

from __future__ import annotations

import weakref
from itertools import chain
from operator import is_
from typing import Callable

import torch
from torch import nn

_CONTENTS = ("_modules", "_parameters", "_buffers")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_INTERNAL = frozenset(vars(nn.Module())) - {"training", *_CONTENTS, *_HOOKS}
# On a module: what this build has decided about it.
_DECIDED = f"_decided_by_{__name__.partition('.')[0]}"


class Snapshot:
    """Of a module and all below it: classes and their forwards, attributes, children, tensors, and whether hooked.

    Attributes are compared by identity, tensors also by their memory, dtype and strides: a Parameter may be given other
    data. No tensor is kept alive. Not seen are changes inside other objects, and of what a class has besides its
    forward.
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
        self._below = tuple(below)
        self._types = [type(m) for m in (module, *below)]
        self._forwards = [cls.forward for cls in self._types]
        owners = tuple(vars(m) for m in (module, *below))
        contents = tuple(owner[name] for owner in owners for name in _CONTENTS)
        entries = [(owner, name, owner[name]) for owner in owners for name in owner if name not in _INTERNAL]
        entries += [(content, name, value) for content in contents for name, value in content.items()]
        others = [entry for entry in entries if not isinstance(entry[2], (torch.Tensor, _Decided))]
        self._dicts, self._names, self._values = zip(*others)
        self._tensors = [(where, name, weakref.ref(t)) for where, name, t in entries if isinstance(t, torch.Tensor)]
        self._sized = owners + contents
        self._sizes = list(map(len, self._sized))
        self._hooks = tuple(owner[name] for owner in owners for name in _HOOKS)
        self._hooked = list(map(bool, self._hooks))
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

    def _where(self) -> list[tuple]:
        """Of each tensor; of one that is another by now, what nothing is equal to."""
        found = [(where.get(name), reference) for where, name, reference in self._tensors]
        return [
            (t.data_ptr(), t.dtype, t.shape, t.stride()) if t is not None and t is reference() else object()
            for t, reference in found
        ]


class _Decided:
    """On a module, about it and for it alone: a copy of the module, or its pickle, has nothing of it."""

    def __init__(self, module: nn.Module):
        self.module, self.kept = weakref.ref(module), None

    def __deepcopy__(self, memo):
        return None

    def __reduce__(self):
        return dict, ()  # which any process can read


class Decisions:
    """What `decide(module, *args)` says, for as long as the module is as it was and `like`, of the caller's, is equal.

    None where it cannot be told whether that is so.
    """

    def __init__(self, decide: Callable):
        self._decide = decide

    def of(self, module: nn.Module, like: tuple, *args) -> object:
        decided = module.__dict__.get(_DECIDED)
        if type(decided) is not _Decided or decided.module() is not module:
            decided = module.__dict__[_DECIDED] = _Decided(module)
        kept = decided.kept
        if kept is not None and kept[0] == like and kept[1].holds(module):
            return kept[2]
        snapshot = Snapshot.of(module)
        if snapshot is None:
            return None
        decision = self._decide(module, *args)
        decided.kept = like, snapshot, decision
        return decision


def referred(module: nn.Module, tensors: tuple) -> tuple | None:
    """Functions that return these tensors, or None for None, and keep none alive that the module does not.

    None where one of them is not the module's, but computed, and may be another in the next call.
    """
    own = list(chain(module.parameters(), module.buffers()))
    ids, places = set(map(id, own)), {(t.data_ptr(), t.nbytes) for t in own}
    references = []
    for t in tensors:
        if t is None or id(t) in ids:
            references.append(_nothing if t is None else weakref.ref(t))
        elif (t.data_ptr(), t.nbytes) in places and t.ndim == 1:  # a view of a vector, small enough to be kept
            references.append(lambda t=t: t)
        else:
            return None
    return tuple(references)


def _nothing() -> None:
    return None
