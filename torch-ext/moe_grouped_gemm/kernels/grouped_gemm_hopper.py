"""Grouped GEMM for Hopper and many rows: persistent, and each warp has a role of its own (hopper.py).

y[r] = w[e] @ x[r]                        x (S, K) -> y (S, N); or with factors of rank R
y[r] = w[e] @ x[r] + factor[e] @ u[r]     u (S, R), factor (E, N, R)
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..launch_configs import TALL_STAGES
from .hopper import (
    BLOCK_K,
    BLOCK_N,
    CONSUMERS,
    ROWS,
    _barriers,
    _buffers,
    _load,
    _queue,
    _ragged_descriptor,
    _rows_descriptor,
    can_store_by_tma,
)
from .launch import cdiv, launch, multiprocessors
from .products_hopper import BUFFERS, _multiply

_TALL_STAGES = gl.constexpr(TALL_STAGES)


@gluon.jit(do_not_specialize=["max_tiles"])
def _grouped_gemm_hopper_kernel(
    x_desc,  # (S, K)
    w_desc,  # (E * N, K), or with TRANSPOSED_W (E * K, N)
    u_desc,  # (S, R), or None
    factor_desc,  # (E * N, R), of u
    y_desc,  # (S, N), ragged; or None, without TMA
    y_ptr,  # (S, N), in expert order, or in that of slots if the next two are given
    sorted_slots_ptr,  # (S,) int32, or None
    row_weights_ptr,  # (S,), of slots: factors of the rows of y; or None
    schedule_ptr,  # (5, max_tiles) int32
    max_tiles,
    N,
    K,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
    TRANSPOSED_W: gl.constexpr,
    RANK_STEPS: gl.constexpr,
):
    # Rows of 192 sums a thread are stored by TMA alone: else they spill.
    TALL: gl.constexpr = STAGES <= _TALL_STAGES and y_desc is not None
    BLOCKS: gl.constexpr = CONSUMERS + TALL
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [STAGES * BLOCKS, ROWS, BLOCK_K], x_desc.layout)
    W_SHAPE: gl.constexpr = [STAGES, BLOCK_K, BLOCK_N] if TRANSPOSED_W else [STAGES, BLOCK_N, BLOCK_K]
    w_smem = gl.allocate_shared_memory(w_desc.dtype, W_SHAPE, w_desc.layout)
    stages = (x_smem, w_smem, _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS))
    queue = _queue()
    schedule = (schedule_ptr, max_tiles)
    sizes = (gl.cdiv(N, BLOCK_N), BLOCK_N // 2, N, K)
    out = (y_desc, None if y_desc is None else _buffers(y_desc, BUFFERS), y_ptr, sorted_slots_ptr, row_weights_ptr)
    # Of the second consumer and the loader; the first consumer has what is left.
    REGISTERS: gl.constexpr = [232, 40] if TALL else [216, 72]
    gl.warp_specialize(
        [
            (_multiply, (0, out, N, stages, queue, False, TRANSPOSED_W, RANK_STEPS)),
            (_multiply, (1, out, N, stages, queue, False, TRANSPOSED_W, RANK_STEPS)),
            (
                _load,
                (x_desc, w_desc, schedule, sizes, stages, queue, BLOCK_N, GROUP_M, u_desc, factor_desc, RANK_STEPS),
            ),
        ],
        [4, 1],
        REGISTERS,
    )


def can_specialize(w) -> bool:
    """Whether this kernel can read w (E, N, K): contiguous, or stored as (E, K, N) and K a multiple of its steps.

    Else a box past the K rows of an expert would hold rows of the next one.
    """
    return w.is_contiguous() or (w.transpose(1, 2).is_contiguous() and w.shape[2] % BLOCK_K.value == 0)


def grouped_gemm_hopper(x, w, schedule, config, y, sorted_slots=None, row_weights=None, low_rank=None):
    """x (S, K), w (E, N, K), both 16-bit -> y (S, N); rows that belong to no expert keep what y held.

    With sorted_slots and row_weights, and with low_rank, as `grouped_gemm` has them. With TALL_STAGES tiles have up to
    192 rows, if they are stored by TMA.
    """
    _, N, K = w.shape
    transposed = not w.is_contiguous()
    w_desc = _rows_descriptor(w.transpose(1, 2), [64, 256]) if transposed else _rows_descriptor(w, [128, 64])
    u_desc = factor_desc = y_desc = None
    rank_steps = 0
    if low_rank is not None:
        u, factor = low_rank
        u_desc, factor_desc = _rows_descriptor(u, [64, 64]), _rows_descriptor(factor, [128, 64])
        rank_steps = cdiv(u.shape[1], BLOCK_K.value)
    if sorted_slots is None and can_store_by_tma(y):
        y_desc = _ragged_descriptor(y)
    launch(
        _grouped_gemm_hopper_kernel,
        (multiprocessors(x.device), 1, 1),
        (_rows_descriptor(x, [64, 64]), w_desc, u_desc, factor_desc, y_desc, y, sorted_slots, row_weights, schedule),
        (schedule.shape[1],),
        (N, K, config.GROUP_M, config.num_stages, transposed, rank_steps),
    )
    return y
