"""Routers: logits, then the choice of experts and their weights.

    logits = x W^T + bias        score = sigmoid(logit), or another        choice = score or logit, + correction bias
    group score = its greatest choice, or the sum of two     weight = score (/ sum of the chosen) * scaling factor

The top_k greatest choices inside the topk_group groups of greatest score win; of equals, the lower index. Grids:
(tiles of T times tiles of E, splits of H), and (T,) with one warp a token.
"""

import torch
import triton
import triton.language as tl

from .launch import cdiv, launch, next_power_of_2

BELOW_ALL = tl.constexpr(-(2**31))  # below the key of every float
MAX_SPLITS = 16
PROGRAMS = 128  # about one for each SM of a large GPU
DTYPES = {None: tl.float32, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit(do_not_specialize=["T", "steps"])
def _router_logits_kernel(
    x_ptr,  # (T, H)
    w_ptr,  # (E, H)
    partials_ptr,  # (splits, T, E) fp32
    T,
    steps,  # of BLOCK_K, for each split
    E,
    H,
    stride_xt,
    stride_we,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_e = tl.cdiv(E, BLOCK_E)
    # int64: T * H and splits * T * E may exceed 2**31.
    offs_t = (tl.program_id(0) // tiles_e).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_e = (tl.program_id(0) % tiles_e) * BLOCK_E + tl.arange(0, BLOCK_E)
    split = tl.program_id(1)
    offs_k = tl.arange(0, BLOCK_K)
    mask_t, mask_e = offs_t < T, offs_e < E
    x_ptrs = x_ptr + offs_t[:, None] * stride_xt + offs_k[None, :]
    w_ptrs = w_ptr + offs_e[:, None].to(tl.int64) * stride_we + offs_k[None, :]

    acc = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for step in range(split * steps, (split + 1) * steps):
        k = step * BLOCK_K
        mask_k = offs_k < H - k
        x = tl.load(x_ptrs + k, mask=mask_t[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs + k, mask=mask_e[:, None] & mask_k[None, :], other=0.0)
        if x.dtype != w.dtype:
            x, w = x.to(tl.float32), w.to(tl.float32)
        # Tensor cores truncate as they accumulate, so each block's sum starts at zero and is added in true fp32. The
        # last argument means nothing to these dtypes, but keeps the compiler from accumulating in the dot after all.
        acc += tl.dot(x, w.T, input_precision="ieee", max_num_imprecise_acc=BLOCK_K)  # [BT, BK] @ [BK, BE]

    partials_ptrs = partials_ptr + (split.to(tl.int64) * T + offs_t[:, None]) * E + offs_e[None, :]
    tl.store(partials_ptrs, acc, mask=mask_t[:, None] & mask_e[None, :])


def router_logits(x, weight, config):
    """x (T, H), weight (E, H), last strides 1 -> (splits, T, E) fp32: the logits, if summed over the splits."""
    T, H = x.shape
    E = weight.shape[0]
    block_t, block_e, block_k, num_warps, num_stages = config
    block_e = min(block_e, max(16, next_power_of_2(E)))
    tiles = cdiv(T, block_t) * cdiv(E, block_e)
    steps = cdiv(H, block_k)
    splits = 1
    # A power of two: the second kernel is compiled for each number of splits.
    while splits < MAX_SPLITS and 2 * splits * tiles <= PROGRAMS and 4 * splits <= steps:
        splits *= 2
    partials = torch.empty((splits, T, E), dtype=torch.float32, device=x.device)
    launch(
        _router_logits_kernel,
        (tiles, splits, 1),
        (x, weight, partials),
        (T, cdiv(steps, splits)),
        (E, H, x.stride(0), weight.stride(0), block_t, block_e, block_k),
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return partials


@triton.jit
def _logits(partials_ptr, split_stride, bias_ptr, offs, mask, SPLITS: tl.constexpr, PRODUCT: tl.constexpr):
    logits = tl.load(partials_ptr + offs, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        logits += tl.load(partials_ptr + split * split_stride + offs, mask=mask, other=0.0)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return logits.to(PRODUCT).to(tl.float32)


@triton.jit
def _softplus(x):
    u = tl.exp(-tl.abs(x))
    # log(1 + u), exact where 1 + u is rounded: the error of 1 + u cancels in the quotient (Kahan).
    w = 1.0 + u
    log1p = tl.where(w == 1.0, u, tl.log(w) * (u / (w - 1.0)))
    return tl.where(x > 0.0, x, 0.0) + log1p


@triton.jit
def _scores(logits, top, total, SCORING: tl.constexpr, SCORES: tl.constexpr):
    """top, total: of a softmax over all experts, the greatest logit and the sum of exp(logit - top)."""
    if SCORING == "sigmoid":
        scores = tl.sigmoid(logits)
    elif SCORING == "softmax":
        scores = tl.exp(logits - top) / total
    elif SCORING == "sqrtsoftplus":
        scores = tl.sqrt(_softplus(logits).to(SCORES).to(tl.float32))
    else:
        tl.static_assert(SCORING == "softmax_of_chosen")
        scores = logits
    return scores.to(SCORES).to(tl.float32)


@triton.jit
def _key(x):
    """An int32 that orders as the float does, NaN above all, as in torch.topk. Not for -0.0."""
    bits = tl.where(x == x, x.to(tl.int32, bitcast=True), 0x7FC00000)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _first_max(keys, offs, axis: tl.constexpr):
    """The greatest key along the axis, and the least offset of those that have it."""
    best = tl.max(keys, axis=axis)
    is_best = keys == (best if axis is None else tl.expand_dims(best, axis))
    return best, tl.min(tl.where(is_best, offs, 0x7FFFFFFF), axis=axis)


@triton.jit(do_not_specialize=["T"])
def _router_topk_kernel(
    partials_ptr,  # (SPLITS, T, E) fp32
    bias_ptr,  # (E,), of the logits; or None
    correction_ptr,  # (E,), of the choice; or None
    logits_ptr,  # (T, E); None, if the partials are the logits
    weights_ptr,  # (T, TOP_K)
    indices_ptr,  # (T, TOP_K) int64
    T,
    scaling_factor,
    norm_eps,
    norm_min,
    group_size,
    topk_group,
    TOP_K: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_SCORE: tl.constexpr,
    SCORING: tl.constexpr,
    CHOOSE_BY: tl.constexpr,
    NORM: tl.constexpr,
    PRODUCT: tl.constexpr,  # the dtype that logits are rounded to
    SCORES: tl.constexpr,  # the dtype that scores are rounded to
    SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr,  # of one group
    BLOCK_TOP_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    E = GROUPS * group_size
    split_stride = T.to(tl.int64) * E
    partials_ptr += token * E
    offs_g = tl.arange(0, BLOCK_G)
    offs_e = tl.arange(0, BLOCK_E)[None, :]
    experts = offs_g[:, None] * group_size + offs_e
    mask = (offs_g < GROUPS)[:, None] & (offs_e < group_size)

    logits = _logits(partials_ptr, split_stride, bias_ptr, experts, mask, SPLITS, PRODUCT)
    if logits_ptr is not None:
        tl.store(logits_ptr + token * E + experts, logits.to(logits_ptr.dtype.element_ty), mask=mask)
    top, total = 0.0, 1.0
    if SCORING == "softmax":
        top = tl.max(tl.where(mask, logits, float("-inf")), axis=None)
        total = tl.sum(tl.where(mask, tl.exp(logits - top), 0.0), axis=None)
    choice = logits if CHOOSE_BY == "logits" else _scores(logits, top, total, SCORING, SCORES)
    if correction_ptr is not None:
        choice += tl.load(correction_ptr + experts, mask=mask, other=0.0).to(tl.float32)
    keys = tl.where(mask, _key(tl.where(choice == 0.0, 0.0, choice)), BELOW_ALL)

    if GROUPS > 1:
        group_keys, first = _first_max(keys, offs_e, 1)
        if GROUP_SCORE == "top2":
            second = tl.max(tl.where(offs_e == first[:, None], BELOW_ALL, keys), axis=1)
            group_scores = _value(group_keys) + _value(second)
            if correction_ptr is None:
                group_scores = group_scores.to(SCORES).to(tl.float32)
            group_keys = _key(group_scores)
        group_keys = tl.where(offs_g < GROUPS, group_keys, BELOW_ALL)
        for _ in range(topk_group):
            _, group = _first_max(group_keys, offs_g, 0)
            group_keys = tl.where(offs_g == group, BELOW_ALL, group_keys)
        is_chosen = (group_keys == BELOW_ALL)[:, None]
        keys = tl.where(mask & ~is_chosen, _key(tl.full((BLOCK_G, BLOCK_E), float("-inf"), tl.float32)), keys)

    offs_k = tl.arange(0, BLOCK_TOP_K)
    mask_k = offs_k < TOP_K
    indices = tl.zeros((BLOCK_TOP_K,), tl.int32)
    for k in range(TOP_K):
        _, expert = _first_max(keys, experts, None)
        keys = tl.where(experts == expert, BELOW_ALL, keys)
        indices = tl.where(offs_k == k, expert, indices)

    # Summed again rather than picked out of `logits` in every round above: the same loads in the same order.
    chosen = _logits(partials_ptr, split_stride, bias_ptr, indices, mask_k, SPLITS, PRODUCT)
    weights = _scores(chosen, top, total, SCORING, SCORES)
    if SCORING == "softmax_of_chosen":
        weights = tl.exp(weights - tl.max(tl.where(mask_k, weights, float("-inf")), axis=0))
        weights /= tl.sum(tl.where(mask_k, weights, 0.0), axis=0)
    if NORM:
        denominator = tl.sum(tl.where(mask_k, weights, 0.0), axis=0) + norm_eps
        weights /= tl.where(denominator < norm_min, norm_min, denominator)
    weights = (weights * scaling_factor).to(weights_ptr.dtype.element_ty)
    tl.store(weights_ptr + token * TOP_K + offs_k, weights, mask=mask_k)
    tl.store(indices_ptr + token * TOP_K + offs_k, indices.to(tl.int64), mask=mask_k)


def router_topk(partials, bias, e_score_correction_bias, form):
    """partials (splits, T, E), contiguous (E,) or None twice -> logits (T, E), weights (T, top_k), indices int64."""
    splits, T, E = partials.shape
    top_k, num_group, topk_group = form.top_k, form.num_group, form.topk_group
    weights = torch.empty((T, top_k), dtype=form.weights_dtype or torch.float32, device=partials.device)
    indices = torch.empty((T, top_k), dtype=torch.int64, device=partials.device)
    logits = None
    if splits > 1 or bias is not None or not {form.product_dtype, form.logits_dtype} <= {None, torch.float32}:
        logits = torch.empty((T, E), dtype=form.logits_dtype or torch.float32, device=partials.device)
    if topk_group == num_group:
        num_group = topk_group = 1  # all groups win
    group_size = E // num_group
    forms = (form.group_score, form.scoring, form.choose_by, form.norm_topk_prob)
    constants = (top_k, num_group, *forms, DTYPES[form.product_dtype], DTYPES[form.scores_dtype], splits)
    blocks = (next_power_of_2(num_group), next_power_of_2(group_size), next_power_of_2(top_k))
    launch(
        _router_topk_kernel,
        (T, 1, 1),
        (partials, bias, e_score_correction_bias, logits, weights, indices),
        (T, float(form.routed_scaling_factor), float(form.norm_eps), float(form.norm_min)),
        (group_size, topk_group, *constants, *blocks),
        num_warps=1,
    )
    return partials[0] if logits is None else logits, weights, indices
