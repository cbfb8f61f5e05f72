"""MoE layers without Transformers' decorator, alone and in a tiny model, against the class's own forward."""

import copy

import pytest
import torch
from kernels import Mode, kernelize
from peft import LoraConfig, get_peft_model
from torch.nn.utils import parametrize

from cases import covering
from moe_models import UNDECORATED, stacked_without_decorator, tiny_undecorated_model
from oracle import assert_as_good_as_torch
from suite import COMPILE_BACKENDS

NAMES = {
    "dbrx": "DbrxExperts",
    "jetmoe": "JetMoeParallelExperts",
    "llama4": "Llama4TextMoe",
    "longcat_flash": "LongcatFlashExperts",
    "step3p7": "Step3p7Experts",
}

pytestmark = pytest.mark.usefixtures("one_thread", "no_other_kernels")


@pytest.fixture
def undecorated(registered):
    return registered.integration.undecorated


@pytest.fixture(params=NAMES)
def model_type(request):
    return request.param


def served(model, model_type):
    return [module for module in model.modules() if type(module).__name__ == NAMES[model_type]]


def test_all_are_served_or_known(undecorated):
    """A class with stacked weights that is new in Transformers is to be served, or named in docs/models.md."""
    assert {model: layer.__name__ for model, (layer, _) in undecorated.SERVED.items()} == NAMES
    assert list(undecorated.make_switchable()) == list(NAMES.values())
    assert stacked_without_decorator() <= set(UNDECORATED)


# Alone


def module_and_inputs(model_type, tokens=20, device="cpu", dtype=torch.float32, **options):
    """A module of a tiny model with random weights, and what its forward takes."""
    module = served(tiny_undecorated_model(model_type, **options), model_type)[-1]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    x = torch.randn(tokens, 64, generator=generator)
    if model_type == "jetmoe":
        sizes = torch.multinomial(torch.ones(7), tokens, True, generator=generator).bincount(minlength=8).tolist()
        inputs = [x[:, : module.input_size], sizes]
    elif model_type == "llama4":  # the same choice in every dtype: logits are multiples of 1/4, all different
        with torch.no_grad():
            module.router.weight.copy_(torch.eye(8, 64))
        x[:, :8] = torch.rand(tokens, 8, generator=generator).argsort(dim=1) / 4 - 1
        inputs = [x]
    else:
        experts = module.total_experts if model_type == "longcat_flash" else module.num_experts
        ids = torch.rand(tokens, experts - 1, generator=generator).topk(2).indices + 1  # no token for the first
        inputs = [x, ids, torch.rand(tokens, 2, generator=generator)]
        if model_type == "dbrx":
            inputs[0] = x.view(2, -1, 64) if tokens % 2 == 0 else x.view(1, -1, 64)
    floats = [isinstance(value, torch.Tensor) and value.is_floating_point() for value in inputs]
    tensors = [v.to(device, dtype) if f else v for v, f in zip(inputs, floats)]
    tensors = [v.to(device) if isinstance(v, torch.Tensor) else v for v in tensors]
    return module.to(device, dtype), tensors


def results(module, inputs):
    """The outputs, and the gradient of every float input and parameter."""
    inputs = [x.clone().requires_grad_() if is_float(x) else x for x in inputs]
    outs = module(*inputs)
    outs = dict(enumerate(outs if isinstance(outs, tuple) else (outs,)))
    seed = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(2)).to(outs[0])
    named = {i: x for i, x in enumerate(inputs) if is_float(x)}
    named = {**{f"input {i}": x for i, x in named.items()}, **dict(module.named_parameters())}
    gradients = torch.autograd.grad(outs[0], list(named.values()), seed)
    return {**{f"out {i}": out.detach() for i, out in outs.items()}, **dict(zip(named, gradients))}


def is_float(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def kernelized(undecorated, module, mode=Mode.TRAINING):
    kernelize(module, mode=mode, device=next(module.parameters()).device.type)
    assert undecorated.switching.is_switched_on(module)
    return module


def assert_close(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4 * max(1, value.abs().max()), msg=str(name))


OPTIONS = [
    pytest.param("dbrx", {}, id="dbrx"),
    pytest.param("jetmoe", {}, id="jetmoe"),
    pytest.param("llama4", {}, id="llama4"),
    pytest.param("llama4", {"num_experts_per_tok": 2}, id="llama4-top-2"),
    pytest.param("longcat_flash", {}, id="longcat_flash"),
    pytest.param("longcat_flash", {"hidden_act": "mish"}, id="longcat_flash-another-activation"),
    pytest.param("longcat_flash", {"zero_expert_num": 0}, id="longcat_flash-without-identity"),
    pytest.param("step3p7", {"swiglu_limits": None}, id="step3p7"),
    pytest.param("step3p7", {"swiglu_limits": [0.0, 0.5]}, id="step3p7-clamped"),
]


@pytest.fixture
def ours(undecorated, monkeypatch):
    """Gets a name for every call of what computes here."""
    calls = []
    owner = undecorated.functional
    for name in ("moe_experts", "grouped_gemm", "moe_experts_lora"):
        function = getattr(owner, name)

        def recorded(*args, function=function, name=name, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, recorded)
    return calls


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("name, options", OPTIONS)
def test_alone(undecorated, ours, name, options, tokens):
    module, inputs = module_and_inputs(name, tokens, **options)
    expected = results(module, inputs)
    assert not ours
    assert_close(results(kernelized(undecorated, module), inputs), expected)
    assert ours
    with torch.no_grad():
        out = kernelized(undecorated, module.eval(), Mode.INFERENCE)(*inputs)
    assert_close({"out": out[0] if isinstance(out, tuple) else out}, {"out": expected["out 0"]})


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name, options, tokens, dtype", covering(OPTIONS, [1, 20, 600], [torch.bfloat16, torch.float32])
)
def test_alone_on_a_gpu(undecorated, ours, name, options, tokens, dtype):
    module, inputs = module_and_inputs(name, tokens, "cuda", dtype, **options)
    expected = results(module, inputs)
    stock = copy.deepcopy(module).double()
    exact = results(stock, [x.double() if is_float(x) else x for x in inputs])
    got = results(kernelized(undecorated, module), inputs)
    assert ours
    for key in expected:
        assert_as_good_as_torch(got[key], expected[key], exact[key])


@pytest.mark.parametrize("name, options", OPTIONS)
def test_compiles_into_one_graph(undecorated, device, name, options):
    torch.compiler.reset()
    module, inputs = module_and_inputs(name, device=device, **options)
    expected = results(kernelized(undecorated, module), inputs)
    module.forward = torch.compile(module.forward, fullgraph=True, backend=COMPILE_BACKENDS[device])
    assert_close(results(module, inputs), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(undecorated, ours, model_type, dtype):
    module, inputs = module_and_inputs(model_type)
    outs = []
    for run in (module, kernelized(undecorated, copy.deepcopy(module))):
        with torch.autocast("cpu", dtype):
            out = run(*inputs)
        outs.append(out[0] if isinstance(out, tuple) else out)
    assert ours
    torch.testing.assert_close(outs[1], outs[0], rtol=5e-2, atol=5e-2)


# In a model


def out_and_gradients(model, ids):
    model.zero_grad()
    out = model(input_ids=ids)
    out = out.logits if "logits" in out else out.last_hidden_state
    out.float().square().mean().backward()
    return {"out": out.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def ids_of(batch, length):
    return torch.randint(2, 120, (batch, length), generator=torch.Generator().manual_seed(1))


def test_model(undecorated, ours, model_type):
    model = tiny_undecorated_model(model_type)
    modules = served(model, model_type)
    ids = ids_of(2, 7)
    generate = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = out_and_gradients(model, ids)
    tokens = model.generate(ids, **generate) if model.can_generate() else None
    assert modules and not ours
    kernelize(model, mode=Mode.TRAINING, device="cpu")
    assert all(undecorated.switching.is_switched_on(module) for module in modules)
    got = out_and_gradients(model, ids)
    assert len(ours) >= len(modules)
    for name, value in expected.items():
        scale = max(1e-3, value.abs().max().item())
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4 * scale, msg=name)
    if tokens is not None:
        assert torch.equal(model.generate(ids, **generate), tokens)


# What stays stock


def test_a_forward_that_is_not_transformers_own_stays(undecorated, ours, model_type, monkeypatch):
    """A subclass's, another library's; and a wrapper on the module, below which it is ours."""
    (subclassed, inputs), (wrapped, _), (module, _) = (module_and_inputs(model_type) for _ in range(3))
    cls, seen = type(module), []
    subclassed.__class__ = type("Sub", (cls,), {"forward": lambda self, *args: -args[0]})
    kernelize(subclassed, mode=Mode.INFERENCE, device="cpu")
    assert torch.equal(subclassed(*inputs), -inputs[0]) and not ours
    wrapped.forward = lambda *args, forward=wrapped.forward: seen.append(args) or forward(*args)
    kernelize(wrapped, mode=Mode.INFERENCE, device="cpu")
    wrapped(*inputs)
    assert len(seen) == 1 and ours
    ours.clear()
    monkeypatch.setattr(cls, "forward", lambda self, *args: -args[0])
    kernelize(module, mode=Mode.INFERENCE, device="cpu")
    undecorated.make_switchable()
    assert torch.equal(module(*inputs), -inputs[0]) and not ours


def test_weights_that_are_not_dense_take_the_stock_forward(undecorated, ours, model_type):
    module, inputs = module_and_inputs(model_type)
    expected = results(module.double(), [x.double() if is_float(x) else x for x in inputs])
    kernelized(undecorated, module)
    torch.testing.assert_close(results(module, [x.double() if is_float(x) else x for x in inputs]), expected)
    assert not ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_parametrized_weight_is_read_as_often_as_need_be(undecorated, ours, model_type, dtype):
    """Once by us; in float64, which we leave to stock, as often as by stock alone."""

    class Counted(torch.nn.Module):
        reads = 0

        def forward(self, weight):
            type(self).reads += 1
            return 2 * weight

    module, inputs = module_and_inputs(model_type)
    module, inputs = module.to(dtype), [x.to(dtype) if is_float(x) else x for x in inputs]
    path = undecorated.SERVED[model_type][1][-1]
    owner, _, name = path.rpartition(".")
    parametrize.register_parametrization(module.get_submodule(owner), name, Counted())
    Counted.reads = 0
    expected, by_stock = module(*inputs), Counted.reads
    kernelized(undecorated, module)
    Counted.reads = 0
    torch.testing.assert_close(module(*inputs), expected, rtol=1e-4, atol=1e-4)
    assert bool(ours) == (dtype == torch.float32)
    assert Counted.reads == (1 if ours else by_stock)


@pytest.mark.parametrize("name, owner", [("llama4", "experts"), ("dbrx", "mlp")])
def test_hooks_on_the_owner_of_the_weights_run(undecorated, ours, name, owner):
    module, inputs = module_and_inputs(name)
    kernelized(undecorated, module)
    seen = []
    module.get_submodule(owner).register_forward_hook(lambda *args: seen.append(args))
    module(*inputs)
    assert seen and not ours


@pytest.mark.parametrize("kernelize_first", [False, True])
@pytest.mark.parametrize(
    "name, targets",
    [
        ("llama4", ["experts.gate_up_proj", "experts.down_proj"]),
        ("longcat_flash", ["experts.gate_up_proj", "experts.down_proj"]),
        ("step3p7", ["experts.gate_up_proj", "experts.down_proj"]),  # has an `_apply_gate`, too
        ("jetmoe", ["mlp.input_linear.weight", "mlp.output_linear.weight"]),
    ],
)
def test_adapters_as_peft_makes_them(undecorated, name, targets, kernelize_first):
    models = []
    for use_kernels in (False, True):
        model = tiny_undecorated_model(name)
        if use_kernels and kernelize_first:
            kernelize(model, mode=Mode.TRAINING, device="cpu")
        torch.manual_seed(1)
        config = LoraConfig(target_parameters=targets, r=3, init_lora_weights=False)
        model = get_peft_model(model, config)
        if use_kernels and not kernelize_first:
            kernelize(model, mode=Mode.TRAINING, device="cpu")
        models.append(model)
    expected, got = (out_and_gradients(model, ids_of(2, 7)) for model in models)
    for key, value in expected.items():
        scale = max(1e-3, value.abs().max().item())
        torch.testing.assert_close(got[key], value, rtol=1e-3, atol=1e-4 * scale, msg=key)
