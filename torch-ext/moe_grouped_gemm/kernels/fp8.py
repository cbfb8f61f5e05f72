"""Grouped GEMMs over weights in float8_e4m3fn, with one scale for each block of 128 x 128:

    gate_up_fp8:       a[r] = act(gate[e] @ x[t]) * (up[e] @ x[t])  x (T, H), t = sorted_slots[r] // top_k -> a (S, I)
    grouped_gemm_fp8:  y[r] = w[e] @ x[r]                           x (S, K) -> y (S, N)

An activation in fp8 comes with a scale for each 128 columns of each row (quantize.py). Then codes are multiplied with
codes, and `gate_up_fp8` answers in the same form: its tiles of 128 columns find their own scales. An activation in
another dtype meets weight codes converted to that dtype, exactly, in registers. Either way products are summed over 128
of K, scaled, and added in fp32:

    y[r, n] = sum over the blocks k of x_scale[r, k] * w_scale[e, n // 128, k] * (sum in k of x_codes * w_codes)

Hopper adds fp8 products with about 14 bits: too coarse for more than one block.

A program owns BLOCK_M rows and two tiles of BLOCK_N weight rows: those of gate and up, or two neighbours. Tile heights,
the order of the operands and the grid are as in grouped_gemm.py, but converted codes can only be the first operand.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .gate import _glu
from .gate_up import _store_glu
from .launch import cdiv, launch
from .quantize import _BLOCK, BLOCK, _from_codes, _load_scale, _quantize, _scale_row, scale_shift
from .tiles import add_bias, is_height, load_weight, locate_tile, store_rows, weight_descriptor


@triton.jit
def _load_weight(w_ptr, w_strides, expert, row, k, N, K, CONFIG: tl.constexpr):
    """[BLOCK_N, BLOCK_K] of an expert's weight (N, K), from this row and column on."""
    if CONFIG.USE_TMA:
        return load_weight(w_ptr, expert, row, k, CONFIG.BLOCK_N, CONFIG.BLOCK_K, False)
    else:
        offs_n = row + tl.arange(0, CONFIG.BLOCK_N)
        offs_k = k + tl.arange(0, CONFIG.BLOCK_K)
        w_ptrs = w_ptr + expert.to(tl.int64) * w_strides[0] + offs_n[:, None].to(tl.int64) * w_strides[1]
        w_ptrs += offs_k[None, :] * tl.cast(w_strides[2], tl.int64)
        return tl.load(w_ptrs, mask=(offs_n < N)[:, None] & (offs_k < K)[None, :], other=0.0)


@triton.jit
def _multiply(
    acc,
    x,  # [BM, BK]
    w,  # [BN, BK]
    x_scale,  # [BM], or None
    w_scale,  # one, or with ONE_SCALE false [BN]
    ROWS_FIRST: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """acc + x_scale * w_scale * (x @ w.T), [BM, BN]; all transposed if weights come first."""
    if w.dtype != x.dtype:
        w = _from_codes(w, x.dtype)
    ALONG_X: tl.constexpr = 1 if ROWS_FIRST else 0
    if ROWS_FIRST:
        product = tl.dot(x, w.T, input_precision=INPUT_PRECISION)
    else:
        product = tl.dot(w, x.T, input_precision=INPUT_PRECISION)
    scale = w_scale
    if x_scale is not None and ONE_SCALE:
        scale = tl.expand_dims(x_scale * w_scale, ALONG_X)
    elif x_scale is not None:
        scale = tl.expand_dims(x_scale, ALONG_X) * tl.expand_dims(w_scale, 1 - ALONG_X)
    elif not ONE_SCALE:
        scale = tl.expand_dims(w_scale, 1 - ALONG_X)
    return acc + product * scale


@triton.jit
def _computed_here(x):
    """x. Else LLVM scales the first product after the second, and both take registers at once."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=1)


@triton.jit
def _two_tiles(
    x_ptrs,  # [BLOCK_M, BLOCK_K], at the first columns
    x_desc,  # of the rows from `row` on, in place of x_ptrs; or None
    row,
    mask_m,
    x_scale_ptr,  # (T or S, ceil(K / 128)); None if x is not fp8
    x_rows,  # [BLOCK_M], which of its rows
    weights,  # w_ptr (E, N, K), w_strides, w_scale_ptr (E, scale_rows, ceil(K / 128)), half, scale_shift, scale_rows
    expert,
    first,
    second,
    N,
    K,
    CONFIG: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Rows of x times the BLOCK_N weight rows from `first` and from `second` on: two [BM, BN] in fp32."""
    BLOCK_M: tl.constexpr = mask_m.shape[0]
    BLOCK_N: tl.constexpr = CONFIG.BLOCK_N
    BLOCK_K: tl.constexpr = CONFIG.BLOCK_K
    w_ptr, w_strides, w_scale_ptr, half, scale_shift, scale_rows = weights
    ROWS_FIRST: tl.constexpr = x_scale_ptr is not None and CONFIG.MIN_M >= 64
    offs_k = tl.arange(0, BLOCK_K)
    k_blocks = tl.cdiv(K, _BLOCK)
    offs_n = tl.arange(0, BLOCK_N)
    # The scales of the weights, and those of activations, are 1 / 128 of them at most: 32 bits will do inside.
    w_scale_ptr += expert.to(tl.int64) * scale_rows * k_blocks
    offs_scale = _scale_row(first if ONE_SCALE else first + offs_n, half, scale_shift, scale_rows) * k_blocks
    second_offs_scale = _scale_row(second if ONE_SCALE else second + offs_n, half, scale_shift, scale_rows) * k_blocks
    acc = tl.zeros((BLOCK_M, BLOCK_N) if ROWS_FIRST else (BLOCK_N, BLOCK_M), tl.float32)
    second_acc = tl.zeros((BLOCK_M, BLOCK_N) if ROWS_FIRST else (BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, K, BLOCK_K):
        x_scale = None
        if x_scale_ptr is not None:
            x_scale = tl.load(x_scale_ptr + k // _BLOCK + x_rows * k_blocks, mask=mask_m, other=0.0)
        scale = _load_scale(w_scale_ptr + k // _BLOCK + offs_scale)
        second_scale = _load_scale(w_scale_ptr + k // _BLOCK + second_offs_scale)
        if x_desc is not None:
            # Rows past row_end are another expert's: they reach only parts of the sums that are never stored.
            x = x_desc.load([row, k])
        else:
            x = tl.load(x_ptrs, mask=mask_m[:, None] & (offs_k < K - k)[None, :], other=0.0)
            x_ptrs += BLOCK_K
        w = _load_weight(w_ptr, w_strides, expert, first, k, N, K, CONFIG)
        second_w = _load_weight(w_ptr, w_strides, expert, second, k, N, K, CONFIG)
        acc = _multiply(acc, x, w, x_scale, scale, ROWS_FIRST, ONE_SCALE, INPUT_PRECISION)
        if x_scale_ptr is not None:
            acc = _computed_here(acc)
        second_acc = _multiply(second_acc, x, second_w, x_scale, second_scale, ROWS_FIRST, ONE_SCALE, INPUT_PRECISION)
    if ROWS_FIRST:
        return acc, second_acc
    else:
        return acc.T, second_acc.T


@triton.jit
def _store_quantized(codes_ptr, scale_ptr, x, row, row_end, tile_n, N):
    """x [BM, 128] as fp8 codes (S, N) and scales (S, ceil(N / 128))."""
    offs_n = tile_n * _BLOCK + tl.arange(0, _BLOCK)
    codes, scale = _quantize(tl.where((offs_n < N)[None, :], x, 0.0), 1)
    store_rows(codes_ptr, codes, row, row_end, offs_n, N)
    offs_m = row + tl.arange(0, x.shape[0])
    scale_ptrs = scale_ptr + offs_m.to(tl.int64) * tl.cdiv(N, _BLOCK) + tile_n
    tl.store(scale_ptrs, scale, mask=offs_m < row_end)


@triton.jit(do_not_specialize=["max_tiles"])
def _gate_up_fp8_kernel(
    x_ptr,  # (T, H)
    x_scale_ptr,  # (T, ceil(H / 128)) fp32 if x is fp8, else None
    w_ptr,  # (E, 2I, H), rows [gate; up]; with USE_TMA a descriptor of it
    w_scale_ptr,  # (E, scale_rows, ceil(H / 128)) fp32 | e8m0 as uint8
    a_ptr,  # (S, I), dtype of x
    a_scale_ptr,  # (S, ceil(I / 128)) fp32 if x is fp8, else None
    z_ptr,  # (S, 2I), rows [gate; up] before the activation; None if there is no backward
    sorted_slots_ptr,  # (S,) int32
    schedule_ptr,  # (5, max_tiles) int32
    max_tiles,
    top_k,
    I,
    H,
    scale_shift,
    scale_rows,
    stride_xt,
    w_strides,
    CONFIG: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    GATE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    n_tiles = tl.cdiv(I, CONFIG.BLOCK_N)
    expert, _, row, row_end, tile_n = locate_tile(schedule_ptr, max_tiles, n_tiles, CONFIG.BLOCK_M, CONFIG.GROUP_M)
    if expert < 0:
        return
    weights = (w_ptr, w_strides, w_scale_ptr, I, scale_shift, scale_rows)
    for i in tl.static_range((CONFIG.BLOCK_M // CONFIG.MIN_M).bit_length()):
        if is_height(row_end - row, i, CONFIG):
            offs_m = row + tl.arange(0, CONFIG.BLOCK_M >> i)
            mask_m = offs_m < row_end
            token = tl.load(sorted_slots_ptr + offs_m, mask=mask_m, other=0) // top_k
            x_ptrs = x_ptr + token[:, None].to(tl.int64) * stride_xt + tl.arange(0, CONFIG.BLOCK_K)[None, :]
            gate, up = _two_tiles(
                x_ptrs,
                None,
                row,
                mask_m,
                x_scale_ptr,
                token,
                weights,
                expert,
                tile_n * CONFIG.BLOCK_N,
                tile_n * CONFIG.BLOCK_N + I,
                2 * I,
                H,
                CONFIG,
                ONE_SCALE,
                INPUT_PRECISION,
            )
            if a_scale_ptr is not None:
                _store_quantized(a_ptr, a_scale_ptr, _glu(gate, up, GATE), row, row_end, tile_n, I)
            else:
                _store_glu(a_ptr, z_ptr, None, gate, up, row, row_end, tile_n, I, GATE)


@triton.jit(do_not_specialize=["max_tiles"])
def _grouped_gemm_fp8_kernel(
    x_ptr,  # (S, K)
    x_desc,  # with USE_TMA a descriptor of x, else x
    x_scale_ptr,  # (S, ceil(K / 128)) fp32 if x is fp8, else None
    w_ptr,  # (E, N, K); with USE_TMA a descriptor of it
    w_scale_ptr,  # (E, scale_rows, ceil(K / 128)) fp32 | e8m0 as uint8
    bias_ptr,  # (E, N), or None
    y_ptr,  # (S, N)
    schedule_ptr,  # (5, max_tiles) int32
    max_tiles,
    N,
    K,
    half,
    scale_shift,
    scale_rows,
    stride_xm,
    w_strides,
    CONFIG: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    n_tiles = tl.cdiv(N, 2 * CONFIG.BLOCK_N)
    expert, _, row, row_end, tile_n = locate_tile(schedule_ptr, max_tiles, n_tiles, CONFIG.BLOCK_M, CONFIG.GROUP_M)
    if expert < 0:
        return
    weights = (w_ptr, w_strides, w_scale_ptr, half, scale_shift, scale_rows)
    first = tile_n * (2 * CONFIG.BLOCK_N)
    for i in tl.static_range((CONFIG.BLOCK_M // CONFIG.MIN_M).bit_length()):
        if is_height(row_end - row, i, CONFIG):
            offs_m = row + tl.arange(0, CONFIG.BLOCK_M >> i)
            mask_m = offs_m < row_end
            x_ptrs = x_ptr + offs_m[:, None].to(tl.int64) * stride_xm + tl.arange(0, CONFIG.BLOCK_K)[None, :]
            left, right = _two_tiles(
                x_ptrs,
                x_desc if CONFIG.USE_TMA and i == 0 else None,  # the descriptor reads boxes of BLOCK_M rows
                row,
                mask_m,
                x_scale_ptr,
                offs_m,
                weights,
                expert,
                first,
                first + CONFIG.BLOCK_N,
                N,
                K,
                CONFIG,
                ONE_SCALE,
                INPUT_PRECISION,
            )
            offs_n = first + tl.arange(0, CONFIG.BLOCK_N)
            left = add_bias(left, bias_ptr, expert, offs_n, N)
            right = add_bias(right, bias_ptr, expert, offs_n + CONFIG.BLOCK_N, N)
            store_rows(y_ptr, left, row, row_end, offs_n, N)
            store_rows(y_ptr, right, row, row_end, offs_n + CONFIG.BLOCK_N, N)


def gate_up_fp8(x, x_scale, w, w_scale, sorted_slots, schedule, top_k, gate, input_precision, config, z=None):
    """x (T, H), fp8 with its scale or another float without, w (E, 2I, H) fp8 -> a (S, I) in the form of x, its scale.

    z (S, 2I), if given, is filled, for an x that is not fp8. Rows of skipped slots stay unwritten. Scales: contiguous.
    """
    _, rows, hidden_dim = w.shape
    inter = rows // 2
    tiles = schedule.shape[1]
    a = torch.empty((sorted_slots.numel(), inter), dtype=x.dtype, device=x.device)
    a_scale = None
    if x_scale is not None:
        a_scale = torch.empty((sorted_slots.numel(), cdiv(inter, BLOCK)), dtype=torch.float32, device=x.device)
    shift = scale_shift(inter, w_scale.shape[1])
    sizes = (top_k, inter, hidden_dim, shift, w_scale.shape[1], x.stride(0), w.stride())
    one_scale = (inter + shift) % config.BLOCK_N == 0
    w_arg = weight_descriptor(w, config.BLOCK_N, config.BLOCK_K) if config.USE_TMA else w
    launch(
        _gate_up_fp8_kernel,
        (tiles * cdiv(inter, config.BLOCK_N), 1, 1),
        (x, x_scale, w_arg, w_scale, a, a_scale, z, sorted_slots, schedule),
        (tiles,),
        (*sizes, config, one_scale, gate, input_precision),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return a, a_scale


def grouped_gemm_fp8(x, x_scale, w, w_scale, schedule, input_precision, config, y, shift=0, bias=None):
    """x (S, K) as in `gate_up_fp8`, w (E, N, K) fp8 -> y (S, N); rows that belong to no expert keep what y held.

    shift: `scale_shift`, where w is [gate; up]. bias: contiguous (E, N), or None.
    """
    _, N, K = w.shape
    tiles = schedule.shape[1]
    sizes = (N, K, N // 2, shift, w_scale.shape[1], x.stride(0), w.stride())
    one_scale = shift == 0 or N // 2 % config.BLOCK_N == 0
    x_arg, w_arg = x, w
    if config.USE_TMA:
        x_arg = TensorDescriptor(x, x.shape, x.stride(), [config.BLOCK_M, config.BLOCK_K])
        w_arg = weight_descriptor(w, config.BLOCK_N, config.BLOCK_K)
    launch(
        _grouped_gemm_fp8_kernel,
        (tiles * cdiv(N, 2 * config.BLOCK_N), 1, 1),
        (x, x_arg, x_scale, w_arg, w_scale, bias, y, schedule),
        (tiles,),
        (*sizes, config, one_scale, input_precision),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y
