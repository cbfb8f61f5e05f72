"""Grouped GEMMs over weights in 4 bits, two a byte, with one scale for each 32 columns of each row:

    grouped_gemm_fp4:  y[r] = w[e] @ x[r] + bias[e]   w (E, N, K)  x (S, K) -> y (S, N)
    dgrad_fp4:         y[r] = x[r] @ w[e]             w (E, K, N)  x (S, K) -> y (S, N)

In registers codes and scales become weights in the dtype of x, rounded once. Tiles and grid as in grouped_gemm.py.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import cdiv, launch
from .quantize import _load_scale
from .tiles import add_bias, is_height, load_weight, locate_tile, store_rows, weight_descriptor

GROUP = 32
_GROUP = tl.constexpr(GROUP)


@triton.jit
def _from_fp4(codes, scale, dtype: tl.constexpr):
    """Bytes [A, B / 2] of two e2m1 codes, the lower nibble first, and scales [A, B / 32] -> [A, B]."""
    A: tl.constexpr = scale.shape[0]
    GROUPS: tl.constexpr = scale.shape[1]
    codes = codes.to(tl.int32)
    codes = tl.join(codes & 15, codes >> 4)
    # Exponent and mantissa in their places in fp32, whose exponents are biased by 126 more; subnormals alike.
    numbers = (((codes & 8) << 28) | ((codes & 7) << 22)).to(tl.float32, bitcast=True) * 2.0**126
    weights = numbers.reshape(A, GROUPS, _GROUP) * scale[:, :, None]
    return weights.reshape(A, GROUPS * _GROUP).to(dtype)


@triton.jit
def _load_scales(w_scale_ptr, rows, N, k, K, GROUPS: tl.constexpr):
    """[rows, GROUPS], of columns from k on. Past the last row or column: somewhere's, for codes that are zero."""
    groups = K // _GROUP
    offs_g = tl.minimum(tl.arange(0, GROUPS) + k // _GROUP, groups - 1)
    rows = tl.minimum(rows, N - 1)
    return _load_scale(w_scale_ptr + rows[:, None].to(tl.int64) * groups + offs_g[None, :])


@triton.jit
def _load_codes(w_ptr, w_strides, expert, rows, N, byte, BYTES, row, CONFIG: tl.constexpr, SIZE: tl.constexpr):
    """[rows, SIZE] bytes of an expert's codes from `byte` on; of BYTES a row, `row` the first of rows."""
    if CONFIG.USE_TMA:
        return load_weight(w_ptr, expert, row, byte, rows.shape[0], SIZE, False)
    else:
        offs_b = byte + tl.arange(0, SIZE)
        w_ptrs = w_ptr + expert.to(tl.int64) * w_strides[0] + rows[:, None].to(tl.int64) * w_strides[1]
        return tl.load(w_ptrs + offs_b[None, :], mask=(rows < N)[:, None] & (offs_b < BYTES)[None, :], other=0)


@triton.jit(do_not_specialize=["max_tiles"])
def _grouped_gemm_fp4_kernel(
    x_ptr,  # (S, K)
    x_desc,  # with USE_TMA a descriptor of x, else x
    w_ptr,  # (E, N, K / 2) uint8; with USE_TMA a descriptor of it
    w_scale_ptr,  # (E, N, K / 32) fp32 | e8m0 as uint8
    bias_ptr,  # (E, N), or None
    y_ptr,  # (S, N)
    schedule_ptr,  # (5, max_tiles) int32
    max_tiles,
    N,
    K,
    stride_xm,
    w_strides,
    CONFIG: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    BLOCK_N: tl.constexpr = CONFIG.BLOCK_N
    BLOCK_K: tl.constexpr = CONFIG.BLOCK_K
    n_tiles = tl.cdiv(N, BLOCK_N)
    expert, _, row, row_end, tile_n = locate_tile(schedule_ptr, max_tiles, n_tiles, CONFIG.BLOCK_M, CONFIG.GROUP_M)
    if expert < 0:
        return
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    w_scale_ptr += expert.to(tl.int64) * N * (K // _GROUP)
    for i in tl.static_range((CONFIG.BLOCK_M // CONFIG.MIN_M).bit_length()):
        if is_height(row_end - row, i, CONFIG):
            offs_m = row + tl.arange(0, CONFIG.BLOCK_M >> i)
            x_ptrs = x_ptr + offs_m[:, None].to(tl.int64) * stride_xm + offs_k[None, :]
            acc = tl.zeros((BLOCK_N, CONFIG.BLOCK_M >> i), tl.float32)
            for k in range(0, K, BLOCK_K):
                if CONFIG.USE_TMA and i == 0:  # the descriptor reads boxes of BLOCK_M rows
                    # Rows past row_end are another expert's: they reach only parts of acc that are never stored.
                    x = x_desc.load([row, k])
                else:
                    x = tl.load(x_ptrs, mask=(offs_m < row_end)[:, None] & (offs_k < K - k)[None, :], other=0.0)
                    x_ptrs += BLOCK_K
                scale = _load_scales(w_scale_ptr, offs_n, N, k, K, BLOCK_K // _GROUP)
                first = tile_n * BLOCK_N
                codes = _load_codes(w_ptr, w_strides, expert, offs_n, N, k // 2, K // 2, first, CONFIG, BLOCK_K // 2)
                w = _from_fp4(codes, scale, x.dtype)
                acc = tl.dot(w, x.T, acc, input_precision=INPUT_PRECISION)  # [BN, BK] @ [BK, BM]
            y = add_bias(acc.T, bias_ptr, expert, offs_n, N)
            store_rows(y_ptr, y, row, row_end, offs_n, N)


@triton.jit(do_not_specialize=["max_tiles"])
def _dgrad_fp4_kernel(
    x_ptr,  # (S, K)
    w_ptr,  # (E, K, N / 2) uint8; with USE_TMA a descriptor of it
    w_scale_ptr,  # (E, K, N / 32) fp32 | e8m0 as uint8
    y_ptr,  # (S, N)
    schedule_ptr,  # (5, max_tiles) int32
    max_tiles,
    K,
    N,
    w_strides,
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
    offs_k = tl.arange(0, BLOCK_K)
    first = tile_n * BLOCK_N
    x_ptrs = x_ptr + offs_m[:, None].to(tl.int64) * K + offs_k[None, :]
    w_scale_ptr += expert.to(tl.int64) * K * (N // _GROUP)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptrs, mask=(offs_m < row_end)[:, None] & (offs_k < K - k)[None, :], other=0.0)
        x_ptrs += BLOCK_K
        scale = _load_scales(w_scale_ptr, k + offs_k, K, first, N, BLOCK_N // _GROUP)
        codes = _load_codes(w_ptr, w_strides, expert, k + offs_k, K, first // 2, N // 2, k, CONFIG, BLOCK_N // 2)
        w = _from_fp4(codes, scale, x.dtype)
        acc = tl.dot(x, w, acc, input_precision=INPUT_PRECISION)  # [BM, BK] @ [BK, BN]
    store_rows(y_ptr, acc, row, row_end, first + tl.arange(0, BLOCK_N), N)


def in_bytes(w, w_scale):
    """Codes and scales as plain integers: uint8, but for scales in fp32."""
    return w.view(torch.uint8), w_scale if w_scale.dtype == torch.float32 else w_scale.view(torch.uint8)


def grouped_gemm_fp4(x, w, w_scale, schedule, input_precision, config, y, bias=None):
    """x (S, K), w (E, N, K / 2) bytes by rows -> y (S, N); rows that belong to no expert keep what y held.

    w_scale, contiguous: (E, N, K / 32), fp32 or exponents. bias: contiguous (E, N), or None.
    """
    w, w_scale = in_bytes(w, w_scale)
    N, K = w.shape[1], x.shape[1]
    tiles = schedule.shape[1]
    x_arg, w_arg = x, w
    if config.USE_TMA:
        x_arg = TensorDescriptor(x, x.shape, x.stride(), [config.BLOCK_M, config.BLOCK_K])
        w_arg = weight_descriptor(w, config.BLOCK_N, config.BLOCK_K // 2)
    launch(
        _grouped_gemm_fp4_kernel,
        (tiles * cdiv(N, config.BLOCK_N), 1, 1),
        (x, x_arg, w_arg, w_scale, bias, y, schedule),
        (tiles,),
        (N, K, x.stride(0), w.stride(), config, input_precision),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y


def dgrad_fp4(x, w, w_scale, schedule, input_precision, config, y):
    """x (S, K) contiguous, w (E, K, N / 2) bytes by rows -> y (S, N); rows that belong to no expert keep what y held.

    w_scale, contiguous: (E, K, N / 32), fp32 or exponents.
    """
    w, w_scale = in_bytes(w, w_scale)
    K, N = x.shape[1], 2 * w.shape[2]
    tiles = schedule.shape[1]
    w_arg = weight_descriptor(w, config.BLOCK_K, config.BLOCK_N // 2) if config.USE_TMA else w
    launch(
        _dgrad_fp4_kernel,
        (tiles * cdiv(N, config.BLOCK_N), 1, 1),
        (x, w_arg, w_scale, y, schedule),
        (tiles,),
        (K, N, w.stride(), config, input_precision),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y
