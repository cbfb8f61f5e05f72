"""Whose turn is which tile of a GEMM's result, by a schedule as `route` makes it; for Triton and for Gluon."""

import triton
import triton.language as tl


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
