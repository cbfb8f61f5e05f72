"""The first grouped GEMM of a layer, with the gate in its epilogue:

    a[r] = act(gate[e] @ x[t]) * (up[e] @ x[t])     x (T, H), t = sorted_slots[r] // top_k -> a (S, I)

With biases, gate[e] @ x[t] + gate_bias[e] and so on. GATE as in gate.py. Weights, the order of operands, tiles and grid
are as in grouped_gemm.py. Where the weight comes first, gate and up are two dots: a weight tile then goes from shared
memory straight to the MMA. One dot would take the detour of registers, since the first operand may not be reshaped in
shared memory; interleaved rows, which no slice of a tile can part, have to take it.

Tuples that are handed around: rows (x_ptr, sorted_slots_ptr, top_k, stride_xt), weights (w_ptr, w_strides, bias_ptr),
out (a_ptr, z_ptr), tile (expert, row, row_end, tile_n).
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .descriptors import described
from .gate import _gate_and_up, _glu
from .gate_up_hopper import gate_up_hopper
from .launch import cdiv, launch
from .tiles import is_height, load_weight, locate_tile, store_rows, weight_descriptor


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
def _store_gate_and_up(out, bias_ptr, z, row, row_end, tile_n, I, GATE: tl.constexpr):
    """As `_store_glu` for z [BLOCK_M, 2 BLOCK_N], gate and up of a tile in the order of the weight's rows."""
    BLOCK_N: tl.constexpr = z.shape[1] // 2
    a_ptr, z_ptr = out
    if GATE.interleaved:
        offs_z = tile_n * (2 * BLOCK_N) + tl.arange(0, 2 * BLOCK_N)
        if bias_ptr is not None:
            z += tl.load(bias_ptr + offs_z, mask=offs_z < 2 * I, other=0.0).to(tl.float32)[None, :]
        if z_ptr is not None:
            store_rows(z_ptr, z, row, row_end, offs_z, 2 * I)
        gate, up = _gate_and_up(z, GATE)
        store_rows(a_ptr, _glu(gate, up, GATE), row, row_end, tile_n * BLOCK_N + tl.arange(0, BLOCK_N), I)
    else:
        gate, up = _gate_and_up(z, GATE)
        _store_glu(a_ptr, z_ptr, bias_ptr, gate, up, row, row_end, tile_n, I, GATE)


@triton.jit
def _one_dot_tile(
    rows,
    weights,
    out,
    tile,
    I,
    H,
    BLOCK_M: tl.constexpr,
    MORE_M: tl.constexpr,
    CONFIG: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    GATE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """BLOCK_M rows, and if they come first MORE_M (maybe 0) after them."""
    BLOCK_N: tl.constexpr = CONFIG.BLOCK_N
    BLOCK_K: tl.constexpr = CONFIG.BLOCK_K
    ROWS_FIRST: tl.constexpr = CONFIG.MIN_M >= 64
    w_ptr, w_strides, bias_ptr = weights
    expert, row, row_end, tile_n = tile
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs, mask_m = _gather(rows, row, row_end, offs_k, BLOCK_M)
    if not CONFIG.USE_TMA:
        if GATE.interleaved:
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
        if not CONFIG.USE_TMA:
            w = tl.load(w_ptrs, mask=(columns < I)[:, None] & mask_k, other=0.0)
            w_ptrs += BLOCK_K * stride_wk
        elif GATE.interleaved:
            w = load_weight(w_ptr, expert, tile_n * (2 * BLOCK_N), k, 2 * BLOCK_N, BLOCK_K, TRANSPOSED)
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

    if bias_ptr is not None:
        bias_ptr += expert.to(tl.int64) * (2 * I)
    _store_gate_and_up(out, bias_ptr, acc if ROWS_FIRST else acc.T, row, row_end, tile_n, I, GATE)
    if MORE_M:
        _store_gate_and_up(out, bias_ptr, more_acc, row + BLOCK_M, row_end, tile_n, I, GATE)


@triton.jit
def _two_dots_tile(
    rows,
    weights,
    out,
    tile,
    I,
    H,
    BLOCK_M: tl.constexpr,
    CONFIG: tl.constexpr,
    GATE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Weights first, gate and up by themselves."""
    BLOCK_N: tl.constexpr = CONFIG.BLOCK_N
    BLOCK_K: tl.constexpr = CONFIG.BLOCK_K
    w_ptr, w_strides, bias_ptr = weights
    expert, row, row_end, tile_n = tile
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs, mask_m = _gather(rows, row, row_end, offs_k, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if not CONFIG.USE_TMA:
        w_ptrs, stride_wk = _weight_ptrs(w_ptr, w_strides, expert, offs_n, offs_k)
        up_offset = tl.cast(I, tl.int64) * w_strides[1]
    gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, H, BLOCK_K):
        mask_k = (offs_k < H - k)[None, :]
        x = tl.load(x_ptrs, mask=mask_m & mask_k, other=0.0)
        x_ptrs += BLOCK_K
        if CONFIG.USE_TMA:
            w_gate = w_ptr.load([expert, 0, tile_n * BLOCK_N, k]).reshape(BLOCK_N, BLOCK_K)
            w_up = w_ptr.load([expert, 1, tile_n * BLOCK_N, k]).reshape(BLOCK_N, BLOCK_K)
        else:
            mask_w = (offs_n < I)[:, None] & mask_k
            w_gate = tl.load(w_ptrs, mask=mask_w, other=0.0)
            w_up = tl.load(w_ptrs + up_offset, mask=mask_w, other=0.0)
            w_ptrs += BLOCK_K * stride_wk
        gate = tl.dot(w_gate, x.T, gate, input_precision=INPUT_PRECISION)  # [BN, BK] @ [BK, BM]
        up = tl.dot(w_up, x.T, up, input_precision=INPUT_PRECISION)

    if bias_ptr is not None:
        bias_ptr += expert.to(tl.int64) * (2 * I)
    a_ptr, z_ptr = out
    _store_glu(a_ptr, z_ptr, bias_ptr, gate.T, up.T, row, row_end, tile_n, I, GATE)


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
    w_strides,
    CONFIG: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    GATE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    BLOCK_M: tl.constexpr = CONFIG.BLOCK_M
    MIN_M: tl.constexpr = CONFIG.MIN_M
    n_tiles = tl.cdiv(I, CONFIG.BLOCK_N)
    expert, first_row, row, row_end, tile_n = locate_tile(schedule_ptr, max_tiles, n_tiles, BLOCK_M, CONFIG.GROUP_M)
    if expert < 0:
        return
    HEIGHTS: tl.constexpr = (BLOCK_M // MIN_M).bit_length()
    # An expert's last rows, if MIN_M or fewer, go with the tile before: its weights are there already. Not so if gate
    # and up are interleaved: registers would spill.
    JOIN: tl.constexpr = CONFIG.USE_TMA and MIN_M >= 64 and HEIGHTS > 1 and not GATE.interleaved
    num_rows = row_end - row
    if JOIN and row > first_row and num_rows <= MIN_M:
        return
    rows = (x_ptr, sorted_slots_ptr, top_k, stride_xt)
    weights = (w_ptr, w_strides, bias_ptr)
    out = (a_ptr, z_ptr)
    tile = (expert, row, row_end, tile_n)
    for i in tl.static_range(HEIGHTS + JOIN):
        joins = JOIN and num_rows > BLOCK_M and num_rows <= BLOCK_M + MIN_M
        chosen = joins if i == HEIGHTS else is_height(num_rows, i, CONFIG) and not joins
        if chosen:
            if MIN_M >= 64 or GATE.interleaved:
                _one_dot_tile(
                    rows,
                    weights,
                    out,
                    tile,
                    I,
                    H,
                    BLOCK_M if i == HEIGHTS else BLOCK_M >> i,
                    MIN_M if i == HEIGHTS else 0,
                    CONFIG,
                    TRANSPOSED,
                    GATE,
                    INPUT_PRECISION,
                )
            else:
                _two_dots_tile(rows, weights, out, tile, I, H, BLOCK_M >> i, CONFIG, GATE, INPUT_PRECISION)


def gate_up(x, w, sorted_slots, schedule, top_k, gate, input_precision, config, z=None, bias=None):
    """x (T, H), w (E, 2I, H), contiguous bias (E, 2I) -> (S, I), and z (S, 2I) filled.

    Rows of skipped slots stay unwritten. With TMA, transposed weights have to be interleaved. The warp-specialized
    kernel takes what `can_specialize_gate_up` says.
    """
    if config.WARP_SPECIALIZED:
        assert bias is None
        return gate_up_hopper(x, w, sorted_slots, schedule, top_k, gate, config, z)
    _, rows, hidden_dim = w.shape
    inter = rows // 2
    tiles = schedule.shape[1]
    a = torch.empty((sorted_slots.numel(), inter), dtype=x.dtype, device=x.device)
    constants = (config, config.USE_TMA and w.stride(2) != 1, gate, input_precision)
    w_arg = w
    if config.USE_TMA and gate.interleaved:
        w_arg = weight_descriptor(w, 2 * config.BLOCK_N, config.BLOCK_K)
    elif config.USE_TMA:
        shape, strides = [w.shape[0], 2, inter, hidden_dim], [w.stride(0), inter * w.stride(1), w.stride(1), 1]
        box = [1, 2 if config.MIN_M >= 64 else 1, config.BLOCK_N, config.BLOCK_K]
        w_arg = described(TensorDescriptor, w, shape, strides, box)
    launch(
        _gate_up_kernel,
        (tiles * cdiv(inter, config.BLOCK_N), 1, 1),
        (x, w_arg, bias, a, z, sorted_slots, schedule),
        (tiles,),
        (top_k, inter, hidden_dim, x.stride(0), w.stride(), *constants),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return a
