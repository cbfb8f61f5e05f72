"""Grouped GEMM for Hopper and many rows of 16 bits over weights in codes:

    y[r] = w[e] @ x[r], w (E, N, K)      or, for gradients, y[r] = w[e]^T @ x[r], w (E, K, N)

Codes are float8_e4m3fn with a scale for each 128 x 128, or four of 4 bits in an int16 with a scale for each 32 columns
of a row of w. As grouped_gemm_hopper.py, but the loader has four warps and loads codes. Those it turns into
weights in the dtype of x, rounded once, from shared memory to shared memory: some steps ahead of the tensor cores,
which see nothing but 16-bit operands.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .fp4 import GROUP, in_bytes
from .fp4_registers import _WORDS, TOO_SMALL, as_factors, four_numbers, scaled
from .hopper import (
    BLOCK_K,
    BLOCK_M,
    BLOCK_N,
    CONSUMERS,
    ROWS,
    _barrier,
    _barriers,
    _buffers,
    _claim_tile,
    _load_weight,
    _next,
    _number_of_tiles,
    _previous,
    _put_tile,
    _queue,
    _ragged_descriptor,
    _rows_descriptor,
    _tma_load,
    can_store_by_tma,
)
from .launch import launch, multiprocessors
from .products_hopper import BUFFERS, _multiply
from .quantize import _BLOCK, BLOCK, _load_scale
from .tiles import locate_tile

_GROUP = gl.constexpr(GROUP)
_W_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))


@gluon.jit
def _load_half_scales(w_scale_ptr, tile_n, k, scale_rows, scale_columns, TRANSPOSED: gl.constexpr):
    """Those of the two 128 columns of y in this tile, for step k."""
    first = tile_n * (BLOCK_N // _BLOCK)
    block = k // (_BLOCK // BLOCK_K)
    if TRANSPOSED:
        first_ptr = w_scale_ptr + block * scale_columns + first
        second_ptr = w_scale_ptr + block * scale_columns + gl.minimum(first + 1, scale_columns - 1)
    else:
        first_ptr = w_scale_ptr + first * scale_columns + block
        second_ptr = w_scale_ptr + gl.minimum(first + 1, scale_rows - 1) * scale_columns + block
    return _load_scale(first_ptr), _load_scale(second_ptr)


@gluon.jit
def _dequantize_fp8(codes_smem, w_smem, scales, TRANSPOSED: gl.constexpr):
    LANES: gl.constexpr = 8 if TRANSPOSED else 4  # of a row, 16 codes each
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0])
    DIM: gl.constexpr = 1 if TRANSPOSED else 0
    for half in gl.static_range(2):
        codes = codes_smem.slice(half * _BLOCK, _BLOCK, DIM).load(layout)
        w_smem.slice(half * _BLOCK, _BLOCK, DIM).store((codes.to(gl.float32) * scales[half]).to(w_smem.dtype))
    fence_async_shared()


@gluon.jit
def _load_group_scales(w_scale_ptr, tile_n, k, scale_rows, scale_columns, TRANSPOSED: gl.constexpr):
    """Those of the two halves of the weights of step k, [128, 2] or transposed [BLOCK_K, 4]; past the end, others'."""
    ROWS: gl.constexpr = BLOCK_K if TRANSPOSED else _BLOCK
    GROUPS: gl.constexpr = _BLOCK // _GROUP if TRANSPOSED else BLOCK_K // _GROUP
    LANES: gl.constexpr = 4 if TRANSPOSED else 2  # of a row, a group each
    CODES: gl.constexpr = gl.BlockedLayout([1, _WORDS], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0])
    like = gl.zeros((ROWS, GROUPS * _WORDS), gl.int16, CODES).reshape([ROWS, GROUPS, _WORDS])
    LAYOUT: gl.constexpr = gl.SliceLayout(2, like.type.layout)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    group = gl.arange(0, GROUPS, gl.SliceLayout(0, LAYOUT))
    if TRANSPOSED:
        row = gl.minimum(row + k * BLOCK_K, scale_rows - 1)
        group += tile_n * (BLOCK_N // _GROUP)
        second_group = gl.minimum(group + GROUPS, scale_columns - 1)
        second_row = row
    else:
        row += tile_n * BLOCK_N
        second_row = gl.minimum(row + _BLOCK, scale_rows - 1)
        row = gl.minimum(row, scale_rows - 1)
        group += k * GROUPS
        second_group = gl.minimum(group, scale_columns - 1)
    group = gl.minimum(group, scale_columns - 1)
    first_ptrs = w_scale_ptr + gl.expand_dims(row * scale_columns, 1) + gl.expand_dims(group, 0)
    second_ptrs = w_scale_ptr + gl.expand_dims(second_row * scale_columns, 1) + gl.expand_dims(second_group, 0)
    return gl.load(first_ptrs), gl.load(second_ptrs)


@gluon.jit
def _from_words(words, scale, dtype: gl.constexpr):
    """Words [A, B / 4] and scales [A, B / 32] -> [A, B]; in bf16 and with exponents TOO_SMALL times that."""
    numbers = four_numbers(words, dtype)
    factor = as_factors(scale, dtype)
    even = gl.join(scaled(numbers[0], factor), scaled(numbers[2], factor))
    odd = gl.join(scaled(numbers[1], factor), scaled(numbers[3], factor))
    return gl.join(even, odd).reshape([words.shape[0], 4 * words.shape[1]])


@gluon.jit
def _dequantize_fp4(words_smem, w_smem, scales, TRANSPOSED: gl.constexpr):
    LANES: gl.constexpr = 4 if TRANSPOSED else 2
    CODES: gl.constexpr = gl.BlockedLayout([1, _WORDS], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0])
    DIM: gl.constexpr = 1 if TRANSPOSED else 0
    HALF: gl.constexpr = _BLOCK // 4 if TRANSPOSED else _BLOCK
    for half in gl.static_range(2):
        words = words_smem.slice(half * HALF, HALF, DIM).load(CODES)
        w_smem.slice(half * _BLOCK, _BLOCK, DIM).store(_from_words(words, scales[half], w_smem.dtype))
    fence_async_shared()


@gluon.jit
def _load_scales(w_scale_ptr, tile_n, k, scale_rows, scale_columns, TRANSPOSED: gl.constexpr, FP4: gl.constexpr):
    if FP4:
        return _load_group_scales(w_scale_ptr, tile_n, k, scale_rows, scale_columns, TRANSPOSED)
    else:
        return _load_half_scales(w_scale_ptr, tile_n, k, scale_rows, scale_columns, TRANSPOSED)


@gluon.jit
def _dequantize(codes_smem, w_smem, scales, TRANSPOSED: gl.constexpr, FP4: gl.constexpr):
    if FP4:
        _dequantize_fp4(codes_smem, w_smem, scales, TRANSPOSED)
    else:
        _dequantize_fp8(codes_smem, w_smem, scales, TRANSPOSED)


@gluon.jit
def _load_codes(w_desc, codes, stage, expert, tile_n, k, N, K):
    codes_smem, codes_full = codes
    bar = codes_full.index(stage)
    smem = codes_smem.index(stage)
    mbarrier.expect(bar, smem.shape[0] * smem.shape[1] * (smem.dtype.primitive_bitwidth // 8))
    if smem.shape[0] == BLOCK_N:
        # A code, or four.
        _load_weight(w_desc, smem, bar, expert, tile_n, k // (BLOCK_K // smem.shape[1]), _BLOCK, N, K, BLOCK_N)
    else:
        column = tile_n * smem.shape[1]
        _tma_load(w_desc, [expert * K + k, column], bar, smem)


@gluon.jit
def _load_and_dequantize(
    x_desc,
    w_desc,
    w_scale_ptr,
    schedule,
    sizes,
    stages,
    codes,
    queue,
    GROUP_M: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    FP4: gl.constexpr,
):
    N, K, scale_rows, scale_columns = sizes
    x_smem, w_smem, full, free = stages
    codes_smem, codes_full = codes
    STAGES: gl.constexpr = w_smem.shape[0]
    CODES_STAGES: gl.constexpr = codes_smem.shape[0]
    AHEAD: gl.constexpr = CODES_STAGES - 1
    n_tiles = gl.cdiv(N, BLOCK_N)
    k_tiles = gl.cdiv(K, BLOCK_K)
    num_tiles = _number_of_tiles(schedule, n_tiles)
    codes_step = (0, 0)
    step = (0, 0)
    place = (0, 0)
    tile = gl.program_id(0)
    located = locate_tile(*schedule, n_tiles, BLOCK_M, GROUP_M, tile)
    if tile < num_tiles:
        expert, _, _, _, tile_n = located
        for k in gl.static_range(AHEAD):
            _load_codes(w_desc, codes, k, expert, tile_n, k * BLOCK_K, N, K)
    while tile < num_tiles:
        next_tile = _claim_tile(schedule, num_tiles)
        next_located = locate_tile(*schedule, n_tiles, BLOCK_M, GROUP_M, next_tile)
        expert, _, row, row_end, tile_n = located
        next_expert, _, _, _, next_tile_n = next_located
        place = _put_tile(queue, place, row, row_end, tile_n, k_tiles, expert)
        scale_ptr = w_scale_ptr + expert.to(gl.int64) * scale_rows * scale_columns
        scales = _load_scales(scale_ptr, tile_n, 0, scale_rows, scale_columns, TRANSPOSED, FP4)
        for k in range(k_tiles):
            codes_stage, codes_phase = codes_step
            stage, phase = step
            next_k = gl.minimum(k + 1, k_tiles - 1)
            next_scales = _load_scales(scale_ptr, tile_n, next_k, scale_rows, scale_columns, TRANSPOSED, FP4)
            # Codes of the step AHEAD, which may be the next tile's, come where those of the step before were.
            is_here = k + AHEAD < k_tiles
            if is_here | (next_tile < num_tiles):
                ahead = gl.where(is_here, k + AHEAD, k + AHEAD - k_tiles) * BLOCK_K
                ahead_expert = gl.where(is_here, expert, next_expert)
                ahead_n = gl.where(is_here, tile_n, next_tile_n)
                stage_ahead = _previous(codes_stage, CODES_STAGES)
                _load_codes(w_desc, codes, stage_ahead, ahead_expert, ahead_n, ahead, N, K)
            mbarrier.wait(free.index(stage), phase ^ 1)
            mbarrier.expect(full.index(stage), BLOCK_M * BLOCK_K * 2)
            # Rows past row_end, and weights past the expert's last, reach only sums that are never stored.
            for i in gl.static_range(CONSUMERS):
                x = x_smem.index(stage * CONSUMERS + i)
                _tma_load(x_desc, [row + i * ROWS, k * BLOCK_K], full.index(stage), x)
            mbarrier.wait(codes_full.index(codes_stage), codes_phase)
            _dequantize(codes_smem.index(codes_stage), w_smem.index(stage), scales, TRANSPOSED, FP4)
            _barrier()
            mbarrier.arrive(full.index(stage), count=1)
            codes_step = _next(codes_step, CODES_STAGES)
            step = _next(step, STAGES)
            scales = next_scales
        tile = next_tile
        located = next_located
    _put_tile(queue, place, -1, -1, 0, 0, 0)


@gluon.jit(do_not_specialize=["max_tiles"])
def _codes_hopper_kernel(
    x_desc,  # (S, K)
    w_desc,  # (E * N, K), or with TRANSPOSED (E * K, N), fp8; of 4-bit codes a quarter of the columns
    w_scale_ptr,  # (E, scale_rows, scale_columns) fp32 | e8m0 as uint8
    y_desc,  # (S, N), ragged; or None, without TMA
    y_ptr,  # (S, N)
    schedule_ptr,  # (5, max_tiles) int32
    max_tiles,
    N,
    K,
    scale_rows,
    scale_columns,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
    TRANSPOSED: gl.constexpr,
):
    W_SHAPE: gl.constexpr = [STAGES, BLOCK_K, BLOCK_N] if TRANSPOSED else [STAGES, BLOCK_N, BLOCK_K]
    FP4: gl.constexpr = w_desc.dtype == gl.int16
    CODES_SHAPE: gl.constexpr = [STAGES, W_SHAPE[1], W_SHAPE[2] // 4] if FP4 else W_SHAPE
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [STAGES * CONSUMERS, ROWS, BLOCK_K], x_desc.layout)
    w_smem = gl.allocate_shared_memory(x_desc.dtype, W_SHAPE, _W_LAYOUT)
    codes_smem = gl.allocate_shared_memory(w_desc.dtype, CODES_SHAPE, w_desc.layout)
    stages = (x_smem, w_smem, _barriers(STAGES, 2), _barriers(STAGES, CONSUMERS))
    codes = (codes_smem, _barriers(STAGES, 1))
    queue = _queue()
    # What `as_factors` leaves out.
    FACTOR: gl.constexpr = (
        1.0 / TOO_SMALL if FP4 and w_scale_ptr.dtype.element_ty == gl.uint8 and x_desc.dtype == gl.bfloat16 else 1.0
    )
    schedule = (schedule_ptr, max_tiles)
    sizes = (N, K, scale_rows, scale_columns)
    out = (y_desc, None if y_desc is None else _buffers(y_desc, BUFFERS), y_ptr, None, None)
    gl.warp_specialize(
        [
            (_multiply, (0, out, N, stages, queue, False, TRANSPOSED, 0, FACTOR)),
            (_multiply, (1, out, N, stages, queue, False, TRANSPOSED, 0, FACTOR)),
            (
                _load_and_dequantize,
                (
                    x_desc,
                    w_desc,
                    w_scale_ptr,
                    schedule,
                    sizes,
                    stages,
                    codes,
                    queue,
                    GROUP_M,
                    TRANSPOSED,
                    FP4,
                ),
            ),
        ],
        [4, 4],
        [192, 120],  # registers of all but the first consumer, which has what is left
    )


def codes_gemm_hopper(x, w, w_scale, schedule, config, y, transposed=False):
    """x (S, K) of 16 bits, w (E, N, K) fp8, or (E, K, N) -> y (S, N); rows that belong to no expert keep what y held.

    w may be of 4-bit codes, bytes in half as many columns. Blocks of scales of fp8 are counted through all rows of w.
    """
    N, K = y.shape[1], x.shape[1]
    if w.dtype != torch.float8_e4m3fn:
        w, w_scale = w.view(torch.int16), in_bytes(w, w_scale)[1]
    box = [BLOCK_K.value, BLOCK_N.value] if transposed else [BLOCK, BLOCK_K.value]
    box[1] //= 4 if w.dtype == torch.int16 else 1
    y_desc = _ragged_descriptor(y) if can_store_by_tma(y) else None
    launch(
        _codes_hopper_kernel,
        (multiprocessors(x.device), 1, 1),
        (_rows_descriptor(x, [ROWS.value, BLOCK_K.value]), _rows_descriptor(w, box), w_scale, y_desc, y, schedule),
        (schedule.shape[1],),
        (N, K, *w_scale.shape[1:], config.GROUP_M, 3, transposed),
    )
    return y
