"""`topk_router` against a token-by-token oracle and Transformers' own class.

What other routers than DeepSeek-V3's compute is compared with their classes in integration/test_routers.py.
"""

from importlib import import_module

import pytest
import torch
from torch import library

from oracle import (
    ROUTER_FORMS,
    ROUTERS,
    assert_routes,
    decided,
    in_fp64,
    route_by_hand,
    router,
    router_of_form,
)
from suite import COMPILE_BACKENDS
from tiny_models import stock_router

CASE = "experts, num_group, topk_group, top_k, norm"


def op(kernel):
    """What a GPU and torch.compile use when gradients are asked for, with the arguments of `topk_router`."""
    topk_router_op, RouterForm = the_op(kernel), kernel.reference.RouterForm
    return lambda x, weight, correction, *args, bias=None, **options: topk_router_op(
        x, weight, correction, bias, *RouterForm(*args, **options)
    )


def the_op(kernel):
    return import_module(f"{kernel.__name__}.router")._topk_router_op


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, weight_dtype", [
    pytest.param(torch.bfloat16, torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, torch.float16, id="fp16"),
    pytest.param(torch.float32, torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, torch.float32, id="bf16-fp32"),
])  # fmt: skip
@pytest.mark.parametrize("tokens", [0, 1, 17, 70])
@pytest.mark.parametrize(CASE, ROUTERS)
def test_values(kernel, device, experts, num_group, topk_group, top_k, norm, tokens, dtype, weight_dtype):
    tensors = router(tokens, experts, 97, dtype, weight_dtype, device)
    args = (top_k, num_group, topk_group, norm, 2.5)
    tensors[0] = decided(*tensors, *args)
    results = kernel.topk_router(*tensors, *args)
    assert_routes(results, route_by_hand(*tensors, *args))

    if top_k <= topk_group * experts // num_group:  # else Transformers fills up with experts in no certain order
        logits, weights, ids = stock_router(*tensors[1:], *args)(tensors[0])
        order = [t.argsort(dim=1) for t in (ids, results[2])]
        assert torch.equal(ids.gather(1, order[0]), results[2].gather(1, order[1]))
        torch.testing.assert_close(results[0], logits, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(results[1].gather(1, order[1]), weights.gather(1, order[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 70])
@pytest.mark.parametrize("name", ROUTER_FORMS)
def test_forms(kernel, device, name, tokens, dtype):
    tensors, args, options = router_of_form(name, tokens, 96, dtype, device)
    if tensors[2] is not None:  # elsewhere equal choices are exactly so, and the lower index wins
        tensors[0] = decided(*tensors, *args, **options)
    assert_routes(kernel.topk_router(*tensors, *args, **options), route_by_hand(*tensors, *args, **options), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp64_and_16_bits(kernel, dtype):
    """Of fp64 operands everything is in fp64, but for what is asked for in another dtype."""
    tensors = in_fp64(router(9, 12, 16))
    args = (4, 3, 2, True, 2.5)
    assert [x.dtype for x in kernel.topk_router(*tensors, *args)] == [torch.float64, torch.float64, torch.int64]
    logits, weights, _ = kernel.topk_router(*tensors, *args, product_dtype=dtype, weights_dtype=dtype)
    assert logits.dtype == torch.float64 and weights.dtype == dtype
    assert torch.equal(logits, (tensors[0] @ tensors[1].T).to(dtype).double())


def of_logits(kernel, logits, top_k, device, **options):
    """(weights, ids) of a token with these logits."""
    x, weight = torch.zeros(1, 16, device=device), torch.zeros(len(logits), 16, device=device)
    bias = torch.tensor(logits, device=device)
    results = kernel.topk_router(x, weight, None, top_k, norm_topk_prob=False, bias=bias, **options)
    return [result.cpu()[0] for result in results[1:]]


@pytest.mark.parametrize("scoring", ["softmax", "sqrtsoftplus", "sigmoid"])
def test_large_logits(kernel, device, scoring):
    """Exact where exp overflows, and where 1 + exp rounds to 1; a GPU has no denormals."""
    logits = [-85.0, -30.0, -1.0, 0.0, 1.0, 30.0, 200.0]
    weights, ids = of_logits(kernel, logits, 7, device, scoring=scoring)
    exact = torch.tensor(logits, dtype=torch.float64)
    exact = {
        "softmax": (exact - 200).exp(),
        "sqrtsoftplus": exact.exp().log1p().sqrt(),
        "sigmoid": 1 / (1 + (-exact).exp()),
    }[scoring]
    torch.testing.assert_close(weights.double(), exact[ids], rtol=4e-6, atol=1e-38)


def test_infinite_logits(kernel, device):
    logits = [float("inf"), 0.0, 1.0, 2.0, 3.0, 4.0, -float("inf")]
    weights, ids = of_logits(kernel, logits, 7, device, scoring="sqrtsoftplus")
    assert ids.tolist() == [0, 5, 4, 3, 2, 1, 6]
    torch.testing.assert_close(weights, torch.nn.functional.softplus(torch.tensor(logits)).sqrt()[ids])
    assert of_logits(kernel, logits, 2, device, scoring="softmax")[0].isnan().all()  # inf - inf


def test_zeros_of_either_sign_are_equal(kernel, device):
    logits = [0.0, -0.0, 3.0, -0.0, 2.0, 1.0, -1.0]
    ids = of_logits(kernel, logits, 6, device, choose_by="logits")[1]
    assert ids.tolist() == [2, 4, 5, 0, 1, 3]


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 64, 512, 4096])
@pytest.mark.parametrize(
    "experts, num_group, topk_group, top_k, hidden_dim", [(256, 8, 4, 8, 7168), (64, 1, 1, 6, 2048)]
)
def test_real_sizes(kernel, experts, num_group, topk_group, top_k, hidden_dim, tokens):
    """Every shipped configuration: tensor cores are no less exact than the fp32 GEMM of the stock module."""
    tensors = router(tokens, experts, hidden_dim, torch.bfloat16, device="cuda")
    args = (top_k, num_group, topk_group, True, 2.5)
    logits, weights, ids = kernel.topk_router(*tensors, *args)
    stock_logits, stock_weights, stock_ids = stock_router(*tensors[1:], *args)(tensors[0])
    exact = tensors[0].double() @ tensors[1].double().T
    rounding = 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (logits - exact).abs().max() <= 2 * (stock_logits - exact).abs().max() + rounding
    # Scores closer than the rounding of their logits may change places: as good as never in random data.
    same = (ids.sort()[0] == stock_ids.sort()[0]).all(dim=1)
    assert same.float().mean() > 0.999
    order, stock_order = ids.argsort(), stock_ids.argsort()
    torch.testing.assert_close(
        weights.gather(1, order)[same], stock_weights.gather(1, stock_order)[same], rtol=1e-5, atol=1e-6
    )


def test_equal_scores(kernel, device):
    """The lower group, and in it the lower expert."""
    x, weight, bias = router(5, 12, 16, device=device)
    args = (4, 4, 2, True, 1.0)
    _, weights, ids = kernel.topk_router(x, torch.zeros_like(weight), torch.zeros_like(bias), *args)
    assert ids.tolist() == [[0, 1, 2, 3]] * 5 and torch.equal(weights, torch.full_like(weights, 0.25))
    weight[6:9] = weight[9:12] = weight[0]
    bias[:] = torch.tensor([-9, -9, -9] * 2 + [9, 9, 9] * 2)
    assert kernel.topk_router(x, weight, bias, *args)[2].tolist() == [[6, 7, 8, 9]] * 5


def test_bias_chooses_but_does_not_weigh(kernel, device):
    tensors = x, weight, bias = router(9, 24, 32, device=device)
    bias[18:] = 1e4  # the last group wins whatever the scores
    args = (6, 4, 1, False, 1.0)
    logits, weights, ids = kernel.topk_router(*tensors, *args)
    assert (ids.sort()[0] == torch.arange(18, 24, device=device)).all()
    torch.testing.assert_close(weights, logits.sigmoid().gather(1, ids))


def test_nan_stays_in_its_token(kernel, device):
    x, weight, bias = router(40, 24, 64, device=device)
    args = (6, 4, 2, True, 2.5)
    clean = kernel.topk_router(x, weight, bias, *args)
    x[7] = float("nan")
    logits, weights, ids = kernel.topk_router(x, weight, bias, *args)
    others = [token for token in range(40) if token != 7]
    assert all(torch.equal(a[others], b[others]) for a, b in zip((logits, weights, ids), clean))
    assert logits[7].isnan().all() and weights[7].isnan().all() and ids[7].tolist() == [0, 1, 2, 3, 4, 5]


def test_any_strides(kernel, device):
    x, weight, bias = router(9, 24, 32, device=device)
    args = (6, 4, 2, True, 2.5)
    x = decided(x, weight, bias, *args)
    expected = kernel.topk_router(x, weight, bias, *args)
    spread = torch.stack([bias, bias + 1], 1)[:, 0]
    wide = torch.cat([x, x], 1)[:, :32]
    for inputs in ((x.T.contiguous().T, weight.T.contiguous().T, spread), (wide, weight, bias)):
        for result, e in zip(kernel.topk_router(*inputs, *args), expected):
            torch.testing.assert_close(result, e)


def test_autocast_changes_nothing(kernel, device):
    x, weight, bias = router(9, 24, 32, device=device)
    args = (x.requires_grad_(), weight, bias, 6, 4, 2, True, 2.5)
    results = []
    for enabled in (False, True):
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            logits, weights, ids = kernel.topk_router(*args)
            # Compiled, the backward runs under autocast if the forward did.
            op_results = op(kernel)(*args)
            op_grad = torch.autograd.grad(op_results[0].sum() + op_results[1].square().sum(), x)
        grad = torch.autograd.grad(logits.sum() + weights.square().sum(), x)
        results.append((logits, weights, ids, *grad, *op_grad))
    assert all(torch.equal(a, b) for a, b in zip(*results))


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["logits", "weights", "both"])
@pytest.mark.parametrize(CASE, ROUTERS)
def test_gradients_equal_transformers(kernel, device, experts, num_group, topk_group, top_k, norm, through):
    if top_k > topk_group * experts // num_group:
        pytest.skip("Transformers' choice is not certain")
    x, weight, bias = router(33, experts, 48, device=device)
    x = decided(x, weight, bias, top_k, num_group, topk_group)
    module = stock_router(weight.clone(), bias, top_k, num_group, topk_group, norm, 2.5)
    stock_x, ours_x, ours_weight = x.clone().requires_grad_(), x.requires_grad_(), weight.requires_grad_()
    loss_weights = torch.randn(len(x), experts, generator=torch.Generator().manual_seed(1)).to(device)

    def loss(logits, weights, ids):
        loss = 0
        if through != "weights":
            loss = (logits * loss_weights).sum()
        if through != "logits":
            loss = loss + (weights * loss_weights.gather(1, ids)).sum()
        return loss

    loss(*module(stock_x)).backward()
    loss(*kernel.topk_router(ours_x, ours_weight, bias, top_k, num_group, topk_group, norm, 2.5)).backward()
    torch.testing.assert_close(ours_x.grad, stock_x.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours_weight.grad, module.weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("function", [lambda kernel: kernel.topk_router, op], ids=["eager", "op"])
def test_gradcheck(kernel, function, norm):
    x, weight, bias = in_fp64(router(5, 12, 6))
    tensors = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda *t: function(kernel)(*t, bias, 4, 3, 2, norm, 2.5)[:2], tensors)


@pytest.mark.parametrize("through", ["logits", "weights", "both"])
@pytest.mark.parametrize("function", [lambda kernel: kernel.topk_router, op], ids=["eager", "op"])
@pytest.mark.parametrize("name", ROUTER_FORMS)
def test_gradcheck_of_forms(kernel, name, function, through):
    (x, weight, correction), args, options = router_of_form(name, 5, 6, torch.float64)
    generator = torch.Generator().manual_seed(1)
    # No choice is near another one, and nothing is rounded.
    x = x + torch.rand(x.shape, generator=generator, dtype=x.dtype) / 8
    options = {key: value for key, value in options.items() if not key.endswith("dtype")}
    bias = options.pop("bias")
    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]

    def results(x, weight, bias=None):
        logits, weights, _ = function(kernel)(x, weight, correction, *args, bias=bias, **options)
        return {"logits": (logits,), "weights": (weights,), "both": (logits, weights)}[through]

    assert torch.autograd.gradcheck(results, leaves)


@pytest.mark.parametrize("which", [0, 1], ids=["hidden_states", "weight"])
def test_one_gradient_alone(kernel, device, which):
    tensors = router(5, 12, 16, torch.bfloat16, torch.bfloat16, device)
    tensors[which].requires_grad_()
    results = op(kernel)(*tensors, 4, 3, 2, True, 2.5)
    assert not results[2].requires_grad
    results[1].square().sum().backward()
    assert tensors[which].grad.dtype == torch.bfloat16 and tensors[which].grad.abs().max() > 0
    assert all(t.grad is None for t in tensors if t is not tensors[which])


def test_op_is_registered_well(kernel, device):
    x, weight, bias = router(5, 12, 16, device=device)
    args = (x.requires_grad_(), weight.requires_grad_(), bias, 4, 3, 2, True, 2.5)
    library.opcheck(the_op(kernel), (*args[:3], None, *kernel.reference.RouterForm(*args[3:])))
    options = dict(kernel.reference.RouterForm(4, scoring="softmax", product_dtype=torch.bfloat16)._asdict())
    library.opcheck(the_op(kernel), (*args[:2], None, bias.clone().requires_grad_(), *options.values()))


@pytest.mark.parametrize("backward", [False, True], ids=["inference", "training"])
def test_compiles_into_one_graph(kernel, device, backward):
    torch.compiler.reset()
    compiled = torch.compile(kernel.topk_router, fullgraph=True, dynamic=True, backend=COMPILE_BACKENDS[device])
    for tokens in (33, 64):
        x, weight, bias = router(tokens, 24, 48, device=device)
        args = (x.requires_grad_(backward), weight.requires_grad_(backward), bias, 6, 4, 2, True, 2.5)
        expected, got = kernel.topk_router(*args), compiled(*args)
        torch.testing.assert_close(got, expected)
        if backward:
            grads = [
                torch.autograd.grad(logits.square().sum() + weights.square().sum(), (x, weight))
                for logits, weights, _ in (expected, got)
            ]
            torch.testing.assert_close(*grads)


# --- bad input --------------------------------------------------------------------------------------------------------

NAMES = ["hidden_states", "weight", "e_score_correction_bias", "top_k", "num_group", "topk_group"]
BAD = [  # argument, how it is spoiled, error, part of the message
    ("hidden_states", lambda x: x[None], ValueError, r"hidden_states: expected \(T, H\), got \(1, 5, 16\)"),
    ("hidden_states", lambda x: x.int(), TypeError, "hidden_states: expected one of .*got torch.int32"),
    ("weight", lambda w: w[:, :8], ValueError, r"weight: expected \(E, 16\) to fit hidden_states, got \(12, 8\)"),
    ("weight", lambda w: w.long(), TypeError, "weight: expected one of .*got torch.int64"),
    ("weight", lambda w: w.to("meta"), ValueError, "weight: expected on cpu like hidden_states, got meta"),
    ("e_score_correction_bias", lambda b: b[:8], ValueError, r"e_score_correction_bias: expected \(12,\) .*got \(8,\)"),
    ("e_score_correction_bias", lambda b: b.bool(), TypeError, "e_score_correction_bias: expected .*got torch.bool"),
    ("num_group", lambda _: 5, ValueError, "num_group: expected to divide 12 experts into groups .*got 5"),
    ("num_group", lambda _: 12, ValueError, "num_group: .*groups of at least 2, got 12"),
    ("num_group", lambda _: 0, ValueError, "num_group: .*got 0"),
    ("topk_group", lambda _: 4, ValueError, r"topk_group: expected 1 to 3 \(num_group\), got 4"),
    ("topk_group", lambda _: 0, ValueError, "topk_group: expected 1 to 3 .*got 0"),
    ("top_k", lambda _: 13, ValueError, r"top_k: expected 1 to 12 \(the experts\), got 13"),
    ("top_k", lambda _: 0, ValueError, "top_k: expected 1 to 12 .*got 0"),
    ("bias", lambda _: torch.zeros(8), ValueError, r"bias: expected \(12,\) to fit weight, got \(8,\)"),
    ("bias", lambda _: torch.zeros(12).int(), TypeError, "bias: expected one of .*got torch.int32"),
    ("scoring", lambda _: "relu", ValueError, "scoring: expected one of sigmoid, softmax, .*got 'relu'"),
    ("scoring", lambda _: "softmax_of_chosen", ValueError, "choose_by: expected logits with .*got 'scores'"),
    ("choose_by", lambda _: "score", ValueError, "choose_by: expected one of scores, logits, got 'score'"),
    ("group_score", lambda _: "sum", ValueError, "group_score: expected one of top2, max, got 'sum'"),
    ("product_dtype", lambda _: torch.int8, TypeError, "product_dtype: expected None or one of .*got torch.int8"),
    ("logits_dtype", lambda _: torch.int8, TypeError, "logits_dtype: expected None or one of .*got torch.int8"),
    ("scores_dtype", lambda _: torch.int8, TypeError, "scores_dtype: expected None or one of .*got torch.int8"),
    ("weights_dtype", lambda _: torch.int8, TypeError, "weights_dtype: expected None or one of .*got torch.int8"),
]


@pytest.mark.parametrize("name, spoil, error, message", BAD)
def test_bad_input(kernel, name, spoil, error, message):
    args = dict(zip(NAMES, (*router(5, 12, 16), 4, 3, 2)))
    args[name] = spoil(args.get(name))
    with pytest.raises(error, match=message):
        kernel.topk_router(**args, norm_topk_prob=True, routed_scaling_factor=1.0)
