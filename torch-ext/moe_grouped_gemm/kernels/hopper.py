"""What the warp-specialized GEMMs for Hopper and many rows share: the warps' roles, and how they hand over.

Grid: as many programs as the GPU has multiprocessors; each takes one tile of 128 rows by 256 columns after another,
those of a schedule first come, first served. In a program, handing over through shared memory and mbarriers:

    loader       1 warp     takes tiles, tells the consumers, loads rows and weights by TMA, STAGES steps of K ahead
    2 consumers  4 warps    each multiply 64 rows by 256 weight rows (wgmma m64n256k16) and store the result; a tile of
                            at most 64 rows leaves the second idle

The consumers need not keep step: while one stores its rows the other has the tensor cores, and the next tile is on its
way. That pays where K is short against what comes before and after it. What the consumers do is in products_hopper.py.

Where a stage has room for a third block of 64 rows, an expert's last rows, if 64 or fewer, go with the tile before.

A ragged descriptor writes no row from a given one on, which is another expert's (as triton.tools.ragged_tma). Of y
(rows, N), whose rows are s apart, it has shape (huge, huge, FAR, N) and strides (2**34 - s, s, s, 1). At
(FAR, row_end, FAR - row_end + row, column) lies y[row, column], since addresses wrap around at 2**64, and from row_end
on the third coordinate is out of bounds.

Tuples that are handed around: schedule (schedule_ptr, max_tiles); stages (x_smem, w_smem, full, free), the ring of K
steps and its mbarriers, x_smem in blocks of which one or more make a step; queue (tiles, full, free), the ring of
tiles; step and place, where in these two a warp is: an index and the parity of its use.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..launch_configs import SPECIALIZED_TILE
from .descriptors import described
from .tiles import locate_tile

# Renamed in Triton 3.8, 3.8, 3.7 and 3.9.
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
_reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret

CONSUMERS = gl.constexpr(2)
BLOCK_M = gl.constexpr(SPECIALIZED_TILE["BLOCK_M"])
ROWS = gl.constexpr(SPECIALIZED_TILE["MIN_M"])  # of a consumer
BLOCK_N = gl.constexpr(SPECIALIZED_TILE["BLOCK_N"])
BLOCK_K = gl.constexpr(SPECIALIZED_TILE["BLOCK_K"])  # 128 bytes: what TMA swizzles
QUEUE = gl.constexpr(2)  # tiles that the consumers may lag behind the loader
COLUMNS = gl.constexpr(64)  # of a result, that leave together by TMA: 128 bytes
FAR = gl.constexpr(2**30)  # where rows of a ragged descriptor end: after more than there are


@gluon.jit
def _next(place, SIZE: gl.constexpr):
    """The next place in a ring of SIZE."""
    i, phase = place
    wraps = i == SIZE - 1
    return gl.where(wraps, 0, i + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def _previous(i, SIZE: gl.constexpr):
    return gl.where(i == 0, SIZE - 1, i - 1)


@gluon.jit
def _put_tile(queue, place, row, row_end, tile_n, k_tiles, expert):
    tiles, full, free = queue
    i, phase = place
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [gl.num_warps()], [0])
    field = gl.arange(0, 8, layout)
    mbarrier.wait(free.index(i), phase ^ 1)
    tile = gl.where(field == 2, tile_n, gl.where(field == 3, k_tiles, expert))
    tile = gl.where(field == 0, row, gl.where(field == 1, row_end, tile))
    tiles.index(i).store(tile)
    _barrier()
    mbarrier.arrive(full.index(i), count=1)
    return _next(place, QUEUE)


@gluon.jit
def _take_tile(queue, place):
    """(First row, -1: no more tiles; row after the expert's last; column tile; steps of K; expert), next place."""
    tiles, full, free = queue
    i, phase = place
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [gl.num_warps()], [0])
    field = gl.arange(0, 8, layout)
    mbarrier.wait(full.index(i), phase)
    tile = tiles.index(i).load(layout)
    _barrier()
    mbarrier.arrive(free.index(i), count=1)
    row = gl.sum(gl.where(field == 0, tile, 0), 0)
    row_end = gl.sum(gl.where(field == 1, tile, 0), 0)
    tile_n = gl.sum(gl.where(field == 2, tile, 0), 0)
    k_tiles = gl.sum(gl.where(field == 3, tile, 0), 0)
    expert = gl.sum(gl.where(field == 4, tile, 0), 0)
    return (row, row_end, tile_n, k_tiles, expert), _next(place, QUEUE)


@gluon.jit
def _load_weight(w_desc, w_smem, bar, expert, tile_n, k, second, N, K, TILE_N: gl.constexpr):
    """BLOCK_N rows of w (E, N, K), in two boxes; or with boxes that are BLOCK_N wide, columns of w (E, K, N)."""
    HALF: gl.constexpr = BLOCK_N // 2
    if w_smem.shape[1] == BLOCK_N:
        _tma_load(w_desc, [expert * K + k, tile_n * TILE_N], bar, w_smem)
    else:
        w_row = expert * N + tile_n * TILE_N
        _tma_load(w_desc, [w_row, k], bar, w_smem.slice(0, HALF))
        _tma_load(w_desc, [w_row + second, k], bar, w_smem.slice(HALF, HALF))


@gluon.jit
def _as_rows(w_smem):
    """The stages for rows of w (E, N, K), where they are for its transpose."""
    if w_smem.shape[2] == BLOCK_N:
        return _reinterpret(w_smem, w_smem.dtype, [w_smem.shape[0], BLOCK_N, w_smem.shape[1]], w_smem.layout)
    else:
        return w_smem


@gluon.jit
def _number_of_tiles(schedule, n_tiles):
    schedule_ptr, max_tiles = schedule
    return gl.load(schedule_ptr + 4 * max_tiles) * n_tiles


@gluon.jit
def _claim_tile(schedule, num_tiles):
    """The tile after this one, for each one that a program begins."""
    schedule_ptr, max_tiles = schedule
    claims_ptr = schedule_ptr + 4 * max_tiles + 1
    claimed = gl.atomic_add(claims_ptr, 1, sem="relaxed")
    # Every tile done is a claim made, so this is the last one: leave the counter as it was.
    if claimed == num_tiles - 1:
        gl.store(claims_ptr, 0)
    return gl.num_programs(0) + claimed


@gluon.jit
def _is_tall(row, row_end):
    """Whether a tile that begins here has a third block of rows, all that are left, if there is room for one."""
    return (row_end - row > BLOCK_M) & (row_end - row <= BLOCK_M + ROWS)


@gluon.jit
def _goes_along(first_row, row, row_end):
    """Whether the rows of a tile are the third block of the one before."""
    return (row > first_row) & (row_end - row <= ROWS)


@gluon.jit
def _load_step(x_desc, w_desc, w_smem, tile, k, sizes, stages, step, TILE_N: gl.constexpr):
    """The columns from k on of the tile's rows and weight rows, into the next stage."""
    row, row_end, expert, tile_n = tile
    _, second, N, K = sizes
    x_smem, _, full, free = stages
    HEIGHT: gl.constexpr = x_smem.shape[1]
    BLOCKS: gl.constexpr = x_smem.shape[0] // w_smem.shape[0]
    SIZE: gl.constexpr = (BLOCK_M + BLOCK_N) * 128
    stage, phase = step
    mbarrier.wait(free.index(stage), phase ^ 1)
    bar = full.index(stage)
    if HEIGHT * BLOCKS > BLOCK_M:
        is_tall = _is_tall(row, row_end)
        mbarrier.expect(bar, SIZE, pred=is_tall == 0)
        mbarrier.expect(bar, SIZE + HEIGHT * 128, pred=is_tall)
    else:
        mbarrier.expect(bar, SIZE)
    # Rows past row_end are another expert's: they reach only parts of acc that are never stored. So do weights past the
    # expert's last.
    for i in gl.static_range(BLOCKS):
        is_here = True if i * HEIGHT < BLOCK_M else is_tall
        _tma_load(x_desc, [row + i * HEIGHT, k], bar, x_smem.index(stage * BLOCKS + i), pred=is_here)
    _load_weight(w_desc, w_smem.index(stage), bar, expert, tile_n, k, second, N, K, TILE_N)
    return _next(step, w_smem.shape[0])


@gluon.jit
def _load(
    x_desc,
    w_desc,
    schedule,
    sizes,  # column tiles, rows of a weight between the halves of a tile, N, K
    stages,
    queue,
    TILE_N: gl.constexpr,  # rows of a weight between two tiles
    GROUP_M: gl.constexpr,
    u_desc=None,
    factor_desc=None,
    RANK_STEPS: gl.constexpr = 0,  # through these two, after those through x and w
):
    n_tiles, second, N, K = sizes
    x_smem, w_smem, full, free = stages
    STEP: gl.constexpr = x_smem.shape[2]
    JOIN: gl.constexpr = x_smem.shape[0] * x_smem.shape[1] > w_smem.shape[0] * BLOCK_M
    num_tiles = _number_of_tiles(schedule, n_tiles)
    step = (0, 0)
    place = (0, 0)
    turn = gl.program_id(0)
    while turn < num_tiles:
        next_turn = _claim_tile(schedule, num_tiles)
        expert, first_row, row, row_end, tile_n = locate_tile(*schedule, n_tiles, BLOCK_M, GROUP_M, turn)
        goes_along = JOIN and _goes_along(first_row, row, row_end)
        if not goes_along:
            tile = (row, row_end, expert, tile_n)
            k_tiles = gl.cdiv(K, STEP) + RANK_STEPS
            place = _put_tile(queue, place, row, row_end, tile_n, k_tiles, expert)
            for k in range(0, K, STEP):
                step = _load_step(x_desc, w_desc, w_smem, tile, k, sizes, stages, step, TILE_N)
            for r in gl.static_range(RANK_STEPS):
                # Past R there are zeros in both.
                step = _load_step(u_desc, factor_desc, _as_rows(w_smem), tile, r * STEP, sizes, stages, step, TILE_N)
        turn = next_turn
    _put_tile(queue, place, -1, -1, 0, 0, 0)


@gluon.jit
def _store_rows(y_ptr, sorted_slots_ptr, y, row, row_end, column, N):
    # A warp stores its own 16 rows, so that only its lanes have to exchange what they hold.
    layout: gl.constexpr = gl.BlockedLayout([16, 4], [1, 32], [4, 1], [1, 0])
    y = gl.convert_layout(y.to(y_ptr.dtype.element_ty), layout)
    offs_m = row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    offs_n = column + gl.arange(0, BLOCK_N // 2, gl.SliceLayout(0, layout))
    rows = offs_m if sorted_slots_ptr is None else gl.load(sorted_slots_ptr + offs_m, mask=offs_m < row_end, other=0)
    y_ptrs = y_ptr + gl.expand_dims(rows.to(gl.int64) * N, 1) + gl.expand_dims(offs_n, 0)
    gl.store(y_ptrs, y, mask=gl.expand_dims(offs_m < row_end, 1) & gl.expand_dims(offs_n < N, 0))


@gluon.jit
def _put(y_desc, buffer, y, row, row_end, column):
    """y [ROWS, COLUMNS] by way of this buffer, not the one that the store before reads: rows before row_end."""
    tma.store_wait(1)
    _barrier()
    buffer.reshape((ROWS, COLUMNS)).store(y.to(y_desc.dtype))
    fence_async_shared()
    _barrier()
    if y_desc.block_shape[0] == 1:
        _tma_store(y_desc, [FAR, row_end, FAR - row_end + row, column], buffer)
    else:
        _tma_store(y_desc, [row, column], buffer)


@gluon.jit
def _buffers(y_desc, SIZE: gl.constexpr):
    return gl.allocate_shared_memory(y_desc.dtype, [SIZE] + y_desc.block_shape, y_desc.layout)


@gluon.jit
def _barriers(SIZE: gl.constexpr, COUNT: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [SIZE, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SIZE):
        mbarrier.init(bars.index(i), count=COUNT)
    return bars


@gluon.jit
def _queue():
    tiles = gl.allocate_shared_memory(gl.int32, [QUEUE, 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return (tiles, _barriers(QUEUE, 1), _barriers(QUEUE, CONSUMERS))


def _rows_descriptor(x, box):
    """The rows of x, (..., K), which follow each other at one stride."""
    K = x.shape[-1]
    return described(_with_layout, x, [x.numel() // K, K], [x.stride(-2), 1], box)


def _ragged_descriptor(y):
    """Of y (rows, N) of 16 bits, as above."""
    stride = y.stride(0)
    shape, strides = [0x7FFF0000, 0x7FFF0000, FAR.value, y.shape[1]], [2**34 - stride, stride, stride, 1]
    return described(_with_layout, y, shape, strides, [1, 1, ROWS.value, COLUMNS.value])


def can_store_by_tma(y) -> bool:
    """y (..., N): contiguous rows of whole 16 bytes."""
    return y.element_size() == 2 and y.is_contiguous() and y.shape[-1] % 8 == 0 and y.data_ptr() % 16 == 0


def _with_layout(x, shape, strides, box):
    swizzle = min(128, box[-1] * x.element_size())
    layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=8 * x.element_size(), rank=len(box))
    return TensorDescriptor(x, shape, strides, box, layout)
