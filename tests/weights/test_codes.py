"""`moe_experts` over weights in codes: what holds for each format of them."""

from typing import Callable, NamedTuple

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from cases import in_turn
from oracle import (
    DTYPES,
    dequantized,
    dequantized_fp4,
    error,
    fp4_layer,
    fp8_layer,
    fp8_weights_in_fp64,
    in_fp64,
    layer,
    variant_of,
)
from suite import COMPILE_BACKENDS

pytestmark = pytest.mark.usefixtures("one_thread")


class Format(NamedTuple):
    layer: Callable
    in_fp64: Callable  # both weights, both scales -> weights
    dequantized: Callable  # one of each


def _fp4_weights_in_fp64(weights, scales):
    return [dequantized_fp4(*pair) for pair in zip(weights, scales)]


FP8 = Format(fp8_layer, fp8_weights_in_fp64, dequantized)
FP4 = Format(fp4_layer, _fp4_weights_in_fp64, dequantized_fp4)
FORMATS = [pytest.param(FP8, id="fp8"), pytest.param(FP4, id="fp4")]
CASES = [  # format, T, E, top_k, H, I, ids, form of the scales
    pytest.param(FP8, 0, 4, 2, 128, 128, "distinct", {}, id="fp8-no-tokens"),
    pytest.param(FP8, 1, 64, 8, 256, 128, "distinct", {}, id="fp8-decode"),
    pytest.param(FP8, 1, 4, 1, 97, 47, "distinct", {"e8m0": True}, id="fp8-decode-tails-e8m0"),
    pytest.param(FP8, 3, 100, 5, 272, 208, "sentinels", {}, id="fp8-decode-blocks-across-gate-and-up"),
    pytest.param(FP8, 3, 100, 5, 272, 176, "sentinels", {"split": True}, id="fp8-decode-split-scales"),
    pytest.param(FP8, 33, 4, 1, 256, 384, "distinct", {"e8m0": True}, id="fp8-top_k-1-e8m0"),
    pytest.param(FP8, 100, 7, 2, 97, 47, "any", {}, id="fp8-tails-everywhere"),
    pytest.param(FP8, 60, 9, 3, 272, 208, "zipf", {"e8m0": True}, id="fp8-blocks-across-gate-and-up-e8m0"),
    pytest.param(FP8, 60, 9, 3, 272, 176, "zipf", {"split": True}, id="fp8-split-scales"),
    pytest.param(FP8, 300, 5, 3, 256, 128, "one", {}, id="fp8-all-on-one-expert"),
    pytest.param(FP8, 300, 7, 6, 128, 64, "sentinels", {"split": True, "e8m0": True}, id="fp8-sentinels-split-e8m0"),
    pytest.param(FP8, 500, 4, 4, 128, 256, "distinct", {}, id="fp8-every-expert-sees-every-token"),
    pytest.param(FP4, 0, 4, 2, 128, 128, "distinct", {}, id="fp4-no-tokens"),
    pytest.param(FP4, 1, 64, 8, 256, 128, "distinct", {}, id="fp4-decode"),
    pytest.param(FP4, 1, 4, 1, 32, 32, "distinct", {"form": "fp32"}, id="fp4-decode-one-group"),
    pytest.param(FP4, 3, 100, 5, 288, 224, "sentinels", {"form": "uint8"}, id="fp4-decode-sentinels-uint8"),
    pytest.param(FP4, 1, 128, 12, 544, 96, "sentinels", {}, id="fp4-decode-more-slots-than-warps"),
    pytest.param(FP4, 33, 4, 1, 256, 384, "distinct", {"form": "fp32"}, id="fp4-top_k-1-fp32"),
    pytest.param(FP4, 100, 7, 2, 96, 32, "any", {}, id="fp4-tails-everywhere"),
    pytest.param(FP4, 60, 9, 3, 288, 224, "zipf", {"form": "uint8"}, id="fp4-zipf-uint8"),
    pytest.param(FP4, 300, 5, 3, 256, 128, "one", {}, id="fp4-all-on-one-expert"),
    pytest.param(FP4, 500, 4, 4, 128, 256, "sentinels", {"form": "fp32"}, id="fp4-many-rows-sentinels"),
]
CASE = "weights_in, tokens, experts, top_k, hidden_dim, inter, ids, form"


def run(kernel, inputs, weights, scales, **options):
    return kernel.moe_experts(*inputs, *weights, gate_up_proj_scale=scales[0], down_proj_scale=scales[1], **options)


@pytest.mark.parametrize(f"{CASE}, dtype", in_turn(CASES))
def test_outputs(kernel, device, weights_in, tokens, experts, top_k, hidden_dim, inter, ids, form, dtype):
    args = (tokens, experts, top_k, hidden_dim, inter, dtype, device, ids)
    inputs, weights, scales = weights_in.layer(kernel, *args, **form)
    exact = kernel.reference.moe_experts(*in_fp64(inputs), *weights_in.in_fp64(weights, scales))
    outs = [run(kernel, inputs, weights, scales, quantize_activations=False) for _ in range(2)]
    assert outs[0].dtype == dtype and outs[0].shape == exact.shape
    assert error(outs[0], exact) <= 2 * torch.finfo(dtype).eps + 2e-6
    assert torch.equal(*outs)


@pytest.mark.parametrize("tokens", [2, 70])
@pytest.mark.parametrize("name", ["gpt-oss", "deepseek-v4", "interleaved"])
@pytest.mark.parametrize("weights_in", FORMATS)
def test_biases_limits_and_interleaved_gates(kernel, device, weights_in, name, tokens):
    """As over dense weights; biases have gradients."""
    inputs, weights, scales = weights_in.layer(kernel, tokens, 9, 3, 128, 96, torch.float32, device, "sentinels")
    (*exact_inputs, exact_gate_up, exact_down), options = variant_of(
        name, in_fp64([*inputs, *weights_in.in_fp64(weights, scales)])
    )
    biases = {name: options.pop(name) for name in list(options) if "bias" in name}
    dout = torch.randn_like(inputs[0])

    def gradients(function, x, index, top_k_weights, biases):
        wanted = [t.detach().requires_grad_() for t in (x, top_k_weights, *biases.values())]
        out = function(wanted[0], index, wanted[1], **dict(zip(biases, wanted[2:])))
        return [out, *torch.autograd.grad(out, wanted, dout.to(out.dtype))]

    def exactly(*inputs, **biases):
        return kernel.reference.moe_experts(*inputs, exact_gate_up, exact_down, **biases, **options)

    def ours(*inputs, **biases):
        return run(kernel, inputs, weights, scales, **biases, **options, quantize_activations=False)

    exact = gradients(exactly, *exact_inputs, biases)
    biases = {name: bias.float() for name, bias in biases.items()}
    for e, found in zip(exact, gradients(ours, *inputs, biases)):
        assert error(found, e) <= 1e-5
    assert error(ours(*inputs, **biases), exact[0]) <= 1e-5  # without gradients, by decode where that is used


@pytest.mark.parametrize("weights_in", FORMATS)
def test_nan_stays_in_its_token(kernel, device, weights_in):
    for tokens in (2, 70):
        (x, index, top_k_weights), weights, scales = weights_in.layer(
            kernel, tokens, 64, 2, 128, 128, torch.bfloat16, device
        )
        expected = run(kernel, (x, index, top_k_weights), weights, scales)
        x[1] = float("nan")
        out = run(kernel, (x, index, top_k_weights), weights, scales)
        assert out[1].isnan().all()
        others = torch.arange(tokens, device=device) != 1
        assert torch.equal(out[others], expected[others])


@pytest.mark.parametrize("weights_in", FORMATS)
def test_skipped_slots_contribute_nothing(kernel, device, weights_in):
    for tokens in (2, 70):
        (x, index, top_k_weights), weights, scales = weights_in.layer(
            kernel, tokens, 64, 2, 128, 128, torch.bfloat16, device
        )
        index[0], top_k_weights[0], x[0] = torch.tensor([-1, 64]), float("nan"), float("nan")
        out = run(kernel, (x, index, top_k_weights), weights, scales)
        assert not out[0].any() and out.isfinite().all()


@pytest.mark.parametrize("weights_in", FORMATS)
def test_autocast(kernel, device, weights_in):
    (x, index, top_k_weights), weights, scales = weights_in.layer(kernel, 40, 4, 2, 256, 128, torch.float32, device)
    biases = {"gate_up_proj_bias": torch.randn(4, 256), "down_proj_bias": torch.randn(4, 256)}
    biases = {name: bias.to(device) for name, bias in biases.items()}
    in_bf16 = {name: bias.bfloat16() for name, bias in biases.items()}
    with torch.autocast(device, dtype=torch.bfloat16):
        out = run(kernel, (x, index, top_k_weights), weights, scales, **biases)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, run(kernel, (x.bfloat16(), index, top_k_weights), weights, scales, **in_bf16))


# --- gradients --------------------------------------------------------------------------------------------------------


def gradients(function, x, top_k_weights, dout):
    x, top_k_weights = (t.detach().requires_grad_() for t in (x, top_k_weights))
    out = function(x, top_k_weights)
    return out, *torch.autograd.grad(out, (x, top_k_weights), dout.to(out.dtype))


@pytest.mark.parametrize(f"{CASE}, dtype", in_turn(CASES[::-1]))  # backwards: of the 16-bit types each case's other
def test_gradients(kernel, device, weights_in, tokens, experts, top_k, hidden_dim, inter, ids, form, dtype):
    args = (tokens, experts, top_k, hidden_dim, inter, dtype, device, ids)
    (x, index, top_k_weights), weights, scales = weights_in.layer(kernel, *args, **form)
    top_k_weights[(index < 0) | (index >= experts)] = float("nan")
    dout = layer(*args, seed=3)[0]
    exact_weights = weights_in.in_fp64(weights, scales)
    exact = gradients(
        lambda x, w: kernel.reference.moe_experts(x, index, w.nan_to_num(), *exact_weights),
        x.double(),
        top_k_weights.double(),
        dout,
    )
    got = gradients(lambda x, w: run(kernel, (x, index, w), weights, scales), x, top_k_weights, dout)
    tolerance = 4 * torch.finfo(dtype).eps + 4e-6
    for of_rows, e in zip(got[:2], exact):
        assert error(of_rows, e) <= tolerance
    # <dout[t], y>: of a few slots the sum may be small beside its terms, which are what was rounded.
    each_slot = x.double().repeat_interleave(top_k, 0), index.view(-1, 1), torch.ones_like(index.view(-1, 1)).double()
    terms = dout.double().repeat_interleave(top_k, 0) * kernel.reference.moe_experts(*each_slot, *exact_weights)
    assert (got[2] - exact[2]).norm() <= tolerance * terms.norm()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("tokens", [3, 700])
@pytest.mark.parametrize("weights_in", FORMATS)
def test_checkpoint(kernel, device, weights_in, tokens, use_reentrant):
    (x, index, top_k_weights), weights, scales = weights_in.layer(
        kernel, tokens, 8, 2, 256, 128, torch.bfloat16, device
    )
    x.requires_grad_()

    def function(x):
        return run(kernel, (x, index, top_k_weights), weights, scales)

    plain, checkpointed = function(x), checkpoint(function, x, use_reentrant=use_reentrant)
    grads = []
    for out in (plain, checkpointed):
        out.backward(torch.ones_like(out))
        grads.append(x.grad)
        x.grad = None
    assert torch.equal(*grads)
    # Few rows without gradients, of a reentrant first pass, sum in another order.
    if tokens == 3 and use_reentrant:
        assert error(checkpointed, plain.double()) <= 4 * torch.finfo(torch.bfloat16).eps
    else:
        assert torch.equal(checkpointed, plain)


@pytest.mark.parametrize("weights_in", FORMATS)
def test_frozen_weights_are_named(kernel, weights_in):
    inputs, weights, scales = weights_in.layer(kernel, 4, 4, 2, 64, 32)
    scales[1] = scales[1].float().requires_grad_()
    with pytest.raises(ValueError, match="down_proj: weights in codes are frozen, expected requires_grad=False"):
        run(kernel, inputs, weights, scales)


@pytest.mark.parametrize("weights_in", FORMATS)
def test_second_derivatives_are_refused(kernel, weights_in):
    (x, index, top_k_weights), weights, scales = weights_in.layer(kernel, 4, 4, 2, 64, 32)
    x.requires_grad_()
    for differentiate in (lambda loss: loss.backward(), lambda loss: torch.autograd.grad(loss, x)):
        out = run(kernel, (x, index, top_k_weights), weights, scales)
        (dx,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives"):
            differentiate(out.sum() + dx.pow(2).sum())


@pytest.mark.parametrize("weights_in", FORMATS)
def test_backward_under_autocast_of_a_forward_that_was_an_op(kernel, weights_in):
    (x, index, top_k_weights), weights, scales = weights_in.layer(kernel, 4, 4, 2, 64, 32)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(run(kernel, (x, index, top_k_weights), weights, scales).sum(), x)
    with FlopCounterMode(display=False):
        out = run(kernel, (x, index, top_k_weights), weights, scales)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("weights_in", FORMATS)
def test_torch_compile(kernel, device, weights_in, requires_grad):
    compiled = torch.compile(
        lambda *args: run(kernel, args[:3], args[3:5], args[5:]), fullgraph=True, backend=COMPILE_BACKENDS[device]
    )
    for tokens in (5, 70):
        (x, index, top_k_weights), weights, scales = weights_in.layer(kernel, tokens, 8, 2, 128, 64, device=device)
        results = []
        for function in (lambda *args: run(kernel, args[:3], args[3:5], args[5:]), compiled):
            x = x.detach().requires_grad_(requires_grad)
            out = function(x, index, top_k_weights, *weights, *scales)
            results.append([out, *(torch.autograd.grad(out.sum(), x) if requires_grad else ())])
        for a, b in zip(*results):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [[3, 0, 5], [0, 0, 0], [300, 10, 500]], ids=str)
@pytest.mark.parametrize("weights_in", FORMATS)
def test_grouped_gemm(kernel, device, weights_in, sizes, dtype):
    """The building block: rows that no expert owns, NaN here, are zero in result and gradient."""
    (x, *_), (weight, _), (scale, _) = weights_in.layer(kernel, sum(sizes) + 40, 3, 1, 256, 128, dtype, device)
    dy = layer(x.shape[0], 3, 1, 256, 128, dtype, device, seed=1)[0]
    x[sum(sizes) :], dy[sum(sizes) :] = float("nan"), float("nan")
    offsets = torch.tensor([0, *sizes], device=device).cumsum(0).int()
    exact = weights_in.dequantized(weight, scale)
    y = kernel.grouped_gemm(x.requires_grad_(), weight, offsets, scale=scale)
    y.backward(dy)
    assert not y[sum(sizes) :].any() and not x.grad[sum(sizes) :].any()
    for expert, (begin, end) in enumerate(zip(offsets.tolist(), offsets[1:].tolist())):
        for found, rows, w in ((y, x, exact[expert].T), (x.grad, dy, exact[expert])):
            assert error(found[begin:end], rows[begin:end].double() @ w) <= 4 * torch.finfo(dtype).eps + 4e-6
