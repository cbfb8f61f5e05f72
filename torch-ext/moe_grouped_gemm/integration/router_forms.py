"""Which router a module is: what trials have found out, for as long as nothing that they read has changed."""

from __future__ import annotations

import inspect
from typing import Callable

import torch
from torch import nn

from .router_trial import MISSING, Router, Trial, remembered

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Of each class and dtype of the hidden states: its forward, what that read in a trial, and which router it then was;
# None if none of ours. Of the newest trials alone: each layer may have attributes of its own, but models do not have so
# many.
_MOST_TRIALS = 256
_TRIED: dict[tuple[type, torch.dtype], list[tuple[Callable, dict[str, object], Router | None]]] = {}


def may_be_router(cls: type) -> bool:
    """Whether to try: its forward takes hidden states, and at most one tensor more, and something asks for a topk."""
    forward = vars(cls).get("forward")
    functions = [inspect.unwrap(value) for value in vars(cls).values() if inspect.isfunction(value)]
    names = [function.__code__.co_names for function in functions if hasattr(function, "__code__")]
    if forward is None or not any("topk" in of_one for of_one in names):
        return False
    kinds = [parameter.kind for parameter in inspect.signature(forward).parameters.values()]
    return len(kinds) in (2, 3) and set(kinds) == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def learn(module: nn.Module) -> None:
    """Find out ahead of torch.compile, for hidden states of any dtype."""
    for dtype in DTYPES:
        router_of(module, dtype)


def router_of(module: nn.Module, dtype: torch.dtype) -> Router | None:
    """The router that it is for hidden states of this dtype; None if it is none of ours, or if that is not sure."""
    cls, is_compiling = type(module), torch.compiler.is_compiling()
    state = {} if is_compiling else module.__dict__  # through which torch.compile does not see
    for forward, reads, router in _TRIED.get((cls, dtype), ()):
        if forward is not cls.forward:
            continue
        for path, value in reads.items():
            # nn.Module's own lookup takes a microsecond.
            found = state[path] if path in state else get(module, path)
            if found is not value and remembered(found) != value:
                break
        else:
            return router
    if is_compiling or dtype not in DTYPES:
        return None
    trial = Trial(module, dtype)
    if trial.reads:
        tried = _TRIED.setdefault((cls, dtype), [])
        tried.append((cls.forward, trial.reads, trial.router))
        del tried[:-_MOST_TRIALS]
    return trial.router


def get(module: nn.Module, path: str) -> object:
    """What is there, or MISSING."""
    for name in path.split("."):
        module = getattr(module, name, MISSING)
    return module
