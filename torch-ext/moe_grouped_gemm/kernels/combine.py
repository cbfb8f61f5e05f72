"""out[t] = addend[t] + sum_k weight[t, k] * y[slot_positions[t * top_k + k]]: back from expert order to token order.

The products and the sum are fp32, in the order of k; there may be no addend. Grid: (T, cdiv(H, BLOCK_H)).

Where top_k is 1 the down GEMM stores its rows in token order itself; what is left for `zero_skipped` are the rows of
tokens that no expert here has. Grid: (cdiv(T, BLOCK_T), cdiv(H, BLOCK_H)).

A GEMM in expert order leaves the rows of no expert, which come last, to `zero_tail`. Grid: (programs that share them,
few, so that they cost nothing where there are none; cdiv(N, BLOCK_N)).
"""

import torch
import triton
import triton.language as tl

from .launch import cdiv, launch, next_power_of_2


@triton.jit
def _combine_kernel(
    y_ptr,  # (S, H), rows in expert order
    slot_positions_ptr,  # (S,) int32
    top_k_weights_ptr,  # (T, top_k)
    addend_ptr,  # (T, H), or None
    out_ptr,  # (T, H)
    top_k,
    H,
    stride_addend,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    acc = tl.zeros((BLOCK_H,), tl.float32)
    if addend_ptr is not None:
        acc += tl.load(addend_ptr + token * stride_addend + offs_h, mask=offs_h < H, other=0.0).to(tl.float32)
    for k in tl.range(0, top_k, loop_unroll_factor=8):
        position = tl.load(slot_positions_ptr + token * top_k + k).to(tl.int64)
        weight = tl.load(top_k_weights_ptr + token * top_k + k).to(tl.float32)
        # A skipped slot has no row, and its weight may be anything, NaN included.
        mask = offs_h < tl.where(position >= 0, H, 0)
        y = tl.load(y_ptr + position * H + offs_h, mask=mask, other=0.0).to(tl.float32)
        acc += tl.where(position >= 0, weight, 0.0) * y
    tl.store(out_ptr + token * H + offs_h, acc.to(out_ptr.dtype.element_ty), mask=offs_h < H)


def combine(y, slot_positions, top_k_weights, addend=None):
    """y (S, H), slot_positions (S,), contiguous top_k_weights (T, top_k), addend (T, H) -> (T, H) in y.dtype."""
    tokens, top_k = top_k_weights.shape
    hidden_dim = y.shape[1]
    out = torch.empty((tokens, hidden_dim), dtype=y.dtype, device=y.device)
    block_h = min(1024, next_power_of_2(hidden_dim))
    launch(
        _combine_kernel,
        (tokens, cdiv(hidden_dim, block_h), 1),
        (y, slot_positions, top_k_weights, addend, out),
        (),
        (top_k, hidden_dim, None if addend is None else addend.stride(0), block_h),
    )
    return out


@triton.jit(do_not_specialize=["T"])
def _zero_skipped_kernel(
    out_ptr,  # (T, H)
    slot_positions_ptr,  # (T,) int32
    T,
    H,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    skipped = tl.load(slot_positions_ptr + offs_t, mask=offs_t < T, other=0) < 0
    if tl.sum(skipped.to(tl.int32), axis=0) == 0:
        return
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    out_ptrs = out_ptr + offs_t[:, None].to(tl.int64) * H + offs_h[None, :]
    zeros = tl.zeros((BLOCK_T, BLOCK_H), out_ptr.dtype.element_ty)
    tl.store(out_ptrs, zeros, mask=skipped[:, None] & (offs_h < H)[None, :])


def zero_skipped(out, slot_positions):
    """The rows of out (T, H) where slot_positions (T,) is negative become zero."""
    tokens, hidden_dim = out.shape
    block_h = min(256, next_power_of_2(hidden_dim))
    launch(
        _zero_skipped_kernel,
        (cdiv(tokens, 16), cdiv(hidden_dim, block_h), 1),
        (out, slot_positions),
        (tokens,),
        (hidden_dim, 16, block_h),
    )


@triton.jit(do_not_specialize=["rows"])
def _zero_tail_kernel(
    y_ptr,  # (S, N)
    expert_offsets_ptr,  # (E + 1,) int32
    rows,  # S
    E,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    zeros = tl.zeros((BLOCK_M, BLOCK_N), y_ptr.dtype.element_ty)
    first = tl.load(expert_offsets_ptr + E) + tl.program_id(0) * BLOCK_M
    for row in range(first, rows, tl.num_programs(0) * BLOCK_M):
        y_ptrs = y_ptr + (row + offs_m)[:, None].to(tl.int64) * N + offs_n[None, :]
        tl.store(y_ptrs, zeros, mask=(row + offs_m < rows)[:, None] & (offs_n < N)[None, :])


def zero_tail(y, expert_offsets):
    """The rows of y (S, N) from expert_offsets[E] on become zero."""
    rows, N = y.shape
    block_n = min(512, next_power_of_2(N))
    launch(
        _zero_tail_kernel,
        (min(128, cdiv(rows, 8)), cdiv(N, block_n), 1),
        (y, expert_offsets),
        (rows,),
        (expert_offsets.numel() - 1, N, 8, block_n),
    )
