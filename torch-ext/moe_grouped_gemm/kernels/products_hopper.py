"""What the consumers of hopper.py's 16-bit kernels do with a tile: sums of products, and rows that are stored.

A consumer has one block of 64 rows; of a third block, if there is one, half of the columns. Its rows leave by TMA, 64
columns at a time from two buffers, so that it begins the next tile before they have left. Where they go to rows of
their own in the order of slots, or begin at no multiple of 16 bytes, they are stored from registers.

Tuples as in hopper.py, and out (y_desc, y_smem, y_ptr, sorted_slots_ptr, row_weights_ptr), the first two None if rows
are stored from registers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper import (
    BLOCK_K,
    BLOCK_M,
    BLOCK_N,
    COLUMNS,
    CONSUMERS,
    ROWS,
    _as_rows,
    _barrier,
    _is_tall,
    _next,
    _previous,
    _put,
    _store_rows,
    _take_tile,
)

_HALF = gl.constexpr(BLOCK_N.value // 2)
_BUFFERS = gl.constexpr(2)  # of a consumer
BUFFERS = gl.constexpr(_BUFFERS.value * CONSUMERS.value)


@gluon.jit
def _weights(w_smem, stage, TRANSPOSED: gl.constexpr):
    """[BLOCK_K, BLOCK_N]"""
    if TRANSPOSED:
        return w_smem.index(stage)
    else:
        return w_smem.index(stage).reshape((BLOCK_N, BLOCK_K)).permute((1, 0))


@gluon.jit
def _block(x_smem, i, TRANSPOSED: gl.constexpr):
    """[ROWS, BLOCK_K]"""
    return x_smem.index(i).permute((1, 0)) if TRANSPOSED else x_smem.index(i)


@gluon.jit
def _await(stages, step, FENCE: gl.constexpr):
    """The stage of this step, when it is full. FENCE: before wgmma reads rows that came by cp.async."""
    stage, phase = step
    mbarrier.wait(stages[2].index(stage), phase)
    if FENCE:
        fence_async_shared()
    return stage


@gluon.jit
def _release(stages, step, pred):
    """The stage before that of this step is done with, by all warps of this consumer."""
    _, w_smem, _, free = stages
    _barrier()
    mbarrier.arrive(free.index(_previous(step[0], w_smem.shape[0])), count=1, pred=pred)


@gluon.jit
def _add_product(CONSUMER: gl.constexpr, acc, w, stages, step, frees, TRANSPOSED_X: gl.constexpr, FENCE: gl.constexpr):
    """acc + x @ w, w [BLOCK_K, BLOCK_N]; the stage before, if it `frees` one, is done with."""
    x_smem, w_smem, _, _ = stages
    BLOCKS: gl.constexpr = x_smem.shape[0] // w_smem.shape[0]
    stage = _await(stages, step, FENCE)
    acc = warpgroup_mma(_block(x_smem, stage * BLOCKS + CONSUMER, TRANSPOSED_X), w, acc, is_async=True)
    acc = warpgroup_mma_wait(1, deps=[acc])
    _release(stages, step, frees)
    return acc, _next(step, w_smem.shape[0])


@gluon.jit
def _add_two_products(CONSUMER: gl.constexpr, acc, third, w, stages, step, frees, FENCE: gl.constexpr):
    """As `_add_product`, and for `third` the third block of rows @ half of the columns."""
    x_smem, w_smem, _, _ = stages
    BLOCKS: gl.constexpr = x_smem.shape[0] // w_smem.shape[0]
    stage = _await(stages, step, FENCE)
    half = w.slice(CONSUMER * _HALF, _HALF, dim=1)
    acc = warpgroup_mma(x_smem.index(stage * BLOCKS + CONSUMER), w, acc, is_async=True)
    third = warpgroup_mma(x_smem.index(stage * BLOCKS + CONSUMERS), half, third, is_async=True)
    acc, third = warpgroup_mma_wait(2, deps=[acc, third])
    _release(stages, step, frees)
    return acc, third, _next(step, w_smem.shape[0])


@gluon.jit
def _sums(
    CONSUMER: gl.constexpr,
    k_tiles,
    stages,
    step,
    TRANSPOSED_X: gl.constexpr = False,
    TRANSPOSED_W: gl.constexpr = False,
    RANK_STEPS: gl.constexpr = 0,
    FENCE: gl.constexpr = False,
):
    """Over the steps of a tile: those of the consumer's own rows [ROWS, BLOCK_N], and the step after."""
    _, w_smem, _, _ = stages
    acc = gl.zeros((ROWS, BLOCK_N), gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16]))
    for k in range(k_tiles - RANK_STEPS):
        w = _weights(w_smem, step[0], TRANSPOSED_W)
        acc, step = _add_product(CONSUMER, acc, w, stages, step, k > 0, TRANSPOSED_X, FENCE)
    for _step in gl.static_range(RANK_STEPS):
        factor = _weights(_as_rows(w_smem), step[0], False)
        acc, step = _add_product(CONSUMER, acc, factor, stages, step, True, False, FENCE)
    acc = warpgroup_mma_wait(0, deps=[acc])
    _release(stages, step, k_tiles > 0)
    return acc, step


@gluon.jit
def _tall_sums(
    CONSUMER: gl.constexpr,
    k_tiles,
    stages,
    step,
    TRANSPOSED_W: gl.constexpr = False,
    RANK_STEPS: gl.constexpr = 0,
    FENCE: gl.constexpr = False,
):
    """As `_sums`; second, those of the third block of rows, [ROWS, BLOCK_N / 2]."""
    _, w_smem, _, _ = stages
    acc = gl.zeros((ROWS, BLOCK_N), gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16]))
    third = gl.zeros((ROWS, _HALF), gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _HALF, 16]))
    for k in range(k_tiles - RANK_STEPS):
        w = _weights(w_smem, step[0], TRANSPOSED_W)
        acc, third, step = _add_two_products(CONSUMER, acc, third, w, stages, step, k > 0, FENCE)
    for _step in gl.static_range(RANK_STEPS):
        factor = _weights(_as_rows(w_smem), step[0], False)
        acc, third, step = _add_two_products(CONSUMER, acc, third, factor, stages, step, True, FENCE)
    acc, third = warpgroup_mma_wait(0, deps=[acc, third])
    _release(stages, step, k_tiles > 0)
    return acc, third, step


@gluon.jit
def _skip_steps(k_tiles, stages, step):
    """A consumer's part in a tile that has no rows for it."""
    _, w_smem, full, free = stages
    for _ in range(k_tiles):
        stage, phase = step
        mbarrier.wait(full.index(stage), phase)
        _barrier()  # or a warp might come to look when the stage is full again
        mbarrier.arrive(free.index(stage), count=1)
        step = _next(step, w_smem.shape[0])
    return step


@gluon.jit
def _halves(y):
    """The left and the right columns."""
    return y.reshape((y.shape[0], 2, y.shape[1] // 2)).permute((0, 2, 1)).split()


@gluon.jit
def _store_half(CONSUMER: gl.constexpr, out, y, row, row_end, column, N):
    """y [ROWS, BLOCK_N / 2]"""
    y_desc, y_smem, y_ptr, sorted_slots_ptr, _ = out
    if y_desc is None:
        _store_rows(y_ptr, sorted_slots_ptr, y, row, row_end, column, N)
    else:
        left, right = _halves(y)
        _put(y_desc, y_smem.index(CONSUMER * _BUFFERS), left, row, row_end, column)
        _put(y_desc, y_smem.index(CONSUMER * _BUFFERS + 1), right, row, row_end, column + COLUMNS)


@gluon.jit
def _multiply(
    CONSUMER: gl.constexpr,
    out,
    N,
    stages,
    queue,
    TRANSPOSED_X: gl.constexpr,
    TRANSPOSED_W: gl.constexpr,
    RANK_STEPS: gl.constexpr = 0,
    FACTOR: gl.constexpr = 1.0,
):
    y_desc, _, _, sorted_slots_ptr, row_weights_ptr = out
    x_smem, w_smem, _, _ = stages
    JOIN: gl.constexpr = x_smem.shape[0] > w_smem.shape[0] * CONSUMERS
    step = (0, 0)
    tile, place = _take_tile(queue, (0, 0))
    row, row_end, tile_n, k_tiles, _ = tile
    while row >= 0:
        column = tile_n * BLOCK_N
        own_row = row + CONSUMER * ROWS
        if own_row < row_end:
            if JOIN:
                if _is_tall(row, row_end):
                    acc, third, step = _tall_sums(CONSUMER, k_tiles, stages, step, TRANSPOSED_W, RANK_STEPS)
                    _store_half(CONSUMER, out, third, row + BLOCK_M, row_end, column + CONSUMER * _HALF, N)
                else:
                    acc, step = _sums(CONSUMER, k_tiles, stages, step, TRANSPOSED_X, TRANSPOSED_W, RANK_STEPS)
            else:
                acc, step = _sums(CONSUMER, k_tiles, stages, step, TRANSPOSED_X, TRANSPOSED_W, RANK_STEPS)
            if FACTOR != 1.0:
                acc *= FACTOR
            if row_weights_ptr is not None:
                offs_m = own_row + gl.arange(0, ROWS, gl.SliceLayout(1, acc.type.layout))
                slots = gl.load(sorted_slots_ptr + offs_m, mask=offs_m < row_end, other=0)
                weight = gl.load(row_weights_ptr + slots, mask=offs_m < row_end, other=0.0).to(gl.float32)
                acc *= gl.expand_dims(weight, 1)
            left, right = _halves(acc)
            _store_half(CONSUMER, out, left, own_row, row_end, column, N)
            _store_half(CONSUMER, out, right, own_row, row_end, column + _HALF, N)
        else:
            step = _skip_steps(k_tiles, stages, step)
        tile, place = _take_tile(queue, place)
        row, row_end, tile_n, k_tiles, _ = tile
    if y_desc is not None:
        tma.store_wait(0)  # the buffers must outlive what leaves from them
