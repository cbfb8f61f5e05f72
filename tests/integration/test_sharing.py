"""What expert and tensor parallelism do to an experts module around its forward, in one process."""

import copy

import pytest
import torch
from torch import nn

from tiny_models import INTERFACE, experts_of, load

pytestmark = pytest.mark.usefixtures("one_thread", "no_other_kernels", "registered")


@pytest.fixture
def experts(checkpoint, repeated_on_cpu):
    return experts_of(load(checkpoint, experts_implementation=INTERFACE))[0].requires_grad_(False).eval()


@pytest.fixture
def plans(kernel, monkeypatch):
    """The modules that were decided about, one for each time."""
    decisions = kernel.integration.modules._plans
    decide, plans = decisions._decide, []
    monkeypatch.setattr(decisions, "_decide", lambda module, *args: plans.append(module) or decide(module, *args))
    return plans


def inputs(tokens=5, top_k=2, experts=8):
    return torch.randn(tokens, 64), torch.randint(0, experts, (tokens, top_k)), torch.rand(tokens, top_k)


def put(module, tensor_of):
    for name, weight in list(module._parameters.items()):
        module._parameters[name] = tensor_of(weight)


def expected(module, args):
    """By Transformers' own."""
    module = copy.deepcopy(module)
    module.config = copy.deepcopy(module.config)
    module.config._experts_implementation = "eager"
    return module(*args)


@torch.no_grad()
def test_new_views_of_the_same_weights(experts, plans):
    """As DTensor.to_local() returns them for each forward."""
    for _ in range(4):
        put(experts, lambda weight: weight.view_as(weight))
        args = inputs()
        torch.testing.assert_close(experts(*args), expected(experts, args))
    assert len(plans) == 1


@torch.no_grad()
def test_the_same_weights_in_other_memory(kernel, experts, plans, record):
    """As FSDP2 gathers them; launches that were recorded have the old addresses."""
    replays = kernel.gpu.launchers().Replays
    elsewhere, kept = record(replays, "elsewhere"), []
    for _ in range(3):
        kept += experts.parameters()
        put(experts, lambda weight: nn.Parameter(2 * weight, requires_grad=False))
        args = inputs()
        for _ in range(2):
            torch.testing.assert_close(experts(*args), expected(experts, args))
    assert len(plans) == 1 and len(elsewhere) == 2


@torch.no_grad()
@pytest.mark.parametrize("of", [lambda w: w[:4].clone(), lambda w: w.mT.contiguous().mT, lambda w: w.double()])
def test_other_weights(experts, plans, of):
    """Of another shape, in another order or of another dtype: that is decided anew."""
    experts(*inputs())
    put(experts, of)
    args = inputs(experts=4)
    if next(experts.parameters()).dtype == torch.float32:
        torch.testing.assert_close(experts(*args), expected(experts, args))
    else:
        with pytest.warns(UserWarning, match="float64"):
            pytest.raises(RuntimeError, experts, *args)
    assert len(plans) == 2
