"""The fp8 launchers against fp64, in small tiles and odd sizes: on a GPU, or under TRITON_INTERPRET=1.

The interpreter rounds to fp8 wrongly where a mantissa overflows and reads the code of NaN as 480, and knows no inline
assembly: `whole_interpreter` mends that with torch's own conversion.
"""

from collections import namedtuple
from functools import partial
from importlib import import_module

import pytest
import torch

from cases import covering
from flat import ByKind
from interpreted import DEVICE, DTYPES, INTERPRETED, ROWS_FIRST, on_triton, under_the_interpreter
from low_rank import adapters
from oracle import FORMS, error, fp8_layer, fp8_weights_in_fp64, in_fp64, layer, round_to_fp8, w8a8

test_under_the_interpreter = under_the_interpreter(__file__, parts=2)


@pytest.fixture(autouse=True)
def whole_interpreter(kernel, monkeypatch):
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    types = {tl.float8e4nv: torch.float8_e4m3fn, tl.float16: torch.float16, tl.float32: torch.float32}

    def convert_as_torch(data, source, target, rounding):
        if tl.float8e4nv not in (source, target):
            return convert(data, source, target, rounding)
        x = torch.from_numpy(data.copy()).view(types[source]).to(torch.float32).to(types[target])
        bits = x.view(torch.uint8) if target == tl.float8e4nv else x
        return bits.numpy().view({1: "uint8", 2: "uint16", 4: "uint32"}[bits.element_size()]).reshape(data.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert_as_torch)
    monkeypatch.setattr(import_module(f"{kernel.__name__}.kernels.fp8"), "_computed_here", lambda x: x)


@pytest.fixture(scope="module")
def config(config):
    return partial(config, BLOCK_N=128, BLOCK_K=128)


ROWS = [
    pytest.param(1, 128, id="one-block"),
    pytest.param(5, 1300, id="several-programs"),
    pytest.param(3, 97, id="ragged"),
]


@on_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens, columns", ROWS)
def test_quantize_rows(kernel, launch, tokens, columns, dtype):
    x = layer(tokens, 1, 1, columns, 1)[0].to(DEVICE, dtype)
    codes, scale = launch.quantize_rows(x)
    expected_codes, expected_scale = import_module(f"{kernel.__name__}.weights.quantize_fp8").quantize_rows(x)
    torch.testing.assert_close(scale, expected_scale)
    # A quotient may be rounded to the other side of a tie.
    assert (codes.float() - expected_codes.float()).abs().max() <= 32
    assert ((codes.view(torch.uint8) != expected_codes.view(torch.uint8)).float().mean()) < 1e-2


@on_triton
def test_quantize_rows_of_anything(launch):
    x = torch.zeros(6, 256, device=DEVICE)
    x[1], x[2, 3], x[3, 130], x[4, 7] = 1e-42, 3e38, float("nan"), -1e-36
    x[5] = torch.linspace(-1, 1, 256)
    codes, scale = launch.quantize_rows(x)
    assert scale.isfinite().all() and (scale > 0).all()
    back = codes.float() * scale.repeat_interleave(128, dim=1)
    assert not back[0].any() and back[2, 3] == 448 * scale[2, 0]
    assert back[3, 130].isnan() and back.isnan().sum() == 1
    torch.testing.assert_close(back[5], x[5], rtol=2**-4, atol=2e-6)
    assert (back[1] - x[1]).abs().max() < 1e-38 and (back[4] - x[4]).abs().max() < 1e-37


LAYERS = [  # T, E, top_k, H, I, ids
    pytest.param(1, 4, 2, 128, 128, "distinct", id="fewer-rows-than-BLOCK_M"),
    pytest.param(45, 3, 2, 97, 47, "sentinels", id="tails-everywhere"),
    pytest.param(80, 2, 2, 272, 176, "any", id="several-tiles-of-M-and-N"),
]
CASE = "tokens, experts, top_k, hidden_dim, inter, ids"
VARIANTS = [  # of the configuration, of the scales
    pytest.param({}, {}, id="loads"),
    pytest.param({"BLOCK_M": 64, "num_warps": 8}, {"e8m0": True}, id="loads-three-heights-e8m0"),
    pytest.param(ROWS_FIRST, {"split": True}, id="loads-rows-first-split-scales"),
    pytest.param({"BLOCK_K": 64}, {"e8m0": True, "split": True}, id="two-steps-a-block-e8m0-split-scales"),
    pytest.param({"USE_TMA": True}, {}, id="tma"),
    pytest.param({**ROWS_FIRST, "USE_TMA": True}, {}, id="tma-rows-first"),
]


SILU = namedtuple("Gate", "activation limit alpha interleaved")("silu", None, 1.0, False)


def run_gemms(launch, inputs, weights, scales, config, quantized, as_bits=False):
    x, index, top_k_weights = inputs
    weights = [w.view(torch.uint8) if as_bits else w for w in weights]
    scales = [s.view(torch.uint8) if s.dtype == torch.float8_e8m0fnu else s for s in scales]
    offsets, slots, positions, schedule = launch.route(index, weights[0].shape[0], config.BLOCK_M)
    codes, x_scale = launch.quantize_rows(x) if quantized else (x, None)
    up = (codes, x_scale, weights[0], scales[0], slots, schedule, index.shape[1], SILU, "ieee", config)
    a, a_scale = launch.gate_up_fp8(*up)
    y = x.new_empty(index.numel(), x.shape[1])
    launch.grouped_gemm_fp8(a, a_scale, weights[1], scales[1], schedule, "ieee", config, y)
    rows = int(offsets[-1])
    assert y[rows:].isnan().all(), "rows of skipped slots are never written"
    return launch.combine(y, positions, top_k_weights)


def readable(tokens, experts, top_k, hidden_dim, inter, ids, variant, form, as_bits=False, dtype=None):
    """TMA wants rows of a multiple of 16 bytes; GPUs without fp8, which take the weights as bits, have none."""
    return "USE_TMA" not in variant or (hidden_dim % 16 == inter % 16 == 0 and not as_bits)


@on_triton
@pytest.mark.parametrize(f"{CASE}, variant, form", covering(LAYERS, VARIANTS, allowed=readable))
def test_quantized_activations(kernel, launch, config, tokens, experts, top_k, hidden_dim, inter, ids, variant, form):
    """The error against the unquantised fp64 layer: at most half as much again as with exact sums of fp8 products."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs fp8 tensor cores")
    config = config(**variant)
    args = (tokens, experts, top_k, hidden_dim, inter, DTYPES[0], DEVICE, ids)
    inputs, weights, scales = fp8_layer(kernel, *args, **form)
    exact_weights = fp8_weights_in_fp64(weights, scales)
    out = run_gemms(launch, inputs, weights, scales, config, True)
    exact = kernel.reference.moe_experts(*in_fp64(inputs), *exact_weights)
    allowed = error(w8a8(inputs, exact_weights, round_to_fp8), exact)
    assert error(out, exact) <= 1.5 * allowed and allowed < 0.1


@on_triton
def test_quantize_slots(launch):
    """What quantize_rows makes of a token stands where its slots are; no other row is written."""
    x, index, *_ = layer(45, 3, 2, 1300, 16, DTYPES[0], DEVICE, "sentinels")
    offsets, sorted_slots, positions, _ = launch.route(index, 3, 16)
    codes, scale = launch.quantize_slots(x, positions)
    expected_codes, expected_scale = launch.quantize_rows(x)
    rows = int(offsets[-1])
    tokens = sorted_slots[:rows].long() // 2
    assert 0 < rows < index.numel()
    assert torch.equal(codes.view(torch.uint8)[:rows], expected_codes.view(torch.uint8)[tokens])
    assert torch.equal(scale.T[:rows], expected_scale[tokens])
    assert scale.T[rows:].isnan().all()


@on_triton
@pytest.mark.parametrize(
    f"{CASE}, variant, form, as_bits, dtype",
    covering(
        LAYERS[:2] if INTERPRETED else LAYERS,
        VARIANTS,
        [
            pytest.param(False, DTYPES[0], id="fp8"),
            pytest.param(True, DTYPES[0], id="bits"),
            pytest.param(True, torch.float32, id="bits-fp32"),
        ],
        allowed=readable,
    ),
)
def test_weights_alone(
    kernel, launch, config, tokens, experts, top_k, hidden_dim, inter, ids, variant, form, as_bits, dtype
):
    if not as_bits and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU that knows fp8")
    config = config(BLOCK_N=64, **{"BLOCK_K": 32, **variant})
    args = (tokens, experts, top_k, hidden_dim, inter, dtype, DEVICE, ids)
    inputs, weights, scales = fp8_layer(kernel, *args, **form)
    out = run_gemms(launch, inputs, weights, scales, config, False, as_bits)
    exact = kernel.reference.moe_experts(*in_fp64(inputs), *fp8_weights_in_fp64(weights, scales))
    assert error(out, exact) < 2 * torch.finfo(dtype).eps + 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize(
    f"{CASE}, form, dtype",
    covering(
        [
            pytest.param(1, 4, 2, 128, 128, "distinct", id="one-token"),
            pytest.param(5, 3, 2, 97, 47, "sentinels", id="tails-everywhere"),
            pytest.param(4, 2, 2, 272, 176, "any", id="several-blocks"),
            pytest.param(2, 12, 9, 1200, 700, "any", id="several-steps-and-more-slots-than-warps"),
            pytest.param(3, 4, 1, 640, 128, "any", id="one-slot-a-token"),
        ],
        FORMS,
        DTYPES,
    ),
)
def test_decode(kernel, launch, tokens, experts, top_k, hidden_dim, inter, ids, form, dtype):
    config = import_module(f"{kernel.__name__}.launch_configs").DecodeConfig(8, 256, 4)
    args = (tokens, experts, top_k, hidden_dim, inter, dtype, DEVICE, ids)
    (x, index, top_k_weights), weights, scales = fp8_layer(kernel, *args, **form)
    exact = kernel.reference.moe_experts(*in_fp64((x, index, top_k_weights)), *fp8_weights_in_fp64(weights, scales))
    top_k_weights[(index < 0) | (index >= experts)] = float("nan")
    scales = [s.view(torch.uint8) if s.dtype == torch.float8_e8m0fnu else s for s in scales]
    for codes in (weights, [w.view(torch.uint8) for w in weights]):
        a = launch.gate_up_decode_fp8(x, codes[0], scales[0], index, SILU, config)
        out = launch.down_decode_fp8(a, codes[1], scales[1], index, top_k_weights, config)
        assert error(out, exact) < 2 * torch.finfo(dtype).eps + 1e-6


@pytest.mark.gpu
def test_decode_reads_no_scale_of_another_expert(kernel, launch):
    """A skipped slot stands for no expert; a scale that is NaN stays with its own."""
    (x, _, top_k_weights), weights, scales = fp8_layer(kernel, 2, 3, 2, 128, 128, torch.float32, DEVICE)
    scales[0][0], scales[1][0] = float("nan"), float("nan")
    index = torch.tensor([[1, -1], [3, 2]], device=DEVICE)
    config = import_module(f"{kernel.__name__}.launch_configs").DecodeConfig(8, 512, 2)
    a = launch.gate_up_decode_fp8(x, weights[0], scales[0], index, SILU, config)
    assert launch.down_decode_fp8(a, weights[1], scales[1], index, top_k_weights, config).isfinite().all()


@on_triton
def test_every_code_by_its_bits(launch, config):
    """uint8 codes times the unit matrix are what torch makes of them, NaN and subnormals among them."""
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).repeat_interleave(128).view(1, 256, 128)
    x = torch.zeros(16, 128, device=DEVICE)
    x[0, 0] = 1
    scale = torch.ones(1, 2, 1, device=DEVICE)
    offsets = torch.tensor([0, 16], dtype=torch.int32, device=DEVICE)
    schedule = launch.tile_schedule(offsets, 16, 16)
    y = torch.empty(16, 256, device=DEVICE)
    launch.grouped_gemm_fp8(x, None, codes, scale, schedule, "ieee", config(), y)
    expected = codes[0, :, 0].cpu().view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(y[0].cpu(), expected, rtol=0, atol=0, equal_nan=True)


@on_triton
def test_e8m0_scales(launch, config):
    """From 2 ** -127, which is subnormal in fp32, to 2 ** 127; 255 is NaN."""
    exponents = torch.tensor([0, 1, 2, 126, 127, 128, 253, 254, 255], dtype=torch.uint8, device=DEVICE)
    codes = torch.full((9, 128, 128), 2.0**-6, device=DEVICE).to(torch.float8_e4m3fn).view(torch.uint8)
    x = torch.zeros(9, 128, device=DEVICE)
    x[:, 0] = 1
    offsets = torch.arange(10, dtype=torch.int32, device=DEVICE)
    schedule = launch.tile_schedule(offsets, 9, 16)
    y = torch.empty(9, 128, device=DEVICE)
    launch.grouped_gemm_fp8(x, None, codes, exponents.view(9, 1, 1), schedule, "ieee", config(), y)
    expected = exponents.cpu().view(torch.float8_e8m0fnu).float() * 2.0**-6
    torch.testing.assert_close(y[:, 0].cpu(), expected, rtol=0, atol=0, equal_nan=True)


WHOLE = [  # T, E, top_k, H, I, ids, form of the scales
    pytest.param(1, 8, 2, 128, 128, "sentinels", {}, id="decode"),
    pytest.param(20, 8, 2, 256, 128, "sentinels", {"e8m0": True}, id="small-tiles-e8m0"),
    pytest.param(20, 8, 2, 97, 47, "any", {"split": True}, id="small-tiles-without-tma-split-scales"),
    pytest.param(60, 4, 2, 144, 80, "any", {}, id="tall-tiles"),
    pytest.param(230, 3, 2, 128, 192, "zipf", {}, id="two-heights"),
]


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU test_fp8.py runs this path")
@pytest.mark.parametrize("tokens, experts, top_k, hidden_dim, inter, ids, form", WHOLE)
def test_whole_path(kernel, whole, tokens, experts, top_k, hidden_dim, inter, ids, form):
    args = (tokens, experts, top_k, hidden_dim, inter, torch.float16, DEVICE, ids)
    inputs, weights, scales = fp8_layer(kernel, *args, **form)
    exact_weights = fp8_weights_in_fp64(weights, scales)
    exact = kernel.reference.moe_experts(*in_fp64(inputs), *exact_weights)
    projections = [whole.weights.Projection(weight, None, scale) for weight, scale in zip(weights, scales)]
    out = whole.forward.forward(*inputs, *projections, kernel.reference.Gate(), True)
    assert error(out, exact) <= 1.5 * error(w8a8(inputs, exact_weights, round_to_fp8), exact)
    out = whole.forward.forward(*inputs, *projections, kernel.reference.Gate(), False)
    assert error(out, exact) <= 2e-3


@on_triton
@pytest.mark.parametrize("as_gpu", ["sm_90", "sm_80"])
@pytest.mark.parametrize("tokens, experts, top_k, hidden_dim, inter, ids, form", WHOLE[:4])
def test_gradients(kernel, whole, monkeypatch, tokens, experts, top_k, hidden_dim, inter, ids, form, as_gpu):
    monkeypatch.setattr(whole.gpu, "traits", lambda device: whole.gpu.TRAITS[as_gpu])
    args = (tokens, experts, top_k, hidden_dim, inter, DTYPES[0], DEVICE, ids)
    (x, index, top_k_weights), weights, scales = fp8_layer(kernel, *args, **form)
    top_k_weights[(index < 0) | (index >= experts)] = float("nan")
    dout = layer(*args, seed=3)[0]
    path, inputs = ByKind(whole.ops, scales=scales), (top_k_weights, *weights, None, None)
    out, *saved = path.training(x, index, *inputs, *SILU)
    needs_grad = [True, True, False, False, False, False]
    grads = path.backward(dout, None, *inputs, *saved, needs_grad, *SILU)[:2]
    exact_weights = fp8_weights_in_fp64(weights, scales)
    in_torch, inputs = ByKind(whole.ops, where="cpu"), (top_k_weights.double(), *exact_weights, None, None)
    exact, *saved = in_torch.training(x.double(), index, *inputs, *SILU)
    exact_grads = in_torch.backward(dout.double(), None, *inputs, *saved, needs_grad, *SILU)
    for got, expected in zip((out, *grads), (exact, *exact_grads)):
        assert error(got, expected) <= 4 * torch.finfo(DTYPES[0]).eps


@on_triton
@pytest.mark.parametrize("tokens, experts, top_k, hidden_dim, inter, ids, form", WHOLE[1:4])
def test_adapters(kernel, whole, tokens, experts, top_k, hidden_dim, inter, ids, form):
    """Against merged weights: outputs, and gradients of all but the frozen weights."""
    args = (tokens, experts, top_k, hidden_dim, inter, DTYPES[0], DEVICE, ids)
    (x, index, top_k_weights), weights, scales = fp8_layer(kernel, *args, **form)
    dout = layer(*args, seed=3)[0]
    factors = [t.to(DEVICE) for seed, w in enumerate(weights) for t in adapters(w.to(DTYPES[0]), [16], seed)]
    factors = [t if t.shape[0] == experts else t.permute(2, 0, 1).contiguous() for t in factors]
    path, inputs = ByKind(whole.ops, 10, scales), (top_k_weights, *weights, None, None, *factors)
    out, *saved = path.training(x, index, *inputs, *SILU)
    needs_grad = [True, True, False, False, False, False, True, True, True, True]
    grads = path.backward(dout, x, *inputs, *saved, needs_grad, *SILU)
    leaves = [t.double().requires_grad_() for t in (x, top_k_weights, *factors)]
    merged = [w + B @ A for w, A, B in zip(fp8_weights_in_fp64(weights, scales), leaves[2::2], leaves[3::2])]
    exact = kernel.reference.moe_experts(leaves[0], index, leaves[1], *merged)
    exact_grads = torch.autograd.grad(exact, leaves, dout.double())
    for got, expected in zip((out, *grads[:2], *grads[6:]), (exact, *exact_grads)):
        assert error(got, expected) <= 6 * torch.finfo(DTYPES[0]).eps


@on_triton
@pytest.mark.parametrize("quantize_activations", [False, True])
@pytest.mark.parametrize(
    "gate", [{"limit": 0.5}, {"interleaved": True}, {"activation": "swigluoai", "limit": 1.0}], ids=str
)
def test_any_gate_of_ours(kernel, whole, gate, quantize_activations):
    args = (20, 8, 2, 256, 128, DTYPES[0], DEVICE, "sentinels")
    inputs, weights, scales = fp8_layer(kernel, *args)
    exact_weights = fp8_weights_in_fp64(weights, scales)
    exact = kernel.reference.moe_experts(*in_fp64(inputs), *exact_weights, **gate)
    projections = [whole.weights.Projection(weight, None, scale) for weight, scale in zip(weights, scales)]
    out = whole.forward.forward(*inputs, *projections, kernel.reference.Gate(**gate), quantize_activations)
    quantized = quantize_activations and "interleaved" not in gate
    assert error(out, exact) <= (0.1 if quantized else 2 * torch.finfo(DTYPES[0]).eps)


@on_triton
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_grouped_gemm(kernel, whole, form, transposed):
    inputs, weights, scales = fp8_layer(kernel, 40, 5, 2, 272, 176, DTYPES[0], DEVICE, "any", **form)
    offsets = torch.tensor([0, 3, 3, 30, 31, 36], dtype=torch.int32, device=DEVICE)
    for weight, scale, exact in zip(weights, scales, fp8_weights_in_fp64(weights, scales)):
        exact = exact.mT if transposed else exact
        x = layer(40, 1, 1, exact.shape[2], 1)[0].to(DEVICE, DTYPES[0])
        projection = whole.weights.Projection(weight, None, scale)
        y = whole.blocks._grouped_gemm_on_gpu(x, projection, offsets, transposed)
        expected = kernel.reference.grouped_gemm(x.double(), exact, offsets)
        assert error(y, expected) <= 4 * torch.finfo(DTYPES[0]).eps and not y[36:].any()
