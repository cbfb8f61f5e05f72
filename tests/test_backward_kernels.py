"""The kernels of the backward against the fp64 gradients, in small tiles and odd sizes; see test_kernels.py."""

import os
import subprocess
import sys
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
]
NAMES = ("hidden_states", "top_k_weights", "gate_up_proj", "down_proj")


def gradients(launch, dout, x, index, weights, gate_up_proj, down_proj, activation, config):  # noqa: F811
    """All four, by the kernels; the pre-activation by torch."""
    experts, top_k = gate_up_proj.shape[0], index.shape[1]
    offsets, slots, positions, schedule = launch.route(index, experts, config.BLOCK_M)
    z = x.new_full((slots.numel(), gate_up_proj.shape[1]), float("nan"))
    bounds = offsets.tolist()
    for expert, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        z[begin:end] = x[slots[begin:end] // top_k] @ gate_up_proj[expert].T
    dz, weighted_a, dweights = launch.down_dgrad(
        dout, down_proj, z, slots, weights, schedule, activation, "ieee", config
    )
    dx_rows = launch.gate_up_dgrad(dz, gate_up_proj, schedule, "ieee", config)
    routed = bounds[-1]
    assert all(rows[routed:].isnan().all() for rows in (dz, weighted_a, dx_rows)), (
        "rows of skipped slots are not written"
    )
    dx = launch.combine(dx_rows, positions, torch.ones_like(weights))
    dweights = torch.where(positions >= 0, dweights[positions.clamp(min=0)], 0.0).view_as(weights)
    dgate_up = launch.wgrad(dz, x, slots, offsets, "q", "ieee", config)
    ddown = launch.wgrad(dout, weighted_a, slots, offsets, "p", "ieee", config)
    return dx, dweights.to(weights.dtype), dgate_up, ddown


@on_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("tokens, experts, top_k, hidden_dim, inter, ids", CASES)
def test_gradients(kernel, launch, tokens, experts, top_k, hidden_dim, inter, ids, activation, dtype):  # noqa: F811
    config = import_module(f"{kernel.__name__}.tuning").GemmConfig(16, 16, 32, 32, 2, 4, 2, False)
    args = layer(tokens, experts, top_k, hidden_dim, inter, dtype, DEVICE, ids)
    x, index, weights, gate_up_proj, down_proj = args
    weights[(index < 0) | (index >= experts)] = float("nan")
    dout = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    got = gradients(launch, dout, *args, activation, config)
    needed = [True] * 4
    expected = kernel.reference.moe_experts_backward(dout, *args, activation, needed)
    exact = kernel.reference.moe_experts_backward(dout.double(), *in_fp64(args), activation, needed)
    for name, *triple in zip(NAMES, got, expected, exact):
        try:
            assert_as_good_as_torch(*triple)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@on_triton
def test_an_expert_without_rows_has_a_zero_gradient(kernel, launch):  # noqa: F811
    config = import_module(f"{kernel.__name__}.tuning").GemmConfig(16, 16, 32, 32, 2, 4, 2, False)
    offsets = torch.tensor([0, 0, 20, 20], dtype=torch.int32, device=DEVICE)
    p, q = (torch.randn(25, n, generator=torch.Generator().manual_seed(n)).to(DEVICE) for n in (33, 40))
    p[20:], q[20:] = float("nan"), float("inf")  # rows of nobody
    dw = launch.wgrad(p, q, offsets, offsets, "", "ieee", config, torch.float32)
    torch.testing.assert_close(dw[1], p[:20].T @ q[:20], rtol=1e-4, atol=1e-4)
    assert not dw[0].any() and not dw[2].any()
