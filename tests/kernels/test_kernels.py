"""The launchers of routing and of the forward, each by itself against torch, in small tiles and odd sizes: on a GPU, or
under TRITON_INTERPRET=1.

Without a GPU `test_under_the_interpreter` runs this file again in processes of their own.
"""

from importlib import import_module

import pytest
import torch

from cases import covering
from flat import ByKind
from interpreted import DEVICE, DTYPES, INTERPRETED, ROWS_FIRST, enter_no_device, on_triton, under_the_interpreter
from oracle import VARIANTS, assert_as_good_as_torch, gate_of, in_fp64, layer, variant_of

test_under_the_interpreter = under_the_interpreter(__file__, parts=2)


ROUTES = [  # T, E, top_k, ids
    pytest.param(1, 1, 1, "distinct", id="one-slot"),
    pytest.param(3, 256, 8, "distinct", id="decode"),
    pytest.param(20, 7, 6, "sentinels", id="one-block"),
    pytest.param(171, 300, 6, "sentinels", id="two-chunks-counted-by-each-block"),
    pytest.param(900, 40, 6, "sentinels", id="chunks-counted-by-a-launch-of-their-own"),
    pytest.param(200, 5, 6, "one", id="all-on-one-expert"),
]


@on_triton
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("tokens, experts, top_k, ids", ROUTES)
def test_route(kernel, launch, tokens, experts, top_k, ids, dtype):
    index = layer(tokens, experts, top_k, 1, 1, device=DEVICE, ids=ids)[1].to(dtype)
    expected = import_module(f"{kernel.__name__}.routing").route_torch(index, experts)
    *got, schedule = launch.route(index, experts, 16)
    assert all(torch.equal(g, e) for g, e in zip(got, expected))

    offsets = expected.expert_offsets
    for columns in (schedule, launch.tile_schedule(offsets, index.numel(), 16)):
        assert_schedules(columns, offsets.tolist(), 16)


def assert_schedules(schedule, offsets, block_m):
    """Each expert's tiles once, one after another, experts with many rows first; and three numbers."""
    expert, first_tile, first_row, row_end, (num_tiles, claims, is_mixed, *_) = schedule.tolist()
    rows = [end - begin for begin, end in zip(offsets, offsets[1:])]
    assert claims == 0
    assert is_mixed == (max(rows) > 2 * block_m and min((r for r in rows if r), default=block_m) < block_m)
    tile = 0
    for e in sorted(range(len(rows)), key=lambda e: rows[e] <= 2 * block_m):
        for tile_of_e in range(tile, tile - (-rows[e] // block_m)):
            found = (expert[tile_of_e], first_tile[tile_of_e], first_row[tile_of_e], row_end[tile_of_e])
            assert found == (e, tile, offsets[e], offsets[e + 1])
        tile -= -rows[e] // block_m
    assert tile == num_tiles
    assert set(expert[num_tiles:]) <= {-1}


LAYERS = [  # T, E, top_k, H, I, ids
    pytest.param(1, 4, 2, 64, 40, "distinct", id="fewer-rows-than-BLOCK_M"),
    pytest.param(45, 3, 2, 97, 47, "sentinels", id="tails-everywhere"),
    pytest.param(100, 2, 2, 72, 136, "any", id="several-tiles-of-M-and-N"),
]
CASE = "tokens, experts, top_k, hidden_dim, inter, ids"
CONFIGS = [
    pytest.param({}, id="loads"),
    pytest.param({"BLOCK_M": 32, "MIN_M": 32, "GROUP_M": 1}, id="loads-ungrouped"),
    pytest.param({"BLOCK_M": 64, "num_warps": 8}, id="loads-three-heights"),
    pytest.param(ROWS_FIRST, id="loads-rows-first"),
    pytest.param({"USE_TMA": True}, id="tma"),
    pytest.param({**ROWS_FIRST, "USE_TMA": True}, id="tma-rows-first"),
    pytest.param({"BLOCK_M": 32, "USE_TMA": True}, id="tma-two-heights"),
    pytest.param({"USE_TMA": True, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8}, id="tma-wide"),
]


def readable(*case):
    """TMA wants 16-byte strides and 16-bit elements."""
    *_, hidden_dim, inter, _, changes, dtype = case
    return "USE_TMA" not in changes or (hidden_dim % 8 == inter % 8 == 0 and dtype != torch.float32)


@on_triton
@pytest.mark.parametrize(f"{CASE}, changes, dtype", covering(LAYERS, CONFIGS, DTYPES, allowed=readable))
def test_pipeline(kernel, launch, config, tokens, experts, top_k, hidden_dim, inter, ids, changes, dtype):
    config = config(**changes)
    args = x, index, weights, gate_up_proj, down_proj = layer(
        tokens, experts, top_k, hidden_dim, inter, dtype, DEVICE, ids
    )
    offsets, sorted_slots, positions, schedule = launch.route(index, experts, config.BLOCK_M)
    a = launch.gate_up(x, gate_up_proj, sorted_slots, schedule, top_k, kernel.reference.Gate(), "ieee", config)
    y = launch.grouped_gemm(a, down_proj, schedule, "ieee", config)
    rows = int(offsets[-1])
    assert a[rows:].isnan().all() and y[rows:].isnan().all(), "rows of skipped slots are never written"
    out = launch.combine(y, positions, weights)
    assert_as_good_as_torch(out, kernel.reference.moe_experts(*args), kernel.reference.moe_experts(*in_fp64(args)))


ONE_SLOT = [
    pytest.param(45, 3, 97, 47, "sentinels", id="tails-everywhere"),
    pytest.param(100, 2, 136, 72, "any", id="several-tiles-of-M-and-N"),
]


@on_triton
@pytest.mark.parametrize(
    "tokens, experts, hidden_dim, inter, ids, changes, dtype", covering(ONE_SLOT, CONFIGS, DTYPES, allowed=readable)
)
def test_one_slot_a_token(kernel, launch, config, tokens, experts, hidden_dim, inter, ids, changes, dtype):
    """The down GEMM puts each weighted row where it belongs; tokens of other ranks are exactly zero."""
    config = config(**changes)
    args = list(layer(tokens, experts, 1, hidden_dim, inter, dtype, DEVICE, ids))
    x, index, weights, gate_up_proj, down_proj = args
    args[2] = weights = weights.to(dtype)
    skipped = ((index < 0) | (index >= experts)).flatten()
    weights[skipped] = float("nan")
    _, sorted_slots, positions, schedule = launch.route(index, experts, config.BLOCK_M)
    a = launch.gate_up(x, gate_up_proj, sorted_slots, schedule, 1, kernel.reference.Gate(), "ieee", config)
    out = torch.empty_like(x)
    launch.zero_skipped(out, positions)
    assert not out[skipped].any() and out[~skipped].isnan().all()
    launch.grouped_gemm(a, down_proj, schedule, "ieee", config, out, sorted_slots, weights)
    assert not out[skipped].any()
    assert_as_good_as_torch(out, kernel.reference.moe_experts(*args), kernel.reference.moe_experts(*in_fp64(args)))


@on_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, N", [(1, 16), (37, 47), (3000, 600)])
def test_zero_tail(launch, rows, N, dtype):
    """Rows of experts keep what they hold; offsets that promise more rows than there are lead nowhere."""
    for end in {0, 1, rows // 2, rows - 1, rows, rows + 5}:
        y = torch.full((rows + 1, N), float("nan"), dtype=dtype, device=DEVICE)
        launch.zero_tail(y[:rows], torch.tensor([0, end // 2, end], dtype=torch.int32, device=DEVICE))
        assert y[:end].isnan().all() and not y[end:rows].any() and y[rows:].isnan().all()


@on_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    CASE,
    [  # a program knows one slot: more of them show nothing
        pytest.param(1, 4, 2, 64, 40, "distinct", id="one-token"),
        pytest.param(7, 3, 2, 97, 47, "sentinels", id="tails-everywhere"),
        pytest.param(3, 2, 2, 72, 136, "any", id="several-tiles-of-N"),
        pytest.param(5, 4, 3, 96, 48, "sentinels", id="whole-vectors"),
    ],
)
def test_decode(kernel, launch, tokens, experts, top_k, hidden_dim, inter, ids, dtype):
    config = import_module(f"{kernel.__name__}.launch_configs").DecodeConfig(8, 32, 4)
    args = x, index, weights, gate_up_proj, down_proj = layer(
        tokens, experts, top_k, hidden_dim, inter, dtype, DEVICE, ids
    )
    weights[(index < 0) | (index >= experts)] = float("nan")
    a = launch.gate_up_decode(x, gate_up_proj, index, kernel.reference.Gate(), config)
    out = launch.down_decode(a, down_proj, index, weights, config)
    assert_as_good_as_torch(out, kernel.reference.moe_experts(*args), kernel.reference.moe_experts(*in_fp64(args)))


def readable_variant(hidden_dim, inter, variant, changes):
    """TMA wants 16-byte strides, and of transposed weights interleaved ones."""
    return "USE_TMA" not in changes or (hidden_dim % 8 == 0 and variant not in ("aria", "openai-privacy-filter"))


@on_triton
@pytest.mark.parametrize(
    "hidden_dim, inter, variant, changes",
    covering(
        [pytest.param(72, 80, id="72-80"), pytest.param(97, 47, id="97-47")],
        VARIANTS,
        [p for p in CONFIGS if p.id in ("loads", "loads-rows-first", "tma", "tma-rows-first")],
        allowed=readable_variant,
    ),
)
def test_pipeline_of_variants(kernel, launch, config, hidden_dim, inter, variant, changes):
    config, (args, kwargs) = (
        config(**changes),
        variant_of(variant, layer(45, 3, 2, hidden_dim, inter, DTYPES[0], DEVICE)),
    )
    x, index, weights, gate_up_proj, down_proj = args
    gate = gate_of(kernel.reference, kwargs)
    index[::7, 0] = -1
    offsets, sorted_slots, positions, schedule = launch.route(index, 3, config.BLOCK_M)
    z = torch.empty(90, 2 * inter, dtype=x.dtype, device=DEVICE)
    biases = kwargs.get("gate_up_proj_bias"), kwargs.get("down_proj_bias")
    a = launch.gate_up(x, gate_up_proj, sorted_slots, schedule, 2, gate, "ieee", config, z, biases[0])
    y = launch.grouped_gemm(a, down_proj, schedule, "ieee", config, bias=biases[1])
    rows = int(offsets[-1])
    assert all(t[rows:].isnan().all() for t in (a, y, z)), "rows of skipped slots are never written"
    ops = import_module(f"{kernel.__name__}.experts.ops")
    expected_z = ByKind(ops, where="cpu").training(*args, *biases, *gate)[1]
    torch.testing.assert_close(z[:rows], expected_z[:rows], rtol=1e-2, atol=1e-2)
    exact = kernel.reference.moe_experts(*in_fp64(args), **in_fp64(kwargs))
    out = launch.combine(y, positions, weights)
    assert_as_good_as_torch(out, kernel.reference.moe_experts(*args, **kwargs), exact)


@on_triton
@pytest.mark.parametrize(
    "hidden_dim, inter, variant, blocks",
    covering(
        [pytest.param(96, 48, id="96-48"), pytest.param(97, 47, id="97-47")],
        VARIANTS,
        [pytest.param((8, 32), id="columns-8"), pytest.param((32, 32), id="columns-32")],
    ),
)
def test_decode_of_variants(kernel, launch, hidden_dim, inter, variant, blocks):
    config = import_module(f"{kernel.__name__}.launch_configs").DecodeConfig(*blocks, 4)
    args, kwargs = variant_of(variant, layer(5, 3, 2, hidden_dim, inter, DTYPES[0], DEVICE, "sentinels"))
    x, index, weights, gate_up_proj, down_proj = args
    weights[(index < 0) | (index >= 3)] = float("nan")
    gate = gate_of(kernel.reference, kwargs)
    a = launch.gate_up_decode(x, gate_up_proj, index, gate, config, kwargs.get("gate_up_proj_bias"))
    out = launch.down_decode(a, down_proj, index, weights, config, kwargs.get("down_proj_bias"))
    exact = kernel.reference.moe_experts(*in_fp64(args), **in_fp64(kwargs))
    assert_as_good_as_torch(out, kernel.reference.moe_experts(*args, **kwargs), exact)


WHOLE = pytest.mark.parametrize(
    "tokens, experts, top_k, hidden_dim, inter, ids",
    [
        pytest.param(1, 8, 2, 64, 40, "sentinels", id="decode"),
        pytest.param(20, 8, 2, 64, 40, "sentinels", id="small-tiles"),
        pytest.param(20, 8, 2, 63, 41, "sentinels", id="small-tiles-without-tma"),
        pytest.param(60, 4, 2, 64, 40, "any", id="tall-tiles"),
        pytest.param(330, 3, 2, 64, 40, "zipf", id="tall-tiles-with-joined-tails"),
        pytest.param(40, 8, 1, 64, 40, "sentinels", id="one-slot-a-token"),
    ],
)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU test_moe_experts.py runs this path")
@pytest.mark.parametrize("variant", [None, "gpt-oss", "openai-privacy-filter"])
@WHOLE
def test_whole_path(kernel, monkeypatch, tokens, experts, top_k, hidden_dim, inter, ids, variant):
    names = ("experts.forward", "weights", "weights.dense", "gpu")
    forward, weights, dense, gpu = (import_module(f"{kernel.__name__}.{name}") for name in names)
    enter_no_device(monkeypatch)
    monkeypatch.setattr(gpu, "traits", lambda device: gpu.TRAITS["sm_90"])
    readable = dense.as_readable  # Gluon has no interpreter
    monkeypatch.setattr(dense, "as_readable", lambda *a, **k: readable(*a, **k)._replace(WARP_SPECIALIZED=False))
    monkeypatch.setattr(gpu, "device_name", lambda device: "")
    args = layer(tokens, experts, top_k, hidden_dim, inter, torch.float16, DEVICE, ids)
    args, kwargs = variant_of(variant, args) if variant else (args, {})
    biases = kwargs.get("gate_up_proj_bias"), kwargs.get("down_proj_bias")
    projections = map(weights.Projection, args[3:], biases)
    out = forward.forward(*args[:3], *projections, gate_of(kernel.reference, kwargs), False)
    exact = kernel.reference.moe_experts(*in_fp64(args), **in_fp64(kwargs))
    assert_as_good_as_torch(out, kernel.reference.moe_experts(*args, **kwargs), exact)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "tokens, experts, top_k, K, N, ids",
    [
        pytest.param(1, 4, 1, 64, 256, "any", id="one-row"),
        pytest.param(300, 8, 2, 136, 264, "sentinels", id="tails-in-K-and-N"),
        pytest.param(500, 7, 1, 320, 128, "one", id="all-on-one-expert"),
        pytest.param(700, 3, 2, 1024, 8, "zipf", id="K-longer-than-the-stages"),
        pytest.param(3000, 16, 4, 512, 1024, "zipf", id="more-tiles-than-programs"),
        pytest.param(1500, 300, 4, 128, 256, "any", id="tiles-of-few-rows"),
    ],
)
def test_warp_specialized(kernel, launch, config, tokens, experts, top_k, K, N, ids, dtype):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("for Hopper")
    _, index, _, _, weight = layer(tokens, experts, top_k, N, K, dtype, DEVICE, ids)
    x = torch.randn(index.numel(), K, dtype=dtype, device=DEVICE)
    offsets, sorted_slots, _, schedule = launch.route(index, experts, 128)
    rows = int(offsets[-1])
    exact = kernel.reference.grouped_gemm(x.double(), weight.double(), offsets)
    expected = kernel.reference.grouped_gemm(x, weight, offsets)
    warp_specialized = config(num_stages=4, USE_TMA=True, WARP_SPECIALIZED=True)
    results = [launch.grouped_gemm(x, weight, schedule, "ieee", warp_specialized) for _ in range(3)]
    for y in results:  # the same schedule serves again
        assert y[rows:].isnan().all(), "rows that belong to no expert are never written"
        assert_as_good_as_torch(y[:rows], expected[:rows], exact[:rows])
        assert torch.equal(y[:rows], results[0][:rows])

    # In the order of slots, each row times a number.
    factors = torch.rand(index.numel(), device=DEVICE)
    in_slots = torch.empty_like(results[0])
    launch.grouped_gemm(x, weight, schedule, "ieee", warp_specialized, in_slots, sorted_slots, factors)
    of_rows = factors[sorted_slots[:rows]][:, None]
    scaled = [in_slots[sorted_slots[:rows]], (expected[:rows] * of_rows).to(dtype), exact[:rows] * of_rows]
    assert_as_good_as_torch(*scaled)
    assert in_slots[sorted_slots[rows:]].isnan().all()


@on_triton
@pytest.mark.parametrize(
    "changes, rank, transposed",
    covering(
        [
            *(p for p in CONFIGS if p.id in ("loads", "loads-rows-first", "tma-rows-first")),
            pytest.param(
                {"BLOCK_M": 128, "MIN_M": 64, "num_stages": 4, "USE_TMA": True, "WARP_SPECIALIZED": True},
                id="warp-specialized",
            ),
        ],
        [16, 48, 80],
        [False, True],
    ),
)
def test_low_rank(kernel, launch, config, changes, rank, transposed):
    """A second product in the same tiles; what an expert without rows holds, before and after others, is not read."""
    config = config(**changes)
    if config.WARP_SPECIALIZED and (INTERPRETED or torch.cuda.get_device_capability()[0] != 9):
        pytest.skip("for Hopper")
    experts, K = 5, 128
    tokens, N = (60, 136) if INTERPRETED else (150, 264)  # several tiles of the configurations there
    _, index, _, _, weight = layer(tokens, experts, 2, N, K, DTYPES[0], DEVICE, "any")
    index[index == 2] = 3
    index[::9, 0] = -1
    slots = index.numel()
    generator = torch.Generator().manual_seed(0)
    x, u, factor, bias = (
        torch.randn(shape, generator=generator).to(DEVICE, DTYPES[0]) * scale
        for shape, scale in (((slots, K), 1), ((slots, rank), 1), ((experts, N, rank), 0.1), ((experts, N), 1))
    )
    weight[2], factor[2], bias[2] = (float("nan"),) * 3
    if transposed:
        weight = weight.mT.contiguous().mT
    bias = None if config.WARP_SPECIALIZED else bias
    offsets, _, _, schedule = launch.route(index, experts, config.BLOCK_M)
    rows = int(offsets[-1])
    x[rows:], u[rows:] = float("nan"), float("nan")

    def expected(x, weight, u, factor, bias):
        y = kernel.reference.grouped_gemm(x, weight, offsets, bias)
        return (y + kernel.reference.grouped_gemm(u, factor, offsets))[:rows]

    args = (x, weight, u, factor, bias)
    y = launch.grouped_gemm(x, weight, schedule, "ieee", config, bias=bias, low_rank=(u, factor))
    assert y[rows:].isnan().all(), "rows that belong to no expert are never written"
    assert_as_good_as_torch(y[:rows], expected(*args), expected(*in_fp64(args)))


@on_triton
@pytest.mark.parametrize("limit", [None, 1.0])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu", "swigluoai"])
def test_activations_keep_nan(kernel, launch, config, activation, limit):
    x, index, weights, gate_up_proj, down_proj = layer(20, 2, 1, 32, 64, device=DEVICE)
    x[3] = float("nan")
    gate = kernel.reference.Gate(activation, limit)
    _, sorted_slots, positions, schedule = launch.route(index, 2, 16)
    a = launch.gate_up(x, gate_up_proj, sorted_slots, schedule, 1, gate, "ieee", config())
    y = launch.grouped_gemm(a, down_proj, schedule, "ieee", config())
    out = launch.combine(y, positions, weights)
    expected = kernel.reference.moe_experts(x, index, weights, gate_up_proj, down_proj, activation, limit=limit)
    torch.testing.assert_close(out, expected, equal_nan=True)


@on_triton
def test_weights_may_be_transposed_views(launch, config):
    x = torch.randn(40, 48, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    weight = torch.randn(2, 48, 70, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    offsets = torch.tensor([0, 18, 40], dtype=torch.int32, device=DEVICE)
    y = launch.grouped_gemm(x, weight.mT, launch.tile_schedule(offsets, 40, 16), "ieee", config())
    torch.testing.assert_close(y, torch.cat([x[:18] @ weight[0], x[18:] @ weight[1]]), rtol=1e-4, atol=1e-4)


@on_triton
def test_offsets_that_promise_too_many_rows_stay_in_memory(launch):
    offsets = torch.tensor([0, 18, 90], dtype=torch.int32, device=DEVICE)
    schedule = launch.tile_schedule(offsets, 40, 16)
    assert_schedules(schedule, [0, 18, 40], 16)
