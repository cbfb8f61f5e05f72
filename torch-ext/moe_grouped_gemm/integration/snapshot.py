"""Whether a module is as it was: what a decision about it was made of, compared in a few microseconds."""

from __future__ import annotations

import copy
import weakref
from functools import partial
from itertools import chain
from operator import is_
from typing import Callable

import torch
from torch import nn

_CONTENTS = ("_modules", "_parameters", "_buffers")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_INTERNAL = frozenset(vars(nn.Module())) - {"training", *_CONTENTS, *_HOOKS}
_PLAIN = (torch.Tensor, nn.Parameter)
# On a module: what this build has decided about it.
_DECIDED = f"_decided_by_{__name__.partition('.')[0]}"


class Snapshot:
    """Of a module and all below it: classes and their forwards, attributes, children, tensors, and hooks.

    Attributes are compared by identity; tensors by memory, device, dtype, shape and strides, as expert and tensor
    parallelism put new views of the same weights on a module for each forward. No tensor is kept alive. Not seen are
    changes inside other objects, and of what a class has besides its forward.
    """

    @classmethod
    def of(cls, module: nn.Module) -> Snapshot | None:
        """None where there is more than can be compared: a tensor of a subclass, a module that is no Python."""
        tensors = chain(module.parameters(), module.buffers())
        if any(type(t) not in _PLAIN for t in tensors):
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
        self._tensors = [(where, name) for where, name, t in entries if isinstance(t, torch.Tensor)]
        self._sized = owners + contents
        self._sizes = list(map(len, self._sized))
        self._hooks = tuple(owner[name] for owner in owners for name in _HOOKS)
        self._numbers_of_hooks = list(map(len, self._hooks))
        self._hooked = [(hooks, tuple(hooks)) for hooks in self._hooks if hooks]  # each has a number of its own
        self._places = self._where()

    def now(self, module: nn.Module) -> Snapshot | None:
        """This one, if it holds.

        Another, if nothing but the memory of tensors differs, as where FSDP2 gathers them; else None.
        """
        if not self._is_same(module):
            return None
        places = self._where()
        if places == self._places:
            return self
        if [form for _, form in places] != [form for _, form in self._places] or _tied(places) != _tied(self._places):
            return None
        moved = copy.copy(self)
        moved._places = places
        return moved

    def _is_same(self, module: nn.Module) -> bool:
        """All but the tensors."""
        return (
            all(map(is_, map(dict.get, self._dicts, self._names), self._values))
            and list(map(len, self._sized)) == self._sizes
            and list(map(len, self._hooks)) == self._numbers_of_hooks
            and all(tuple(hooks) == numbers for hooks, numbers in self._hooked)
            and list(map(type, (module, *self._below))) == self._types
            and [cls.forward for cls in self._types] == self._forwards
        )

    def _where(self) -> list[tuple]:
        """(address, form) of each tensor; of what is none by now, or none of ours to read, what nothing is equal to."""
        return [_place(where.get(name)) for where, name in self._tensors]


def _place(t: object) -> tuple:
    return (t.data_ptr(), (t.device, t.dtype, t.shape, t.stride())) if type(t) in _PLAIN else (0, object())


def _tied(places: list[tuple]) -> list[int]:
    """Of each, the first that has the same memory."""
    addresses = [address for address, _ in places]
    return list(map(addresses.index, addresses))


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

    elsewhere: decision -> the same, for tensors in other memory; without it that is decided anew.
    """

    def __init__(self, decide: Callable, elsewhere: Callable | None = None):
        self._decide, self._elsewhere = decide, elsewhere

    def of(self, module: nn.Module, like: tuple, *args) -> object:
        decided = module.__dict__.get(_DECIDED)
        if type(decided) is not _Decided or decided.module() is not module:
            decided = module.__dict__[_DECIDED] = _Decided(module)
        kept = decided.kept
        if kept is not None and kept[0] == like:
            snapshot = kept[1].now(module)
            if snapshot is kept[1]:
                return kept[2]
            if snapshot is not None and self._elsewhere is not None and kept[2] is not None:
                decision = self._elsewhere(kept[2])
                decided.kept = like, snapshot, decision
                return decision
        snapshot = Snapshot.of(module)
        if snapshot is None:
            return None
        decision = self._decide(module, *args)
        decided.kept = like, snapshot, decision
        return decision


def referred(module: nn.Module, tensors: tuple) -> tuple | None:
    """Functions that return these tensors as the module has them now, or None for None, and keep none of them alive.

    None where one of them is not the module's, but computed, and may be another in the next call.
    """
    contents = [content for m in module.modules() for content in (m._parameters, m._buffers)]
    own = [(content, name, t) for content in contents for name, t in content.items() if t is not None]
    where = {id(t): (content, name) for content, name, t in own}
    places = {(t.data_ptr(), t.nbytes): (content, name) for content, name, t in own}
    references = []
    for t in tensors:
        if t is None:
            references.append(_nothing)
        elif id(t) in where:
            content, name = where[id(t)]
            references.append(partial(content.get, name))
        elif (t.data_ptr(), t.nbytes) in places and t.ndim == 1:  # a view of a vector
            references.append(partial(_view, *places[t.data_ptr(), t.nbytes], t.dtype, t.shape))
        else:
            return None
    return tuple(references)


def _view(content: dict, name: str, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    return content[name].detach().view(dtype).view(shape)


def _nothing() -> None:
    return None
