"""Stock PEFT on models that run on this kernel, against PEFT's own way on stock models."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib import import_module

import accelerate
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, KernelConfig

from tiny_models import NUM_MOE_LAYERS, prompt

GATE_UP, DOWN = TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
WAYS = [
    pytest.param({"use_kernels": True}, id="use_kernels"),
    pytest.param({"experts_implementation": "moe_grouped_gemm"}, id="experts_implementation"),
]
BY_NAME = WAYS[1].values[0]

# In this order: what is registered is ours alone.
pytestmark = pytest.mark.usefixtures("one_thread", "no_other_kernels", "registered")


@pytest.fixture(scope="module")
def lora(kernel):
    return import_module(f"{kernel.__name__}.lora")


@pytest.fixture
def calls(lora, record):
    """The arguments of every call of `moe_experts_lora`: what proves that an adapter is computed here."""
    return record(lora, "moe_experts_lora")


def load(path, dtype=torch.float32, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **kwargs)


def config(**options):
    return LoraConfig(**{"target_parameters": TARGETS, "r": 3, "lora_alpha": 6, **options})


def adapted(model, **configs):
    """`model` with these adapters, all of them random: PEFT's B = 0 would hide every error."""
    configs = configs or {"default": config()}
    for name, options in configs.items():
        if isinstance(model, PeftModel):
            model.add_adapter(name, options)
        else:
            model = get_peft_model(model, options, adapter_name=name)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) / 8).to(parameter.dtype)
    return model


@torch.no_grad()
def logits(model):
    return model(prompt()).logits


def gradients(model):
    """Of A and B, in the order of their names; nothing else has any."""
    model.zero_grad()
    model(prompt()).logits.square().mean().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert grads and all("lora_" in name for name in grads)
    return grads


def assert_equal(ours, stock, calls, expected_calls=NUM_MOE_LAYERS):
    """Outputs and, where an adapter may learn, gradients."""
    expected = logits(stock)
    assert not calls
    torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == expected_calls
    if any(parameter.requires_grad for parameter in stock.parameters()):
        expected = gradients(stock)
        grads = gradients(ours)
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            scale = expected[name].abs().max()
            assert scale > 1e-5
            torch.testing.assert_close(grad / scale, expected[name] / scale, rtol=0, atol=1e-5)
        assert len(calls) == 2 * expected_calls
    calls.clear()


@pytest.fixture
def pair(checkpoint):
    """(ours, stock), with the same adapters."""

    def pair(way=BY_NAME, **configs):
        return adapted(load(checkpoint, **way), **configs), adapted(load(checkpoint), **configs)

    return pair


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="r-3"),
        pytest.param({"r": 16}, id="r-16"),
        pytest.param({"r": 5, "use_rslora": True}, id="rslora"),
        pytest.param({"target_parameters": [GATE_UP]}, id="gate_up-alone"),
        pytest.param({"target_parameters": [DOWN]}, id="down-alone"),
        pytest.param({"target_parameters": TARGETS[::-1]}, id="other-order"),
        pytest.param({"target_modules": ["q_a_proj", "o_proj"]}, id="beside-linear-layers"),
    ],
)
def test_one_adapter(pair, calls, way, options):
    ours, stock = pair(way, default=config(**options))
    assert_equal(ours, stock, calls)
    with stock.disable_adapter():
        bare = logits(stock)
    assert (logits(stock) - bare).abs().max() > 0.1


def test_bf16(checkpoint, calls):
    """PEFT keeps the factors of a bf16 model in fp32. Against fp32 we may be twice as far off as PEFT."""
    stock = adapted(load(checkpoint, torch.bfloat16))
    assert {p.dtype for n, p in stock.named_parameters() if "lora_" in n} == {torch.float32}
    ours = adapted(load(checkpoint, torch.bfloat16, **BY_NAME))
    exact = adapted(load(checkpoint))
    exact.load_state_dict(stock.state_dict())  # what bf16 has left of the weights
    expected, stock_out, out = logits(exact), logits(stock), logits(ours)
    assert out.dtype == torch.bfloat16 and len(calls) == NUM_MOE_LAYERS
    assert (out.float() - expected).norm() <= 2 * (stock_out.float() - expected).norm()
    expected, stock_grads, grads = gradients(exact), gradients(stock), gradients(ours)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert (grad - expected[name]).norm() <= 2 * (stock_grads[name] - expected[name]).norm(), name


def test_autocast(pair, calls):
    ours, stock = pair()
    exact, grads = logits(stock), gradients(stock)
    with torch.autocast("cpu", torch.bfloat16):
        stock_out, stock_grads = logits(stock), gradients(stock)
        out, our_grads = logits(ours), gradients(ours)
    assert calls[0][0].dtype == torch.float32
    assert 0 < (out - exact).norm() <= 2 * (stock_out - exact).norm()
    for name, grad in our_grads.items():
        assert (grad - grads[name]).norm() <= 2 * (stock_grads[name] - grads[name]).norm(), name


@pytest.mark.parametrize("way", WAYS)
def test_several_adapters(pair, calls, way):
    """Of different ranks: both at once, each alone, none; as PEFT switches them."""
    ours, stock = pair(way, first=config(r=3), second=config(r=16, use_rslora=True))
    seen = []
    for active in (["first", "second"], ["second"], ["first"]):
        for model in (ours, stock):
            model.base_model.set_adapter(active)
        assert_equal(ours, stock, calls)
        seen.append(logits(stock))
    with ours.disable_adapter(), stock.disable_adapter():
        torch.testing.assert_close(logits(ours), logits(stock), rtol=1e-5, atol=1e-5)
        assert not calls
        seen.append(logits(stock))
    assert_equal(ours, stock, calls)
    assert all((a - b).abs().max() > 0.1 for i, a in enumerate(seen) for b in seen[:i])


def test_merge(pair, calls):
    ours, stock = pair(first=config(), second=config(r=4))
    unmerged = logits(stock)
    ours.merge_adapter(["first"])
    torch.testing.assert_close(logits(ours), unmerged, rtol=1e-5, atol=1e-5)
    assert not calls
    ours.unmerge_adapter()
    ours.base_model.set_adapter(["first", "second"])
    stock.base_model.set_adapter(["first", "second"])
    torch.testing.assert_close(logits(ours), logits(stock), rtol=1e-5, atol=1e-5)
    assert len(calls) == NUM_MOE_LAYERS
    calls.clear()
    expected = logits(stock)
    merged = ours.merge_and_unload()
    assert not any(isinstance(module, ParamWrapper) for module in merged.modules())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    assert not calls


@pytest.mark.parametrize("way", WAYS)
def test_save_and_load(checkpoint, pair, calls, tmp_path, way):
    ours, stock = pair(way)
    ours.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(checkpoint, **way), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(stock), rtol=1e-5, atol=1e-5)
    assert len(calls) == NUM_MOE_LAYERS
    torch.testing.assert_close(logits(PeftModel.from_pretrained(load(checkpoint), tmp_path)), logits(stock))


@pytest.mark.parametrize("way", WAYS)
def test_generate(pair, calls, way):
    ours, stock = pair(way)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(prompt(), **options), stock.generate(prompt(), **options))
    assert len(calls) == 8 * NUM_MOE_LAYERS


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_gradient_checkpointing(pair, calls, way, use_reentrant):
    ours, stock = pair(way)
    expected = gradients(stock.train())
    ours.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    ours.enable_input_require_grads()
    grads = gradients(ours.train())
    assert len(calls) == 2 * NUM_MOE_LAYERS
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5 * expected[name].abs().max().item())


@pytest.mark.parametrize("way", WAYS)
def test_torch_compile(pair, calls, way):
    ours, _ = pair(way)
    wrapper = ours.get_submodule("base_model.model.model.layers.1.mlp.experts")
    x, ids, weights = torch.randn(5, 64), torch.randint(0, 8, (5, 2)), torch.rand(5, 2)
    expected = wrapper(x, ids, weights)
    torch.compiler.reset()
    compiled = torch.compile(wrapper, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, ids, weights), expected)
    (expected_grad,) = torch.autograd.grad(expected.sum(), wrapper.lora_A["default"].weight)
    (grad,) = torch.autograd.grad(compiled(x, ids, weights).sum(), wrapper.lora_A["default"].weight)
    torch.testing.assert_close(grad, expected_grad)


def test_torch_compile_once(pair):
    """The first call leaves nothing behind that would make the second a new program."""
    ours, _ = pair()
    wrapper = ours.get_submodule("base_model.model.model.layers.1.mlp.experts")
    args = torch.randn(5, 64), torch.randint(0, 8, (5, 2)), torch.rand(5, 2)
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(wrapper, fullgraph=True, backend=counter)
    for _ in range(3):
        torch.testing.assert_close(compiled(*args), wrapper(*args))
    assert counter.frame_count == 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("compiled", ["experts", "wrapper"])
def test_one_of_wrapper_and_experts_is_compiled(pair, way, compiled):
    """As a graph break between the two has it: adapters that one notes reach the other."""
    ours, _ = pair(way)
    wrapper = ours.get_submodule("base_model.model.model.layers.1.mlp.experts")
    args = torch.randn(5, 64), torch.randint(0, 8, (5, 2)), torch.rand(5, 2)
    expected = wrapper(*args)
    experts = wrapper.get_base_layer()
    if compiled == "experts":
        experts.compile(backend="eager")
    else:
        experts.register_forward_pre_hook(torch._dynamo.disable(lambda module, args: None))
        wrapper.compile(backend="eager")
    torch.compiler.reset()
    for _ in range(2):
        torch.testing.assert_close(wrapper(*args), expected)


def test_adapters_of_several_threads(pair, kernel, lora):
    """Each thread's forwards take its own adapters, as far as PEFT, whose switches are the model's, lets them."""
    ours, _ = pair()
    experts = experts_of(ours)[0]
    args = torch.randn(5, 64), torch.randint(0, 8, (5, 2)), torch.rand(5, 2)
    adapters = []
    for seed in (1, 2, 3):
        generator = torch.Generator().manual_seed(seed)
        A, B = (torch.randn(8, *shape, generator=generator) for shape in ((3, 64), (64, 3)))
        adapters.append([lora.LoraFactors(A, B, 1.0)])
    activated = kernel.integration.adapters.activated
    together = threading.Barrier(len(adapters))

    def call(factors, wait):
        results = []
        for _ in range(20):
            with activated(experts, "gate_up_proj", factors), torch.no_grad():
                wait()
                results.append(experts(*args))
        return results

    expected = [call(factors, lambda: None)[0] for factors in adapters]
    with ThreadPoolExecutor(len(adapters)) as pool:
        for results, one in zip(pool.map(lambda factors: call(factors, together.wait), adapters), expected):
            assert all(torch.equal(result, one) for result in results)
    assert kernel.integration.adapters.adapters_of(experts) == ()


# No weight is copied


class _Largest(TorchDispatchMode):
    """The size of the largest result of an op that is no view of one of the parameters."""

    def __init__(self, parameters):
        super().__init__()
        self.storages = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in self.storages:
                self.numel = max(self.numel, result.numel())
        return results


def largest_tensor(model):
    """In elements, over forward and backward: by dispatch, and by what the allocator gave to any one op."""
    with _Largest(model.parameters()) as largest:
        gradients(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        gradients(model)
    allocated = max(event.self_cpu_memory_usage for event in profile.events())
    return max(largest.numel, allocated // 4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("active", [["first"], ["first", "second"]], ids=len)
def test_nothing_of_a_weight_s_size_is_made(pair, way, active):
    ours, stock = pair(way, first=config(), second=config())
    for model in (ours, stock):
        model.base_model.set_adapter(active)
    sizes = [weight.numel() for name, weight in ours.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))]
    assert len(sizes) == 2 * NUM_MOE_LAYERS
    assert largest_tensor(stock) >= max(sizes)
    assert largest_tensor(ours) < min(sizes) / 2


def test_the_base_weights_themselves_are_saved(pair):
    """For backward, by reference; nothing else of their size is."""
    ours, _ = pair()
    weights = {
        w.data_ptr(): w.numel() for name, w in ours.named_parameters() if name.endswith(("up_proj", "down_proj"))
    }
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gradients(ours)
    large = {pointer for pointer, numel in saved.items() if numel > min(weights.values()) / 2}
    # The first layer's gate_up_proj is not: no gradient goes further down.
    assert len(large) == 2 * NUM_MOE_LAYERS - 1 and large <= weights.keys()


# Whatever we do not know keeps PEFT's own way


def experts_of(model):
    experts = [module.get_base_layer() for name, module in model.named_modules() if name.endswith(".mlp.experts")]
    assert len(experts) == NUM_MOE_LAYERS
    return experts


@pytest.fixture
def unmet(kernel, monkeypatch):
    """As if this process had not met PEFT yet."""
    monkeypatch.setattr(ParamWrapper, "_activate_lora", ParamWrapper._activate_lora.__wrapped__)
    kernel.integration.peft.meet_peft.cache_clear()
    kernel.integration.peft._warn.cache_clear()
    yield kernel
    kernel.integration.peft._warn.cache_clear()


@pytest.mark.usefixtures("loadable_by_kernel_config", "cpu_in_kernel_config")
def test_kernel_config(pair, unmet, calls):
    """Way 1 meets PEFT without register(), while Transformers builds the model; here on a CPU."""
    mapping = KernelConfig({"DeepseekV3Experts": "org/moe-grouped-gemm:MoEExperts"})
    ours, stock = pair({"use_kernels": True, "kernel_config": mapping})
    for training in (False, True):
        assert_equal(ours.train(training), stock.train(training), calls)


IMPORTED_LATER = """
import sys, kernels, torch
kernel = kernels.get_kernel("org/moe-grouped-gemm", version=1)
assert "peft" not in sys.modules
kernel.register()

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], experts_implementation="moe_grouped_gemm")
model = get_peft_model(model, LoraConfig(target_parameters=["mlp.experts.down_proj"]))
lora = kernel.lora
lora.moe_experts_lora = lambda x, *_: print("served") or x
model(torch.ones(1, 3, dtype=torch.int64))
"""


def test_peft_imported_after_register(checkpoint):
    command = [sys.executable, "-c", IMPORTED_LATER, checkpoint]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["served"] * NUM_MOE_LAYERS


def test_without_peft(unmet, monkeypatch, recwarn):
    monkeypatch.setitem(sys.modules, "peft", None)
    unmet.register()
    assert not recwarn


def test_register_meets_peft_once(kernel):
    activate_lora = ParamWrapper._activate_lora
    kernel.register()
    assert ParamWrapper._activate_lora is activate_lora


def assert_warns_once(ours, stock, calls, expected_calls=0):
    with pytest.warns(UserWarning, match="cannot take adapters on expert weights from PEFT") as warnings:
        assert_equal(ours, stock, calls, expected_calls)
    assert len(warnings) == 1


def test_peft_that_does_something_else(pair, unmet, calls, monkeypatch):
    activate_lora = ParamWrapper._activate_lora

    @contextmanager
    def halved(self, active_adapters):
        scaling = dict(self.scaling)
        self.scaling.update({name: value / 2 for name, value in scaling.items()})
        with activate_lora(self, active_adapters):
            self.scaling.update(scaling)
            yield

    monkeypatch.setattr(ParamWrapper, "_activate_lora", halved)
    with pytest.warns(UserWarning, match="cannot take adapters on expert weights from PEFT"):
        unmet.register()
    assert ParamWrapper._activate_lora is halved
    assert_equal(*pair(), calls, 0)


def test_peft_without_factors(pair, unmet, calls, monkeypatch):
    """Two adapters: PEFT itself reads factors only where one is alone."""
    models = pair(first=config(), second=config())
    for model in models:
        model.base_model.set_adapter(["first", "second"])
    unmet.register()
    monkeypatch.delattr(ParamWrapper, "get_delta_factors")
    assert_warns_once(*models, calls)


@pytest.mark.parametrize("targets", [TARGETS, [GATE_UP], [DOWN]], ids=["both", "gate_up", "down"])
def test_adapter_of_a_kind_to_come(pair, unmet, calls, targets):
    """On one of the weights alone, the other is still served."""
    unmet.register()
    ours, stock = pair()
    for module in ours.modules():
        if isinstance(module, ParamWrapper) and f"mlp.experts.{module.parameter_name}" in targets:
            module.lora_variant["default"] = object()
    assert_warns_once(ours, stock, calls, 0 if targets is TARGETS else NUM_MOE_LAYERS)


@pytest.mark.parametrize("way", WAYS)
def test_weights_that_we_do_not_serve(checkpoint, calls, recwarn, way):
    eager = {"experts_implementation": "eager"}  # which takes fp64
    ours, stock = (adapted(load(checkpoint, torch.float64, **{**eager, **kwargs})) for kwargs in (way, {}))
    assert_equal(ours, stock, calls, 0)
    assert not [warning for warning in recwarn if "cannot take adapters" in str(warning.message)]


@pytest.mark.parametrize("way", WAYS)
def test_other_forwards(pair, calls, way):
    """What a forward of somebody else does with the weights is not known; below accelerate's hooks it is our own."""
    ours, stock = pair(way)
    for experts in experts_of(ours):
        accelerate.hooks.add_hook_to_module(experts, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
    assert_equal(ours, stock, calls)
    for experts in experts_of(ours):
        accelerate.hooks.remove_hook_from_module(experts)
        experts.forward = partial(experts.forward)
    assert_equal(ours, stock, calls, 0)


def test_failing_forward_leaves_nothing_behind(pair, lora, calls, monkeypatch):
    ours, stock = pair()
    with monkeypatch.context() as patch:
        patch.setattr(lora, "moe_experts_lora", None)
        with pytest.raises(TypeError):
            logits(ours)
    assert_equal(ours, stock, calls)
    with ours.disable_adapter(), stock.disable_adapter():
        torch.testing.assert_close(logits(ours), logits(stock), rtol=1e-5, atol=1e-5)
    assert not calls
