"""Everything that knows Transformers and PEFT: which modules we can serve, and how they find us.

Three ways lead here: a KernelConfig or `use_kernels=True` makes `kernelize` put the forward of one of our layers on
each module that it serves; `experts_implementation="moe_grouped_gemm"` makes the experts' own forward call
`experts_forward`. PEFT's adapters on expert weights come to `experts_forward` as factors, through `_activate_lora`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType

import torch
from torch import nn

from . import integration_fp8, lora, quant, router, variants

EXPERTS_IMPLEMENTATION = "moe_grouped_gemm"
# For `kernelize`; given a KernelConfig, Transformers takes the name of the layer's class.
EXPERTS_LAYER = "MoEExperts"
FP8_EXPERTS_LAYER = "FP8Experts"
ROUTER_LAYER = "DeepseekV3TopkRouter"

# Of a module while PEFT's wrappers around it run: (name of a weight, factors) of each active adapter.
_ADAPTERS = "_moe_grouped_gemm_adapters"


def experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Forward of a Transformers experts module: ours, but for weights that are no dense tensors the module's own.

    Args:
        module: any that carries Transformers' decorator; under expert parallelism the local experts.
        hidden_states: (T, H).
        top_k_index: (T, top_k) integer; ids outside [0, E) are skipped.
        top_k_weights: (T, top_k).
    Returns:
        (T, H) in hidden_states.dtype.
    """
    if _has_fp8_weights(module):
        adapters = getattr(module, _ADAPTERS, ())
        return integration_fp8.forward(module, hidden_states, top_k_index, top_k_weights, adapters)
    if variants.can_serve(module) and all(_is_dense(getattr(module, name)) for name in variants.weight_names(module)):
        # In the dtype of the weights, as Transformers' grouped_mm: under autocast, norms hand over fp32.
        adapters = getattr(module, _ADAPTERS, ())
        return variants.experts(module, hidden_states, top_k_index, top_k_weights, adapters).to(hidden_states.dtype)
    # The innermost function is the eager one: FP8Experts is decorated anew for every module.
    return inspect.unwrap(type(module).forward)(module, hidden_states, top_k_index, top_k_weights)


def router_forward(module: nn.Module, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Forward of Transformers' DeepseekV3TopkRouter: (..., H) -> what `topk_router` returns for (T, H)."""
    if not (_is_dense(hidden_states) and _is_dense(module.weight)):
        return type(module).forward(module, hidden_states)
    return router.topk_router(
        hidden_states.view(-1, module.hidden_dim),
        module.weight,
        module.e_score_correction_bias,
        module.top_k,
        module.num_group,
        module.topk_group,
        bool(module.norm_topk_prob),  # None means no, too
        module.routed_scaling_factor,
    )


def _has_fp8_weights(module: nn.Module) -> bool:
    """Not if they are dense: then Transformers could not cut them into blocks."""
    if not integration_fp8.is_fp8_experts(module):
        return False
    return not any(_is_dense(weight) for name, weight in module.named_parameters() if name.endswith("_proj"))


def _is_dense(weight: torch.Tensor) -> bool:
    """False for quantized weights and for wrapper subclasses (DTensor, torchao), whose storage is not the weight."""
    return weight.dtype in (torch.bfloat16, torch.float16, torch.float32) and not hasattr(weight, "__tensor_flatten__")


def _name_for_kernelize(cls: type, layer_name: str, condition) -> None:
    """From now on `kernelize` takes the modules of `cls` for which `condition(module)` is true for such layers."""
    from kernels import replace_kernel_forward_from_hub

    if "condition" in inspect.signature(replace_kernel_forward_from_hub).parameters:
        replace_kernel_forward_from_hub(cls, layer_name, condition)
        return
    # kernels 0.16, which Transformers 5.17 wants: what later ones do with a condition is added to it.
    replace_kernel_forward_from_hub(cls, layer_name)
    cls.kernel_condition = staticmethod(condition)
    _teach_conditions()


@functools.cache
def _teach_conditions() -> None:
    kernelize = importlib.import_module("kernels.layer.kernelize")
    kernelize_layer = kernelize.kernelize_layer

    @functools.wraps(kernelize_layer)
    def kernelize_layer_on_condition(module, **options):
        condition = getattr(type(module), "kernel_condition", None)
        if condition is None or condition(module):
            kernelize_layer(module, **options)

    kernelize.kernelize_layer = kernelize_layer_on_condition


def _may_replace_forward(marked: type, module: nn.Module) -> bool:
    """The `kernel_condition` of a marked class: may `kernelize` assign `module.forward`?

    Not if a wrapper sits there already (accelerate's offload hook, expert or tensor parallelism): it would be lost.
    Below a wrapper, and wherever `kernelize` puts the class's own forward back (a mode or device without a mapping),
    the class dispatches on its config. So the config names us too, and the kernel runs whichever way is taken.
    """
    from .layers import MoEExperts

    if type(module).forward is not marked.forward or not variants.can_serve(module):
        return False  # a subclass with a forward of its own, or with other weights
    module.config._experts_implementation_internal = EXPERTS_IMPLEMENTATION
    return _is_unwrapped(module, marked.forward, MoEExperts.forward)


def _may_replace_fp8(module: nn.Module) -> bool:
    """As `_may_replace_forward`; FP8Experts is decorated anew for each module, in place."""
    from .layers import FP8Experts

    stock_forward = type(module).forward
    if stock_forward is not _fp8_experts_class().forward or not _has_fp8_weights(module):
        return False
    if integration_fp8.obstacle(module) is not None:
        return False
    module.config._experts_implementation_internal = EXPERTS_IMPLEMENTATION
    return _is_unwrapped(module, stock_forward, FP8Experts.forward)


def _may_replace_router(module: nn.Module) -> bool:
    """As `_may_replace_forward`; a router below a wrapper stays the stock one."""
    from .layers import DeepseekV3TopkRouter

    if not hasattr(module, "topk_group"):
        return False  # an older Transformers, whose MoE block makes the choice
    stock_forward = _router_class().forward
    return type(module).forward is stock_forward and _is_unwrapped(module, stock_forward, DeepseekV3TopkRouter.forward)


def _is_unwrapped(module: nn.Module, *forwards) -> bool:
    """Whether `module.forward` is one of these functions, bound to whatever module."""
    forward = module.forward
    return isinstance(forward, MethodType) and forward.__func__ in forwards


def _runs_on_kernel(module: nn.Module) -> bool:
    """Whether `module(...)` is bound to end in `experts_forward`, and there in our own computation."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from .layers import FP8Experts, MoEExperts

    if _has_fp8_weights(module):
        if integration_fp8.obstacle(module) is not None:
            return False
    elif not variants.can_serve(module) or not all(
        _is_dense(getattr(module, name)) for name in variants.weight_names(module)
    ):
        return False
    forward = getattr(module, "_old_forward", module.forward)  # accelerate's hook keeps what it wraps there
    if not isinstance(forward, MethodType):
        return False
    if forward.__func__ in (MoEExperts.forward, FP8Experts.forward):
        return True
    dispatches = any("_apply_gate" in vars(cls) and cls.forward is forward.__func__ for cls in type(module).__mro__)
    name = module.config._experts_implementation
    return dispatches and name == EXPERTS_IMPLEMENTATION and ALL_EXPERTS_FUNCTIONS.get(name) is experts_forward


# --- PEFT -------------------------------------------------------------------------------------------------------------


@functools.cache
def _meet_peft() -> None:
    """Let PEFT's wrapper of a weight give its factors to a module that runs on this kernel.

    The wrapper registers a parametrization around every forward, and torch evaluates a parametrization as it is
    registered: W + BA would be made for all experts even if nobody read it. So this steps in before. Every other
    module, and a PEFT that does not do what we replace, keeps PEFT's own way.
    """
    if importlib.util.find_spec("peft") is None:
        return
    try:
        from peft.tuners.lora.layer import ParamWrapper

        materialize = ParamWrapper._activate_lora
        _check_peft()
    except Exception as error:  # whatever PEFT has become
        return _warn_of_peft(f"{type(error).__name__}: {error}")

    @functools.wraps(materialize)
    @contextmanager
    def activate_lora(self, active_adapters):
        module = self.get_base_layer()
        factors = _lora_factors(self, active_adapters) if _runs_on_kernel(module) else None
        if factors is None:
            with materialize(self, active_adapters):
                yield
            return
        outer = getattr(module, _ADAPTERS, ())  # of the wrapper around this one, which has another weight
        setattr(module, _ADAPTERS, (*outer, *((self.parameter_name, f) for f in factors)))
        try:
            yield
        finally:
            setattr(module, _ADAPTERS, outer)

    ParamWrapper._activate_lora = activate_lora


def _check_peft() -> None:
    """Ask PEFT itself, on two experts of 4 x 3: does its wrapper add `get_delta_factors` to the weight and no more?"""
    from peft import LoraConfig
    from peft.tuners.lora.layer import ParamWrapper

    # Transformers may be building a model around us: on "meta", in another dtype and with torch.nn.init switched off.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        module = nn.Module()
        module.weight = nn.Parameter(torch.empty(2, 4, 3, dtype=torch.float64))
        options = {"config": LoraConfig(), "lora_alpha": 3}
        wrapper = ParamWrapper(module, "a", parameter_name="weight", r=1, **options)
        wrapper.update_layer("b", r=2, **options)
        for parameter in wrapper.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        expected = module.weight.clone()
        for active in (["a"], ["a", "b"]):
            lhs, rhs, scaling = wrapper.get_delta_factors(active[-1])
            expected += scaling * lhs @ rhs
            with wrapper._activate_lora(active):
                torch.testing.assert_close(module.weight, expected)


def _lora_factors(wrapper: nn.Module, active_adapters: list[str]) -> list[lora.LoraFactors] | None:
    """The factors of the adapters that PEFT would add to the wrapped weight; None if they are not as expected.

    In the dtype of the weight, as in PEFT's own sum: adapters kept in fp32 get their gradients through a cast. Over an
    fp8 weight in their own.
    """
    if wrapper.parameter_name not in variants.weight_names(wrapper.get_base_layer()):
        return None
    factors = []
    try:
        experts, rows, columns = wrapper.get_param().shape
        for adapter in active_adapters:
            if adapter not in wrapper.lora_A:
                continue
            if wrapper.get_param().dtype == quant.FP8:
                uncast = integration_fp8.UncastFactors(wrapper, adapter)
                B, A, scaling = type(wrapper).get_delta_factors(uncast, adapter)
            else:
                B, A, scaling = wrapper.get_delta_factors(adapter)
            rank = A.shape[1]
            if (A.shape, B.shape) != ((experts, rank, columns), (experts, rows, rank)) or wrapper.lora_variant:
                raise TypeError("an adapter is not the product of two plain factors")
            factors.append(lora.LoraFactors(A, B, scaling))
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        return _warn_of_peft(f"{type(error).__name__}: {error}")
    return factors


@functools.cache
def _warn_of_peft(reason: str) -> None:
    warnings.warn(
        f"moe-grouped-gemm cannot take adapters on expert weights from PEFT ({reason}). Results are right all the same,"
        " but each forward makes W + BA for all experts.",
        stacklevel=2,
    )


def _mark(cls: type) -> type:
    """Give `kernelize` a name for `cls` if it carries Transformers' decorator, and find out about its gate."""
    # In transformers.integrations are FP8's, made anew for each module.
    if "_apply_gate" in vars(cls) and not cls.__module__.startswith("transformers.integrations."):
        variants.learn_gate(cls._apply_gate)
        _name_for_kernelize(cls, EXPERTS_LAYER, functools.partial(_may_replace_forward, cls))
    return cls


def stock_experts_class(config) -> type:
    """The experts class of the model that `config` belongs to, marked for `kernelize`."""
    _register_interface()
    _meet_peft()
    for config_class in type(config).__mro__:
        classes = _experts_classes(config_class.__module__.replace("configuration_", "modeling_"))
        if len(classes) == 1:
            return _mark(classes[0])
    raise TypeError(f"{type(config).__name__} is not the config of a Transformers model with one experts class")


def is_stock_experts(module: object) -> bool:
    """Whether the module is what some `stock_experts_class` makes."""
    return getattr(type(module), "kernel_layer_name", None) == EXPERTS_LAYER


def _experts_classes(modeling: str) -> list[type]:
    """The classes of a modeling file that carry Transformers' decorator; their names may point at stand-ins."""
    from .layers import MoEExpertsLayout

    def decorated():
        return [cls for cls in nn.Module.__subclasses__() if cls.__module__ == modeling and "_apply_gate" in vars(cls)]

    if not decorated() and MoEExpertsLayout in getattr(sys.modules.get(modeling), "__dict__", {}).values():
        # A load that failed while its model was built left the stand-in in place, and nothing else held the class.
        spec = importlib.util.find_spec(modeling)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return decorated()


def _fp8_experts_class() -> type:
    from transformers.integrations.finegrained_fp8 import FP8Experts

    return FP8Experts


@functools.cache
def _router_class() -> type:
    """Transformers' DeepseekV3TopkRouter; its name may point at our stand-in."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3

    path = modeling_deepseek_v3.__name__, ROUTER_LAYER
    return next(cls for cls in nn.Module.__subclasses__() if (cls.__module__, cls.__name__) == path)


def stock_router_class(config=None) -> type:
    """Transformers' DeepseekV3TopkRouter, marked for `kernelize`; there is one, whatever the config."""
    cls = _router_class()
    _name_for_kernelize(cls, ROUTER_LAYER, _may_replace_router)
    return cls


def is_stock_router(module: object) -> bool:
    return isinstance(module, _router_class())


@dataclass(frozen=True)
class _LoadedLayer:
    """A `kernels` layer repository that hands out a class of this package: nothing is resolved or loaded again."""

    layer: type

    def load(self) -> type:
        return self.layer


def _register_interface() -> None:
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    # FP8 models accept every name of the first interface, then look it up in the second.
    for interface in (ALL_EXPERTS_FUNCTIONS, ALL_FP8_EXPERTS_FUNCTIONS):
        interface.register(EXPERTS_IMPLEMENTATION, experts_forward)


def register() -> None:
    """Make this kernel available to Transformers.

    Afterwards `use_kernels=True` (or `kernelize`) puts it into every experts module that it can serve, FP8 ones among
    them, and into DeepSeek-V3's routers, in models loaded before or after, and `experts_implementation=
    "moe_grouped_gemm"` selects the experts by name. May be called again.

    Raises:
        ImportError: Transformers is older than 5.17 or lacks what we build on.
    """
    _check_versions()
    from kernels import Mode, register_kernel_mapping

    from .layers import DeepseekV3TopkRouter, FP8Experts, MoEExperts

    _register_interface()
    _meet_peft()
    layers = ((EXPERTS_LAYER, MoEExperts), (FP8_EXPERTS_LAYER, FP8Experts), (ROUTER_LAYER, DeepseekV3TopkRouter))
    for name, cls in layers:
        layer = _LoadedLayer(cls)
        modes = {Mode.INFERENCE | Mode.TORCH_COMPILE: layer, Mode.TRAINING | Mode.TORCH_COMPILE: layer}
        register_kernel_mapping({name: {"cuda": modes, "cpu": modes}})
    stock_router_class()
    _name_for_kernelize(_fp8_experts_class(), FP8_EXPERTS_LAYER, _may_replace_fp8)
    for cls in nn.Module.__subclasses__():
        _mark(cls)
    _mark_on_import()


def _mark_on_import() -> None:
    """Mark experts classes as their modeling files are imported: importing all of them now would take seconds."""
    from transformers import integrations
    from transformers.integrations import moe

    decorate = moe.use_experts_implementation
    if hasattr(decorate, "__wrapped__"):
        return  # already ours

    @functools.wraps(decorate)
    def use_experts_implementation(experts_class=None, **options):
        if experts_class is None:
            return lambda cls: _mark(decorate(cls, **options))
        return _mark(decorate(experts_class, **options))

    integrations.use_experts_implementation = moe.use_experts_implementation = use_experts_implementation


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
