"""decode.py for weights in 4 bits.

    gate_up_decode_fp4:  a[s] = act(gate[e] @ x[t]) * (up[e] @ x[t])             s = t * top_k + k, e = top_k_index[s]
    down_decode_fp4:     out[t] = sum_k weight[s] * (down[e] @ a[s]) + addend[t]

with biases added to each product. Grids as in decode.py, products as in fp4_integers.py: a program of the first makes
integers of x for itself, and of its columns of a, for the second.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .fixed_point import _GROUPS, _PERIOD, _store_fixed_point, like_fixed_point
from .fp4_integers import (
    _PERIODS,
    _ROWS,
    _allocate,
    _along,
    _layout,
    _load_weights,
    _multiply,
    _places,
    _row_major,
    _rows_of,
    _share_fixed_point,
    _take_x,
)
from .fp4_registers import STEP, in_registers
from .gate import _glu
from .hopper import _barrier, _reinterpret
from .launch import cdiv, launch, next_power_of_2


@gluon.jit
def _gate_up_decode_fp4_kernel(
    x_ptr,  # (T, H)
    w_ptr,  # (E, 2I, H / 8) int32
    w_scale_ptr,  # (E, 2I, H / 32) fp32 | e8m0 as uint8, or (E, 2I, H / 256) as int64
    bias_ptr,  # (E, 2I), or None
    a_ptr,  # (S, periods, 2, 128) int8, and a_scale_ptr: of fixed_point.py
    a_scale_ptr,
    top_k_index_ptr,  # (S,) int32 | int64
    top_k,
    E,
    I,
    H,
    stride_xt,
    stride_we,  # these two in 16 bytes
    stride_wn,
    STEPS: gl.constexpr,  # at least those of H; a power of two
    SPLIT: gl.constexpr,  # warps that have every SPLIT-th step for the same rows
    BLOCK_N: gl.constexpr,
    EVEN: gl.constexpr,
    GATE: gl.constexpr,
):
    N: gl.constexpr = BLOCK_N // _ROWS
    places = _places(SPLIT, N)
    which, block, _, row, group = places
    slot = gl.program_id(0).to(gl.int64)
    expert = gl.load(top_k_index_ptr + slot).to(gl.int64)
    if (expert < 0) | (expert >= E):
        return
    EVERY: gl.constexpr = 2 if GATE.interleaved else 1  # row of the weight is one of gate
    up_offset = 1 if GATE.interleaved else I
    # Rows past the last are the last again, and what they give is not stored.
    first_n = gl.program_id(1) * BLOCK_N
    offs_n = first_n + block + row + group * 0
    first = gl.minimum(offs_n, I - 1).to(gl.int64) * EVERY
    second = gl.minimum(offs_n + _ROWS // 2, I - 1).to(gl.int64) * EVERY
    gate_rows, up_rows = (first, second), (first + up_offset, second + up_offset)
    weight = (w_ptr + expert * stride_we * 4, stride_wn * 4, w_scale_ptr, expert * (2 * I))
    everywhere = which >= 0
    gate_step = _load_weights(weight, gate_rows, places, which, H, EVEN, everywhere)
    up_step = _load_weights(weight, up_rows, places, which, H, EVEN, everywhere)
    x_smem = _allocate(STEPS, SPLIT)
    _share_fixed_point(x_smem, x_ptr + slot // top_k * stride_xt, H)
    WORDS: gl.constexpr = _layout(SPLIT, N, gl.num_warps())
    gate = gl.zeros((SPLIT, N, _PERIODS, 4, 2, _GROUPS, 4), gl.float32, WORDS)
    up = gate
    steps = gl.cdiv(H, SPLIT * _PERIODS * _PERIOD)
    _barrier()  # or there would be one in each step
    for step in range(steps):
        # After the last step that one again, whose weights are near.
        next_step = gl.minimum(step + 1, steps - 1) * SPLIT + which
        next_gate = _load_weights(weight, gate_rows, places, next_step, H, EVEN, everywhere)
        next_up = _load_weights(weight, up_rows, places, next_step, H, EVEN, everywhere)
        x = _take_x(x_smem, step, WORDS)
        gate = _multiply(gate, gate_step, x)
        up = _multiply(up, up_step, x)
        gate_step, up_step = next_gate, next_up
    gate = gl.sum(_rows_of(gate), 0)
    up = gl.sum(_rows_of(up), 0)
    offs_n = first_n + gl.arange(0, BLOCK_N, gate.type.layout)
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + expert * (2 * I) + offs_n * EVERY
        gate += gl.load(bias_ptrs, mask=offs_n < I, other=0.0).to(gl.float32)
        up += gl.load(bias_ptrs + up_offset, mask=offs_n < I, other=0.0).to(gl.float32)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    _store_fixed_point(a_ptr, a_scale_ptr, slot, first_n, gl.convert_layout(_glu(gate, up, GATE), LAYOUT), I)


@gluon.jit
def _share_slots(x_smem, first_step, x_ptr, x_scale_ptr, top_k_index_ptr, token, begin, top_k, E, K):
    """As many steps of rows of fixed_point.py into shared memory: of a token's slots, skipped ones as zeros."""
    codes, scales = x_smem
    STEPS: gl.constexpr = codes.shape[0]
    A: gl.constexpr = codes.shape[1]
    periods = gl.cdiv(K, _PERIOD)
    CODES: gl.constexpr = gl.BlockedLayout([1, 1, 1, 2], [1, 1, 2, 16], [1, A, 1, 1], [3, 2, 1, 0])
    _, is_ours = _expert_of(top_k_index_ptr, token, begin + _along(1, A, 4, CODES), top_k, E)
    row = token * top_k + begin + _along(1, A, 4, CODES)
    period = (first_step + _along(0, STEPS, 4, CODES)) * _PERIODS + _along(2, _PERIODS, 4, CODES)
    ptrs = x_ptr + (row * periods + period) * (2 * _PERIOD // 8) + _along(3, 2 * _PERIOD // 8, 4, CODES)
    codes = _reinterpret(codes, gl.int64, codes.shape, _row_major(6))
    codes.store(gl.load(ptrs, mask=is_ours & (period < periods), other=0).reshape(codes.shape))
    SCALES: gl.constexpr = gl.BlockedLayout([1, 1, 1, 1], [4, 1, 2, 4], [1, A, 1, 1], [3, 2, 1, 0])
    _, is_ours = _expert_of(top_k_index_ptr, token, begin + _along(1, A, 4, SCALES), top_k, E)
    row = token * top_k + begin + _along(1, A, 4, SCALES)
    period = (first_step + _along(0, STEPS, 4, SCALES)) * _PERIODS + _along(2, _PERIODS, 4, SCALES)
    group = period * _GROUPS + _along(3, _GROUPS, 4, SCALES)
    ptrs = x_scale_ptr + row * (periods * _GROUPS) + group
    scales = _reinterpret(scales, gl.float32, scales.shape, _row_major(4))
    scales.store(gl.load(ptrs, mask=is_ours & (group < K // 32), other=0.0))


@gluon.jit
def _multiply_piece(sums, first, last, x_smem, slots, weight, rows, places, steps, EVEN: gl.constexpr, is_ours):
    """Sums and the next step's weights, after these steps of the slots."""
    acc, next_weights = sums
    LAYOUT: gl.constexpr = acc.type.layout
    _share_slots(x_smem, first, *slots)
    _barrier()  # or there would be one in each step
    for step in range(first, last):
        weights = next_weights
        # After the last step that one again, whose weights are near.
        next_step = gl.minimum(step + 1, steps - 1)
        next_weights = _load_weights(weight, rows, places, next_step, slots[7], EVEN, is_ours)
        acc = _multiply(acc, weights, _take_x(x_smem, step - first, LAYOUT))
    return acc, next_weights


@gluon.jit
def _down_decode_fp4_kernel(
    a_ptr,  # (S, periods, 2, 16) int64, and a_scale_ptr: of fixed_point.py
    a_scale_ptr,
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
    stride_we,  # these two in 16 bytes
    stride_wn,
    stride_addend,
    STEPS: gl.constexpr,  # at least those of I; a power of two
    BLOCK_N: gl.constexpr,
    EVEN: gl.constexpr,
):
    SLOTS: gl.constexpr = gl.num_warps()
    N: gl.constexpr = BLOCK_N // _ROWS
    places = _places(SLOTS, N)
    which, block, _, row, _ = places
    token = gl.program_id(0).to(gl.int64)
    first_n = gl.program_id(1) * BLOCK_N
    offs_n = first_n + block + row
    rows = (gl.minimum(offs_n, H - 1).to(gl.int64), gl.minimum(offs_n + _ROWS // 2, H - 1).to(gl.int64))
    PIECE: gl.constexpr = min(STEPS, 16)  # steps whose part of a is in shared memory at a time
    x_smem = _allocate(PIECE, SLOTS)
    WORDS: gl.constexpr = _layout(SLOTS, N, SLOTS)
    zeros = gl.zeros((SLOTS, N, _PERIODS, 4, 2, _GROUPS, 4), gl.float32, WORDS)
    ROWS: gl.constexpr = _rows_of(zeros).type.layout
    out = gl.zeros((SLOTS, BLOCK_N), gl.float32, ROWS)
    offs_n = first_n + _along(1, BLOCK_N, 2, ROWS)
    steps = gl.cdiv(I, _PERIODS * _PERIOD)
    for begin in range(0, top_k, SLOTS):
        expert, is_ours = _expert_of(top_k_index_ptr, token, begin + which, top_k, E)
        weight = (w_ptr + expert * stride_we * 4, stride_wn * 4, w_scale_ptr, expert * H)
        next_weights = _load_weights(weight, rows, places, 0, I, EVEN, is_ours)
        sums = (zeros, next_weights)
        slots = (a_ptr, a_scale_ptr, top_k_index_ptr, token, begin, top_k, E, I)
        args = (x_smem, slots, weight, rows, places, steps)
        if STEPS == PIECE:
            sums = _multiply_piece(sums, 0, steps, *args, EVEN, is_ours)
        else:
            for first in range(0, steps, PIECE):
                sums = _multiply_piece(sums, first, gl.minimum(first + PIECE, steps), *args, EVEN, is_ours)
        acc = sums[0]
        y = _rows_of(acc)
        k = begin + _along(0, SLOTS, 2, ROWS)
        expert, is_ours = _expert_of(top_k_index_ptr, token, k, top_k, E)
        if bias_ptr is not None:
            y += gl.load(bias_ptr + expert * H + offs_n, mask=is_ours & (offs_n < H), other=0.0).to(gl.float32)
        share = gl.load(top_k_weights_ptr + token * top_k + k, mask=is_ours, other=0.0).to(gl.float32)
        # The weight of a skipped slot may be NaN.
        out += gl.where(is_ours, share * y, 0.0)
    out = gl.sum(out, 0)
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


def _steps(K, split=1):
    """How many steps of this many warps K takes, at most: a power of two; and whether all of them are whole."""
    return next_power_of_2(cdiv(K, split * STEP)), K % (split * STEP) == 0


def gate_up_decode_fp4(x, w, w_scale, top_k_index, gate, config, bias=None):
    """x (T, H) in 16 bits, w (E, 2I, H / 2) as in grouped_gemm_fp4_few, the others contiguous -> (S, I) in fixed point.

    Rows of skipped slots stay unwritten.
    """
    experts, inter, hidden_dim = w.shape[0], w.shape[1] // 2, x.shape[1]
    slots, top_k = top_k_index.numel(), top_k_index.shape[1]
    a, a_scale = like_fixed_point(slots, inter, x.device)
    words, w_scale = in_registers(w, w_scale, hidden_dim)
    split = max(1, config.num_warps * _ROWS.value // config.BLOCK_N)
    steps, even = _steps(hidden_dim, split)
    sizes = (top_k, experts, inter, hidden_dim, x.stride(0), words.stride(0) // 4, words.stride(1) // 4)
    launch(
        _gate_up_decode_fp4_kernel,
        (slots, cdiv(inter, config.BLOCK_N), 1),
        (x, words, w_scale, bias, a, a_scale, top_k_index),
        (),
        (*sizes, steps, split, config.BLOCK_N, even, gate),
        num_warps=config.num_warps,
    )
    return a, a_scale


def down_decode_fp4(a, w, w_scale, top_k_index, top_k_weights, config, dtype, bias=None, addend=None):
    """a (S, I) in fixed point, w (E, H, I / 2), addend (T, H) by rows, the others contiguous -> (T, H) of dtype."""
    codes, scale = a
    (experts, hidden_dim), inter = w.shape[:2], 2 * w.shape[2]
    tokens, top_k = top_k_index.shape
    out = torch.empty((tokens, hidden_dim), dtype=dtype, device=codes.device)
    words, w_scale = in_registers(w, w_scale, inter)
    steps, even = _steps(inter)
    stride_addend = None if addend is None else addend.stride(0)
    sizes = (top_k, experts, inter, hidden_dim, words.stride(0) // 4, words.stride(1) // 4, stride_addend)
    launch(
        _down_decode_fp4_kernel,
        (tokens, cdiv(hidden_dim, config.BLOCK_N), 1),
        (codes.view(torch.int64), scale, words, w_scale, bias, top_k_index, top_k_weights, addend, out),
        (),
        (*sizes, steps, config.BLOCK_N, even),
        num_warps=min(config.num_warps, next_power_of_2(top_k)),
    )
    return out
