"""Every router class of the installed Transformers against its own forward, and what a trial must not be fooled by."""

import copy
import functools
import inspect
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from kernels import Mode, kernelize
from torch import nn
from transformers import KernelConfig, LagunaConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.laguna import modeling_laguna
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moe_models import OWN_ROUTERS, experts_classes, router_classes, tiny_config, tiny_model, tiny_router
from situations import Repository, Theirs
from suite import COMPILE_BACKENDS, REPO_ID
from tiny_models import is_switched_on

SERVED = [entry for entry in router_classes() if entry.name not in OWN_ROUTERS]

pytestmark = pytest.mark.usefixtures("one_thread", "no_other_kernels", "registered", "routers_on_cpu")


@pytest.fixture
def calls(kernel, record):
    return record(import_module(f"{kernel.__name__}.router"), "route_tokens")


def router(name):
    return tiny_router(next(entry for entry in router_classes() if entry.name == name))


def switched_on(kernel, module):
    """A copy that is, and whether it was."""
    kernel.integration.routers.KIND.meet(type(module).__module__)
    clone = copy.deepcopy(module)
    kernelize(clone, mode=Mode.TRAINING, device="cpu")
    return clone, is_switched_on(kernel, clone)


def arguments(module, tokens=33, dtype=torch.float32, device="cpu"):
    """Hidden states, as the class takes them, and where its forward asks for one a correction bias."""
    generator = torch.Generator().manual_seed(1)
    weight = next(p for p in module.parameters() if p.ndim == 2)
    x = torch.randn(tokens, weight.shape[1], generator=generator)
    correction = torch.randn(weight.shape[0], generator=generator) / 4  # in fp32, as blocks hold it
    if "Afmoe" in type(module).__name__:
        x = x[None]
    wants_two = len(inspect.signature(type(module).forward).parameters) == 3
    return [x.to(device, dtype), *([correction.to(device)] if wants_two else [])]


def in_order(results):
    """(logits, weights by expert), whatever order the experts come in."""
    logits, weights, ids = results
    return logits, torch.zeros_like(logits, dtype=weights.dtype).scatter(1, ids, weights)


# --- every class ------------------------------------------------------------------------------------------------------


def test_enumeration():
    assert len(SERVED) > 40
    assert set(OWN_ROUTERS) <= {entry.name for entry in router_classes()}


@pytest.mark.parametrize("entry", router_classes(), ids=lambda entry: entry.name)
def test_served_or_not(kernel, entry):
    """As docs/models.md has it; a new class fails here or in test_alone until somebody looks at it."""
    served = switched_on(kernel, tiny_router(entry))[1]
    assert served == (entry.name not in OWN_ROUTERS or entry.name == "AXK2TopkRouter")


@pytest.mark.parametrize("entry", SERVED, ids=lambda entry: entry.name)
def test_alone(kernel, calls, device, entry):
    stock = tiny_router(entry).to(device)
    module, served = switched_on(kernel, stock)
    assert served
    both = []
    for router in (stock, module):
        x, *correction = arguments(router, device=device)
        results = in_order(router(x.requires_grad_(), *correction))
        loss_weights = torch.randn(results[0].shape, generator=torch.Generator().manual_seed(2)).to(device)
        leaves = {"x": x, **dict(router.named_parameters())}
        leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad and "correction" not in name}
        loss = sum((result * loss_weights).sum() for result in results)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        both.append([*results, *gradients])
        assert all(result.shape[0] == 33 for result in results)
    assert len(calls) == 1
    for got, expected in zip(both[1], both[0]):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * max(1, expected.abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("entry", SERVED, ids=lambda entry: entry.name)
def test_alone_in_16_bits(kernel, calls, device, entry, dtype):
    """As models hold them: weights in 16 bits, buffers in fp32. Equal logits, of which there are some, may swap."""
    stock = tiny_router(entry).to(device)
    for parameter in stock.parameters():
        parameter.data = parameter.data.to(dtype)
    args = arguments(stock, 200, dtype, device)
    module, _ = switched_on(kernel, stock)
    try:
        expected = stock(*args)
    except RuntimeError as error:  # the class takes no such hidden states
        with pytest.raises(RuntimeError, match=str(error)[:40]):
            module(*args)
        return
    got = module(*args)
    assert len(calls) == 1
    assert [result.dtype for result in got] == [result.dtype for result in expected]
    eps = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(got[0], expected[0], rtol=eps, atol=eps)
    same = (got[2].sort(dim=1)[0] == expected[2].sort(dim=1)[0]).all(dim=1)
    # Where no two logits are as near to each other as the two results are, there is one choice.
    gaps = expected[0].float().sort(dim=1)[0].diff(dim=1).amin(dim=1)
    decided = gaps > 4 * (got[0].float() - expected[0].float()).abs().amax(dim=1)
    assert same[decided].all() and decided.float().mean() > 0.3
    for result, wanted in zip(in_order(got), in_order(expected)):
        torch.testing.assert_close(result[same], wanted[same], rtol=2 * eps, atol=eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hidden_size", [512, 1024, 2048, 4096, 6144, 7168])
@pytest.mark.parametrize("experts", [4, 8, 16])
def test_of_few_experts_in_16_bits(kernel, experts, hidden_size, dtype):
    """Whose logits are so few that their roundings do not cancel."""
    kernel.integration.routers.KIND.meet(MixtralTopKRouter.__module__)
    config = MixtralConfig(hidden_size=hidden_size, num_local_experts=experts, num_experts_per_tok=2)
    module = MixtralTopKRouter(config).to(dtype)
    assert kernel.integration.router_forms.router_of(module, dtype).form.product_dtype == dtype


@pytest.mark.parametrize(
    "name", ["Qwen3MoeExperts", "GptOssExperts", "MiniMaxM2Experts", "AfmoeExperts", "JambaExperts"]
)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_in_a_model(kernel, calls, name, training):
    entry = next(entry for entry in experts_classes() if entry.name == name)
    model = tiny_model(entry)
    model.train(training)
    for module in model.modules():
        if type(module).__name__.endswith("Router"):  # of zeros, all experts are equal
            for parameter in module.parameters():
                parameter.data.normal_(generator=torch.Generator().manual_seed(3))
    ids = torch.randint(2, 120, (2, 7), generator=torch.Generator().manual_seed(1))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = model(input_ids=ids).logits
    gradients = torch.autograd.grad(expected.square().mean(), parameters, allow_unused=True)
    kernelize(model, mode=Mode.TRAINING, device="cpu")
    routers = [module for module in model.modules() if kernel.integration.routers.KIND.is_one(module)]
    assert routers and all(is_switched_on(kernel, module) for module in routers)
    out = model(input_ids=ids).logits
    assert len(calls) == len(routers)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    got = torch.autograd.grad(out.square().mean(), parameters, allow_unused=True)
    for ours, stock in zip(got, gradients):
        assert (ours is None) == (stock is None)
        if stock is not None:
            torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-4 * max(1e-3, stock.abs().max().item()))


def test_on_a_cpu_the_class_does_it_itself(kernel, calls, monkeypatch):
    monkeypatch.setattr(kernel.integration.routers, "SERVES_CPU", False)
    module, served = switched_on(kernel, router("Qwen3MoeTopKRouter"))
    module(*arguments(module))
    assert served and not calls
    assert kernel.status(nn.ModuleList([module])) == {"0": "Transformers: a router on a CPU"}


# --- what a trial must not be fooled by -------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Softmax of the chosen; `change` says what is done to (self, x, logits, weights)."""

    def __init__(self, change, experts=8, hidden_dim=24):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, hidden_dim, generator=torch.Generator().manual_seed(0)))
        self.top_k, self.scale, self.config = 2, 1.0, SimpleNamespace(scale=1.0)
        self.norm = nn.Identity()
        self.buffer = nn.Buffer(torch.zeros(experts))
        self.mask = torch.zeros(experts)
        self.history = []
        self.change = change

    def forward(self, hidden_states):
        logits = F.linear(hidden_states, self.weight)
        chosen, ids = logits.topk(self.top_k, dim=-1)
        return logits, chosen.softmax(dim=-1), ids


def variant(forward):
    """A class of its own for every test."""
    return type("Variant", (Scaled,), {"forward": forward, "choose": choose})(None)


def choose(self, hidden_states):
    logits = F.linear(hidden_states, self.weight)
    chosen, ids = logits.topk(self.top_k, dim=-1)
    return logits, chosen.softmax(dim=-1), ids


def noisy(self, hidden_states):
    logits, weights, ids = choose(self, hidden_states)
    return logits, weights + 1e-3 * torch.rand_like(weights), ids


def noisy_in_training(self, hidden_states):
    if self.training:
        hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(0.9, 1.1)
    return choose(self, hidden_states)


def by_config(self, hidden_states):
    logits, weights, ids = choose(self, hidden_states)
    return logits, weights * self.config.scale, ids


def counts(self, hidden_states):
    logits, weights, ids = choose(self, hidden_states)
    self.buffer += F.one_hot(ids, len(self.buffer)).sum(dim=(0, 1))
    return logits, weights, ids


def remembers(self, hidden_states):
    self.last = hidden_states
    return choose(self, hidden_states)


def writes_its_input(self, hidden_states):
    hidden_states *= 1.5
    return choose(self, hidden_states)


def temperature(self, hidden_states):
    logits, _, ids = choose(self, hidden_states)
    return logits, (logits.gather(1, ids) / 1.5).softmax(dim=1), ids


def soft_cap(self, hidden_states):
    logits = 30 * torch.tanh(F.linear(hidden_states, self.weight) / 30)
    chosen, ids = logits.topk(self.top_k, dim=-1)
    return logits, chosen.softmax(dim=-1), ids


def rare_clamp(self, hidden_states):
    logits, weights, ids = choose(self, hidden_states)
    return logits, weights.clamp(min=1e-6), ids


def least(self, hidden_states):
    logits = F.linear(hidden_states, self.weight)
    chosen, ids = (-logits).topk(self.top_k, dim=-1)
    return logits, chosen.softmax(dim=-1), ids


def two_results(self, hidden_states):
    return choose(self, hidden_states)[1:]


def normalised_input(self, hidden_states):
    return choose(self, F.normalize(hidden_states, dim=-1))


def of_logits(logits, top_k=2):
    chosen, ids = logits.topk(top_k, dim=-1)
    return logits, chosen.softmax(dim=-1), ids


def cosine(self, hidden_states):
    return of_logits(F.linear(hidden_states, F.normalize(self.weight, dim=-1)))


def clamped_weight(self, hidden_states):
    return of_logits(F.linear(hidden_states, self.weight.clamp(-1, 1)))


def rounded_weight(self, hidden_states):
    return of_logits(F.linear(hidden_states, self.weight.bfloat16().to(self.weight.dtype)))


def scaled_logits(self, hidden_states):
    return of_logits(F.linear(hidden_states, self.weight) * 1.005)


def finite_logits(self, hidden_states):
    return of_logits(torch.nan_to_num(F.linear(hidden_states, self.weight)))


def clamped_logits(self, hidden_states):
    return of_logits(F.linear(hidden_states, self.weight).clamp(-1000, 1000))


def detached_input(self, hidden_states):
    return of_logits(F.linear(hidden_states.detach(), self.weight))


def detached_logits(self, hidden_states):
    logits, weights, ids = choose(self, hidden_states)
    return logits.detach(), weights, ids


@torch.no_grad()
def without_gradients(self, hidden_states):
    return choose(self, hidden_states)


def by_grad_mode(self, hidden_states):
    return choose(self, hidden_states * 1.5 if torch.is_grad_enabled() else hidden_states)


def masked(self, hidden_states):
    return of_logits(F.linear(hidden_states, self.weight) + self.mask)


def counts_in_a_plain_tensor(self, hidden_states):
    logits, weights, ids = choose(self, hidden_states)
    self.mask.add_(F.one_hot(ids, len(self.mask)).sum(dim=(0, 1)))
    return logits, weights, ids


def padded(self, hidden_states):
    logits, weights, ids = choose(self, hidden_states)
    return logits, weights.masked_fill((hidden_states == 0).all(-1, keepdim=True), 0), ids


def decoding(self, hidden_states):
    return of_logits(F.linear(hidden_states, self.weight), 1 if len(hidden_states) == 1 else 2)


def clamped_bias(self, hidden_states):
    logits = F.linear(hidden_states, self.weight)
    ids = (logits + self.buffer.clamp(max=0)).topk(self.top_k, dim=-1)[1]
    return logits, logits.gather(1, ids).softmax(dim=-1), ids


def straight_through(self, hidden_states):
    logits, weights, ids = choose(self, hidden_states)
    return logits, weights + (self.buffer - self.buffer.detach())[ids], ids


class Replay:
    ids = None


def replayed(self, hidden_states):
    logits, weights, ids = choose(self, hidden_states)
    return logits, weights, ids if Replay.ids is None else Replay.ids


SCALE = 1.0


@torch.autocast("cpu", enabled=False)
def decorated(self, hidden_states):
    logits, weights, ids = choose(self, hidden_states)
    return logits, weights * SCALE, ids


def scale():
    return SCALE


def by_a_helper(self, hidden_states):
    logits, weights, ids = choose(self, hidden_states)
    return logits, weights * scale(), ids


def keeps_history(self, hidden_states):
    logits, weights, ids = choose(self, hidden_states)
    self.history.append(ids)
    return logits, weights, ids


NONE_OF_OURS = [
    *(padded, decoding, clamped_bias, straight_through, replayed, decorated, by_a_helper, keeps_history),
    *(noisy, by_config, counts, remembers, writes_its_input, temperature, soft_cap, rare_clamp, least, two_results),
    *(normalised_input, cosine, clamped_weight, rounded_weight, scaled_logits, finite_logits, clamped_logits),
    *(detached_input, detached_logits, without_gradients, by_grad_mode, masked, counts_in_a_plain_tensor),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("forward", NONE_OF_OURS, ids=lambda forward: forward.__name__)
def test_none_of_ours(kernel, calls, forward, dtype):
    module = variant(forward)
    if forward is not rounded_weight:  # which bf16 is by itself
        module.weight.data = module.weight.data.to(dtype)
    kernel.integration.routers.KIND.make_switchable(type(module))
    kernelize(module, mode=Mode.INFERENCE, device="cpu")
    assert not is_switched_on(kernel, module)
    assert "none of the routers" in kernel.status(nn.ModuleList([module]))["0"]
    assert module.mask.eq(0).all() and not module.history  # a trial writes into nothing of the user's
    module(torch.ones(3, 24, dtype=module.weight.dtype))
    assert not calls


def test_found_whatever_the_order_of_results(kernel, calls):
    """And with a name that says nothing."""

    def forward(self, x):
        logits, weights, ids = choose(self, x)
        return ids, logits, weights

    module = variant(forward)
    x = torch.randn(9, 24, generator=torch.Generator().manual_seed(1))
    expected = module(x)
    kernel.integration.routers.KIND.make_switchable(type(module))
    kernelize(module, mode=Mode.INFERENCE, device="cpu")
    for got, wanted in zip(module(x), expected):
        torch.testing.assert_close(got, wanted)
    assert len(calls) == 1


def test_noise_in_training_alone(kernel, calls):
    module = variant(noisy_in_training)
    kernel.integration.routers.KIND.make_switchable(type(module))
    kernelize(module.eval(), mode=Mode.TRAINING, device="cpu")
    module(torch.ones(3, 24))
    assert len(calls) == 1
    module.train()(torch.ones(3, 24))
    assert len(calls) == 1
    module.eval()(torch.ones(3, 24))
    assert len(calls) == 2


def switched(kernel, module):
    kernel.integration.routers.KIND.make_switchable(type(module))
    kernelize(module, mode=Mode.TRAINING, device="cpu")
    return module


def test_dropout_inside(kernel, calls):
    """Its own `training` is asked for, and whatever else a child without tensors has."""

    def forward(self, hidden_states):
        return choose(self, self.norm(hidden_states))

    module = variant(forward)
    module.norm = nn.Dropout(0.5)
    switched(kernel, module.eval())(torch.ones(3, 24))
    assert len(calls) == 1
    module.train()(torch.ones(3, 24))
    assert len(calls) == 1
    module.norm.p = 0.0
    module(torch.ones(3, 24))
    assert len(calls) == 2


class Temperature(nn.Module):
    value = 1.0

    def forward(self, logits):
        return logits / self.value


def test_an_attribute_of_a_child(kernel, calls):
    def forward(self, hidden_states):
        return of_logits(self.norm(F.linear(hidden_states, self.weight)))

    module = variant(forward)
    module.norm = Temperature()
    switched(kernel, module)(torch.ones(3, 24))
    assert len(calls) == 1
    module.norm.value = 2.0
    module(torch.ones(3, 24))
    assert len(calls) == 1


@pytest.mark.parametrize("where", ["instance", "class"])
def test_a_helper_that_is_replaced(kernel, calls, where):
    def forward(self, hidden_states):
        return of_logits(self.logits(hidden_states))

    def logits(self, hidden_states):
        return F.linear(hidden_states, self.weight)

    module = type("Variant", (Scaled,), {"forward": forward, "logits": logits, "choose": choose})(None)
    switched(kernel, module)(torch.ones(3, 24))
    assert len(calls) == 1
    if where == "class":
        type(module).logits = lambda self, hidden_states: -logits(self, hidden_states)
    else:
        module.logits = lambda hidden_states: -logits(module, hidden_states)
    assert torch.equal(module(torch.ones(3, 24))[0], -logits(module, torch.ones(3, 24)))
    assert len(calls) == 1


def test_the_size_is_part_of_what_was_found_out(kernel, calls):
    """Where all experts are chosen nothing tells how, and so nothing is served."""
    every, some = (router("MiniMaxM2TopKRouter") for _ in range(2))
    every.top_k = some.top_k = 4
    every.weight.data = every.weight.data[:4].clone()
    x, correction = arguments(some)
    served = switched(kernel, every), switched(kernel, some)
    served[0](x, correction[:4])
    assert not calls
    expected = type(some).forward.__wrapped__(some, x, correction)
    torch.testing.assert_close(in_order(served[1](x, correction)), in_order(expected), rtol=1e-4, atol=1e-5)
    assert len(calls) == 1


ODD_WEIGHTS = {
    "few-columns": lambda: nn.Parameter(torch.empty(8, 8)),
    "elsewhere": lambda: nn.Parameter(torch.empty(0)),
    "none": lambda: None,
    "lazy": nn.UninitializedParameter,
}


@pytest.mark.parametrize("weight", ODD_WEIGHTS)
def test_one_odd_module_does_not_speak_for_its_class(kernel, weight):
    class Odd(Scaled):
        forward = choose

    odd = Odd(None)
    odd.weight = ODD_WEIGHTS[weight]()
    assert not is_switched_on(kernel, switched(kernel, odd))
    assert is_switched_on(kernel, switched(kernel, Odd(None)))


def test_nothing_is_tried_before_it_is_switched_on(kernel, record):
    """A trial takes up to a third of a second."""

    class Built(Scaled):
        forward = choose

    trials = record(kernel.integration.router_forms, "Trial")
    kernel.integration.routers.KIND.make_switchable(Built)
    module = Built(None)
    assert not trials
    switched(kernel, module)
    assert len(trials) == 3  # hidden states in each dtype


def test_a_model_that_is_built_in_inference_mode(kernel):
    class Built(Scaled):
        forward = choose

    kernel.integration.routers.KIND.make_switchable(Built)
    with torch.inference_mode():
        Built(None)
    assert is_switched_on(kernel, switched(kernel, Built(None)))


def test_what_is_none_in_one_module_and_there_in_the_next(kernel):
    for attribute in ("bias", "weight"):
        first, second = (router("HunYuanMoEV1Gate") for _ in range(2))
        second.wg.bias = nn.Parameter(torch.randn(8))
        for module in (first, second) if attribute == "bias" else (second, first):
            own_forward = kernel.integration.switching.below_ours(type(module).forward)
            expected = in_order(own_forward(module, *arguments(module)))
            got = in_order(switched(kernel, module)(*arguments(module)))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_container_inside(kernel, calls):
    """Its forward reads what it has past every attribute."""

    class Contained(Scaled):
        def __init__(self, *more):
            super().__init__(None)
            del self.weight
            self.norm = nn.Sequential(nn.Linear(24, 8, bias=False), *more)

        def forward(self, hidden_states):
            logits = self.norm(hidden_states)
            chosen, ids = logits.topk(self.top_k, dim=-1)
            return logits, chosen.softmax(dim=-1), ids

    for module in (Contained(), Contained(nn.Tanh())):
        assert not is_switched_on(kernel, switched(kernel, module))


def test_one_tensor_under_two_names(kernel, calls):
    def forward(self, hidden_states):
        return of_logits(F.linear(hidden_states, self.weight, self.bias))

    module = variant(forward)
    module.other = nn.Parameter(torch.randn(8))
    module.bias = module.other
    x = torch.randn(9, 24)
    torch.testing.assert_close(switched(kernel, module)(x)[0], F.linear(x, module.weight, module.bias))
    assert len(calls) == 1


def test_a_method_of_somebody_else(kernel, calls):
    class Schedule:
        value = 1.0

        def scaled(self, logits):
            return logits * self.value

    def forward(self, hidden_states):
        return of_logits(self.schedule(F.linear(hidden_states, self.weight)))

    module, schedule = variant(forward), Schedule()
    module.schedule = schedule.scaled
    assert not is_switched_on(kernel, switched(kernel, module))


def test_a_forward_that_is_replaced(kernel, calls):
    """And made switchable again, as by every load with a KernelConfig."""

    class Replaced(Scaled):
        forward = choose

    x = torch.randn(9, 24)
    switched(kernel, Replaced(None))(x)
    assert len(calls) == 1
    Replaced.forward = soft_cap
    module = Replaced(None)
    got = switched(kernel, module)(x)[0]
    assert torch.equal(got, soft_cap(module, x)[0]) and len(calls) == 1


@pytest.mark.parametrize("threads", [1, 2])
def test_as_many_experts_as_kimi_k2_has(kernel, threads):
    """Whatever the order of sums in the product, which follows the number of threads."""
    module = router("DeepseekV3TopkRouter")
    module.weight = nn.Parameter(torch.randn(384, 7168, dtype=torch.bfloat16))
    module.e_score_correction_bias = torch.rand(384)
    module.num_experts, module.hidden_dim, module.top_k, module.num_group, module.topk_group = 384, 7168, 8, 1, 1
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert kernel.integration.router_forms.Trial(module, torch.bfloat16).router is not None
    finally:
        torch.set_num_threads(before)


def test_names_that_only_look_like_functions(kernel):
    class Odd(nn.Module):
        pick = functools.wraps(torch.topk)(lambda self, x: x)

        def forward(self, hidden_states):
            return self.pick(hidden_states)

    assert not kernel.integration.router_forms.may_be_router(Odd)


def test_a_class_whose_forward_is_wrapped_later(kernel, calls):
    class Wrapped(Qwen3MoeTopKRouter):
        def forward(self, hidden_states):
            hidden_states = hidden_states.reshape(-1, self.hidden_dim)
            logits = F.linear(hidden_states, self.weight)
            weights, ids = logits.softmax(dim=-1, dtype=torch.float).topk(self.top_k, dim=-1)
            return logits, weights, ids

    module = Wrapped(tiny_config("qwen3_moe", Qwen3MoeConfig))
    module.weight.data.normal_()
    switched(kernel, module)
    ours, seen = Wrapped.forward, []

    def logged(self, hidden_states):
        seen.append(1)
        return ours(self, hidden_states)

    Wrapped.forward = logged
    module.top_k = 3  # nothing that was found out before
    assert module(arguments(module)[0])[1].shape == (33, 3) and seen == [1] and not calls


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x, bias: (x, bias.bfloat16()),
        lambda x, bias: (x, bias.expand(len(x), -1)),
        lambda x, bias: (x, bias[:1]),
    ],
    ids=["bf16", "for-each-token", "one-number"],
)
def test_a_correction_bias_as_no_trial_had_it(kernel, calls, spoil):
    module, served = switched_on(kernel, router("MiniMaxM2TopKRouter"))
    assert served
    args = spoil(*arguments(module))
    expected = type(module).forward.__wrapped__(module, *args)
    assert all(torch.equal(got, wanted) for got, wanted in zip(module(*args), expected)) and not calls


def test_an_argument_that_the_trial_did_not_need(kernel, calls):
    def forward(self, hidden_states, mask=None):
        logits = F.linear(hidden_states, self.weight)
        return of_logits(logits if mask is None or mask.ndim == 1 else logits + mask)

    module = switched(kernel, variant(forward))
    x = torch.randn(3, 24)
    module(x)
    assert len(calls) == 1
    assert torch.equal(module(x, torch.ones(3, 8))[0], F.linear(x, module.weight) + 1) and len(calls) == 1


def test_names_and_sizes_of_hidden_states(kernel, calls):
    """As the class has them, errors included."""

    def forward(self, x):
        return choose(self, x)

    module = switched(kernel, variant(forward))
    x = torch.randn(3, 24)
    assert torch.equal(module(x=x)[0], F.linear(x, module.weight)) and not calls
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        module(torch.randn(3, 48))
    assert module(x[None])[0].shape == (1, 3, 8) and not calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["DeepseekV3TopkRouter", "MiniMaxM2TopKRouter"])
def test_whatever_the_default_dtype_is(kernel, name, dtype):
    """As while a model is loaded."""
    module = router(name)
    forms = kernel.integration.router_forms
    kernel.integration.routers.KIND.meet(type(module).__module__)
    expected = forms.Trial(module, torch.bfloat16)
    torch.set_default_dtype(dtype)
    try:
        found = forms.Trial(module, torch.bfloat16)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (found.reads, found.router) == (expected.reads, expected.router)
    assert forms.Trial(module, torch.float32).router is not None


def test_transforms_of_torch_func(kernel, calls):
    module, _ = switched_on(kernel, router("Qwen3MoeTopKRouter"))
    x = arguments(module)[0]
    torch.func.grad(lambda x: module(x)[0].sum())(x)
    assert not calls


def test_groups_of_which_others_may_win(kernel, calls):
    """AXK2 sets the choice of other groups to zero, and a correction bias may be less."""
    module = router("AXK2TopkRouter")
    module.num_group, module.topk_group = 2, 1
    stock = copy.deepcopy(module)
    module, served = switched_on(kernel, module)
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    for got, wanted in zip(in_order(module(x)), in_order(stock(x))):
        assert torch.equal(got, wanted)
    assert not served and not calls


def test_attributes_that_change(kernel, calls):
    module, _ = switched_on(kernel, router("DeepseekV3TopkRouter"))
    stock = router("DeepseekV3TopkRouter")
    for name, value in (("top_k", 3), ("routed_scaling_factor", 0.75), ("norm_topk_prob", False), ("num_group", 4)):
        for other in (module, stock):
            setattr(other, name, value)
            other.topk_group = other.num_group // 2
        x = arguments(module)[0]
        torch.testing.assert_close(in_order(module(x)), in_order(stock(x)), rtol=1e-4, atol=1e-5)
    assert len(calls) == 4


def test_a_hook_inside_is_called(kernel, calls):
    """Also one that comes after it was switched on."""
    module, served = switched_on(kernel, router("HunYuanMoEV1Gate"))
    assert served
    hooked = []
    module.wg.register_forward_hook(lambda *_: hooked.append(1))
    module(*arguments(module))
    assert hooked and not calls


def test_a_correction_bias_that_is_left_out(kernel, calls):
    """As Lfm2Moe's may be: the class's own forward says what that means."""
    module, served = switched_on(kernel, router("Lfm2MoeTopKRouter"))
    assert served
    x, correction = arguments(module)
    with pytest.raises(TypeError):
        module(x)
    module(hidden_states=x, expert_bias=correction)
    assert len(calls) == 1


def test_autocast(kernel, calls):
    """Whoever asks for fp32 logits gets them, as always here; others compute in the dtype of autocast."""
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    for name, served in (("DeepseekV3TopkRouter", 1), ("Qwen3MoeTopKRouter", 0)):
        calls.clear()
        module, _ = switched_on(kernel, router(name))
        with torch.autocast("cpu", torch.bfloat16):
            logits = module(x)[0]
        assert len(calls) == served and logits.dtype == (torch.float32 if served else torch.bfloat16)


@pytest.mark.parametrize("name", ["Qwen3MoeTopKRouter", "GptOssTopKRouter", "HunYuanMoEV1Gate", "MiniMaxM2TopKRouter"])
def test_compiles_into_one_graph(kernel, device, name):
    torch.compiler.reset()
    module, served = switched_on(kernel, router(name).to(device))
    assert served
    args = arguments(module, device=device)
    graphs = []
    backend = COMPILE_BACKENDS[device]
    if device == "cpu":

        def backend(graph, inputs):
            graphs.append([str(node.target) for node in graph.graph.nodes])
            return graph

    with torch.no_grad():
        got = torch.compile(module, fullgraph=True, backend=backend)(*args)
    torch.testing.assert_close(in_order(got), in_order(module(*args)))
    if device == "cpu":
        assert len(graphs) == 1 and any("topk_router" in target for target in graphs[0])


# --- ways in ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_mapped", [False, True])
def test_the_name_that_transformers_gives(kernel, is_mapped):
    """`SoftmaxTopKRouter`: ours, unless the user has mapped it."""
    import kernels

    mapping = {"SoftmaxTopKRouter": {"cpu": {Mode.INFERENCE: Repository(Theirs)}}} if is_mapped else {}
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        kernel.register()
        module = router("LagunaTopKRouter").eval()
        kernel.integration.routers.KIND.meet(modeling_laguna.__name__)
        kernelize(module, mode=Mode.INFERENCE, device="cpu")
        x = arguments(module)[0]
        if is_mapped:
            assert module(x) == "theirs"
        else:
            assert is_switched_on(kernel, module)
            expected = type(module).forward.__wrapped__(module, x)
            torch.testing.assert_close(in_order(module(x)), in_order(expected), rtol=1e-4, atol=1e-5)


STOOD_IN = [
    ("qwen3_moe", Qwen3MoeConfig, Qwen3MoeTopKRouter),
    ("mixtral", MixtralConfig, MixtralTopKRouter),
    ("laguna", LagunaConfig, modeling_laguna.LagunaTopKRouter),  # which has a name for kernels of its own
]


@pytest.mark.parametrize("model, config_class, cls", STOOD_IN, ids=[row[0] for row in STOOD_IN])
def test_what_a_stand_in_stands_for(kernel, monkeypatch, model, config_class, cls):
    for attribute in ("kernel_layer_name", "kernel_condition"):  # as they are
        monkeypatch.setattr(cls, attribute, getattr(cls, attribute, None), raising=False)
    config = tiny_config(model, config_class)
    module = kernel.layers.MoERouterLayout(config)
    assert type(module) is cls and isinstance(module, kernel.layers.MoERouterLayout)
    kernelize(module, mode=Mode.INFERENCE, device="cpu")
    assert is_switched_on(kernel, module)


@pytest.mark.usefixtures("loadable_by_kernel_config", "cpu_in_kernel_config")
def test_kernel_config(kernel, calls, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    entry = next(entry for entry in experts_classes() if entry.name == "Qwen3MoeExperts")
    tiny_model(entry).save_pretrained(tmp_path)
    ids = torch.randint(2, 120, (2, 7), generator=torch.Generator().manual_seed(1))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=ids).logits
    config = KernelConfig({"Qwen3MoeTopKRouter": f"{REPO_ID}:MoERouter"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path, use_kernels=True, kernel_config=config)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == 2
