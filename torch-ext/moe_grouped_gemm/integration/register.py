"""Transformers' experts classes and routers find this kernel, by `kernelize` and by name."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import nn

from . import modules, routers, stand_ins, switching
from .peft import meet_peft


@dataclass(frozen=True)
class _LoadedLayer:
    """A `kernels` layer repository that hands out a class of this package: nothing is resolved or loaded again."""

    layer: type

    def load(self) -> type:
        return self.layer


def register_layers(layers: dict[str, type]) -> None:
    """What `layers.register` does; `layers`: the class that `kernelize` takes for each name."""
    _check_versions()
    from kernels import Mode, register_kernel_mapping

    stand_ins.register_interface()
    meet_peft()
    for name, cls in layers.items():
        layer = _LoadedLayer(cls)
        modes = {Mode.INFERENCE | Mode.TORCH_COMPILE: layer, Mode.TRAINING | Mode.TORCH_COMPILE: layer}
        register_kernel_mapping({name: {"cuda": modes, "cpu": modes}})
    routers.stock_router_class()
    _mark_as_they_come()
    for cls in nn.Module.__subclasses__():
        stand_ins.make_switchable(cls)
    switching.let_models_switch_off(modules.is_experts, stand_ins.learn)


def _mark_as_they_come() -> None:
    """Experts classes as their modeling files are imported: importing all of them now would take seconds. And FP8's own
    class, which is decorated anew, in place, for each module.
    """
    from transformers import integrations
    from transformers.integrations import finegrained_fp8, moe

    decorate = moe.use_experts_implementation
    if switching.is_own(decorate):
        return

    @functools.wraps(decorate)
    def use_experts_implementation(experts_class=None, **options):
        if experts_class is None:
            return lambda cls: stand_ins.make_switchable(decorate(cls, **options))
        return stand_ins.make_switchable(decorate(experts_class, **options))

    switching.sign(use_experts_implementation, decorate)
    for module in (integrations, moe, finegrained_fp8):
        module.use_experts_implementation = use_experts_implementation


def _check_versions() -> None:
    """One clear error now instead of a missing name later."""
    requirement = "moe-grouped-gemm.register() needs transformers >= 5.17 with a version of kernels that it supports"
    try:
        import transformers
        from kernels import replace_kernel_forward_from_hub  # noqa: F401
        from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS  # noqa: F401
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate  # noqa: F401
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{requirement}: {error}") from error
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 17):
        raise ImportError(f"{requirement}: found transformers {transformers.__version__}")
