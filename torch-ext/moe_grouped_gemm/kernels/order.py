"""The order of columns in which grouped_gemm_fp4_hopper takes x, whole periods: where `COLUMN[p]` was is place p.

A group of 32 codes with one scale is eight words of four codes. Nibbles of all words make numbers of their own, which
are operands of wgmma one after another; of each 16 columns of an operand thread t of a row has those at 2t and 2t + 1,
and at 2t + 8 and 2t + 9.
"""

import triton
import triton.language as tl

PERIOD = 128  # columns: four threads, a group each
_PERIOD = tl.constexpr(PERIOD)
# Place 32 i + 8 q + 2 t + h holds what nibble i multiplies, in half h of the pair of words q of thread t.
COLUMN = [32 * t + 8 * q + 4 * h + i for i in range(4) for q in range(4) for t in range(4) for h in range(2)]


@triton.jit
def in_order(x):
    """The columns of x [ROWS, whole periods], in that order."""
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    x = x.reshape(ROWS, COLUMNS // _PERIOD, 4, 4, 2, 4).permute(0, 1, 5, 3, 2, 4)
    return x.reshape(ROWS, COLUMNS)


def ordered_size(K: int) -> int:
    """Columns, to whole periods."""
    return -(-K // PERIOD) * PERIOD
