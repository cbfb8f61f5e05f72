"""decode.py for weights in 4 bits, through the tensor cores: a product with one token's numbers would take every unit.

    gate_up_decode_fp4:  a[s] = act(gate[e] @ x[t]) * (up[e] @ x[t])             s = t * top_k + k, e = top_k_index[s]
    down_decode_fp4:     out[t] = sum_k weight[s] * (down[e] @ a[s]) + addend[t]

with biases added to each product. Grids as in decode.py, tiles of weights as in fp4_registers.py. Of the eight columns
that mma has for x, in the first kernel all are the same. In the second, columns are a token's slots, and a warp has
rows of the weight of one slot: of the products of all columns it takes that slot's.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .fp4_registers import (
    _STEP,
    _WORDS,
    STEP,
    _load_weights,
    _load_x,
    _multiply,
    _next_step,
    _rescaled,
    _scale_layout,
    _x_columns,
    in_registers,
)
from .gate import _glu
from .launch import cdiv, launch, next_power_of_2

COLUMNS = gl.constexpr(8)


@gluon.jit
def _gate_up_decode_fp4_kernel(
    x_ptr,  # (T, H)
    w_ptr,  # (E, 2I, H / 8) int32
    w_scale_ptr,  # (E, 2I, H / 32) fp32 | e8m0 as uint8, or (E, 2I, H / 256) as int64
    bias_ptr,  # (E, 2I), or None
    a_ptr,  # (S, I)
    top_k_index_ptr,  # (S,) int32 | int64
    top_k,
    E,
    I,
    H,
    stride_xt,
    stride_we,
    stride_wn,
    BLOCK_N: gl.constexpr,
    EVEN: gl.constexpr,
    GATE: gl.constexpr,
):
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [gl.num_warps(), 1], [16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, _WORDS // 2)
    SCALES: gl.constexpr = _scale_layout(BLOCK_N, MMA).type.layout
    slot = gl.program_id(0)
    expert = gl.load(top_k_index_ptr + slot).to(gl.int64)
    if (expert < 0) | (expert >= E):
        return
    EVERY: gl.constexpr = 2 if GATE.interleaved else 1  # row of the weight is one of gate
    up_offset = 1 if GATE.interleaved else I
    # Rows past the last are the last again, and what they give is not stored.
    first_n = gl.program_id(1) * BLOCK_N
    offs_n = gl.minimum(first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, A)), I - 1)
    gate_ptrs = w_ptr + expert * stride_we + gl.expand_dims((offs_n * EVERY).to(gl.int64) * stride_wn, 1)
    gate_ptrs += gl.expand_dims(gl.arange(0, _STEP // 8, gl.SliceLayout(0, A)), 0)
    up_ptrs = gate_ptrs + gl.cast(up_offset, gl.int64) * stride_wn
    gate_rows = gl.minimum(first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, SCALES)), I - 1) * EVERY + expert * (2 * I)
    up_rows = gate_rows + up_offset
    k_of_x, column = _x_columns(COLUMNS, x_ptr.dtype.element_ty, MMA)
    x_ptrs = x_ptr + (slot // top_k).to(gl.int64) * stride_xt + k_of_x + column * 0
    gate = gl.zeros((BLOCK_N, COLUMNS), gl.float32, MMA)
    up = gl.zeros((BLOCK_N, COLUMNS), gl.float32, MMA)
    gate_step = _load_weights(gate_ptrs, w_scale_ptr, gate_rows, 0, H, EVEN)
    up_step = _load_weights(up_ptrs, w_scale_ptr, up_rows, 0, H, EVEN)
    for k in range(0, H, _STEP):
        x = _load_x(x_ptrs, k_of_x, k, H, EVEN)
        next_gate = _load_weights(gate_ptrs, w_scale_ptr, gate_rows, _next_step(k, H), H, EVEN)
        next_up = _load_weights(up_ptrs, w_scale_ptr, up_rows, _next_step(k, H), H, EVEN)
        gate = _multiply(gate, *gate_step, x, MMA)
        up = _multiply(up, *up_step, x, MMA)
        gate_step, up_step = next_gate, next_up
    gate = _rescaled(gate, gate_step[1], x_ptr.dtype.element_ty)
    up = _rescaled(up, up_step[1], x_ptr.dtype.element_ty)
    first = gl.expand_dims(gl.arange(0, COLUMNS, gl.SliceLayout(0, MMA)) == 0, 0)
    gate = gl.sum(gl.where(first, gate, 0.0), 1)
    up = gl.sum(gl.where(first, up, 0.0), 1)
    offs_n = gl.program_id(1) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, MMA))
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + expert * (2 * I) + offs_n * EVERY
        gate += gl.load(bias_ptrs, mask=offs_n < I, other=0.0).to(gl.float32)
        up += gl.load(bias_ptrs + up_offset, mask=offs_n < I, other=0.0).to(gl.float32)
    a = _glu(gate, up, GATE)
    gl.store(a_ptr + slot.to(gl.int64) * I + offs_n, a.to(a_ptr.dtype.element_ty), mask=offs_n < I)


@gluon.jit
def _down_decode_fp4_kernel(
    a_ptr,  # (S, I)
    w_ptr,  # (E, H, I / 8) int32
    w_scale_ptr,  # (E, H, I / 32) fp32 | e8m0 as uint8, or (E, H, I / 256) as int64
    bias_ptr,  # (E, H), or None
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
    EVEN: gl.constexpr,
):
    SLOTS: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = SLOTS * BLOCK_N
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [SLOTS, 1], [16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, _WORDS // 2)
    SCALES: gl.constexpr = _scale_layout(ROWS, MMA).type.layout
    token = gl.program_id(0).to(gl.int64)
    first_n = gl.program_id(1) * BLOCK_N
    k_of_x, column = _x_columns(COLUMNS, a_ptr.dtype.element_ty, MMA)
    # A column past the token's slots, and that of a skipped slot, which has no row in `a`, hold anything.
    out = gl.zeros((ROWS,), gl.float32, gl.SliceLayout(1, MMA))
    for first in range(0, top_k, SLOTS):
        rows = gl.arange(0, ROWS, gl.SliceLayout(1, A))
        expert, is_ours = _expert_of(top_k_index_ptr, token, first + rows // BLOCK_N, top_k, E)
        offs_n = gl.minimum(first_n + rows % BLOCK_N, H - 1).to(gl.int64)
        w_ptrs = w_ptr + gl.expand_dims(expert * stride_we + offs_n * stride_wn, 1)
        w_ptrs += gl.expand_dims(gl.arange(0, _STEP // 8, gl.SliceLayout(0, A)), 0)
        is_read = gl.expand_dims(is_ours, 1)
        rows = gl.arange(0, ROWS, gl.SliceLayout(1, SCALES))
        expert, _ = _expert_of(top_k_index_ptr, token, first + rows // BLOCK_N, top_k, E)
        scale_rows = expert * H + gl.minimum(first_n + rows % BLOCK_N, H - 1)
        x_ptrs = a_ptr + (token * top_k + gl.minimum(first + column % SLOTS, top_k - 1)) * I + k_of_x
        acc = gl.zeros((ROWS, COLUMNS), gl.float32, MMA)
        step = _load_weights(w_ptrs, w_scale_ptr, scale_rows, 0, I, EVEN, is_read)
        for k in range(0, I, _STEP):
            x = _load_x(x_ptrs, k_of_x, k, I, EVEN)
            next_step = _load_weights(w_ptrs, w_scale_ptr, scale_rows, _next_step(k, I), I, EVEN, is_read)
            acc = _multiply(acc, *step, x, MMA)
            step = next_step
        acc = _rescaled(acc, step[1], a_ptr.dtype.element_ty)
        rows = gl.arange(0, ROWS, gl.SliceLayout(1, MMA))
        own = gl.expand_dims(rows // BLOCK_N, 1) == gl.expand_dims(gl.arange(0, COLUMNS, gl.SliceLayout(0, MMA)), 0)
        y = gl.sum(gl.where(own, acc, 0.0), 1)
        k = first + rows // BLOCK_N
        expert, is_ours = _expert_of(top_k_index_ptr, token, k, top_k, E)
        if bias_ptr is not None:
            offs_n = first_n + rows % BLOCK_N
            y += gl.load(bias_ptr + expert * H + offs_n, mask=is_ours & (offs_n < H), other=0.0).to(gl.float32)
        weight = gl.load(top_k_weights_ptr + token * top_k + k, mask=is_ours, other=0.0).to(gl.float32)
        # The scales of an expert that a skipped slot stands for, and its weight, may be NaN.
        out += gl.where(is_ours, weight * y, 0.0)
    out = gl.sum(out.reshape([SLOTS, BLOCK_N]), 0)
    offs_n = first_n + gl.arange(0, BLOCK_N, out.type.layout)
    if addend_ptr is not None:
        out += gl.load(addend_ptr + token * stride_addend + offs_n, mask=offs_n < H, other=0.0).to(gl.float32)
    gl.store(out_ptr + token * H + offs_n, out.to(out_ptr.dtype.element_ty), mask=offs_n < H)


@gluon.jit
def _expert_of(top_k_index_ptr, token, k, top_k, E):
    """Of a token's slots k, int64: 0 where there is none, and whether there is."""
    expert = gl.load(top_k_index_ptr + token * top_k + k, mask=k < top_k, other=-1).to(gl.int64)
    is_ours = (expert >= 0) & (expert < E)
    return gl.where(is_ours, expert, 0), is_ours


def gate_up_decode_fp4(x, w, w_scale, top_k_index, gate, config, bias=None):
    """x (T, H) in 16 bits, w (E, 2I, H / 2) as in grouped_gemm_fp4_few, the others contiguous -> (S, I).

    Rows of skipped slots stay unwritten.
    """
    experts, inter, hidden_dim = w.shape[0], w.shape[1] // 2, x.shape[1]
    slots, top_k = top_k_index.numel(), top_k_index.shape[1]
    a = torch.empty((slots, inter), dtype=x.dtype, device=x.device)
    words, w_scale = in_registers(w, w_scale, hidden_dim)
    sizes = (top_k, experts, inter, hidden_dim, x.stride(0), words.stride(0), words.stride(1))
    launch(
        _gate_up_decode_fp4_kernel,
        (slots, cdiv(inter, config.BLOCK_N), 1),
        (x, words, w_scale, bias, a, top_k_index),
        (),
        (*sizes, config.BLOCK_N, hidden_dim % STEP == 0, gate),
        num_warps=config.num_warps,
    )
    return a


def down_decode_fp4(a, w, w_scale, top_k_index, top_k_weights, config, bias=None, addend=None):
    """a (S, I), w (E, H, I / 2), addend (T, H) by rows, the others contiguous, two of them (T, top_k) -> (T, H)."""
    (experts, hidden_dim), inter = w.shape[:2], a.shape[1]
    tokens, top_k = top_k_index.shape
    out = torch.empty((tokens, hidden_dim), dtype=a.dtype, device=a.device)
    words, w_scale = in_registers(w, w_scale, inter)
    stride_addend = None if addend is None else addend.stride(0)
    sizes = (top_k, experts, inter, hidden_dim, words.stride(0), words.stride(1), stride_addend)
    launch(
        _down_decode_fp4_kernel,
        (tokens, cdiv(hidden_dim, config.BLOCK_N), 1),
        (a, words, w_scale, bias, top_k_index, top_k_weights, addend, out),
        (),
        (*sizes, config.BLOCK_N, inter % STEP == 0),
        num_warps=min(config.num_warps, next_power_of_2(top_k)),
    )
    return out
