"""A whole MoE block as one call: router, routed experts and shared experts; without gradients."""

from __future__ import annotations

import math
from typing import Callable, NamedTuple

import torch

from . import gpu, reference
from .experts import ops
from .experts.arguments import check_experts
from .experts.forward import forward as forward_on_gpu
from .reference import Gate, RouterForm, SharedExperts
from .router import ROUTER_FORM, ROUTER_TENSORS, check_router, empty_results, router_on_gpu
from .torch_ops import needs_op, register_op
from .weights import Projection, matrix_size


class Router(NamedTuple):
    """What `topk_router` takes beside hidden states: a weight (E, H), and twice (E,) or None."""

    weight: torch.Tensor
    e_score_correction_bias: torch.Tensor | None
    bias: torch.Tensor | None
    form: RouterForm


class Args(NamedTuple):
    """A block."""

    router: Router
    gate_up: Projection
    down: Projection
    gate: Gate
    shared: SharedExperts | None


def check_block(hidden_states, router, gate_up, down, gate) -> None:
    """Whether they fit together, as `topk_router` and `moe_experts` see it. Once is enough for tensors like these."""
    check_router(hidden_states, *router)
    weights = hidden_states.new_empty(hidden_states.shape[0], router.form.top_k)
    check_experts(hidden_states, weights.to(torch.int64), weights, gate_up, down, gate.activation, gate.limit)


def moe_block(hidden_states: torch.Tensor, args: Callable[[], Args], replays=None) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, H) -> (T, H), the chosen experts, weighted, plus the shared ones; and their weights (T, top_k). Unchecked.

    On a GPU four launches, where tokens are so few that `moe_experts` takes two and the weights are dense.

    replays: as `replays_of` makes them of `args`, for a caller who sees to it that what these return does not change,
        and is plain tensors.
    """
    if replays is not None and not needs_op(_moe_block_op, (hidden_states,)):
        return replays(hidden_states)
    router, gate_up, down, gate, shared = args()
    inputs = (hidden_states, *router[:3], *gate_up, *down, *(shared or _NO_SHARED))
    if needs_op(_moe_block_op, inputs):
        return _moe_block_op(*inputs, *router.form, *gate)
    return (_on_cpu if hidden_states.is_cpu else _on_gpu)(hidden_states, router, gate_up, down, gate, shared)


def replays_of(args: Callable[[], Args], tensors: Callable, returns_weights: bool):
    """What launches a block's kernels on a GPU again without what led to them; weights that nobody reads: None.

    tensors: those among `args`.
    """

    def function(hidden_states):
        return _on_gpu(hidden_states, *args())

    return gpu.launchers().Replays(function, tensors, (0, 1) if returns_weights else (0,), gpu.input_precision)


@gpu.on_its_device
def _on_gpu(hidden_states, router, gate_up, down, gate, shared):
    _, weights, ids = router_on_gpu(hidden_states, *router)
    return forward_on_gpu(hidden_states, ids, weights, gate_up, down, gate, True, shared), weights


def _on_cpu(hidden_states, router, gate_up, down, gate, shared):
    _, weights, ids = reference.topk_router(hidden_states, *router)
    return ops.forward_on_cpu(hidden_states, ids, weights, gate_up, down, gate, False, shared), weights


# --- as a torch op ----------------------------------------------------------------------------------------------------

_NO_SHARED = (None,) * len(SharedExperts._fields)
_OF_SHARED = ", ".join(f"Tensor? shared_{name}" for name in SharedExperts._fields)
_SIZES = [3, len(Projection._fields), len(Projection._fields), len(_NO_SHARED), len(RouterForm._fields)]


def _grouped(flat) -> Args:
    """The op's arguments after hidden_states."""
    tensors, gate_up, down, shared, form = (flat[sum(_SIZES[:i]) : sum(_SIZES[: i + 1])] for i in range(len(_SIZES)))
    shared = None if shared[0] is None else SharedExperts(*shared)
    router = Router(*tensors, RouterForm(*form))
    return Args(router, Projection(*gate_up), Projection(*down), Gate(*flat[sum(_SIZES) :]), shared)


def _forward(hidden_states, *flat):
    return (_on_cpu if hidden_states.is_cpu else _on_gpu)(hidden_states, *_grouped(flat))


def _fake(hidden_states, *flat):
    router, gate_up, down, gate, _ = _grouped(flat)
    check_block(hidden_states, router, gate_up, down, gate)
    _, weights, _ = empty_results(hidden_states, router.weight, router.form)
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format), weights


def _flops(hidden_states, *flat, **_):
    """Of shapes."""
    router, gate_up, down, _, shared = _grouped(flat)
    slots = hidden_states[0] * router.form.top_k
    routed = slots * sum(matrix_size(p.weight, p.scale) for p in (gate_up, down))
    others = [math.prod(shape) for shape in (router.weight, *(shared or ())) if shape is not None]
    return 2 * (routed + hidden_states[0] * sum(others))


_moe_block_op = register_op(
    "moe_block",
    f"(Tensor hidden_states, {ROUTER_TENSORS}, {ops.PROJECTIONS}, {_OF_SHARED}, {ROUTER_FORM}, {ops.GATE})"
    " -> (Tensor, Tensor)",
    _forward,
    fake=_fake,
    flops=_flops,
)
