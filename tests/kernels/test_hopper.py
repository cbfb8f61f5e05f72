"""The warp-specialized kernels for 16 bits, on a Hopper GPU; without one, what they are launched for and how.

Experts have rows for tiles of 64, 128 and 192 and their borders. What a kernel is not to write lies around its result.
"""

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from cases import covering
from oracle import assert_as_good_as_torch

GUARD = 64  # rows
MIXED = [0, 1, 63, 64, 65, 0, 127, 128, 129, 191, 192, 193, 255, 256, 257, 320, 321, 383, 384, 385, 0, 449, 700, 5]
ONE_ROW, TALL, NONE = [1] * 40, [129, 150, 192, 0, 192, 160], [0, 0, 0]
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture
def on_hopper():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("for Hopper")


@pytest.fixture
def tables(kernel):
    return import_module(f"{kernel.__name__}.tuning")


def specialized(tables, num_stages):
    config = tables.EXPERTS.hopper[-1].config.down
    assert config.WARP_SPECIALIZED
    return config._replace(num_stages=num_stages)


def offsets_of(counts, pad=1):
    counts = torch.tensor([0] + [-(-n // pad) * pad for n in counts])
    return counts.cumsum(0).to(torch.int32).cuda()


def randn(*shape, dtype, scale=1.0):
    return torch.randn(shape, device="cuda").mul_(scale).to(dtype)


def guarded(rows, N, dtype):
    """Memory, and of that the rows of a result."""
    memory = torch.empty(rows + 2 * GUARD, N, dtype=dtype, device="cuda")
    return memory, memory[GUARD : GUARD + rows]


def written(run, memory, rows):
    """The first rows of a result, the same bits each time that it is made, and nothing else."""
    results = []
    for _ in range(10):
        memory.fill_(torch.nan)
        run()
        assert memory[:GUARD].isnan().all() and memory[GUARD + rows :].isnan().all(), "written outside"
        results.append(memory[GUARD : GUARD + rows].clone())
        assert torch.equal(results[-1].view(torch.int16), results[0].view(torch.int16))
    return results[0]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "counts, N, K, what, num_stages, dtype",
    covering(
        [
            pytest.param(MIXED, 2048, 768, "", id="mixed"),
            pytest.param(ONE_ROW, 1408, 256, "", id="one-row"),
            pytest.param(TALL, 1408, 2048, "", id="tall"),
            pytest.param([1000], 512, 64, "", id="one-expert"),
            pytest.param(NONE, 256, 128, "", id="no-rows"),
            pytest.param(MIXED, 200, 72, "", id="tails"),
            pytest.param(MIXED, 264, 1400, "", id="one-column-box"),
            pytest.param(MIXED, 100, 128, "", id="no-whole-16-bytes"),
            pytest.param(MIXED, 1408, 512, "transposed", id="transposed"),
            pytest.param(MIXED, 200, 128, "transposed", id="transposed-tails"),
            pytest.param(MIXED, 768, 256, "low-rank", id="low-rank"),
            pytest.param(MIXED, 264, 256, "low-rank transposed", id="low-rank-transposed"),
            pytest.param(MIXED, 2048, 256, "slots", id="slots"),
        ],
        [3, 4],
        DTYPES,
    ),
)
def test_grouped_gemm(kernel, launch, tables, on_hopper, counts, N, K, what, num_stages, dtype):
    offsets, rows, E = offsets_of(counts), sum(counts), len(counts)
    S = rows + 70
    x, w = randn(S, K, dtype=dtype), randn(E, N, K, dtype=dtype, scale=K**-0.5)
    x[rows:] = torch.nan
    products, low_rank = [(x, w)], None
    if "low-rank" in what:
        low_rank = randn(S, 48, dtype=dtype), randn(E, N, 48, dtype=dtype, scale=0.1)
        products.append(low_rank)
    expected, exact = (
        sum(kernel.reference.grouped_gemm(a.to(as_), b.to(as_), offsets) for a, b in products)[:rows]
        for as_ in (dtype, torch.float64)
    )
    if "transposed" in what:
        w = w.mT.contiguous().mT
    schedule = launch.tile_schedule(offsets, S, 128)
    memory, y = guarded(S, N, dtype)
    config = specialized(tables, num_stages)
    if what == "slots":
        slots, factors = torch.randperm(S, device="cuda", dtype=torch.int32), torch.rand(S, device="cuda")
        launch.grouped_gemm(x, w, schedule, "ieee", config, y, slots, factors)
        chosen = slots[:rows].long()
        assert_as_good_as_torch(y[chosen], (expected * factors[chosen, None]).to(dtype), exact * factors[chosen, None])
        assert y[slots[rows:].long()].isnan().all()
        return
    y = written(lambda: launch.grouped_gemm(x, w, schedule, "ieee", config, y, low_rank=low_rank), memory, rows)
    assert_as_good_as_torch(y, expected, exact)
    assert schedule[4, 1] == 0, "the counter of tiles, for the next launch"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "counts, M, N",
    [
        pytest.param(MIXED, 768, 2048, id="mixed"),
        pytest.param(MIXED, 1408, 1416, id="tails"),
        pytest.param(MIXED, 200, 264, id="no-whole-tiles-of-M"),
        pytest.param([0, 64, 640, 0], 64, 40, id="less-than-a-tile"),
        pytest.param(NONE, 256, 256, id="no-rows"),
    ],
)
def test_wgrad(kernel, tables, on_hopper, counts, M, N, dtype):
    wgrad_hopper = import_module(f"{kernel.__name__}.kernels.wgrad_hopper").wgrad_hopper
    offsets, E = offsets_of(counts, pad=64), len(counts)
    rows = int(offsets[-1])
    p, q = (randn(rows + 70, n, dtype=dtype, scale=0.2) for n in (M, N))
    p[rows:], q[rows:] = torch.nan, torch.nan
    memory, dw = guarded(E * M, N, dtype)
    config = tables.WGRAD.hopper[-1].config
    got = written(lambda: wgrad_hopper(p, q, offsets, config, dw.view(E, M, N)), memory, E * M)
    expected, exact = (
        kernel.reference.grouped_gemm_dw(p.to(as_), q.to(as_), offsets) for as_ in (dtype, torch.float64)
    )
    assert_as_good_as_torch(got.view(E, M, N), expected, exact)


def routed(counts, top_k):
    """Ids with so many slots for each expert, and some out of range."""
    experts = len(counts)
    ids = [e for e, n in enumerate(counts) for _ in range(n)] + [experts, experts + 7, -1] * 11
    ids += [experts] * (-len(ids) % top_k)
    return torch.tensor(ids)[torch.randperm(len(ids))].view(-1, top_k).cuda()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "counts, top_k, hidden_dim, inter, activation, with_z, dtype",
    covering(
        [
            pytest.param(MIXED, 4, 512, 1408, "silu", id="mixed"),
            pytest.param(MIXED, 4, 192, 704, "gelu", id="less-than-a-tile-in-I"),
            pytest.param(MIXED, 4, 64, 64, "silu", id="one-step"),
            pytest.param(TALL, 2, 2048, 192, "swigluoai", id="tall"),
            pytest.param(ONE_ROW, 1, 128, 128, "silu", id="one-row"),
            pytest.param(NONE, 2, 128, 128, "silu", id="no-rows"),
            pytest.param([300] * 64, 6, 1024, 768, "silu", id="more-tiles-than-programs"),
        ],
        [False, True],
        DTYPES,
    ),
)
def test_gate_up(kernel, launch, tables, on_hopper, counts, top_k, hidden_dim, inter, activation, with_z, dtype):
    index, gate = routed(counts, top_k), kernel.reference.Gate(activation)
    # Rows of x farther apart than they are long.
    x = randn(index.shape[0], hidden_dim + 8, dtype=dtype)[:, :hidden_dim]
    w = randn(len(counts), 2 * inter, hidden_dim, dtype=dtype, scale=hidden_dim**-0.5)
    offsets, slots, _, schedule = launch.route(index, len(counts), 128)
    rows = sum(counts)
    config = tables.EXPERTS.hopper[-1].config.gate_up
    assert config.WARP_SPECIALIZED and launch.can_specialize_gate_up(x, w, gate, None)
    memory, z = guarded(index.numel(), 2 * inter, dtype) if with_z else (None, None)
    results = []

    def run():
        a = launch.gate_up(x, w, slots, schedule, top_k, gate, "ieee", config, z)
        assert a[rows:].isnan().all(), "rows that belong to no expert are never written"
        results.append(a[:rows])
        assert torch.equal(results[-1], results[0]) and schedule[4, 1] == 0

    gathered = x[slots[:rows].long() // top_k]
    expected_z, exact_z = (
        kernel.reference.grouped_gemm(gathered.to(as_), w.to(as_), offsets) for as_ in (dtype, torch.float64)
    )
    if with_z:
        assert_as_good_as_torch(written(run, memory, rows), expected_z, exact_z)
    else:
        for _ in range(10):
            run()
    expected, exact = (kernel.reference.apply_gate(t, gate) for t in (expected_z, exact_z))
    assert_as_good_as_torch(results[0], expected, exact)


@pytest.mark.gpu
def test_the_layer(kernel, on_hopper, tables, record):
    """In inference and training, by heuristics; then with tokens that it is not for."""
    calls = record(import_module(f"{kernel.__name__}.kernels.gate_up"), "gate_up_hopper")
    T, E, top_k, H, inter = 1600, 8, 2, 256, 128
    x = randn(T, H, dtype=torch.bfloat16).requires_grad_()
    index, weights = torch.rand(T, E, device="cuda").topk(top_k).indices, torch.rand(T, top_k, device="cuda")
    w1 = randn(E, 2 * inter, H, dtype=torch.bfloat16, scale=H**-0.5)
    w2 = randn(E, H, inter, dtype=torch.bfloat16, scale=inter**-0.5)

    def as_good_as_torch(x):
        args = x, index, weights, w1, w2
        exact = kernel.reference.moe_experts(*(t.double() if t.is_floating_point() else t for t in args))
        assert_as_good_as_torch(kernel.moe_experts(*args), kernel.reference.moe_experts(*args), exact)

    as_good_as_torch(x)
    with torch.no_grad():
        as_good_as_torch(x)
        assert len(calls) == 2
        as_good_as_torch(randn(T, H + 4, dtype=torch.bfloat16)[:, :H])  # rows of no whole 16 bytes
    assert len(calls) == 2


# --- without a GPU ----------------------------------------------------------------------------------------------------


def gate_up_args(kernel, T=4, H=128, inter=64, stride=None, offset=0, device="cpu", bias=False, mT=False, **gate):
    stride = stride or H
    x = torch.empty(T * stride + offset, dtype=torch.bfloat16, device=device)[offset:].view(T, stride)[:, :H]
    w = torch.empty(2, 2 * inter, H, dtype=torch.bfloat16, device=device)
    w = w.mT.contiguous().mT if mT else w
    return x, w, kernel.reference.Gate(**gate), torch.empty(2, 2 * inter, device=device) if bias else None


FITS = {
    "plain": {},
    "rows-apart": {"stride": 136},
    "gelu": {"activation": "gelu"},
    "limit": {"limit": 7.0},
    "large": {"T": 2**26 - 1, "device": "meta"},
}
DOES_NOT = {
    "bias": {"bias": True},
    "interleaved": {"interleaved": True},
    "transposed": {"mT": True},
    "H": {"H": 96},
    "I": {"inter": 96},
    "rows-of-no-16-bytes": {"stride": 132},
    "unaligned": {"offset": 1},
    "offsets-of-more-than-32-bits": {"T": 2**26, "device": "meta"},
}


@pytest.mark.parametrize(
    "changes, fits", [pytest.param(c, cases is FITS, id=n) for cases in (FITS, DOES_NOT) for n, c in cases.items()]
)
def test_what_goes_to_the_plain_kernel(kernel, tables, monkeypatch, changes, fits):
    dense = import_module(f"{kernel.__name__}.weights.dense")
    can_specialize = import_module(f"{kernel.__name__}.kernels.gate_up_hopper").can_specialize_gate_up
    calls = []
    launchers = SimpleNamespace(can_specialize_gate_up=can_specialize, gate_up=lambda *args: calls.append(args))
    monkeypatch.setattr(dense.gpu, "launchers", lambda: launchers)
    config = tables.EXPERTS.hopper[-1].config
    x, w, gate, bias = gate_up_args(kernel, **changes)
    rows = SimpleNamespace(slots=None, schedule=None, top_k=2)
    dense.first_gemm(x, SimpleNamespace(weight=w, bias=bias), rows, gate, SimpleNamespace(gate_up=config.gate_up))
    ((*_, used, _, _),) = calls
    assert used == config.gate_up._replace(WARP_SPECIALIZED=fits)


@pytest.mark.parametrize("rows_apart", [64, 200])
def test_a_ragged_descriptor(kernel, rows_apart):
    """Where TMA finds a row in it, and that the last one lies before the end."""
    hopper = import_module(f"{kernel.__name__}.kernels.hopper")
    y = torch.empty(300, rows_apart, dtype=torch.bfloat16)[:, :64]
    descriptor, far = hopper._ragged_descriptor(y), hopper.FAR.value
    assert tuple(descriptor.block_shape) == (1, 1, 64, 64)
    for row, row_end, column in ((0, 300, 0), (17, 18, 8), (299, 300, 56)):
        place = (far, row_end, far - row_end + row, column)
        offset = sum(i * stride for i, stride in zip(place, descriptor.strides)) * y.element_size()
        assert offset % 2**64 == y[row:, column:].data_ptr() - y.data_ptr()
        assert all(0 <= i < size < 2**31 for i, size in zip(place, descriptor.shape))
        assert place[2] + row_end - row == descriptor.shape[2]
