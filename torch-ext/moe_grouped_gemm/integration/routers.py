"""Transformers' DeepseekV3TopkRouter, on `topk_router`."""

from __future__ import annotations

import functools
from typing import Callable

import torch
from torch import nn

from .. import router
from . import switching
from .modules import is_plain

LAYER = "DeepseekV3TopkRouter"


def router_forward(module: nn.Module, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Forward of DeepseekV3TopkRouter: (..., H) -> what `topk_router` returns for (T, H)."""
    return serve(module, type(module).forward, hidden_states)


def serve(module: nn.Module, stock: Callable, hidden_states: torch.Tensor):
    """What `module` computes, by us or, for operands that we do not take, by `stock(module, hidden_states)`."""
    weight = module.weight
    if not (is_plain(hidden_states) and is_plain(weight)):
        return stock(module, hidden_states)
    return router.topk_router(
        hidden_states.view(-1, module.hidden_dim),
        weight,
        module.e_score_correction_bias,
        module.top_k,
        module.num_group,
        module.topk_group,
        bool(module.norm_topk_prob),  # None means no, too
        module.routed_scaling_factor,
    )


@functools.cache
def router_class() -> type:
    """Transformers' DeepseekV3TopkRouter; its name may point at our stand-in."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3

    path = modeling_deepseek_v3.__name__, LAYER
    return next(cls for cls in nn.Module.__subclasses__() if (cls.__module__, cls.__name__) == path)


def stock_router_class(config=None) -> type:
    """Transformers' DeepseekV3TopkRouter, ready for `kernelize`; there is one, whatever the config."""
    cls = router_class()
    switching.make_switchable(cls, serve)
    switching.name_for_kernelize(cls, LAYER, switching.is_switchable)
    return cls


def is_stock_router(module: object) -> bool:
    return isinstance(module, router_class())
