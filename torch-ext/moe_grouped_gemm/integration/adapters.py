"""The adapters that are active on an experts module while PEFT's wrappers around it run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

from ..lora import LoraFactors

# (module, name of a weight, factors) of each. By context: threads that share a model have adapters of their own.
_active: ContextVar[tuple] = ContextVar("moe_grouped_gemm_adapters", default=())
_traced: list[tuple] = []  # torch.compile knows no ContextVar


@contextmanager
def activated(module: nn.Module, weight_name: str, factors: list[LoraFactors]) -> Iterator[None]:
    """While this runs, `module` is computed with these adapters of its weight too."""
    entries = [(module, weight_name, f) for f in factors]
    if torch.compiler.is_compiling():
        _traced.extend(entries)
        try:
            yield
        finally:
            del _traced[len(_traced) - len(entries) :]
        return
    token = _active.set((*_active.get(), *entries))
    try:
        yield
    finally:
        _active.reset(token)


def adapters_of(module: nn.Module) -> tuple[tuple[str, LoraFactors], ...]:
    """(name of a weight, factors) of each active adapter of `module`."""
    entries = _traced if torch.compiler.is_compiling() else _active.get()
    return tuple((name, factors) for owner, name, factors in entries if owner is module)
