"""nn.Modules that `kernelize` swaps in, `register()`, which makes them known, and `fp4_config()`.

Transformers loads a layer by name and looks for its `...Layout` beside it. Importing this file does not import
Transformers.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from .integration import blocks, modules, quantizer, routers, stand_ins
from .integration.register import register_layers
from .integration.switching import Layer, switches_on


class MoEExperts(Layer):
    """Replaces the forward of a Transformers experts module such as DeepseekV3Experts.

    `kernelize` assigns `forward`, bound to the Transformers module; a class that we know takes that as a mark.
    """

    @switches_on
    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """(T, H) hidden states, (T, top_k) expert ids, (T, top_k) weights -> (T, H)."""
        return modules.experts_forward(self, hidden_states, top_k_index, top_k_weights)


class FP8Experts(MoEExperts):
    """Replaces the forward of Transformers' FP8Experts, as `MoEExperts` does that of other experts."""


class MoERouter(Layer):
    """Replaces the forward of a router of Transformers, as `MoEExperts` does that of the experts."""

    @switches_on
    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(..., H) hidden states -> (T, E) logits, (T, top_k) weights and int64 ids, in the order of its class."""
        return routers.router_forward(self, hidden_states)


class DeepseekV3TopkRouter(MoERouter):
    """The same, by the name of the class."""


class MoERouterWithBias(Layer):
    """`MoERouter` for classes whose forward is given the correction bias."""

    @switches_on
    def forward(
        self, hidden_states: torch.Tensor, e_score_correction_bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `MoERouter`; (E,) e_score_correction_bias."""
        return routers.router_forward(self, hidden_states, e_score_correction_bias)


class MoEBlock(Layer):
    """Replaces the forward of a block of Transformers, router, experts and shared experts together, in inference."""

    @switches_on
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """(B, S, H) hidden states -> (B, S, H), and the routing weights where its class returns them."""
        return blocks.block_forward(self, hidden_states)


class DeepseekV3MoE(MoEBlock):
    """The same, by the name of the class."""


class _StandIn(type):
    """A class whose instances are those of the class it stands in for.

    `Layout(config)` is the stock module of the config's own model, made visible to `kernelize`: parameters,
    initialisation, parallelism, saving and the un-kernelized forward are the stock ones by construction. They have to
    be, because Transformers never takes a stand-in back: it builds every later model of the process with it.
    `isinstance(module, Layout)` holds, because `_init_weights` and output recording ask for the class under its patched
    name.
    """

    def __call__(cls, config) -> nn.Module:
        stand_ins.let_models_switch_off()
        return cls.stock_class(config)(config)

    def __instancecheck__(cls, instance) -> bool:
        return cls.is_stock(instance)


class MoEExpertsLayout(nn.Module, metaclass=_StandIn):
    """What Transformers builds in place of an experts class that a KernelConfig maps to `MoEExperts`."""

    stock_class = staticmethod(stand_ins.stock_experts_class)
    is_stock = staticmethod(stand_ins.is_stock_experts)


class MoERouterLayout(nn.Module, metaclass=_StandIn):
    """What Transformers builds in place of a router that a KernelConfig maps to `MoERouter`."""

    stock_class = staticmethod(functools.partial(routers.KIND.stock_class, routers.LAYER))
    is_stock = staticmethod(routers.KIND.is_stock)


class MoERouterWithBiasLayout(nn.Module, metaclass=_StandIn):
    """The same for `MoERouterWithBias`."""

    stock_class = staticmethod(functools.partial(routers.KIND.stock_class, routers.LAYER_WITH_BIAS))
    is_stock = staticmethod(routers.KIND.is_stock)


class DeepseekV3TopkRouterLayout(nn.Module, metaclass=_StandIn):
    """The same for `DeepseekV3TopkRouter`."""

    stock_class = staticmethod(functools.partial(routers.KIND.stock_class, routers.OF_DEEPSEEK_V3))
    is_stock = staticmethod(routers.KIND.is_stock)


class MoEBlockLayout(nn.Module, metaclass=_StandIn):
    """What Transformers builds in place of a block that a KernelConfig maps to `MoEBlock`."""

    stock_class = staticmethod(functools.partial(stand_ins.stock_block_class, blocks.LAYER))
    is_stock = staticmethod(blocks.KIND.is_stock)


class DeepseekV3MoELayout(nn.Module, metaclass=_StandIn):
    """The same for `DeepseekV3MoE`."""

    stock_class = staticmethod(functools.partial(stand_ins.stock_block_class, blocks.OF_DEEPSEEK_V3))
    is_stock = staticmethod(blocks.KIND.is_stock)


def register() -> None:
    """Make this kernel available to Transformers.

    Afterwards `use_kernels=True` (or `kernelize`) switches it on in every experts module that it can serve, FP8 ones
    among them, in the routers beside them and in the blocks around them, in models loaded before or after, and
    `experts_implementation="moe_grouped_gemm"` selects the experts by name. `use_kernels=False` and another
    `experts_implementation` switch it off again. May be called again.

    Raises:
        ImportError: Transformers is older than 5.17 or lacks what we build on.
    """
    layers = (MoEExperts, FP8Experts, MoERouter, MoERouterWithBias, DeepseekV3TopkRouter, MoEBlock, DeepseekV3MoE)
    register_layers({cls.__name__: cls for cls in layers})


def fp4_config():
    """The `quantization_config` of a model that `from_pretrained` is to load with its experts in 4 bits.

    Whatever the checkpoint: gpt-oss's own, another that was saved so, or a dense one, whose experts are quantised one
    weight after another as they are read. The experts run on this kernel, with gradients for all but the codes; the
    rest of the model stays as it is.

    Raises:
        ImportError: as `register`, which this calls.
    """
    register()
    return quantizer.config_class()()
