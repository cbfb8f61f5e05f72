"""The warp-specialized kernels over fp8 weights, on a GPU of the kind that they are for."""

from functools import partial

import pytest
import torch

from cases import covering
from oracle import FORMS, assert_as_good_as_torch, error, fp8_layer, fp8_weights_in_fp64, in_fp64, round_to_fp8, w8a8


@pytest.fixture(scope="module")
def config(config):
    return partial(config, BLOCK_N=128, BLOCK_K=128)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "tokens, experts, top_k, hidden_dim, inter, ids",
    [
        pytest.param(1, 4, 2, 128, 128, "distinct", id="one-token"),
        pytest.param(300, 8, 2, 144, 128, "sentinels", id="tails-in-H"),
        pytest.param(500, 7, 1, 2048, 256, "one", id="all-on-one-expert"),
        pytest.param(700, 3, 2, 400, 512, "zipf", id="uneven"),
        pytest.param(3000, 16, 4, 512, 768, "zipf", id="more-tiles-than-programs"),
        pytest.param(1500, 300, 4, 128, 128, "any", id="tiles-of-few-rows"),
        pytest.param(333, 5, 2, 256, 176, "any", id="tails-in-I"),
    ],
)
def test_warp_specialized(kernel, launch, config, tokens, experts, top_k, hidden_dim, inter, ids, form):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("for Hopper")
    if inter % 128 and "split" not in form:
        pytest.skip("a tile of up would have two scales")
    args = (tokens, experts, top_k, hidden_dim, inter, torch.bfloat16, "cuda", ids)
    (x, index, top_k_weights), weights, scales = fp8_layer(kernel, *args, **form)
    exact_weights = fp8_weights_in_fp64(weights, scales)
    inputs = x, index, top_k_weights
    exact = kernel.reference.moe_experts(*in_fp64(inputs), *exact_weights)
    allowed = error(w8a8(inputs, exact_weights, round_to_fp8), exact)
    scales = [s.view(torch.uint8) if s.dtype == torch.float8_e8m0fnu else s for s in scales]
    config = config(num_stages=4)
    offsets, _, positions, schedule = launch.route(index, experts, 128)
    rows = int(offsets[-1])
    results = []
    for _ in range(3):  # the same schedule serves again
        a = launch.quantize_slots(x, positions)
        a = launch.gate_up_fp8_hopper(*a, weights[0], scales[0], schedule, kernel.reference.Gate(), config)
        assert a[1].T[rows:].isnan().all()
        y = torch.full((index.numel(), hidden_dim), float("nan"), dtype=x.dtype, device="cuda")
        launch.grouped_gemm_fp8_hopper(*a, weights[1], scales[1], schedule, config, y)
        assert y[rows:].isnan().all(), "rows that belong to no expert are never written"
        results.append(launch.combine(y, positions, top_k_weights))
        assert error(results[-1], exact) <= 1.5 * allowed and allowed < 0.1
        assert torch.equal(results[-1], results[0])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "tokens, experts, top_k, K, N, ids, e8m0, transposed, dtype",
    covering(
        [
            pytest.param(1, 4, 1, 128, 256, "any", id="one-row-two-steps"),
            pytest.param(300, 8, 2, 192, 272, "sentinels", id="tails-in-N"),
            pytest.param(500, 7, 1, 320, 128, "one", id="all-on-one-expert"),
            pytest.param(700, 3, 2, 1024, 80, "zipf", id="one-column-tile"),
            pytest.param(3000, 16, 4, 512, 1024, "zipf", id="more-tiles-than-programs"),
            pytest.param(1500, 300, 4, 128, 384, "any", id="tiles-of-few-rows"),
        ],
        [pytest.param(False, id="fp32-scales"), pytest.param(True, id="e8m0")],
        [pytest.param(False, id="as-it-is"), pytest.param(True, id="transposed")],
        [torch.bfloat16, torch.float16],
    ),
)
def test_weights_warp_specialized(kernel, launch, config, tokens, experts, top_k, K, N, ids, e8m0, transposed, dtype):
    """y = w @ x, each weight rounded to dtype: torch on those weights is no better."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("for Hopper")
    args = (tokens, experts, top_k, *((K, N) if transposed else (N, K)), dtype, "cuda", ids)
    (_, index, _), weights, scales = fp8_layer(kernel, *args, e8m0=e8m0)
    weight, scale = weights[1], scales[1]
    exact_weight = fp8_weights_in_fp64(weights, scales)[1]
    exact_weight = exact_weight.mT if transposed else exact_weight
    x = torch.randn(index.numel(), K, dtype=dtype, device="cuda")
    offsets, _, _, schedule = launch.route(index, experts, 128)
    rows = int(offsets[-1])
    exact = kernel.reference.grouped_gemm(x.double(), exact_weight, offsets)
    expected = kernel.reference.grouped_gemm(x, exact_weight.to(dtype), offsets)
    scale = scale.view(torch.uint8) if e8m0 else scale
    results = []
    for _ in range(3):  # the same schedule serves again
        y = torch.full((index.numel(), N), float("nan"), dtype=dtype, device="cuda")
        launch.codes_gemm_hopper(x, weight, scale, schedule, config(), y, transposed)
        assert y[rows:].isnan().all(), "rows that belong to no expert are never written"
        assert_as_good_as_torch(y[:rows], expected[:rows], exact[:rows])
        results.append(y[:rows])
        assert torch.equal(results[-1], results[0])
