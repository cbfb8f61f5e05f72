"""Random layers in random layouts against a dense fp64 oracle, forward and gradients; the same cases on every run, and
others with --seed.

500 cases where there is no GPU: most of them on the CPU, some through the kernels in Triton's interpreter, in a process
of its own. On a GPU 5,000, of few sizes that kernels are specialised on, so that Triton compiles some dozens of them.
Whatever lies beside the tensors, and in memory that is handed out, is NaN.
"""

import os
from dataclasses import dataclass
from importlib import import_module

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from interpreted import INTERPRETED, under_the_interpreter
from oracle import experts_densely

CPU_CASES, INTERPRETED_CASES, GPU_CASES = 470, 30, 5000
GPU_PARTS = 4  # of each dtype, for as many workers
ACTIVATIONS = ["silu", "gelu", "gelu_pytorch_tanh", "relu"]
LAYOUTS = ["contiguous", "transposed", "wide", "unaligned", "every-second"]
# Of slots: to experts at random; to one; to the first two; with ids of other ranks, most of them or all.
ROUTES = ["any", "one", "two", "sentinels", "mostly-sentinels", "sentinels-only"]
pytestmark = [pytest.mark.fuzz, pytest.mark.usefixtures("one_thread")]
NAMES = ["out", "hidden_states", "top_k_weights", "gate_up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    tokens: int
    experts: int
    top_k: int
    hidden_dim: int
    inter: int
    dtype: torch.dtype
    weights_dtype: torch.dtype
    index_dtype: torch.dtype
    route: str
    x_layout: str
    routing_layout: str
    weight_layout: str
    activation: str
    seed: int


def cases(**choices):
    """Case of what each strategy draws."""
    return st.builds(Case, route=st.sampled_from(ROUTES), seed=st.integers(0, 2**31), **choices)


def runs(count, part=0):
    """The decorator of a test that is to run with `count` cases; other parts have others."""
    options = settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # a case that fails is small enough; to shrink it takes minutes
    )
    return lambda test: seed(1000 * int(os.environ.get("PYTEST_SEED", "0")) + part)(options(test))


def lay_out(x, layout, beside):
    """The same numbers in another layout, `beside` between and around them; a leaf."""
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "every-second":
        buffer = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), beside)
        view = buffer[..., ::2]
    elif layout == "contiguous":
        buffer = x.new_full((x.numel() + 32,), beside)
        view = buffer[16 : 16 + x.numel()].view(x.shape)
    else:
        start = 16 if layout == "wide" else 1
        buffer = x.new_full((*x.shape[:-1], 32 + x.shape[-1]), beside)
        view = buffer[..., start : start + x.shape[-1]]
    view.copy_(x)
    return view


def draw_layer(case, device):
    """What `moe_experts` takes, floats as leaves, and the gradient of its result."""
    generator = torch.Generator().manual_seed(case.seed)
    T, E, top_k, H, I = case.tokens, case.experts, case.top_k, case.hidden_dim, case.inter

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    most = {"one": 1, "two": min(E, 2)}.get(case.route, E)
    index = torch.randint(0, most, (T, top_k), generator=generator)
    odds = {"sentinels": 0.4, "mostly-sentinels": 0.9, "sentinels-only": 1.0}.get(case.route, 0.0)
    outside = torch.tensor([-1, -(2**31), E, E + 1, 2**31 - 1])[torch.randint(0, 5, (T, top_k), generator=generator)]
    index = torch.where(torch.rand(T, top_k, generator=generator) < odds, outside, index)
    weights = torch.rand(T, top_k, generator=generator).masked_fill((index < 0) | (index >= E), float("nan"))
    x, gate_up_proj, down_proj, dout = randn(T, H), randn(E, 2 * I, H) / H**0.5, randn(E, H, I) / I**0.5, randn(T, H)

    nan = float("nan")
    floats = [
        lay_out(t.to(device, dtype), layout, nan).requires_grad_()
        for t, dtype, layout in (
            (x, case.dtype, case.x_layout),
            (weights, case.weights_dtype, case.routing_layout),
            (gate_up_proj, case.dtype, case.weight_layout),
            (down_proj, case.dtype, case.weight_layout),
        )
    ]
    index = lay_out(index.to(device, case.index_dtype), case.routing_layout, -5)
    return [floats[0], index, *floats[1:]], dout.to(device, case.dtype)


def floats_of(args):
    return [t for t in args if t.is_floating_point()]


def with_gradients(function, args, dout, activation):
    out = function(*args, activation)
    return [out, *torch.autograd.grad(out, floats_of(args), dout.to(out.dtype))]


def leaves(args, dtype):
    return [t.detach().to(dtype).requires_grad_() if t.is_floating_point() else t for t in args]


def expect(case, args, dout):
    """(torch's, true) of the result and each gradient: of the dense layer in this dtype, and in fp64."""
    dtypes = (case.dtype, torch.float64)
    return list(zip(*(with_gradients(experts_densely, leaves(args, d), dout, case.activation) for d in dtypes)))


def check(case, args, got, expected):
    """No further from fp64 than twice what torch is in this dtype, and some roundings."""
    for name, ours, (torchs, true) in zip(NAMES, got, expected):
        assert ours.shape == true.shape, name
        if true.numel() == 0:
            continue
        eps = torch.finfo(case.weights_dtype if name == "top_k_weights" else case.dtype).eps
        eps = max(eps, torch.finfo(case.dtype).eps)
        # Inputs are of a size that makes every result about 1; a single one may have cancelled. Sums of products, in
        # fp32 for the 16-bit types, lose more bits than one rounding does. 1e-14: fp64's own sums.
        scale = max(true.abs().max().item(), 0.5)
        tolerance = ((32 if eps < 1e-6 else 8) * eps + 1e-14) * scale
        error, torch_error = (ours.double() - true).abs().max(), (torchs.double() - true).abs().max()
        assert error <= 2 * torch_error + tolerance, f"{name}: error {error:.3g}, torch's {torch_error:.3g}"
        if name == "out":
            skipped = ((args[1] < 0) | (args[1] >= case.experts)).all(dim=1)
            assert not ours[skipped].any(), "a token without an expert here is exactly zero"


DIMS = st.integers(1, 40)
ANY_LAYOUT = st.sampled_from(LAYOUTS)
FLOATS = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the GPU gets more of it")
def test_cpu(kernel, monkeypatch):
    """Both ways of the CPU: plain autograd, and the op that a graph of torch.compile has."""

    @runs(CPU_CASES)
    @given(
        cases(
            tokens=st.integers(0, 40),
            experts=st.integers(1, 9),
            top_k=st.integers(0, 6),
            hidden_dim=DIMS,
            inter=DIMS,
            dtype=st.sampled_from([*FLOATS, torch.float64]),
            weights_dtype=st.sampled_from(FLOATS),
            index_dtype=st.sampled_from([torch.int32, torch.int64]),
            x_layout=ANY_LAYOUT,
            routing_layout=ANY_LAYOUT,
            weight_layout=ANY_LAYOUT,
            activation=st.sampled_from(ACTIVATIONS),
        ),
        st.booleans(),
    )
    def run(case, as_op):
        args, dout = draw_layer(case, "cpu")
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: as_op)
            got = with_gradients(kernel.moe_experts, args, dout, case.activation)
            inference = kernel.moe_experts(*(t.detach() for t in args), case.activation)
        expected = expect(case, args, dout)
        check(case, args, got, expected)
        check(case, args, [inference], expected)

    run()


test_under_the_interpreter = under_the_interpreter(__file__)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the test below does more")
def test_interpreted(kernel, path, monkeypatch):
    """Tokens that fill few tiles of 16, and tails everywhere."""
    monkeypatch.setattr(import_module(f"{kernel.__name__}.gpu"), "device_name", lambda device: "")
    forward = import_module(f"{kernel.__name__}.experts.forward").forward
    Projection = import_module(f"{kernel.__name__}.weights").Projection

    @runs(INTERPRETED_CASES // 2)
    @given(
        cases(
            tokens=st.integers(1, 12),
            experts=st.integers(1, 5),
            top_k=st.integers(1, 3),
            hidden_dim=st.integers(1, 36),
            inter=st.integers(1, 36),
            dtype=st.sampled_from([torch.float16, torch.float32]),
            weights_dtype=st.sampled_from([torch.float16, torch.float32]),
            index_dtype=st.sampled_from([torch.int32, torch.int64]),
            x_layout=ANY_LAYOUT,
            routing_layout=ANY_LAYOUT,
            weight_layout=ANY_LAYOUT,
            activation=st.sampled_from(ACTIVATIONS),
        )
    )
    def run(case):
        args, dout = draw_layer(case, "cpu")
        expected, plain = expect(case, args, dout), [t.detach() for t in args]
        no_biases, gate = (None, None), kernel.reference.Gate(case.activation)
        check(case, args, [forward(*plain[:3], *map(Projection, plain[3:]), gate, False)], expected)
        out, *saved = path.training(*plain, *no_biases, *gate)
        x, _, *rest = plain
        grads = path.backward(dout, x, *rest, *no_biases, *saved, [True] * 4 + [False] * 2, *gate)
        check(case, args, [out, *grads[:4]], expected)

    run()


def poison():
    """What the allocator has for small tensors becomes NaN."""
    blocks = [torch.full((2**17 - 1,), float("nan"), device="cuda") for _ in range(16)]
    del blocks


@pytest.mark.long
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="for a GPU")
@pytest.mark.parametrize("part", range(GPU_PARTS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gpu(kernel, dtype, part):
    """bf16 in sizes that TMA reads, fp32 in sizes without any divisor; eight experts, and rows for each table entry."""
    aligned = dtype == torch.bfloat16

    @runs(GPU_CASES // 2 // GPU_PARTS, part)
    @given(
        cases(
            # Slots: one token and few (decode), up to 80 (10 an expert: low tiles), more than 400 (the tallest).
            tokens=st.one_of(st.just(1), st.integers(2, 80), st.integers(401, 512)),
            experts=st.just(8),
            top_k=st.sampled_from([1, 2]),
            hidden_dim=st.just(64 if aligned else 37),
            inter=st.just(48 if aligned else 19),
            dtype=st.just(dtype),
            weights_dtype=st.just(torch.float32),
            index_dtype=st.just(torch.int64),
            x_layout=ANY_LAYOUT,
            routing_layout=st.sampled_from(["contiguous", "every-second"]),
            weight_layout=st.sampled_from(["contiguous", "wide"] if aligned else ["contiguous", "transposed"]),
            activation=st.just("silu"),
        )
    )
    def run(case):
        args, dout = draw_layer(case, "cuda")
        expected = expect(case, args, dout)
        poison()
        got = with_gradients(kernel.moe_experts, args, dout, case.activation)
        poison()
        with torch.no_grad():
            inference = kernel.moe_experts(*args, case.activation)
        check(case, args, got, expected)
        check(case, args, [inference], expected)

    run()
