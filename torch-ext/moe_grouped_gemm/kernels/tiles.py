"""Tiles of a GEMM's result: whose turn is which, by a schedule as `route` makes it; how high it is; how it is stored.

For Triton, `locate_tile` for Gluon too. CONFIG is a GemmConfig, w_strides are those of E, N, K.
"""

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .descriptors import described


@triton.jit
def locate_tile(schedule_ptr, max_tiles, n_tiles, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr, turn=None):
    """Expert, its first row, the tile's first row, the row after the expert's last, and the column tile.

    turn: by default the program's. Expert -1: there is no such turn. If some experts have many rows and others few,
    turns alternate between the two halves of the tiles: those that wait for the matrix units then run beside those that
    wait for memory.
    """
    num_tiles = tl.load(schedule_ptr + 4 * max_tiles) * n_tiles
    is_mixed = tl.load(schedule_ptr + 4 * max_tiles + 2)
    if turn is None:
        turn = tl.program_id(0)
    pid = tl.where(is_mixed != 0, turn // 2 + turn % 2 * tl.cdiv(num_tiles, 2), turn)
    tile = tl.minimum(pid // n_tiles, max_tiles - 1)
    expert = tl.where(turn < num_tiles, tl.load(schedule_ptr + tile), -1)
    first_tile = tl.load(schedule_ptr + max_tiles + tile)
    first_row = tl.load(schedule_ptr + 2 * max_tiles + tile)
    row_end = tl.load(schedule_ptr + 3 * max_tiles + tile)
    # Inside an expert, GROUP_M row tiles share each weight tile before the next one is read.
    pid -= first_tile * n_tiles
    m_tiles = tl.cdiv(row_end - first_row, BLOCK_M)
    group = pid // (GROUP_M * n_tiles)
    pid -= group * GROUP_M * n_tiles
    group_size = tl.maximum(tl.minimum(m_tiles - group * GROUP_M, GROUP_M), 1)
    tile_m = group * GROUP_M + pid % group_size
    return expert, first_row, first_row + tile_m * BLOCK_M, row_end, pid // group_size


@triton.jit
def is_height(rows, i: tl.constexpr, CONFIG: tl.constexpr):
    """Whether BLOCK_M >> i is the least of the tile heights, BLOCK_M to MIN_M, for these rows (the first: or more)."""
    HEIGHT: tl.constexpr = CONFIG.BLOCK_M >> i
    if CONFIG.BLOCK_M == CONFIG.MIN_M:
        return True
    elif i == 0:
        return rows > HEIGHT // 2
    elif HEIGHT == CONFIG.MIN_M:
        return rows <= HEIGHT
    else:
        return (rows <= HEIGHT) & (rows > HEIGHT // 2)


@triton.jit
def load_weight(w_desc, expert, row, k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TRANSPOSED: tl.constexpr):
    """[BLOCK_N, BLOCK_K] of an expert's weight, by a descriptor as `weight_descriptor` makes it."""
    if TRANSPOSED:
        return w_desc.load([expert, k, row]).reshape(BLOCK_K, BLOCK_N).T
    else:
        return w_desc.load([expert, row, k]).reshape(BLOCK_N, BLOCK_K)


@triton.jit
def add_bias(y, bias_ptr, expert, offs_n, N):
    """y [BM, BN] and the biases (E, N) of these columns, if there are any."""
    if bias_ptr is not None:
        y += tl.load(bias_ptr + expert.to(tl.int64) * N + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def store_rows(y_ptr, y, row, row_end, offs_n, N):
    """The rows of y [BM, BN] that come before row_end, as rows from `row` on and columns offs_n of y_ptr (S, N)."""
    offs_m = row + tl.arange(0, y.shape[0])
    y_ptrs = y_ptr + offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(offs_m < row_end)[:, None] & (offs_n < N)[None, :])


def weight_descriptor(w, block_n, block_k):
    """Of (E, N, K) weights; TRANSPOSED, of the (E, K, N) that they are a view of."""
    if w.stride(2) == 1:
        return described(TensorDescriptor, w, w.shape, w.stride(), [1, block_n, block_k])
    w = w.mT
    return described(TensorDescriptor, w, w.shape, w.stride(), [1, block_k, block_n])
