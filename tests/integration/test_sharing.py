"""What expert and tensor parallelism do to an experts module around its forward, in one process."""

import copy
from types import SimpleNamespace

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


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [40, 1024])
@torch.no_grad()
def test_launches_are_repeated(kernel, checkpoint, monkeypatch, tokens):
    """Over new views, and after the weights have moved; beyond a few tokens, too."""
    monkeypatch.setattr(kernel.integration.modules, "REPEATS_ON_GPU", True)
    model = load(checkpoint, dtype=torch.bfloat16, device_map="cuda", experts_implementation=INTERFACE)
    experts, kept = experts_of(model)[0].requires_grad_(False).eval(), []
    for of in (lambda w: w.view_as(w), lambda w: kept.append(w) or 2 * w):
        put(experts, of)
        for _ in range(6):
            put(experts, lambda weight: weight.view_as(weight))
            x, index, weights = (t.cuda() for t in inputs(tokens))
            args = x.bfloat16(), index, weights.bfloat16()
            got, wanted = experts(*args).float(), expected(experts, args).float()
            assert (got - wanted).norm() < 2e-2 * wanted.norm()
        (decided,) = (value for name, value in vars(experts).items() if name.startswith("_decided_by"))
        replays = decided.kept[2][0]
        assert callable({**replays._replays, **replays._latest}[tokens, False])


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


@torch.no_grad()
def test_weights_on_another_device(experts):
    """Of the same form; recorded launches know addresses alone."""
    experts(*inputs())
    experts.down_proj = nn.Parameter(experts.down_proj.to("meta"), requires_grad=False)
    with pytest.raises(ValueError, match="down_proj: expected on cpu"):
        experts(*inputs())


@torch.no_grad()
def test_a_name_of_two_that_moves_alone(experts):
    experts.alias = nn.Module()
    experts.alias.weight = experts.gate_up_proj
    experts(*inputs())
    experts.gate_up_proj = nn.Parameter(3 * experts.gate_up_proj, requires_grad=False)
    args = inputs()
    torch.testing.assert_close(experts(*args), expected(experts, args))


def shared(num_experts=4, is_parallel=True, **config):
    return SimpleNamespace(num_experts=num_experts, _is_expert_parallel=is_parallel, config=SimpleNamespace(**config))


@pytest.mark.parametrize(
    "module, top_k, ranks",
    [
        pytest.param(shared(n_routed_experts=32), 2, 8, id="tokens-everywhere"),
        pytest.param(shared(num_local_experts=8), 2, 2, id="another-name"),
        pytest.param(shared(n_routed_experts=32), 1, 1, id="tokens-sent"),
        pytest.param(shared(n_routed_experts=32, is_parallel=False), 2, 1, id="not-shared"),
        pytest.param(shared(), 2, 1, id="no-name-that-is-known"),
        pytest.param(shared(num_experts=5, n_routed_experts=32), 2, 1, id="no-part"),
        pytest.param(shared(n_routed_experts=32, num_local_experts=8), 2, 1, id="two-answers"),
        pytest.param(SimpleNamespace(), 2, 1, id="no-number"),
    ],
)
def test_ranks(kernel, module, top_k, ranks):
    assert kernel.integration.modules.ranks_of(module, top_k) == ranks


@torch.no_grad()
def test_tiles_by_what_the_rank_owns(kernel, experts, monkeypatch):
    """Ids of the others are out of range; which rows there are, and with them the result, is as ever."""
    seen, forward = [], kernel.integration.modules.ops.forward_on_gpu
    monkeypatch.setattr(
        kernel.integration.modules.ops, "forward_on_gpu", lambda *args: seen.append(args[-1]) or forward(*args)
    )
    put(experts, lambda weight: weight[:4].clone())
    experts.num_experts, experts._is_expert_parallel = 4, True
    x, index, weights = inputs()
    args = x, index.clamp(max=4), weights.masked_fill(index >= 4, 0)
    torch.testing.assert_close(experts(*args), expected(experts, args))
    assert set(seen) == {2}
