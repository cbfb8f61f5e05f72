"""Gradients of the layer: three kernels over rows sorted by expert. Slot s = sorted_slots[r], token t = s // top_k.

    down_dgrad:     b[r] = dout[t] @ down[e],  a[r] = act(gate) * up with [gate; up] = z[r]
                    dweight[s] = <b[r], a[r]>,  da[r] = weight[s] * b[r]
                    dz[r] = [da * up * act'(gate); da * act(gate)],  weighted_a[r] = weight[s] * a[r]
    gate_up_dgrad:  dx[r] = dz[r] @ gate_up[e]
    wgrad:          dw[e] = sum over the rows r of e of p[r] q[r]^T

so that dgate_up = wgrad(dz, x gathered), ddown = wgrad(dout gathered, weighted_a), and dhidden_states[t] is the sum of
dx over the slots of t. <dout, y> = <dout @ down, a> (SonicMoE, arXiv 2512.14080) is why no unweighted output is needed.

Weights are read as they are, (E, K, N): the sum runs over their rows. In fp8 (see fp8.py) they are dequantised in
registers, to the dtype of the gradients. Grids: of the first two as in grouped_gemm.py; of
wgrad a program for each tile of each expert's gradient, which walks the expert's rows. No atomics: sums have one order.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .fp8 import _BLOCK, _from_codes, _load_scale, _scale_row
from .grouped_gemm import _activate, _halves, _locate_tile
from .launch import cdiv, launch


@triton.jit
def _activation_slope(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        s = tl.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif ACTIVATION == "gelu_pytorch_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        tl.static_assert(ACTIVATION == "relu")
        return tl.where(x <= 0.0, 0.0, 1.0)


@triton.jit
def _rows_times_weight(
    x_ptrs,  # [BLOCK_M, BLOCK_K], at the first columns
    mask_m,
    w_ptr,  # (E, K, N); with USE_TMA a descriptor of it
    w_scale_ptr,  # (E, scale_rows, ceil(N / 128)) if the weight is fp8, else None
    expert,
    tile_n,
    K,
    N,
    half,
    scale_shift,
    scale_rows,
    stride_we,
    stride_wk,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_TMA: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """[BLOCK_M, K] @ [K, BLOCK_N] in fp32."""
    offs_k = tl.arange(0, BLOCK_K)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if not USE_TMA:
        w_ptrs = w_ptr + expert.to(tl.int64) * stride_we + offs_k[:, None].to(tl.int64) * stride_wk + offs_n[None, :]
    if w_scale_ptr is not None:
        n_blocks = tl.cdiv(N, _BLOCK)
        w_scale_ptr += expert.to(tl.int64) * scale_rows * n_blocks + tile_n * BLOCK_N // _BLOCK
    acc = tl.zeros((x_ptrs.shape[0], BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        x_ptrs += BLOCK_K
        if USE_TMA:
            w = w_ptr.load([expert, k, tile_n * BLOCK_N]).reshape(BLOCK_K, BLOCK_N)
        else:
            w = tl.load(w_ptrs, mask=mask_k[:, None] & (offs_n < N)[None, :], other=0.0)
            w_ptrs += BLOCK_K * stride_wk
        if w_scale_ptr is not None:
            scale = _load_scale(w_scale_ptr + _scale_row(k + offs_k, half, scale_shift, scale_rows) * n_blocks)
            w = (_from_codes(w, tl.float32) * scale[:, None]).to(x.dtype)
        acc = tl.dot(x, w, acc, input_precision=INPUT_PRECISION)
    return acc


@triton.jit
def _quarters(x):
    """The four quarters of the columns of x."""
    left, right = _halves(x)
    first, second = _halves(left)
    third, fourth = _halves(right)
    return first, second, third, fourth


@triton.jit(do_not_specialize=["max_tiles", "S"])
def _down_dgrad_kernel(
    dout_ptr,  # (T, H)
    w_ptr,  # (E, H, I); with USE_TMA a descriptor of it
    w_scale_ptr,  # (E, ceil(H / 128), ceil(I / 128)) if the weight is fp8, else None
    z_ptr,  # (S, 2I), rows [gate; up]
    sorted_slots_ptr,  # (S,) int32
    top_k_weights_ptr,  # (S,)
    dz_ptr,  # (S, 2I)
    weighted_a_ptr,  # (S, I), or None
    partials_ptr,  # (tiles of I, S) fp32: <b, a> over the columns of each tile
    schedule_ptr,  # (5, max_tiles) int32
    max_tiles,
    top_k,
    S,
    I,
    H,
    stride_dt,
    stride_we,
    stride_wk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    USE_TMA: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    expert, _, row, row_end, tile_n = _locate_tile(schedule_ptr, max_tiles, tl.cdiv(I, BLOCK_N), BLOCK_M, GROUP_M)
    if expert < 0:
        return
    offs_m = row + tl.arange(0, BLOCK_M)
    mask_m = offs_m < row_end
    slots = tl.load(sorted_slots_ptr + offs_m, mask=mask_m, other=0)
    x_ptrs = dout_ptr + (slots // top_k)[:, None].to(tl.int64) * stride_dt + tl.arange(0, BLOCK_K)[None, :]
    b = _rows_times_weight(
        x_ptrs,
        mask_m,
        w_ptr,
        w_scale_ptr,
        expert,
        tile_n,
        H,
        I,
        H,
        0,
        tl.cdiv(H, _BLOCK),
        stride_we,
        stride_wk,
        BLOCK_N,
        BLOCK_K,
        USE_TMA,
        INPUT_PRECISION,
    )

    weight = tl.load(top_k_weights_ptr + slots, mask=mask_m, other=0.0).to(tl.float32)[:, None]
    dweight = tl.zeros((BLOCK_M,), tl.float32)
    # A quarter of the columns at a time: all at once would not fit into registers.
    quarters = _quarters(b)
    for i in tl.static_range(4):
        offs_n = tile_n * BLOCK_N + i * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
        mask = mask_m[:, None] & (offs_n < I)[None, :]
        offs_z = offs_m[:, None].to(tl.int64) * (2 * I) + offs_n[None, :]
        gate = tl.load(z_ptr + offs_z, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(z_ptr + offs_z + I, mask=mask, other=0.0).to(tl.float32)
        act = _activate(gate, ACTIVATION)
        a = act * up
        dweight += tl.sum(tl.where(mask, quarters[i] * a, 0.0), axis=1)
        da = weight * quarters[i]
        dtype = dz_ptr.dtype.element_ty
        tl.store(dz_ptr + offs_z, (da * up * _activation_slope(gate, ACTIVATION)).to(dtype), mask=mask)
        tl.store(dz_ptr + offs_z + I, (da * act).to(dtype), mask=mask)
        if weighted_a_ptr is not None:
            offs_a = offs_m[:, None].to(tl.int64) * I + offs_n[None, :]
            tl.store(weighted_a_ptr + offs_a, (weight * a).to(dtype), mask=mask)
    tl.store(partials_ptr + tile_n.to(tl.int64) * S + offs_m, dweight, mask=mask_m)


@triton.jit(do_not_specialize=["max_tiles"])
def _gate_up_dgrad_kernel(
    dz_ptr,  # (S, 2I)
    w_ptr,  # (E, 2I, H); with USE_TMA a descriptor of it
    w_scale_ptr,  # (E, scale_rows, ceil(H / 128)) if the weight is fp8, else None
    dx_ptr,  # (S, H)
    schedule_ptr,  # (5, max_tiles) int32
    max_tiles,
    K,
    H,
    scale_shift,
    scale_rows,
    stride_we,
    stride_wk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    USE_TMA: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    expert, _, row, row_end, tile_n = _locate_tile(schedule_ptr, max_tiles, tl.cdiv(H, BLOCK_N), BLOCK_M, GROUP_M)
    if expert < 0:
        return
    offs_m = row + tl.arange(0, BLOCK_M)
    mask_m = offs_m < row_end
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptrs = dz_ptr + offs_m[:, None].to(tl.int64) * K + tl.arange(0, BLOCK_K)[None, :]
    dx = _rows_times_weight(
        x_ptrs,
        mask_m,
        w_ptr,
        w_scale_ptr,
        expert,
        tile_n,
        K,
        H,
        K // 2,
        scale_shift,
        scale_rows,
        stride_we,
        stride_wk,
        BLOCK_N,
        BLOCK_K,
        USE_TMA,
        INPUT_PRECISION,
    )
    dx_ptrs = dx_ptr + offs_m[:, None].to(tl.int64) * H + offs_n[None, :]
    tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_n < H)[None, :])


@triton.jit
def _wgrad_kernel(
    p_ptr,  # (S, M), or with GATHER_P (T, M)
    q_ptr,  # (S, N), or with GATHER_Q (T, N)
    dw_ptr,  # (E, M, N)
    sorted_slots_ptr,  # (S,) int32
    expert_offsets_ptr,  # (E + 1,) int32
    top_k,
    M,
    N,
    stride_p,
    stride_q,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATHER_P: tl.constexpr,
    GATHER_Q: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    n_tiles = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(M, BLOCK_M) * n_tiles
    pid = tl.program_id(0)
    expert = pid // tiles
    offs_m = pid % tiles // n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.load(expert_offsets_ptr + expert)
    end = tl.load(expert_offsets_ptr + expert + 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        mask_k = rows < end  # on both: a row of another expert may hold anything
        p_rows = rows
        q_rows = rows
        if GATHER_P or GATHER_Q:
            tokens = tl.load(sorted_slots_ptr + rows, mask=mask_k, other=0) // top_k
            p_rows = tokens if GATHER_P else rows
            q_rows = tokens if GATHER_Q else rows
        p_ptrs = p_ptr + p_rows[:, None].to(tl.int64) * stride_p + offs_m[None, :]
        q_ptrs = q_ptr + q_rows[:, None].to(tl.int64) * stride_q + offs_n[None, :]
        p = tl.load(p_ptrs, mask=mask_k[:, None] & (offs_m < M)[None, :], other=0.0)
        q = tl.load(q_ptrs, mask=mask_k[:, None] & (offs_n < N)[None, :], other=0.0)
        acc = tl.dot(p.T, q, acc, input_precision=INPUT_PRECISION)  # [BM, BK] @ [BK, BN]
    dw_ptrs = dw_ptr + (expert.to(tl.int64) * M + offs_m[:, None]) * N + offs_n[None, :]
    tl.store(dw_ptrs, acc.to(dw_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


def _tile(config):
    return config.BLOCK_M, config.BLOCK_N, config.BLOCK_K, config.GROUP_M, config.USE_TMA


def _weight(w, config):
    return TensorDescriptor(w, w.shape, w.stride(), [1, config.BLOCK_K, config.BLOCK_N]) if config.USE_TMA else w


def _types(x, *others):
    """The device; dtypes; and of the scales, which may be anywhere, whether they are aligned."""
    return (x.device, x.dtype, *(t if t is None else (t.dtype, t.data_ptr() % 16) for t in others))


def down_dgrad(
    dout, w, z, sorted_slots, top_k_weights, schedule, activation, needs_a, input_precision, config, w_scale=None
):
    """dout (T, H), w (E, H, I), z (S, 2I) -> dz (S, 2I), weighted_a (S, I) or None, dweights (S,) fp32, sorted.

    Rows of dout and of w, and top_k_weights, are contiguous, and so is w_scale, that of an fp8 w. Rows that belong to
    no expert stay unwritten.
    """
    _, hidden_dim, inter = w.shape
    rows, tiles = sorted_slots.numel(), schedule.shape[1]
    n_tiles = cdiv(inter, config.BLOCK_N)
    dz = torch.empty_like(z)
    weighted_a = z.new_empty(rows, inter) if needs_a else None
    partials = torch.empty((n_tiles, rows), dtype=torch.float32, device=z.device)
    top_k = rows // dout.shape[0]
    sizes = (inter, hidden_dim, dout.stride(0), w.stride(0), w.stride(1))
    constants = (*_tile(config), activation, input_precision)
    alignment = (dout.data_ptr() % 16, w.data_ptr() % 16, top_k_weights.data_ptr() % 16)
    launch(
        _down_dgrad_kernel,
        (tiles * n_tiles, 1, 1),
        (
            dout,
            _weight(w, config),
            w_scale,
            z,
            sorted_slots,
            top_k_weights,
            dz,
            weighted_a,
            partials,
            schedule,
            tiles,
            top_k,
            rows,
        )
        + (*sizes, *constants),
        (_types(z, w, w_scale, top_k_weights), needs_a, alignment, top_k, sizes, constants, config[5:7]),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return dz, weighted_a, partials.sum(0)


def gate_up_dgrad(dz, w, schedule, input_precision, config, w_scale=None, shift=0):
    """dz (S, 2I), w (E, 2I, H) with contiguous rows -> dx (S, H); rows that belong to no expert stay unwritten.

    w_scale, contiguous, and shift are those of `grouped_gemm_fp8`.
    """
    _, K, hidden_dim = w.shape
    tiles = schedule.shape[1]
    dx = dz.new_empty(dz.shape[0], hidden_dim)
    sizes = (K, hidden_dim, shift, 1 if w_scale is None else w_scale.shape[1], w.stride(0), w.stride(1))
    constants = (*_tile(config), input_precision)
    launch(
        _gate_up_dgrad_kernel,
        (tiles * cdiv(hidden_dim, config.BLOCK_N), 1, 1),
        (dz, _weight(w, config), w_scale, dx, schedule, tiles, *sizes, *constants),
        (_types(dz, w, w_scale), w.data_ptr() % 16, sizes, constants, config[5:7]),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return dx


def wgrad(p, q, sorted_slots, expert_offsets, gather, input_precision, config, dtype=None):
    """dw (E, M, N) from p (S, M) and q (S, N), in `dtype`, p's own if None; zeros for an expert without rows.

    gather: "p" or "q": that one is (T, ...) and its rows are those of the slots' tokens; "" for neither.
    """
    experts = expert_offsets.numel() - 1
    M, N = p.shape[1], q.shape[1]
    dw = torch.empty((experts, M, N), dtype=dtype or p.dtype, device=p.device)
    gathered = {"p": p, "q": q}.get(gather)
    top_k = 1 if gathered is None else max(1, sorted_slots.numel() // max(1, gathered.shape[0]))
    sizes = (top_k, M, N, p.stride(0), q.stride(0))
    constants = (config.BLOCK_M, config.BLOCK_N, config.BLOCK_K, gather == "p", gather == "q", input_precision)
    launch(
        _wgrad_kernel,
        (experts * cdiv(M, config.BLOCK_M) * cdiv(N, config.BLOCK_N), 1, 1),
        (p, q, dw, sorted_slots, expert_offsets, *sizes, *constants),
        (p.device, p.dtype, dw.dtype, p.data_ptr() % 16, q.data_ptr() % 16, sizes, constants, config[5:7]),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return dw
