"""The adapters that are active on an experts module while PEFT's wrappers around it run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

from ..experts.lora import LoraFactors

# (thread, module, name of a weight, factors) of each. By context: threads that share a model have their own adapters.
_active: ContextVar[tuple] = ContextVar("moe_grouped_gemm_adapters", default=())
# The same of all threads. torch.compile knows no ContextVar, so a frame that it traces reads these, and one that it
# traces adds to these alone, as thread 0; after a graph break either may be followed by the other.
_listed: list[tuple] = []
_lock = threading.Lock()


@contextmanager
def activated(module: nn.Module, weight_name: str, factors: list[LoraFactors]) -> Iterator[None]:
    """While this runs, `module` is computed with these adapters of its weight too."""
    if torch.compiler.is_compiling():
        _listed.extend([(0, module, weight_name, f) for f in factors])
        try:
            yield
        finally:
            del _listed[len(_listed) - len(factors) :]
        return
    entries = [(threading.get_ident(), module, weight_name, f) for f in factors]
    token = _active.set((*_active.get(), *entries))
    with _lock:
        _listed.extend(entries)
    try:
        yield
    finally:
        _active.reset(token)
        own = {id(entry) for entry in entries}
        with _lock:
            _listed[:] = [entry for entry in _listed if id(entry) not in own]


def adapters_of(module: nn.Module) -> tuple[tuple[str, LoraFactors], ...]:
    """(name of a weight, factors) of each active adapter of `module`.

    Raises:
        RuntimeError: several threads call the module with adapters while torch.compile traces it.
    """
    if torch.compiler.is_compiling():
        entries = [entry for entry in _listed if entry[1] is module]
        if any(entry[0] != entries[0][0] for entry in entries):
            raise RuntimeError("moe-grouped-gemm: adapters of several threads cannot be told apart under torch.compile")
    else:
        traced = [entry for entry in _listed if entry[0] == 0]
        entries = [entry for entry in (*traced, *_active.get()) if entry[1] is module]
    return tuple((name, factors) for _, _, name, factors in entries)
