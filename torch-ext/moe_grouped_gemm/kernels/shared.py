"""Shared experts of a few tokens, for whoever adds them to the routed ones: two launches in place of torch's five.

    shared_gate_up:  a[t] = act(gate @ x[t]) * (up @ x[t]), times sigmoid(gate_weight @ x[t]) if there is one
    shared_down:     y[t] = down @ a[t]

Every program reads rows of the weights once, for all tokens. Grids: tiles of Is, and tiles of H.
"""

import torch
import triton
import triton.language as tl

from .gate import _glu
from .launch import cdiv, launch, next_power_of_2

MOST_TOKENS = 64  # beyond, cuBLAS has enough to do to be as fast


@triton.jit(do_not_specialize=["T"])
def _shared_gate_up_kernel(
    x_ptr,  # (T, H)
    gate_ptr,  # (Is, H)
    up_ptr,  # (Is, H)
    gate_weight_ptr,  # (1, H), or None
    a_ptr,  # (T, Is)
    T,
    Is,
    H,
    stride_xt,
    stride_gn,
    stride_un,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATE: tl.constexpr,
):
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < T, offs_n < Is
    x_ptrs = x_ptr + offs_m[:, None].to(tl.int64) * stride_xt + offs_k[None, :]
    gate_ptrs = gate_ptr + offs_n[:, None].to(tl.int64) * stride_gn + offs_k[None, :]
    up_ptrs = up_ptr + offs_n[:, None].to(tl.int64) * stride_un + offs_k[None, :]
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if gate_weight_ptr is not None:
        factor = tl.zeros((BLOCK_M,), tl.float32)
    for k in range(0, H, BLOCK_K):
        mask_k = (offs_k < H - k)[None, :]
        x = tl.load(x_ptrs + k, mask=mask_m[:, None] & mask_k, other=0.0)
        w_gate = tl.load(gate_ptrs + k, mask=mask_n[:, None] & mask_k, other=0.0)
        w_up = tl.load(up_ptrs + k, mask=mask_n[:, None] & mask_k, other=0.0)
        gate = tl.dot(x, w_gate.T, gate)
        up = tl.dot(x, w_up.T, up)
        if gate_weight_ptr is not None:
            w = tl.load(gate_weight_ptr + k + offs_k, mask=offs_k < H - k, other=0.0).to(tl.float32)
            factor += tl.sum(x.to(tl.float32) * w[None, :], axis=1)
    a = _glu(gate, up, GATE)
    if gate_weight_ptr is not None:
        a *= tl.sigmoid(factor)[:, None]
    a_ptrs = a_ptr + offs_m[:, None].to(tl.int64) * Is + offs_n[None, :]
    tl.store(a_ptrs, a.to(a_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["T"])
def _shared_down_kernel(
    a_ptr,  # (T, Is)
    down_ptr,  # (H, Is)
    y_ptr,  # (T, H)
    T,
    H,
    Is,
    stride_dn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < T, offs_n < H
    a_ptrs = a_ptr + offs_m[:, None].to(tl.int64) * Is + offs_k[None, :]
    down_ptrs = down_ptr + offs_n[:, None].to(tl.int64) * stride_dn + offs_k[None, :]
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, Is, BLOCK_K):
        mask_k = (offs_k < Is - k)[None, :]
        a = tl.load(a_ptrs + k, mask=mask_m[:, None] & mask_k, other=0.0)
        w = tl.load(down_ptrs + k, mask=mask_n[:, None] & mask_k, other=0.0)
        y = tl.dot(a, w.T, y)
    y_ptrs = y_ptr + offs_m[:, None].to(tl.int64) * H + offs_n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def shared_experts(x, shared, gate):
    """x (T, H) of 16 bits, at most MOST_TOKENS, shared: SharedExperts of reference/ -> (T, H)."""
    gate_proj, up_proj, down_proj, gate_weight = shared
    (tokens, hidden_dim), inter = x.shape, gate_proj.shape[0]
    block_m = max(16, next_power_of_2(tokens))
    block_k, num_warps = 128 if block_m <= 32 else 64, block_m // 8  # four stages in 64 KiB, no spills
    a, y = (torch.empty((tokens, n), dtype=x.dtype, device=x.device) for n in (inter, hidden_dim))
    launch(
        _shared_gate_up_kernel,
        (cdiv(inter, 16), 1, 1),
        (x, gate_proj, up_proj, gate_weight, a),
        (tokens,),
        (inter, hidden_dim, x.stride(0), gate_proj.stride(0), up_proj.stride(0), block_m, 16, block_k, gate),
        num_warps=num_warps,
        num_stages=4,
    )
    launch(
        _shared_down_kernel,
        (cdiv(hidden_dim, 16), 1, 1),
        (a, down_proj, y),
        (tokens,),
        (hidden_dim, inter, down_proj.stride(0), block_m, 16, block_k),
        num_warps=num_warps,
        num_stages=4,
    )
    return y
