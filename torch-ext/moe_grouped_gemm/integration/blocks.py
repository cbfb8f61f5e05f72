"""The MoE blocks of Transformers as one call of ours: router, experts and shared experts, in inference.

Where the shared experts are not what their class makes of plain linear layers (hooked, wrapped, adapted, quantised,
clamped), their modules are called, and what they return is added. Where that is so of router or experts, or a gradient
may be asked for, the forward of the block's class runs, and each part is served by itself.
"""

from __future__ import annotations

import inspect
from typing import Callable, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..block import Args, Router, check_block, moe_block, replays_of
from ..reference import Gate, SharedExperts
from ..torch_ops import are_transforms_active, is_autocast, is_traced, needs_gradients
from . import mapping, modules, routers, switching
from .block_trial import Block, block_of, shared_mlp_of
from .gates import is_as_its_class
from .kinds import Kind
from .recording import is_recorder, is_recording
from .router_forms import DTYPES, get, router_of
from .snapshot import Decisions, referred

_LINEAR = nn.Linear.forward

# For `kernelize`; and the name of the block in whose place the first of them came.
LAYER, OF_DEEPSEEK_V3 = "MoEBlock", "DeepseekV3MoE"
# The name that Transformers itself gives to gpt-oss's, for whatever kernel there is.
OF_TRANSFORMERS = "MegaBlocksMoeMLP"

# On a CPU each part is plain PyTorch, as cheap by itself.
SERVES_CPU, SERVES_GPU = False, True
REPEATS_ON_CPU = False


def block_forward(module: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Forward of a block, as a layer has it: what that of its class returns."""
    return serve(module, type(module).forward, hidden_states)


def serve(module: nn.Module, stock: Callable, *args, **kwargs):
    """What `module` computes, in one call or, where that cannot be, by `stock(module, ...)`, part by part."""
    if len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor):
        if SERVES_CPU if args[0].is_cpu else SERVES_GPU:
            results = _computed(module, args[0])
            if results is not None:
                return results
    return stock(module, *args, **kwargs)


def _computed(module: nn.Module, hidden_states: torch.Tensor):
    if hidden_states.ndim != 3 or are_transforms_active() or is_autocast(hidden_states) or _may_be_seen():
        return None
    if torch.compiler.is_compiling():
        block = _made(module, hidden_states)
        plan = None if block is None else _Plan(lambda: block, None, *block[3:])
    else:
        like = (hidden_states.dtype, hidden_states.device, hidden_states.shape[2])
        plan = _plans.of(module, like, hidden_states)
    if plan is None:
        return None
    if torch.is_grad_enabled() and needs_gradients((hidden_states, *plan.block().differentiable())):
        return None
    rows = hidden_states.reshape(-1, hidden_states.shape[2])
    out, weights = moe_block(rows, lambda: plan.block().args(), plan.replays)
    out = out.view(hidden_states.shape)
    if plan.apart is not None:
        out = out + _shared_apart(module, plan.apart, hidden_states)
    return (out, weights) if plan.returns_weights else out


def _shared_apart(module: nn.Module, found: Block, hidden_states: torch.Tensor) -> torch.Tensor:
    """As the block's class has them: their modules are called, whatever they are."""
    x = hidden_states if found.shared_rank == 3 else hidden_states.reshape(-1, hidden_states.shape[2])
    out = getattr(module, found.shared)(x)
    if found.shared_gate is not None:
        out = torch.sigmoid(getattr(module, found.shared_gate)(x)) * out
    return out.reshape(hidden_states.shape)


def _may_be_seen() -> bool:
    """Whether somebody looks on at every module, records what modules return, or traces."""
    everywhere = torch.nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks or is_traced():
        return True
    return not torch.compiler.is_compiling() and is_recording()


class _Block(NamedTuple):
    """What a module computes in one call."""

    router: Router
    experts: modules.Fused
    shared: SharedExperts | None
    apart: Block | None  # whose shared experts are called, and what they return added
    returns_weights: bool

    def tensors(self) -> tuple:
        return (*self.router[:3], *self.experts.gate_up, *self.experts.down, *(self.shared or ()))

    def differentiable(self) -> tuple:
        router, shared = self.router, self.shared
        return (router.weight, router.bias, *self.experts.differentiable(), *(shared or ()))

    def args(self) -> Args:
        return Args(self.router, *self.experts.projections(), self.experts.gate, self.shared)


class _Plan(NamedTuple):
    """A function that returns the block, without keeping its tensors alive, on a GPU its replays, and of the block:"""

    block: Callable[[], _Block]
    replays: object
    apart: Block | None
    returns_weights: bool


def _plan(module: nn.Module, hidden_states: torch.Tensor) -> _Plan | None:
    if any(map(parametrize.is_parametrized, module.modules())):
        return None
    block = _made(module, hidden_states)
    references = None if block is None else referred(module, block.tensors())
    if references is None:
        return None
    form, (gate, is_transposed), has_shared = block.router.form, block.experts[2:], block.shared is not None
    others = block[3:]

    def tensors():
        return [reference() for reference in references]

    def of_now():
        found = tensors()
        experts = modules.fused_of(found[3:13], gate, is_transposed)
        return _Block(Router(*found[:3], form), experts, SharedExperts(*found[13:]) if has_shared else None, *others)

    replays = None
    if REPEATS_ON_CPU if hidden_states.is_cpu else hidden_states.is_cuda:
        replays = replays_of(lambda: of_now().args(), tensors, block.returns_weights)
    return _Plan(of_now, replays, *others)


_plans = Decisions(_plan)


def _made(module: nn.Module, hidden_states: torch.Tensor) -> _Block | None:
    """None: part by part."""
    found = None if module.training else block_of(module, hidden_states.dtype)
    if found is None:
        return None
    router = _router(module, found, hidden_states)
    child = module._modules[found.experts]
    experts = modules.fused(child, hidden_states) if _is_served(child) else None
    if router is None or experts is None:
        return None
    shared = None if found.shared is None else _shared(module, found, experts.gate, hidden_states)
    apart = found if shared is None and found.shared is not None else None
    if not torch.compiler.is_compiling():
        check_block(hidden_states.reshape(-1, hidden_states.shape[2]), router, *experts.projections(), experts.gate)
    return _Block(router, experts, shared, apart, found.returns_weights)


def _router(module: nn.Module, found: Block, hidden_states: torch.Tensor) -> Router | None:
    child = module._modules[found.router]
    of_child = router_of(child, hidden_states.dtype)
    if of_child is None or not _is_served(child):
        return None
    given = [] if found.correction is None else [getattr(module, found.correction)]
    operands = routers.operands_of(child, of_child, hidden_states, given)
    if operands is None:
        return None
    form = of_child.form
    if found.factor != 1.0:
        if found.returns_weights:
            return None
        form = form._replace(routed_scaling_factor=form.routed_scaling_factor * found.factor)
    return Router(*operands, form)


def _shared(module: nn.Module, found: Block, gate: Gate, hidden_states: torch.Tensor) -> SharedExperts | None:
    mlp = module._modules[found.shared]
    names = shared_mlp_of(mlp, hidden_states.dtype)
    if names is None or not is_as_its_class(mlp) or gate.limit is not None or gate.activation != names.activation:
        return None
    linears = [mlp._modules[name] for name in names[:3]]
    if found.shared_gate is not None:
        linears.append(module._modules[found.shared_gate])
    weights = [_weight(linear, hidden_states) for linear in linears]
    if any(weight is None for weight in weights):
        return None
    inter, hidden_dim = len(weights[0]), hidden_states.shape[2]
    shapes = [(inter, hidden_dim), (inter, hidden_dim), (hidden_dim, inter), (1, hidden_dim)]
    if any(weight.shape != shape for weight, shape in zip(weights, shapes)):
        return None
    return SharedExperts(*weights)


def _weight(linear: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor | None:
    """Of nn.Linear itself, which computes with it and nothing else."""
    if type(linear) is not nn.Linear or nn.Linear.forward is not _LINEAR or linear.bias is not None:
        return None
    if not is_as_its_class(linear):
        return None
    weight = linear.weight
    is_ours = modules.is_plain(weight) and weight.dtype == hidden_states.dtype and weight.stride(1) == 1
    return weight if is_ours and weight.device == hidden_states.device else None


def _is_served(child: nn.Module) -> bool:
    """Whether calling it comes to us and to nobody else. torch.compile cannot see whether a recorder is idle."""
    is_idle = None if torch.compiler.is_compiling() else is_recorder
    is_ours = switching.is_switched_on(child) and switching.foreign_forward(child) is None
    return is_ours and is_as_its_class(child, is_idle)


# --- which classes ----------------------------------------------------------------------------------------------------


def may_be_block(cls: type) -> bool:
    """Whether to try: its forward takes hidden states alone and calls experts."""
    forward = inspect.unwrap(cls.forward)
    if "experts" not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return False
    kinds = [parameter.kind for parameter in inspect.signature(forward).parameters.values()]
    return kinds == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 2


def learn(module: nn.Module) -> None:
    """Find out ahead of torch.compile, for hidden states of any dtype; and what is on as a whole is on in its parts."""
    for dtype in DTYPES:
        found = block_of(module, dtype)
        if found is None:
            continue
        router, experts = module._modules[found.router], module._modules[found.experts]
        if modules.is_experts(experts) and routers.is_served(router):
            for part in (router, experts):
                name = getattr(type(part), "kernel_layer_name", None)
                if name is None or mapping.is_free(name, if_unknown=True):
                    switching.switch_on(part)
        if found.shared is not None:
            shared_mlp_of(module._modules[found.shared], dtype)


def is_known(module: nn.Module) -> bool:
    """Whether it is a block of ours for hidden states of some dtype."""
    return any(block_of(module, dtype) is not None for dtype in DTYPES)


def whole(module: nn.Module) -> _Block | None:
    """What it computes in one call, as it is now, where no gradient is asked for: the most of it, for some dtype."""
    if any(map(parametrize.is_parametrized, module.modules())):
        return None
    made = [block for block in (_whole_in(module, dtype) for dtype in DTYPES) if block is not None]
    return min(made, key=lambda block: block.apart is not None, default=None)


def _whole_in(module: nn.Module, dtype: torch.dtype) -> _Block | None:
    found = block_of(module, dtype)
    router = None if found is None else router_of(module._modules[found.router], dtype)
    if router is None:
        return None
    weight = get(module, f"{found.router}.{router.weight}")
    return _made(module, weight.new_empty(1, 1, weight.shape[1], dtype=dtype))


def _layer_of(cls: type) -> str:
    return OF_DEEPSEEK_V3 if cls.__name__ == OF_DEEPSEEK_V3 else LAYER


# As they are switched on it is their form alone that counts: their parts come after them.
KIND = Kind("MoE blocks", (LAYER, OF_DEEPSEEK_V3, OF_TRANSFORMERS), _layer_of, may_be_block, serve, learn, is_known)
