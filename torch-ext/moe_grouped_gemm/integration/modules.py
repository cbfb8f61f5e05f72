"""An experts module of Transformers: what it holds, read once into one value, and how we compute it.

Modules that carry `@use_experts_implementation` differ in `has_gate`, `has_bias`, `is_transposed`,
`has_post_expert_norm` and in `_apply_gate`, their own function (S, 2I) -> (S, I) between the GEMMs. `FP8Experts`, and
modules that quantizer.py fills, have codes, and scales beside them. If the function is one of our gates, the whole
layer is `moe_experts`; any other runs as it is between our grouped GEMMs.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import Callable, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from .. import functional, gpu
from ..experts import ops
from ..experts.arguments import check_experts
from ..experts.lora import LoraFactors
from ..reference import Gate
from ..torch_ops import are_transforms_active, is_autocast, needs_gradients, needs_op
from ..weights import Projection, are_quantized, quantize_fp4, quantize_fp8
from . import switching
from .adapters import adapters_of
from .gates import gate_of
from .sharing import ranks_of
from .snapshot import Decisions, referred

EXPERTS_IMPLEMENTATION = "moe_grouped_gemm"

# Where what was decided about a module is not asked again. On a CPU there are no launches for which that is too slow.
REPEATS_ON_CPU, REPEATS_ON_GPU = False, True

_DENSE = (torch.bfloat16, torch.float16, torch.float32)
_NONE = (None, None)


class Experts(NamedTuple):
    """What a module computes with, its weights as (E, N, K) whatever order it has them in.

    Attributes:
        gate_up: a weight, its bias and, of codes, the scales.
        down: likewise.
        gate: between the two products: one of ours, or the module's own function (S, 2I) -> (S, I).
        gated: if not, gate_up is (E, I, H) and the function (S, I) -> (S, I).
        norm: the module's own function of the rows (S, H) of the second product; or None.
        lora: the active adapters of each of the two weights.
    """

    gate_up: Projection
    down: Projection
    gate: Gate | Callable
    gated: bool
    norm: Callable | None
    lora: tuple[tuple[LoraFactors, ...], tuple[LoraFactors, ...]]


def weight_names(module: nn.Module) -> tuple[str, str]:
    return ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"), "down_proj"


def is_experts(module: nn.Module) -> bool:
    """Whether the module is an experts module as Transformers' own implementations expect one."""
    return hasattr(type(module), "_apply_gate") and hasattr(module, "config")


def is_plain(x: torch.Tensor | None) -> bool:
    """Whether this is a dense tensor that our kernels read, on a device that they run on."""
    return is_dense(x) and _unreadable(x) is None and _missing_triton(x) is None


def _unreadable(x: torch.Tensor) -> str | None:
    """What keeps our kernels from a tensor, whatever its dtype."""
    if x.device.type not in ("cuda", "cpu", "meta"):
        return f"on {x.device}"
    return f"a {type(x).__name__}" if hasattr(x, "__tensor_flatten__") else None


def _missing_triton(x: torch.Tensor) -> str | None:
    """While torch.compile traces, which does not see through an import, that is left to the op."""
    return None if x.device.type != "cuda" or torch.compiler.is_compiling() else gpu.missing_triton()


def is_dispatch(forward: Callable) -> bool:
    """Whether this is the forward that Transformers' decorator gives a class, perhaps below ours."""
    return switching.below_ours(forward).__code__ is _dispatch_code()


@functools.cache
def _dispatch_code():
    """What the forwards that Transformers' decorator makes have in common."""
    from transformers.integrations.moe import use_experts_implementation

    class Experts:
        def forward(self):
            pass

    return inspect.unwrap(use_experts_implementation)(Experts).forward.__code__


def is_fp8_experts(module: nn.Module) -> bool:
    """Also one that has been given dense weights in place of quantised ones."""
    if torch.compiler.is_compiling():  # which does not see through __dict__
        return hasattr(module, "activation_scheme")
    return "activation_scheme" in module.__dict__  # a miss of nn.Module's getattr takes over a microsecond


def is_ours_alone(module: nn.Module) -> bool:
    """Whether it holds codes that its class knows nothing of, and nobody else can compute."""
    return hasattr(module, "down_proj_scale_inv") and not is_fp8_experts(module)


def check_choice(module: nn.Module, implementation: str | None) -> None:
    """That this implementation can compute the experts module."""
    if is_ours_alone(module) and implementation != EXPERTS_IMPLEMENTATION:
        raise ValueError(
            f"experts_implementation: expected {EXPERTS_IMPLEMENTATION!r}, which alone computes "
            f"{type(module).__name__} in 4 bits, got {implementation!r}"
        )


def read(module: nn.Module, get: Callable = getattr) -> Experts:
    """Each parameter is asked for once: a parametrized one is computed anew every time, and may change as it is."""
    names = weight_names(module)
    up, down = (get(module, name, None) for name in names)
    biases = scales = _NONE
    if getattr(module, "has_bias", False):
        biases = tuple(getattr(module, f"{name}_bias") for name in names)
    if not (is_dense(up) or is_dense(down)):  # of which FP8Experts could cut no blocks, though it has scales
        scales = tuple(getattr(module, f"{name}_scale_inv", None) for name in names)
    adapters = adapters_of(module)
    lora = [tuple(factors for owner, factors in adapters if owner == name) for name in names]
    if getattr(module, "is_transposed", False):
        up, down = (weight.mT if weight is not None and weight.ndim == 3 else weight for weight in (up, down))
        lora = [tuple(LoraFactors(f.B.mT, f.A.mT, f.scaling) for f in factors) for factors in lora]
    gated = getattr(module, "has_gate", True)
    gate = (gate_of(module) or module._apply_gate) if gated else module.act_fn
    norm = module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None
    return Experts(*map(Projection, (up, down), biases, scales), gate, gated, norm, tuple(lora))


def obstacle(module: nn.Module, experts: Experts) -> str | None:
    """Why we do not compute this module; None if we do."""
    weights = experts[:2]
    for name, (weight, *_) in zip(weight_names(module), weights):
        if weight is None:
            return f"it has no {name}"
        if weight.ndim != 3:
            return f"{name} is {tuple(weight.shape)}, not (E, N, K)"
        reason = _unreadable(weight)
        if reason is None and not are_quantized(*weights) and weight.dtype not in _DENSE:
            reason = weight.dtype
        if reason is not None:
            return f"{name} is {reason}"
    reason = _missing_triton(experts.down.weight)
    return _obstacle_codes(module, experts) if reason is None and are_quantized(*weights) else reason


def _obstacle_codes(module: nn.Module, experts: Experts) -> str | None:
    weights = dict(zip(weight_names(module), experts[:2]))
    scheme = getattr(module, "activation_scheme", "dynamic")
    if scheme != "dynamic":
        return f"activation_scheme={scheme!r}"
    if all(quantize_fp4.is_packed(weight) for weight, *_ in weights.values()):
        for name, projection in weights.items():
            if projection.shape[2] % quantize_fp4.GROUP:
                return f"{name} in 4 bits is {projection.shape}, no multiple of {quantize_fp4.GROUP} columns"
        return None
    for name, (weight, *_) in weights.items():
        if weight.dtype != quantize_fp8.FP8:
            return f"{name} is {weight.dtype}"
    if module.block_size is None or tuple(module.block_size) != (quantize_fp8.BLOCK, quantize_fp8.BLOCK):
        return f"block_size={module.block_size}"
    inter = experts.down.weight.shape[2]
    if experts.gated and inter % quantize_fp8.BLOCK > quantize_fp8.BLOCK // 2:
        # As many blocks whether they are counted through gate and up, as by the module, or, as in checkpoints, apart.
        return f"its intermediate size is {inter}, neither a multiple of 128 nor at most 64 above one"
    return None


def peek(module: nn.Module) -> str | None:
    """`obstacle`, without computing a parametrized weight."""
    for name in weight_names(module):
        if parametrize.is_parametrized(module, name) and not hasattr(module.parametrizations[name], "original"):
            return f"{name} is made of several tensors"
    return obstacle(module, read(module, unparametrized))


def unparametrized(module: nn.Module, name: str, default: object = None) -> torch.Tensor | None:
    """As torch keeps it: of the shape and dtype of what it computes from that."""
    if parametrize.is_parametrized(module, name):
        return getattr(module.parametrizations[name], "original", default)  # none, if it is made of several tensors
    return getattr(module, name, default)


def is_empty(module: nn.Module) -> bool:
    """Whether its weights are elsewhere until its forward, as under ZeRO-3, FSDP2 and expert parallelism."""
    weights = list(module.parameters(recurse=False))
    return any(hasattr(weight, "to_local") or (weight.numel() == 0 and weight.ndim == 1) for weight in weights)


def is_dense(weight: torch.Tensor | None) -> bool:
    return weight is not None and weight.dtype in _DENSE


def experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Forward of a Transformers experts module that was told to run on this kernel by name.

    Where we cannot serve, Transformers' default takes over, or for weights that only the module understands its own
    loop over experts.

    Args:
        module: any that carries Transformers' decorator; under expert parallelism the local experts.
        hidden_states: (T, H).
        top_k_index: (T, top_k) integer; ids outside [0, E) are skipped.
        top_k_weights: (T, top_k).
    Returns:
        (T, H) in hidden_states.dtype.
    """
    return serve(module, _default_forward, hidden_states, top_k_index, top_k_weights)


def serve(module: nn.Module, stock: Callable, hidden_states, top_k_index, top_k_weights) -> torch.Tensor:
    """What `module` computes, by us or, where we cannot, by `stock(module, ...)`."""
    may_repeat = REPEATS_ON_CPU if hidden_states.is_cpu else REPEATS_ON_GPU
    if may_repeat and not torch.compiler.is_compiling():
        out = _computed_again(module, hidden_states, top_k_index, top_k_weights)
        if out is not None:
            return out
    experts = read(module)
    reason = obstacle(module, experts)
    if reason is None:
        out = _compute(experts, hidden_states, top_k_index, top_k_weights, module.training)
        return out.to(hidden_states.dtype)
    if any(experts.lora):
        raise RuntimeError(f"moe-grouped-gemm cannot compute adapters on {type(module).__name__}: {reason}")
    if is_ours_alone(module):
        raise RuntimeError(
            f"moe-grouped-gemm cannot compute {type(module).__name__} in 4 bits: {reason}. Nor can Transformers; load "
            "the model without quantization_config."
        )
    if not torch.compiler.is_compiling():
        _warn(type(module).__name__, reason)
    return stock(module, hidden_states, top_k_index, top_k_weights)


def _frozen(projection: Projection) -> Projection:
    """Codes get no gradient, as in Transformers, whatever their `requires_grad` says."""
    return projection._replace(weight=projection.weight.detach(), scale=projection.scale.detach())


class Fused(NamedTuple):
    """A module that is `moe_experts` and nothing else. Its weights are those that it has, (E, K, N) if transposed."""

    gate_up: Projection
    down: Projection
    gate: Gate
    is_transposed: bool

    def projections(self) -> tuple[Projection, Projection]:
        """As `moe_experts` takes them."""
        pair = self.gate_up, self.down
        if self.is_transposed:
            pair = tuple(p._replace(weight=p.weight.mT) for p in pair)
        return tuple(map(_frozen, pair)) if are_quantized(*pair) else pair

    def differentiable(self) -> list[torch.Tensor | None]:
        """What may get a gradient: no codes, and no scales of theirs."""
        biases = [self.gate_up.bias, self.down.bias]
        return biases if are_quantized(self.gate_up, self.down) else [*biases, self.gate_up.weight, self.down.weight]


def fused(module: nn.Module, hidden_states: torch.Tensor) -> Fused | None:
    """What the module is for hidden states of this dtype; None where there is more to a call."""
    experts = read(module)
    gate_up, down, gate, gated, norm, lora = experts
    if obstacle(module, experts) is not None or not (isinstance(gate, Gate) and gated and norm is None) or any(lora):
        return None
    dtype = hidden_states.dtype
    if not are_quantized(gate_up, down) and gate_up.weight.dtype != dtype:
        return None
    if any(p.bias is not None and p.bias.dtype != dtype for p in (gate_up, down)):
        return None
    pair = gate_up, down
    is_transposed = getattr(module, "is_transposed", False)
    if is_transposed:
        pair = (p._replace(weight=getattr(module, name)) for p, name in zip(pair, weight_names(module)))
    return Fused(*pair, gate, is_transposed)


def _computed_again(module: nn.Module, hidden_states, top_k_index, top_k_weights) -> torch.Tensor | None:
    """As `_compute`, without looking again at what has not changed; None where that is not enough."""
    inputs = (hidden_states, top_k_index, top_k_weights)
    if not all(type(x) is torch.Tensor for x in inputs) or hidden_states.ndim != 2 or top_k_index.ndim != 2:
        return None
    if top_k_index.shape != top_k_weights.shape or len(hidden_states) != len(top_k_index):
        return None
    if are_transforms_active() or is_autocast(hidden_states) or needs_op(ops.moe_experts, inputs):
        return None
    # The adapters of a module it does not tell itself.
    if hidden_states.requires_grad or top_k_weights.requires_grad or adapters_of(module):
        return None
    like = (hidden_states.device, hidden_states.shape[1], top_k_index.shape[1], *(x.dtype for x in inputs))
    plan = _plans.of(module, like, *inputs)
    if plan is None:
        return None
    run, differentiable = plan
    if torch.is_grad_enabled() and needs_gradients(differentiable()):
        return None
    return run(*inputs)[0]


def _plan(module: nn.Module, hidden_states, top_k_index, top_k_weights) -> tuple[Callable, Callable] | None:
    """What computes it, and what returns the tensors of which it has no gradients."""
    if parametrize.is_parametrized(module):
        return None
    experts, quantize_activations = fused(module, hidden_states), not module.training
    if experts is None:
        return None
    gate, is_transposed = experts[2:]
    inputs = (hidden_states, top_k_index, top_k_weights)
    check_experts(*inputs, *experts.projections(), gate.activation, gate.limit)
    references = referred(module, (*experts.gate_up, *experts.down))
    if references is None:
        return None

    ranks = ranks_of(module, top_k_index.shape[1])

    def tensors():
        return [reference() for reference in references]

    def function(*inputs):
        projections = fused_of(tensors(), gate, is_transposed).projections()
        return (ops.forward_on_gpu(*inputs, *projections, gate, quantize_activations, None, ranks),)

    replays = gpu.launchers().Replays(function, tensors, (0,), gpu.input_precision)
    return replays, lambda: fused_of(tensors(), gate, is_transposed).differentiable()


def fused_of(tensors: list, gate: Gate, is_transposed: bool) -> Fused:
    """Of (*gate_up, *down)."""
    fields = len(Projection._fields)
    return Fused(Projection(*tensors[:fields]), Projection(*tensors[fields:]), gate, is_transposed)


def _elsewhere(plan: tuple[Callable, Callable]) -> tuple[Callable, Callable]:
    """For weights in other memory: what is launched depends on where they are, nothing else does."""
    run, differentiable = plan
    return run.elsewhere(), differentiable


_plans = Decisions(_plan, _elsewhere)


@functools.cache
def _warn(name: str, reason: str) -> None:
    warnings.warn(
        f"moe-grouped-gemm does not serve {name}, as {reason}; Transformers computes it as without this kernel.",
        stacklevel=2,
    )


def _default_forward(module: nn.Module, *args) -> torch.Tensor:
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    weights = [unparametrized(module, name) for name in weight_names(module)]
    if all(map(is_dense, weights)) and not any(hasattr(weight, "__tensor_flatten__") for weight in weights):
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, *args)
    if is_fp8_experts(module):
        return ALL_FP8_EXPERTS_FUNCTIONS["grouped_mm"](module, *args)
    # The innermost function is the eager one: FP8Experts is decorated anew for every module.
    return inspect.unwrap(type(module).forward)(module, *args)


def _compute(experts: Experts, hidden_states, top_k_index, top_k_weights, training: bool) -> torch.Tensor:
    """(T, H) in the dtype of the weights, as by Transformers' grouped_mm: under autocast, norms hand over fp32."""
    gate_up, down, gate, gated, norm, lora = experts
    if are_quantized(gate_up, down):
        gate_up, down = _frozen(gate_up), _frozen(down)
    else:
        hidden_states = hidden_states.to(gate_up.weight.dtype)
    gate_up, down = (p if p.bias is None else p._replace(bias=p.bias.to(hidden_states.dtype)) for p in (gate_up, down))
    inputs = (hidden_states, top_k_index, top_k_weights, gate_up.weight, down.weight)
    others = dict(gate_up_proj_bias=gate_up.bias, down_proj_bias=down.bias)
    others.update(gate_up_proj_scale=gate_up.scale, down_proj_scale=down.scale)
    if isinstance(gate, Gate) and gated and norm is None and not any(lora):
        activation, limit, alpha, interleaved = gate
        # Activations stay as they are while it trains: the first pass of reentrant checkpointing has no gradients.
        others["quantize_activations"] = not training
        return functional.moe_experts(*inputs, activation, limit=limit, alpha=alpha, interleaved=interleaved, **others)
    return functional.moe_experts_lora(*inputs, *lora, gate, norm=norm, gated=gated, **others)


def runs_composed(module: nn.Module) -> bool:
    """Whether the module's gate or norm runs as it is, between our GEMMs."""
    experts = read(module, unparametrized)
    return not isinstance(experts.gate, Gate) or experts.norm is not None
