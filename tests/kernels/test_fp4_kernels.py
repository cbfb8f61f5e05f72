"""The launchers for weights in 4 bits against fp64, in small tiles and odd sizes: on a GPU, or interpreted."""

from functools import partial
from importlib import import_module

import pytest
import torch

from cases import covering
from flat import ByKind
from interpreted import DEVICE, DTYPES, ROWS_FIRST, on_triton, under_the_interpreter
from low_rank import adapters
from oracle import dequantized_fp4, error, fp4_layer, in_fp64, layer

test_under_the_interpreter = under_the_interpreter(__file__)


@pytest.fixture(scope="module")
def config(config):
    return partial(config, BLOCK_N=64, BLOCK_K=64)


ROWS = [  # rows of each expert, N, K
    pytest.param([3, 0, 20], 64, 64, id="one-step"),
    pytest.param([16, 1, 0], 97, 96, id="tails"),
    pytest.param([5, 18, 70], 96, 160, id="several-tiles-and-steps"),
    pytest.param([0, 0, 0], 64, 32, id="no-rows"),
]
VARIANTS = [
    pytest.param({}, id="loads"),
    pytest.param({"USE_TMA": True}, id="tma"),
    pytest.param({**ROWS_FIRST, "BLOCK_K": 32}, id="two-heights"),
]
FORMS = [pytest.param(form, id=form) for form in ("e8m0", "fp32")]


def rows_of(kernel, sizes, N, K, dtype, form):
    """x (S, K) with rows that no expert owns, offsets, codes (E, N, K / 2), scales as kernels take them, fp64."""
    generator = torch.Generator().manual_seed(len(sizes) + N + K)
    x = torch.randn(sum(sizes) + 5, K, generator=generator).to(DEVICE, dtype)
    offsets = torch.tensor([0, *sizes], device=DEVICE).cumsum(0).int()
    weight = torch.randn(len(sizes), N, K, generator=generator) * 2.0 ** (torch.arange(K) // 32 % 5)
    codes, scale = kernel.quantize_fp4(weight.to(DEVICE))
    if form == "fp32":
        scale = scale.float() * (1 + torch.arange(scale.numel(), device=DEVICE).view(scale.shape) % 7 / 7)
    exact = dequantized_fp4(codes, scale)
    return x, offsets, codes.view(torch.uint8), scale if form == "fp32" else scale.view(torch.uint8), exact


@on_triton
@pytest.mark.parametrize("sizes, N, K, variant, form, dtype", covering(ROWS, VARIANTS, FORMS, DTYPES))
def test_grouped_gemm(kernel, launch, config, sizes, N, K, variant, form, dtype):
    x, offsets, codes, scale, exact = rows_of(kernel, sizes, N, K, dtype, form)
    config = config(**variant)
    bias = torch.randn(len(sizes), N).to(DEVICE, dtype) if form == "fp32" else None
    schedule = launch.tile_schedule(offsets, x.shape[0], config.BLOCK_M)
    y = torch.full((x.shape[0], N), float("nan"), dtype=dtype, device=DEVICE)
    launch.grouped_gemm_fp4(x, codes, scale, schedule, "ieee", config, y, bias)
    expected = kernel.reference.grouped_gemm(x.double(), exact, offsets, None if bias is None else bias.double())
    rows = sum(sizes)
    assert error(y[:rows], expected[:rows]) <= 4 * torch.finfo(dtype).eps and y[rows:].isnan().all()


@on_triton
@pytest.mark.parametrize("sizes, N, K, variant, form, dtype", covering(ROWS, VARIANTS[:2], FORMS, DTYPES))
def test_dgrad(kernel, launch, config, sizes, N, K, variant, form, dtype):
    _, offsets, codes, scale, exact = rows_of(kernel, sizes, N, K, dtype, form)
    dy = layer(sum(sizes) + 5, 1, 1, N, 1)[0].to(DEVICE, dtype)
    config = config(**variant)
    schedule = launch.tile_schedule(offsets, dy.shape[0], config.BLOCK_M)
    dx = torch.full((dy.shape[0], K), float("nan"), dtype=dtype, device=DEVICE)
    launch.dgrad_fp4(dy, codes, scale, schedule, "ieee", config, dx)
    rows = sum(sizes)
    assert dx[rows:].isnan().all()
    expected = kernel.reference.grouped_gemm(dy.double(), exact.mT, offsets)[:rows]
    assert error(dx[:rows], expected) <= 4 * torch.finfo(dtype).eps


@on_triton
@pytest.mark.parametrize("transposed", [False, True])
def test_every_byte_and_every_exponent(launch, config, transposed):
    """Exactly: an identity in fp32 times what is a number there, 0.5 * 2^-127 among them; exponent 255 is NaN."""
    all_codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).repeat_interleave(16).view(1, 256, 16)
    all_exponents = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(1, 256, 1)
    one, half_and_one = torch.full_like(all_exponents, 127), torch.full_like(all_codes, 0x21)
    for codes, exponents in ((all_codes, one), (half_and_one, all_exponents)):
        if transposed:  # NaN times zero is one: without the weight's last row, which has that scale
            codes, exponents = codes[:, :255].contiguous(), exponents[:, :255].contiguous()
        exact = dequantized_fp4(codes, exponents)[0]
        x = torch.eye(exact.shape[0] if transposed else 32, device=DEVICE)
        rows = x.shape[0]
        schedule = launch.tile_schedule(torch.tensor([0, rows], dtype=torch.int32, device=DEVICE), rows, 16)
        if transposed:
            y = torch.empty(rows, 32, device=DEVICE)
            launch.dgrad_fp4(x, codes, exponents, schedule, "ieee", config(BLOCK_N=32), y)
        else:
            y = torch.empty(rows, 256, device=DEVICE)
            y = launch.grouped_gemm_fp4(x, codes, exponents, schedule, "ieee", config(), y).T
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=0, equal_nan=True)


def in_natural_order(kernel, x, K):
    """Columns of x as order.py has them -> as they were; of those past K nothing is left but zeros."""
    order = import_module(f"{kernel.__name__}.kernels.order")
    places = torch.tensor(order.COLUMN, device=x.device).argsort()
    assert x.shape[1] == order.ordered_size(K)
    x = x.unflatten(1, (-1, order.PERIOD))[:, :, places].flatten(1)
    assert not x[:, K:].any()
    return x[:, :K]


@on_triton
@pytest.mark.parametrize("columns", [32, 128, 160, 352])
@pytest.mark.parametrize("gate", [{}, {"activation": "swigluoai", "limit": 1.0, "interleaved": True}], ids=str)
def test_columns_in_order(kernel, launch, columns, gate):
    """What `gather` and `glu` write is what they write else, permuted, rows of nobody included."""
    index = torch.tensor([[2, 0], [2, 7], [1, 2], [2, 1], [0, 2]], device=DEVICE)  # of 4 experts
    offsets, slots, _, _ = launch.route(index, 4, 16)
    gate, rows = kernel.reference.Gate(**gate), int(offsets[-1])
    x, z = (torch.randn(n, m).to(DEVICE, DTYPES[0]) for n, m in ((5, columns), (10, 2 * columns)))
    for plain, ordered in (
        [launch.gather(x, slots, offsets, 2, ordered=ordered) for ordered in (False, True)],
        [launch.glu(z, slots, offsets, gate, ordered=ordered) for ordered in (False, True)],
    ):
        assert torch.equal(in_natural_order(kernel, ordered[:rows], columns), plain[:rows])
        assert rows == 9 and ordered[rows:].isnan().all()


@on_triton
@pytest.mark.parametrize("tokens, config", [(40, 1), (40, 3), (90, -1)])
@pytest.mark.parametrize("hidden_dim, inter", [(96, 128), (160, 352)])
def test_whole_path_in_order(kernel, launch, whole, monkeypatch, tokens, config, hidden_dim, inter):
    """All but the GEMM, in whose place a reference reads columns in order: saved for a backward, and not."""

    def grouped_gemm(x, w, w_scale, schedule, config, y, bias):
        first_rows, ends = schedule[2, : schedule[4, 0]].tolist(), schedule[3, : schedule[4, 0]].tolist()
        for expert, begin, end in set(zip(schedule[0].tolist(), first_rows, ends)):
            exact = dequantized_fp4(w[expert : expert + 1], w_scale[expert : expert + 1])[0]
            rows = in_natural_order(kernel, x[begin:end], exact.shape[1])
            y[begin:end] = rows.double() @ exact.T + bias[expert]
        calls.append(config)
        return y

    calls, dtype = [], DTYPES[0]
    config = whole.fp4.tuning.FP4_ORDERED.hopper[config].config
    monkeypatch.setattr(launch, "grouped_gemm_fp4_hopper", grouped_gemm)
    monkeypatch.setattr(whole.fp4, "_can_specialize", lambda projection: True)
    monkeypatch.setattr(whole.fp4.tuning, "fp4_config", lambda *args: config)
    monkeypatch.setattr(whole.fp4.tuning, "is_decode", lambda *args: False)
    args = (tokens, 5, 2, hidden_dim, inter, dtype, DEVICE, "sentinels")
    inputs, weights, scales = fp4_layer(kernel, *args, form="uint8")
    biases = [torch.randn(w.shape[:2]).to(DEVICE, dtype) for w in weights]
    exact_weights = [dequantized_fp4(*pair) for pair in zip(weights, scales)]
    gate = kernel.reference.Gate("swigluoai", limit=7.0, interleaved=True)
    named = dict(zip(("gate_up_proj_bias", "down_proj_bias"), (b.double() for b in biases)))
    exact = kernel.reference.moe_experts(*in_fp64(inputs), *exact_weights, **named, **gate._asdict())
    projections = [whole.weights.Projection(*parts) for parts in zip(weights, biases, scales)]
    out = whole.forward.forward(*inputs, *projections, gate, True)
    assert error(out, exact) <= 2 * torch.finfo(dtype).eps
    again, z, *_ = whole.forward.forward_and_save(*inputs, *projections, gate)
    assert torch.equal(again, out) and z.shape == (2 * tokens, 2 * inter)
    assert calls == 4 * [config]


WHOLE = [  # T, E, top_k, H, I, ids, form of the scales
    pytest.param(1, 8, 2, 96, 64, "sentinels", "e8m0", id="decode"),
    pytest.param(12, 4, 2, 96, 64, "sentinels", "uint8", id="small-tiles"),
    pytest.param(60, 4, 2, 96, 64, "any", "fp32", id="tall-tiles"),
    pytest.param(110, 2, 2, 64, 96, "zipf", "e8m0", id="two-heights"),
]


@on_triton
@pytest.mark.parametrize("gate", [{}, {"activation": "swigluoai", "limit": 1.0, "interleaved": True}], ids=str)
@pytest.mark.parametrize("tokens, experts, top_k, hidden_dim, inter, ids, form", WHOLE)
def test_whole_path(kernel, whole, tokens, experts, top_k, hidden_dim, inter, ids, form, gate):
    args = (tokens, experts, top_k, hidden_dim, inter, DTYPES[0], DEVICE, ids)
    inputs, weights, scales = fp4_layer(kernel, *args, form=form)
    biases = [torch.randn(w.shape[:2]).to(DEVICE, DTYPES[0]) if gate else None for w in weights]
    exact_biases = [b if b is None else b.double() for b in biases]
    exact_weights = [dequantized_fp4(*pair) for pair in zip(weights, scales)]
    options = dict(zip(("gate_up_proj_bias", "down_proj_bias"), exact_biases))
    exact = kernel.reference.moe_experts(*in_fp64(inputs), *exact_weights, **options, **gate)
    projections = [whole.weights.Projection(*parts) for parts in zip(weights, biases, scales)]
    out = whole.forward.forward(*inputs, *projections, kernel.reference.Gate(**gate), True)
    assert error(out, exact) <= 2 * torch.finfo(DTYPES[0]).eps


@on_triton
@pytest.mark.parametrize("as_gpu", ["sm_90", "sm_80", "gfx942"])
@pytest.mark.parametrize("tokens, experts, top_k, hidden_dim, inter, ids, form", WHOLE[1:])
def test_gradients_with_adapters(
    kernel, whole, monkeypatch, tokens, experts, top_k, hidden_dim, inter, ids, form, as_gpu
):
    """Against merged weights: outputs, and gradients of all but the frozen weights."""
    monkeypatch.setattr(whole.gpu, "traits", lambda device: whole.gpu.TRAITS[as_gpu])
    args = (tokens, experts, top_k, hidden_dim, inter, DTYPES[0], DEVICE, ids)
    (x, index, top_k_weights), weights, scales = fp4_layer(kernel, *args, form=form)
    dout = layer(*args, seed=3)[0]
    exact_weights = [dequantized_fp4(*pair) for pair in zip(weights, scales)]
    factors = [t for seed, w in enumerate(exact_weights) for t in adapters(w.to(DTYPES[0]), [16], seed)]
    factors = [t if t.shape[0] == experts else t.permute(2, 0, 1).contiguous() for t in factors]
    path, inputs = ByKind(whole.ops, 10, scales), (top_k_weights, *weights, None, None, *factors)
    gate = kernel.reference.Gate()
    out, *saved = path.training(x, index, *inputs, *gate)
    needs_grad = [True, True, False, False, False, False, True, True, True, True]
    grads = path.backward(dout, x, *inputs, *saved, needs_grad, *gate)
    leaves = [t.double().requires_grad_() for t in (x, top_k_weights, *factors)]
    merged = [w + B @ A for w, A, B in zip(exact_weights, leaves[2::2], leaves[3::2])]
    exact = kernel.reference.moe_experts(leaves[0], index, leaves[1], *merged)
    exact_grads = torch.autograd.grad(exact, leaves, dout.double())
    for got, expected in zip((out, *grads[:2], *grads[6:]), (exact, *exact_grads)):
        assert error(got, expected) <= 6 * torch.finfo(DTYPES[0]).eps
