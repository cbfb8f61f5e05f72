"""The first grouped GEMM of a layer for Hopper and many rows: persistent, and each warp has a role of its own.

    a[r] = act(gate[e] @ x[t]) * (up[e] @ x[t])     x (T, H), t = sorted_slots[r] // top_k -> a (S, I), and z (S, 2I)

As hopper.py has it; but TMA cannot gather rows of x, so that the loader has four warps. Each of its threads copies
pieces of 16 bytes (cp.async), and one has the weights come by TMA. A stage is full when all of them have arrived.

A tile is 128 columns of a. Its 256 weight rows are gate, up, gate, up, 64 each, so that 64 columns of a come of 128
weight rows that follow each other. It is 64, 128 or 192 rows high, as its expert has them left: the last ones, if 64
or fewer, go with the tile before. Results leave by TMA, 64 x 64 at a time, while the next tile is multiplied.

Tuples that are handed around: rows (x_ptr, sorted_slots_ptr, top_k, stride_xt), tile (row, row_end, tile_n, expert),
out (a_desc, gate_desc, up_desc, buffers); others as in hopper.py.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from ..launch_configs import TALL_STAGES, fits_specialized_gate_up
from .descriptors import described
from .gate import _glu
from .hopper import (
    BLOCK_K,
    BLOCK_M,
    BLOCK_N,
    COLUMNS,
    CONSUMERS,
    ROWS,
    _barriers,
    _buffers,
    _claim_tile,
    _goes_along,
    _is_tall,
    _next,
    _number_of_tiles,
    _put,
    _put_tile,
    _queue,
    _ragged_descriptor,
    _take_tile,
    _tma_load,
    _with_layout,
)
from .launch import launch, multiprocessors
from .products_hopper import _halves, _skip_steps, _sums, _tall_sums
from .tiles import locate_tile

# Renamed in Triton 3.8.
_cp_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

STAGES = gl.constexpr(TALL_STAGES)
BLOCKS = gl.constexpr(CONSUMERS.value + 1)  # of rows, in a stage
TILE_N = gl.constexpr(BLOCK_N.value // 2)  # columns of a
_PARTS = gl.constexpr(TILE_N.value // COLUMNS.value)
_NO_ROW = gl.constexpr(-(2**30))  # negative with any column added
_LOADERS = gl.constexpr(4)  # warps
_X_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
_PIECES = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [_LOADERS.value, 1], [1, 0]))  # of [ROWS, BLOCK_K]


@gluon.jit
def _locate(schedule, n_tiles, num_tiles, turn, GROUP_M: gl.constexpr):
    """The tile of this turn, or if it goes with the one before of a next that is claimed; and its turn."""
    expert, first_row, row, row_end, tile_n = locate_tile(*schedule, n_tiles, BLOCK_M, GROUP_M, turn)
    while (turn < num_tiles) & _goes_along(first_row, row, row_end):
        turn = _claim_tile(schedule, num_tiles)
        expert, first_row, row, row_end, tile_n = locate_tile(*schedule, n_tiles, BLOCK_M, GROUP_M, turn)
    is_tile = turn < num_tiles
    return turn, (gl.where(is_tile, row, 0), gl.where(is_tile, row_end, 0), tile_n, expert)


@gluon.jit
def _block_offsets(rows, row, row_end):
    """Where the tokens of ROWS sorted rows begin in x, in pieces of 8 elements; _NO_ROW for none."""
    _, sorted_slots_ptr, top_k, stride_xt = rows
    offs_m = row + gl.arange(0, ROWS, gl.SliceLayout(1, _PIECES))
    mask_m = offs_m < row_end
    tokens = gl.load(sorted_slots_ptr + offs_m, mask=mask_m, other=0) // top_k
    return gl.where(mask_m, tokens * (stride_xt // 8), _NO_ROW)


@gluon.jit
def _offsets(rows, tile):
    row, row_end, _, _ = tile
    first, second = _block_offsets(rows, row, row_end), _block_offsets(rows, row + ROWS, row_end)
    return (first, second, _block_offsets(rows, row + 2 * ROWS, row_end))


@gluon.jit
def _gather(x_ptr, offsets, k, x_smem):
    # In 32 bits first, which may wrap as far as the compiler knows: it then keeps offsets, not pointers, in registers.
    pieces = offsets + k // 8
    offs_k = gl.arange(0, BLOCK_K, gl.SliceLayout(0, _PIECES))
    # int64: T * H may exceed 2**31.
    ptrs = x_ptr + gl.expand_dims(pieces.to(gl.int64) * 8, 1) + gl.expand_dims(offs_k, 0)
    # What is masked becomes zero.
    _cp_async(x_smem, ptrs, mask=gl.expand_dims(pieces >= 0, 1))


@gluon.jit
def _load_step(w_desc, rows, offsets, tile, k, stages, step):
    """The columns from k on of the tile's rows and weight rows, into the next stage."""
    row, row_end, tile_n, expert = tile
    x_smem, w_smem, full, free = stages
    stage, phase = step
    mbarrier.wait(free.index(stage), phase ^ 1)
    bar = full.index(stage)
    mbarrier.expect(bar, BLOCK_N * 128)
    _tma_load(w_desc, [expert, tile_n * _PARTS, 0, 0, k], bar, w_smem.index(stage))
    _gather(rows[0], offsets[0], k, x_smem.index(stage * BLOCKS))
    if row + ROWS < row_end:
        _gather(rows[0], offsets[1], k, x_smem.index(stage * BLOCKS + 1))
    if _is_tall(row, row_end):
        _gather(rows[0], offsets[2], k, x_smem.index(stage * BLOCKS + 2))
    async_copy.mbarrier_arrive(bar, increment_count=False)
    return _next(step, w_smem.shape[0])


@gluon.jit
def _load_gathered(w_desc, rows, schedule, sizes, stages, queue, GROUP_M: gl.constexpr):
    n_tiles, H = sizes
    num_tiles = _number_of_tiles(schedule, n_tiles)
    k_tiles = H // BLOCK_K
    # The next tile is looked up halfway, when the stages ahead hide how long that takes.
    half = k_tiles // 2 * BLOCK_K
    step = (0, 0)
    place = (0, 0)
    turn, tile = _locate(schedule, n_tiles, num_tiles, gl.program_id(0), GROUP_M)
    offsets = _offsets(rows, tile)
    while turn < num_tiles:
        row, row_end, tile_n, expert = tile
        place = _put_tile(queue, place, row, row_end, tile_n, k_tiles, expert)
        for k in range(0, half, BLOCK_K):
            step = _load_step(w_desc, rows, offsets, tile, k, stages, step)
        claimed = _claim_tile(schedule, num_tiles)
        turn, next_tile = _locate(schedule, n_tiles, num_tiles, claimed, GROUP_M)
        for k in range(half, H, BLOCK_K):
            step = _load_step(w_desc, rows, offsets, tile, k, stages, step)
        tile = next_tile
        offsets = _offsets(rows, tile)  # not before: registers are few
    _put_tile(queue, place, -1, -1, 0, 0, 0)


@gluon.jit
def _finish(out, z, FIRST: gl.constexpr, SECOND: gl.constexpr, row, row_end, column, GATE: gl.constexpr):
    """Stores what z [ROWS, 2 * COLUMNS], gate and up, makes of a, and z if there is a place for it.

    FIRST: the buffer of a, and of gate; SECOND: that of up.
    """
    a_desc, gate_desc, up_desc, buffers = out
    gate, up = _halves(z)
    if gate_desc is not None:
        _put(gate_desc, buffers.index(FIRST), gate, row, row_end, column)
        _put(up_desc, buffers.index(SECOND), up, row, row_end, column)
    _put(a_desc, buffers.index(FIRST), _glu(gate, up, GATE), row, row_end, column)


@gluon.jit
def _multiply_and_gate(CONSUMER: gl.constexpr, out, stages, queue, GATE: gl.constexpr):
    FIRST: gl.constexpr = CONSUMER * BLOCKS  # of its buffers; no two stores that follow each other share one
    step = (0, 0)
    tile, place = _take_tile(queue, (0, 0))
    row, row_end, tile_n, k_tiles, _ = tile
    while row >= 0:
        column = tile_n * TILE_N
        own_row = row + CONSUMER * ROWS
        if own_row < row_end:
            if _is_tall(row, row_end):
                acc, third, step = _tall_sums(CONSUMER, k_tiles, stages, step, FENCE=True)
                of_third = column + CONSUMER * COLUMNS
                _finish(out, third, FIRST + 2, FIRST, row + BLOCK_M, row_end, of_third, GATE)
            else:
                acc, step = _sums(CONSUMER, k_tiles, stages, step, FENCE=True)
            left, right = _halves(acc)
            _finish(out, left, FIRST, FIRST + 1, own_row, row_end, column, GATE)
            _finish(out, right, FIRST + 1, FIRST, own_row, row_end, column + COLUMNS, GATE)
        else:
            step = _skip_steps(k_tiles, stages, step)
        tile, place = _take_tile(queue, place)
        row, row_end, tile_n, k_tiles, _ = tile
    tma.store_wait(0)  # the buffers must outlive what leaves from them


@gluon.jit(do_not_specialize=["max_tiles"])
def _gate_up_hopper_kernel(
    x_ptr,  # (T, H)
    w_desc,  # (E, I / 64, 2, 64, H): 64 rows of gate, 64 of up, and so on
    a_desc,  # (S, I), ragged
    gate_desc,  # (S, I), ragged: the first columns of z (S, 2I); or None
    up_desc,  # (S, I), ragged: the others
    sorted_slots_ptr,  # (S,) int32
    schedule_ptr,  # (5, max_tiles) int32
    max_tiles,
    top_k,
    I,
    H,
    stride_xt,
    GROUP_M: gl.constexpr,
    GATE: gl.constexpr,
):
    x_smem = gl.allocate_shared_memory(w_desc.dtype, [STAGES * BLOCKS, ROWS, BLOCK_K], _X_LAYOUT)
    w_smem = gl.allocate_shared_memory(w_desc.dtype, [STAGES, 1, _PARTS, 2, COLUMNS, BLOCK_K], w_desc.layout)
    # A stage is full with the weights and what each thread of the loader has copied.
    stages = (x_smem, w_smem, _barriers(STAGES, 1 + 32 * _LOADERS), _barriers(STAGES, CONSUMERS))
    queue = _queue()
    rows = (x_ptr, sorted_slots_ptr, top_k, stride_xt)
    out = (a_desc, gate_desc, up_desc, _buffers(a_desc, CONSUMERS * BLOCKS))
    gl.warp_specialize(
        [
            (_multiply_and_gate, (0, out, stages, queue, GATE)),
            (_multiply_and_gate, (1, out, stages, queue, GATE)),
            (
                _load_gathered,
                (w_desc, rows, (schedule_ptr, max_tiles), (gl.cdiv(I, TILE_N), H), stages, queue, GROUP_M),
            ),
        ],
        [4, _LOADERS],
        [224, 56],  # registers of the second consumer and the loader; the first consumer has what is left
    )


def can_specialize_gate_up(x, w, gate, bias) -> bool:
    """Whether this kernel can multiply x (T, H) with w (E, 2I, H), which begins at a multiple of 16 bytes."""
    return (
        bias is None
        and not gate.interleaved
        and w.is_contiguous()
        and fits_specialized_gate_up(w.shape[2], w.shape[1] // 2)
        and x.stride(1) == 1
        and x.stride(0) % 8 == 0
        and x.data_ptr() % 16 == 0
        and x.shape[0] * x.stride(0) < 2**33  # pieces of 8 are counted in 32 bits
    )


def _weight_descriptor(w):
    """Of w (E, 2I, H): 64 rows of gate, the 64 of up that belong to them, and the same again, 64 columns of each."""
    experts, rows, hidden_dim = w.shape
    shape = [experts, rows // 2 // COLUMNS.value, 2, COLUMNS.value, hidden_dim]
    strides = [rows * hidden_dim, COLUMNS.value * hidden_dim, rows // 2 * hidden_dim, hidden_dim, 1]
    return described(_with_layout, w, shape, strides, [1, _PARTS.value, 2, COLUMNS.value, BLOCK_K.value])


def gate_up_hopper(x, w, sorted_slots, schedule, top_k, gate, config, z=None):
    """x (T, H), w (E, 2I, H), both 16-bit and such as `can_specialize_gate_up` wants -> (S, I), and z (S, 2I) filled.

    Rows of skipped slots stay unwritten.
    """
    _, rows, hidden_dim = w.shape
    inter = rows // 2
    a = torch.empty((sorted_slots.numel(), inter), dtype=x.dtype, device=x.device)
    gate_desc = up_desc = None
    if z is not None:
        gate_desc, up_desc = _ragged_descriptor(z[:, :inter]), _ragged_descriptor(z[:, inter:])
    launch(
        _gate_up_hopper_kernel,
        (multiprocessors(x.device), 1, 1),
        (x, _weight_descriptor(w), _ragged_descriptor(a), gate_desc, up_desc, sorted_slots, schedule),
        (schedule.shape[1],),
        (top_k, inter, hidden_dim, x.stride(0), config.GROUP_M, gate),
    )
    return a
