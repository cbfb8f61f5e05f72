"""`moe_experts` against the fp64 oracle, on the CPU and (marked gpu) on the GPU."""

from importlib import import_module

import pytest
import torch

from cases import covering, in_turn
from flat import ByKind
from oracle import DTYPES, VARIANTS, assert_as_good_as_torch, gate_of, in_fp64, layer, variant_of
from suite import COMPILE_BACKENDS

CASES = [  # T, E, top_k, H, I, ids
    pytest.param(0, 4, 2, 64, 32, "distinct", id="no-tokens"),
    pytest.param(1, 1, 1, 16, 8, "distinct", id="one-token-one-expert"),
    pytest.param(1, 256, 8, 64, 32, "distinct", id="decode"),
    pytest.param(2, 7, 6, 97, 47, "distinct", id="tails-in-N-and-K"),
    pytest.param(7, 4, 4, 64, 32, "distinct", id="every-expert-sees-every-token"),
    pytest.param(64, 64, 64, 32, 16, "distinct", id="top_k-is-E"),
    pytest.param(64, 64, 8, 256, 136, "distinct", id="tail-in-N-with-TMA"),
    pytest.param(100, 256, 1, 64, 32, "distinct", id="most-experts-without-tokens"),
    pytest.param(100, 7, 1, 97, 47, "sentinels", id="one-slot-a-token"),
    pytest.param(800, 4, 1, 128, 64, "sentinels", id="one-slot-a-token-in-tall-tiles"),
    pytest.param(100, 7, 2, 97, 47, "any", id="duplicate-ids-in-a-row"),
    pytest.param(513, 4, 2, 128, 64, "distinct", id="tall-tiles"),
    pytest.param(513, 64, 6, 128, 72, "zipf", id="skewed"),
    pytest.param(513, 7, 2, 64, 32, "one", id="all-on-one-expert"),
    pytest.param(513, 7, 6, 97, 47, "sentinels", id="sentinels"),
    pytest.param(7, 4, 0, 64, 32, "distinct", id="top_k-0"),
]
CASE = "tokens, experts, top_k, hidden_dim, inter, ids"


@pytest.mark.kernels_ci
@pytest.mark.parametrize(f"{CASE}, dtype", in_turn(CASES))
def test_matches_oracle(kernel, device, tokens, experts, top_k, hidden_dim, inter, ids, dtype):
    args = layer(tokens, experts, top_k, hidden_dim, inter, dtype, device, ids)
    out = kernel.moe_experts(*args)
    assert_as_good_as_torch(out, kernel.reference.moe_experts(*args), kernel.reference.moe_experts(*in_fp64(args)))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
def test_oracle_is_the_equation(kernel, device, activation):
    x, index, weights, gate_up_proj, down_proj = layer(9, 4, 3, 32, 16, torch.float64, ids="sentinels")
    act_fn = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_pytorch_tanh": torch.nn.GELU(approximate="tanh"),
        "relu": torch.relu,
    }[activation]
    expected = torch.zeros_like(x)
    for t in range(9):
        for k in range(3):
            if 0 <= (e := index[t, k]) < 4:
                gate, up = (gate_up_proj[e] @ x[t]).chunk(2)
                expected[t] += weights[t, k] * (down_proj[e] @ (act_fn(gate) * up))
    args = [x, index, weights, gate_up_proj, down_proj]
    torch.testing.assert_close(kernel.reference.moe_experts(*args, activation), expected)
    args = [t.float() if t.is_floating_point() else t for t in args]
    out = kernel.moe_experts(*(t.to(device) for t in args), activation)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-4, atol=1e-5)


def test_cpu_work_follows_the_rows_of_this_rank(kernel, record):
    """7 of 8 slots belong to other ranks; the kernels' own work: test_backward_kernels.py."""
    x, _, weights, *experts = layer(100, 4, 8, 64, 32, ids="any")
    index = torch.randint(0, 32, (100, 8), generator=torch.Generator().manual_seed(0))
    gemms = record(import_module(f"{kernel.__name__}.reference.experts"), "grouped_linear")
    kernel.moe_experts(x, index, weights, *experts)
    assert [rows.shape[0] for rows, *_ in gemms] == [(index < 4).sum()] * 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_oracle_of_variants_is_the_equation(kernel, device, variant):
    args, kwargs = variant_of(variant, layer(9, 4, 3, 32, 16, torch.float64, ids="sentinels"))
    x, index, weights, gate_up_proj, down_proj = args
    up_bias, down_bias = (
        kwargs.get(f"{name}_bias", torch.zeros(4, 1)).double() for name in ("gate_up_proj", "down_proj")
    )
    limit, alpha = kwargs.get("limit", 1e9), kwargs.get("alpha", 1.702)
    expected = torch.zeros_like(x)
    for t in range(9):
        for k in range(3):
            if 0 <= (e := index[t, k]) < 4:
                z = gate_up_proj[e] @ x[t] + up_bias[e]
                gate, up = (z[::2], z[1::2]) if kwargs.get("interleaved") else (z[:16], z[16:])
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
                if kwargs.get("activation") == "swigluoai":
                    a = gate / (1 + torch.exp(-alpha * gate)) * (up + 1)
                else:
                    act_fn = torch.nn.GELU() if kwargs.get("activation") == "gelu" else torch.nn.SiLU()
                    a = act_fn(gate) * up
                expected[t] += weights[t, k] * (down_proj[e] @ a + down_bias[e])
    torch.testing.assert_close(kernel.reference.moe_experts(*args, **kwargs), expected)
    args, kwargs = ([t.float() if t.is_floating_point() else t for t in args], dict(kwargs))
    kwargs = {name: t.float().to(device) if "bias" in name else t for name, t in kwargs.items()}
    out = kernel.moe_experts(*(t.to(device) for t in args), **kwargs)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_may_be_int32_or_int64(kernel, device, dtype):
    x, index, *rest = layer(33, 7, 2, 64, 32, device=device, ids="sentinels")
    out = kernel.moe_experts(x, index.to(dtype), *rest)
    assert torch.equal(out, kernel.moe_experts(x, index, *rest))


@pytest.mark.parametrize("outside", [-1, -7, 4, 2**31 - 1])
def test_skipped_slots_contribute_nothing(kernel, device, outside):
    x, index, weights, *projs = layer(65, 4, 2, 64, 32, device=device)
    index[::3, 1] = outside
    index[5] = outside
    weights[(index < 0) | (index >= 4)] = float("nan")
    out = kernel.moe_experts(x, index, weights, *projs)
    assert not out[5].any()
    # The same slots on a real expert at weight zero add exactly 0.0.
    skipped = weights.isnan()
    expected = kernel.moe_experts(x, index.masked_fill(skipped, 0), weights.masked_fill(skipped, 0.0), *projs)
    torch.testing.assert_close(out, expected)


def test_weights_of_one_and_zero(kernel, device):
    x, index, weights, *projs = layer(33, 4, 2, 64, 32, device=device)
    both = kernel.moe_experts(x, index, torch.ones_like(weights), *projs)
    halves = [
        kernel.moe_experts(x, index, torch.tensor(pair, device=device).expand(33, 2), *projs)
        for pair in ([1.0, 0.0], [0.0, 1.0])
    ]
    torch.testing.assert_close(both, halves[0] + halves[1])
    assert not kernel.moe_experts(x, index, torch.zeros_like(weights), *projs).any()


@pytest.mark.parametrize("weights_dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_routing_weights_of_any_float_dtype(kernel, device, weights_dtype):
    x, index, weights, *projs = layer(33, 4, 2, 64, 32, device=device)
    weights = weights.to(weights_dtype)
    torch.testing.assert_close(
        kernel.moe_experts(x, index, weights, *projs), kernel.moe_experts(x, index, weights.float(), *projs)
    )


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_token_spoils_only_itself(kernel, device, dtype, poison):
    x, *rest = layer(100, 4, 2, 64, 32, dtype, device)
    clean = kernel.moe_experts(x, *rest)
    x[41, 3] = poison
    out = kernel.moe_experts(x, *rest)
    others = torch.arange(100, device=device) != 41
    assert not out[41].isfinite().all()
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("tokens", [3, 600])
def test_two_runs_give_the_same_bits(kernel, device, tokens):
    args = layer(tokens, 16, 4, 128, 64, torch.bfloat16, device, "any")
    assert torch.equal(kernel.moe_experts(*args), kernel.moe_experts(*args))


def strided(x):
    """The same values with gaps between the elements of every dimension."""
    wide = x.new_full([2 * n for n in x.shape], 7)
    view = wide[tuple(slice(None, None, 2) for _ in x.shape)]
    return view.copy_(x)


def transposed(x):
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def shifted(x):
    """The same values at an address that no 16-byte access may use."""
    flat = x.new_empty(x.numel() + 1)
    return flat[1:].view(x.shape).copy_(x)


@pytest.mark.parametrize("relayout", [strided, transposed, shifted])
@pytest.mark.parametrize("argument", range(5))
def test_any_strides(kernel, device, argument, relayout):
    args = list(layer(40, 4, 2, 64, 32, torch.bfloat16, device))
    expected = kernel.moe_experts(*args)
    args[argument] = relayout(args[argument])
    torch.testing.assert_close(kernel.moe_experts(*args), expected)


# --- gradients --------------------------------------------------------------------------------------------------------

NAMES = ["hidden_states", "top_k_weights", "gate_up_proj", "down_proj"]
BIASES = ["gate_up_proj_bias", "down_proj_bias"]


def gradients(function, args, trained=NAMES):
    leaves = [t.detach().clone().requires_grad_(n in trained) if t.is_floating_point() else t for n, t in args]
    out = function(*leaves)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    out.backward(seed)
    return {name: leaf.grad for (name, _), leaf in zip(args, leaves)}


def named(args):
    return list(zip(["hidden_states", "top_k_index", "top_k_weights", "gate_up_proj", "down_proj"], args))


@pytest.mark.parametrize(f"{CASE}, dtype", in_turn(CASES[1:-1]))
def test_gradients_match_oracle(kernel, device, tokens, experts, top_k, hidden_dim, inter, ids, dtype):
    args = layer(tokens, experts, top_k, hidden_dim, inter, dtype, device, ids)
    got = gradients(kernel.moe_experts, named(args))
    from_torch = gradients(kernel.reference.moe_experts, named(args))
    exact = gradients(kernel.reference.moe_experts, named(in_fp64(args)))
    for name in NAMES:
        assert_as_good_as_torch(got[name], from_torch[name], exact[name], dtype)


@pytest.mark.parametrize("trained", NAMES)
def test_only_the_wanted_gradient_is_computed(kernel, device, trained):
    args = named(layer(33, 4, 2, 64, 32, device=device))
    every, one = gradients(kernel.moe_experts, args), gradients(kernel.moe_experts, args, [trained])
    torch.testing.assert_close(one[trained], every[trained])
    assert all(one[name] is None for name in NAMES if name != trained)


def test_gradients_are_deterministic(kernel, device):
    args = named(layer(600, 4, 3, 64, 32, torch.bfloat16, device, "any"))
    first, second = (gradients(kernel.moe_experts, args) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


@pytest.mark.parametrize("variant", ["silu", "gelu", "gelu_pytorch_tanh", "relu", *VARIANTS])
def test_explicit_backward_is_the_gradient_of_the_reference(kernel, variant):
    # torch.compile uses this backward on a CPU, and the kernels' tests compare with it.
    args = layer(33, 4, 2, 24, 12, torch.float64, ids="sentinels")
    args, kwargs = variant_of(variant, args) if variant in VARIANTS else (args, {"activation": variant})
    gate = gate_of(kernel.reference, kwargs)
    expected = gradients_of_variant(kernel.reference.moe_experts, args, kwargs)
    dout = torch.randn(33, 24, generator=torch.Generator().manual_seed(1)).double()
    x, index, weights, gate_up_proj, down_proj = args
    biases = [kwargs.get(name) for name in BIASES]
    in_torch = ByKind(import_module(f"{kernel.__name__}.experts.ops"), where="cpu")
    out, *saved = in_torch.training(*args, *biases, *gate)
    torch.testing.assert_close(out, kernel.reference.moe_experts(*args, **kwargs))
    inputs = (dout, x, weights, gate_up_proj, down_proj, *biases)
    needs_grad = [True] * 4 + [bias is not None for bias in biases]
    got = in_torch.backward(*inputs, *saved, needs_grad, *gate)
    for name, grad in zip([*NAMES, *BIASES], got):
        if name in expected:
            torch.testing.assert_close(grad, expected[name])


def gradients_of_variant(function, args, kwargs):
    """As `gradients`, for the biases among the keyword arguments as well."""
    biases = {name: kwargs[name].detach().clone().requires_grad_() for name in BIASES if name in kwargs}
    grads = gradients(lambda *inputs: function(*inputs, **{**kwargs, **biases}), named(args))
    return {**{name: grads[name] for name in NAMES}, **{name: bias.grad for name, bias in biases.items()}}


LAYERS_OF_VARIANTS = [
    pytest.param(1, 64, 8, 64, 32, "distinct", id="decode"),
    pytest.param(100, 16, 2, 97, 47, "sentinels", id="tails-sentinels-and-empty-experts"),
    pytest.param(513, 4, 2, 128, 64, "any", id="tall-tiles"),
]


@pytest.mark.parametrize(
    f"{CASE}, variant, dtype",
    [*covering(CASES[:1], VARIANTS, DTYPES[-1:]), *covering(LAYERS_OF_VARIANTS, VARIANTS, DTYPES)],
)
def test_variants_match_oracle(kernel, device, tokens, experts, top_k, hidden_dim, inter, ids, variant, dtype):
    args, kwargs = variant_of(variant, layer(tokens, experts, top_k, hidden_dim, inter, dtype, device, ids))
    reference = kernel.reference.moe_experts
    out, exact = kernel.moe_experts(*args, **kwargs), reference(*in_fp64(args), **in_fp64(kwargs))
    assert_as_good_as_torch(out, reference(*args, **kwargs), exact)
    got = gradients_of_variant(kernel.moe_experts, args, kwargs)
    from_torch = gradients_of_variant(reference, args, kwargs)
    exact = gradients_of_variant(reference, in_fp64(args), in_fp64(kwargs))
    for name in got:  # those of top_k_weights may be fp32, and are of products that were rounded to dtype
        assert_as_good_as_torch(got[name], from_torch[name], exact[name], dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_under_torch_compile(kernel, device, variant):
    torch.compiler.reset()
    args, kwargs = variant_of(variant, layer(33, 4, 2, 64, 32, device=device, ids="sentinels"))
    compiled = torch.compile(kernel.moe_experts, fullgraph=True, backend=COMPILE_BACKENDS[device])
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args, **kwargs), kernel.moe_experts(*args, **kwargs))
    expected, got = (gradients_of_variant(f, args, kwargs) for f in (kernel.moe_experts, compiled))
    for name in got:
        torch.testing.assert_close(got[name], expected[name])


def test_gradcheck(kernel):
    args = layer(6, 3, 2, 8, 4, torch.float64, ids="sentinels")
    args = [t.double().requires_grad_() if t.is_floating_point() else t for t in args]
    assert torch.autograd.gradcheck(kernel.moe_experts, args)


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [False, True], ids=["inference", "training"])
def test_compiles_into_one_graph(kernel, device, backward):
    torch.compiler.reset()
    compiled = torch.compile(kernel.moe_experts, fullgraph=True, dynamic=True, backend=COMPILE_BACKENDS[device])
    for tokens in (33, 64):
        args = named(layer(tokens, 4, 2, 64, 32, device=device))
        if backward:
            expected, got = gradients(kernel.moe_experts, args), gradients(compiled, args)
            for name in NAMES:
                torch.testing.assert_close(got[name], expected[name])
        else:
            args = [t for _, t in args]
            with torch.no_grad():
                torch.testing.assert_close(compiled(*args), kernel.moe_experts(*args))
