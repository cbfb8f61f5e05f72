"""The layer in two launches, for so few tokens that hardly two of them share an expert: no sort, no tensor cores.

    gate_up_decode:  a[s] = act(gate[e] @ x[t]) * (up[e] @ x[t])             s = t * top_k + k, e = top_k_index[s]
    down_decode:     out[t] = sum_k weight[s] * (down[e] @ a[s])

with biases added to each product. GATE as in gate.py. And of shared experts, if there are any:

    gate_up_decode:  shared_a[t] = act(gate @ x[t]) * (up @ x[t]) * sigmoid(gate_weight @ x[t])
    down_decode:     out[t] += down @ shared_a[t]

shared_a[t] lies behind a of the token's slots. Every weight element is read once for each slot, or token, and used
once, so both run at the speed of memory. Grids: (S, tiles of I) and (T, tiles of H). With shared experts the first is
(T * (top_k + shared_rows), tiles of I), where shared_rows times the tiles of I are enough for those of Is.
"""

import torch
import triton
import triton.language as tl

from .gate import _glu
from .launch import cdiv, launch

# Tiles of weights have three dimensions: BLOCK_N rows, BLOCK_K // VECTOR pieces of them, and VECTOR elements, which a
# thread loads at once. The threads of a warp are to go along the pieces, and between two dimensions that look alike
# they go along the first one, from Triton 3.7 on along the second.
_PIECES = tl.constexpr(0 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) else 1)


@triton.jit
def _of_rows(x):
    return x[None, :, None] if _PIECES == 0 else x[:, None, None]


@triton.jit
def _of_pieces(x):
    return x[:, None, None] if _PIECES == 0 else x[None, :, None]


@triton.jit
def _zeros(BLOCK_N: tl.constexpr, PIECES: tl.constexpr):
    return tl.zeros((PIECES, BLOCK_N) if _PIECES == 0 else (BLOCK_N, PIECES), tl.float32)


@triton.jit
def _gate_and_up_sums(
    x_ptr,  # (H,) of a token
    gate_ptrs,  # of rows
    up_ptrs,
    gate_weight_ptr,  # (H,), or None
    mask_n,  # of rows
    H,
    stride_wk,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """[BLOCK_N] gate and up of a token in fp32, and gate_weight @ x, if there is one."""
    UNROLL: tl.constexpr = 4 if VECTOR > 1 else 1
    PIECES: tl.constexpr = BLOCK_K // VECTOR
    offs_k = _of_pieces(tl.arange(0, PIECES)) * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    gate, up, logit = _zeros(BLOCK_N, PIECES), _zeros(BLOCK_N, PIECES), _zeros(1, PIECES)
    for k in tl.range(0, H, BLOCK_K, loop_unroll_factor=UNROLL):
        mask_k = offs_k < H - k
        # Not pointers that advance: fewer loads would be on their way.
        w_gate = tl.load(gate_ptrs + (offs_k + k) * stride_wk, mask=mask_n & mask_k, other=0.0)
        w_up = tl.load(up_ptrs + (offs_k + k) * stride_wk, mask=mask_n & mask_k, other=0.0)
        x = tl.load(x_ptr + offs_k + k, mask=mask_k, other=0.0).to(tl.float32)
        gate += tl.sum(w_gate.to(tl.float32) * x, axis=2)
        up += tl.sum(w_up.to(tl.float32) * x, axis=2)
        if gate_weight_ptr is not None:
            logit += tl.sum(tl.load(gate_weight_ptr + offs_k + k, mask=mask_k, other=0.0).to(tl.float32) * x, axis=2)
    return tl.sum(gate, axis=_PIECES), tl.sum(up, axis=_PIECES), tl.sum(tl.sum(logit, axis=_PIECES), axis=0)


@triton.jit
def _shared_gate_up(
    x_ptr,  # (H,) of a token
    gate_ptr,  # (Is, H)
    up_ptr,  # (Is, H)
    gate_weight_ptr,  # (H,), or None
    a_ptr,  # (Is,) of the token
    tile,
    Is,
    H,
    stride_gn,
    stride_un,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr,
    GATE: tl.constexpr,
):
    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = _of_rows(offs_n).to(tl.int64)
    gate, up, logit = _gate_and_up_sums(
        *(x_ptr, gate_ptr + rows * stride_gn, up_ptr + rows * stride_un, gate_weight_ptr, rows < Is),
        *(H, 1, BLOCK_N, BLOCK_K, VECTOR),
    )
    a = _glu(gate, up, GATE)
    if gate_weight_ptr is not None:
        a *= tl.sigmoid(logit)
    tl.store(a_ptr + offs_n, a.to(a_ptr.dtype.element_ty), mask=offs_n < Is)


@triton.jit
def _gate_up_decode_kernel(
    x_ptr,  # (T, H)
    w_ptr,  # (E, 2I, H)
    bias_ptr,  # (E, 2I), or None
    shared_gate_ptr,  # (Is, H), or None
    shared_up_ptr,  # (Is, H), or None
    gate_weight_ptr,  # (H,), or None
    a_ptr,  # (T, top_k * I + Is)
    top_k_index_ptr,  # (S,) int32 | int64
    top_k,
    E,
    I,
    H,
    stride_xt,
    stride_we,
    stride_wn,
    stride_wk,
    Is,
    shared_rows,
    stride_gn,
    stride_un,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    GATE: tl.constexpr,
):
    slot = tl.program_id(0)
    if shared_gate_ptr is not None:
        token = slot // (top_k + shared_rows)
        k = slot % (top_k + shared_rows)
        slot = token * top_k + k
        x_ptr += token.to(tl.int64) * stride_xt
        a_ptr += token.to(tl.int64) * Is
        if k >= top_k:
            a_ptr += (token + 1).to(tl.int64) * top_k * I
            tile = (k - top_k) * tl.num_programs(1) + tl.program_id(1)
            _shared_gate_up(
                *(x_ptr, shared_gate_ptr, shared_up_ptr, gate_weight_ptr, a_ptr),
                *(tile, Is, H, stride_gn, stride_un, BLOCK_N, BLOCK_K, VECTOR, GATE),
            )
            return
    expert = tl.load(top_k_index_ptr + slot).to(tl.int64)
    if (expert < 0) | (expert >= E):
        return
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if shared_gate_ptr is None:
        x_ptr += (slot // top_k).to(tl.int64) * stride_xt
    gate_rows = 2 * offs_n if GATE.interleaved else offs_n
    if WIDE:
        stride_wk = tl.cast(stride_wk, tl.int64)
    up_offset = 1 if GATE.interleaved else I
    gate_ptrs = w_ptr + expert * stride_we + _of_rows(gate_rows).to(tl.int64) * stride_wn
    up_ptrs = gate_ptrs + tl.cast(up_offset, tl.int64) * stride_wn
    gate, up, _ = _gate_and_up_sums(
        *(x_ptr, gate_ptrs, up_ptrs, None, _of_rows(offs_n < I)),
        *(H, stride_wk, BLOCK_N, BLOCK_K, VECTOR),
    )
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + expert * (2 * I) + gate_rows
        gate += tl.load(bias_ptrs, mask=offs_n < I, other=0.0).to(tl.float32)
        up += tl.load(bias_ptrs + up_offset, mask=offs_n < I, other=0.0).to(tl.float32)
    a = _glu(gate, up, GATE)
    tl.store(a_ptr + slot.to(tl.int64) * I + offs_n, a.to(a_ptr.dtype.element_ty), mask=offs_n < I)


@triton.jit
def _chosen(top_k_index_ptr, top_k_weights_ptr, slot, top_k, E):
    """The expert of a token's slot, whether there is one, and its weight."""
    expert = tl.load(top_k_index_ptr + slot, mask=slot < top_k, other=-1).to(tl.int64)
    is_ours = (expert >= 0) & (expert < E)
    # That of a skipped slot may be anything, NaN included.
    return expert, is_ours, tl.load(top_k_weights_ptr + slot, mask=is_ours, other=0.0).to(tl.float32)


@triton.jit
def _add_columns(acc, a_ptr, w_ptrs, stride_wk, weight, offs_k, mask_k, mask_n):
    """acc + weight * (w @ a) of these columns, not yet summed over pieces."""
    a = tl.load(a_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32) * weight
    w = tl.load(w_ptrs + offs_k * stride_wk, mask=mask_n & mask_k, other=0.0)
    return acc + tl.sum(w.to(tl.float32) * a, axis=2)


@triton.jit
def _down_decode_kernel(
    a_ptr,  # (T, top_k * I + Is)
    w_ptr,  # (E, H, I)
    bias_ptr,  # (E, H), or None
    shared_ptr,  # (H, Is), or None
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
    Is,
    stride_sn,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
):
    PIECES: tl.constexpr = BLOCK_K // VECTOR
    token = tl.program_id(0).to(tl.int64)
    top_k_index_ptr += token * top_k
    top_k_weights_ptr += token * top_k
    a_ptr += token * top_k * I
    if shared_ptr is not None:
        a_ptr += token * Is
    if WIDE:
        stride_wk = tl.cast(stride_wk, tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = _of_rows(offs_n < H)
    rows = _of_rows(offs_n).to(tl.int64)
    piece = _of_pieces(tl.arange(0, PIECES))
    offs_v = tl.arange(0, VECTOR)[None, None, :]
    w_ptrs = w_ptr + rows * stride_wn
    acc = _zeros(BLOCK_N, PIECES)
    # A skipped slot has no row in `a`.
    if VECTOR == 1:
        for slot in tl.range(0, top_k, loop_unroll_factor=2):
            expert, is_ours, weight = _chosen(top_k_index_ptr, top_k_weights_ptr, slot, top_k, E)
            for first in range(0, I, PIECES):
                offs_k, of_slot = first + piece, w_ptrs + expert * stride_we
                mask_k = is_ours & (offs_k < I)
                acc = _add_columns(acc, a_ptr + slot * I, of_slot, stride_wk, weight, offs_k, mask_k, mask_n)
    else:
        # One sum over the columns of all slots, so that no step is half empty.
        pieces = tl.cdiv(I, VECTOR)
        for first in tl.range(0, top_k * pieces, PIECES, loop_unroll_factor=2):
            slot = (first + piece) // pieces
            expert, is_ours, weight = _chosen(top_k_index_ptr, top_k_weights_ptr, slot, top_k, E)
            offs_k = (first + piece - slot * pieces) * VECTOR + offs_v
            of_slot, mask_k = w_ptrs + expert * stride_we, is_ours & (offs_k < I)
            acc = _add_columns(acc, a_ptr + slot * I, of_slot, stride_wk, weight, offs_k, mask_k, mask_n)
    if shared_ptr is not None:
        a_ptr += top_k * I
        for first in tl.range(0, Is, BLOCK_K, loop_unroll_factor=2):
            offs_k = first + piece * VECTOR + offs_v
            acc = _add_columns(acc, a_ptr, shared_ptr + rows * stride_sn, 1, 1.0, offs_k, offs_k < Is, mask_n)
    out = tl.sum(acc, axis=_PIECES)
    if bias_ptr is not None:
        for slot in range(top_k):
            expert, is_ours, weight = _chosen(top_k_index_ptr, top_k_weights_ptr, slot, top_k, E)
            bias = tl.load(bias_ptr + expert * H + offs_n, mask=(offs_n < H) & is_ours, other=0.0)
            out += bias.to(tl.float32) * weight
    tl.store(out_ptr + token * H + offs_n, out.to(out_ptr.dtype.element_ty), mask=offs_n < H)


def _is_wide(w):
    """Whether a column's offset needs 64 bits, as with experts stored (K, E, N).

    Else it must not have them: with 64-bit offsets fewer loads are on their way, and a token takes up to 1.47 times as
    long (H100, qwen3-30b).
    """
    return w.shape[2] * w.stride(2) >= 2**31


def _vector(*weights):
    """Elements of a row that a thread loads at once, 16 bytes; 1 where Triton cannot know that it may."""
    for w in weights:
        if w is not None and (
            w.stride(-1) != 1 or w.data_ptr() % 16 or any(n % 16 for n in (*w.shape[-1:], *w.stride()[:-1]))
        ):
            return 1
    return 16 // weights[0].element_size()


def gate_up_decode(x, w, top_k_index, gate, config, bias=None, shared=None):
    """x (T, H), w (E, 2I, H), contiguous top_k_index (T, top_k) and bias (E, 2I) -> (T, top_k * I + Is).

    Rows of skipped slots stay unwritten. shared: as SharedExperts of reference/; None, and Is is 0.
    """
    experts, inter, hidden_dim = w.shape[0], w.shape[1] // 2, w.shape[2]
    (tokens, top_k), tiles = top_k_index.shape, cdiv(inter, config.BLOCK_N)
    rows, columns = top_k, top_k * inter
    gate_proj, up_proj, _, gate_weight = of_shared = (None,) * 4
    if shared is not None:
        gate_proj, up_proj, _, gate_weight = shared
        shared_rows = cdiv(gate_proj.shape[0], tiles * config.BLOCK_N)
        rows, columns = rows + shared_rows, columns + gate_proj.shape[0]
        of_shared = (gate_proj.shape[0], shared_rows, gate_proj.stride(0), up_proj.stride(0))
    a = torch.empty((tokens, columns), dtype=x.dtype, device=x.device)
    sizes = (top_k, experts, inter, hidden_dim, x.stride(0), *w.stride(), *of_shared)
    launch(
        _gate_up_decode_kernel,
        (tokens * rows, tiles, 1),
        (x, w, bias, gate_proj, up_proj, gate_weight, a, top_k_index),
        (),
        (*sizes, config.BLOCK_N, config.BLOCK_K, _vector(w, gate_proj, up_proj), _is_wide(w), gate),
        num_warps=config.num_warps,
    )
    return a


def down_decode(a, w, top_k_index, top_k_weights, config, bias=None, shared=None):
    """a of gate_up_decode, w (E, H, I), contiguous top_k_index and top_k_weights (T, top_k), bias (E, H) -> (T, H)."""
    experts, hidden_dim, inter = w.shape
    tokens, top_k = top_k_index.shape
    out = torch.empty((tokens, hidden_dim), dtype=a.dtype, device=a.device)
    shared_w, of_shared = None, (None, None)
    if shared is not None:
        shared_w = shared[2]
        of_shared = (shared_w.shape[1], shared_w.stride(0))
    sizes = (top_k, experts, inter, hidden_dim, *w.stride(), *of_shared)
    launch(
        _down_decode_kernel,
        (tokens, cdiv(hidden_dim, config.BLOCK_N), 1),
        (a, w, bias, shared_w, top_k_index, top_k_weights, out),
        (),
        (*sizes, config.BLOCK_N, config.BLOCK_K, _vector(w, shared_w), _is_wide(w)),
        num_warps=config.num_warps,
    )
    return out
