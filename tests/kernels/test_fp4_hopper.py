"""The kernel that takes 4-bit weights from shared memory to wgmma, on a GPU of the kind that it is for."""

from importlib import import_module

import pytest
import torch
from test_fp4_kernels import rows_of

from cases import covering
from oracle import dequantized_fp4, error, fp4_layer, in_fp64

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_hopper():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("for Hopper")


@pytest.fixture
def configs(kernel):
    """Those in use."""
    table = import_module(f"{kernel.__name__}.tuning").FP4_ORDERED.hopper
    return [config for _, config in table if config.WARP_SPECIALIZED]


def in_order(kernel, x):
    order = import_module(f"{kernel.__name__}.kernels.order")
    wide = torch.nn.functional.pad(x, (0, order.ordered_size(x.shape[1]) - x.shape[1]))
    return wide.unflatten(1, (-1, order.PERIOD))[:, :, order.COLUMN].flatten(1).contiguous()


ROWS = [  # rows of each expert, N, K
    pytest.param([1], 72, 96, id="one-row-less-than-a-period"),
    pytest.param([3, 0, 20, 70, 1], 320, 512, id="whole-steps"),
    pytest.param([9, 300, 0, 33], 200, 160, id="tails"),
    pytest.param([64, 65, 8, 17], 257, 2880, id="gpt-oss"),
    pytest.param([0, 700, 0], 264, 384, id="all-on-one-expert"),
    pytest.param([16, 32, 128, 129] * 40, 512, 256, id="more-tiles-than-programs"),
    pytest.param([0, 0], 128, 128, id="no-rows"),
]


@pytest.mark.parametrize(
    "sizes, N, K, number, biased, dtype",
    covering(ROWS, range(4), [False, True], [torch.bfloat16, torch.float16]),
)
def test_grouped_gemm(kernel, launch, configs, sizes, N, K, number, biased, dtype):
    """Rows of nobody, NaN here, are never written, nor do they reach others; nor does a NaN in a row of someone."""
    x, offsets, codes, scale, exact = rows_of(kernel, sizes, N, K, dtype, "e8m0")
    rows = sum(sizes)
    x[rows:] = float("nan")
    if rows > 20:
        x[7, K - 1] = float("nan")
    bias = torch.randn(len(sizes), N).to("cuda", dtype) if biased else None
    schedule = launch.tile_schedule(offsets, x.shape[0], configs[number].BLOCK_M)
    expected = kernel.reference.grouped_gemm(x.double(), exact, offsets, None if bias is None else bias.double())[:rows]
    results = []
    for _ in range(3):  # the same schedule serves again
        y = torch.full((x.shape[0], N), float("nan"), dtype=dtype, device="cuda")
        launch.grouped_gemm_fp4_hopper(in_order(kernel, x), codes, scale, schedule, configs[number], y, bias)
        assert y[rows:].isnan().all() and torch.equal(y[:rows].isnan(), expected.isnan())
        results.append(y[:rows].nan_to_num())
        assert error(results[-1], expected.nan_to_num()) <= 2 * torch.finfo(dtype).eps
        assert torch.equal(results[-1], results[0])


@pytest.mark.parametrize("K", [128, 160, 256])
def test_every_byte_and_every_exponent(kernel, launch, configs, K):
    """Times an identity: exactly the weights, with scales from 2^-93 to 2^33; with greater ones NaN."""
    codes = torch.arange(256 * K // 2, device="cuda").view(1, 256, K // 2).remainder(251).to(torch.uint8)
    exponents = torch.arange(256, dtype=torch.uint8, device="cuda").view(1, 256, 1).repeat(1, 1, K // 32)
    exact = dequantized_fp4(codes, exponents)[0]
    x = torch.eye(K, device="cuda", dtype=torch.bfloat16)
    for config in configs:
        schedule = launch.tile_schedule(torch.tensor([0, K], dtype=torch.int32, device="cuda"), K, config.BLOCK_M)
        y = torch.empty(K, 256, device="cuda", dtype=torch.bfloat16)
        launch.grouped_gemm_fp4_hopper(in_order(kernel, x), codes, exponents, schedule, config, y)
        assert torch.equal(y.T[34:161].double(), exact[34:161]) and y.T[161:].isnan().all()


WHOLE = [  # T, E, top_k, H, I, ids, form of the scales
    pytest.param(40, 8, 2, 160, 96, "any", "e8m0", id="lowest-tiles"),
    pytest.param(60, 8, 2, 2880, 224, "sentinels", "uint8", id="low-tiles"),
    pytest.param(200, 8, 2, 416, 256, "zipf", "e8m0", id="two-heights"),
    pytest.param(700, 8, 4, 256, 128, "sentinels", "uint8", id="tall-tiles"),
    pytest.param(300, 8, 1, 256, 160, "one", "e8m0", id="one-expert"),
]
GATES = [
    pytest.param({}, id="silu"),
    pytest.param({"activation": "swigluoai", "limit": 1.0, "interleaved": True}, id="gpt-oss"),
    pytest.param({"activation": "gelu_pytorch_tanh"}, id="gelu"),
]


@pytest.mark.parametrize(
    "tokens, experts, top_k, hidden_dim, inter, ids, form, gate, dtype",
    covering(WHOLE, GATES, [torch.bfloat16, torch.float16]),
)
def test_layer(kernel, launch, record, tokens, experts, top_k, hidden_dim, inter, ids, form, gate, dtype):
    """The public function, with biases if the gate has them; a NaN in one token, and gradients through it all."""
    calls = record(launch, "grouped_gemm_fp4_hopper")
    args = (tokens, experts, top_k, hidden_dim, inter, dtype, "cuda", ids)
    (x, index, top_k_weights), weights, scales = fp4_layer(kernel, *args, form=form)
    exact_weights = [dequantized_fp4(*pair) for pair in zip(weights, scales)]
    options = {"gate_up_proj_scale": scales[0], "down_proj_scale": scales[1], **gate}
    exact_options = dict(gate)
    if "limit" in gate:
        for name, weight in zip(("gate_up_proj_bias", "down_proj_bias"), weights):
            options[name] = torch.randn(weight.shape[:2]).to("cuda", dtype)
            exact_options[name] = options[name].double()
    x.requires_grad_()
    out = kernel.moe_experts(x, index, top_k_weights, *weights, **options)
    assert len(calls) == 2
    exact_x = x.detach().double().requires_grad_()
    exact = kernel.reference.moe_experts(exact_x, index, top_k_weights.double(), *exact_weights, **exact_options)
    assert error(out, exact) <= 2 * torch.finfo(dtype).eps
    dout = torch.randn_like(x)
    dx, exact_dx = torch.autograd.grad(out, x, dout)[0], torch.autograd.grad(exact, exact_x, dout.double())[0]
    # A gate's number that is rounded across its limit has another slope: of a share of about eps.
    eps = torch.finfo(dtype).eps
    assert error(dx, exact_dx) <= (2 * eps**0.5 if "limit" in gate else 6 * eps)
    x = x.detach().clone()
    x[3, 5] = float("nan")
    broken = kernel.moe_experts(x, index, top_k_weights, *weights, **options)
    others = torch.arange(tokens, device="cuda") != 3
    assert torch.equal(broken[others], out[others].detach())


@pytest.mark.parametrize("tokens", [1, 1000, 40000])
def test_true_deepseek_v3_dimensions(kernel, tokens):
    """Bytes of a weight pass 2^31, and so do elements of the routed rows at T = 40000."""
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB")
    E, H, I = 256, 7168, 2048
    weights = [
        torch.randint(256, (E, *shape), dtype=torch.uint8, device="cuda") for shape in ((2 * I, H // 2), (H, I // 2))
    ]
    scales = [
        torch.randint(117, 121, (*w.shape[:2], w.shape[2] // 16), dtype=torch.uint8, device="cuda") for w in weights
    ]
    x = torch.randn(tokens, H, dtype=torch.bfloat16, device="cuda")
    index = torch.rand(tokens, E, device="cuda").topk(8)[1]
    index[-1] = torch.arange(E - 8, E)
    top_k_weights = torch.rand(tokens, 8, device="cuda")
    named = dict(zip(("gate_up_proj_scale", "down_proj_scale"), scales))
    out = kernel.moe_experts(x, index, top_k_weights, *weights, **named)
    some = torch.tensor([0, tokens // 2, tokens - 1], device="cuda")
    inputs = in_fp64((x[some], index[some], top_k_weights[some]))
    exact = kernel.reference.moe_experts(*inputs, *weights, **named)
    assert error(out[some], exact) <= 1e-2
