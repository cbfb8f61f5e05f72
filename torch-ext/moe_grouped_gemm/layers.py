"""nn.Modules that `kernelize` swaps in.

Transformers loads a layer by name and looks for its `...Layout` beside it. Importing this file does not import
Transformers.
"""

from __future__ import annotations

import torch
from torch import nn

from . import integration


class MoEExperts(nn.Module):
    """Replaces the forward of a Transformers experts module such as DeepseekV3Experts.

    `kernelize` binds `forward` to the module it replaces: `self` is the Transformers module.
    """

    can_torch_compile = True
    has_backward = True

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """(T, H) hidden states, (T, top_k) expert ids, (T, top_k) weights -> (T, H)."""
        return integration.experts_forward(self, hidden_states, top_k_index, top_k_weights)


class FP8Experts(nn.Module):
    """Replaces the forward of Transformers' FP8Experts, as `MoEExperts` does that of other experts."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """(T, H) hidden states, (T, top_k) expert ids, (T, top_k) weights -> (T, H)."""
        return integration.experts_forward(self, hidden_states, top_k_index, top_k_weights)


class DeepseekV3TopkRouter(nn.Module):
    """Replaces the forward of Transformers' DeepseekV3TopkRouter, as `MoEExperts` does that of the experts."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(..., H) hidden states -> (T, E) fp32 router logits, (T, top_k) fp32 weights, (T, top_k) int64 ids."""
        return integration.router_forward(self, hidden_states)


class _StandIn(type):
    """A class whose instances are those of the class it stands in for.

    `Layout(config)` is the stock module of the config's own model, made visible to `kernelize`: parameters,
    initialisation, parallelism, saving and the un-kernelized forward are the stock ones by construction. They have to
    be, because Transformers never takes a stand-in back: it builds every later model of the process with it.
    `isinstance(module, Layout)` holds, because `_init_weights` and output recording ask for the class under its patched
    name.
    """

    def __call__(cls, config) -> nn.Module:
        return cls.stock_class(config)(config)

    def __instancecheck__(cls, instance) -> bool:
        return cls.is_stock(instance)


class MoEExpertsLayout(nn.Module, metaclass=_StandIn):
    """What Transformers builds in place of an experts class that a KernelConfig maps to `MoEExperts`."""

    stock_class = staticmethod(integration.stock_experts_class)
    is_stock = staticmethod(integration.is_stock_experts)


class DeepseekV3TopkRouterLayout(nn.Module, metaclass=_StandIn):
    """What Transformers builds in place of a router that a KernelConfig maps to `DeepseekV3TopkRouter`."""

    stock_class = staticmethod(integration.stock_router_class)
    is_stock = staticmethod(integration.is_stock_router)
