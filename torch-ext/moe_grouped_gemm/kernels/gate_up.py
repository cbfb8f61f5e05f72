"""The first grouped GEMM of a layer, with the gate in its epilogue:

    a[r] = act(gate[e] @ x[t]) * (up[e] @ x[t])     x (T, H), t = sorted_slots[r] // top_k -> a (S, I)

With biases, gate[e] @ x[t] + gate_bias[e] and so on. GATE as in gate.py. Weights, the order of operands, tiles and grid
are as in grouped_gemm.py. Where the weight comes first, gate and up are two dots: a weight tile then goes from shared
memory straight to the MMA. One dot would take the detour of registers, since the first operand may not be reshaped in
shared memory; interleaved rows, which no slice of a tile can part, have to take it.

Tuples that are handed around: rows (x_ptr, sorted_slots_ptr, top_k, stride_xt), w_strides (of E, N, K),
out (a_ptr, z_ptr), tile (expert, row, row_end, tile_n).
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .gate import _gate_and_up, _glu, _halves
from .launch import cdiv, launch
from .tiles import is_height, locate_tile, store_rows, weight_descriptor


@triton.jit
def _gather(rows, row, row_end, offs_k, BLOCK_M: tl.constexpr):
    """Pointers to the tokens of BLOCK_M sorted rows, and which of the rows there are."""
    x_ptr, sorted_slots_ptr, top_k, stride_xt = rows
    offs_m = row + tl.arange(0, BLOCK_M)
    mask_m = offs_m < row_end
    token = tl.load(sorted_slots_ptr + offs_m, mask=mask_m, other=0) // top_k
    return x_ptr + token[:, None].to(tl.int64) * stride_xt + offs_k[None, :], mask_m[:, None]


@triton.jit
def _weight_ptrs(w_ptr, w_strides, expert, w_rows, offs_k):
    """Pointers to [w_rows, offs_k] of an expert, and how far they move for each column."""
    stride_wk = tl.cast(w_strides[2], tl.int64)
    w_ptr += (
        expert.to(tl.int64) * w_strides[0] + w_rows[:, None].to(tl.int64) * w_strides[1] + offs_k[None, :] * stride_wk
    )
    return w_ptr, stride_wk


@triton.jit
def _store_glu(a_ptr, z_ptr, bias_ptr, gate, up, row, row_end, tile_n, I, GATE: tl.constexpr):
    """act(gate) * up, and for a backward what it is made of. bias_ptr: the expert's, or None."""
    offs_n = tile_n * gate.shape[1] + tl.arange(0, gate.shape[1])
    if bias_ptr is not None:
        gate += tl.load(bias_ptr + offs_n, mask=offs_n < I, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias_ptr + I + offs_n, mask=offs_n < I, other=0.0).to(tl.float32)[None, :]
    store_rows(a_ptr, _glu(gate, up, GATE), row, row_end, offs_n, I)
    if z_ptr is not None:
        offs_m = row + tl.arange(0, gate.shape[0])
        z_ptrs = z_ptr + offs_m[:, None].to(tl.int64) * (2 * I) + offs_n[None, :]
        mask = (offs_m < row_end)[:, None] & (offs_n < I)[None, :]
        tl.store(z_ptrs, gate.to(z_ptr.dtype.element_ty), mask=mask)
        tl.store(z_ptrs + I, up.to(z_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_interleaved_glu(a_ptr, z_ptr, bias_ptr, z, row, row_end, tile_n, I, GATE: tl.constexpr):
    """As `_store_glu` for z [BLOCK_M, 2 BLOCK_N], whose columns are gate, up, gate, up, ..."""
    BLOCK_N: tl.constexpr = z.shape[1] // 2
    offs_z = tile_n * (2 * BLOCK_N) + tl.arange(0, 2 * BLOCK_N)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + offs_z, mask=offs_z < 2 * I, other=0.0).to(tl.float32)[None, :]
    if z_ptr is not None:
        store_rows(z_ptr, z, row, row_end, offs_z, 2 * I)
    gate, up = _gate_and_up(z, GATE)
    store_rows(a_ptr, _glu(gate, up, GATE), row, row_end, tile_n * BLOCK_N + tl.arange(0, BLOCK_N), I)


@triton.jit
def _store_gate_and_up(out, bias_ptr, z, row, row_end, tile_n, I, GATE: tl.constexpr):
    """z [BLOCK_M, 2 BLOCK_N]: gate and up of a tile, in the order of the weight's rows."""
    a_ptr, z_ptr = out
    if GATE[3]:
        _store_interleaved_glu(a_ptr, z_ptr, bias_ptr, z, row, row_end, tile_n, I, GATE)
    else:
        gate, up = _halves(z)
        _store_glu(a_ptr, z_ptr, bias_ptr, gate, up, row, row_end, tile_n, I, GATE)


@triton.jit
def _one_dot_tile(
    rows,
    w_ptr,
    w_strides,
    bias_ptr,
    out,
    tile,
    I,
    H,
    BLOCK_M: tl.constexpr,
    MORE_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
    USE_TMA: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    GATE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """BLOCK_M rows, and with ROWS_FIRST MORE_M (maybe 0) after them."""
    INTERLEAVED: tl.constexpr = GATE[3]
    expert, row, row_end, tile_n = tile
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs, mask_m = _gather(rows, row, row_end, offs_k, BLOCK_M)
    if not USE_TMA:
        if INTERLEAVED:
            w_rows = tile_n * (2 * BLOCK_N) + tl.arange(0, 2 * BLOCK_N)
            columns = w_rows // 2
        else:
            columns = tile_n * BLOCK_N + tl.arange(0, 2 * BLOCK_N) % BLOCK_N
            w_rows = columns + tl.arange(0, 2 * BLOCK_N) // BLOCK_N * I
        w_ptrs, stride_wk = _weight_ptrs(w_ptr, w_strides, expert, w_rows, offs_k)

    acc = tl.zeros((BLOCK_M, 2 * BLOCK_N) if ROWS_FIRST else (2 * BLOCK_N, BLOCK_M), tl.float32)
    if MORE_M:
        more_ptrs, mask_more = _gather(rows, row + BLOCK_M, row_end, offs_k, MORE_M)
        more_acc = tl.zeros((MORE_M, 2 * BLOCK_N), tl.float32)
    for k in range(0, H, BLOCK_K):
        mask_k = (offs_k < H - k)[None, :]
        x = tl.load(x_ptrs, mask=mask_m & mask_k, other=0.0)
        x_ptrs += BLOCK_K
        if not USE_TMA:
            w = tl.load(w_ptrs, mask=(columns < I)[:, None] & mask_k, other=0.0)
        elif TRANSPOSED:
            w = w_ptr.load([expert, k, tile_n * (2 * BLOCK_N)]).reshape(BLOCK_K, 2 * BLOCK_N).T
        elif INTERLEAVED:
            w = w_ptr.load([expert, tile_n * (2 * BLOCK_N), k]).reshape(2 * BLOCK_N, BLOCK_K)
        else:
            w = w_ptr.load([expert, 0, tile_n * BLOCK_N, k]).reshape(2 * BLOCK_N, BLOCK_K)
        if ROWS_FIRST:
            acc = tl.dot(x, w.T, acc, input_precision=INPUT_PRECISION)  # [BM, BK] @ [BK, 2 BN]
        else:
            acc = tl.dot(w, x.T, acc, input_precision=INPUT_PRECISION)  # [2 BN, BK] @ [BK, BM]
        if MORE_M:
            more = tl.load(more_ptrs, mask=mask_more & mask_k, other=0.0)
            more_ptrs += BLOCK_K
            more_acc = tl.dot(more, w.T, more_acc, input_precision=INPUT_PRECISION)
        if not USE_TMA:
            w_ptrs += BLOCK_K * stride_wk

    if bias_ptr is not None:
        bias_ptr += expert.to(tl.int64) * (2 * I)
    _store_gate_and_up(out, bias_ptr, acc if ROWS_FIRST else acc.T, row, row_end, tile_n, I, GATE)
    if MORE_M:
        _store_gate_and_up(out, bias_ptr, more_acc, row + BLOCK_M, row_end, tile_n, I, GATE)


@triton.jit
def _two_dots_tile(
    rows,
    w_ptr,
    w_strides,
    bias_ptr,
    out,
    tile,
    I,
    H,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_TMA: tl.constexpr,
    GATE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Weights first, gate and up by themselves."""
    expert, row, row_end, tile_n = tile
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs, mask_m = _gather(rows, row, row_end, offs_k, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if not USE_TMA:
        w_ptrs, stride_wk = _weight_ptrs(w_ptr, w_strides, expert, offs_n, offs_k)
        up_offset = tl.cast(I, tl.int64) * w_strides[1]
    gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, H, BLOCK_K):
        mask_k = (offs_k < H - k)[None, :]
        x = tl.load(x_ptrs, mask=mask_m & mask_k, other=0.0)
        x_ptrs += BLOCK_K
        if USE_TMA:
            w_gate = w_ptr.load([expert, 0, tile_n * BLOCK_N, k]).reshape(BLOCK_N, BLOCK_K)
            w_up = w_ptr.load([expert, 1, tile_n * BLOCK_N, k]).reshape(BLOCK_N, BLOCK_K)
        else:
            mask_w = (offs_n < I)[:, None] & mask_k
            w_gate = tl.load(w_ptrs, mask=mask_w, other=0.0)
            w_up = tl.load(w_ptrs + up_offset, mask=mask_w, other=0.0)
        gate = tl.dot(w_gate, x.T, gate, input_precision=INPUT_PRECISION)  # [BN, BK] @ [BK, BM]
        up = tl.dot(w_up, x.T, up, input_precision=INPUT_PRECISION)
        if not USE_TMA:
            w_ptrs += BLOCK_K * stride_wk

    if bias_ptr is not None:
        bias_ptr += expert.to(tl.int64) * (2 * I)
    a_ptr, z_ptr = out
    _store_glu(a_ptr, z_ptr, bias_ptr, gate.T, up.T, row, row_end, tile_n, I, GATE)


# max_tiles follows T: a new T must not compile anew.
@triton.jit(do_not_specialize=["max_tiles"])
def _gate_up_kernel(
    x_ptr,  # (T, H)
    w_ptr,  # (E, 2I, H); with USE_TMA a descriptor: interleaved rows as they are, or (E, 2, I, H)
    bias_ptr,  # (E, 2I), or None
    a_ptr,  # (S, I)
    z_ptr,  # (S, 2I), gate and up in the order of w's rows; None if there is no backward
    sorted_slots_ptr,  # (S,) int32
    schedule_ptr,  # (5, max_tiles) int32
    max_tiles,
    top_k,
    I,
    H,
    stride_xt,
    stride_we,
    stride_wn,
    stride_wk,
    BLOCK_M: tl.constexpr,
    MIN_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    USE_TMA: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    GATE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    expert, first_row, row, row_end, tile_n = locate_tile(
        schedule_ptr, max_tiles, tl.cdiv(I, BLOCK_N), BLOCK_M, GROUP_M
    )
    if expert < 0:
        return
    HEIGHTS: tl.constexpr = (BLOCK_M // MIN_M).bit_length()
    # An expert's last rows, if MIN_M or fewer, go with the tile before: its weights are there already. Not so if gate
    # and up are interleaved: registers would spill.
    JOIN: tl.constexpr = USE_TMA and MIN_M >= 64 and HEIGHTS > 1 and not GATE[3]
    num_rows = row_end - row
    if JOIN and row > first_row and num_rows <= MIN_M:
        return
    rows = (x_ptr, sorted_slots_ptr, top_k, stride_xt)
    w_strides = (stride_we, stride_wn, stride_wk)
    out = (a_ptr, z_ptr)
    tile = (expert, row, row_end, tile_n)
    for i in tl.static_range(HEIGHTS + JOIN):
        joins = JOIN and num_rows > BLOCK_M and num_rows <= BLOCK_M + MIN_M
        chosen = joins if i == HEIGHTS else is_height(num_rows, i, BLOCK_M, HEIGHTS) and not joins
        if chosen:
            if MIN_M >= 64 or GATE[3]:
                _one_dot_tile(
                    rows,
                    w_ptr,
                    w_strides,
                    bias_ptr,
                    out,
                    tile,
                    I,
                    H,
                    BLOCK_M if i == HEIGHTS else BLOCK_M >> i,
                    MIN_M if i == HEIGHTS else 0,
                    BLOCK_N,
                    BLOCK_K,
                    MIN_M >= 64,
                    USE_TMA,
                    TRANSPOSED,
                    GATE,
                    INPUT_PRECISION,
                )
            else:
                _two_dots_tile(
                    rows,
                    w_ptr,
                    w_strides,
                    bias_ptr,
                    out,
                    tile,
                    I,
                    H,
                    BLOCK_M >> i,
                    BLOCK_N,
                    BLOCK_K,
                    USE_TMA,
                    GATE,
                    INPUT_PRECISION,
                )


def gate_up(x, w, sorted_slots, schedule, top_k, gate, input_precision, config, z=None, bias=None):
    """x (T, H), w (E, 2I, H), contiguous bias (E, 2I) -> (S, I), and z (S, 2I) filled.

    Rows of skipped slots stay unwritten. With TMA, transposed weights have to be interleaved.
    """
    _, rows, hidden_dim = w.shape
    inter = rows // 2
    tiles = schedule.shape[1]
    block_m, min_m, block_n, block_k, group_m, num_warps, num_stages, use_tma, _ = config
    a = torch.empty((sorted_slots.numel(), inter), dtype=x.dtype, device=x.device)
    sizes = (top_k, inter, hidden_dim, x.stride(0), *w.stride())
    constants = (block_m, min_m, block_n, block_k, group_m, use_tma, use_tma and w.stride(2) != 1)
    constants += (tuple(gate), input_precision)
    w_arg = w
    if use_tma and gate.interleaved:
        w_arg = weight_descriptor(w, 2 * block_n, block_k)
    elif use_tma:
        shape, strides = [w.shape[0], 2, inter, hidden_dim], [w.stride(0), inter * w.stride(1), w.stride(1), 1]
        w_arg = TensorDescriptor(w, shape, strides, [1, 2 if min_m >= 64 else 1, block_n, block_k])
    launch(
        _gate_up_kernel,
        (tiles * cdiv(inter, block_n), 1, 1),
        (x, w_arg, bias, a, z, sorted_slots, schedule),
        (tiles,),
        (*sizes, *constants),
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return a
