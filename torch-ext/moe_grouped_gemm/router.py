"""DeepSeek-V3's router as a public function: checks, the choice of path, and gradients."""

from __future__ import annotations

import torch

from . import gpu, reference, tuning
from .checks import FLOATS, device_type, shape
from .torch_ops import needs_gradients, needs_op, register_autograd, register_op, rejects_transforms, without_autocast
from .weights.layout import by_rows


@rejects_transforms
def topk_router(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    e_score_correction_bias: torch.Tensor,
    top_k: int,
    num_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Group-limited top-k of sigmoid scores; differentiable in hidden_states and weight through both float results.

    router_logits = hidden_states @ weight^T,  score = sigmoid(router_logits),  choice = score + e_score_correction_bias

    The experts form num_group groups of neighbours. The topk_group groups whose two greatest choices have the greatest
    sum win, and of their experts the top_k of greatest choice; experts of other groups follow only if those are too
    few. Equals: the lower index wins. NaN ranks above all, as in torch.topk.
    topk_weights = score of the chosen, over their sum + 1e-20 if norm_topk_prob, times routed_scaling_factor.

    Args:
        hidden_states: (T, H) bf16, fp16 or fp32 (fp64 on CPU).
        weight: (E, H), any of these dtypes. Of two 16-bit operands products are exact; otherwise the GEMM is in fp32.
        e_score_correction_bias: (E,), any of these dtypes; gets no gradient.
        top_k: at most E.
        num_group: divides E into groups of at least two.
        topk_group: at most num_group.
    Returns:
        router_logits (T, E) and topk_weights (T, top_k), fp32 (fp64 if an operand is), and topk_indices (T, top_k)
        int64, by descending choice. At most two launches and no host sync on a GPU.
    Raises:
        ValueError: shapes, devices or numbers do not fit together.
        TypeError: a dtype is not supported.
        ImportError: on a GPU without Triton >= 3.6.

    `torch.autocast` changes nothing here: fp32 logits are what a router is kept out of bf16 for.
    """
    _check(hidden_states, weight, e_score_correction_bias, top_k, num_group, topk_group)
    inputs = (hidden_states, weight, e_score_correction_bias, top_k, num_group, topk_group)
    inputs += (norm_topk_prob, routed_scaling_factor)
    # As in functional.py: only those who need a custom op pay for one.
    if needs_op(_topk_router_op, inputs[:3]):
        return _topk_router_op(*inputs)
    if hidden_states.device.type == "cpu":
        return reference.topk_router(*inputs)
    if needs_gradients((hidden_states, weight)):
        return _topk_router_op(*inputs)
    return _router_gpu(*inputs)


@gpu.on_its_device
def _router_gpu(hidden_states, weight, bias, top_k, num_group, topk_group, norm_topk_prob, routed_scaling_factor):
    tokens = hidden_states.shape[0]
    if tokens == 0:
        return _empty(hidden_states, weight, top_k)
    kernels, device = gpu.launchers(), hidden_states.device.index
    hidden_states, weight = by_rows(hidden_states), by_rows(weight)
    dtype = hidden_states.dtype if weight.dtype == hidden_states.dtype else torch.float32
    partials = kernels.router_logits(hidden_states, weight, tuning.router_config(tokens, dtype, gpu.traits(device)))
    return kernels.router_topk(
        partials, bias.contiguous(), top_k, num_group, topk_group, norm_topk_prob, routed_scaling_factor
    )


def _router_forward(hidden_states, *args):
    forward = reference.topk_router if hidden_states.device.type == "cpu" else _router_gpu
    return forward(hidden_states, *args)


def _empty(hidden_states, weight, top_k, *_):
    dtype = reference.router_dtype(hidden_states, weight)
    tokens = hidden_states.shape[0]
    return (
        hidden_states.new_empty(tokens, weight.shape[0], dtype=dtype),
        hidden_states.new_empty(tokens, top_k, dtype=dtype),
        hidden_states.new_empty(tokens, top_k, dtype=torch.int64),
    )


_topk_router_op = register_op(
    "topk_router",
    "(Tensor hidden_states, Tensor weight, Tensor e_score_correction_bias, int top_k, int num_group, int topk_group,"
    " bool norm_topk_prob, float routed_scaling_factor) -> (Tensor, Tensor, Tensor)",
    _router_forward,
    fake=lambda hidden_states, weight, bias, top_k, *_: _empty(hidden_states, weight, top_k),
    flops=lambda hidden_states, weight, *_, **__: 2 * hidden_states[0] * weight[0] * weight[1],
)


def _setup_context(ctx, inputs, output):
    hidden_states, weight, *_, ctx.norm_topk_prob, ctx.routed_scaling_factor = inputs
    router_logits, _, topk_indices = output
    ctx.save_for_backward(hidden_states, weight, router_logits, topk_indices)


def _backward(ctx, dlogits, dweights, _):
    hidden_states, weight, router_logits, topk_indices = ctx.saved_tensors
    if dweights is not None:
        scores = router_logits.gather(1, topk_indices).sigmoid()
        dscores = dweights * ctx.routed_scaling_factor
        if ctx.norm_topk_prob:
            total = scores.sum(dim=1, keepdim=True) + 1e-20
            dscores = (dscores - (dscores * scores).sum(dim=1, keepdim=True) / total) / total
        # Not scatter_add: on CUDA that is atomic. The experts of a token are distinct.
        of_weights = torch.zeros_like(router_logits).scatter(1, topk_indices, dscores * scores * (1 - scores))
        dlogits = of_weights if dlogits is None else dlogits + of_weights
    needs_x, needs_weight, *_ = ctx.needs_input_grad
    dx = dweight = None
    with without_autocast(dlogits):
        if needs_x:
            dx = (dlogits @ weight.to(dlogits.dtype)).to(hidden_states.dtype)
        if needs_weight:
            dweight = (dlogits.T @ hidden_states.to(dlogits.dtype)).to(weight.dtype)
    return dx, dweight, *(None,) * 6


register_autograd(_topk_router_op, _backward, _setup_context)


def _check(hidden_states, weight, e_score_correction_bias, top_k, num_group, topk_group) -> None:
    allowed = FLOATS[device_type("hidden_states", hidden_states)]
    for name, x in (
        ("hidden_states", hidden_states),
        ("weight", weight),
        ("e_score_correction_bias", e_score_correction_bias),
    ):
        if x.dtype not in allowed:
            raise TypeError(f"{name}: expected one of {', '.join(map(str, allowed))}, got {x.dtype}")
        if x.device != hidden_states.device:
            raise ValueError(f"{name}: expected on {hidden_states.device} like hidden_states, got {x.device}")
    if hidden_states.ndim != 2:
        raise ValueError(f"hidden_states: expected (T, H), got {shape(hidden_states)}")
    if weight.ndim != 2 or weight.shape[1] != hidden_states.shape[1]:
        raise ValueError(f"weight: expected (E, {hidden_states.shape[1]}) to fit hidden_states, got {shape(weight)}")
    experts = weight.shape[0]
    if e_score_correction_bias.shape != (experts,):
        raise ValueError(
            f"e_score_correction_bias: expected ({experts},) to fit weight, got {shape(e_score_correction_bias)}"
        )
    if num_group < 1 or experts % num_group or experts < 2 * num_group:
        raise ValueError(f"num_group: expected to divide {experts} experts into groups of at least 2, got {num_group}")
    if not 1 <= topk_group <= num_group:
        raise ValueError(f"topk_group: expected 1 to {num_group} (num_group), got {topk_group}")
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k: expected 1 to {experts} (the experts), got {top_k}")
