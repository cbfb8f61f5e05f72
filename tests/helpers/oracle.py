"""Random layers, and how far from the fp64 result a right answer may be."""

import pytest
import torch
import torch.nn.functional as F

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def layer(tokens, experts, top_k, hidden_dim, inter, dtype=torch.float32, device="cpu", ids="distinct", seed=0):
    """(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj) as `moe_experts` takes them.

    ids: "distinct": each token picks top_k different experts; "any": an expert may come twice in a row; "one": all
    slots go to the last expert; "zipf": expert e with odds 1 / (e + 1); "sentinels": as "any", but about a third of
    the ids lie outside [0, experts).
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    odds = torch.ones(experts)
    if ids == "zipf":
        odds = 1 / torch.arange(1, experts + 1)
    if ids == "one":
        index = torch.full((tokens, top_k), experts - 1)
    elif ids == "sentinels":
        index = torch.randint(-experts // 4 - 1, experts + experts // 4 + 1, (tokens, top_k), generator=generator)
    elif tokens * top_k == 0:
        index = torch.zeros(tokens, top_k, dtype=torch.int64)
    else:
        index = torch.multinomial(odds.expand(tokens, -1), top_k, replacement=ids == "any", generator=generator)
    weights = torch.rand(tokens, top_k, generator=generator)
    floats = (
        randn(tokens, hidden_dim),
        randn(experts, 2 * inter, hidden_dim) / hidden_dim**0.5,
        randn(experts, hidden_dim, inter) / inter**0.5,
    )
    x, gate_up_proj, down_proj = (t.to(dtype).to(device) for t in floats)
    return x, index.to(device), weights.to(device), gate_up_proj, down_proj


def experts_densely(x, index, weights, gate_up_proj, down_proj, activation="silu"):
    """`moe_experts` without any sorting: every expert computes every token; differentiable."""
    act_fn = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_pytorch_tanh": lambda gate: F.gelu(gate, approximate="tanh"),
        "relu": F.relu,
    }[activation]
    gate, up = torch.einsum("th,enh->ten", x, gate_up_proj).chunk(2, dim=-1)
    y = torch.einsum("ten,ehn->teh", act_fn(gate) * up, down_proj)
    of_expert = index[..., None] == torch.arange(gate_up_proj.shape[0], device=x.device)
    share = torch.where(of_expert, weights[..., None], 0).sum(dim=1)
    return (share[..., None] * y).sum(dim=1)


def shared_weights(hidden_dim, inter, dtype=torch.float32, device="cpu", gated=True, margin=0):
    """Fields of SharedExperts; their rows lie `margin` numbers farther apart than they are long."""
    generator = torch.Generator().manual_seed(inter)
    shapes = (inter, hidden_dim), (inter, hidden_dim), (hidden_dim, inter), (1, hidden_dim)
    weights = [
        (torch.randn(rows, columns + margin, generator=generator) / columns**0.5).to(dtype).to(device)[:, :columns]
        for rows, columns in shapes
    ]
    return weights if gated else [*weights[:3], None]


# name -> (are both weights stored as (E, in, out), do they have biases, other arguments of `moe_experts`)
VARIANTS = {
    "gpt-oss": (True, True, {"activation": "swigluoai", "limit": 0.8, "alpha": 1.3, "interleaved": True}),
    "openai-privacy-filter": (True, True, {"activation": "swigluoai", "limit": 0.8}),
    "deepseek-v4": (False, False, {"limit": 0.5}),
    "minimax-m3": (False, False, {"activation": "swigluoai", "limit": 0.8}),
    "aria": (True, False, {}),
    "interleaved": (False, True, {"activation": "gelu", "interleaved": True}),
}


def variant_of(name, args):
    """args as `layer` makes them -> (args, keyword arguments) of one of VARIANTS."""
    transposed, has_bias, kwargs = VARIANTS[name]
    *inputs, gate_up_proj, down_proj = args
    generator = torch.Generator().manual_seed(7)
    biases = {}
    if has_bias:
        for weight, bias in ((gate_up_proj, "gate_up_proj_bias"), (down_proj, "down_proj_bias")):
            biases[bias] = torch.randn(weight.shape[:2], generator=generator).to(weight)
    if transposed:
        gate_up_proj, down_proj = (w.mT.contiguous().mT for w in (gate_up_proj, down_proj))
    return [*inputs, gate_up_proj, down_proj], {**kwargs, **biases}


def gate_of(reference, kwargs):
    """The Gate that these arguments of `moe_experts` describe."""
    return reference.Gate(**{name: value for name, value in kwargs.items() if "bias" not in name})


def in_fp64(tensors):
    if isinstance(tensors, dict):
        return dict(zip(tensors, in_fp64(tensors.values())))
    return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tensors]


def assert_as_good_as_torch(out, torch_out, exact, dtype=None):
    """The error against fp64 is at most twice what torch makes in the same dtype, plus one rounding.

    That to `dtype`, by default the result's own: a result of one or two elements may be exact in torch by luck. The
    last term is fp32's own: a sum of some hundred products in another order than cuBLAS chose.
    """
    assert out.dtype == torch_out.dtype and out.shape == torch_out.shape
    if not out.numel():
        return
    scale = exact.abs().max()
    rounding = (torch.finfo(dtype or out.dtype).eps + 16 * torch.finfo(torch.float32).eps) * scale
    error, torch_error = (out.double() - exact).abs().max(), (torch_out.double() - exact).abs().max()
    assert error <= 2 * torch_error + rounding, f"error {error:.3g}, torch's {torch_error:.3g}, scale {scale:.3g}"


def router(tokens, experts, hidden_dim, x_dtype=torch.float32, weight_dtype=None, device="cpu", seed=0):
    """(hidden_states, weight, e_score_correction_bias) as `topk_router` takes them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden_dim, generator=generator).to(x_dtype)
    weight = (torch.randn(experts, hidden_dim, generator=generator) / hidden_dim**0.5).to(weight_dtype or x_dtype)
    bias = torch.rand(experts, generator=generator) / 4
    return [t.to(device) for t in (x, weight, bias)]


def scores_by_hand(x, weight, correction, bias=None, scoring="sigmoid", choose_by="scores", **options):
    """(logits, scores, choice), (T, E) in fp64, of a router with these options of `topk_router`."""

    def rounded(numbers, dtype):
        return numbers if dtype is None else numbers.to(dtype).double()

    logits = x.double().cpu() @ weight.double().cpu().T
    if bias is not None:
        logits += bias.double().cpu()
    logits = rounded(logits, options.get("product_dtype"))
    scores = {
        "sigmoid": lambda: 1 / (1 + (-logits).exp()),
        "softmax": lambda: logits.exp() / logits.exp().sum(dim=1, keepdim=True),
        "sqrtsoftplus": lambda: rounded(logits.exp().log1p(), options.get("scores_dtype")).sqrt(),
        "softmax_of_chosen": lambda: logits,
    }[scoring]()
    scores = rounded(scores, options.get("scores_dtype"))
    choice = logits if choose_by == "logits" else scores
    return logits, scores, choice if correction is None else choice + correction.double().cpu()


def decided(x, weight, correction, top_k, num_group=1, topk_group=1, *_, group_score="top2", **options):
    """The hidden states whose experts do not change if choices are off by what fp32 may round, 2e-6."""
    by_group = scores_by_hand(x, weight, correction, **options)[2].unflatten(1, (num_group, -1))
    greatest = min(2 if group_score == "top2" else 1, by_group.shape[2])
    sums, groups = by_group.topk(greatest, dim=2)[0].sum(2).sort(dim=1, descending=True)
    winners = groups[:, :topk_group, None].expand(-1, -1, by_group.shape[2])
    choice = by_group.gather(1, winners).flatten(1).sort(dim=1, descending=True)[0]
    gaps = [choice.diff(dim=1)[:, :top_k], sums.diff(dim=1)[:, topk_group - 1 : topk_group]]
    return x[(torch.cat(gaps, dim=1) < -8e-6).all(dim=1).to(x.device)]


def route_by_hand(
    *tensors_and_args,
    group_score="top2",
    norm_eps=1e-20,
    norm_min=0.0,
    logits_dtype=None,
    weights_dtype=None,
    **options,
):
    """What `topk_router` returns, in fp64 and token by token; among equals the lower index comes first."""
    x, weight, correction, top_k, num_group, topk_group, norm_topk_prob, routed_scaling_factor = tensors_and_args
    logits, scores, choices = scores_by_hand(x, weight, correction, **options)
    size = scores.shape[1] // num_group
    greatest = 2 if group_score == "top2" else 1
    weights = torch.empty(scores.shape[0], top_k, dtype=torch.float64)
    ids = torch.empty(scores.shape[0], top_k, dtype=torch.int64)
    for token, choice in enumerate(choices.tolist()):
        groups = [sum(sorted(choice[g * size : (g + 1) * size])[-greatest:]) for g in range(num_group)]
        if correction is None and options.get("scores_dtype") is not None:
            groups = torch.tensor(groups, dtype=torch.float64).to(options["scores_dtype"]).tolist()
        winners = sorted(range(num_group), key=lambda g: (-groups[g], g))[:topk_group]
        # False before True: experts of other groups come last, in their own order.
        ranked = sorted(range(len(choice)), key=lambda e: (False, -choice[e], e) if e // size in winners else (True, e))
        ids[token] = torch.tensor(ranked[:top_k])
        weights[token] = scores[token, ids[token]]
        if options.get("scoring") == "softmax_of_chosen":
            weights[token] = weights[token].exp() / weights[token].exp().sum()
    if norm_topk_prob:
        weights /= (weights.sum(dim=1, keepdim=True) + norm_eps).clamp(min=norm_min)
    return logits, weights * routed_scaling_factor, ids


def assert_routes(results, expected, logits_dtype=None, weights_dtype=None, **_):
    """Results of `topk_router` against those of `route_by_hand`."""
    logits, weights, ids = results
    dtypes = [dtype or torch.float32 for dtype in (logits_dtype, weights_dtype)]
    assert [logits.dtype, weights.dtype, ids.dtype] == [*dtypes, torch.int64]
    assert torch.equal(ids.cpu(), expected[2])
    for got, wanted, atol in ((logits, expected[0], 2e-6), (weights, expected[1], 1e-7)):
        rtol = 4e-6 if got.dtype == torch.float32 else torch.finfo(got.dtype).eps
        torch.testing.assert_close(got.cpu().double(), wanted, rtol=rtol, atol=atol)


ROUTERS = [  # E, num_group, topk_group, top_k, norm_topk_prob
    (256, 8, 4, 8, True),  # DeepSeek-V3
    (64, 1, 1, 6, True),  # Moonlight
    (12, 3, 2, 5, False),  # no power of two
    (30, 5, 1, 6, True),  # a whole group
    (7, 1, 1, 7, False),  # every expert
    (80, 2, 2, 32, True),  # every group
    (12, 4, 1, 5, True),  # more than the winning group has
    (22, 11, 3, 4, True),  # groups of two
]

# What routers of Transformers do: E, has a bias, has a correction bias, arguments of `topk_router` after the tensors,
# and options. Where a dtype is named, it is bf16, which stands for the model's.
_BF16 = torch.bfloat16
ROUTER_FORMS = {
    "qwen3_moe": (
        *(60, False, False, (8, 1, 1, True, 1.0)),
        {"scoring": "softmax", "norm_eps": 0.0, "product_dtype": _BF16, "logits_dtype": _BF16, "weights_dtype": _BF16},
    ),
    "mixtral": (
        *(8, False, False, (2, 1, 1, True, 1.0)),
        {"scoring": "softmax", "norm_eps": 0.0, "product_dtype": _BF16, "logits_dtype": _BF16},
    ),
    "jamba": (16, False, False, (2, 1, 1, False, 1.0), {"scoring": "softmax", "weights_dtype": _BF16}),
    "granitemoe": (
        *(40, False, False, (8, 1, 1, False, 1.0)),
        {"scoring": "softmax_of_chosen", "choose_by": "logits", "product_dtype": _BF16, "weights_dtype": _BF16},
    ),
    "gpt_oss": (
        *(32, True, False, (4, 1, 1, False, 1.0)),
        {
            **{"scoring": "softmax_of_chosen", "choose_by": "logits", "product_dtype": _BF16},
            **{"logits_dtype": _BF16, "weights_dtype": _BF16},
        },
    ),
    "deepseek_v2": (40, False, False, (6, 8, 3, False, 16.0), {"scoring": "softmax", "group_score": "max"}),
    "deepseek_v4": (48, False, True, (6, 1, 1, True, 1.5), {"scoring": "sqrtsoftplus"}),
    "mistral4": (
        *(32, False, False, (4, 4, 2, True, 2.0)),
        {"scoring": "softmax", "scores_dtype": _BF16, "product_dtype": _BF16, "weights_dtype": _BF16},
    ),
    "ernie4_5_moe": (24, False, True, (6, 1, 1, True, 1.0), {"scoring": "softmax", "norm_eps": 0.0, "norm_min": 0.25}),
    "kolibri1": (24, False, True, (4, 1, 1, True, 1.0), {"choose_by": "logits", "norm_eps": 0.0}),
    "everything": (
        *(21, True, True, (5, 7, 4, True, 0.5)),
        {"scoring": "sqrtsoftplus", "group_score": "max", "norm_eps": 0.125, "scores_dtype": _BF16},
    ),
    "groups-of-one": (6, False, True, (2, 6, 3, False, 1.0), {"scoring": "softmax", "group_score": "max"}),
}


def router_of_form(name, tokens, hidden_dim, dtype=torch.float32, device="cpu", half=torch.bfloat16):
    """(hidden_states, weight, e_score_correction_bias), arguments and options, among them bias, of ROUTER_FORMS.

    half: in the place of bf16.
    Small multiples of 1/4 and 1/16: products and their sums are exact, and so is what is rounded.
    """
    experts, has_bias, has_correction, args, options = ROUTER_FORMS[name]
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape, most=8, unit=4):
        return torch.randint(-most, most + 1, shape, generator=generator).to(device, dtype) / unit

    x, weight = numbers(tokens, hidden_dim), numbers(experts, hidden_dim, unit=16)
    options = {key: half if value == _BF16 else value for key, value in options.items()}
    options["bias"] = numbers(experts, unit=8) if has_bias else None
    correction = numbers(experts, unit=64) if has_correction else None
    return [x, weight, correction], args, options


def dequantized(codes, scale, half=None):
    """An fp8 weight (E, N, K) in fp64, element by element; rows from `half` on have blocks of their own, if given."""
    experts, rows, columns = codes.shape
    row_blocks = torch.arange(rows, device=codes.device) // 128
    if half is not None:
        row_blocks[half:] = -(-half // 128) + torch.arange(rows - half, device=codes.device) // 128
    column_blocks = torch.arange(columns, device=codes.device) // 128
    return codes.double() * scale.double()[:, row_blocks][:, :, column_blocks]


def fp8_layer(kernel, *args, e8m0=False, split=False, **kwargs):
    """`layer` with fp8 weights: (hidden_states, top_k_index, top_k_weights), the two weights, their two scales.

    split: gate and up have blocks of their own, which shows in their number.
    """
    *inputs, gate_up_proj, down_proj = layer(*args, **kwargs)
    gate_up_proj, down_proj = gate_up_proj.float(), down_proj.float()
    # No two blocks alike: a wrong scale shows.
    for weight in (gate_up_proj, down_proj):
        rows, columns = (torch.arange(n, device=weight.device) // 128 for n in weight.shape[1:])
        weight *= 2.0 ** ((3 * rows[:, None] + 5 * columns) % 7 - 3)
    if split:
        assert down_proj.shape[2] % 128 <= 64
        halves = [kernel.quantize_fp8(half) for half in gate_up_proj.chunk(2, dim=1)]
        gate_up_proj, gate_up_scale = (torch.cat(parts, dim=1) for parts in zip(*halves))
    else:
        gate_up_proj, gate_up_scale = kernel.quantize_fp8(gate_up_proj)
    down_proj, down_scale = kernel.quantize_fp8(down_proj)
    scales = [gate_up_scale, down_scale]
    if e8m0:
        scales = [(2.0 ** scale.log2().round()).to(torch.float8_e8m0fnu) for scale in scales]
    return inputs, [gate_up_proj, down_proj], scales


def dequantized_fp4(codes, scale):
    """A weight (E, N, K) of 4-bit codes in fp64, number by number."""
    numbers = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    numbers = torch.tensor(numbers + [-n for n in numbers], dtype=torch.float64, device=codes.device)
    codes = codes.view(torch.uint8).int()
    columns = torch.arange(2 * codes.shape[2], device=codes.device)
    nibbles = codes[:, :, columns // 2] // torch.where(columns % 2 == 0, 1, 16) % 16
    if scale.dtype == torch.uint8:
        scale = torch.where(
            scale == 255, float("nan"), torch.ldexp(torch.ones_like(scale, dtype=float), scale.int() - 127)
        )
    scale = scale.double()
    return numbers[nibbles] * scale[:, :, columns // 32]


def fp4_layer(kernel, *args, form="e8m0", **kwargs):
    """`layer` with weights in 4 bits: (hidden_states, top_k_index, top_k_weights), the two weights, their two scales.

    form: of the scales: "e8m0", "uint8" as gpt-oss has them (weights too), or "fp32", which are no powers of two.
    """
    *inputs, gate_up_proj, down_proj = layer(*args, **kwargs)
    weights, scales = [], []
    for weight in (gate_up_proj.float(), down_proj.float()):
        # No two groups alike: a wrong scale shows.
        rows, columns = (torch.arange(n, device=weight.device) for n in weight.shape[1:])
        codes, scale = kernel.quantize_fp4(weight * 2.0 ** ((3 * rows[:, None] + 5 * (columns // 32)) % 7 - 3))
        if form == "uint8":
            codes, scale = codes.view(torch.uint8), scale.view(torch.uint8)
        elif form == "fp32":
            scale = scale.float() * (1 + torch.arange(scale.numel(), device=scale.device).view(scale.shape) % 5 / 5)
        weights.append(codes)
        scales.append(scale)
    return inputs, weights, scales


# Of the scales, for fp8_layer.
FORMS = [
    pytest.param({}, id="fp32-scales"),
    pytest.param({"e8m0": True, "split": True}, id="e8m0-split-scales"),
]


def fp8_weights_in_fp64(weights, scales):
    inter = weights[1].shape[2]
    half = inter if scales[0].shape[1] != -(-2 * inter // 128) else None
    return [dequantized(weights[0], scales[0], half), dequantized(weights[1], scales[1])]


def w8a8(inputs, weights, rounded, activation=torch.nn.functional.silu):
    """The layer in fp64, activations `rounded` before each GEMM: what exact sums of fp8 products would give."""
    x, index, top_k_weights = inputs
    x = rounded(x.double())
    out = torch.zeros_like(x)
    for expert, (gate_up_proj, down_proj) in enumerate(zip(*weights)):
        tokens, k = torch.where(index == expert)
        gate, up = (x[tokens] @ gate_up_proj.T).chunk(2, dim=1)
        y = rounded(activation(gate) * up) @ down_proj.T
        out.index_put_((tokens,), top_k_weights[tokens, k, None].double() * y, accumulate=True)
    return out


def round_to_fp8(x):
    """fp64 rows rounded to fp8 with a scale for each 128 columns of each row."""
    blocks = torch.nn.functional.pad(x, (0, -x.shape[1] % 128)).unflatten(1, (-1, 128))
    scale = (blocks.abs().amax(dim=2, keepdim=True) / 448).clamp(min=torch.finfo(torch.float32).tiny)
    return ((blocks / scale).to(torch.float8_e4m3fn).double() * scale).flatten(1)[:, : x.shape[1]]


def error(out, exact):
    return ((out.double() - exact).norm() / exact.norm().clamp(min=1e-300)).item()
