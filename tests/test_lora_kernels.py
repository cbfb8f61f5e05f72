"""The two ops of LoRA against the layer composed of grouped GEMMs, in fp64; see test_kernels.py."""

import os
import subprocess
import sys
from contextlib import nullcontext
from importlib import import_module

import pytest
import torch

from oracle import VARIANTS, assert_as_good_as_torch, gate_of, in_fp64, layer, variant_of
from test_kernels import DEVICE, DTYPES, INTERPRETED, on_triton
from test_lora import SCALINGS, adapters


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the tests below run in this process")
def test_under_the_interpreter():
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=True,
    )


F16, F32 = DTYPES
CASES = [  # T, E, top_k, H, I, ids, ranks for gate_up, ranks for down, variant, dtype, TMA
    pytest.param(20, 2, 2, 72, 40, "any", [16], [16], None, F16, True, id="r-16"),
    pytest.param(20, 2, 2, 40, 24, "any", [16], [16], None, F32, False, id="r-16-fp32"),
    pytest.param(20, 3, 2, 41, 23, "sentinels", [3], [3], None, F16, False, id="r-3-odd-sizes"),
    pytest.param(10, 2, 2, 40, 24, "any", [3, 16], [], None, F32, True, id="gate_up-alone-two-adapters"),
    pytest.param(10, 2, 2, 40, 24, "any", [], [3], None, F32, False, id="down-alone"),
    pytest.param(35, 2, 2, 32, 16, "one", [3], [70], None, F32, True, id="expert-without-rows-and-rank-of-two-tiles"),
    pytest.param(20, 3, 1, 32, 16, "sentinels", [16], [3], None, F32, False, id="one-slot-a-token"),
    # fp32: what a limit cuts off is not a matter of rounding.
    pytest.param(15, 3, 2, 72, 40, "sentinels", [16], [3], "gpt-oss", F32, True, id="gpt-oss"),
    pytest.param(15, 3, 2, 40, 24, "sentinels", [3], [16], "openai-privacy-filter", F32, False, id="biases-and-limit"),
]
CASE = "tokens, experts, top_k, hidden_dim, inter, ids, up_ranks, down_ranks, variant, dtype, use_tma"
NAMES = "hidden_states top_k_weights gate_up_proj down_proj gate_up_bias down_bias A1 B1 A2 B2".split()


@pytest.fixture
def ops(kernel, monkeypatch):
    """(use_tma=False) -> lora_ops.py, with small tiles, run on what is there."""

    def ops(use_tma=False):
        names = ("functional", "tuning", "lora_ops")
        functional, tuning, ops = (import_module(f"{kernel.__name__}.{name}") for name in names)
        config = tuning.GemmConfig(64, 16, 64, 64, 2, 4, 2, use_tma)
        monkeypatch.setattr(functional, "_config", lambda *args: tuning.ExpertsConfig(config, config))
        monkeypatch.setattr(functional, "_capability", lambda device: (9, 0))
        monkeypatch.setattr(tuning, "wgrad_config", lambda *args: config)
        monkeypatch.setattr(torch.cuda, "device_of", lambda x: nullcontext())
        return ops

    return ops


@pytest.fixture(scope="module")
def lora(kernel):
    return import_module(f"{kernel.__name__}.lora")


def arguments(lora, args, kwargs, up_ranks, down_ranks):
    """Of the op, but for the gate: inputs, biases or None, joined factors or None."""
    factors = []
    for weight, ranks, seed in ((args[3], up_ranks, 1), (args[4], down_ranks, 2)):
        ts = list(adapters(weight, ranks, seed))
        each = [lora.LoraFactors(A, B.permute(2, 0, 1), s) for A, B, s in zip(ts[::2], ts[1::2], SCALINGS)]
        factors += lora._join("lora", each, weight, import_module(lora.__name__ + "_ops").RANK_MULTIPLE)
    return [*args, kwargs.get("gate_up_proj_bias"), kwargs.get("down_proj_bias"), *factors]


def expected(lora, inputs, dout, gate):
    """Result and gradients of the composed path, on the CPU."""
    inputs = [t if t is None else t.cpu().detach() for t in inputs]
    inputs = [t if t is None else t.requires_grad_(t.is_floating_point()) for t in inputs]
    factors = [(lora.LoraFactors(A, B, 1.0),) if A is not None else () for A, B in (inputs[7:9], inputs[9:])]
    out = lora.moe_experts_lora(*inputs[:5], *factors, gate, *inputs[5:7])
    floats = [t for t in inputs if t is not None and t.requires_grad]
    grads = iter(torch.autograd.grad(out, floats, dout.cpu().to(out)))
    return [out.detach(), *(None if t is None else next(grads) for t in (inputs[0], *inputs[2:]))]


def gradients(ops, inputs, dout, gate, needed=range(10)):
    out, *saved = ops._forward_gpu(*inputs, *gate)
    differentiable = [inputs[0], *inputs[2:]]
    needs_grad = [i in needed and t is not None for i, t in enumerate(differentiable)]
    return out, ops._backward_gpu(dout, *differentiable, *saved, needs_grad, *gate)


def layer_of(kernel, lora, tokens, experts, top_k, hidden_dim, inter, ids, up_ranks, down_ranks, variant, dtype):
    args = layer(tokens, experts, top_k, hidden_dim, inter, dtype, DEVICE, ids)
    args[2][(args[1] < 0) | (args[1] >= experts)] = float("nan")
    args, kwargs = variant_of(variant, args) if variant in VARIANTS else (args, {})
    dout = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    return arguments(lora, args, kwargs, up_ranks, down_ranks), dout, gate_of(kernel.reference, kwargs)


@on_triton
@pytest.mark.parametrize(CASE, CASES)
def test_gradients(
    kernel, lora, ops, tokens, experts, top_k, hidden_dim, inter, ids, up_ranks, down_ranks, variant, dtype, use_tma
):
    case = (tokens, experts, top_k, hidden_dim, inter, ids, up_ranks, down_ranks, variant)
    inputs, dout, gate = layer_of(kernel, lora, *case, dtype)
    out, grads = gradients(ops(use_tma), inputs, dout, gate)
    torch_results = expected(lora, inputs, dout, gate)
    exact = expected(lora, in_fp64(inputs), dout.double(), gate)
    for name, got, of_torch, e in zip(("out", *NAMES), (out, *grads), torch_results, exact):
        if e is None:
            assert not got.numel(), name
            continue
        try:
            assert_as_good_as_torch(got.cpu(), of_torch, e, dtype)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@on_triton
def test_only_what_is_needed(kernel, lora, ops):
    """One gradient alone is what it is among all, bit by bit."""
    inputs, dout, gate = layer_of(kernel, lora, 6, 1, 2, 16, 16, "sentinels", [3], [3], "gpt-oss", torch.float32)
    _, together = gradients(ops(), inputs, dout, gate)
    for needed in range(10):
        _, alone = gradients(ops(), inputs, dout, gate, [needed])
        for i in range(10):
            assert torch.equal(alone[i], together[i]) if i == needed else alone[i].numel() == 0


@on_triton
@pytest.mark.parametrize("tokens, up_ranks, down_ranks", [(10, [3], [17]), (10, [], [3]), (0, [3], [3])])
def test_fakes_are_of_the_results(kernel, lora, ops, tokens, up_ranks, down_ranks):
    case = (tokens, 2, 2, 16, 16, "any", up_ranks, down_ranks, "gpt-oss")
    inputs, dout, gate = layer_of(kernel, lora, *case, torch.float32)
    ops = ops()

    def meta(tensors):
        return [None if t is None else t.to("meta") for t in tensors]

    def layouts(tensors):
        return [(t.shape, t.stride(), t.dtype) for t in tensors]

    outputs = ops._forward_gpu(*inputs, *gate)
    assert layouts(ops._forward_fake(*meta(inputs), *gate)) == layouts(outputs)
    args = [dout, inputs[0], *inputs[2:], *outputs[1:]]
    for needs_grad in ([t is not None for t in args[1:11]], [False] * 10):
        fakes = ops._backward_fake(*meta(args), needs_grad, *gate)
        assert layouts(fakes) == layouts(ops._backward_gpu(*args, needs_grad, *gate))
