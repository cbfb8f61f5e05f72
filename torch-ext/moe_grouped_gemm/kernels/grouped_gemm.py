"""Grouped GEMMs: rows sorted by expert times that expert's weight.

    gate_up:       a[r] = act(gate[e] @ x[t]) * (up[e] @ x[t])     x (T, H), t = sorted_slots[r] // top_k -> a (S, I)
    grouped_gemm:  y[r] = w[e] @ x[r]                              x (S, K) -> y (S, N); if asked for,
                   y[r] = w[e] @ x[r] + factor[e] @ u[r]           u (S, R)
                   y[s] = weight[s] * (w[e] @ x[r])                s = sorted_slots[r]

With biases, gate[e] @ x[t] + gate_bias[e] and so on. GATE as in gate.py. Weights are (E, N, K) with any strides; TMA
reads them with contiguous rows, or as (E, K, N) where that is their order in memory (TRANSPOSED).

A tile is BLOCK_M rows of one expert by BLOCK_N columns of the result; an expert's last tile is only as high as its rows
need, halving BLOCK_M down to MIN_M. Hopper's wgmma wants at least 64 on the first side of a dot and reads least from
shared memory with 256 on the second. So where all tiles are at least 64 high, token rows come first (`x @ w.T`); below,
the weight does (`w @ x.T`), and the token side may be as small as 16. Grid: max_tiles * cdiv(N, BLOCK_N), tiles of one
expert together; programs past the last tile of the schedule (see routing.py) return at once.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .gate import _gate_and_up, _glu, _halves
from .grouped_gemm_hopper import grouped_gemm_hopper
from .launch import cdiv, launch, next_power_of_2
from .tiles import locate_tile


@triton.jit
def _is_height(rows, i: tl.constexpr, BLOCK_M: tl.constexpr, HEIGHTS: tl.constexpr):
    """Whether BLOCK_M >> i is the least of the HEIGHTS tile heights that holds `rows` rows (the first: or more)."""
    if i == 0 and HEIGHTS == 1:
        return True
    elif i == 0:
        return rows > BLOCK_M // 2
    elif i == HEIGHTS - 1:
        return rows <= BLOCK_M >> i
    else:
        return (rows <= BLOCK_M >> i) & (rows > BLOCK_M >> (i + 1))


@triton.jit
def _gather(x_ptr, sorted_slots_ptr, row, row_end, top_k, stride_xt, offs_k, BLOCK_M: tl.constexpr):
    """Pointers to the tokens of BLOCK_M sorted rows, and which of the rows there are."""
    offs_m = row + tl.arange(0, BLOCK_M)
    mask_m = offs_m < row_end
    token = tl.load(sorted_slots_ptr + offs_m, mask=mask_m, other=0) // top_k
    return x_ptr + token[:, None].to(tl.int64) * stride_xt + offs_k[None, :], mask_m[:, None]


@triton.jit
def _store_rows(y_ptr, y, row, row_end, offs_n, N):
    offs_m = row + tl.arange(0, y.shape[0])
    y_ptrs = y_ptr + offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(offs_m < row_end)[:, None] & (offs_n < N)[None, :])


@triton.jit
def _store_glu(a_ptr, z_ptr, bias_ptr, gate, up, row, row_end, tile_n, I, GATE: tl.constexpr):
    """act(gate) * up, and for a backward what it is made of. bias_ptr: the expert's, or None."""
    offs_n = tile_n * gate.shape[1] + tl.arange(0, gate.shape[1])
    if bias_ptr is not None:
        gate += tl.load(bias_ptr + offs_n, mask=offs_n < I, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias_ptr + I + offs_n, mask=offs_n < I, other=0.0).to(tl.float32)[None, :]
    _store_rows(a_ptr, _glu(gate, up, GATE), row, row_end, offs_n, I)
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
        _store_rows(z_ptr, z, row, row_end, offs_z, 2 * I)
    gate, up = _gate_and_up(z, GATE)
    _store_rows(a_ptr, _glu(gate, up, GATE), row, row_end, tile_n * BLOCK_N + tl.arange(0, BLOCK_N), I)


@triton.jit
def _gate_up_tile(
    x_ptr,
    w_ptr,
    bias_ptr,
    a_ptr,
    z_ptr,
    sorted_slots_ptr,
    expert,
    row,
    row_end,
    tile_n,
    top_k,
    I,
    H,
    stride_xt,
    stride_we,
    stride_wn,
    stride_wk,
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
    ONE_DOT: tl.constexpr = ROWS_FIRST or INTERLEAVED
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs, mask_m = _gather(x_ptr, sorted_slots_ptr, row, row_end, top_k, stride_xt, offs_k, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    w_ptrs = w_ptr
    if not USE_TMA:
        # [BN, BK] of gate, and with ONE_DOT [2 BN, BK] of gate and up.
        if INTERLEAVED:
            w_rows = tile_n * (2 * BLOCK_N) + tl.arange(0, 2 * BLOCK_N)
            columns = w_rows // 2
        elif ROWS_FIRST:
            columns = tile_n * BLOCK_N + tl.arange(0, 2 * BLOCK_N) % BLOCK_N
            w_rows = columns + tl.arange(0, 2 * BLOCK_N) // BLOCK_N * I
        else:
            w_rows = offs_n
        stride_wk = tl.cast(stride_wk, tl.int64)
        w_ptrs += (
            expert.to(tl.int64) * stride_we + w_rows[:, None].to(tl.int64) * stride_wn + offs_k[None, :] * stride_wk
        )
        up_offset = tl.cast(I, tl.int64) * stride_wn

    if ONE_DOT:
        acc = tl.zeros((BLOCK_M, 2 * BLOCK_N) if ROWS_FIRST else (2 * BLOCK_N, BLOCK_M), tl.float32)
    else:
        gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if MORE_M:
        more_ptrs, mask_more = _gather(
            x_ptr, sorted_slots_ptr, row + BLOCK_M, row_end, top_k, stride_xt, offs_k, MORE_M
        )
        more_acc = tl.zeros((MORE_M, 2 * BLOCK_N), tl.float32)
    for k in range(0, H, BLOCK_K):
        mask_k = (offs_k < H - k)[None, :]
        x = tl.load(x_ptrs, mask=mask_m & mask_k, other=0.0)
        x_ptrs += BLOCK_K
        if ONE_DOT:
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
        else:
            # Two dots: a weight tile then goes from shared memory straight to the MMA. One would take the detour of
            # registers, since the first operand may not be reshaped in shared memory.
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
    if INTERLEAVED:
        _store_interleaved_glu(a_ptr, z_ptr, bias_ptr, acc if ROWS_FIRST else acc.T, row, row_end, tile_n, I, GATE)
        if MORE_M:
            _store_interleaved_glu(a_ptr, z_ptr, bias_ptr, more_acc, row + BLOCK_M, row_end, tile_n, I, GATE)
    else:
        if ROWS_FIRST:
            gate, up = _halves(acc)
            _store_glu(a_ptr, z_ptr, bias_ptr, gate, up, row, row_end, tile_n, I, GATE)
        else:
            _store_glu(a_ptr, z_ptr, bias_ptr, gate.T, up.T, row, row_end, tile_n, I, GATE)
        if MORE_M:
            gate, up = _halves(more_acc)
            _store_glu(a_ptr, z_ptr, bias_ptr, gate, up, row + BLOCK_M, row_end, tile_n, I, GATE)


# max_tiles follows T: a new T must not compile anew.
@triton.jit(do_not_specialize=["max_tiles"])
def _gate_up_kernel(
    x_ptr,  # (T, H)
    w_ptr,  # (E, 2I, H); with USE_TMA a descriptor: interleaved rows as they are, or (E, 2, I, H)
    bias_ptr,  # (E, 2I), or None
    a_ptr,  # (S, I)
    z_ptr,  # (S, 2I), gate and up in the order of w's rows; None if nobody wants it
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
    rows = row_end - row
    if JOIN and row > first_row and rows <= MIN_M:
        return
    for i in tl.static_range(HEIGHTS + JOIN):
        joins = JOIN and rows > BLOCK_M and rows <= BLOCK_M + MIN_M
        chosen = joins if i == HEIGHTS else _is_height(rows, i, BLOCK_M, HEIGHTS) and not joins
        if chosen:
            _gate_up_tile(
                x_ptr,
                w_ptr,
                bias_ptr,
                a_ptr,
                z_ptr,
                sorted_slots_ptr,
                expert,
                row,
                row_end,
                tile_n,
                top_k,
                I,
                H,
                stride_xt,
                stride_we,
                stride_wn,
                stride_wk,
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


@triton.jit
def _grouped_gemm_tile(
    x_ptr,
    x_desc,
    w_ptr,
    bias_ptr,
    u_ptr,
    factor_ptr,
    y_ptr,
    sorted_slots_ptr,
    row_weights_ptr,
    expert,
    row,
    row_end,
    tile_n,
    N,
    K,
    R,
    stride_xm,
    stride_we,
    stride_wn,
    stride_wk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
    TMA_X: tl.constexpr,
    TMA_W: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    offs_m = row + tl.arange(0, BLOCK_M)
    mask_m = offs_m < row_end
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    if not TMA_X:
        x_ptrs = x_ptr + offs_m[:, None].to(tl.int64) * stride_xm + offs_k[None, :]
    if not TMA_W:
        stride_wk = tl.cast(stride_wk, tl.int64)
        w_ptrs = (
            w_ptr
            + expert.to(tl.int64) * stride_we
            + offs_n[:, None].to(tl.int64) * stride_wn
            + offs_k[None, :] * stride_wk
        )

    acc = tl.zeros((BLOCK_M, BLOCK_N) if ROWS_FIRST else (BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        if TMA_X:
            # Rows past row_end are another expert's: they reach only parts of acc that are never stored.
            x = x_desc.load([row, k])
        else:
            x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            x_ptrs += BLOCK_K
        if TMA_W and TRANSPOSED:
            w = w_ptr.load([expert, k, tile_n * BLOCK_N]).reshape(BLOCK_K, BLOCK_N).T
        elif TMA_W:
            w = w_ptr.load([expert, tile_n * BLOCK_N, k]).reshape(BLOCK_N, BLOCK_K)
        else:
            w = tl.load(w_ptrs, mask=(offs_n < N)[:, None] & mask_k[None, :], other=0.0)
            w_ptrs += BLOCK_K * stride_wk
        if ROWS_FIRST:
            acc = tl.dot(x, w.T, acc, input_precision=INPUT_PRECISION)  # [BM, BK] @ [BK, BN]
        else:
            acc = tl.dot(w, x.T, acc, input_precision=INPUT_PRECISION)  # [BN, BK] @ [BK, BM]
    if u_ptr is not None:
        offs_r = tl.arange(0, BLOCK_R)
        u_ptrs = u_ptr + offs_m[:, None].to(tl.int64) * R + offs_r[None, :]
        factor_ptrs = factor_ptr + (expert.to(tl.int64) * N + offs_n[:, None]) * R + offs_r[None, :]
        for r in range(0, R, BLOCK_R):
            mask_r = (offs_r < R - r)[None, :]
            u = tl.load(u_ptrs + r, mask=mask_m[:, None] & mask_r, other=0.0)
            factor = tl.load(factor_ptrs + r, mask=(offs_n < N)[:, None] & mask_r, other=0.0)
            if ROWS_FIRST:
                acc = tl.dot(u, factor.T, acc, input_precision=INPUT_PRECISION)
            else:
                acc = tl.dot(factor, u.T, acc, input_precision=INPUT_PRECISION)

    y = acc if ROWS_FIRST else acc.T
    if bias_ptr is not None:
        y += tl.load(bias_ptr + expert.to(tl.int64) * N + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    if sorted_slots_ptr is None:
        _store_rows(y_ptr, y, row, row_end, offs_n, N)
    else:
        slots = tl.load(sorted_slots_ptr + offs_m, mask=mask_m, other=0)
        y *= tl.load(row_weights_ptr + slots, mask=mask_m, other=0.0).to(tl.float32)[:, None]
        y_ptrs = y_ptr + slots[:, None].to(tl.int64) * N + offs_n[None, :]
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_n < N)[None, :])


@triton.jit(do_not_specialize=["max_tiles"])
def _grouped_gemm_kernel(
    x_ptr,  # (S, K)
    x_desc,  # with USE_TMA a descriptor of x, else x
    w_ptr,  # (E, N, K); with USE_TMA a descriptor of it
    bias_ptr,  # (E, N), or None
    u_ptr,  # (S, R), or None
    factor_ptr,  # (E, N, R), of u
    y_ptr,  # (S, N), in expert order, or in that of slots if the next two are given
    sorted_slots_ptr,  # (S,) int32, or None
    row_weights_ptr,  # (S,), of slots: factors of the rows of y; or None
    schedule_ptr,  # (5, max_tiles) int32
    max_tiles,
    N,
    K,
    R,
    stride_xm,
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
    BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    expert, _, row, row_end, tile_n = locate_tile(schedule_ptr, max_tiles, tl.cdiv(N, BLOCK_N), BLOCK_M, GROUP_M)
    if expert < 0:
        return
    HEIGHTS: tl.constexpr = (BLOCK_M // MIN_M).bit_length()
    for i in tl.static_range(HEIGHTS):
        if _is_height(row_end - row, i, BLOCK_M, HEIGHTS):
            _grouped_gemm_tile(
                x_ptr,
                x_desc,
                w_ptr,
                bias_ptr,
                u_ptr,
                factor_ptr,
                y_ptr,
                sorted_slots_ptr,
                row_weights_ptr,
                expert,
                row,
                row_end,
                tile_n,
                N,
                K,
                R,
                stride_xm,
                stride_we,
                stride_wn,
                stride_wk,
                BLOCK_M >> i,
                BLOCK_N,
                BLOCK_K,
                MIN_M >= 64,
                USE_TMA and i == 0,  # the descriptor reads boxes of BLOCK_M rows
                USE_TMA,
                TRANSPOSED,
                BLOCK_R,
                INPUT_PRECISION,
            )


def _descriptor(w, block_n, block_k):
    """Of (E, N, K) weights; TRANSPOSED, of the (E, K, N) that they are a view of."""
    if w.stride(2) == 1:
        return TensorDescriptor(w, w.shape, w.stride(), [1, block_n, block_k])
    w = w.mT
    return TensorDescriptor(w, w.shape, w.stride(), [1, block_k, block_n])


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
        w_arg = _descriptor(w, 2 * block_n, block_k)
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


def grouped_gemm(
    x, w, schedule, input_precision, config, y=None, sorted_slots=None, row_weights=None, bias=None, low_rank=None
):
    """x (S, K), w (E, N, K), contiguous bias (E, N) -> y (S, N); rows that belong to no expert keep what y held.

    low_rank: contiguous u (S, R) and factor (E, N, R), R a multiple of 16; y[r] is then w[e] @ x[r] + factor[e] @ u[r].
    With sorted_slots (S,) and row_weights (S,), row r becomes row s = sorted_slots[r] of y, times row_weights[s]. The
    warp-specialized kernel has no bias.
    """
    _, N, K = w.shape
    if y is None:
        y = torch.empty((x.shape[0], N), dtype=x.dtype, device=x.device)
    if config.WARP_SPECIALIZED:
        return grouped_gemm_hopper(x, w, schedule, config, y, sorted_slots, row_weights, low_rank)
    tiles = schedule.shape[1]
    block_m, min_m, block_n, block_k, group_m, num_warps, num_stages, use_tma, _ = config
    u, factor = low_rank or (None, None)
    rank = 0 if low_rank is None else u.shape[1]
    sizes = (N, K, rank, x.stride(0), *w.stride())
    constants = (block_m, min_m, block_n, block_k, group_m, use_tma, use_tma and w.stride(2) != 1)
    constants += (min(block_k, next_power_of_2(max(rank, 1))), input_precision)
    x_arg, w_arg = x, w
    if use_tma:
        x_arg = TensorDescriptor(x, x.shape, x.stride(), [block_m, block_k])
        w_arg = _descriptor(w, block_n, block_k)
    launch(
        _grouped_gemm_kernel,
        (tiles * cdiv(N, block_n), 1, 1),
        (x, x_arg, w_arg, bias, u, factor, y, sorted_slots, row_weights, schedule),
        (tiles,),
        (*sizes, *constants),
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return y
