"""`moe_experts_lora` against the layer with merged weights: outputs and gradients of every input."""

from importlib import import_module

import pytest
import torch

from cases import in_turn
from low_rank import SCALINGS, adapters, low_rank
from oracle import assert_as_good_as_torch, in_fp64, layer

CASES = [  # T, E, top_k, H, I, ids, ranks for gate_up, ranks for down
    pytest.param(0, 4, 2, 64, 32, "distinct", [4], [4], id="no-tokens"),
    pytest.param(7, 4, 0, 64, 32, "distinct", [4], [4], id="top_k-0"),
    pytest.param(1, 64, 8, 64, 32, "distinct", [16], [16], id="decode"),
    pytest.param(100, 7, 2, 97, 47, "any", [3], [5], id="tails-and-duplicate-ids"),
    pytest.param(100, 8, 2, 64, 32, "zipf", [16, 3], [8, 1, 2], id="several-adapters"),
    pytest.param(100, 8, 2, 64, 32, "distinct", [4], [], id="gate_up-alone"),
    pytest.param(100, 8, 2, 64, 32, "distinct", [], [4], id="down-alone"),
    pytest.param(300, 5, 3, 64, 32, "one", [16], [16], id="all-on-one-expert"),
    # long: on a GPU, to compile
    pytest.param(300, 7, 6, 97, 47, "sentinels", [3, 16], [16], id="sentinels", marks=pytest.mark.long),
]
CASE = "tokens, experts, top_k, hidden_dim, inter, ids, up_ranks, down_ranks"


@pytest.fixture(scope="module")
def lora(kernel):
    return import_module(f"{kernel.__name__}.functional")


def merged(reference, args, up, down):
    *inputs, gate_up_proj, down_proj = args
    for A, B, scaling in zip(up[::2], up[1::2], SCALINGS):
        gate_up_proj = gate_up_proj + scaling * B.permute(2, 0, 1) @ A
    for A, B, scaling in zip(down[::2], down[1::2], SCALINGS):
        down_proj = down_proj + scaling * B.permute(2, 0, 1) @ A
    return reference.moe_experts(*inputs, gate_up_proj, down_proj)


def results(function, args, up, down, dout):
    """The output and every gradient."""
    args, up, down = ([t.detach().requires_grad_(t.is_floating_point()) for t in ts] for ts in (args, up, down))
    out = function(args, up, down)
    floats = [t for t in (*args, *up, *down) if t.requires_grad]
    return [out, *torch.autograd.grad(out, floats, dout.to(out))]


@pytest.mark.parametrize(f"{CASE}, dtype", in_turn(CASES))
def test_matches_merged_weights(
    kernel, lora, device, tokens, experts, top_k, hidden_dim, inter, ids, up_ranks, down_ranks, dtype
):
    args = layer(tokens, experts, top_k, hidden_dim, inter, dtype, device, ids)
    up, down = list(adapters(args[3], up_ranks, 1)), list(adapters(args[4], down_ranks, 2))
    dout = layer(tokens, experts, top_k, hidden_dim, inter, dtype, device, ids, seed=3)[0]

    def merge(*tensors):
        return merged(kernel.reference, *tensors)

    exact = results(merge, *map(in_fp64, (args, up, down)), dout)
    got = results(lambda *tensors: low_rank(lora, *tensors), args, up, down, dout)
    for g, t, e in zip(got, results(merge, args, up, down, dout), exact):
        assert_as_good_as_torch(g, t, e, dtype)  # of weights too: fp32, yet made of products in dtype
    again = results(lambda *tensors: low_rank(lora, *tensors), args, up, down, dout)
    assert all(map(torch.equal, got, again))


def test_skipped_slots_contribute_nothing(lora, device):
    """Neither to the output nor to a gradient, though token, weight and gradient of the output are NaN."""
    args = list(layer(20, 4, 2, 64, 32, device=device))
    up, down = list(adapters(args[3], [3], 1)), list(adapters(args[4], [3], 2))
    dout = torch.ones_like(args[0])

    def run(skipped):
        inputs = [t[skipped:] for t in args[:3]]
        return results(lambda *ts: low_rank(lora, *ts), [*inputs, *args[3:]], up, down, dout[skipped:])

    expected = run(4)
    args[1][:4] = torch.tensor([-1, 4])
    args[0][:4] = args[2][:4] = dout[:4] = float("nan")
    out, dx, dweights, *others = run(0)
    assert not out[:4].any() and not dx[:4].any() and not dweights[:4].any()
    for g, e in zip((out[4:], dx[4:], dweights[4:], *others), expected):
        torch.testing.assert_close(g, e)


def test_bad_input_is_named(lora):
    args = layer(5, 4, 2, 64, 32)
    with pytest.raises(ValueError, match="down_proj: expected"):
        low_rank(lora, [*args[:4], args[4][:2]], [], [])
    A, B = adapters(args[4], [3], 1)
    with pytest.raises(ValueError, match="gate_up_lora: expected A .4, R, 64. and B .4, 64, R."):
        low_rank(lora, args, [A, B], [])
    with pytest.raises(ValueError, match="down_lora: expected"):
        low_rank(lora, args, [], [A, B[:, :2]])
