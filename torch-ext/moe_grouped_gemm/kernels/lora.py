"""What the layer with low-rank adapters runs between its GEMMs. Slot s = slots[r], [gate; up] = z[r].

    glu:         a[r] = act(gate) * up
    scale_rows:  out[r] = weight[s] * x[r]

Rows are padded (`pad` of routing.py); those of nobody become zero, whatever they were: with a bias, z there is not
zero. GATE as in grouped_gemm.py. Grid: P rows, some at a time.
"""

import torch
import triton
import triton.language as tl

from .backward import _load_gate_and_up
from .grouped_gemm import _glu
from .launch import cdiv, launch, next_power_of_2


@triton.jit
def _glu_kernel(
    z_ptr,  # (P, 2I), gate and up in the order of the weight's rows
    slots_ptr,  # (P,) int32, -1 for a row of nobody
    expert_offsets_ptr,  # (E + 1,) int32
    a_ptr,  # (P, I)
    E,
    I,
    ROWS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    GATE: tl.constexpr,
):
    row = tl.program_id(0) * ROWS
    end = tl.load(expert_offsets_ptr + E)
    if row >= end:
        return
    rows = row + tl.arange(0, ROWS)
    mask_r = (rows < end)[:, None]
    is_owned = (tl.load(slots_ptr + rows, mask=rows < end, other=-1) >= 0)[:, None]
    rows = rows.to(tl.int64)[:, None]
    for start in range(0, I, BLOCK_I):
        gate, up = _load_gate_and_up(z_ptr + rows * 2 * I, start, is_owned, I, BLOCK_I, GATE)
        # "swigluoai" of zeros is zero too.
        a = _glu(gate, up, GATE).to(a_ptr.dtype.element_ty)
        offs_i = (start + tl.arange(0, BLOCK_I))[None, :]
        tl.store(a_ptr + rows * I + offs_i, a, mask=mask_r & (offs_i < I))


@triton.jit
def _scale_rows_kernel(
    x_ptr,  # (P, N)
    top_k_weights_ptr,  # (S,)
    slots_ptr,  # (P,) int32, -1 for a row of nobody
    expert_offsets_ptr,  # (E + 1,) int32
    out_ptr,  # (P, N)
    E,
    N,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0) * ROWS
    if row >= tl.load(expert_offsets_ptr + E):
        return
    rows = row + tl.arange(0, ROWS)
    slots = tl.load(slots_ptr + rows)
    is_owned = slots >= 0
    weight = tl.load(top_k_weights_ptr + slots, mask=is_owned, other=0.0).to(tl.float32)[:, None]
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    offsets = rows.to(tl.int64)[:, None] * N + offs_n
    x = tl.load(x_ptr + offsets, mask=is_owned[:, None] & (offs_n < N), other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, (weight * x).to(out_ptr.dtype.element_ty), mask=offs_n < N)


def glu(z, slots, expert_offsets, gate):
    """z (P, 2I), padded or not -> a (P, I). Rows of nobody are zero; those from expert_offsets[E] on stay unwritten."""
    rows, inter, experts = z.shape[0], z.shape[1] // 2, expert_offsets.numel() - 1
    a = z.new_empty(rows, inter)
    block_m, block_i = 4, min(256, next_power_of_2(inter))
    launch(
        _glu_kernel,
        (cdiv(rows, block_m), 1, 1),
        (z, slots, expert_offsets, a, experts, inter, block_m, block_i, tuple(gate)),
        (z.device, z.dtype, experts, inter, tuple(gate)),
        num_warps=4,
    )
    return a


def scale_rows(x, top_k_weights, slots, expert_offsets):
    """x (P, N), N small, contiguous top_k_weights (T, top_k) -> (P, N); rows of nobody as in `glu`."""
    rows, N = x.shape
    experts = expert_offsets.numel() - 1
    out = torch.empty_like(x)
    launch(
        _scale_rows_kernel,
        (rows // 16, 1, 1),
        (x, top_k_weights, slots, expert_offsets, out, experts, N, 16, next_power_of_2(N)),
        (x.device, x.dtype, top_k_weights.dtype, top_k_weights.data_ptr() % 16, experts, N),
        num_warps=4,
    )
    return out
