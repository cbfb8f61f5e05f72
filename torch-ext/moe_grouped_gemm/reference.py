"""The expert layer and the router in plain torch: the CPU path, the experts' backward for now, and what tests and
benchmarks compare with.

Everything here works in any float dtype (fp64 makes it an oracle), is deterministic on the CPU, and reads the number of
rows of each expert on the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

# Before 2.11 torch's grouped_mm asked for aligned memory on the CPU, which a mapped checkpoint does not give.
_HAS_GROUPED_MM = torch.__version__ >= (2, 11)


class Gate(NamedTuple):
    """a = act(g) * u, where g and u are gate and up, clamped to g <= limit and -limit <= u <= limit if limit is given.

    "swigluoai": a = g * sigmoid(alpha * g) * (u + 1). Interleaved: rows of gate_up_proj are gate, up, gate, up, ...
    """

    activation: str = "silu"
    limit: float | None = None
    alpha: float = 1.702
    interleaved: bool = False


def _swigluoai_backward(dy, x, alpha):
    s = torch.sigmoid(alpha * x)
    return dy * s * (1 + alpha * x * (1 - s))


# name -> (function (x, alpha), its backward (dy, x, alpha) -> dx)
ACTIVATIONS = {
    "silu": (lambda x, _: F.silu(x), lambda dy, x, _: torch.ops.aten.silu_backward(dy, x)),
    "gelu": (lambda x, _: F.gelu(x), lambda dy, x, _: torch.ops.aten.gelu_backward(dy, x)),
    "gelu_pytorch_tanh": (
        lambda x, _: F.gelu(x, approximate="tanh"),
        lambda dy, x, _: torch.ops.aten.gelu_backward(dy, x, approximate="tanh"),
    ),
    "relu": (lambda x, _: F.relu(x), lambda dy, x, _: torch.ops.aten.threshold_backward(dy, x, 0)),
    "swigluoai": (lambda x, alpha: x * torch.sigmoid(alpha * x), _swigluoai_backward),
}


def _split(z: torch.Tensor, gate: Gate) -> tuple[torch.Tensor, torch.Tensor]:
    """gate and up of each row of z, neither clamped."""
    return (z[:, ::2], z[:, 1::2]) if gate.interleaved else z.chunk(2, dim=-1)


def apply_gate(z: torch.Tensor, gate: Gate) -> torch.Tensor:
    """(S, 2I) -> (S, I)."""
    g, u = _split(z, gate)
    if gate.limit is not None:
        g, u = g.clamp(max=gate.limit), u.clamp(-gate.limit, gate.limit)
    act_fn, _ = ACTIVATIONS[gate.activation]
    return act_fn(g, gate.alpha) * (u + 1 if gate.activation == "swigluoai" else u)


def gate_backward(da: torch.Tensor, z: torch.Tensor, gate: Gate) -> torch.Tensor:
    """(S, I), (S, 2I) -> the gradient of z."""
    g, u = _split(z, gate)
    limit = gate.limit
    g_clamped, u_clamped = (g, u) if limit is None else (g.clamp(max=limit), u.clamp(-limit, limit))
    act_fn, act_backward = ACTIVATIONS[gate.activation]
    dg = act_backward(da * (u_clamped + 1 if gate.activation == "swigluoai" else u_clamped), g_clamped, gate.alpha)
    du = da * act_fn(g_clamped, gate.alpha)
    if limit is not None:
        dg, du = dg.masked_fill(g > limit, 0), du.masked_fill(u.abs() > limit, 0)
    return torch.stack([dg, du], dim=-1).flatten(1) if gate.interleaved else torch.cat([dg, du], dim=-1)


def empty_gradient(weight: torch.Tensor) -> torch.Tensor:
    """Uninitialised (E, N, K), in the order of the weight's own memory if that is contiguous (E, K, N)."""
    if is_transposed(weight):
        return weight.new_empty(weight.shape[0], weight.shape[2], weight.shape[1]).mT
    return weight.new_empty(weight.shape)


def is_transposed(weight: torch.Tensor) -> bool:
    """Whether (E, N, K) is a view of (E, K, N), as experts with `is_transposed` have it."""
    return weight.stride(1) == 1 and weight.stride(2) != 1


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
    gate_up_proj_bias: torch.Tensor | None = None,
    down_proj_bias: torch.Tensor | None = None,
    limit: float | None = None,
    alpha: float = 1.702,
    interleaved: bool = False,
) -> torch.Tensor:
    """y[t] = sum_k weight[t, k] * down[e] @ (act(gate[e] @ x[t]) * (up[e] @ x[t])),  e = top_k_index[t, k].

    Arguments and result as `moe_grouped_gemm.moe_experts`; differentiable. Weighting and the sum are in at least fp32.
    """
    gate = Gate(activation, limit, alpha, interleaved)
    top_k = top_k_index.shape[1]
    sorted_slots, expert_offsets = sort_slots(top_k_index, gate_up_proj.shape[0])
    slots = sorted_slots[: int(expert_offsets[-1])]
    tokens = slots // top_k
    z = _grouped_linear(hidden_states[tokens], gate_up_proj, expert_offsets, gate_up_proj_bias)
    y = _grouped_linear(apply_gate(z, gate), down_proj, expert_offsets, down_proj_bias)
    y = y * top_k_weights.reshape(-1, 1)[slots].to(_acc_dtype(y))
    # In expert order: the order of every sum is fixed.
    out = torch.zeros(hidden_states.shape, dtype=y.dtype, device=y.device).index_add_(0, tokens, y)
    return out.to(hidden_states.dtype)


def _grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, expert_offsets: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """y[r] = weight[e] @ x[r] + bias[e] for the rows r of expert e; every row belongs to one."""
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if bias is not None:
        experts = torch.repeat_interleave(expert_offsets.diff(), output_size=x.shape[0])
        return _grouped_linear(x, weight, expert_offsets) + bias.index_select(0, experts)
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
    return aligned and (weight.is_contiguous() or weight.mT.is_contiguous()) and x.is_contiguous()


def moe_experts_training(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    gate_up_proj_bias: torch.Tensor | None,
    down_proj_bias: torch.Tensor | None,
    *gate,
) -> tuple[torch.Tensor, ...]:
    """`moe_experts`, z (S, 2I) before the gate of each sorted row, expert_offsets, sorted_slots and slot_positions.

    Rows of z that belong to no expert are zero here, and anything on a GPU.
    """
    sorted_slots, expert_offsets = sort_slots(top_k_index, gate_up_proj.shape[0])
    routed = int(expert_offsets[-1])
    slots = sorted_slots[:routed]
    tokens = slots // max(1, top_k_index.shape[1])
    z = hidden_states.new_zeros(sorted_slots.numel(), gate_up_proj.shape[1])
    z[:routed] = _grouped_linear(hidden_states[tokens], gate_up_proj, expert_offsets, gate_up_proj_bias)
    y = _grouped_linear(apply_gate(z[:routed], Gate(*gate)), down_proj, expert_offsets, down_proj_bias)
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
    gate_up_proj_bias: torch.Tensor | None,
    down_proj_bias: torch.Tensor | None,
    z: torch.Tensor,
    expert_offsets: torch.Tensor,
    sorted_slots: torch.Tensor,
    slot_positions: torch.Tensor,
    needs_grad: list[bool],
    *gate,
) -> tuple[torch.Tensor, ...]:
    """Gradients of hidden_states, top_k_weights, gate_up_proj, down_proj and the two biases; empty where not needed.

    z and the routing as `moe_experts_training` returns them.
    """
    gate = Gate(*gate)
    top_k = top_k_weights.shape[1]
    acc_dtype = _acc_dtype(hidden_states)
    weights = top_k_weights.reshape(-1, 1).to(acc_dtype)
    dx = torch.zeros(hidden_states.shape if needs_grad[0] else 0, dtype=acc_dtype, device=dout.device)
    dweights = torch.zeros(weights.numel() if needs_grad[1] else 0, dtype=acc_dtype, device=dout.device)
    dgate_up, ddown = (
        empty_gradient(weight).zero_() if needed else weight.new_empty(0)
        for weight, needed in zip((gate_up_proj, down_proj), needs_grad[2:4])
    )
    dgate_up_bias, ddown_bias = (
        torch.zeros(bias.shape if needed else 0, dtype=acc_dtype, device=dout.device)
        for bias, needed in zip((gate_up_proj_bias, down_proj_bias), needs_grad[4:])
    )
    bounds = expert_offsets.tolist()
    for expert, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        if begin == end:
            continue
        slots = sorted_slots[begin:end].long()
        tokens = slots // top_k
        a = apply_gate(z[begin:end], gate)
        b = dout[tokens] @ down_proj[expert]
        if needs_grad[1]:
            dweights[slots] = (b.to(acc_dtype) * a).sum(-1)
            if down_proj_bias is not None:
                dweights[slots] += dout[tokens].to(acc_dtype) @ down_proj_bias[expert].to(acc_dtype)
        if needs_grad[3]:
            ddown[expert] = dout[tokens].T @ (a * weights[slots]).to(a.dtype)
        if needs_grad[5]:
            ddown_bias[expert] = (dout[tokens] * weights[slots]).sum(0)
        if not (needs_grad[0] or needs_grad[2] or needs_grad[4]):
            continue
        dz = gate_backward((b * weights[slots]).to(a.dtype), z[begin:end], gate)
        if needs_grad[2]:
            dgate_up[expert] = dz.T @ hidden_states[tokens]
        if needs_grad[4]:
            dgate_up_bias[expert] = dz.to(acc_dtype).sum(0)
        if needs_grad[0]:
            # Not index_add_: on CUDA that is atomic, and a token may come to one expert twice.
            dx.index_put_((tokens,), (dz @ gate_up_proj[expert]).to(acc_dtype), accumulate=True)
    return (
        dx.to(hidden_states.dtype),
        dweights.view(top_k_weights.shape if needs_grad[1] else 0).to(top_k_weights.dtype),
        dgate_up,
        ddown,
        dgate_up_bias.to(dout.dtype),
        ddown_bias.to(dout.dtype),
    )


def grouped_gemm(
    x: torch.Tensor, weight: torch.Tensor, expert_offsets: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """y[r] = weight[e] @ x[r] + bias[e] for the rows r of expert e; rows that belong to no expert are zero.

    Arguments and result as `moe_grouped_gemm.grouped_gemm`; differentiable.
    """
    y = _grouped_linear(x[: int(expert_offsets[-1])], weight, expert_offsets, bias)
    return torch.cat([y, y.new_zeros(x.shape[0] - y.shape[0], y.shape[1])])


def combine(y: torch.Tensor, slot_positions: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """out[t] = sum over k of weights[t, k] * y[slot_positions[t * top_k + k]], where that is not negative."""
    out = y.new_zeros(top_k_weights.shape[0], y.shape[1], dtype=_acc_dtype(y))
    for positions, weight in zip(slot_positions.view(top_k_weights.shape).unbind(1), top_k_weights.unbind(1)):
        products = y[positions.clamp(min=0)] * weight[:, None].to(out.dtype)
        out += products.masked_fill(positions[:, None] < 0, 0)  # not weight 0: rows and weights may be NaN
    return out.to(y.dtype)


def grouped_gemm_dw(dy: torch.Tensor, x: torch.Tensor, expert_offsets: torch.Tensor) -> torch.Tensor:
    """dw[e] = sum over the rows r of expert e of dy[r] x[r]^T: (S, N), (S, K) -> (E, N, K)."""
    offsets = expert_offsets.tolist()
    dw = x.new_zeros(len(offsets) - 1, dy.shape[1], x.shape[1])
    for expert, (begin, end) in enumerate(zip(offsets, offsets[1:])):
        torch.mm(dy[begin:end].T, x[begin:end], out=dw[expert])
    return dw


def row_sums(y: torch.Tensor, expert_offsets: torch.Tensor) -> torch.Tensor:
    """sums[e] = sum over the rows r of expert e of y[r], in at least fp32: (S, N) -> (E, N) in y.dtype."""
    counts = expert_offsets.diff().tolist()
    parts = y[: sum(counts)].to(_acc_dtype(y)).split(counts)
    return torch.stack([part.sum(0) for part in parts]).to(y.dtype)


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
