"""DeepSeek-V3 in Transformers, end to end: every way in, every mode, and everything that wraps a module's forward."""

import copy
import subprocess
import sys

import accelerate
import pytest
import torch
import transformers
from kernels import Mode, kernelize
from safetensors import safe_open
from torch.testing._internal.two_tensor import TwoTensor
from transformers.integrations import finegrained_fp8, moe
from transformers.models.deepseek_v3 import modeling_deepseek_v3

from suite import COMPILE_BACKENDS
from tiny_models import (
    INTERFACE,
    LOADING_WAYS,
    NUM_MOE_LAYERS,
    assert_runs_on_kernel,
    experts_of,
    gradients,
    is_kernelized,
    is_switched_on,
    load,
    logits,
    prompt,
)

pytestmark = pytest.mark.usefixtures("one_thread", "no_other_kernels")


# The checkpoint


def test_checkpoint_has_one_tensor_per_expert(checkpoint):
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        keys = {key for key in file.keys() if ".mlp.experts." in key}
    assert keys == {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"
        for layer in range(1, 1 + NUM_MOE_LAYERS)
        for expert in range(8)
        for name in ("gate", "up", "down")
    }


# Ways 2 and 3


@pytest.mark.parametrize("kwargs", LOADING_WAYS)
def test_logits_fp32(checkpoint, registered, calls, device, kwargs):
    model = load(checkpoint, device_map=device, **kwargs)
    assert is_kernelized(model, registered) == ("use_kernels" in kwargs)
    assert_runs_on_kernel(model, logits(load(checkpoint, device_map=device)), calls)


@pytest.mark.parametrize("kwargs", LOADING_WAYS)
def test_logits_bf16(checkpoint, registered, calls, device, kwargs):
    stock = load(checkpoint, torch.bfloat16, device_map=device)
    stock_logits = logits(stock).float()
    exact = logits(stock.float())
    kernel_logits = logits(load(checkpoint, torch.bfloat16, device_map=device, **kwargs))
    assert kernel_logits.dtype == torch.bfloat16 and len(calls) == NUM_MOE_LAYERS
    stock_error = (stock_logits - exact).abs().max()
    assert (kernel_logits.float() - exact).abs().max() <= 2 * stock_error


@pytest.mark.parametrize("kwargs", LOADING_WAYS)
def test_greedy_tokens(checkpoint, registered, calls, device, kwargs):
    generate = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    expected = load(checkpoint, device_map=device).generate(prompt().to(device), **generate)
    assert not calls
    model = load(checkpoint, device_map=device, **kwargs)
    assert torch.equal(model.generate(prompt().to(device), **generate), expected)
    assert len(calls) == 12 * NUM_MOE_LAYERS


@pytest.mark.parametrize("kwargs", LOADING_WAYS)
def test_broken_kernel_breaks_logits(checkpoint, registered, monkeypatch, kwargs):
    monkeypatch.setattr(registered.functional, "moe_experts", lambda hidden_states, *_, **__: hidden_states)
    assert (logits(load(checkpoint, **kwargs)) - logits(load(checkpoint))).abs().max() > 0.1


def test_model_loaded_before_register(checkpoint, unregistered, kernel, calls):
    model = load(checkpoint, use_kernels=True)
    reference = logits(model)
    assert not calls
    kernel.register()
    model.set_use_kernels(True)
    assert is_kernelized(model, kernel)
    assert_runs_on_kernel(model, reference, calls)


# Modes


@pytest.mark.parametrize("compiled", [Mode._NONE, Mode.TORCH_COMPILE], ids=["eager", "torch_compile"])
@pytest.mark.parametrize("mode", [Mode.INFERENCE, Mode.TRAINING], ids=["inference", "training"])
def test_kernelize(checkpoint, registered, calls, device, mode, compiled):
    stock = load(checkpoint, device_map=device)
    model = load(checkpoint, device_map=device).train(mode == Mode.TRAINING)
    kernelize(model, mode=mode | compiled)
    assert is_kernelized(model, registered)
    assert_runs_on_kernel(model, logits(stock), calls)
    if mode == Mode.TRAINING:
        torch.testing.assert_close(gradients(model), gradients(stock.train()), rtol=1e-3, atol=1e-6)


def test_torch_compile(checkpoint, registered, device):
    """One graph around each kind of entry: the instance's forward and the class's dispatch."""
    x, ids, weights = torch.randn(5, 64), torch.randint(0, 8, (5, 2)), torch.rand(5, 2)
    arguments = [tensor.to(device) for tensor in (x, ids, weights)]
    for way in LOADING_WAYS:
        experts = experts_of(load(checkpoint, device_map=device, **way.values[0]))[0]
        compiled = torch.compile(experts, fullgraph=True, backend=COMPILE_BACKENDS[device])
        torch.testing.assert_close(compiled(*arguments), experts(*arguments))


def test_train_and_eval(checkpoint, registered, calls, device):
    reference = logits(load(checkpoint, device_map=device))
    model = load(checkpoint, device_map=device, use_kernels=True)
    for training in (True, False, True):
        model.train(training)
        assert is_kernelized(model, registered)
        assert_runs_on_kernel(model, reference, calls)


def test_deepcopy_of_a_kernelized_model(checkpoint, registered, calls):
    model = load(checkpoint, use_kernels=True)
    reference = logits(model)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert_runs_on_kernel(clone, reference, calls)


def test_autocast_norms_hand_over_fp32(checkpoint, registered, calls):
    """bf16 weights, fp32 hidden states: the layer computes in bf16 and answers in fp32."""
    experts = experts_of(load(checkpoint, torch.bfloat16, use_kernels=True))[0]
    x, ids, weights = torch.randn(5, 64), torch.randint(0, 8, (5, 2)), torch.rand(5, 2)
    out = experts(x, ids, weights)
    assert out.dtype == torch.float32 and calls[0][0].dtype == torch.bfloat16
    assert torch.equal(out, experts(x.bfloat16(), ids, weights).float())


# Wrapped forwards


@pytest.mark.parametrize("kwargs", [pytest.param({}, id="stock"), *LOADING_WAYS])
def test_offload_hooks_survive_kernelize(checkpoint, registered, calls, kwargs):
    """Experts only: `kernelize` itself drops the hooks of Transformers' own layers, RMSNorm first."""
    reference = logits(load(checkpoint))
    model = accelerate.cpu_offload(load(checkpoint, **kwargs), execution_device="cpu")
    for mode in (Mode.INFERENCE, Mode.TRAINING):
        for experts in experts_of(model):
            kernelize(experts, mode=mode, device="cpu")
            assert experts.gate_up_proj.is_meta
        assert_runs_on_kernel(model, reference, calls)


@pytest.mark.parametrize("kwargs", LOADING_WAYS)
def test_device_map_with_disk(checkpoint, registered, calls, tmp_path, kwargs):
    reference = logits(load(checkpoint))
    names = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.0", "model.layers.1"]
    device_map = {**dict.fromkeys(names, "cpu"), "model.layers.2": "disk"}
    model = load(checkpoint, device_map=device_map, offload_folder=tmp_path, **kwargs)
    assert experts_of(model)[1].gate_up_proj.is_meta
    assert_runs_on_kernel(model, reference, calls)


# Other models


class _SmallConfig:
    """Answers whatever an experts class asks of its config."""

    _experts_implementation = "eager"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return "silu" if "act" in name else 1e-6 if "eps" in name else False if "bias" in name else 8


class _OtherForward(modeling_deepseek_v3.DeepseekV3Experts):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return -hidden_states


def test_subclass_made_on_the_fly(registered):
    """As torch's fully_shard and parametrize do, to a module that exists already."""
    module = modeling_deepseek_v3.DeepseekV3Experts(_SmallConfig())
    module.__class__ = type("FSDPDeepseekV3Experts", (modeling_deepseek_v3.DeepseekV3Experts,), {})
    kernelize(module, mode=Mode.INFERENCE, device="cpu")
    assert is_switched_on(registered, module)


def test_subclass_with_its_own_forward(registered):
    module = _OtherForward(_SmallConfig())
    kernelize(module, mode=Mode.INFERENCE, device="cpu")
    assert torch.equal(module(torch.ones(2, 8), None, None), -torch.ones(2, 8))


@pytest.mark.parametrize(
    "convert",
    [
        pytest.param(torch.Tensor.double, id="fp64"),
        pytest.param(lambda weight: TwoTensor(weight, weight), id="wrapper-subclass"),
    ],
)
def test_weights_that_are_not_plain_bf16_fp16_fp32(registered, calls, convert):
    """Quantized weights among them: what they mean is the module's own business."""
    module = modeling_deepseek_v3.DeepseekV3Experts(_SmallConfig())
    for name, weight in list(module.named_parameters()):
        weight = torch.nn.Parameter(convert(torch.randn_like(weight)), requires_grad=False)
        setattr(module, name, weight)
    x, ids, weights = convert(torch.randn(5, 8)), torch.randint(0, 8, (5, 2)), torch.rand(5, 2)
    expected = module(x, ids, weights)
    kernelize(module, mode=Mode.INFERENCE, device="cpu")
    assert torch.equal(module(x, ids, weights), expected) and not calls


def test_class_decorated_twice(registered):
    """As FP8Experts is, once per module: the module's own forward is below all decorators."""

    @moe.use_experts_implementation
    @moe.use_experts_implementation
    class Experts(torch.nn.Module):
        def __init__(self, config):
            super().__init__()

        def _apply_gate(self, gate_up):
            raise NotImplementedError

        def forward(self, hidden_states, top_k_index, top_k_weights):
            return 2 * hidden_states

    module = Experts(_SmallConfig())
    module.config._experts_implementation = INTERFACE
    assert torch.equal(module(torch.ones(2, 8), None, None), 2 * torch.ones(2, 8))


# Registration


def test_loading_the_kernel_leaves_transformers_alone(kernel):
    code = """
import sys, kernels
kernel = kernels.get_kernel("org/moe-grouped-gemm", version=1)
assert kernel.layers.MoEExperts and "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_register_is_idempotent(kernel):
    kernel.register()
    decorator = moe.use_experts_implementation
    kernel.register()
    assert moe.use_experts_implementation is decorator is transformers.integrations.use_experts_implementation
    for interface in (moe.ALL_EXPERTS_FUNCTIONS, finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS):
        assert interface[INTERFACE] is kernel.integration.modules.experts_forward


def test_old_transformers(kernel, monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.16.3")
    with pytest.raises(ImportError, match="needs transformers >= 5.17 .* found transformers 5.16.3"):
        kernel.register()


def test_transformers_without_the_interface(kernel, monkeypatch):
    monkeypatch.delattr(moe, "_default_apply_gate")
    with pytest.raises(ImportError, match="needs transformers >= 5.17 .*_default_apply_gate"):
        kernel.register()
