"""wgrad for Hopper and many rows: persistent, and each warp has a role of its own (hopper.py).

    dw[e] = sum over the rows r of e of p[r] q[r]^T     p (P, M), q (P, N) -> dw (E, M, N)

Tiles take as long as their experts have rows; a program takes every gl.num_programs(0)-th of them.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .hopper import (
    BLOCK_K,
    BLOCK_M,
    BLOCK_N,
    CONSUMERS,
    ROWS,
    _barriers,
    _buffers,
    _next,
    _put_tile,
    _queue,
    _rows_descriptor,
    _tma_load,
)
from .launch import launch, multiprocessors
from .products_hopper import BUFFERS, _multiply


@gluon.jit
def _load_wgrad(p_desc, q_desc, expert_offsets_ptr, E, M, N, stages, queue):
    """The loader of wgrad: steps of K are rows of an expert."""
    p_smem, q_smem, full, free = stages
    STAGES: gl.constexpr = q_smem.shape[0]
    n_tiles = gl.cdiv(N, BLOCK_N)
    tiles = gl.cdiv(M, BLOCK_M) * n_tiles
    step = (0, 0)
    place = (0, 0)
    for tile in range(gl.program_id(0), E * tiles, gl.num_programs(0)):
        expert = tile // tiles
        m = tile % tiles // n_tiles * BLOCK_M
        tile_n = tile % n_tiles
        begin = gl.load(expert_offsets_ptr + expert)
        end = gl.load(expert_offsets_ptr + expert + 1)
        row = expert * M + m
        k_tiles = (end - begin) // BLOCK_K
        place = _put_tile(queue, place, row, expert * M + M, tile_n, k_tiles, expert)
        for k in range(begin, end, BLOCK_K):
            stage, phase = step
            mbarrier.wait(free.index(stage), phase ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, (BLOCK_M + BLOCK_N) * BLOCK_K * 2)
            for i in gl.static_range(CONSUMERS):
                _tma_load(p_desc, [k, m + i * ROWS], bar, p_smem.index(stage * CONSUMERS + i))
            _tma_load(q_desc, [k, tile_n * BLOCK_N], bar, q_smem.index(stage))
            step = _next(step, STAGES)
    _put_tile(queue, place, -1, -1, 0, 0, 0)


@gluon.jit
def _wgrad_hopper_kernel(
    p_desc,  # (P, M)
    q_desc,  # (P, N)
    dw_desc,  # (E * M, N), or None, without TMA
    dw_ptr,  # (E * M, N)
    expert_offsets_ptr,  # (E + 1,) int32, multiples of BLOCK_K
    E,
    M,
    N,
    STAGES: gl.constexpr,
):
    p_smem = gl.allocate_shared_memory(p_desc.dtype, [STAGES * CONSUMERS, BLOCK_K, ROWS], p_desc.layout)
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BLOCK_K, BLOCK_N], q_desc.layout)
    stages = (p_smem, q_smem, _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS))
    queue = _queue()
    out = (dw_desc, None if dw_desc is None else _buffers(dw_desc, BUFFERS), dw_ptr, None, None)
    gl.warp_specialize(
        [
            (_multiply, (0, out, N, stages, queue, True, True)),
            (_multiply, (1, out, N, stages, queue, True, True)),
            (_load_wgrad, (p_desc, q_desc, expert_offsets_ptr, E, M, N, stages, queue)),
        ],
        [4, 1],
        [216, 72],  # of the second consumer and the loader, as in grouped_gemm_hopper.py
    )


def wgrad_hopper(p, q, expert_offsets, config, dw):
    """p (P, M), q (P, N), both 16-bit, contiguous and padded as `pad` of routing.py does -> dw (E, M, N)."""
    experts, M, N = dw.shape
    # 64 rows at a time leave by TMA, which are to be of one expert.
    dw_desc = _rows_descriptor(dw, [64, 64]) if M % ROWS.value == 0 else None
    launch(
        _wgrad_hopper_kernel,
        (multiprocessors(p.device), 1, 1),
        (_rows_descriptor(p, [64, 64]), _rows_descriptor(q, [64, 256]), dw_desc, dw, expert_offsets),
        (),
        (experts, M, N, config.num_stages),
    )
    return dw
