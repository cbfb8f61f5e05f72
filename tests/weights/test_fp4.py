"""What is special to weights in 4 bits."""

from importlib import import_module

import pytest
import torch
from test_codes import run

from oracle import dequantized_fp4, error, fp4_layer, in_fp64

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("packed", [torch.int8, torch.uint8, "float4_e2m1fn_x2"], ids=str)
@pytest.mark.parametrize("scales_as", [torch.float8_e8m0fnu, torch.uint8, torch.float32], ids=str)
def test_dtypes_of_the_same_numbers(kernel, device, packed, scales_as):
    if packed == "float4_e2m1fn_x2":
        packed = getattr(torch, packed, None) or pytest.skip("torch has no such type")
    inputs, weights, scales = fp4_layer(kernel, 6, 4, 2, 64, 32, device=device)
    expected = run(kernel, inputs, weights, scales)
    weights = [codes.view(packed) for codes in weights]
    scales = [
        s.float() if scales_as.is_floating_point and scales_as.itemsize > 1 else s.view(scales_as) for s in scales
    ]
    assert torch.equal(run(kernel, inputs, weights, scales), expected)


def test_scales_of_any_size(kernel, device):
    """The least and the greatest exponents, of which a product with a code is a number in fp32; and NaN."""
    inputs, weights, _ = fp4_layer(kernel, 40, 4, 2, 64, 32, device=device)
    exponents = [torch.full((4, 64, 2), 127, dtype=torch.uint8), torch.full((4, 64, 1), 127, dtype=torch.uint8)]
    exponents[0][0], exponents[1][0] = 127 + 40, 127 - 60
    exponents[1][2], exponents[1][3, 5] = 1, 255
    exponents = [e.to(device) for e in exponents]
    out = run(kernel, inputs, weights, exponents)
    weights = [dequantized_fp4(*pair) for pair in zip(weights, exponents)]
    exact = kernel.reference.moe_experts(*in_fp64(inputs), *weights)
    assert torch.equal(out.isnan(), exact.isnan()) and exact.isnan().any() and not exact.isnan().all()
    assert error(out.nan_to_num(), exact.nan_to_num()) <= 1e-6


@pytest.mark.parametrize("tokens", [2, 70, 700])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["e8m0", "fp32"])
def test_large_scales_in_16_bits(kernel, device, form, dtype, tokens):
    """Those of weights beyond 16, where 2^126 times a scale is none in fp32."""
    inputs, weights, scales = fp4_layer(kernel, tokens, 9, 2, 256, 128, dtype, device, form=form)
    inputs[0] /= 2**10
    scales = [(s.float() * 2**f).to(s.dtype) for s, f in zip(scales, (8, -4))]
    assert max(s.float().max() for s in scales) > 16
    exact = kernel.reference.moe_experts(*in_fp64(inputs), *(dequantized_fp4(*p) for p in zip(weights, scales)))
    assert error(run(kernel, inputs, weights, scales), exact) <= 2 * torch.finfo(dtype).eps


def test_groups_of_any_magnitude_in_decode(kernel, device):
    """Each of its own, and all of one weight in the sum; a group of zeros, one of the least numbers, infinity."""
    (x, index, top_k_weights), weights, scales = fp4_layer(
        kernel, 2, 64, 4, 256, 128, torch.bfloat16, device, form="uint8"
    )
    magnitude = 12 * torch.arange(8, device=device) - 40
    x *= 2.0 ** magnitude.repeat_interleave(32)
    scales[0] = (127 - magnitude.expand(scales[0].shape)).to(torch.uint8)
    x[0, 64:96], x[0, 128:160] = 0, 2**-133
    exact = kernel.reference.moe_experts(
        *in_fp64((x, index, top_k_weights)), *(dequantized_fp4(*pair) for pair in zip(weights, scales))
    )
    out = run(kernel, (x, index, top_k_weights), weights, scales)
    assert error(out, exact) <= 2 * torch.finfo(torch.bfloat16).eps
    x[1, 40] = float("inf")
    again = run(kernel, (x, index, top_k_weights), weights, scales)
    assert torch.equal(again[0], out[0]) and not again[1].isfinite().any()


def test_scales_that_are_no_numbers_in_decode(kernel, device):
    """Exponent 255 is NaN wherever its row is multiplied, be its codes zeros; of a skipped expert it is nowhere."""
    (x, index, top_k_weights), weights, scales = fp4_layer(
        kernel, 3, 64, 2, 96, 64, torch.bfloat16, device, form="uint8"
    )
    index.copy_(torch.tensor([[7, 9], [9, 11], [64, 11]]))
    scales[0][7, 5, 2] = scales[1][9, 3, 1] = scales[0][0, 0, 0] = 255
    weights[0][7, 5], weights[1][9, 3] = 0, 0
    out = run(kernel, (x, index, top_k_weights), weights, scales)
    assert out[0].isnan().all() and out[1].isnan().nonzero().tolist() == [[3]] and out[2].isfinite().all()


@pytest.mark.parametrize(
    "experts, top_k, hidden_dim, inter, form",
    [
        pytest.param(8, 1, 1024, 512, "e8m0", id="whole-steps"),
        pytest.param(8, 1, 4608, 768, "e8m0", id="x-in-parts"),
        pytest.param(8, 1, 2880, 864, "uint8", id="as-gpt-oss"),
        pytest.param(16, 2, 64, 8448, "fp32", id="a-in-parts"),
    ],
)
def test_decode_of_sizes_that_models_have(kernel, device, experts, top_k, hidden_dim, inter, form):
    args = (1, experts, top_k, hidden_dim, inter, torch.bfloat16, device)
    (x, index, top_k_weights), weights, scales = fp4_layer(kernel, *args, form=form)
    inputs = x, index.int(), top_k_weights
    exact_weights = (dequantized_fp4(*pair) for pair in zip(weights, scales))
    exact = kernel.reference.moe_experts(*in_fp64(inputs), *exact_weights)
    assert error(run(kernel, inputs, weights, scales), exact) <= torch.finfo(torch.bfloat16).eps


def test_outliers_in_decode(kernel, device):
    """That no weight sees: the others lose no more than 2^-14 of them."""
    (x, index, top_k_weights), weights, scales = fp4_layer(kernel, 1, 16, 2, 256, 128, torch.bfloat16, device)
    codes = weights[0].view(torch.uint8)
    codes[..., ::16] &= 0xF0  # column 0 of each 32
    exact_weights = [dequantized_fp4(*pair) for pair in zip(weights, scales)]
    for outlier in (30, 300):
        x[:, ::32] = outlier
        exact = kernel.reference.moe_experts(*in_fp64((x, index, top_k_weights)), *exact_weights)
        out = run(kernel, (x, index, top_k_weights), weights, scales)
        assert error(out, exact) <= 2 * torch.finfo(torch.bfloat16).eps + outlier * 2**-14


@pytest.mark.parametrize("tokens, experts", [(40, 4), (2, 64)])
def test_strides(kernel, device, tokens, experts):
    args = (tokens, experts, 2, 256, 128, torch.bfloat16, device)
    (x, index, top_k_weights), weights, scales = fp4_layer(kernel, *args)
    exact = kernel.reference.moe_experts(
        *in_fp64((x, index, top_k_weights)), *(dequantized_fp4(*pair) for pair in zip(weights, scales))
    )

    def strided(t):
        return t.view(torch.uint8).mT.contiguous().mT.view(t.dtype) if t.element_size() == 1 else t.mT.contiguous().mT

    def padded(t):
        return torch.nn.functional.pad(t.view(torch.uint8), (0, 3)).view(t.dtype)[..., :-3]

    for inputs in (
        ((strided(x), strided(index), strided(top_k_weights)), weights, scales),
        ((x, index, top_k_weights), weights, [strided(s) for s in scales]),
        ((x, index, top_k_weights), [strided(w) for w in weights], scales),
        ((x, index, top_k_weights), [padded(w) for w in weights], scales),
    ):
        # Not bit by bit: a CPU's GEMM sums other layouts in another order.
        assert error(run(kernel, *inputs), exact) <= 2 * torch.finfo(torch.bfloat16).eps


def test_bad_input_is_named(kernel):
    inputs, (gate_up_proj, down_proj), (up_scale, down_scale) = fp4_layer(kernel, 4, 4, 2, 64, 96)
    fp8, fp8_scale = kernel.quantize_fp8(torch.randn(4, 64, 96))

    def call(gate_up_proj=gate_up_proj, down_proj=down_proj, up_scale=up_scale, down_scale=down_scale, **options):
        return run(kernel, inputs, (gate_up_proj, down_proj), (up_scale, down_scale), **options)

    call(block_size=(1, 32))
    for kind, message, changes in [
        (
            ValueError,
            r"block_size: expected \(1, 32\) with weights in 4 bits, got \(64, 64\)",
            {"block_size": (64, 64)},
        ),
        (ValueError, "down_proj_scale: expected a scale for each block.*got None", {"down_scale": None}),
        (TypeError, "down_proj: expected torch.int8 or torch.uint8", {"down_proj": fp8, "down_scale": fp8_scale}),
        (TypeError, "gate_up_proj_scale: expected torch.float8_e8m0fnu or", {"up_scale": up_scale.float().half()}),
        (ValueError, r"gate_up_proj_scale: expected \(4, 192, 2\) to fit gate_up_proj", {"up_scale": down_scale}),
        (
            ValueError,
            r"gate_up_proj: expected \(E, 2I, 64\) to fit hidden_states, got \(4, 192, 48\) in bytes \(4, 192, 24\)",
            {"gate_up_proj": gate_up_proj[..., :24]},
        ),
        (ValueError, r"down_proj: expected \(4, 64, 96\) to fit gate_up_proj", {"down_proj": down_proj[:, :32]}),
        (ValueError, "gate_up_proj: expected on cpu like hidden_states", {"gate_up_proj": gate_up_proj.to("meta")}),
    ]:
        with pytest.raises(kind, match=message):
            call(**changes)


def test_columns_come_in_groups(kernel):
    inputs = torch.randn(3, 48), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    weights = torch.zeros(1, 64, 24, dtype=torch.int8), torch.zeros(1, 48, 16, dtype=torch.int8)
    scales = torch.ones(1, 64, 1), torch.ones(1, 48, 1)
    with pytest.raises(ValueError, match="gate_up_proj: expected columns in groups of 32 in 4 bits, got 48"):
        run(kernel, inputs, weights, scales)


@pytest.mark.parametrize(
    "as_gpu, dtype, fits", [("sm_80", "bfloat16", True), ("sm_80", "float32", False), ("gfx950", "bfloat16", False)]
)
def test_where_kernels_multiply_from_registers(kernel, monkeypatch, as_gpu, dtype, fits):
    fp4, gpu = (import_module(f"{kernel.__name__}.{name}") for name in ("weights.fp4", "gpu"))
    monkeypatch.setattr(gpu, "traits", lambda device: gpu.TRAITS[as_gpu])
    x, codes = torch.empty(8, 64, dtype=getattr(torch, dtype)), torch.empty(2, 64, 32, dtype=torch.uint8)
    assert fp4._fits_registers(x, codes) == fits


@pytest.mark.parametrize(
    "changes, ordered",
    [
        ({}, True),
        ({"rows": 4}, False),  # a row an expert: few rows have a kernel of their own
        ({"as_gpu": "sm_80"}, False),
        ({"as_gpu": "sm_100"}, False),
        ({"dtype": torch.float32}, False),
        ({"inter": 64}, False),
        ({"change": lambda p: p._replace(scale=p.scale.float())}, False),
        ({"change": lambda p: p._replace(weight=p.weight.mT.contiguous().mT)}, False),
        ({"change": lambda p: p._replace(weight=shifted(p.weight))}, False),
        ({"change": lambda p: p._replace(scale=p.scale.mT.contiguous().mT)}, True),  # copied
        ({"change": lambda p: p._replace(bias=torch.zeros(p.shape[:2]))}, True),
    ],
)
def test_when_columns_are_ordered(kernel, monkeypatch, changes, ordered):
    options = {"rows": 100, "as_gpu": "sm_90", "dtype": torch.bfloat16, "inter": 96, "change": lambda p: p} | changes
    fp4, gpu, weights = (import_module(f"{kernel.__name__}.{name}") for name in ("weights.fp4", "gpu", "weights"))
    monkeypatch.setattr(gpu, "traits", lambda device: gpu.TRAITS[options["as_gpu"]])
    _, codes, scales = fp4_layer(kernel, 1, 4, 1, 128, options["inter"])
    gate_up, down = (weights.Projection(w, scale=s) for w, s in zip(codes, scales))
    for pair in ((gate_up, options["change"](down)), (options["change"](gate_up), down)):
        plan = fp4.plan(options["rows"], *pair, kernel.reference.Gate(), options["dtype"], False)
        assert plan.ordered == ordered and plan.gathered and plan.gate_up == plan.down


def shifted(codes):
    """At an address that TMA cannot read."""
    memory = codes.new_empty(codes.numel() + 8)
    return memory[8:].view(codes.shape).copy_(codes)


def test_codes_without_scales(kernel):
    inputs, weights, _ = fp4_layer(kernel, 4, 4, 2, 64, 32)
    with pytest.raises(TypeError, match="gate_up_proj: expected torch.float32 like hidden_states, got torch.int8"):
        kernel.moe_experts(*inputs, *weights)


def test_bad_input_of_grouped_gemm_is_named(kernel):
    x, offsets = torch.randn(4, 64), torch.tensor([0, 4], dtype=torch.int32)
    codes, scale = kernel.quantize_fp4(torch.randn(1, 32, 64))
    kernel.grouped_gemm(x, codes, offsets, scale=scale)
    for kind, message, changes in [
        (TypeError, "weight: expected torch.float8_e4m3fn", {"weight": torch.zeros(1, 32, 64, dtype=torch.int16)}),
        (TypeError, "^scale: expected torch.float8_e8m0fnu or", {"scale": scale.float().half()}),
        (ValueError, r"^scale: expected \(1, 32, 2\) to fit weight, got", {"scale": scale[:, :, :1]}),
        (ValueError, r"got \(1, 32, 32\) in bytes \(1, 32, 16\) of two", {"weight": codes[:, :, :16]}),
        (ValueError, "weight: expected on cpu like x", {"weight": codes.to("meta")}),
        (TypeError, "weight: expected torch.float32 like x, got torch.int8", {"scale": None}),
    ]:
        with pytest.raises(kind, match=message):
            kernel.grouped_gemm(**{"x": x, "weight": codes, "expert_offsets": offsets, "scale": scale} | changes)
