"""Grouped GEMM: rows sorted by expert times that expert's weight.

    y[r] = w[e] @ x[r]                           x (S, K) -> y (S, N); if asked for,
    y[r] = w[e] @ x[r] + bias[e]                 bias (E, N)
    y[r] = w[e] @ x[r] + factor[e] @ u[r]        u (S, R), factor (E, N, R)
    y[s] = weight[s] * (w[e] @ x[r])             s = sorted_slots[r]

Weights are (E, N, K) with any strides; TMA reads them with contiguous rows, or as (E, K, N) where that is their order
in memory (TRANSPOSED).

A tile is BLOCK_M rows of one expert by BLOCK_N columns of the result; an expert's last tile is only as high as its rows
need, halving BLOCK_M down to MIN_M. Hopper's wgmma wants at least 64 on the first side of a dot and reads least from
shared memory with 256 on the second. So where all tiles are at least 64 high, token rows come first (`x @ w.T`); below,
the weight does (`w @ x.T`), and the token side may be as small as 16. Grid: max_tiles * cdiv(N, BLOCK_N), tiles of one
expert together; programs past the last tile of the schedule (see routing.py) return at once.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .descriptors import described
from .grouped_gemm_hopper import grouped_gemm_hopper
from .launch import cdiv, launch, next_power_of_2
from .tiles import add_bias, is_height, load_weight, locate_tile, store_rows, weight_descriptor


@triton.jit
def _add_low_rank(
    acc,
    low_rank,
    expert,
    offs_m,
    mask_m,
    offs_n,
    N,
    ROWS_FIRST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """acc + u @ factor.T, [BM, BN]; all transposed if weights come first."""
    u_ptr, factor_ptr, R = low_rank
    offs_r = tl.arange(0, BLOCK_R)
    u_ptrs = u_ptr + offs_m[:, None].to(tl.int64) * R + offs_r[None, :]
    factor_ptrs = factor_ptr + (expert.to(tl.int64) * N + offs_n[:, None]) * R + offs_r[None, :]
    for r in range(0, R, BLOCK_R):
        mask_r = (offs_r < R - r)[None, :]
        u = tl.load(u_ptrs + r, mask=mask_m[:, None] & mask_r, other=0.0)
        factor = tl.load(factor_ptrs + r, mask=(offs_n < N)[:, None] & mask_r, other=0.0)
        if ROWS_FIRST:
            acc = tl.dot(u, factor.T, acc, input_precision=INPUT_PRECISION)
        else:
            acc = tl.dot(factor, u.T, acc, input_precision=INPUT_PRECISION)
    return acc


@triton.jit
def _store(out, y, row, row_end, offs_m, mask_m, offs_n, N):
    """y [BM, BN] as rows from `row` on; or if slots are given, each row times its weight to where its slot is."""
    y_ptr, sorted_slots_ptr, row_weights_ptr = out
    if sorted_slots_ptr is None:
        store_rows(y_ptr, y, row, row_end, offs_n, N)
    else:
        slots = tl.load(sorted_slots_ptr + offs_m, mask=mask_m, other=0)
        y *= tl.load(row_weights_ptr + slots, mask=mask_m, other=0.0).to(tl.float32)[:, None]
        y_ptrs = y_ptr + slots[:, None].to(tl.int64) * N + offs_n[None, :]
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_n < N)[None, :])


@triton.jit
def _grouped_gemm_tile(
    x_ptr,
    x_desc,  # None: by x_ptr
    stride_xm,
    w_ptr,
    w_strides,
    bias_ptr,
    low_rank,  # u_ptr, factor_ptr, R
    out,  # y_ptr, sorted_slots_ptr, row_weights_ptr
    tile,  # expert, row, row_end, tile_n
    N,
    K,
    BLOCK_M: tl.constexpr,
    CONFIG: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    BLOCK_N: tl.constexpr = CONFIG.BLOCK_N
    BLOCK_K: tl.constexpr = CONFIG.BLOCK_K
    ROWS_FIRST: tl.constexpr = CONFIG.MIN_M >= 64
    expert, row, row_end, tile_n = tile
    offs_m = row + tl.arange(0, BLOCK_M)
    mask_m = offs_m < row_end
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    if x_desc is None:
        x_ptrs = x_ptr + offs_m[:, None].to(tl.int64) * stride_xm + offs_k[None, :]
    if not CONFIG.USE_TMA:
        stride_wk = tl.cast(w_strides[2], tl.int64)
        w_ptrs = w_ptr + expert.to(tl.int64) * w_strides[0] + offs_n[:, None].to(tl.int64) * w_strides[1]
        w_ptrs += offs_k[None, :] * stride_wk

    acc = tl.zeros((BLOCK_M, BLOCK_N) if ROWS_FIRST else (BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        if x_desc is not None:
            # Rows past row_end are another expert's: they reach only parts of acc that are never stored.
            x = x_desc.load([row, k])
        else:
            x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            x_ptrs += BLOCK_K
        if CONFIG.USE_TMA:
            w = load_weight(w_ptr, expert, tile_n * BLOCK_N, k, BLOCK_N, BLOCK_K, TRANSPOSED)
        else:
            w = tl.load(w_ptrs, mask=(offs_n < N)[:, None] & mask_k[None, :], other=0.0)
            w_ptrs += BLOCK_K * stride_wk
        if ROWS_FIRST:
            acc = tl.dot(x, w.T, acc, input_precision=INPUT_PRECISION)  # [BM, BK] @ [BK, BN]
        else:
            acc = tl.dot(w, x.T, acc, input_precision=INPUT_PRECISION)  # [BN, BK] @ [BK, BM]
    if low_rank[0] is not None:
        acc = _add_low_rank(acc, low_rank, expert, offs_m, mask_m, offs_n, N, ROWS_FIRST, BLOCK_R, INPUT_PRECISION)

    y = acc if ROWS_FIRST else acc.T
    y = add_bias(y, bias_ptr, expert, offs_n, N)
    _store(out, y, row, row_end, offs_m, mask_m, offs_n, N)


@triton.jit(do_not_specialize=["max_tiles"])
def _grouped_gemm_kernel(
    x_ptr,  # (S, K)
    x_desc,  # with USE_TMA a descriptor of x, else x
    w_ptr,  # (E, N, K); with USE_TMA a descriptor of it
    bias_ptr,  # (E, N), or None
    u_ptr,  # (S, R), or None
    factor_ptr,  # (E, N, R), of u
    y_ptr,  # (S, N), in expert order, or in that of slots if the next two are given
    sorted_slots_ptr,  # (S,) int32, or None
    row_weights_ptr,  # (S,), of slots: factors of the rows of y; or None
    schedule_ptr,  # (5, max_tiles) int32
    max_tiles,
    N,
    K,
    R,
    stride_xm,
    w_strides,
    CONFIG: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    n_tiles = tl.cdiv(N, CONFIG.BLOCK_N)
    expert, _, row, row_end, tile_n = locate_tile(schedule_ptr, max_tiles, n_tiles, CONFIG.BLOCK_M, CONFIG.GROUP_M)
    if expert < 0:
        return
    for i in tl.static_range((CONFIG.BLOCK_M // CONFIG.MIN_M).bit_length()):
        if is_height(row_end - row, i, CONFIG):
            _grouped_gemm_tile(
                x_ptr,
                x_desc if CONFIG.USE_TMA and i == 0 else None,  # the descriptor reads boxes of BLOCK_M rows
                stride_xm,
                w_ptr,
                w_strides,
                bias_ptr,
                (u_ptr, factor_ptr, R),
                (y_ptr, sorted_slots_ptr, row_weights_ptr),
                (expert, row, row_end, tile_n),
                N,
                K,
                CONFIG.BLOCK_M >> i,
                CONFIG,
                TRANSPOSED,
                BLOCK_R,
                INPUT_PRECISION,
            )


def grouped_gemm(
    x, w, schedule, input_precision, config, y=None, sorted_slots=None, row_weights=None, bias=None, low_rank=None
):
    """x (S, K), w (E, N, K), contiguous bias (E, N) -> y (S, N); rows that belong to no expert keep what y held.

    low_rank: contiguous u (S, R) and factor (E, N, R), R a multiple of 16; y[r] is then w[e] @ x[r] + factor[e] @ u[r].
    With sorted_slots (S,) and row_weights (S,), row r becomes row s = sorted_slots[r] of y, times row_weights[s]. The
    warp-specialized kernel has no bias.
    """
    _, N, K = w.shape
    if y is None:
        y = torch.empty((x.shape[0], N), dtype=x.dtype, device=x.device)
    if config.WARP_SPECIALIZED:
        return grouped_gemm_hopper(x, w, schedule, config, y, sorted_slots, row_weights, low_rank)
    tiles = schedule.shape[1]
    u, factor = low_rank or (None, None)
    rank = 0 if low_rank is None else u.shape[1]
    x_arg, w_arg = x, w
    if config.USE_TMA:
        x_arg = described(TensorDescriptor, x, x.shape, x.stride(), [config.BLOCK_M, config.BLOCK_K])
        w_arg = weight_descriptor(w, config.BLOCK_N, config.BLOCK_K)
    block_r = min(config.BLOCK_K, next_power_of_2(max(rank, 1)))
    constants = (config, config.USE_TMA and w.stride(2) != 1, block_r, input_precision)
    launch(
        _grouped_gemm_kernel,
        (tiles * cdiv(N, config.BLOCK_N), 1, 1),
        (x, x_arg, w_arg, bias, u, factor, y, sorted_slots, row_weights, schedule),
        (tiles,),
        (N, K, rank, x.stride(0), w.stride(), *constants),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y
