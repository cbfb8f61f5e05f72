"""decode.py for weights in float8_e4m3fn with one scale for each block of 128 x 128; activations stay as they are.

    gate_up_decode_fp8:  a[s] = act(gate[e] @ x[t]) * (up[e] @ x[t])             s = t * top_k + k, e = top_k_index[s]
    down_decode_fp8:     out[t] = sum_k weight[s] * (down[e] @ a[s])

Columns come as (blocks, 128), so that each thread needs few scales; they go to the activation, before the products.
Grids as in decode.py.
"""

import torch
import triton
import triton.language as tl

from .fp8 import _BLOCK, BLOCK, _from_codes, _load_scale, _scale_row, scale_shift
from .grouped_gemm import _glu
from .launch import cdiv, launch


@triton.jit
def _add_products(
    acc,  # [BLOCK_N, BLOCKS, 128]
    x,  # [BLOCKS, 128]
    w_ptr,  # the expert's (N, K)
    w_scale_ptr,  # the expert's (scale_rows, k_blocks)
    row,
    row_end,
    half,
    scale_shift,
    scale_rows,
    k_blocks,
    offs_b,
    mask_k,
    stride_wn,
    BLOCK_N: tl.constexpr,
    ONE_SCALE: tl.constexpr,
):
    """acc + w * x, elementwise, for BLOCK_N weight rows from `row` on."""
    rows = row + tl.arange(0, BLOCK_N)
    offs_k = offs_b[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    w_ptrs = w_ptr + rows[:, None, None].to(tl.int64) * stride_wn + offs_k[None, :, :]
    w = tl.load(w_ptrs, mask=(rows < row_end)[:, None, None] & mask_k[None, :, :], other=0.0)
    blocks = tl.minimum(offs_b, k_blocks - 1)
    if ONE_SCALE:
        scale = _load_scale(w_scale_ptr + _scale_row(row, half, scale_shift, scale_rows) * k_blocks + blocks)
        x = (x * scale[:, None])[None, :, :]
    else:
        scale_rows = _scale_row(rows, half, scale_shift, scale_rows)
        scale = _load_scale(w_scale_ptr + scale_rows[:, None] * k_blocks + blocks[None, :])
        x = x[None, :, :] * scale[:, :, None]
    return acc + _from_codes(w, tl.float32) * x


@triton.jit
def _sum(acc):
    return tl.sum(tl.sum(acc, axis=2), axis=1)


@triton.jit
def _gate_up_decode_fp8_kernel(
    x_ptr,  # (T, H)
    w_ptr,  # (E, 2I, H), rows [gate; up]
    w_scale_ptr,  # (E, scale_rows, ceil(H / 128)) fp32 | e8m0 as uint8
    a_ptr,  # (S, I)
    top_k_index_ptr,  # (S,) int32 | int64
    top_k,
    E,
    I,
    H,
    scale_shift,
    scale_rows,
    stride_xt,
    stride_we,
    stride_wn,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    GATE: tl.constexpr,
):
    slot = tl.program_id(0)
    expert = tl.load(top_k_index_ptr + slot).to(tl.int64)
    if (expert < 0) | (expert >= E):
        return
    row = tl.program_id(1) * BLOCK_N
    k_blocks = tl.cdiv(H, _BLOCK)
    w_ptr += expert * stride_we
    w_scale_ptr += expert * scale_rows * k_blocks
    x_ptr += (slot // top_k).to(tl.int64) * stride_xt
    gate = tl.zeros((BLOCK_N, BLOCKS, _BLOCK), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCKS, _BLOCK), tl.float32)
    for block in range(0, k_blocks, BLOCKS):
        offs_b = block + tl.arange(0, BLOCKS)
        offs_k = offs_b[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
        x = tl.load(x_ptr + offs_k, mask=offs_k < H, other=0.0).to(tl.float32)
        gate = _add_products(
            gate,
            x,
            w_ptr,
            w_scale_ptr,
            row,
            I,
            I,
            scale_shift,
            scale_rows,
            k_blocks,
            offs_b,
            offs_k < H,
            stride_wn,
            BLOCK_N,
            ONE_SCALE,
        )
        up = _add_products(
            up,
            x,
            w_ptr,
            w_scale_ptr,
            row + I,
            2 * I,
            I,
            scale_shift,
            scale_rows,
            k_blocks,
            offs_b,
            offs_k < H,
            stride_wn,
            BLOCK_N,
            ONE_SCALE,
        )
    a = _glu(_sum(gate), _sum(up), GATE)
    offs_n = row + tl.arange(0, BLOCK_N)
    tl.store(a_ptr + slot.to(tl.int64) * I + offs_n, a.to(a_ptr.dtype.element_ty), mask=offs_n < I)


@triton.jit
def _down_decode_fp8_kernel(
    a_ptr,  # (S, I)
    w_ptr,  # (E, H, I)
    w_scale_ptr,  # (E, ceil(H / 128), ceil(I / 128)) fp32 | e8m0 as uint8
    top_k_index_ptr,  # (S,) int32 | int64
    top_k_weights_ptr,  # (S,)
    out_ptr,  # (T, H)
    top_k,
    E,
    I,
    H,
    stride_we,
    stride_wn,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK_N
    k_blocks = tl.cdiv(I, _BLOCK)
    scale_rows = tl.cdiv(H, _BLOCK)
    acc = tl.zeros((BLOCK_N, BLOCKS, _BLOCK), tl.float32)
    for slot in tl.range(token * top_k, (token + 1) * top_k, loop_unroll_factor=2):
        expert = tl.load(top_k_index_ptr + slot).to(tl.int64)
        # A skipped slot has no row in `a`, and its weight may be anything, NaN included.
        is_ours = (expert >= 0) & (expert < E)
        columns = tl.where(is_ours, I, 0)
        expert = tl.where(is_ours, expert, 0)
        weight = tl.load(top_k_weights_ptr + slot).to(tl.float32)
        weight = tl.where(is_ours, weight, 0.0)
        for block in range(0, k_blocks, BLOCKS):
            offs_b = block + tl.arange(0, BLOCKS)
            offs_k = offs_b[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
            mask_k = offs_k < columns
            a = tl.load(a_ptr + slot * I + offs_k, mask=mask_k, other=0.0).to(tl.float32) * weight
            acc = _add_products(
                acc,
                a,
                w_ptr + expert * stride_we,
                w_scale_ptr + expert * scale_rows * k_blocks,
                row,
                H,
                H,
                0,
                scale_rows,
                k_blocks,
                offs_b,
                mask_k,
                stride_wn,
                BLOCK_N,
                True,
            )
    offs_n = row + tl.arange(0, BLOCK_N)
    tl.store(out_ptr + token * H + offs_n, _sum(acc).to(out_ptr.dtype.element_ty), mask=offs_n < H)


def gate_up_decode_fp8(x, w, w_scale, top_k_index, gate, config):
    """x (T, H), w (E, 2I, H) fp8, contiguous w_scale, top_k_index -> (S, I); rows of skipped slots stay unwritten."""
    experts, rows, hidden_dim = w.shape
    inter = rows // 2
    slots, top_k = top_k_index.numel(), top_k_index.shape[1]
    a = torch.empty((slots, inter), dtype=x.dtype, device=x.device)
    shift = scale_shift(inter, w_scale.shape[1])
    sizes = (top_k, experts, inter, hidden_dim, shift, w_scale.shape[1], x.stride(0), w.stride(0), w.stride(1))
    constants = (config.BLOCK_N, config.BLOCK_K // BLOCK, (inter + shift) % config.BLOCK_N == 0, tuple(gate))
    alignment = (x.data_ptr() % 16, w.data_ptr() % 16, w_scale.data_ptr() % 16, top_k_index.data_ptr() % 16)
    types = (x.device, x.dtype, w.dtype, w_scale.dtype, top_k_index.dtype)
    launch(
        _gate_up_decode_fp8_kernel,
        (slots, cdiv(inter, config.BLOCK_N), 1),
        (x, w, w_scale, a, top_k_index, *sizes, *constants),
        (types, alignment, sizes, constants, config.num_warps),
        num_warps=config.num_warps,
    )
    return a


def down_decode_fp8(a, w, w_scale, top_k_index, top_k_weights, config):
    """a (S, I), w (E, H, I) fp8, the others contiguous, top_k_index and top_k_weights (T, top_k) -> (T, H)."""
    experts, hidden_dim, inter = w.shape
    tokens, top_k = top_k_index.shape
    out = torch.empty((tokens, hidden_dim), dtype=a.dtype, device=a.device)
    sizes = (top_k, experts, inter, hidden_dim, w.stride(0), w.stride(1))
    constants = (config.BLOCK_N, config.BLOCK_K // BLOCK)
    tensors = (w, w_scale, top_k_index, top_k_weights)
    launch(
        _down_decode_fp8_kernel,
        (tokens, cdiv(hidden_dim, config.BLOCK_N), 1),
        (a, w, w_scale, top_k_index, top_k_weights, out, *sizes, *constants),
        (a.device, a.dtype, *((t.dtype, t.data_ptr() % 16) for t in tensors), sizes, constants, config.num_warps),
        num_warps=config.num_warps,
    )
    return out
