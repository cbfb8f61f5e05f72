"""Routers in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .grouped import acc_dtype


class RouterForm(NamedTuple):
    """What a router makes of logits, as the arguments of `moe_grouped_gemm.topk_router` of these names say."""

    top_k: int
    num_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    scoring: str = "sigmoid"
    choose_by: str = "scores"
    group_score: str = "top2"
    norm_eps: float = 1e-20
    norm_min: float = 0.0
    product_dtype: torch.dtype | None = None
    logits_dtype: torch.dtype | None = None
    scores_dtype: torch.dtype | None = None
    weights_dtype: torch.dtype | None = None


SCORES = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: logits.softmax(dim=1),
    "sqrtsoftplus": lambda logits: F.softplus(logits),  # the root is taken of its rounding
    "softmax_of_chosen": lambda logits: logits,  # until they are chosen
}


def router_dtype(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """That of everything for which a RouterForm names none."""
    return torch.promote_types(acc_dtype(hidden_states), weight.dtype)


def topk_router(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    e_score_correction_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    form: RouterForm,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tensors and results as `moe_grouped_gemm.topk_router`; differentiable."""
    dtype = router_dtype(hidden_states, weight)
    with torch.autocast(hidden_states.device.type, enabled=False):
        logits = F.linear(hidden_states.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    logits = rounded(logits, form.product_dtype)
    scores = router_scores(logits, form)
    topk_indices = router_choice(logits, scores, e_score_correction_bias, form)
    # Stable sorts, not topk: among equals the lower index comes first.
    topk_indices = topk_indices.sort(dim=1, descending=True, stable=True)[1][:, : form.top_k].contiguous()
    topk_weights = router_weights(scores.gather(1, topk_indices), form)
    return logits.to(form.logits_dtype or dtype), topk_weights.to(form.weights_dtype or dtype), topk_indices


def router_scores(logits: torch.Tensor, form: RouterForm) -> torch.Tensor:
    scores = rounded(SCORES[form.scoring](logits), form.scores_dtype)
    return rounded(scores.sqrt(), form.scores_dtype) if form.scoring == "sqrtsoftplus" else scores


def router_choice(
    logits: torch.Tensor, scores: torch.Tensor, e_score_correction_bias: torch.Tensor | None, form: RouterForm
) -> torch.Tensor:
    """(T, E) numbers, of which the top_k greatest are chosen."""
    choice = (logits if form.choose_by == "logits" else scores).detach()
    if e_score_correction_bias is not None:
        choice = choice + e_score_correction_bias.to(choice.dtype)
    if form.topk_group == form.num_group:
        return choice
    groups = choice.unflatten(1, (form.num_group, -1))
    greatest = 2 if form.group_score == "top2" else 1
    group_scores = groups.topk(greatest, dim=-1)[0].sum(dim=-1)
    if e_score_correction_bias is None:  # which makes fp32 of a sum
        group_scores = rounded(group_scores, form.scores_dtype)
    others = group_scores.sort(dim=1, descending=True, stable=True)[1][:, form.topk_group :, None]
    return groups.scatter(1, others.expand(-1, -1, groups.shape[2]), float("-inf")).flatten(1)


def router_weights(scores: torch.Tensor, form: RouterForm) -> torch.Tensor:
    """(T, top_k) scores of the chosen -> their weights."""
    if form.scoring == "softmax_of_chosen":
        scores = scores.softmax(dim=1)
    if form.norm_topk_prob:
        scores = scores / (scores.sum(dim=1, keepdim=True) + form.norm_eps).clamp(min=form.norm_min)
    return scores * form.routed_scaling_factor


def router_weights_backward(
    dweights: torch.Tensor, logits: torch.Tensor, topk_indices: torch.Tensor, form: RouterForm
) -> torch.Tensor:
    """(T, top_k) gradient of the weights -> (T, E) of the logits, in their dtype; roundings have the slope 1."""
    chosen, is_softmax = logits.gather(1, topk_indices), form.scoring == "softmax"
    scores = router_scores(logits if is_softmax else chosen, form)
    of_chosen = scores.gather(1, topk_indices) if is_softmax else scores
    if form.scoring == "softmax_of_chosen":
        of_chosen = chosen.softmax(dim=1)
    dscores = dweights * form.routed_scaling_factor
    if form.norm_topk_prob:
        total = of_chosen.sum(dim=1, keepdim=True) + form.norm_eps
        passes = total >= form.norm_min
        total = total.clamp(min=form.norm_min)
        through_total = (dscores * of_chosen).sum(dim=1, keepdim=True) / total
        dscores = (dscores - through_total * passes) / total
    # Not scatter_add: on CUDA that is atomic. The experts of a token are distinct.
    if is_softmax:
        dscores = torch.zeros_like(logits).scatter(1, topk_indices, dscores)
        return scores * (dscores - (dscores * scores).sum(dim=1, keepdim=True))
    if form.scoring == "sigmoid":
        dchosen = dscores * of_chosen * (1 - of_chosen)
    elif form.scoring == "sqrtsoftplus":
        dchosen = dscores * chosen.sigmoid() / (2 * of_chosen)
    else:
        dchosen = of_chosen * (dscores - (dscores * of_chosen).sum(dim=1, keepdim=True))
    return torch.zeros_like(logits).scatter(1, topk_indices, dchosen)


def rounded(x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Through this dtype, in its own."""
    return x if dtype is None else x.to(dtype).to(x.dtype)
