"""Rows sorted by expert: the order, the GEMMs over it, and back to tokens.

A weight is (E, N, K), with a scale one in codes (see weights/), of which only one expert's is dequantised
at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..weights import Projection, format_of
from ..weights.layout import is_transposed

# Before 2.11 torch's grouped_mm asked for aligned memory on the CPU, which a mapped checkpoint does not give.
_HAS_GROUPED_MM = torch.__version__ >= (2, 11)


def acc_dtype(x: torch.Tensor) -> torch.dtype:
    """Of sums of such numbers."""
    return torch.promote_types(x.dtype, torch.float32)


def empty_gradient(weight: torch.Tensor) -> torch.Tensor:
    """Uninitialised (E, N, K), in the order of the weight's own memory if that is contiguous (E, K, N)."""
    if is_transposed(weight):
        return weight.new_empty(weight.shape[0], weight.shape[2], weight.shape[1]).mT
    return weight.new_empty(weight.shape)


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


def matrix(weight: torch.Tensor, scale: torch.Tensor | None, expert: int, dtype: torch.dtype) -> torch.Tensor:
    """(N, K) of one expert in dtype."""
    if scale is None:
        return weight[expert]
    return format_of(Projection(weight, None, scale)).dequantize(weight[expert], scale[expert], dtype)


def grouped_linear(x, weight, expert_offsets, bias=None, scale=None, transposed=False) -> torch.Tensor:
    """y[r] = weight[e] @ x[r] + bias[e] for the rows r of expert e; every row belongs to one."""
    if transposed and scale is None:
        return grouped_linear(x, weight.mT, expert_offsets, bias)
    if bias is not None:
        experts = torch.repeat_interleave(expert_offsets.diff(), output_size=x.shape[0])
        return grouped_linear(x, weight, expert_offsets, None, scale, transposed) + bias.index_select(0, experts)
    needs_grad = scale is None and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if scale is None and not needs_grad and _grouped_mm_can_read(x, weight):
        return F.grouped_mm(x, weight.mT, offs=expert_offsets[1:])
    counts = expert_offsets.diff().tolist()
    if needs_grad:
        # unbind: the gradient of indexing one expert would be as large as the whole stack, for each expert. Experts
        # without rows stay in: the result must depend on x and weight even if no row is left.
        return torch.cat([F.linear(rows, w) for rows, w in zip(x.split(counts), weight.unbind())])
    y = x.new_empty(x.shape[0], Projection(weight, None, scale).shape[2 if transposed else 1])
    for expert, (rows, out) in enumerate(zip(x.split(counts), y.split(counts))):
        if rows.shape[0]:
            w = matrix(weight, scale, expert, x.dtype)
            torch.mm(rows, w if transposed else w.t(), out=out)
    return y


def _grouped_mm_can_read(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether torch's own loop over experts on the CPU, quicker than ours by some Python, takes these tensors."""
    if x.device.type != "cpu" or x.dtype == torch.float64 or x.numel() == 0 or not _HAS_GROUPED_MM:
        return False
    aligned = all(n * x.element_size() % 16 == 0 for n in weight.shape[1:])
    return aligned and (weight.is_contiguous() or weight.mT.is_contiguous()) and x.is_contiguous()


def grouped_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    expert_offsets: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    transposed: bool = False,
) -> torch.Tensor:
    """y[r] = weight[e] @ x[r] + bias[e] for the rows r of expert e; rows that belong to no expert are zero.

    Arguments and result as `moe_grouped_gemm.grouped_gemm`; differentiable, but for weights in codes. transposed: of
    weight[e]^T.
    """
    y = grouped_linear(x[: int(expert_offsets[-1])], weight, expert_offsets, bias, scale, transposed)
    return torch.cat([y, y.new_zeros(x.shape[0] - y.shape[0], y.shape[1])])


def combine(y: torch.Tensor, slot_positions: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """out[t] = sum over k of weights[t, k] * y[slot_positions[t * top_k + k]], where that is not negative."""
    out = y.new_zeros(top_k_weights.shape[0], y.shape[1], dtype=acc_dtype(y))
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
    parts = y[: sum(counts)].to(acc_dtype(y)).split(counts)
    return torch.stack([part.sum(0) for part in parts]).to(y.dtype)
