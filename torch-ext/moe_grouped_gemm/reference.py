"""The expert layer and the router in plain torch: the CPU path, the experts' backward for now, and what tests and
benchmarks compare with.

Everything here works in any float dtype (fp64 makes it an oracle), is deterministic on the CPU, and reads the number of
rows of each expert on the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Before 2.11 torch's grouped_mm asked for aligned memory on the CPU, which a mapped checkpoint does not give.
_HAS_GROUPED_MM = torch.__version__ >= (2, 11)

# name -> (function, its backward (dy, x) -> dx)
ACTIVATIONS = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "gelu_pytorch_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda dy, x: torch.ops.aten.gelu_backward(dy, x, approximate="tanh"),
    ),
    "relu": (F.relu, lambda dy, x: torch.ops.aten.threshold_backward(dy, x, 0)),
}


def sort_slots(top_k_index: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots in expert order, (S,) int64, skipped slots last; and expert_offsets (E + 1,) int32, as in `Routing`.

    Args:
        top_k_index: (T, top_k) integer; ids outside [0, num_experts) are skipped.
    """
    ids = top_k_index.reshape(-1)
    ids = ids.masked_fill(ids < 0, num_experts).clamp(max=num_experts)
    ids, sorted_slots = torch.sort(ids, stable=True)
    experts = torch.arange(num_experts + 1, dtype=ids.dtype, device=ids.device)
    return sorted_slots, torch.searchsorted(ids, experts, out_int32=True)


def _acc_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def moe_experts(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    activation: str = "silu",
) -> torch.Tensor:
    """y[t] = sum_k weight[t, k] * down[e] @ (act(gate[e] @ x[t]) * (up[e] @ x[t])),  e = top_k_index[t, k].

    Arguments and result as `moe_grouped_gemm.moe_experts`; differentiable. Weighting and the sum are in at least fp32.
    """
    act_fn, _ = ACTIVATIONS[activation]
    top_k = top_k_index.shape[1]
    sorted_slots, expert_offsets = sort_slots(top_k_index, gate_up_proj.shape[0])
    slots = sorted_slots[: int(expert_offsets[-1])]
    tokens = slots // top_k
    gate, up = _grouped_linear(hidden_states[tokens], gate_up_proj, expert_offsets).chunk(2, dim=-1)
    y = _grouped_linear(act_fn(gate) * up, down_proj, expert_offsets)
    y = y * top_k_weights.reshape(-1, 1)[slots].to(_acc_dtype(y))
    # In expert order: the order of every sum is fixed.
    out = torch.zeros(hidden_states.shape, dtype=y.dtype, device=y.device).index_add_(0, tokens, y)
    return out.to(hidden_states.dtype)


def _grouped_linear(x: torch.Tensor, weight: torch.Tensor, expert_offsets: torch.Tensor) -> torch.Tensor:
    """y[r] = weight[e] @ x[r] for the rows r of expert e; every row belongs to one."""
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if not needs_grad and _grouped_mm_can_read(x, weight):
        return F.grouped_mm(x, weight.mT, offs=expert_offsets[1:])
    counts = expert_offsets.diff().tolist()
    if needs_grad:
        # unbind: the gradient of indexing one expert would be as large as the whole stack, for each expert. Experts
        # without rows stay in: the result must depend on x and weight even if no row is left.
        return torch.cat([F.linear(rows, w) for rows, w in zip(x.split(counts), weight.unbind())])
    y = x.new_empty(x.shape[0], weight.shape[1])
    for rows, w, out in zip(x.split(counts), weight.unbind(), y.split(counts)):
        if rows.shape[0]:
            torch.mm(rows, w.t(), out=out)
    return y


def _grouped_mm_can_read(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether torch's own loop over experts on the CPU, quicker than ours by some Python, takes these tensors."""
    if x.device.type != "cpu" or x.dtype == torch.float64 or x.numel() == 0 or not _HAS_GROUPED_MM:
        return False
    aligned = all(n * x.element_size() % 16 == 0 for n in weight.shape[1:])
    return aligned and weight.is_contiguous() and x.is_contiguous()


def moe_experts_training(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, ...]:
    """`moe_experts`, z (S, 2I) = [gate; up] of each sorted row, and expert_offsets, sorted_slots and slot_positions.

    Rows of z that belong to no expert are zero here, and anything on a GPU.
    """
    act_fn, _ = ACTIVATIONS[activation]
    sorted_slots, expert_offsets = sort_slots(top_k_index, gate_up_proj.shape[0])
    routed = int(expert_offsets[-1])
    slots = sorted_slots[:routed]
    tokens = slots // max(1, top_k_index.shape[1])
    z = hidden_states.new_zeros(sorted_slots.numel(), gate_up_proj.shape[1])
    z[:routed] = _grouped_linear(hidden_states[tokens], gate_up_proj, expert_offsets)
    gate, up = z[:routed].chunk(2, dim=-1)
    y = _grouped_linear(act_fn(gate) * up, down_proj, expert_offsets)
    y = y * top_k_weights.reshape(-1, 1)[slots].to(_acc_dtype(y))
    out = torch.zeros(hidden_states.shape, dtype=y.dtype, device=y.device).index_add_(0, tokens, y)
    positions = torch.full_like(sorted_slots, -1)
    positions[slots] = torch.arange(routed, device=slots.device)
    return out.to(hidden_states.dtype), z, expert_offsets, sorted_slots.int(), positions.int()


def moe_experts_backward(
    dout: torch.Tensor,
    hidden_states: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    z: torch.Tensor,
    expert_offsets: torch.Tensor,
    sorted_slots: torch.Tensor,
    slot_positions: torch.Tensor,
    activation: str,
    needs_grad: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of (hidden_states, top_k_weights, gate_up_proj, down_proj); an empty tensor where none is needed.

    z and the routing as `moe_experts_training` returns them.
    """
    act_fn, act_backward = ACTIVATIONS[activation]
    top_k = top_k_weights.shape[1]
    acc_dtype = _acc_dtype(hidden_states)
    weights = top_k_weights.reshape(-1, 1).to(acc_dtype)
    dx = torch.zeros(hidden_states.shape if needs_grad[0] else 0, dtype=acc_dtype, device=dout.device)
    dweights = torch.zeros(weights.numel() if needs_grad[1] else 0, dtype=acc_dtype, device=dout.device)
    dgate_up = torch.zeros_like(gate_up_proj) if needs_grad[2] else gate_up_proj.new_empty(0)
    ddown = torch.zeros_like(down_proj) if needs_grad[3] else down_proj.new_empty(0)
    bounds = expert_offsets.tolist()
    for expert, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        if begin == end:
            continue
        slots = sorted_slots[begin:end].long()
        tokens = slots // top_k
        gate, up = z[begin:end].chunk(2, dim=-1)
        act = act_fn(gate)
        a = act * up
        b = dout[tokens] @ down_proj[expert]
        if needs_grad[1]:
            dweights[slots] = (b.to(acc_dtype) * a).sum(-1)
        if needs_grad[3]:
            torch.mm(dout[tokens].T, (a * weights[slots]).to(a.dtype), out=ddown[expert])
        if not (needs_grad[0] or needs_grad[2]):
            continue
        da = (b * weights[slots]).to(a.dtype)
        dz = torch.cat([act_backward(da * up, gate), da * act], dim=-1)
        if needs_grad[2]:
            torch.mm(dz.T, hidden_states[tokens], out=dgate_up[expert])
        if needs_grad[0]:
            # Not index_add_: on CUDA that is atomic, and a token may come to one expert twice.
            dx.index_put_((tokens,), (dz @ gate_up_proj[expert]).to(acc_dtype), accumulate=True)
    return (
        dx.to(hidden_states.dtype),
        dweights.view(top_k_weights.shape if needs_grad[1] else 0).to(top_k_weights.dtype),
        dgate_up,
        ddown,
    )


def grouped_gemm(x: torch.Tensor, weight: torch.Tensor, expert_offsets: torch.Tensor) -> torch.Tensor:
    """y[r] = weight[e] @ x[r] for the rows r of expert e; rows that belong to no expert are zero.

    Arguments and result as `moe_grouped_gemm.grouped_gemm`; differentiable.
    """
    y = _grouped_linear(x[: int(expert_offsets[-1])], weight, expert_offsets)
    return torch.cat([y, y.new_zeros(x.shape[0] - y.shape[0], y.shape[1])])


def grouped_gemm_dw(dy: torch.Tensor, x: torch.Tensor, expert_offsets: torch.Tensor) -> torch.Tensor:
    """dw[e] = sum over the rows r of expert e of dy[r] x[r]^T: (S, N), (S, K) -> (E, N, K)."""
    offsets = expert_offsets.tolist()
    dw = x.new_zeros(len(offsets) - 1, dy.shape[1], x.shape[1])
    for expert, (begin, end) in enumerate(zip(offsets, offsets[1:])):
        torch.mm(dy[begin:end].T, x[begin:end], out=dw[expert])
    return dw


def router_dtype(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    return torch.promote_types(_acc_dtype(hidden_states), weight.dtype)


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
