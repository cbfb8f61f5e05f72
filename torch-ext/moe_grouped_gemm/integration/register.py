"""Transformers' experts classes and routers find this kernel, by `kernelize` and by name."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import nn

from . import blocks, mapping, routers, stand_ins, switching, undecorated
from .peft import meet_peft
from .versions import check_versions


@dataclass(frozen=True)
class _LoadedLayer:
    """A `kernels` layer repository that hands out a class of this package: nothing is resolved or loaded again."""

    layer: type
    is_of_moe_grouped_gemm = True  # of any build

    def load(self) -> type:
        return self.layer


def register_layers(layers: dict[str, type]) -> None:
    """What `layers.register` does; `layers`: the class that `kernelize` takes for each name."""
    check_versions()
    from kernels import Mode, register_kernel_mapping

    stand_ins.register_interface()
    stand_ins.register()
    meet_peft()
    layers = {**layers, **undecorated.make_switchable()}
    # The names that Transformers itself gives to routers and blocks.
    others = {ours.OF_TRANSFORMERS: layers[ours.LAYER] for ours in (routers, blocks)}
    for name, cls in {**layers, **others}.items():
        if not mapping.is_free(name, if_unknown=name in layers):
            continue
        layer = _LoadedLayer(cls)
        modes = {Mode.INFERENCE | Mode.TORCH_COMPILE: layer, Mode.TRAINING | Mode.TORCH_COMPILE: layer}
        by_device = {"cuda": modes, "cpu": modes}
        register_kernel_mapping({name: by_device})
        mapping.take_over(name, by_device)
    _mark_as_they_come()
    for cls in nn.Module.__subclasses__():
        stand_ins.make_switchable(cls)
        if "_apply_gate" in vars(cls):
            stand_ins.meet(cls.__module__)
    stand_ins.let_models_switch_off()


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
