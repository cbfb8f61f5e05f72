"""The launchers of the router against torch, ties and NaN included; see test_kernels.py."""

from importlib import import_module

import pytest
import torch

from cases import covering
from interpreted import DEVICE, DTYPES, INTERPRETED, enter_no_device, on_triton, under_the_interpreter
from oracle import ROUTER_FORMS, ROUTERS, assert_routes, decided, route_by_hand, router, router_of_form

test_under_the_interpreter = under_the_interpreter(__file__)


SMALL_ROUTER_CONFIGS = [(16, 16, 32, 4, 2), (32, 64, 64, 4, 3)]


@on_triton
@pytest.mark.parametrize(
    "tokens, experts, hidden_dim, is_split, config, x_dtype, weight_dtype",
    covering(
        [
            pytest.param(1, 40, 64, False, id="one-token"),
            pytest.param(45, 7, 50, False, id="tails-everywhere"),
            pytest.param(45, 70, 584, True, id="splits-with-tails"),
            pytest.param(3, 16, 2100, True, id="splits-of-which-some-are-empty"),
        ],
        SMALL_ROUTER_CONFIGS,
        DTYPES,
        DTYPES,
    ),
)
def test_router_logits(kernel, launch, config, tokens, experts, hidden_dim, is_split, x_dtype, weight_dtype):
    config = import_module(f"{kernel.__name__}.launch_configs").RouterConfig(*config)
    x, weight, _ = router(tokens, experts, hidden_dim, x_dtype, weight_dtype, DEVICE)
    partials = launch.router_logits(x, weight, config)
    assert (partials.shape[0] > 1) == is_split
    # Products of 16-bit numbers are exact in fp32: there is nothing but the rounding of sums.
    torch.testing.assert_close(partials.double().sum(0), x.double() @ weight.double().T, rtol=2e-6, atol=2e-6)


@on_triton
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("experts, num_group, topk_group, top_k, norm", ROUTERS)
def test_router_topk(kernel, launch, experts, num_group, topk_group, top_k, norm, splits):
    x, weight, bias = router(9, experts, 16 * splits)  # a token is a program: more of them show nothing
    args = (top_k, num_group, topk_group, norm, 2.5)
    x = decided(x, weight, bias, *args)
    parts = torch.stack([a @ b.T for a, b in zip(x.chunk(splits, 1), weight.chunk(splits, 1))])
    results = launch.router_topk(parts.to(DEVICE), None, bias.to(DEVICE), kernel.reference.RouterForm(*args))
    assert_routes(results, route_by_hand(x, weight, bias, *args))


@on_triton
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("name", ROUTER_FORMS)
def test_router_topk_of_forms(kernel, launch, name, splits):
    (x, weight, correction), args, options = router_of_form(name, 9, 16 * splits, half=DTYPES[0])
    if correction is not None:
        x = decided(x, weight, correction, *args, **options)
    parts = torch.stack([a @ b.T for a, b in zip(x.chunk(splits, 1), weight.chunk(splits, 1))])
    expected = route_by_hand(x, weight, correction, *args, **options)
    vectors = [x if x is None else x.to(DEVICE) for x in (options.pop("bias"), correction)]
    results = launch.router_topk(parts.to(DEVICE), *vectors, kernel.reference.RouterForm(*args, **options))
    assert_routes(results, expected, **options)


@on_triton
@pytest.mark.parametrize("experts, num_group, topk_group, top_k, norm", ROUTERS)
def test_router_topk_ties(kernel, launch, experts, num_group, topk_group, top_k, norm):
    """Few different logits, all of them exact, and no bias: most choices are decided by the index.

    None is negative: sigmoid(-1) + sigmoid(1) is sigmoid(0) + sigmoid(0) up to rounding, which is no tie.
    """
    x = torch.randint(0, 2, (9, 3), generator=torch.Generator().manual_seed(0)).float()
    weight = torch.randint(0, 3, (experts, 3), generator=torch.Generator().manual_seed(1)).float()
    x[0] = 0
    bias = torch.zeros(experts)
    args = (top_k, num_group, topk_group, norm, 1.0)
    form = kernel.reference.RouterForm(*args)
    results = launch.router_topk((x @ weight.T)[None].to(DEVICE), None, bias.to(DEVICE), form)
    assert_routes(results, route_by_hand(x, weight, bias, *args))


@on_triton
@pytest.mark.parametrize("experts, num_group, topk_group, top_k, norm", ROUTERS)
def test_router_topk_of_anything(kernel, launch, experts, num_group, topk_group, top_k, norm):
    """NaN, infinities, biases far from any score: what torch's sort makes of them."""
    x, weight, bias = router(8, experts, 16)
    x[1], x[2, 3], x[3], x[4] = float("nan"), float("inf"), 1e30, -1e30
    weight[experts // 2, 0], x[5, 0] = float("inf"), 0  # NaN for token 5
    bias[0], bias[1], bias[2], bias[-1] = -1e30, 1e30, -torch.tensor(float("nan")), float("-inf")
    args = (top_k, num_group, topk_group, norm, 1.0)
    form = kernel.reference.RouterForm(*args)
    logits, weights, ids = launch.router_topk((x @ weight.T)[None].to(DEVICE), None, bias.to(DEVICE), form)
    expected_logits, expected_weights, expected_ids = kernel.reference.topk_router(x, weight, bias, None, form)
    assert torch.equal(ids.cpu(), expected_ids)
    torch.testing.assert_close(logits.cpu(), expected_logits, equal_nan=True)
    torch.testing.assert_close(weights.cpu(), expected_weights, equal_nan=True, rtol=4e-6, atol=1e-7)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU test_router.py runs this path")
@pytest.mark.parametrize("tokens, hidden_dim", [(0, 64), (1, 600), (20, 97), (70, 64)])
@pytest.mark.parametrize("dtype, weight_dtype", [(torch.float16, torch.float16), (torch.float16, torch.float32)])
def test_whole_router(kernel, monkeypatch, tokens, hidden_dim, dtype, weight_dtype):
    module = import_module(f"{kernel.__name__}.router")
    enter_no_device(monkeypatch)
    gpu = import_module(f"{kernel.__name__}.gpu")
    monkeypatch.setattr(gpu, "traits", lambda device: gpu.TRAITS["sm_90"])
    x, weight, bias = router(tokens, 24, hidden_dim, dtype, weight_dtype)
    x = decided(x, weight, bias, 6, 4, 2)
    args = (6, 4, 2, True, 2.5)
    results = module.router_on_gpu(x.T.contiguous().T, weight, bias, None, kernel.reference.RouterForm(*args))
    assert_routes(results, route_by_hand(x, weight, bias, *args))
