"""Stock PEFT on models that run on this kernel, against PEFT's own way on stock models with the same numbers."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.hotswap import hotswap_adapter
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from moe_models import with_the_numbers_of
from peft_models import DOWN, GATE_UP, TARGETS, adapted, assert_equal, config, experts_of, gradients
from tiny_models import BY_NAME, LOADING_WAYS, NUM_MOE_LAYERS, load, logits, prompt

# In this order: what is registered is ours alone.
pytestmark = pytest.mark.usefixtures("one_thread", "no_other_kernels", "registered")


@pytest.fixture
def calls(kernel, record):
    """The arguments of every call of `moe_experts_lora`: what proves that an adapter is computed here."""
    return record(kernel.functional, "moe_experts_lora")


@pytest.fixture(params=["dense", "fp4"])
def models(request, checkpoint, kernel):
    """(ours, stock), without adapters."""

    def models(way=BY_NAME, dtype=torch.float32):
        stock = load(checkpoint, dtype)
        if request.param == "dense":
            return load(checkpoint, dtype, **way), stock
        ours = load(checkpoint, dtype, quantization_config=kernel.fp4_config(), **way)
        return ours, with_the_numbers_of(ours, stock)

    return models


@pytest.fixture
def pair(models):
    """(ours, stock), with the same adapters of PEFT."""

    def pair(way=BY_NAME, **configs):
        return [adapted(model, **configs) for model in models(way)]

    return pair


@pytest.mark.parametrize("way", LOADING_WAYS)
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


def test_bf16(checkpoint, models, calls):
    """PEFT keeps the factors of a bf16 model in fp32. Against fp32 we may be twice as far off as PEFT."""
    ours, stock = map(adapted, models(dtype=torch.bfloat16))
    for model in (ours, stock):
        assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
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


@pytest.mark.parametrize("way", LOADING_WAYS)
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


@pytest.mark.parametrize("models", ["dense"], indirect=True)  # for codes, see test_experts_in_codes.py
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


@pytest.mark.parametrize("way", LOADING_WAYS)
def test_save_and_load(models, pair, calls, tmp_path, way):
    ours, stock = pair(way)
    ours.save_pretrained(tmp_path)
    bare_ours, bare_stock = models(way)
    loaded = PeftModel.from_pretrained(bare_ours, tmp_path)
    torch.testing.assert_close(logits(loaded), logits(stock), rtol=1e-5, atol=1e-5)
    assert len(calls) == NUM_MOE_LAYERS
    torch.testing.assert_close(logits(PeftModel.from_pretrained(bare_stock, tmp_path)), logits(stock))


def test_hotswap(pair, calls, tmp_path):
    ours, stock = pair()
    swapped, _ = pair()
    for name, parameter in swapped.named_parameters():
        if "lora_" in name:
            parameter.data.zero_()
    ours.save_pretrained(tmp_path)
    assert (logits(swapped) - logits(stock)).abs().max() > 0.1
    hotswap_adapter(swapped, tmp_path, "default")
    calls.clear()
    assert_equal(swapped, stock, calls)


@pytest.mark.parametrize("way", LOADING_WAYS)
def test_trainer(pair, calls, tmp_path, way):
    """Under gradient checkpointing, from a loss to another."""

    def losses(model):
        options = {"max_steps": 3, "logging_steps": 1, "learning_rate": 0.1, "gradient_checkpointing": True}
        arguments = TrainingArguments(tmp_path, **options, use_cpu=True, report_to=[], save_strategy="no", seed=0)
        data = [{"input_ids": ids, "labels": ids} for ids in prompt().repeat(12, 1)]
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    ours, stock = pair(way)
    expected = losses(stock)
    assert not calls
    assert losses(ours) == pytest.approx(expected, rel=1e-3)
    assert len(expected) == 3 and expected[2] < expected[0] - 0.1
    assert len(calls) == 2 * 3 * NUM_MOE_LAYERS  # a forward twice


@pytest.mark.parametrize("way", LOADING_WAYS)
def test_generate(pair, calls, way):
    ours, stock = pair(way)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(prompt(), **options), stock.generate(prompt(), **options))
    assert len(calls) == 8 * NUM_MOE_LAYERS


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("way", LOADING_WAYS)
def test_gradient_checkpointing(pair, calls, way, use_reentrant):
    ours, stock = pair(way)
    expected = gradients(stock.train())
    ours.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    ours.enable_input_require_grads()
    grads = gradients(ours.train())
    assert len(calls) == 2 * NUM_MOE_LAYERS
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5 * expected[name].abs().max().item())


@pytest.mark.parametrize("way", LOADING_WAYS)
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


@pytest.mark.parametrize("way", LOADING_WAYS)
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


def test_adapters_of_several_threads(pair, kernel):
    """Each thread's forwards take its own adapters, as far as PEFT, whose switches are the model's, lets them."""
    ours, _ = pair()
    experts = experts_of(ours)[0]
    args = torch.randn(5, 64), torch.randint(0, 8, (5, 2)), torch.rand(5, 2)
    adapters = []
    for seed in (1, 2, 3):
        generator = torch.Generator().manual_seed(seed)
        A, B = (torch.randn(8, *shape, generator=generator) for shape in ((3, 64), (64, 3)))
        adapters.append([kernel.functional.LoraFactors(A, B, 1.0)])
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


@pytest.mark.parametrize("way", LOADING_WAYS)
@pytest.mark.parametrize("active", [["first"], ["first", "second"]], ids=len)
def test_nothing_of_a_weight_s_size_is_made(pair, way, active):
    ours, stock = pair(way, first=config(), second=config())
    for model in (ours, stock):
        model.base_model.set_adapter(active)
    sizes = [
        weight.numel() for name, weight in stock.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))
    ]
    assert len(sizes) == 2 * NUM_MOE_LAYERS
    assert largest_tensor(stock) >= max(sizes)
    assert largest_tensor(ours) < min(sizes)


def test_the_base_weights_themselves_are_saved(pair):
    """For backward, by reference; nothing else of their size is."""
    ours, _ = pair()
    parameters = {p.data_ptr(): name for name, p in ours.named_parameters()}
    weights = {name: p.numel() for name, p in ours.named_parameters() if name.endswith(("up_proj", "down_proj"))}
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gradients(ours)
    # The first layer's gate_up_proj is not: no gradient goes further down.
    assert len({parameters.get(pointer) for pointer in saved} & weights.keys()) == 2 * NUM_MOE_LAYERS - 1
    others = [numel for pointer, numel in saved.items() if pointer not in parameters]
    assert max(others) < min(weights.values()) / 2
