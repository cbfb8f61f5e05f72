"""Routers as a public function: checks, the choice of path, and gradients."""

from __future__ import annotations

import torch

from . import gpu, reference, tuning
from .checks import FLOATS, device_type, shape
from .reference import RouterForm
from .torch_ops import needs_gradients, needs_op, register_autograd, register_op, rejects_transforms, without_autocast
from .weights.layout import by_rows, contiguous

_CHOICES = {
    "scoring": tuple(reference.SCORES),
    "choose_by": ("scores", "logits"),
    "group_score": ("top2", "max"),
}


@rejects_transforms
def topk_router(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    e_score_correction_bias: torch.Tensor | None,
    top_k: int,
    num_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    *,
    bias: torch.Tensor | None = None,
    scoring: str = "sigmoid",
    choose_by: str = "scores",
    group_score: str = "top2",
    norm_eps: float = 1e-20,
    norm_min: float = 0.0,
    product_dtype: torch.dtype | None = None,
    logits_dtype: torch.dtype | None = None,
    scores_dtype: torch.dtype | None = None,
    weights_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Top-k experts of each token, and their weights; differentiable in hidden_states, weight and bias.

    router_logits = hidden_states @ weight^T + bias, score = f(router_logits), choice = score + e_score_correction_bias

    The top_k experts of greatest choice win. In groups: the experts form num_group groups of neighbours. The topk_group
    groups of greatest score win, and of their experts the top_k of greatest choice; experts of other groups follow only
    if those are too few. Equals: the lower index wins. NaN ranks above all, as in torch.topk.
    topk_weights = score of the chosen, over max(their sum + norm_eps, norm_min) if norm_topk_prob, times
    routed_scaling_factor. The defaults are DeepSeek-V3's.

    Args:
        hidden_states: (T, H) bf16, fp16 or fp32 (fp64 on CPU).
        weight: (E, H), any of these dtypes. Of two 16-bit operands products are exact; otherwise the GEMM is in fp32.
        e_score_correction_bias: (E,), any of these dtypes; gets no gradient. None: there is none.
        top_k: at most E.
        num_group: divides E into groups, of at least two experts if group_score is "top2".
        topk_group: at most num_group.
        bias: (E,), any of these dtypes; or None.
        scoring: "sigmoid", "softmax" over all experts, "sqrtsoftplus", sqrt(log(1 + exp(logit))), as in DeepSeek-V4, or
            "softmax_of_chosen", over the logits of the chosen.
        choose_by: "scores"; or "logits", to which e_score_correction_bias is then added. The latter is all that
            "softmax_of_chosen" allows.
        group_score: of a group, "top2", the sum of its two greatest choices, or "max", the greatest.
        product_dtype, scores_dtype: bf16 or fp16, to which the logits, or the scores, are rounded, as by a module that
            computes them in it; "sqrtsoftplus" before its root as well, and sums of scores without a correction bias.
            None is fp32 (fp64, if an operand is).
        logits_dtype, weights_dtype: of the results; None is fp32 (fp64, if an operand is). Logits in 16 bits are so in
            product_dtype: a gradient starts from them.
    Returns:
        router_logits (T, E), topk_weights (T, top_k) and topk_indices (T, top_k) int64, by descending choice. At most
        two launches and no host sync on a GPU.
    Raises:
        ValueError: shapes, devices or numbers do not fit together.
        TypeError: a dtype is not supported.
        ImportError: on a GPU without Triton >= 3.6.

    `torch.autocast` changes nothing here: fp32 logits are what a router is kept out of bf16 for.
    """
    form = RouterForm(
        top_k,
        num_group,
        topk_group,
        norm_topk_prob,
        routed_scaling_factor,
        scoring,
        choose_by,
        group_score,
        norm_eps,
        norm_min,
        product_dtype,
        logits_dtype,
        scores_dtype,
        weights_dtype,
    )
    return route_tokens(hidden_states, weight, e_score_correction_bias, bias, form)


def route_tokens(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    e_score_correction_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    form: RouterForm,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`topk_router`, with the rest of its arguments in one value."""
    check_router(hidden_states, weight, e_score_correction_bias, bias, form)
    tensors = (hidden_states, weight, e_score_correction_bias, bias)
    # As in functional.py: only those who need a custom op pay for one.
    if needs_op(_topk_router_op, tensors):
        return _topk_router_op(*tensors, *form)
    if hidden_states.device.type == "cpu":
        return reference.topk_router(*tensors, form)
    if needs_gradients((hidden_states, weight, bias)):
        return _topk_router_op(*tensors, *form)
    return router_on_gpu(*tensors, form)


@gpu.on_its_device
def router_on_gpu(hidden_states, weight, e_score_correction_bias, bias, form):
    tokens = hidden_states.shape[0]
    if tokens == 0:
        return empty_results(hidden_states, weight, form)
    kernels, device = gpu.launchers(), hidden_states.device.index
    hidden_states, weight = by_rows(hidden_states), by_rows(weight)
    dtype = hidden_states.dtype if weight.dtype == hidden_states.dtype else torch.float32
    partials = kernels.router_logits(hidden_states, weight, tuning.router_config(tokens, dtype, gpu.traits(device)))
    return kernels.router_topk(partials, contiguous(bias), contiguous(e_score_correction_bias), form)


def _router_forward(hidden_states, weight, e_score_correction_bias, bias, *form):
    forward = reference.topk_router if hidden_states.device.type == "cpu" else router_on_gpu
    return forward(hidden_states, weight, e_score_correction_bias, bias, RouterForm(*form))


def empty_results(hidden_states, weight, form):
    """Of the shapes and dtypes of `topk_router`'s."""
    dtype = reference.router_dtype(hidden_states, weight)
    tokens = hidden_states.shape[0]
    return (
        hidden_states.new_empty(tokens, weight.shape[0], dtype=form.logits_dtype or dtype),
        hidden_states.new_empty(tokens, form.top_k, dtype=form.weights_dtype or dtype),
        hidden_states.new_empty(tokens, form.top_k, dtype=torch.int64),
    )


ROUTER_TENSORS = "Tensor weight, Tensor? e_score_correction_bias, Tensor? bias"
ROUTER_FORM = (
    "int top_k, int num_group, int topk_group, bool norm_topk_prob, float routed_scaling_factor, str scoring,"
    " str choose_by, str group_score, float norm_eps, float norm_min, ScalarType? product_dtype,"
    " ScalarType? logits_dtype, ScalarType? scores_dtype, ScalarType? weights_dtype"
)

_topk_router_op = register_op(
    "topk_router",
    f"(Tensor hidden_states, {ROUTER_TENSORS}, {ROUTER_FORM}) -> (Tensor, Tensor, Tensor)",
    _router_forward,
    fake=lambda hidden_states, weight, correction, bias, *form: empty_results(hidden_states, weight, RouterForm(*form)),
    flops=lambda hidden_states, weight, *_, **__: 2 * hidden_states[0] * weight[0] * weight[1],
)


def _setup_context(ctx, inputs, output):
    hidden_states, weight, _, bias, *form = inputs
    ctx.form, ctx.bias_dtype = RouterForm(*form), None if bias is None else bias.dtype
    router_logits, _, topk_indices = output
    ctx.save_for_backward(hidden_states, weight, router_logits, topk_indices)


def _backward(ctx, dlogits, dweights, _):
    hidden_states, weight, router_logits, topk_indices = ctx.saved_tensors
    dtype = reference.router_dtype(hidden_states, weight)
    if dlogits is not None:
        dlogits = dlogits.to(dtype)
    if dweights is not None:
        logits, dweights = router_logits.to(dtype), dweights.to(dtype)
        of_weights = reference.router_weights_backward(dweights, logits, topk_indices, ctx.form)
        dlogits = of_weights if dlogits is None else dlogits + of_weights
    needs_x, needs_weight, _, needs_bias, *_ = ctx.needs_input_grad
    dx = dweight = dbias = None
    with without_autocast(dlogits):
        if needs_bias:
            dbias = dlogits.sum(dim=0).to(ctx.bias_dtype)
        dlogits = dlogits.to(ctx.form.product_dtype or dtype)  # of the two products, as of the one of the forward
        if needs_x:
            dx = (dlogits @ weight.to(dlogits.dtype)).to(hidden_states.dtype)
        if needs_weight:
            dweight = (dlogits.T @ hidden_states.to(dlogits.dtype)).to(weight.dtype)
    return dx, dweight, None, dbias, *(None,) * len(ctx.form)


register_autograd(_topk_router_op, _backward, _setup_context)


def check_router(hidden_states, weight, e_score_correction_bias, bias, form) -> None:
    allowed = FLOATS[device_type("hidden_states", hidden_states)]
    for name, x in (
        ("hidden_states", hidden_states),
        ("weight", weight),
        ("e_score_correction_bias", e_score_correction_bias),
        ("bias", bias),
    ):
        if x is None:
            continue
        if x.dtype not in allowed:
            raise TypeError(f"{name}: expected one of {', '.join(map(str, allowed))}, got {x.dtype}")
        if x.device != hidden_states.device:
            raise ValueError(f"{name}: expected on {hidden_states.device} like hidden_states, got {x.device}")
    if hidden_states.ndim != 2:
        raise ValueError(f"hidden_states: expected (T, H), got {shape(hidden_states)}")
    if weight.ndim != 2 or weight.shape[1] != hidden_states.shape[1]:
        raise ValueError(f"weight: expected (E, {hidden_states.shape[1]}) to fit hidden_states, got {shape(weight)}")
    experts = weight.shape[0]
    for name, x in (("e_score_correction_bias", e_score_correction_bias), ("bias", bias)):
        if x is not None and x.shape != (experts,):
            raise ValueError(f"{name}: expected ({experts},) to fit weight, got {shape(x)}")
    _check_form(form, experts, allowed)


def _check_form(form: RouterForm, experts: int, allowed: tuple[torch.dtype, ...]) -> None:
    for name, choices in _CHOICES.items():
        if getattr(form, name) not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(form, name)!r}")
    if form.scoring == "softmax_of_chosen" and form.choose_by != "logits":
        raise ValueError(f"choose_by: expected logits with scoring={form.scoring!r}, got {form.choose_by!r}")
    num_group, fewest = form.num_group, 2 if form.group_score == "top2" else 1
    if num_group < 1 or experts % num_group or experts < fewest * num_group:
        # One group is no group: its score decides nothing.
        if num_group != 1:
            raise ValueError(
                f"num_group: expected to divide {experts} experts into groups of at least {fewest}, got {num_group}"
            )
    if not 1 <= form.topk_group <= num_group:
        raise ValueError(f"topk_group: expected 1 to {num_group} (num_group), got {form.topk_group}")
    if not 1 <= form.top_k <= experts:
        raise ValueError(f"top_k: expected 1 to {experts} (the experts), got {form.top_k}")
    for name in ("product_dtype", "logits_dtype", "scores_dtype", "weights_dtype"):
        dtype = getattr(form, name)
        if dtype is not None and dtype not in allowed:
            raise TypeError(f"{name}: expected None or one of {', '.join(map(str, allowed))}, got {dtype}")
    if form.logits_dtype in (torch.bfloat16, torch.float16) and form.logits_dtype != form.product_dtype:
        raise ValueError(
            f"logits_dtype: expected None, torch.float32 or product_dtype ({form.product_dtype}), "
            f"got {form.logits_dtype}"
        )
