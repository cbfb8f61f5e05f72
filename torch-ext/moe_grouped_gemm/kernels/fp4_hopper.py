"""Grouped GEMM for Hopper over 4-bit weights that go from shared memory to registers to wgmma, as its first operand:

    grouped_gemm_fp4_hopper:  y[r] = w[e] @ x[r] + bias[e]   x (S, K) in the order of order.py -> y (S, N)

A code becomes a 16-bit number once for all rows of a tile, in registers. The warps' roles are those of hopper.py: the
loader has codes and x brought by TMA; each consumer has 128 of the 256 weight rows, in two halves, with all rows of x,
and sums of y transposed. While wgmma multiplies one unit, 64 weight rows by a period of K, its threads convert the
next.

The operand's layout gives a thread four of each 16 columns. With K in the order of order.py these are of one group, 16
bytes with one scale, as in fp4_registers.py. (Marlin, arXiv 2408.11743, permutes weights to that end; these stay as
they are.) x passes through shared memory, so it has to be in that order already.

An expert's last tile may be lower, MIN_M; x comes in boxes of that many rows, those that there are.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .fp4_registers import _GROUP, _WORDS, TOO_SMALL, as_factors, four_numbers, in_registers, scaled
from .hopper import (
    BLOCK_N,
    CONSUMERS,
    ROWS,
    _barrier,
    _barriers,
    _claim_tile,
    _next,
    _number_of_tiles,
    _put_tile,
    _queue,
    _rows_descriptor,
    _take_tile,
    _tma_load,
)
from .launch import launch, multiprocessors
from .order import _PERIOD, PERIOD
from .tiles import locate_tile

_HALF = gl.constexpr(64)  # of a period: 128 bytes of x, which TMA swizzles
_PERIOD_GROUPS = gl.constexpr(PERIOD // 32)


@gluon.jit
def _words_layout(MMA: gl.constexpr):
    """A tensor [ROWS, 16] of int32, eight codes each, laid out so that a thread has what it multiplies."""
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    pair = gl.zeros((ROWS, _HALF), gl.int16, A).reshape([ROWS, 2, 4, 4, 2]).permute((0, 3, 2, 4, 1))
    one, _ = gl.split(pair)
    low, _ = gl.split(one.reshape([ROWS, _PERIOD // 8, 2]))
    return low


@gluon.jit
def _scales_layout(WORDS: gl.constexpr):
    """A tensor [ROWS, 4], where a thread has the scale of its group."""
    words = gl.zeros((ROWS, _PERIOD // 8), gl.int16, WORDS)
    like = gl.join(words, words).reshape([ROWS, _PERIOD_GROUPS, _WORDS])
    return gl.zeros((ROWS, _PERIOD_GROUPS), gl.int32, gl.SliceLayout(2, like.type.layout))


@gluon.jit
def _as_operand(first, second, A: gl.constexpr):
    """The numbers [ROWS, 32] of two nibbles -> the operand [ROWS, 64]."""
    both = gl.join(first, second).reshape([ROWS, 4, 4, 2, 2]).permute((0, 4, 2, 1, 3)).reshape([ROWS, _HALF])
    return gl.convert_layout(both, A, assert_trivial=True)


@gluon.jit
def _load_bytes(w_scale_ptr, rows, groups, K):
    """Past the last group that one again, for codes that are zero there."""
    groups = gl.minimum(groups, K // _GROUP - 1)
    return gl.load(w_scale_ptr + gl.expand_dims(rows * (K // _GROUP), 1) + gl.expand_dims(groups, 0))


@gluon.jit
def _load_scales(w_scale_ptr, rows, step, steps, K, PERIODS: gl.constexpr, SCALES: gl.constexpr):
    """What `_scale_of` takes the scales of a step from, for these rows: integers of all of them, or bytes."""
    step = gl.minimum(step, steps - 1)
    if w_scale_ptr.dtype.element_ty == gl.uint8:
        groups = gl.arange(0, _PERIOD_GROUPS, gl.SliceLayout(0, SCALES)) + step * (PERIODS * _PERIOD_GROUPS)
        first = _load_bytes(w_scale_ptr, rows, groups, K)
        return (first, _load_bytes(w_scale_ptr, rows, groups + (PERIODS - 1) * _PERIOD_GROUPS, K))
    else:
        return gl.load(w_scale_ptr + rows * (K // (PERIODS * _PERIOD)) + step)


@gluon.jit
def _load_scales_of_halves(w_scale_ptr, rows, step, steps, K, PERIODS: gl.constexpr, SCALES: gl.constexpr):
    first = _load_scales(w_scale_ptr, rows[0], step, steps, K, PERIODS, SCALES)
    return (first, _load_scales(w_scale_ptr, rows[1], step, steps, K, PERIODS, SCALES))


@gluon.jit
def _scale_of(scales, period: gl.constexpr, SCALES: gl.constexpr):
    """[ROWS, 4] of a period of the step."""
    if isinstance(scales, gl.tuple):
        return scales[period]
    else:
        four = (scales >> (32 * period)).to(gl.int32)
        place = gl.arange(0, _PERIOD_GROUPS, gl.SliceLayout(0, SCALES))
        return (gl.expand_dims(four, 1) >> gl.expand_dims(8 * place, 0)).to(gl.uint8)


@gluon.jit
def _convert(codes_smem, scales, unit: gl.constexpr, CONSUMER: gl.constexpr, LAYOUTS: gl.constexpr):
    """The two operands [ROWS, 64] of a unit; codes_smem: of its period, scales: of the step's two halves."""
    half: gl.constexpr = unit % 2
    A: gl.constexpr = LAYOUTS[0]
    WORDS: gl.constexpr = LAYOUTS[1]
    SCALES: gl.constexpr = LAYOUTS[2]
    dtype: gl.constexpr = LAYOUTS[3]
    words = codes_smem.slice((CONSUMER * 2 + half) * ROWS, ROWS).load(WORDS)
    words = gl.join(words.to(gl.int16), (words >> 16).to(gl.int16)).reshape([ROWS, _PERIOD // 4])
    numbers = four_numbers(words, dtype)
    factor = as_factors(_scale_of(scales[half], unit // 2, SCALES), dtype)
    left = _as_operand(scaled(numbers[0], factor), scaled(numbers[1], factor), A)
    right = _as_operand(scaled(numbers[2], factor), scaled(numbers[3], factor), A)
    return left, right


@gluon.jit
def _load_step(x_desc, w_desc, stages, step, tile, k, MIN_M: gl.constexpr, PERIODS: gl.constexpr):
    """The columns from k on of the tile's rows and weight rows, into the next stage; past K there are zeros."""
    row, row_end, w_row = tile
    x_smem, codes_smem, full, free = stages
    BOXES: gl.constexpr = x_smem.shape[1] // MIN_M
    stage, phase = step
    mbarrier.wait(free.index(stage), phase ^ 1)
    bar = full.index(stage)
    boxes = gl.minimum(gl.cdiv(row_end - row, MIN_M), BOXES)
    for box in gl.static_range(BOXES):
        mbarrier.expect(bar, PERIODS * _PERIOD * (BLOCK_N // 2 + (box + 1) * MIN_M * 2), pred=boxes == box + 1)
    for period in gl.static_range(PERIODS):
        at = stage * PERIODS + period
        first = k + period * _PERIOD
        # Rows past the expert's last are another's: they reach only sums that are never stored.
        _tma_load(w_desc, [w_row, first // 8], bar, codes_smem.index(at))
        for box in gl.static_range(BOXES):
            here = box < boxes
            x_row = row + box * MIN_M
            left, right = x_smem.index(2 * at), x_smem.index(2 * at + 1)
            _tma_load(x_desc, [x_row, first], bar, left.slice(box * MIN_M, MIN_M), pred=here)
            _tma_load(x_desc, [x_row, first + _HALF], bar, right.slice(box * MIN_M, MIN_M), pred=here)
    return _next(step, full.shape[0])


@gluon.jit
def _load(
    x_desc,
    w_desc,
    schedule,
    N,
    K,
    stages,
    queue,
    BLOCK_M: gl.constexpr,
    MIN_M: gl.constexpr,
    PERIODS: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    n_tiles = gl.cdiv(N, BLOCK_N)
    num_tiles = _number_of_tiles(schedule, n_tiles)
    step = (0, 0)
    place = (0, 0)
    tile = gl.program_id(0)
    while tile < num_tiles:
        next_tile = _claim_tile(schedule, num_tiles)
        expert, _, row, row_end, tile_n = locate_tile(*schedule, n_tiles, BLOCK_M, GROUP_M, tile)
        place = _put_tile(queue, place, row, row_end, tile_n, gl.cdiv(K, PERIODS * _PERIOD), expert)
        w_row = expert * N + tile_n * BLOCK_N
        for k in range(0, K, PERIODS * _PERIOD):
            step = _load_step(x_desc, w_desc, stages, step, (row, row_end, w_row), k, MIN_M, PERIODS)
        tile = next_tile
    _put_tile(queue, place, -1, -1, 0, 0, 0)


@gluon.jit
def _store(out, acc, row, row_end, first_n, N, expert, MMA: gl.constexpr):
    """acc [ROWS, HEIGHT], transposed, and the bias, as columns first_n on of the rows before row_end."""
    y_ptr, bias_ptr = out
    if y_ptr.dtype.element_ty == gl.bfloat16:
        acc *= 1.0 / TOO_SMALL  # what `as_factors` leaves out
    offs_n = first_n + gl.arange(0, ROWS, gl.SliceLayout(1, MMA))
    if bias_ptr is not None:
        bias = gl.load(bias_ptr + expert.to(gl.int64) * N + offs_n, mask=offs_n < N, other=0.0).to(gl.float32)
        acc += gl.expand_dims(bias, 1)
    # Of 64 bits offsets would not fit the registers; and counted from `row`, they would be kept from tile to tile.
    begin = row // 256 * 256
    offs_m = row - begin + gl.arange(0, acc.shape[1], gl.SliceLayout(0, MMA))
    y_ptrs = y_ptr + begin.to(gl.int64) * N + (gl.expand_dims(offs_m * N, 0) + gl.expand_dims(offs_n, 1))
    mask = gl.expand_dims(offs_m < row_end - begin, 0) & gl.expand_dims(offs_n < N, 1)
    gl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def _multiply_tile(
    CONSUMER: gl.constexpr,
    out,
    w_scale_ptr,
    N,
    K,
    stages,
    step,
    tile,
    HEIGHT: gl.constexpr,
    PERIODS: gl.constexpr,
):
    x_smem, codes_smem, full, free = stages
    row, row_end, tile_n, steps, expert = tile
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEIGHT, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    WORDS: gl.constexpr = _words_layout(MMA).type.layout
    SCALES: gl.constexpr = _scales_layout(WORDS).type.layout
    LAYOUTS: gl.constexpr = (A, WORDS, SCALES, x_smem.dtype)
    UNITS: gl.constexpr = 2 * PERIODS
    first_n = tile_n * BLOCK_N + CONSUMER * (2 * ROWS)
    offs_n = first_n + gl.arange(0, ROWS, gl.SliceLayout(1, SCALES))
    first_row = expert.to(gl.int64) * N
    rows = (gl.minimum(offs_n, N - 1) + first_row, gl.minimum(offs_n + ROWS, N - 1) + first_row)
    # Two steps ahead: they are long on their way.
    scales = _load_scales_of_halves(w_scale_ptr, rows, 0, steps, K, PERIODS, SCALES)
    next_scales = _load_scales_of_halves(w_scale_ptr, rows, 1, steps, K, PERIODS, SCALES)
    acc = gl.zeros((ROWS, HEIGHT), gl.float32, MMA)
    second_acc = gl.zeros((ROWS, HEIGHT), gl.float32, MMA)
    for k in range(steps):
        stage, phase = step
        last_scales = _load_scales_of_halves(w_scale_ptr, rows, k + 2, steps, K, PERIODS, SCALES)
        mbarrier.wait(full.index(stage), phase)
        left, right = _convert(codes_smem.index(stage * PERIODS), scales, 0, CONSUMER, LAYOUTS)
        for unit in gl.static_range(UNITS):
            at = 2 * (stage * PERIODS + unit // 2)
            x_left = x_smem.index(at).slice(0, HEIGHT).permute((1, 0))
            x_right = x_smem.index(at + 1).slice(0, HEIGHT).permute((1, 0))
            if unit % 2 == 0:
                acc = warpgroup_mma(left, x_left, acc, is_async=True)
                acc = warpgroup_mma(right, x_right, acc, is_async=True)
            else:
                second_acc = warpgroup_mma(left, x_left, second_acc, is_async=True)
                second_acc = warpgroup_mma(right, x_right, second_acc, is_async=True)
            if unit + 1 < UNITS:
                codes = codes_smem.index(stage * PERIODS + (unit + 1) // 2)
                next_left, next_right = _convert(codes, scales, unit + 1, CONSUMER, LAYOUTS)
            # Not into the next step: sums under way at the loop's end make the assembler serialise all of it.
            if unit % 2 == 0:
                acc, left, right = warpgroup_mma_wait(0, deps=[acc, left, right])
            else:
                second_acc, left, right = warpgroup_mma_wait(0, deps=[second_acc, left, right])
            if unit + 1 < UNITS:
                left, right = next_left, next_right
        _barrier()
        mbarrier.arrive(free.index(stage), count=1)
        step = _next(step, full.shape[0])
        scales = next_scales
        next_scales = last_scales
    _store(out, acc, row, row_end, first_n, N, expert, MMA)
    _store(out, second_acc, row, row_end, first_n + ROWS, N, expert, MMA)
    return step


@gluon.jit
def _multiply(
    CONSUMER: gl.constexpr,
    out,
    w_scale_ptr,
    N,
    K,
    stages,
    queue,
    BLOCK_M: gl.constexpr,
    MIN_M: gl.constexpr,
    PERIODS: gl.constexpr,
):
    step = (0, 0)
    tile, place = _take_tile(queue, (0, 0))
    while tile[0] >= 0:
        args = (out, w_scale_ptr, N, K, stages)
        if BLOCK_M == MIN_M:
            step = _multiply_tile(CONSUMER, *args, step, tile, BLOCK_M, PERIODS)
        elif tile[1] - tile[0] > MIN_M:
            step = _multiply_tile(CONSUMER, *args, step, tile, BLOCK_M, PERIODS)
        else:
            step = _multiply_tile(CONSUMER, *args, step, tile, MIN_M, PERIODS)
        tile, place = _take_tile(queue, place)


@gluon.jit(do_not_specialize=["max_tiles"])
def _grouped_gemm_fp4_hopper_kernel(
    x_desc,  # (S, K, to whole periods)
    w_desc,  # (E * N, K / 8) int32
    w_scale_ptr,  # (E, N, K / 32) e8m0 as uint8, or those of a step as one integer
    bias_ptr,  # (E, N), or None
    y_ptr,  # (S, N)
    schedule_ptr,  # (5, max_tiles) int32
    max_tiles,
    N,
    K,
    BLOCK_M: gl.constexpr,
    MIN_M: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    PERIODS: gl.constexpr = BLOCK_K // _PERIOD
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [2 * STAGES * PERIODS, BLOCK_M, _HALF], x_desc.layout)
    codes_smem = gl.allocate_shared_memory(gl.int32, [STAGES * PERIODS, BLOCK_N, _PERIOD // 8], w_desc.layout)
    stages = (x_smem, codes_smem, _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS))
    queue = _queue()
    schedule = (schedule_ptr, max_tiles)
    out = (y_ptr, bias_ptr)
    gl.warp_specialize(
        [
            (_multiply, (0, out, w_scale_ptr, N, K, stages, queue, BLOCK_M, MIN_M, PERIODS)),
            (_multiply, (1, out, w_scale_ptr, N, K, stages, queue, BLOCK_M, MIN_M, PERIODS)),
            (_load, (x_desc, w_desc, schedule, N, K, stages, queue, BLOCK_M, MIN_M, PERIODS, GROUP_M)),
        ],
        [4, 1],
        [208, 56],  # registers of the second consumer and the loader; the first consumer has what is left
    )


def grouped_gemm_fp4_hopper(x, w, w_scale, schedule, config, y, bias=None):
    """x (S, K) of 16 bits, columns in order and zeros to whole periods, w (E, N, K / 2) bytes -> y (S, N).

    Rows that belong to no expert keep what y held. w_scale: (E, N, K / 32) exponents; it and w are contiguous, w begins
    at a multiple of 16 bytes. bias: contiguous (E, N), or None. config.BLOCK_K is one period or two.
    """
    N, K = w.shape[1], 2 * w.shape[2]
    words, w_scale = in_registers(w, w_scale, K, config.BLOCK_K)
    x_desc = _rows_descriptor(x, [config.MIN_M, _HALF.value])
    w_desc = _rows_descriptor(words, [BLOCK_N.value, PERIOD // 8])
    sizes = (config.BLOCK_M, config.MIN_M, config.BLOCK_K, config.num_stages, config.GROUP_M)
    launch(
        _grouped_gemm_fp4_hopper_kernel,
        (multiprocessors(x.device), 1, 1),
        (x_desc, w_desc, w_scale, bias, y, schedule),
        (schedule.shape[1],),
        (N, K, *sizes),
    )
    return y
