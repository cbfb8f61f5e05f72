"""The kernels of the backward against the fp64 gradients, in small tiles and odd sizes; see test_kernels.py."""

from importlib import import_module

import pytest
import torch

from flat import KINDS, ByKind
from interpreted import DEVICE, DTYPES, on_triton, under_the_interpreter
from oracle import VARIANTS, assert_as_good_as_torch, gate_of, in_fp64, layer, variant_of

test_under_the_interpreter = under_the_interpreter(__file__, parts=2)


CASES = [  # T, E, top_k, H, I, ids
    pytest.param(5, 2, 2, 40, 24, "distinct", id="fewer-rows-than-BLOCK_M"),
    pytest.param(30, 3, 2, 67, 37, "sentinels", id="tails-everywhere"),
    pytest.param(40, 2, 2, 72, 72, "any", id="several-tiles-of-each"),
    pytest.param(30, 3, 2, 40, 24, "one", id="all-on-one-expert"),
    pytest.param(20, 3, 1, 47, 33, "sentinels", id="one-slot-a-token"),
]
NAMES = list(KINDS)[:6]


def gradients(training, backward, dout, args, kwargs, gate, needed=range(6)):
    biases = kwargs.get("gate_up_proj_bias"), kwargs.get("down_proj_bias")
    _, _, weights, gate_up_proj, down_proj = args
    out, *saved = training(*args, *biases, *gate)
    inputs = (dout, args[0], weights, gate_up_proj, down_proj, *biases)
    needs_grad = [i in needed and (i < 4 or biases[i - 4] is not None) for i in range(6)]
    return out, backward(*inputs, *saved, needs_grad, *gate)


# Every case with silu in every dtype; the other gates and layouts once.
GRADIENTS = [
    *((case, "silu", dtype) for case in CASES for dtype in DTYPES),
    # In fp32: in fewer bits a value may fall on either side of a clamp.
    *((CASES[1], variant, torch.float32) for variant in ("gelu", "gelu_pytorch_tanh", "relu", *VARIANTS)),
    (CASES[2], "gpt-oss", torch.float32),
]
GRADIENTS = [pytest.param(*c.values, v, d, id=f"{c.id}-{v}-{str(d)[6:]}") for c, v, d in GRADIENTS]
# Sizes that TMA can read.
GRADIENTS += [
    pytest.param(20, 3, 2, 72, 40, "sentinels", variant, DTYPES[0], id=f"aligned-{variant}")
    for variant in ("gpt-oss", "openai-privacy-filter", "interleaved")
]


@on_triton
@pytest.mark.parametrize("tokens, experts, top_k, hidden_dim, inter, ids, variant, dtype", GRADIENTS)
def test_gradients(kernel, path, tokens, experts, top_k, hidden_dim, inter, ids, variant, dtype):
    if hidden_dim % 2 and inter % 2 and import_module(f"{kernel.__name__}.tuning").wgrad_config().USE_TMA:
        pytest.skip("TMA reads no rows of such lengths: all would be loads")
    args = layer(tokens, experts, top_k, hidden_dim, inter, dtype, DEVICE, ids)
    args[2][(args[1] < 0) | (args[1] >= experts)] = float("nan")
    args, kwargs = variant_of(variant, args) if variant in VARIANTS else (args, {"activation": variant})
    gate = gate_of(kernel.reference, kwargs)
    dout = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    ours = path.training, path.backward
    in_torch = ByKind(path.ops, where="cpu")
    reference = in_torch.training, in_torch.backward
    out, grads = gradients(*ours, dout, args, kwargs, gate)
    expected_out, expected = gradients(*reference, dout, args, kwargs, gate)
    exact_out, exact = gradients(*reference, dout.double(), in_fp64(args), in_fp64(kwargs), gate)
    assert [g.stride() for g in grads] == [g.stride() for g in expected]
    for name, *triple in zip(("out", *NAMES), (out, *grads), (expected_out, *expected), (exact_out, *exact)):
        try:
            assert_as_good_as_torch(*triple, dtype)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@on_triton
def test_only_what_is_needed(kernel, path):
    """One gradient alone is what it is among all."""
    args, kwargs = variant_of("gpt-oss", layer(20, 2, 2, 40, 24, torch.float32, DEVICE, "sentinels"))
    gate = gate_of(kernel.reference, kwargs)
    dout = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ours = path.training, path.backward
    _, together = gradients(*ours, dout, args, kwargs, gate)
    for needed in range(6):
        _, alone = gradients(*ours, dout, args, kwargs, gate, [needed])
        for i in range(6):
            assert torch.equal(alone[i], together[i]) if i == needed else alone[i].numel() == 0


@on_triton
def test_work_follows_the_rows_of_this_rank(kernel, path, launch, monkeypatch):
    """7 of 8 slots belong to other ranks: every GEMM gets the tiles of the rest, and no other row is written."""
    args = list(layer(50, 4, 8, 32, 16, torch.float32, DEVICE, "any"))
    args[1] = torch.randint(0, 32, (50, 8), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    rows = torch.bincount(args[1][args[1] < 4], minlength=4)
    padded = (rows + 63) // 64 * 64  # in the backward
    assert rows.sum() < 0.2 * args[1].numel()
    seen = []

    def record(name, schedule_at):
        function = getattr(launch, name)

        def recorded(*args, **kwargs):
            result = function(*args, **kwargs)
            seen.append((name, None if schedule_at is None else args[schedule_at], result))
            return result

        monkeypatch.setattr(launch, name, recorded)

    for name, schedule_at in {"gate_up": 3, "grouped_gemm": 2, "gather": None, "glu_backward": None}.items():
        record(name, schedule_at)
    dout = torch.ones(args[0].shape, device=DEVICE)
    gradients(path.training, path.backward, dout, args, {}, kernel.reference.Gate())
    forward, backward = ["gate_up", "grouped_gemm"], ["gather", "grouped_gemm", "glu_backward"]
    assert [name for name, *_ in seen] == [*forward, *backward, "grouped_gemm", "gather"]
    for i, (name, schedule, results) in enumerate(seen):
        counts = rows if i < len(forward) else padded
        if schedule is not None:
            assert schedule[4, 0] == ((counts + 15) // 16).sum(), name
        for result in results[:2] if isinstance(results, tuple) else [results]:  # dz and weighted_a
            owned = int(counts.sum())
            assert result.shape[0] >= args[1].numel()
            assert result[owned:].isnan().all() and not result[:owned].isnan().any(), name


@on_triton
def test_an_expert_without_rows_has_a_zero_gradient(kernel, launch):
    config = import_module(f"{kernel.__name__}.tuning").GemmConfig(16, 16, 32, 32, 2, 4, 2, False)
    offsets = torch.tensor([0, 0, 20, 20], dtype=torch.int32, device=DEVICE)
    p, q = (torch.randn(25, n, generator=torch.Generator().manual_seed(n)).to(DEVICE) for n in (33, 40))
    p[20:], q[20:] = float("nan"), float("inf")  # rows of nobody
    dw = launch.wgrad(p, q, offsets, "ieee", config)
    torch.testing.assert_close(dw[1], p[:20].T @ q[:20], rtol=1e-4, atol=1e-4)
    assert not dw[0].any() and not dw[2].any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "tokens, experts, top_k, M, N, ids",
    [
        pytest.param(1, 4, 1, 128, 256, "any", id="one-row"),
        pytest.param(300, 8, 2, 136, 264, "sentinels", id="tails-in-M-and-N"),
        pytest.param(700, 7, 1, 64, 8, "one", id="all-on-one-expert-and-less-than-a-tile"),
        pytest.param(3000, 16, 4, 512, 1024, "zipf", id="more-tiles-than-programs"),
    ],
)
def test_warp_specialized_wgrad(kernel, launch, tokens, experts, top_k, M, N, ids, dtype):
    """As the plain kernel, and bitwise the same each time; rows of nobody at the end hold anything."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("for Hopper")
    tuning = import_module(f"{kernel.__name__}.tuning")
    config = tuning.WGRAD.hopper[-1][1]
    plain = config._replace(USE_TMA=False, WARP_SPECIALIZED=False)
    x, index, *_ = layer(tokens, experts, top_k, N, 8, dtype, DEVICE, ids)
    dz = torch.randn(tokens, M, dtype=dtype, device=DEVICE)
    offsets, slots, _, _ = launch.route(index, experts, 128)
    offsets, slots, _ = launch.pad(offsets, slots)
    p, q = (launch.gather(t, slots, offsets, top_k) for t in (dz, x))
    assert p[int(offsets[-1]) :].isnan().all()
    results = [launch.wgrad(p, q, offsets, "ieee", config) for _ in range(3)]
    expected = launch.wgrad(p, q, offsets, "ieee", plain)
    exact = kernel.reference.grouped_gemm_dw(p.double(), q.double(), offsets)
    for dw in results:
        assert_as_good_as_torch(dw, expected, exact)
        assert torch.equal(dw, results[0])


@on_triton
def test_padded_order(launch):
    index = torch.tensor([[2, 0], [2, 7], [5, 2], [2, 5]], dtype=torch.int32, device=DEVICE)  # of 6 experts
    offsets, slots, positions, _ = launch.route(index, 6, 16)
    padded_offsets, padded_slots, padded_positions = launch.pad(offsets, slots)
    assert padded_offsets.tolist() == [0, 64, 64, 128, 128, 128, 192]
    assert padded_positions.tolist() == [64, 0, 65, -1, 128, 66, 67, 129]
    rows = torch.full_like(padded_slots[:192], -1)
    rows[[0, 64, 65, 66, 67, 128, 129]] = torch.tensor([1, 0, 2, 5, 6, 4, 7], dtype=torch.int32, device=DEVICE)
    assert torch.equal(padded_slots[:192], rows) and (padded_slots[192:] == -1).all()


@on_triton
@pytest.mark.parametrize("tokens, experts, top_k, ids", [(7, 3, 3, "sentinels"), (5, 2, 1, "any"), (4, 4, 2, "one")])
def test_rows_that_are_not_padded(kernel, launch, tokens, experts, top_k, ids):
    """`gather` and `glu` in the order of `route`: a number of rows without divisors, those of nobody left alone."""
    x, index, *_ = layer(tokens, experts, top_k, 72, 40, DTYPES[0], DEVICE, ids)
    offsets, slots, _, _ = launch.route(index, experts, 16)
    rows = int(offsets[-1])
    gathered = launch.gather(x, slots, offsets, top_k)
    assert torch.equal(gathered[:rows], x[slots[:rows].long() // top_k]) and gathered[rows:].isnan().all()
    out = torch.full_like(gathered, float("nan"))
    assert launch.gather(x, slots, offsets, top_k, out=out) is out
    assert torch.equal(out[:rows], gathered[:rows]) and out[rows:].isnan().all()
    gate = kernel.reference.Gate("silu")
    a = launch.glu(gathered, slots, offsets, gate)
    expected = kernel.reference.apply_gate(gathered[:rows].double(), gate)
    eps = torch.finfo(a.dtype).eps
    torch.testing.assert_close(a[:rows].double(), expected, rtol=eps, atol=eps)
    assert a[rows:].isnan().all()
