"""Codes in float8_e4m3fn and their scales, one for each 128 columns of a row or each 128 x 128 of a weight.

    quantize_rows:   x (T, K) -> codes (T, K) and scales (T, ceil(K / 128)), x = codes * scale
    quantize_slots:  the same, and each row copied to where its slots are in expert order

Grid: (T, groups of eight blocks of K).
"""

import torch
import triton
import triton.language as tl

from .launch import cdiv, launch

BLOCK = 128  # rows and columns of weights, and columns of activations, that share a scale
_BLOCK = tl.constexpr(BLOCK)


@triton.jit
def _from_codes(codes, dtype: tl.constexpr):
    """E4M3 codes in another dtype, exactly. As uint8 they are decoded by hand, for GPUs that do not know the type."""
    if codes.dtype == tl.uint8:
        codes = codes.to(tl.int32)
        # Exponent and mantissa in their places in fp32, whose exponents are biased by 120 more; subnormals alike.
        x = (((codes & 0x80) << 24) | ((codes & 0x7F) << 20)).to(tl.float32, bitcast=True) * 2.0**120
        return tl.where((codes & 0x7F) == 0x7F, float("nan"), x).to(dtype)
    else:
        return codes.to(dtype)


@triton.jit
def _load_scale(ptrs):
    """fp32 scales, or the exponents of float8_e8m0fnu as uint8: 2 ** (exponent - 127), 255 for NaN."""
    scale = tl.load(ptrs)
    if scale.dtype == tl.uint8:
        bits = scale.to(tl.int32) << 23
        bits = tl.where(scale == 0, 1 << 22, tl.where(scale == 255, 0x7FC00000, bits))
        scale = bits.to(tl.float32, bitcast=True)
    return scale


@triton.jit
def _scale_row(row, half, shift, rows):
    """Where the scales of a weight row lie. Those from `half` on may have blocks of their own: see `scale_shift`."""
    return tl.minimum((row + tl.where(row >= half, shift, 0)) // _BLOCK, rows - 1)


def scale_shift(inter, scale_rows):
    """How far up's rows lie further apart from gate's in the blocks of scales than in gate_up_proj (E, 2I, H).

    Blocks are counted through both, unless there are more scales than that takes: then through each for itself.
    """
    return 0 if scale_rows == cdiv(2 * inter, BLOCK) else -inter % BLOCK


@triton.jit
def _quantize(x, axis: tl.constexpr):
    """fp8 codes of x, fp32, and the scale of each row along `axis`: its greatest magnitude becomes 448.

    The least scale is the least normal number: zeros stay zeros, and nothing is divided by zero. A NaN stays one.
    """
    scale = tl.maximum(tl.max(tl.abs(x), axis=axis) / 448.0, 1.1754943508222875e-38)
    return (x / tl.expand_dims(scale, axis)).to(tl.float8e4nv), scale


@triton.jit(do_not_specialize=["rows"])
def _quantize_rows_kernel(
    x_ptr,  # (T, K)
    positions_ptr,  # (T * top_k,) int32: rows of codes that a row of x becomes, -1: none; None: its own
    codes_ptr,  # (rows, K) fp8
    scale_ptr,  # (rows, ceil(K / 128)) fp32; with positions (ceil(K / 128), rows)
    rows,
    top_k,
    K,
    stride_xt,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_b = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    offs_k = offs_b[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    x = tl.load(x_ptr + row * stride_xt + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
    codes, scale = _quantize(x, 1)
    blocks = tl.cdiv(K, _BLOCK)
    if positions_ptr is None:
        tl.store(codes_ptr + row * K + offs_k, codes, mask=offs_k < K)
        tl.store(scale_ptr + row * blocks + offs_b, scale, mask=offs_b < blocks)
    else:
        for slot in range(row * top_k, (row + 1) * top_k):
            position = tl.load(positions_ptr + slot).to(tl.int64)
            here = position >= 0
            tl.store(codes_ptr + position * K + offs_k, codes, mask=here & (offs_k < K))
            tl.store(scale_ptr + offs_b.to(tl.int64) * rows + position, scale, mask=here & (offs_b < blocks))


def quantize_rows(x):
    """x (T, K) with contiguous rows -> fp8 codes (T, K) and fp32 scales (T, ceil(K / 128)), x = codes * scale."""
    return _launch_quantize(x, None, x.shape[0], (x.shape[0], cdiv(x.shape[1], BLOCK)))


def quantize_slots(x, slot_positions):
    """`quantize_rows`, with the row of each slot in its place in expert order: codes (S, K), scales (K / 128, S).

    Rows past the last routed one stay unwritten.
    """
    slots = slot_positions.numel()
    return _launch_quantize(x, slot_positions, slots, (cdiv(x.shape[1], BLOCK), slots))


def _launch_quantize(x, positions, rows, scale_shape):
    tokens, K = x.shape
    codes = torch.empty((rows, K), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(scale_shape, dtype=torch.float32, device=x.device)
    top_k = rows // tokens
    launch(
        _quantize_rows_kernel,
        (tokens, cdiv(K, 8 * BLOCK), 1),
        (x, positions, codes, scale),
        (rows,),
        (top_k, K, x.stride(0), 8),
        num_warps=2,
    )
    return codes, scale
