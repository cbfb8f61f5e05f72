"""Gradients of the layer around its GEMMs. Slot s = slots[r], token t = s // top_k.

    gather:      out[r] = x[t]    ORDERED: its columns in the order of order.py, and zeros to whole periods
    scale_rows:  out[r] = weight[s] * x[r]
    wgrad:       dw[e] = sum over the rows r of e of p[r] q[r]^T
    row_sums:    db[e] = sum over the rows r of e of p[r], or of weight[s] * p[t]

`glu_backward` of gate.py makes dz and weighted_a of b = dout gathered @ down[e], a grouped GEMM on the transposed
weight. Then ddown = wgrad(dout gathered, weighted_a), dgate_up = wgrad(dz, x gathered), and dhidden_states[t] is the
sum of dz @ gate_up[e] over the slots of t. That <dout, down @ a> = <dout @ down, a> (SonicMoE, arXiv 2512.14080) is why
no unweighted output is needed. Biases have the row_sums of dz and of weighted dout; that of down adds <dout, bias> to
dweight, outside.

Rows are padded (`pad` of routing.py): experts begin at multiples of 64, and what is gathered into padding rows is
zero, so that sums over the rows of an expert have no tail. No atomics: sums have one order.
"""

import torch
import triton
import triton.language as tl

from .launch import cdiv, launch, next_power_of_2
from .order import in_order, ordered_size
from .wgrad_hopper import wgrad_hopper


@triton.jit
def _gather_kernel(
    x_ptr,  # (T, H)
    slots_ptr,  # (P,) int32, -1 for a padding row
    expert_offsets_ptr,  # (E + 1,) int32
    out_ptr,  # (P, out_H)
    E,
    top_k,
    H,
    out_H,
    stride_xt,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ORDERED: tl.constexpr,
):
    row = tl.program_id(0) * ROWS
    end = tl.load(expert_offsets_ptr + E)
    if row >= end:
        return
    rows = row + tl.arange(0, ROWS)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    slots = tl.load(slots_ptr + rows, mask=rows < end, other=-1)
    x_ptrs = x_ptr + (slots // top_k)[:, None].to(tl.int64) * stride_xt + offs_h[None, :]
    x = tl.load(x_ptrs, mask=(slots >= 0)[:, None] & (offs_h < H)[None, :], other=0.0)
    if ORDERED:
        x = in_order(x)
    out_ptrs = out_ptr + rows[:, None].to(tl.int64) * out_H + offs_h[None, :]
    tl.store(out_ptrs, x, mask=(rows < end)[:, None] & (offs_h < out_H)[None, :])


@triton.jit
def _scale_rows_kernel(
    x_ptr,  # (P, N)
    top_k_weights_ptr,  # (S,)
    slots_ptr,  # (P,) int32, -1 for a padding row
    expert_offsets_ptr,  # (E + 1,) int32
    out_ptr,  # (P, N)
    E,
    N,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0) * ROWS
    if row >= tl.load(expert_offsets_ptr + E):
        return
    rows = row + tl.arange(0, ROWS)
    slots = tl.load(slots_ptr + rows)
    is_owned = slots >= 0
    weight = tl.load(top_k_weights_ptr + slots, mask=is_owned, other=0.0).to(tl.float32)[:, None]
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    offsets = rows.to(tl.int64)[:, None] * N + offs_n
    x = tl.load(x_ptr + offsets, mask=is_owned[:, None] & (offs_n < N), other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, (weight * x).to(out_ptr.dtype.element_ty), mask=offs_n < N)


@triton.jit
def _wgrad_kernel(
    p_ptr,  # (P, M)
    q_ptr,  # (P, N)
    dw_ptr,  # (E, M, N)
    expert_offsets_ptr,  # (E + 1,) int32
    M,
    N,
    stride_p,
    stride_q,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    n_tiles = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(M, BLOCK_M) * n_tiles
    pid = tl.program_id(0)
    expert = pid // tiles
    offs_m = pid % tiles // n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.load(expert_offsets_ptr + expert)
    end = tl.load(expert_offsets_ptr + expert + 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        mask_k = (rows < end)[:, None]  # on both: a row of another expert may hold anything
        rows = rows.to(tl.int64)[:, None]
        p = tl.load(p_ptr + rows * stride_p + offs_m[None, :], mask=mask_k & (offs_m < M)[None, :], other=0.0)
        q = tl.load(q_ptr + rows * stride_q + offs_n[None, :], mask=mask_k & (offs_n < N)[None, :], other=0.0)
        acc = tl.dot(p.T, q, acc, input_precision=INPUT_PRECISION)  # [BM, BK] @ [BK, BN]
    dw_ptrs = dw_ptr + (expert.to(tl.int64) * M + offs_m[:, None]) * N + offs_n[None, :]
    tl.store(dw_ptrs, acc.to(dw_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


@triton.jit
def _row_sums_kernel(
    p_ptr,  # (S, N), or with GATHER (T, N)
    sums_ptr,  # (E, N)
    sorted_slots_ptr,  # (S,) int32, -1 for a padding row
    top_k_weights_ptr,  # (S,)
    expert_offsets_ptr,  # (E + 1,) int32
    top_k,
    N,
    stride_p,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GATHER: tl.constexpr,
):
    expert = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.load(expert_offsets_ptr + expert)
    end = tl.load(expert_offsets_ptr + expert + 1)
    acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        mask_r = rows < end
        p_rows = rows
        if GATHER:
            slots = tl.load(sorted_slots_ptr + rows, mask=mask_r, other=-1)
            mask_r = slots >= 0
            weight = tl.load(top_k_weights_ptr + slots, mask=mask_r, other=0.0).to(tl.float32)
            p_rows = slots // top_k
        p_ptrs = p_ptr + p_rows[:, None].to(tl.int64) * stride_p + offs_n[None, :]
        p = tl.load(p_ptrs, mask=mask_r[:, None] & (offs_n < N)[None, :], other=0.0).to(tl.float32)
        acc += p * weight[:, None] if GATHER else p
    sums_ptrs = sums_ptr + expert.to(tl.int64) * N + offs_n
    tl.store(sums_ptrs, tl.sum(acc, axis=0).to(sums_ptr.dtype.element_ty), mask=offs_n < N)


def gather(x, slots, expert_offsets, top_k, out=None, ordered=False):
    """x (T, H) with contiguous rows, slots (P,) and expert_offsets (E + 1,), padded or not -> (P, H).

    Rows from expert_offsets[E] on stay unwritten. ordered: columns are those of order.py, to whole periods.
    """
    hidden_dim, experts = x.shape[1], expert_offsets.numel() - 1
    columns = ordered_size(hidden_dim) if ordered else hidden_dim
    if out is None:
        out = x.new_empty(slots.numel(), columns)
    block_h = min(1024, next_power_of_2(columns))
    rows = 8
    launch(
        _gather_kernel,
        (cdiv(slots.numel(), rows), cdiv(columns, block_h), 1),
        (x, slots, expert_offsets, out),
        (),
        (experts, top_k, hidden_dim, columns, x.stride(0), rows, block_h, ordered),
    )
    return out


def scale_rows(x, top_k_weights, slots, expert_offsets):
    """x (P, N), N small, contiguous top_k_weights (T, top_k) -> (P, N); padding rows as in `glu` of gate.py."""
    rows, N = x.shape
    experts = expert_offsets.numel() - 1
    out = torch.empty_like(x)
    launch(
        _scale_rows_kernel,
        (rows // 16, 1, 1),
        (x, top_k_weights, slots, expert_offsets, out),
        (),
        (experts, N, 16, next_power_of_2(N)),
    )
    return out


def wgrad(p, q, expert_offsets, input_precision, config):
    """p (P, M), q (P, N), contiguous rows -> dw (E, M, N); zeros for an expert without rows.

    With config.WARP_SPECIALIZED rows are padded, as `pad` of routing.py does.
    """
    experts = expert_offsets.numel() - 1
    M, N = p.shape[1], q.shape[1]
    dw = torch.empty((experts, M, N), dtype=p.dtype, device=p.device)
    if config.WARP_SPECIALIZED:
        return wgrad_hopper(p, q, expert_offsets, config, dw)
    blocks = (config.BLOCK_M, config.BLOCK_N, config.BLOCK_K)
    launch(
        _wgrad_kernel,
        (experts * cdiv(M, config.BLOCK_M) * cdiv(N, config.BLOCK_N), 1, 1),
        (p, q, dw, expert_offsets),
        (),
        (M, N, p.stride(0), q.stride(0), *blocks, input_precision),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return dw


def row_sums(p, sorted_slots, expert_offsets, top_k_weights=None):
    """sums (E, N) in p.dtype of p (S, N), rows contiguous; zeros for an expert without rows.

    Given contiguous top_k_weights (T, top_k), p is (T, N), gathered by the slots' tokens, times their weights; padded
    slots and offsets will do.
    """
    experts, N = expert_offsets.numel() - 1, p.shape[1]
    gather = top_k_weights is not None
    top_k = top_k_weights.shape[1] if gather else 1
    weights = top_k_weights if gather else expert_offsets  # or any other, which is not read
    sums = torch.empty((experts, N), dtype=p.dtype, device=p.device)
    launch(
        _row_sums_kernel,
        (experts, cdiv(N, 64), 1),
        (p, sums, sorted_slots, weights, expert_offsets),
        (),
        (top_k, N, p.stride(0), 32, 64, gather),
    )
    return sums
