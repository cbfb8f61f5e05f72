"""Shared experts in the launches of decode, and their result as an addend elsewhere: on a GPU, or interpreted."""

from importlib import import_module

import pytest
import torch

from cases import covering
from interpreted import DEVICE, DTYPES, INTERPRETED, on_triton, under_the_interpreter
from oracle import (
    assert_as_good_as_torch,
    dequantized_fp4,
    error,
    fp4_layer,
    fp8_layer,
    fp8_weights_in_fp64,
    gate_of,
    in_fp64,
    layer,
    shared_weights,
    variant_of,
)

test_under_the_interpreter = under_the_interpreter(__file__)

SIZES = [  # T, E, top_k, H, I, Is, ids, activation
    pytest.param(1, 4, 2, 64, 40, 40, "distinct", "silu", id="Is-is-I"),
    pytest.param(2, 9, 8, 32, 16, 32, "distinct", "gelu", id="Is-is-2I"),
    pytest.param(5, 3, 1, 97, 31, 23, "sentinels", "gelu_pytorch_tanh", id="Is-below-I-and-tails-everywhere"),
    pytest.param(2, 3, 2, 72, 16, 67, "sentinels", "silu", id="Is-in-five-rows-of-programs"),
    pytest.param(5, 3, 2, 33, 12, 1, "sentinels", "relu", id="Is-is-1"),
]
CASE = "tokens, experts, top_k, hidden_dim, inter, shared_inter, ids, activation"
ALL_DTYPES = DTYPES if INTERPRETED else [*DTYPES, torch.float16]
GATED = [pytest.param(gated, id="gated" if gated else "plain") for gated in (False, True)]


@pytest.fixture(scope="module")
def decode(kernel, launch):
    """(config, gate, the layer's five tensors, biases, shared) -> (T, H)."""

    def decode(config, gate, x, index, weights, gate_up_proj, down_proj, biases=(None, None), shared=None):
        a = launch.gate_up_decode(x, gate_up_proj, index, gate, config, biases[0], shared)
        return launch.down_decode(a, down_proj, index, weights, config, biases[1], shared)

    return decode


@pytest.fixture(scope="module")
def decode_config(kernel):
    return import_module(f"{kernel.__name__}.launch_configs").DecodeConfig


@on_triton
@pytest.mark.parametrize(f"{CASE}, gated, margin, dtype", covering(SIZES, GATED, [0, 3], ALL_DTYPES))
def test_decode(
    kernel,
    decode,
    decode_config,
    tokens,
    experts,
    top_k,
    hidden_dim,
    inter,
    shared_inter,
    ids,
    activation,
    gated,
    margin,
    dtype,
):
    """margin: between rows of all that may have one."""
    args = layer(tokens, experts, top_k, hidden_dim + margin, inter, dtype, DEVICE, ids)
    x, index, weights, gate_up_proj, down_proj = args
    args = x[:, :hidden_dim], index, weights, gate_up_proj[..., :hidden_dim], down_proj[:, :hidden_dim]
    weights[(index < 0) | (index >= experts)] = float("nan")
    shared = shared_weights(hidden_dim, shared_inter, dtype, DEVICE, gated, margin)
    gate, SharedExperts = kernel.reference.Gate(activation), kernel.reference.SharedExperts
    out = decode(decode_config(8, 64, 4), gate, *args, shared=SharedExperts(*shared))
    exact = kernel.reference.moe_experts(*in_fp64(args), activation, shared=SharedExperts(*in_fp64(shared)))
    expected = kernel.reference.moe_experts(*args, activation, shared=SharedExperts(*shared))
    assert_as_good_as_torch(out, expected, exact)


@on_triton
@pytest.mark.parametrize("variant", ["aria", "interleaved"])
@pytest.mark.parametrize("blocks", [(8, 32), (32, 32)], ids=str)
def test_decode_of_variants(kernel, decode, decode_config, variant, blocks):
    """Of the routed experts alone: transposed, or with biases and interleaved rows."""
    args, kwargs = variant_of(variant, layer(2, 3, 2, 64, 40, DTYPES[0], DEVICE, "sentinels"))
    shared = shared_weights(64, 56, DTYPES[0], DEVICE)
    SharedExperts = kernel.reference.SharedExperts
    biases = kwargs.get("gate_up_proj_bias"), kwargs.get("down_proj_bias")
    config, gate = decode_config(*blocks, 4), gate_of(kernel.reference, kwargs)
    out = decode(config, gate, *args, biases, SharedExperts(*shared))
    exact = kernel.reference.moe_experts(*in_fp64(args), **in_fp64(kwargs), shared=SharedExperts(*in_fp64(shared)))
    expected = kernel.reference.moe_experts(*args, **kwargs, shared=SharedExperts(*shared))
    assert_as_good_as_torch(out, expected, exact)


@on_triton
def test_a_token_without_experts_has_the_shared_ones(kernel, decode, decode_config):
    x, index, weights, *experts = layer(2, 3, 2, 32, 16, DTYPES[0], DEVICE)
    index[1], weights[1] = -1, float("nan")
    shared, gate = kernel.reference.SharedExperts(*shared_weights(32, 24, DTYPES[0], DEVICE)), kernel.reference.Gate()
    out = decode(decode_config(8, 32, 4), gate, x, index, weights, *experts, shared=shared)
    exact = kernel.reference.SharedExperts(*in_fp64(shared)).of(x.double(), gate)
    assert_as_good_as_torch(out[1], shared.of(x, gate)[1], exact[1])


ALONE = [  # T, H, Is
    pytest.param(1, 64, 40, id="one-token"),
    pytest.param(3, 97, 23, id="tails-everywhere"),
    pytest.param(17, 33, 1, id="Is-is-1"),
    pytest.param(64, 300, 150, id="the-most-tokens"),
]


@on_triton
@pytest.mark.parametrize("gated", GATED)
@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
@pytest.mark.parametrize("tokens, hidden_dim, inter", ALONE)
def test_alone(kernel, launch, tokens, hidden_dim, inter, activation, gated):
    """Of hidden states and weights whose rows are further apart than they are long."""
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    x = torch.randn(tokens, hidden_dim + 3, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    x = x[:, :hidden_dim]
    shared = kernel.reference.SharedExperts(*shared_weights(hidden_dim, inter, dtype, DEVICE, gated, margin=5))
    gate = kernel.reference.Gate(activation)
    out = launch.shared_experts(x, shared, gate)
    exact = kernel.reference.SharedExperts(*in_fp64(shared)).of(x.double(), gate)
    assert_as_good_as_torch(out, shared.of(x, gate), exact)


@on_triton
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("top_k", [1, 3])
def test_combine_with_an_addend(kernel, launch, top_k, dtype):
    tokens, hidden_dim = 7, 97
    generator = torch.Generator().manual_seed(0)
    y, addend = (torch.randn(n, hidden_dim + 5, generator=generator) for n in (tokens * top_k, tokens))
    y, addend = y[:, :hidden_dim].contiguous().to(DEVICE, dtype), addend.to(DEVICE, dtype)[:, :hidden_dim]
    weights = torch.rand(tokens, top_k, generator=generator).to(DEVICE)
    positions = torch.randperm(tokens * top_k, generator=generator).int().to(DEVICE)
    positions[::4], weights.view(-1)[::4] = -1, float("nan")
    out = launch.combine(y, positions, weights, addend)
    exact = kernel.reference.combine(y.double(), positions, weights.double()) + addend.double()
    assert_as_good_as_torch(out, exact.to(dtype), exact)


WHOLE = [  # T, E, top_k
    pytest.param(1, 8, 2, id="decode"),
    pytest.param(12, 6, 2, id="small-tiles"),
    pytest.param(24, 4, 1, id="one-slot-a-token"),
]


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU tests/experts/test_shared_experts.py runs this path")
@pytest.mark.parametrize("gated", GATED)
@pytest.mark.parametrize("tokens, experts, top_k", WHOLE)
def test_whole_path(kernel, whole, monkeypatch, tokens, experts, top_k, gated):
    dense = import_module(f"{kernel.__name__}.weights.dense")
    readable = dense.as_readable  # Gluon has no interpreter; `whole` leaves decode out, which in dense is Triton
    monkeypatch.setattr(dense, "as_readable", lambda *a: readable(*a)._replace(WARP_SPECIALIZED=False))
    monkeypatch.setattr(dense.tuning, "is_decode", lambda rows, tokens, *_: tokens == 1)
    monkeypatch.setattr(whole.gpu, "device_name", lambda device: "")
    args = layer(tokens, experts, top_k, 64, 40, DTYPES[0], DEVICE, "sentinels")
    shared, SharedExperts = shared_weights(64, 56, DTYPES[0], DEVICE, gated), kernel.reference.SharedExperts
    projections = map(whole.weights.Projection, args[3:])
    out = whole.forward.forward(*args[:3], *projections, kernel.reference.Gate(), False, SharedExperts(*shared))
    exact = kernel.reference.moe_experts(*in_fp64(args), shared=SharedExperts(*in_fp64(shared)))
    assert_as_good_as_torch(out, kernel.reference.moe_experts(*args, shared=SharedExperts(*shared)), exact)


@on_triton
@pytest.mark.parametrize("form", ["fp8", "fp4"])
@pytest.mark.parametrize("tokens, experts, top_k", WHOLE)
def test_whole_path_of_codes(kernel, whole, tokens, experts, top_k, form):
    make, exact_of = {
        "fp8": (fp8_layer, fp8_weights_in_fp64),
        "fp4": (fp4_layer, lambda *pairs: [dequantized_fp4(*pair) for pair in zip(*pairs)]),
    }[form]
    inputs, weights, scales = make(kernel, tokens, experts, top_k, 128, 64, DTYPES[0], DEVICE, "sentinels")
    shared, SharedExperts = shared_weights(128, 40, DTYPES[0], DEVICE), kernel.reference.SharedExperts
    shared[2] *= 16  # as large as the routed part
    projections = [whole.weights.Projection(weight, None, scale) for weight, scale in zip(weights, scales)]
    out = whole.forward.forward(*inputs, *projections, kernel.reference.Gate(), False, SharedExperts(*shared))
    exact = kernel.reference.moe_experts(
        *in_fp64(inputs), *exact_of(weights, scales), shared=SharedExperts(*in_fp64(shared))
    )
    assert error(out, exact) <= 2 * torch.finfo(DTYPES[0]).eps


@on_triton
@pytest.mark.parametrize("tokens, top_k", [(0, 2), (3, 0)])
def test_nothing_is_routed(kernel, whole, tokens, top_k):
    args = layer(tokens, 4, top_k, 64, 40, DTYPES[0], DEVICE)
    shared, gate = kernel.reference.SharedExperts(*shared_weights(64, 56, DTYPES[0], DEVICE)), kernel.reference.Gate()
    projections = map(whole.weights.Projection, args[3:])
    out = whole.forward.forward(*args[:3], *projections, gate, False, shared)
    assert out.equal(shared.of(args[0], gate)) and out.shape == (tokens, 64)
