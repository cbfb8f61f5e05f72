"""`quantize_fp4`: the nearest of the numbers that there are, by the rule of the specification, and what it refuses."""

import re

import pytest
import torch

from oracle import dequantized_fp4

pytestmark = pytest.mark.usefixtures("one_thread")

NUMBERS = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(128, 128), (1, 32), (97, 320), (2, 3, 5, 64), (2, 0, 32), (0, 4, 32), (3, 4, 0)])
def test_the_nearest(kernel, device, shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    codes, scale = kernel.quantize_fp4(weight)
    assert codes.dtype == torch.int8 and codes.shape == (*shape[:-1], shape[-1] // 2)
    assert scale.dtype == torch.float8_e8m0fnu and scale.shape == (*shape[:-1], shape[-1] // 32)
    if not codes.numel():
        return
    stacked = [t.reshape(-1, *t.shape[-2:]) for t in (codes, scale, weight)]
    back, weight = dequantized_fp4(*stacked[:2]), stacked[2].double()
    groups, exact = back.unflatten(2, (-1, 32)), weight.unflatten(2, (-1, 32))
    scales = stacked[1].double()[..., None]
    assert torch.equal(scales, 2.0 ** (exact.abs().amax(3, keepdim=True).log2().floor() - 2))
    numbers = torch.tensor(NUMBERS + [-n for n in NUMBERS], dtype=torch.float64, device=device)
    best = (exact[..., None] / scales[..., None] - numbers).abs().amin(-1)
    assert torch.equal((exact / scales - groups / scales).abs(), best)


def test_ties_go_to_the_even_code(kernel, device):
    middles = [(a + b) / 2 for a, b in zip(NUMBERS, NUMBERS[1:])]
    weight = torch.zeros(1, 1, 32, device=device)
    weight[0, 0, : len(middles)] = torch.tensor(middles)
    weight[0, 0, 8 : 8 + len(middles)] = -torch.tensor(middles)
    weight[0, 0, 16:19] = torch.tensor([6.0, 7.9, -7.9])  # 7.9: the same power of two as 6, and beyond it
    back = dequantized_fp4(*kernel.quantize_fp4(weight))[0, 0]
    expected = torch.tensor([0, 1, 1, 2, 2, 4, 4], dtype=torch.float64, device=device)
    assert torch.equal(back[:7], expected) and torch.equal(back[8:15], -expected)
    assert back[16:19].tolist() == [6, 6, -6]


def test_magnitudes_of_all_kinds(kernel, device):
    weight = torch.zeros(6, 1, 32, device=device)
    weight[1], weight[2], weight[3], weight[4] = 1e-45, 1e-40, 3.4e38, 2.0**-126
    weight[5, 0, 0], weight[5, 0, 1] = 1000, 1e-6
    codes, scale = kernel.quantize_fp4(weight)
    back = dequantized_fp4(codes, scale)
    assert back.isfinite().all() and not back[0].any()
    assert ((back[3:5] - weight[3:5].double()).abs() <= weight[3:5].double() / 4).all()
    assert (back[1:3] - weight[1:3].double()).abs().max() <= 2.0**-128  # half a step of the least scale
    assert back[5, 0, :2].tolist() == [768, 0]  # 6 * 2^7


def test_strides(kernel):
    weight = torch.randn(3, 64, 96)
    for a, b in zip(kernel.quantize_fp4(weight.mT), kernel.quantize_fp4(weight.mT.contiguous())):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_equals_the_reference(kernel):
    """What plain PyTorch reads out of codes is what stands there, number by number."""
    reference = kernel.weights.fp4.dequantize
    codes = torch.arange(-128, 128, dtype=torch.int8).view(1, 16, 16)
    for scale in (torch.randint(1, 254, (1, 16, 1), dtype=torch.uint8), torch.rand(1, 16, 1)):
        exact = dequantized_fp4(codes, scale)[0]
        assert torch.equal(reference(codes[0], scale[0], torch.float64), exact)
        assert torch.equal(reference(codes[0], scale[0], torch.bfloat16), exact.bfloat16())


@pytest.mark.parametrize("shape", [(200, 128), (2, 3, 200, 128)])
@pytest.mark.parametrize("value, name", [(float("inf"), "inf"), (float("nan"), "nan")])
def test_the_first_number_that_is_none(kernel, device, shape, value, name):
    weight = torch.zeros(shape, device=device, dtype=torch.bfloat16)
    first = (*(1 for _ in shape[:-2]), 3, 127)
    weight[first] = value
    weight[(*first[:-2], 100, 2)] = float("nan")
    with pytest.raises(ValueError, match=re.escape(f"weight: expected finite numbers, got {name} at {first}")):
        kernel.quantize_fp4(weight)
    assert kernel.quantize_fp4(weight.to("meta"))[0].is_meta


def test_bad_input(kernel):
    with pytest.raises(TypeError, match="weight: expected a float dtype, got torch.int64"):
        kernel.quantize_fp4(torch.ones(2, 32, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"weight: expected \(\.\.\., N, K\), got \(32,\)"):
        kernel.quantize_fp4(torch.ones(32))
    with pytest.raises(ValueError, match=r"with K a multiple of 32, got \(2, 48\)"):
        kernel.quantize_fp4(torch.ones(2, 48))
