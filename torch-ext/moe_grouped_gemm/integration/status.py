"""`status(model)`: what serves each layer, and why not this kernel."""

from __future__ import annotations

from torch import nn

from . import blocks, modules, routers, switching


def status(model: nn.Module) -> dict[str, str]:
    """What computes each module of a Transformers model that this kernel can serve: experts, routers, some MoE layers.

    Returns:
        Name of the module -> "moe_grouped_gemm" where this kernel does, and more behind a comma where there is more to
        say; elsewhere what does, and why.
    """
    return {
        name: _experts(module) if modules.is_experts(module) else _other(module)
        for name, module in model.named_modules()
        if modules.is_experts(module) or switching.is_switchable(module)
    }


def _experts(module: nn.Module) -> str:
    forward = switching.foreign_forward(module)
    if forward is not None:
        return f"a forward of {forward.__module__}"
    implementation = getattr(module.config, "_experts_implementation", None)
    if implementation == modules.EXPERTS_IMPLEMENTATION:
        implementation = "Transformers' default"
    elif not switching.is_switched_on(module):
        return f"{implementation}: not switched on"
    if modules.is_empty(module):
        return f"{modules.EXPERTS_IMPLEMENTATION}, once its weights are there"
    reason = modules.peek(module)
    if reason is not None:
        return f"{implementation}: {reason}"
    return f"{modules.EXPERTS_IMPLEMENTATION}{', around its own gate or norm' if modules.runs_composed(module) else ''}"


def _other(module: nn.Module) -> str:
    forward = switching.foreign_forward(module)
    if forward is not None:
        return f"a forward of {forward.__module__}"
    for kind, ours, is_known in (("router", routers, routers.is_served), ("block", blocks, blocks.is_known)):
        if ours.KIND.is_one(module):
            if not (is_known(module) or switching.is_switched_on(module)):
                return f"Transformers: none of the {kind}s that this kernel has"
            if not ours.SERVES_CPU and any(parameter.is_cpu for parameter in module.parameters()):
                return f"Transformers: a {kind} on a CPU"
    if switching.is_switched_on(module) and blocks.KIND.is_one(module):
        block = blocks.whole(module)
        if block is None:
            return "Transformers, part by part"
        return f"{modules.EXPERTS_IMPLEMENTATION}{'' if block.apart is None else ', around its own shared experts'}"
    return modules.EXPERTS_IMPLEMENTATION if switching.is_switched_on(module) else "Transformers: not switched on"
