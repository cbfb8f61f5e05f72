"""DeepSeek-V3's router in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .grouped import acc_dtype


def router_dtype(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    return torch.promote_types(acc_dtype(hidden_states), weight.dtype)


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
    """Arguments and results as `moe_grouped_gemm.topk_router`; differentiable."""
    dtype = router_dtype(hidden_states, weight)
    with torch.autocast(hidden_states.device.type, enabled=False):
        router_logits = F.linear(hidden_states.to(dtype), weight.to(dtype))
    scores = router_logits.sigmoid()
    # Stable sorts, not topk: among equals the lower index comes first.
    choice = (scores + e_score_correction_bias.to(dtype)).detach()
    if topk_group < num_group:
        groups = choice.unflatten(1, (num_group, -1))
        group_scores = groups.topk(2, dim=-1)[0].sum(dim=-1)
        others = group_scores.sort(dim=1, descending=True, stable=True)[1][:, topk_group:, None]
        choice = groups.scatter(1, others.expand(-1, -1, groups.shape[2]), float("-inf")).flatten(1)
    topk_indices = choice.sort(dim=1, descending=True, stable=True)[1][:, :top_k].contiguous()
    topk_weights = scores.gather(1, topk_indices)
    if norm_topk_prob:
        topk_weights = topk_weights / (topk_weights.sum(dim=1, keepdim=True) + 1e-20)
    return router_logits, topk_weights * routed_scaling_factor, topk_indices
