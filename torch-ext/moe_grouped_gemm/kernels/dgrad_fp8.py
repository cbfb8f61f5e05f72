"""y[r] = x[r] @ w[e] for weights (E, K, N) in float8_e4m3fn with one scale for each block of 128 x 128: what gradients
go through.

The sum runs over the rows of the weights, which are read as they are and dequantised in registers, to the dtype of x.
Tiles and grid as in grouped_gemm.py; a tile of columns has one scale for each weight row, so BLOCK_N divides 128.
"""

import triton
import triton.language as tl

from .launch import cdiv, launch
from .quantize import _BLOCK, _from_codes, _load_scale, _scale_row
from .tiles import locate_tile, store_rows, weight_descriptor


@triton.jit(do_not_specialize=["max_tiles"])
def _dgrad_fp8_kernel(
    x_ptr,  # (S, K)
    w_ptr,  # (E, K, N); with USE_TMA a descriptor of it
    w_scale_ptr,  # (E, scale_rows, ceil(N / 128)) fp32 | e8m0 as uint8
    y_ptr,  # (S, N)
    schedule_ptr,  # (5, max_tiles) int32
    max_tiles,
    K,
    N,
    scale_shift,
    scale_rows,
    stride_we,
    stride_wk,
    CONFIG: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    BLOCK_M: tl.constexpr = CONFIG.BLOCK_M
    BLOCK_N: tl.constexpr = CONFIG.BLOCK_N
    BLOCK_K: tl.constexpr = CONFIG.BLOCK_K
    n_tiles = tl.cdiv(N, BLOCK_N)
    expert, _, row, row_end, tile_n = locate_tile(schedule_ptr, max_tiles, n_tiles, BLOCK_M, CONFIG.GROUP_M)
    if expert < 0:
        return
    offs_m = row + tl.arange(0, BLOCK_M)
    mask_m = (offs_m < row_end)[:, None]
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + offs_m[:, None].to(tl.int64) * K + offs_k[None, :]
    if not CONFIG.USE_TMA:
        stride_wk = tl.cast(stride_wk, tl.int64)
        w_ptrs = w_ptr + expert.to(tl.int64) * stride_we + offs_k[:, None] * stride_wk + offs_n[None, :]
    n_blocks = tl.cdiv(N, _BLOCK)
    w_scale_ptr += expert.to(tl.int64) * scale_rows * n_blocks + tile_n * BLOCK_N // _BLOCK
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=mask_m & mask_k[None, :], other=0.0)
        x_ptrs += BLOCK_K
        if CONFIG.USE_TMA:
            w = w_ptr.load([expert, k, tile_n * BLOCK_N]).reshape(BLOCK_K, BLOCK_N)
        else:
            w = tl.load(w_ptrs, mask=mask_k[:, None] & (offs_n < N)[None, :], other=0.0)
            w_ptrs += BLOCK_K * stride_wk
        scale = _load_scale(w_scale_ptr + _scale_row(k + offs_k, K // 2, scale_shift, scale_rows) * n_blocks)
        w = (_from_codes(w, tl.float32) * scale[:, None]).to(x.dtype)
        acc = tl.dot(x, w, acc, input_precision=INPUT_PRECISION)  # [BM, BK] @ [BK, BN]
    store_rows(y_ptr, acc, row, row_end, offs_n, N)


def dgrad_fp8(x, w, w_scale, schedule, input_precision, config, shift=0):
    """x (S, K) contiguous, w (E, K, N) with contiguous rows -> y (S, N); rows that belong to no expert stay unwritten.

    w_scale, contiguous, and shift are those of `grouped_gemm_fp8`.
    """
    _, K, N = w.shape
    tiles = schedule.shape[1]
    y = x.new_empty(x.shape[0], N)
    w_arg = weight_descriptor(w, config.BLOCK_K, config.BLOCK_N) if config.USE_TMA else w
    launch(
        _dgrad_fp8_kernel,
        (tiles * cdiv(N, config.BLOCK_N), 1, 1),
        (x, w_arg, w_scale, y, schedule),
        (tiles,),
        (K, N, shift, w_scale.shape[1], w.stride(0), w.stride(1), config, input_precision),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y
