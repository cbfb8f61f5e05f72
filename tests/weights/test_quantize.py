"""`quantize_fp8`: codes and scales that give the weight back, and the numbers that it refuses."""

import re

import pytest
import torch

from oracle import dequantized

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (97, 300), (2, 3, 129, 127), (2, 0, 5), (0, 4, 4)])
def test_quantize(kernel, device, shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    codes, scale = kernel.quantize_fp8(weight)
    assert codes.dtype == torch.float8_e4m3fn and codes.shape == shape
    assert scale.dtype == torch.float32
    assert scale.shape == (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    stacks = (t.flatten(0, -3) if t.ndim > 2 else t[None] for t in (codes, scale, weight))
    for c, s, w in zip(*stacks) if codes.numel() else ():
        back = dequantized(c[None], s[None])[0]
        # Half a step of three mantissa bits, or of the subnormal codes.
        assert ((back - w.double()).abs() <= w.double().abs() / 16 + s.max() * 2**-10).all()
    if codes.numel():
        assert codes.float().abs().max() == 448


def test_quantize_anything(kernel, device):
    weight = torch.zeros(7, 128, 256, device=device)
    weight[1, 3, 4], weight[2], weight[3, 0, 0] = 1e-45, 1e-42, 3.4e38
    weight[5] = torch.linspace(-1e30, 1e30, 256)
    weight[6, :, :128], weight[6, 7, 9] = 1e-6, 1000
    codes, scale = kernel.quantize_fp8(weight)
    back = dequantized(codes, scale)
    assert scale.isfinite().all() and back.isfinite().all()
    assert not back[0].any()
    assert (back - weight.double()).abs().max() <= 3.4e38 / 16
    assert (back[1:3] - weight[1:3].double()).abs().max() < 1e-38
    assert ((back[5] - weight[5].double()).abs() <= weight[5].double().abs() / 16 + 5e27).all()
    assert back[6, 7, 9].item() == pytest.approx(1000, rel=2**-4)


def test_quantize_takes_strides(kernel):
    weight = torch.randn(3, 200, 130)
    for a, b in zip(kernel.quantize_fp8(weight.mT), kernel.quantize_fp8(weight.mT.contiguous())):
        assert torch.equal(a.float(), b.float())


@pytest.mark.parametrize("shape", [(200, 130), (2, 3, 200, 130)])
@pytest.mark.parametrize("value, name", [(float("inf"), "inf"), (float("-inf"), "-inf"), (float("nan"), "nan")])
def test_quantize_names_the_first_number_that_is_none(kernel, device, shape, value, name):
    weight = torch.zeros(shape, device=device, dtype=torch.bfloat16)
    first = (*(1 for _ in shape[:-2]), 3, 129)
    weight[first] = value
    weight[(*first[:-2], 100, 2)] = float("nan")  # in a block before that one, in a row after
    with pytest.raises(ValueError, match=re.escape(f"weight: expected finite numbers, got {name} at {first}")):
        kernel.quantize_fp8(weight)


def test_quantize_takes_what_is_finite_in_fp32(kernel, device):
    weight = torch.full((4, 4), 3.4e38, dtype=torch.float64, device=device)
    assert kernel.quantize_fp8(weight)[1].isfinite().all()
    weight[2, 1] = 1e300
    with pytest.raises(ValueError, match=re.escape("got 1e+300 at (2, 1)")):
        kernel.quantize_fp8(weight)
    assert kernel.quantize_fp8(weight.to("meta"))[0].is_meta


def test_quantize_bad_input(kernel):
    with pytest.raises(TypeError, match="weight: expected a float dtype, got torch.int64"):
        kernel.quantize_fp8(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"weight: expected \(\.\.\., N, K\), got \(3,\)"):
        kernel.quantize_fp8(torch.ones(3))
