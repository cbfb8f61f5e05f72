"""The kernels of the backward against the fp64 gradients, in small tiles and odd sizes; see test_kernels.py."""

import os
import subprocess
import sys
from contextlib import nullcontext
from importlib import import_module

import pytest
import torch

from oracle import assert_as_good_as_torch, in_fp64, layer
from test_kernels import DEVICE, DTYPES, INTERPRETED, launch, on_triton  # noqa: F401


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the tests below run in this process")
def test_under_the_interpreter():
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=True,
    )


CASES = [  # T, E, top_k, H, I, ids
    pytest.param(1, 4, 2, 64, 40, "distinct", id="one-token"),
    pytest.param(45, 3, 2, 97, 47, "sentinels", id="tails-everywhere"),
    pytest.param(100, 2, 2, 72, 136, "any", id="several-tiles-of-each"),
    pytest.param(30, 5, 2, 64, 32, "one", id="all-on-one-expert"),
    pytest.param(20, 3, 1, 47, 33, "sentinels", id="one-slot-a-token"),
]
NAMES = ("hidden_states", "top_k_weights", "gate_up_proj", "down_proj")


@pytest.fixture(params=[False, True], ids=["loads", "tma"])
def path(kernel, monkeypatch, request):
    """functional.py, with small tiles, run on what is there."""
    functional, tuning = (import_module(f"{kernel.__name__}.{name}") for name in ("functional", "tuning"))
    config = tuning.GemmConfig(16, 16, 32, 32, 2, 4, 2, USE_TMA=request.param)
    monkeypatch.setattr(functional, "_config", lambda *args: tuning.ExpertsConfig(config, config))
    monkeypatch.setattr(functional, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(tuning, "backward_config", lambda *args: tuning.BackwardConfig(config, config, config))
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: nullcontext())
    return functional


def gradients(training, backward, dout, args, activation, needs_grad):
    _, _, weights, gate_up_proj, down_proj = args
    out, z, *routing = training(*args, activation)
    return out, backward(dout, args[0], weights, gate_up_proj, down_proj, z, *routing, activation, needs_grad)


@on_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("tokens, experts, top_k, hidden_dim, inter, ids", CASES)
def test_gradients(kernel, path, tokens, experts, top_k, hidden_dim, inter, ids, activation, dtype):
    args = layer(tokens, experts, top_k, hidden_dim, inter, dtype, DEVICE, ids)
    args[2][(args[1] < 0) | (args[1] >= experts)] = float("nan")
    dout = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    ours = path._training_gpu, path._backward_gpu
    reference = kernel.reference.moe_experts_training, kernel.reference.moe_experts_backward
    everything = activation, [True] * 4
    out, grads = gradients(*ours, dout, args, *everything)
    expected_out, expected = gradients(*reference, dout, args, *everything)
    exact_out, exact = gradients(*reference, dout.double(), in_fp64(args), *everything)
    for name, *triple in zip(("out", *NAMES), (out, *grads), (expected_out, *expected), (exact_out, *exact)):
        try:
            assert_as_good_as_torch(*triple)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@on_triton
@pytest.mark.parametrize("needed", range(4))
def test_only_what_is_needed(path, needed):
    """One gradient alone is what it is among all."""
    args = layer(20, 4, 2, 64, 32, torch.float32, DEVICE, "sentinels")
    dout = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ours = path._training_gpu, path._backward_gpu
    _, together = gradients(*ours, dout, args, "silu", [True] * 4)
    _, alone = gradients(*ours, dout, args, "silu", [i == needed for i in range(4)])
    for i in range(4):
        assert torch.equal(alone[i], together[i]) if i == needed else alone[i].numel() == 0


@on_triton
def test_work_follows_the_rows_of_this_rank(path, launch, monkeypatch):  # noqa: F811
    """7 of 8 slots belong to other ranks: every GEMM gets the tiles of the rest, and no other row is written."""
    args = list(layer(100, 4, 8, 64, 32, torch.float32, DEVICE, "any"))
    args[1] = torch.randint(0, 32, (100, 8), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    rows = torch.bincount(args[1][args[1] < 4], minlength=4)
    local = int(rows.sum())
    assert local < 0.2 * args[1].numel()
    seen = {}

    def record(name, schedule_at):
        function = getattr(launch, name)

        def recorded(*args, **kwargs):
            result = function(*args, **kwargs)
            of_rows = result[:2] if isinstance(result, tuple) else [result]  # down_dgrad: dz and weighted_a
            seen[name] = args[schedule_at], of_rows
            return result

        monkeypatch.setattr(launch, name, recorded)

    for name, schedule_at in {"gate_up": 3, "grouped_gemm": 2, "down_dgrad": 5, "gate_up_dgrad": 2}.items():
        record(name, schedule_at)
    dout = torch.ones(args[0].shape, device=DEVICE)
    gradients(path._training_gpu, path._backward_gpu, dout, args, "silu", [True] * 4)
    assert len(seen) == 4
    for name, (schedule, results) in seen.items():
        assert schedule[4, 0] == ((rows + 15) // 16).sum(), name
        assert schedule[4, 0] < 0.3 * schedule.shape[1]
        for result in results:
            assert result.shape[0] == args[1].numel()
            assert result[local:].isnan().all() and not result[:local].isnan().any(), name


@on_triton
def test_an_expert_without_rows_has_a_zero_gradient(kernel, launch):  # noqa: F811
    config = import_module(f"{kernel.__name__}.tuning").GemmConfig(16, 16, 32, 32, 2, 4, 2, False)
    offsets = torch.tensor([0, 0, 20, 20], dtype=torch.int32, device=DEVICE)
    p, q = (torch.randn(25, n, generator=torch.Generator().manual_seed(n)).to(DEVICE) for n in (33, 40))
    p[20:], q[20:] = float("nan"), float("inf")  # rows of nobody
    dw = launch.wgrad(p, q, offsets, offsets, "", "ieee", config, torch.float32)
    torch.testing.assert_close(dw[1], p[:20].T @ q[:20], rtol=1e-4, atol=1e-4)
    assert not dw[0].any() and not dw[2].any()
