"""The layer in two launches, for so few tokens that hardly two of them share an expert: no sort, no tensor cores.

    gate_up_decode:  a[s] = act(gate[e] @ x[t]) * (up[e] @ x[t])             s = t * top_k + k, e = top_k_index[s]
    down_decode:     out[t] = sum_k weight[s] * (down[e] @ a[s])

with biases added to each product. GATE as in gate.py.

Every weight element is read once for each slot and used once, so both run at the speed of memory. Grids: (S, tiles of
I) and (T, tiles of H).
"""

import torch
import triton
import triton.language as tl

from .gate import _glu
from .launch import cdiv, launch


@triton.jit
def _gate_up_decode_kernel(
    x_ptr,  # (T, H)
    w_ptr,  # (E, 2I, H)
    bias_ptr,  # (E, 2I), or None
    a_ptr,  # (S, I)
    top_k_index_ptr,  # (S,) int32 | int64
    top_k,
    E,
    I,
    H,
    stride_xt,
    stride_we,
    stride_wn,
    stride_wk,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
    GATE: tl.constexpr,
):
    slot = tl.program_id(0)
    expert = tl.load(top_k_index_ptr + slot).to(tl.int64)
    if (expert < 0) | (expert >= E):
        return
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + (slot // top_k).to(tl.int64) * stride_xt + offs_k
    gate_rows = 2 * offs_n if GATE.interleaved else offs_n
    if WIDE:
        stride_wk = tl.cast(stride_wk, tl.int64)
    up_offset = 1 if GATE.interleaved else I
    gate_ptrs = w_ptr + expert * stride_we + gate_rows[:, None].to(tl.int64) * stride_wn + offs_k[None, :] * stride_wk
    up_ptrs = gate_ptrs + tl.cast(up_offset, tl.int64) * stride_wn
    gate = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k in range(0, H, BLOCK_K):
        mask_k = offs_k < H - k
        mask_w = (offs_n < I)[:, None] & mask_k[None, :]
        # Not pointers that advance: fewer loads would be on their way.
        w_gate = tl.load(gate_ptrs + k * stride_wk, mask=mask_w, other=0.0)
        w_up = tl.load(up_ptrs + k * stride_wk, mask=mask_w, other=0.0)
        x = tl.load(x_ptrs + k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
        gate += w_gate.to(tl.float32) * x
        up += w_up.to(tl.float32) * x
    gate = tl.sum(gate, axis=1)
    up = tl.sum(up, axis=1)
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + expert * (2 * I) + gate_rows
        gate += tl.load(bias_ptrs, mask=offs_n < I, other=0.0).to(tl.float32)
        up += tl.load(bias_ptrs + up_offset, mask=offs_n < I, other=0.0).to(tl.float32)
    a = _glu(gate, up, GATE)
    tl.store(a_ptr + slot.to(tl.int64) * I + offs_n, a.to(a_ptr.dtype.element_ty), mask=offs_n < I)


@triton.jit
def _down_decode_kernel(
    a_ptr,  # (S, I)
    w_ptr,  # (E, H, I)
    bias_ptr,  # (E, H), or None
    top_k_index_ptr,  # (S,) int32 | int64
    top_k_weights_ptr,  # (S,)
    out_ptr,  # (T, H)
    top_k,
    E,
    I,
    H,
    stride_we,
    stride_wn,
    stride_wk,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    if WIDE:
        stride_wk = tl.cast(stride_wk, tl.int64)
    row_ptrs = w_ptr + offs_n[:, None].to(tl.int64) * stride_wn + offs_k[None, :] * stride_wk
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if bias_ptr is not None:
        biases = tl.zeros((BLOCK_N,), tl.float32)
    for slot in tl.range(token * top_k, (token + 1) * top_k, loop_unroll_factor=2):
        expert = tl.load(top_k_index_ptr + slot).to(tl.int64)
        # A skipped slot has no row in `a`, and its weight may be anything, NaN included.
        columns = tl.where((expert >= 0) & (expert < E), I, 0)
        weight = tl.load(top_k_weights_ptr + slot).to(tl.float32)
        weight = tl.where(columns > 0, weight, 0.0)
        for k in range(0, I, BLOCK_K):
            mask_k = offs_k < columns - k
            a = tl.load(a_ptr + slot * I + k + offs_k, mask=mask_k, other=0.0).to(tl.float32) * weight
            w_ptrs = row_ptrs + expert * stride_we + k * stride_wk
            w = tl.load(w_ptrs, mask=(offs_n < H)[:, None] & mask_k[None, :], other=0.0)
            acc += w.to(tl.float32) * a[None, :]
        if bias_ptr is not None:
            mask = offs_n < tl.where(columns > 0, H, 0)
            biases += tl.load(bias_ptr + expert * H + offs_n, mask=mask, other=0.0).to(tl.float32) * weight
    out = tl.sum(acc, axis=1)
    if bias_ptr is not None:
        out += biases
    tl.store(out_ptr + token * H + offs_n, out.to(out_ptr.dtype.element_ty), mask=offs_n < H)


def _is_wide(w):
    """Whether a column's offset needs 64 bits, as with experts stored (K, E, N).

    Else it must not have them: with 64-bit offsets fewer loads are on their way, and a token takes up to 1.47 times as
    long (H100, qwen3-30b).
    """
    return w.shape[2] * w.stride(2) >= 2**31


def gate_up_decode(x, w, top_k_index, gate, config, bias=None):
    """x (T, H), w (E, 2I, H), contiguous top_k_index (T, top_k) and bias (E, 2I) -> (S, I).

    Rows of skipped slots stay unwritten.
    """
    experts, rows, hidden_dim = w.shape
    inter = rows // 2
    slots, top_k = top_k_index.numel(), top_k_index.shape[1]
    a = torch.empty((slots, inter), dtype=x.dtype, device=x.device)
    sizes = (top_k, experts, inter, hidden_dim, x.stride(0), *w.stride())
    launch(
        _gate_up_decode_kernel,
        (slots, cdiv(inter, config.BLOCK_N), 1),
        (x, w, bias, a, top_k_index),
        (),
        (*sizes, config.BLOCK_N, config.BLOCK_K, _is_wide(w), gate),
        num_warps=config.num_warps,
    )
    return a


def down_decode(a, w, top_k_index, top_k_weights, config, bias=None):
    """a (S, I), w (E, H, I), contiguous top_k_index and top_k_weights (T, top_k) and bias (E, H) -> (T, H)."""
    experts, hidden_dim, inter = w.shape
    tokens, top_k = top_k_index.shape
    out = torch.empty((tokens, hidden_dim), dtype=a.dtype, device=a.device)
    launch(
        _down_decode_kernel,
        (tokens, cdiv(hidden_dim, config.BLOCK_N), 1),
        (a, w, bias, top_k_index, top_k_weights, out),
        (),
        (top_k, experts, inter, hidden_dim, *w.stride(), config.BLOCK_N, config.BLOCK_K, _is_wide(w)),
        num_warps=config.num_warps,
    )
    return out
