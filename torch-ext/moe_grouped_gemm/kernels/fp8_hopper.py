"""The GEMMs of fp8.py for Hopper and many rows, activations in fp8: persistent, each warp with a role of its own.

The loader is that of hopper.py; but rows are in expert order in both GEMMs, so that TMA can load
them, and scales of activations are stored (blocks, S), so that those of neighbouring rows are neighbours.

A consumer's sums are two halves of 64 x 128, gate and up or neighbours. Products of a step are made one half at a time,
scaled and added; while one consumer does that, the other has the tensor cores.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .fp8 import _computed_here
from .gate import _glu
from .hopper import (
    BLOCK_M,
    BLOCK_N,
    CONSUMERS,
    ROWS,
    _barrier,
    _barriers,
    _load,
    _next,
    _queue,
    _rows_descriptor,
    _store_rows,
    _take_tile,
)
from .launch import cdiv, launch, multiprocessors
from .quantize import _BLOCK, BLOCK, _load_scale, _quantize, scale_shift

_HALF = gl.constexpr(BLOCK_N.value // 2)


@gluon.jit
def _product(x, w, previous):
    """x @ w.T in the registers of the previous one."""
    product = warpgroup_mma(x, w.permute((1, 0)), previous, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, deps=[product])


@gluon.jit
def _load_scales(scale_ptrs, k, rows, mask_m):
    """For step k: of the rows of x, and of the two halves of the weight tile."""
    x_scale_ptrs, first_ptr, second_ptr = scale_ptrs
    x_scale = gl.load(x_scale_ptrs + k * rows, mask=mask_m, other=0.0)
    return x_scale, _load_scale(first_ptr + k), _load_scale(second_ptr + k)


@gluon.jit
def _multiply(CONSUMER: gl.constexpr, out, scale_args, sizes, stages, queue, TILE_N: gl.constexpr, GATE: gl.constexpr):
    y_ptr, y_scale_ptr = out
    x_scale_ptr, w_scale_ptr, scale_shift, scale_rows = scale_args
    rows, N, K, second = sizes
    x_smem, w_smem, full, free = stages
    STAGES: gl.constexpr = w_smem.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _HALF, 32])
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    step = (0, 0)
    product = gl.zeros((ROWS, _HALF), gl.float32, layout)
    tile, place = _take_tile(queue, (0, 0))
    row, row_end, tile_n, k_tiles, expert = tile
    while row >= 0:
        row += CONSUMER * ROWS
        if row < row_end:
            offs_m = row + gl.arange(0, ROWS, row_layout)
            mask_m = offs_m < row_end
            x_scale_ptrs = x_scale_ptr + offs_m
            first_row = tile_n * (TILE_N // _BLOCK)
            second_row = gl.minimum((tile_n * TILE_N + second + scale_shift) // _BLOCK, scale_rows - 1)
            w_scale_ptrs = w_scale_ptr + expert.to(gl.int64) * scale_rows * k_tiles
            scale_ptrs = (x_scale_ptrs, w_scale_ptrs + first_row * k_tiles, w_scale_ptrs + second_row * k_tiles)
            left = gl.zeros((ROWS, _HALF), gl.float32, layout)
            right = gl.zeros((ROWS, _HALF), gl.float32, layout)
            scales = _load_scales(scale_ptrs, 0, rows, mask_m)
            for k in range(k_tiles):
                # Scales of the next step, which are long on their way.
                next_scales = _load_scales(scale_ptrs, gl.minimum(k + 1, k_tiles - 1), rows, mask_m)
                x_scale, first_scale, second_scale = scales
                stage, phase = step
                mbarrier.wait(full.index(stage), phase)
                x = x_smem.index(stage).slice(CONSUMER * ROWS, ROWS)
                w = w_smem.index(stage)
                product = _product(x, w.slice(0, _HALF), product)
                left = _computed_here(left + product * gl.expand_dims(x_scale * first_scale, 1))
                product = _product(x, w.slice(_HALF, _HALF), product)
                _barrier()
                mbarrier.arrive(free.index(stage), count=1)
                right += product * gl.expand_dims(x_scale * second_scale, 1)
                step = _next(step, STAGES)
                scales = next_scales
            if y_scale_ptr is not None:
                offs_n = tile_n * _HALF + gl.arange(0, _HALF, gl.SliceLayout(0, layout))
                a = gl.where(gl.expand_dims(offs_n < N, 0), _glu(left, right, GATE), 0.0)
                codes, scale = _quantize(a, 1)
                gl.store(y_scale_ptr + tile_n * rows + offs_m, scale, mask=mask_m)
                _store_rows(y_ptr, None, codes, row, row_end, tile_n * _HALF, N)
            else:
                _store_rows(y_ptr, None, left, row, row_end, tile_n * BLOCK_N, N)
                _store_rows(y_ptr, None, right, row, row_end, tile_n * BLOCK_N + _HALF, N)
        else:
            # `_skip_steps` written out: with a call, the gate's kernel compiles to other, untimed code.
            for _ in range(k_tiles):
                stage, phase = step
                mbarrier.wait(full.index(stage), phase)
                _barrier()
                mbarrier.arrive(free.index(stage), count=1)
                step = _next(step, STAGES)
        tile, place = _take_tile(queue, place)
        row, row_end, tile_n, k_tiles, expert = tile


@gluon.jit(do_not_specialize=["rows", "max_tiles"])
def _fp8_hopper_kernel(
    x_desc,  # (S, K) fp8
    x_scale_ptr,  # (ceil(K / 128), S) fp32
    w_desc,  # (E * w_rows, K) fp8
    w_scale_ptr,  # (E, scale_rows, ceil(K / 128)) fp32 | e8m0 as uint8
    y_ptr,  # (S, N)
    y_scale_ptr,  # (ceil(N / 128), S) fp32; or None: w is no [gate; up], and y no fp8
    schedule_ptr,  # (5, max_tiles) int32
    rows,  # S
    max_tiles,
    N,
    K,
    scale_shift,
    scale_rows,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
    GATE: gl.constexpr,
):
    TILE_N: gl.constexpr = BLOCK_N if y_scale_ptr is None else _HALF
    w_rows = N if y_scale_ptr is None else 2 * N
    second = _HALF if y_scale_ptr is None else N
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, _BLOCK], x_desc.layout)
    w_smem = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BLOCK_N, _BLOCK], w_desc.layout)
    stages = (x_smem, w_smem, _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS))
    queue = _queue()
    scale_args = (x_scale_ptr, w_scale_ptr, scale_shift, scale_rows)
    sizes = (rows, N, K, second)
    schedule = (schedule_ptr, max_tiles)
    loads = (gl.cdiv(N, TILE_N), second, w_rows, K)
    gl.warp_specialize(
        [
            (_multiply, (0, (y_ptr, y_scale_ptr), scale_args, sizes, stages, queue, TILE_N, GATE)),
            (_multiply, (1, (y_ptr, y_scale_ptr), scale_args, sizes, stages, queue, TILE_N, GATE)),
            (_load, (x_desc, w_desc, schedule, loads, stages, queue, TILE_N, GROUP_M)),
        ],
        [4, 1],
        [232, 40],  # registers of the second consumer and the loader; the first consumer has what is left
    )


def _launch(x, x_scale, w, w_scale, y, y_scale, schedule, shift, config, gate):
    N, K = y.shape[1], x.shape[1]
    # Rows of y pass through shared memory on their way out; in fp32 they need what a stage has.
    num_stages = config.num_stages if y.element_size() <= 2 else config.num_stages - 1
    launch(
        _fp8_hopper_kernel,
        (multiprocessors(x.device), 1, 1),
        (_rows_descriptor(x, [128, 128]), x_scale, _rows_descriptor(w, [128, 128]), w_scale, y, y_scale, schedule),
        (x.shape[0], schedule.shape[1]),
        (N, K, shift, w_scale.shape[1], config.GROUP_M, num_stages, gate),
    )


def gate_up_fp8_hopper(x, x_scale, w, w_scale, schedule, gate, config):
    """x (S, H) in expert order, w (E, 2I, H), both fp8 -> a (S, I) and its scale, as `quantize_slots` has them."""
    inter = w.shape[1] // 2
    a = torch.empty((x.shape[0], inter), dtype=x.dtype, device=x.device)
    a_scale = torch.empty((cdiv(inter, BLOCK), x.shape[0]), dtype=torch.float32, device=x.device)
    _launch(x, x_scale, w, w_scale, a, a_scale, schedule, scale_shift(inter, w_scale.shape[1]), config, gate)
    return a, a_scale


def grouped_gemm_fp8_hopper(x, x_scale, w, w_scale, schedule, config, y):
    """x (S, K), w (E, N, K), both fp8 -> y (S, N); rows that belong to no expert keep what y held."""
    _launch(x, x_scale, w, w_scale, y, None, schedule, 0, config, None)
    return y
