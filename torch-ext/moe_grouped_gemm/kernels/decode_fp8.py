"""decode.py for weights in float8_e4m3fn with one scale for each block of 128 x 128; activations stay as they are.

    gate_up_decode_fp8:  a[s] = act(gate[e] @ x[t]) * (up[e] @ x[t])             s = t * top_k + k, e = top_k_index[s]
    down_decode_fp8:     out[t] = sum_k weight[s] * (down[e] @ a[s]) + addend[t]

Grids as in decode.py. Tiles of weights are [A, N, BLOCKS, 8, 16]: gate and up or slots, rows, blocks of 128 columns, 16
columns that a thread loads at once, whose products it adds before they meet their scale. In Gluon, for one reason: here
activations can be loaded as the weights lie, each thread the columns that it needs. Triton loads them in an order of
its own and exchanges them through shared memory in every step.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gate import _glu
from .launch import cdiv, launch, next_power_of_2, warp_size
from .quantize import _BLOCK, BLOCK, _from_codes, _load_scale, _scale_row, scale_shift

_CHUNK = gl.constexpr(16)
_CHUNKS = gl.constexpr(BLOCK // 16)


@gluon.jit
def _columns(LAYOUT: gl.constexpr, BLOCKS: gl.constexpr):
    """[BLOCKS, 8, 16]"""
    layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, LAYOUT))
    block = gl.arange(0, BLOCKS, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    chunk = gl.arange(0, _CHUNKS, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    column = gl.arange(0, _CHUNK, gl.SliceLayout(0, gl.SliceLayout(0, layout)))
    blocks = gl.expand_dims(gl.expand_dims(block, 1), 2) * _BLOCK
    chunks = gl.expand_dims(gl.expand_dims(chunk, 0), 2) * _CHUNK
    return blocks + chunks + gl.expand_dims(gl.expand_dims(column, 0), 0)


@gluon.jit
def _last_dims(x):
    """[..., BLOCKS, 8, 16] -> [1, 1, BLOCKS, 8, 16]"""
    return gl.expand_dims(gl.expand_dims(x, 0), 0)


@gluon.jit
def _first_dims(x):
    """[A, N] -> [A, N, 1, 1, 1]"""
    return gl.expand_dims(gl.expand_dims(gl.expand_dims(x, 2), 3), 4)


@gluon.jit
def _load_codes(row_ptrs, mask, columns, K):
    """row_ptrs, mask [A, N] -> [A, N, BLOCKS, 8, 16]"""
    mask = _first_dims(mask) & _last_dims(columns < K)
    return gl.load(_first_dims(row_ptrs) + _last_dims(columns), mask=mask, other=0.0)


@gluon.jit
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
    BLOCK_N: gl.constexpr,
    BLOCKS: gl.constexpr,
    WARP: gl.constexpr,
    GATE: gl.constexpr,
):
    LAYOUT: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1, 1, _CHUNK], [1, 1, WARP // _CHUNKS, _CHUNKS, 1], [1, gl.num_warps(), 1, 1, 1], [4, 3, 2, 1, 0]
    )
    BLOCK_LAYOUT: gl.constexpr = gl.SliceLayout(3, gl.SliceLayout(4, LAYOUT))  # [A, N, BLOCKS]
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(2, BLOCK_LAYOUT)  # [A, N]
    slot = gl.program_id(0)
    expert = gl.load(top_k_index_ptr + slot).to(gl.int64)
    if (expert < 0) | (expert >= E):
        return
    half = gl.expand_dims(gl.arange(0, 2, gl.SliceLayout(1, ROW_LAYOUT)), 1)
    offs_n = gl.program_id(1) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, ROW_LAYOUT))
    mask_n = gl.expand_dims(offs_n < I, 0)
    rows = half * I + gl.expand_dims(offs_n, 0)
    row_ptrs = w_ptr + expert * stride_we + rows.to(gl.int64) * stride_wn
    k_blocks = gl.cdiv(H, _BLOCK)
    scale_ptrs = w_scale_ptr + expert * scale_rows * k_blocks + _scale_row(rows, I, scale_shift, scale_rows) * k_blocks
    offs_b = gl.arange(0, BLOCKS, gl.SliceLayout(0, gl.SliceLayout(0, BLOCK_LAYOUT)))
    x_ptr += (slot // top_k).to(gl.int64) * stride_xt
    columns = _columns(LAYOUT, BLOCKS)
    acc = gl.zeros((2, BLOCK_N, BLOCKS, _CHUNKS), gl.float32, gl.SliceLayout(4, LAYOUT))
    for block in range(0, k_blocks, BLOCKS):
        codes = _load_codes(row_ptrs, mask_n, columns + block * _BLOCK, H)
        x = gl.load(x_ptr + columns + block * _BLOCK, mask=columns < H - block * _BLOCK, other=0.0).to(gl.float32)
        blocks = gl.expand_dims(gl.expand_dims(gl.minimum(block + offs_b, k_blocks - 1), 0), 0)
        scale = _load_scale(gl.expand_dims(scale_ptrs, 2) + blocks)
        products = gl.sum(_from_codes(codes, gl.float32) * _last_dims(x), 4)
        acc += products * gl.expand_dims(scale, 3)
    z = gl.sum(gl.sum(acc, 3), 2)
    gate = gl.sum(gl.where(half == 0, z, 0.0), 0)
    up = gl.sum(gl.where(half == 1, z, 0.0), 0)
    a = _glu(gate, up, GATE)
    gl.store(a_ptr + slot.to(gl.int64) * I + offs_n, a.to(a_ptr.dtype.element_ty), mask=offs_n < I)


@gluon.jit
def _down_decode_fp8_kernel(
    a_ptr,  # (S, I)
    w_ptr,  # (E, H, I)
    w_scale_ptr,  # (E, ceil(H / 128), ceil(I / 128)) fp32 | e8m0 as uint8
    top_k_index_ptr,  # (S,) int32 | int64
    top_k_weights_ptr,  # (S,)
    addend_ptr,  # (T, H), or None
    out_ptr,  # (T, H)
    top_k,
    E,
    I,
    H,
    stride_we,
    stride_wn,
    stride_addend,
    BLOCK_N: gl.constexpr,
    BLOCKS: gl.constexpr,
    WARP: gl.constexpr,
):
    SLOTS: gl.constexpr = gl.num_warps()  # a warp multiplies the rows of one expert
    LAYOUT: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1, 1, _CHUNK], [1, 1, WARP // _CHUNKS, _CHUNKS, 1], [SLOTS, 1, 1, 1, 1], [4, 3, 2, 1, 0]
    )
    BLOCK_LAYOUT: gl.constexpr = gl.SliceLayout(3, gl.SliceLayout(4, LAYOUT))
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(2, BLOCK_LAYOUT)
    SLOT_LAYOUT: gl.constexpr = gl.SliceLayout(1, ROW_LAYOUT)
    token = gl.program_id(0).to(gl.int64)
    offs_n = gl.program_id(1) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, ROW_LAYOUT))
    k_blocks = gl.cdiv(I, _BLOCK)
    scale_rows = gl.cdiv(H, _BLOCK)
    scale_row = _scale_row(offs_n, H, 0, scale_rows) * k_blocks
    offs_b = gl.arange(0, BLOCKS, gl.SliceLayout(0, gl.SliceLayout(0, BLOCK_LAYOUT)))
    columns = _columns(LAYOUT, BLOCKS)
    out = gl.zeros((BLOCK_N,), gl.float32, gl.SliceLayout(0, ROW_LAYOUT))
    for first in range(0, top_k, SLOTS):
        k = first + gl.arange(0, SLOTS, SLOT_LAYOUT)
        slot = token * top_k + k
        expert = gl.load(top_k_index_ptr + slot, mask=k < top_k, other=-1).to(gl.int64)
        # A skipped slot has no row in `a`; its weight, and the scales of an expert that it stands for, may be NaN.
        is_ours = (expert >= 0) & (expert < E)
        expert = gl.where(is_ours, expert, 0)
        weight = gl.load(top_k_weights_ptr + slot, mask=is_ours, other=0.0).to(gl.float32)
        mask = gl.expand_dims(is_ours, 1) & gl.expand_dims(offs_n < H, 0)
        row_ptrs = w_ptr + gl.expand_dims(expert * stride_we, 1) + gl.expand_dims(offs_n.to(gl.int64) * stride_wn, 0)
        scale_ptrs = w_scale_ptr + gl.expand_dims(expert * scale_rows * k_blocks, 1) + gl.expand_dims(scale_row, 0)
        a_ptrs = gl.expand_dims(gl.expand_dims(gl.expand_dims(gl.expand_dims(a_ptr + slot * I, 1), 2), 3), 4)
        acc = gl.zeros((SLOTS, BLOCK_N, BLOCKS, _CHUNKS), gl.float32, gl.SliceLayout(4, LAYOUT))
        for block in range(0, k_blocks, BLOCKS):
            codes = _load_codes(row_ptrs, mask, columns + block * _BLOCK, I)
            here = _last_dims(columns + block * _BLOCK)
            mask_a = _first_dims(gl.expand_dims(is_ours, 1)) & (here < I)
            a = gl.load(a_ptrs + here, mask=mask_a, other=0.0).to(gl.float32)
            blocks = gl.expand_dims(gl.expand_dims(gl.minimum(block + offs_b, k_blocks - 1), 0), 0)
            scale = _load_scale(gl.expand_dims(scale_ptrs, 2) + blocks)
            products = gl.sum(_from_codes(codes, gl.float32) * a, 4)
            acc += products * gl.expand_dims(scale, 3)
        rows = gl.sum(gl.sum(acc, 3), 2)
        out += gl.sum(gl.where(gl.expand_dims(is_ours, 1), gl.expand_dims(weight, 1) * rows, 0.0), 0)
    if addend_ptr is not None:
        out += gl.load(addend_ptr + token * stride_addend + offs_n, mask=offs_n < H, other=0.0).to(gl.float32)
    gl.store(out_ptr + token * H + offs_n, out.to(out_ptr.dtype.element_ty), mask=offs_n < H)


def gate_up_decode_fp8(x, w, w_scale, top_k_index, gate, config):
    """x (T, H), w (E, 2I, H) fp8, contiguous w_scale, top_k_index -> (S, I); rows of skipped slots stay unwritten."""
    experts, rows, hidden_dim = w.shape
    inter = rows // 2
    slots, top_k = top_k_index.numel(), top_k_index.shape[1]
    a = torch.empty((slots, inter), dtype=x.dtype, device=x.device)
    shift = scale_shift(inter, w_scale.shape[1])
    sizes = (top_k, experts, inter, hidden_dim, shift, w_scale.shape[1], x.stride(0), w.stride(0), w.stride(1))
    constants = (config.BLOCK_N, config.BLOCK_K // BLOCK, warp_size(x.device), gate)
    launch(
        _gate_up_decode_fp8_kernel,
        (slots, cdiv(inter, config.BLOCK_N), 1),
        (x, w, w_scale, a, top_k_index),
        (),
        (*sizes, *constants),
        num_warps=config.num_warps,
    )
    return a


def down_decode_fp8(a, w, w_scale, top_k_index, top_k_weights, config, addend=None):
    """a (S, I), w (E, H, I) fp8, addend (T, H) by rows, the others contiguous, two of them (T, top_k) -> (T, H)."""
    experts, hidden_dim, inter = w.shape
    tokens, top_k = top_k_index.shape
    out = torch.empty((tokens, hidden_dim), dtype=a.dtype, device=a.device)
    stride_addend = None if addend is None else addend.stride(0)
    sizes = (top_k, experts, inter, hidden_dim, w.stride(0), w.stride(1), stride_addend)
    constants = (config.BLOCK_N, config.BLOCK_K // BLOCK, warp_size(a.device))
    num_warps = min(config.num_warps, next_power_of_2(top_k))
    launch(
        _down_decode_fp8_kernel,
        (tokens, cdiv(hidden_dim, config.BLOCK_N), 1),
        (a, w, w_scale, top_k_index, top_k_weights, addend, out),
        (),
        (*sizes, *constants),
        num_warps=num_warps,
    )
    return out
