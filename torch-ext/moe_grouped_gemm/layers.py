"""nn.Modules that `kernelize` swaps in.

Transformers loads `MoEExperts` by name and looks for `MoEExpertsLayout` beside it. Importing this file does not import
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


class _StandIn(type):
    """A class whose instances are those of the class it stands in for."""

    def __call__(cls, config) -> nn.Module:
        return integration.stock_experts_class(config)(config)

    def __instancecheck__(cls, instance) -> bool:
        return getattr(type(instance), "kernel_layer_name", None) == integration.LAYER_NAME


class MoEExpertsLayout(nn.Module, metaclass=_StandIn):
    """What Transformers builds in place of an experts class that a KernelConfig maps to `MoEExperts`.

    `MoEExpertsLayout(config)` is the experts module of the config's own model, made visible to `kernelize`: parameters,
    initialisation, expert parallelism, saving and the un-kernelized forward are the stock ones by construction. They
    have to be, because Transformers never takes a stand-in back: it builds every later model of the process with it.
    `isinstance(experts, MoEExpertsLayout)` holds, because `_init_weights` asks for the class under its patched name.
    """
