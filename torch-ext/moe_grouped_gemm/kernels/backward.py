"""Gradients of the layer: kernels over rows sorted by expert. Slot s = sorted_slots[r], token t = s // top_k.

    down_dgrad:     b[r] = dout[t] @ down[e],  a[r] = act(gate) * up with gate and up from z[r]
                    dweight[s] = <b[r], a[r]>,  da[r] = weight[s] * b[r]
                    dz[r] = [da * up * act'(gate); da * act(gate)],  weighted_a[r] = weight[s] * a[r]
    gate_up_dgrad:  dx[r] = dz[r] @ gate_up[e]
    wgrad:          dw[e] = sum over the rows r of e of p[r] q[r]^T
    row_sums:       db[e] = sum over the rows r of e of p[r], or of weight[s] * p[t]

so that dgate_up = wgrad(dz, x gathered), ddown = wgrad(dout gathered, weighted_a), their biases have the row_sums of dz
and of weighted dout, and dhidden_states[t] is the sum of dx over the slots of t. <dout, y> = <dout @ down, a> (see
SonicMoE, arXiv 2512.14080): no unweighted output is needed. A bias of down adds <dout, bias> to dweight, outside.

Weights are read as they are, (E, K, N): the sum runs over their rows. Either dimension may be the contiguous one; TMA
reads them in the order of their memory. GATE as in grouped_gemm.py. Grids: of the first two as there; of wgrad a
program for each tile of each expert's gradient, which walks the expert's rows. No atomics: sums have one order.
"""

import torch
import triton
import triton.language as tl

from .grouped_gemm import _activate, _clamp, _descriptor, _gate_and_up, _halves, _locate_tile
from .launch import cdiv, launch


@triton.jit
def _activation_slope(x, GATE: tl.constexpr):
    ACTIVATION: tl.constexpr = GATE[0]
    if ACTIVATION == "silu":
        s = tl.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif ACTIVATION == "gelu_pytorch_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif ACTIVATION == "swigluoai":
        s = tl.sigmoid(GATE[2] * x)
        return s * (1.0 + GATE[2] * x * (1.0 - s))
    else:
        tl.static_assert(ACTIVATION == "relu")
        return tl.where(x <= 0.0, 0.0, 1.0)


@triton.jit
def _glu_backward(da, gate, up, GATE: tl.constexpr):
    """a = act(gate) * up, and the gradients of gate and up."""
    LIMIT: tl.constexpr = GATE[1]
    g, u = _clamp(gate, up, GATE)
    act = _activate(g, GATE)
    dgate = da * u * _activation_slope(g, GATE)
    dup = da * act
    if LIMIT is not None:
        dgate = tl.where(gate > LIMIT, 0.0, dgate)
        dup = tl.where((up > LIMIT) | (up < -LIMIT), 0.0, dup)
    return act * u, dgate, dup


@triton.jit
def _rows_times_weight(
    x_ptrs,  # [BLOCK_M, BLOCK_K], at the first columns
    mask_m,
    w_ptr,  # (E, K, N); with USE_TMA a descriptor of it
    expert,
    tile_n,
    K,
    N,
    stride_we,
    stride_wk,
    stride_wn,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_TMA: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """[BLOCK_M, K] @ [K, BLOCK_N] in fp32."""
    offs_k = tl.arange(0, BLOCK_K)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if not USE_TMA:
        w_ptrs = w_ptr + expert.to(tl.int64) * stride_we + offs_k[:, None].to(tl.int64) * stride_wk
        w_ptrs += offs_n[None, :].to(tl.int64) * stride_wn
    acc = tl.zeros((x_ptrs.shape[0], BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        x_ptrs += BLOCK_K
        if USE_TMA and TRANSPOSED:
            w = w_ptr.load([expert, tile_n * BLOCK_N, k]).reshape(BLOCK_N, BLOCK_K).T
        elif USE_TMA:
            w = w_ptr.load([expert, k, tile_n * BLOCK_N]).reshape(BLOCK_K, BLOCK_N)
        else:
            w = tl.load(w_ptrs, mask=mask_k[:, None] & (offs_n < N)[None, :], other=0.0)
            w_ptrs += BLOCK_K * stride_wk
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
    z_ptr,  # (S, 2I), gate and up in the order of the weight's rows
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
    stride_wn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    USE_TMA: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    GATE: tl.constexpr,
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
        expert,
        tile_n,
        H,
        I,
        stride_we,
        stride_wk,
        stride_wn,
        BLOCK_N,
        BLOCK_K,
        USE_TMA,
        TRANSPOSED,
        INPUT_PRECISION,
    )

    weight = tl.load(top_k_weights_ptr + slots, mask=mask_m, other=0.0).to(tl.float32)[:, None]
    dweight = tl.zeros((BLOCK_M,), tl.float32)
    # A quarter of the columns at a time: all at once would not fit into registers.
    quarters = _quarters(b)
    QUARTER: tl.constexpr = BLOCK_N // 4
    dtype = dz_ptr.dtype.element_ty
    for i in tl.static_range(4):
        offs_n = tile_n * BLOCK_N + i * QUARTER + tl.arange(0, QUARTER)
        mask = mask_m[:, None] & (offs_n < I)[None, :]
        if GATE[3]:
            offs_2n = 2 * (tile_n * BLOCK_N + i * QUARTER) + tl.arange(0, 2 * QUARTER)
            offs_z = offs_m[:, None].to(tl.int64) * (2 * I) + offs_2n[None, :]
            mask_z = mask_m[:, None] & (offs_2n < 2 * I)[None, :]
            gate, up = _gate_and_up(tl.load(z_ptr + offs_z, mask=mask_z, other=0.0).to(tl.float32), GATE)
        else:
            offs_z = offs_m[:, None].to(tl.int64) * (2 * I) + offs_n[None, :]
            gate = tl.load(z_ptr + offs_z, mask=mask, other=0.0).to(tl.float32)
            up = tl.load(z_ptr + offs_z + I, mask=mask, other=0.0).to(tl.float32)
        a, dgate, dup = _glu_backward(weight * quarters[i], gate, up, GATE)
        dweight += tl.sum(tl.where(mask, quarters[i] * a, 0.0), axis=1)
        if GATE[3]:
            tl.store(dz_ptr + offs_z, tl.join(dgate, dup).reshape(BLOCK_M, 2 * QUARTER).to(dtype), mask=mask_z)
        else:
            tl.store(dz_ptr + offs_z, dgate.to(dtype), mask=mask)
            tl.store(dz_ptr + offs_z + I, dup.to(dtype), mask=mask)
        if weighted_a_ptr is not None:
            offs_a = offs_m[:, None].to(tl.int64) * I + offs_n[None, :]
            tl.store(weighted_a_ptr + offs_a, (weight * a).to(dtype), mask=mask)
    tl.store(partials_ptr + tile_n.to(tl.int64) * S + offs_m, dweight, mask=mask_m)


@triton.jit(do_not_specialize=["max_tiles"])
def _gate_up_dgrad_kernel(
    dz_ptr,  # (S, 2I)
    w_ptr,  # (E, 2I, H); with USE_TMA a descriptor of it
    dx_ptr,  # (S, H)
    schedule_ptr,  # (5, max_tiles) int32
    max_tiles,
    K,
    H,
    stride_we,
    stride_wk,
    stride_wn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    USE_TMA: tl.constexpr,
    TRANSPOSED: tl.constexpr,
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
        expert,
        tile_n,
        K,
        H,
        stride_we,
        stride_wk,
        stride_wn,
        BLOCK_N,
        BLOCK_K,
        USE_TMA,
        TRANSPOSED,
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


@triton.jit
def _row_sums_kernel(
    p_ptr,  # (S, N), or with GATHER (T, N)
    sums_ptr,  # (E, N)
    sorted_slots_ptr,  # (S,) int32
    top_k_weights_ptr,  # (S,)
    expert_offsets_ptr,  # (E + 1,) int32
    top_k,
    N,
    stride_p,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GATHER: tl.constexpr,
):
    expert = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.load(expert_offsets_ptr + expert)
    end = tl.load(expert_offsets_ptr + expert + 1)
    acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        mask_r = rows < end
        p_rows = rows
        if GATHER:
            slots = tl.load(sorted_slots_ptr + rows, mask=mask_r, other=0)
            weight = tl.load(top_k_weights_ptr + slots, mask=mask_r, other=0.0).to(tl.float32)
            p_rows = slots // top_k
        p_ptrs = p_ptr + p_rows[:, None].to(tl.int64) * stride_p + offs_n[None, :]
        p = tl.load(p_ptrs, mask=mask_r[:, None] & (offs_n < N)[None, :], other=0.0).to(tl.float32)
        acc += p * weight[:, None] if GATHER else p
    sums_ptrs = sums_ptr + expert.to(tl.int64) * N + offs_n
    tl.store(sums_ptrs, tl.sum(acc, axis=0).to(sums_ptr.dtype.element_ty), mask=offs_n < N)


def _tile(w, config):
    transposed = config.USE_TMA and w.stride(2) != 1
    return config.BLOCK_M, config.BLOCK_N, config.BLOCK_K, config.GROUP_M, config.USE_TMA, transposed


def _weight(w, config):
    return _descriptor(w, config.BLOCK_K, config.BLOCK_N) if config.USE_TMA else w


def down_dgrad(dout, w, z, sorted_slots, top_k_weights, schedule, gate, needs_a, input_precision, config):
    """dout (T, H), w (E, H, I), z (S, 2I) -> dz (S, 2I), weighted_a (S, I) or None, dweights (S,) fp32, sorted.

    Rows of dout, and top_k_weights, are contiguous. Rows that belong to no expert stay unwritten.
    """
    _, hidden_dim, inter = w.shape
    rows, tiles = sorted_slots.numel(), schedule.shape[1]
    n_tiles = cdiv(inter, config.BLOCK_N)
    dz = torch.empty_like(z)
    weighted_a = z.new_empty(rows, inter) if needs_a else None
    partials = torch.empty((n_tiles, rows), dtype=torch.float32, device=z.device)
    top_k = rows // dout.shape[0]
    sizes = (inter, hidden_dim, dout.stride(0), *w.stride())
    constants = (*_tile(w, config), tuple(gate), input_precision)
    alignment = (dout.data_ptr() % 16, w.data_ptr() % 16, top_k_weights.data_ptr() % 16)
    launch(
        _down_dgrad_kernel,
        (tiles * n_tiles, 1, 1),
        (
            dout,
            _weight(w, config),
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
        (z.device, z.dtype, top_k_weights.dtype, needs_a, alignment, top_k, sizes, constants, config[5:7]),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return dz, weighted_a, partials.sum(0)


def gate_up_dgrad(dz, w, schedule, input_precision, config):
    """dz (S, 2I), w (E, 2I, H) -> dx (S, H); rows that belong to no expert stay unwritten."""
    _, K, hidden_dim = w.shape
    tiles = schedule.shape[1]
    dx = dz.new_empty(dz.shape[0], hidden_dim)
    sizes = (K, hidden_dim, *w.stride())
    constants = (*_tile(w, config), input_precision)
    launch(
        _gate_up_dgrad_kernel,
        (tiles * cdiv(hidden_dim, config.BLOCK_N), 1, 1),
        (dz, _weight(w, config), dx, schedule, tiles, *sizes, *constants),
        (dz.device, dz.dtype, w.data_ptr() % 16, sizes, constants, config[5:7]),
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


def row_sums(p, sorted_slots, expert_offsets, top_k_weights=None):
    """sums (E, N) in p.dtype of p (S, N), rows contiguous; zeros for an expert without rows.

    Given contiguous top_k_weights (T, top_k), p is (T, N), gathered by the slots' tokens, times their weights.
    """
    experts, N = expert_offsets.numel() - 1, p.shape[1]
    gather = top_k_weights is not None
    top_k = top_k_weights.shape[1] if gather else 1
    weights = top_k_weights if gather else expert_offsets  # or any other, which is not read
    sums = torch.empty((experts, N), dtype=p.dtype, device=p.device)
    sizes, constants = (top_k, N, p.stride(0)), (32, 64, gather)
    launch(
        _row_sums_kernel,
        (experts, cdiv(N, 64), 1),
        (p, sums, sorted_slots, weights, expert_offsets, *sizes, *constants),
        (p.device, p.dtype, weights.dtype, p.data_ptr() % 16, weights.data_ptr() % 16, sizes, constants),
        num_warps=4,
    )
    return sums
