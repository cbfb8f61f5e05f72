"""`route` and `grouped_gemm`, from which people build layers of their own."""

import pytest
import torch

from oracle import DTYPES, assert_as_good_as_torch, layer
from suite import COMPILE_BACKENDS


@pytest.mark.parametrize("ids", ["distinct", "any", "one", "zipf", "sentinels"])
@pytest.mark.parametrize("tokens, experts, top_k", [(0, 4, 2), (1, 1, 1), (1, 256, 8), (100, 7, 6), (1500, 256, 8)])
def test_route_is_a_stable_sort(kernel, device, tokens, experts, top_k, ids):
    index = layer(tokens, experts, top_k, 1, 1, device=device, ids=ids)[1]
    routing = kernel.route(index, experts)
    assert all(t.dtype == torch.int32 and t.device == index.device for t in routing)
    flat = index.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda s: flat[s] if 0 <= flat[s] < experts else experts)
    assert routing.sorted_slots.tolist() == order
    assert routing.expert_offsets.tolist() == [sum(0 <= i < min(e, experts) for i in flat) for e in range(experts + 1)]
    positions = {slot: row for row, slot in enumerate(order)}
    assert routing.slot_positions.tolist() == [positions[s] if 0 <= flat[s] < experts else -1 for s in range(len(flat))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes, N, K",
    [
        pytest.param([3, 0, 5, 0], 32, 64, id="empty-experts"),
        pytest.param([0, 600, 1], 97, 47, id="tails"),
        pytest.param([0, 0], 32, 64, id="no-rows-owned"),
        pytest.param([130, 270], 256, 128, id="tall-tiles"),
    ],
)
def test_grouped_gemm(kernel, device, sizes, N, K, dtype):
    generator = torch.Generator().manual_seed(0)
    rows = sum(sizes) + 4  # four that belong to nobody, and are NaN
    x = torch.randn(rows, K, generator=generator).to(dtype)
    x[sum(sizes) :] = float("nan")
    weight = (torch.randn(len(sizes), N, K, generator=generator) / K**0.5).to(dtype)
    dy = torch.randn(rows, N, generator=generator).to(dtype)
    dy[sum(sizes) :] = float("nan")
    offsets = torch.tensor([0, *sizes]).cumsum(0).int()

    def run(function, x, weight, dy):
        x, weight = (t.detach().to(device).requires_grad_() for t in (x, weight))
        y = function(x, weight, offsets.to(device))
        y.backward(dy.to(y))
        return y, x.grad, weight.grad

    exact = run(kernel.reference.grouped_gemm, x.double(), weight.double(), dy)
    got, from_torch = run(kernel.grouped_gemm, x, weight, dy), run(kernel.reference.grouped_gemm, x, weight, dy)
    for g, t, e in zip(got, from_torch, exact):
        assert_as_good_as_torch(g, t, e)
    assert not got[0][sum(sizes) :].any()
    assert not got[1][sum(sizes) :].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("N, K", [pytest.param(97, 47, id="tails"), pytest.param(256, 128, id="aligned")])
def test_grouped_gemm_with_bias(kernel, device, N, K, transposed, dtype):
    """Rows of nobody stay zero; with weights stored as (E, K, N) the gradient comes in that order, too."""
    generator = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, 0, 100, 130], dtype=torch.int32)
    x, dy = (torch.randn(134, n, generator=generator) for n in (K, N))
    x[130:] = dy[130:] = float("nan")
    weight, bias = torch.randn(3, N, K, generator=generator) / K**0.5, torch.randn(3, N, generator=generator)
    if transposed:
        weight = weight.mT.contiguous().mT

    def run(function, dtype):
        tensors = [t.to(device, dtype).requires_grad_() for t in (x, weight, bias)]
        y = function(*tensors[:2], offsets.to(device), tensors[2])
        return [y, *torch.autograd.grad(y, tensors, dy.to(y))]

    exact = run(kernel.reference.grouped_gemm, torch.float64)
    got, from_torch = run(kernel.grouped_gemm, dtype), run(kernel.reference.grouped_gemm, dtype)
    for g, t, e in zip(got, from_torch, exact):
        assert_as_good_as_torch(g, t, e)
    assert not got[0][130:].any() and not got[1][130:].any() and not got[3][0].any()
    assert got[2].stride() == weight.stride()


def test_a_bias_that_does_not_fit_is_named(kernel):
    x, weight, offsets = torch.ones(4, 8), torch.ones(2, 6, 8), torch.tensor([0, 2, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"bias: expected \(2, 6\) to fit weight \(2, 6, 8\), got \(2, 8\)"):
        kernel.grouped_gemm(x, weight, offsets, torch.ones(2, 8))


def test_building_blocks_make_the_layer(kernel, device):
    x, index, weights, gate_up_proj, down_proj = args = layer(50, 8, 2, 64, 32, device=device)
    routing = kernel.route(index, 8)
    gate, up = kernel.grouped_gemm(x[routing.sorted_slots.long() // 2], gate_up_proj, routing.expert_offsets).chunk(
        2, dim=-1
    )
    y = kernel.grouped_gemm(torch.nn.functional.silu(gate) * up, down_proj, routing.expert_offsets)
    out = (y[routing.slot_positions.long()].view(50, 2, 64) * weights[..., None]).sum(1)
    torch.testing.assert_close(out, kernel.moe_experts(*args))


def test_building_blocks_compile(kernel, device):
    def block(index, x, weight):
        routing = kernel.route(index, 4)
        return kernel.grouped_gemm(x[routing.sorted_slots.long() // 2], weight, routing.expert_offsets)

    x, index, _, weight, _ = layer(16, 4, 2, 64, 32, device=device)
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend=COMPILE_BACKENDS[device])
    torch.testing.assert_close(compiled(index, x, weight), block(index, x, weight))


BAD = [
    (dict(x=torch.ones(8)), ValueError, r"x: expected \(S, K\), got \(8,\)"),
    (dict(x=torch.ones(5, 9)), ValueError, r"weight: expected \(E, N, 9\).*got \(3, 4, 8\)"),
    (dict(x=torch.ones(5, 8).half()), TypeError, "weight: expected torch.float16 like x, got torch.float32"),
    (dict(weight=torch.ones(0, 4, 8)), ValueError, r"weight: expected .* E >= 1"),
    (dict(expert_offsets=torch.zeros(4)), TypeError, "expert_offsets: expected int32, got torch.float32"),
    (dict(expert_offsets=torch.zeros(3, dtype=torch.int32)), ValueError, r"expert_offsets: expected contiguous \(4,\)"),
]


@pytest.mark.parametrize("changed, error, message", BAD)
def test_grouped_gemm_names_bad_input(kernel, changed, error, message):
    good = {"x": torch.ones(5, 8), "weight": torch.ones(3, 4, 8), "expert_offsets": torch.zeros(4, dtype=torch.int32)}
    with pytest.raises(error, match=message):
        kernel.grouped_gemm(**{**good, **changed})


def test_route_names_bad_input(kernel):
    with pytest.raises(TypeError, match="top_k_index: expected int32 or int64, got torch.float32"):
        kernel.route(torch.zeros(2, 2), 4)
    with pytest.raises(ValueError, match="num_experts: expected at least 1, got 0"):
        kernel.route(torch.zeros(2, 2, dtype=torch.int64), 0)
