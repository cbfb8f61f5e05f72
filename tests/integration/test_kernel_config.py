"""Way 1: a KernelConfig, and the stand-in that it has Transformers build models with."""

import copy

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, KernelConfig
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.monkey_patching import clear_patch_mapping, register_patch_mapping

from tiny_models import (
    INTERFACE,
    NUM_MOE_LAYERS,
    assert_runs_on_kernel,
    deepseek_v3_config,
    experts_of,
    gradients,
    is_kernelized,
    load,
    logits,
)

pytestmark = pytest.mark.usefixtures("one_thread", "no_other_kernels")


@pytest.fixture
def layout(kernel):
    """What is left of a KernelConfig load in the process: models are built with the stand-in."""
    register_patch_mapping({"DeepseekV3Experts": kernel.layers.MoEExpertsLayout})
    yield kernel.layers.MoEExpertsLayout
    clear_patch_mapping()


def test_kernel_config_refuses_cpu(checkpoint, kernel_config, kernel):
    """Transformers' KernelConfig knows no cpu; the stand-in that it leaves behind is harmless."""
    reference = logits(load(checkpoint))
    with pytest.raises(ValueError, match="Only devices in .* are supported, got: cpu"):
        load(checkpoint, use_kernels=True, kernel_config=kernel_config)
    assert torch.equal(logits(load(checkpoint)), reference)


@pytest.mark.usefixtures("cpu_in_kernel_config")
def test_kernel_config(checkpoint, kernel_config, kernel, calls, device):
    """A KernelConfig maps inference only, so that `kernelize` finds nothing for training: what it finds stays on."""
    stock = load(checkpoint, device_map=device)
    reference = logits(stock)
    model = load(checkpoint, device_map=device, use_kernels=True, kernel_config=kernel_config)
    assert is_kernelized(model, kernel)
    assert_runs_on_kernel(model, reference, calls)
    model.train()
    assert_runs_on_kernel(model, reference, calls)
    torch.testing.assert_close(gradients(model), gradients(stock.train()), rtol=1e-3, atol=1e-6)
    model.eval()
    assert is_kernelized(model, kernel)

    calls.clear()
    assert torch.equal(logits(load(checkpoint, device_map=device)), reference) and not calls  # stock again


@pytest.mark.parametrize("also", [(), ("DeepseekV3Experts",)], ids=["alone", "with-experts"])
@pytest.mark.usefixtures("unregistered", "cpu_in_kernel_config", "loadable_by_kernel_config", "blocks_on_cpu")
def test_blocks(checkpoint, kernel, record, device, also):
    """A block's entry switches on its router and its experts, without entries of their own."""
    options = {"version": 1, "trust_remote_code": True}
    layers = {"DeepseekV3MoE": "DeepseekV3MoE", **{name: "MoEExperts" for name in also}}
    config = KernelConfig({name: (f"org/moe-grouped-gemm:{layer}", options) for name, layer in layers.items()})
    reference = logits(load(checkpoint, device_map=device))
    model = load(checkpoint, device_map=device, use_kernels=True, kernel_config=config)
    calls = record(kernel.integration.blocks, "moe_block")
    torch.testing.assert_close(logits(model), reference, rtol=1e-4, atol=1e-4)
    assert len(calls) == NUM_MOE_LAYERS and set(kernel.status(model).values()) == {"moe_grouped_gemm"}
    model.set_use_kernels(False)
    torch.testing.assert_close(logits(model), reference)
    assert len(calls) == NUM_MOE_LAYERS


def test_layout_is_the_stock_module(checkpoint, layout, calls):
    stock_class = type(experts_of(load(checkpoint))[0])
    clear_patch_mapping()
    stock = load(checkpoint)
    register_patch_mapping({"DeepseekV3Experts": layout})
    model = load(checkpoint)

    assert stock_class is modeling_deepseek_v3.DeepseekV3Experts
    for experts, stock_experts in zip(experts_of(model), experts_of(stock)):
        assert isinstance(experts, layout) and vars(experts).keys() == vars(stock_experts).keys()
    assert model.state_dict().keys() == stock.state_dict().keys()
    assert torch.equal(logits(model), logits(stock))
    assert torch.equal(logits(copy.deepcopy(model)), logits(stock))
    assert not calls


def test_layout_saves_and_loads(checkpoint, layout, tmp_path):
    load(checkpoint).save_pretrained(tmp_path)
    with safe_open(checkpoint / "model.safetensors", "pt") as a, safe_open(tmp_path / "model.safetensors", "pt") as b:
        assert set(a.keys()) == set(b.keys())
        assert all(torch.equal(a.get_tensor(key), b.get_tensor(key)) for key in a.keys())
    assert torch.equal(logits(load(tmp_path)), logits(load(checkpoint)))


def test_layout_is_initialised(checkpoint, layout):
    """By `_init_weights`, which asks isinstance(module, DeepseekV3Experts): with the stand-in in place, and without."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(deepseek_v3_config())
    state = {key: weight for key, weight in model.state_dict().items() if ".experts." not in key}
    missing = type(model).from_pretrained(None, config=deepseek_v3_config(), state_dict=state)
    for experts in experts_of(model) + experts_of(missing):
        assert abs(experts.gate_up_proj.std().item() - 0.1) < 0.01
        assert abs(experts.down_proj.std().item() - 0.1) < 0.01


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", INTERFACE])
def test_layout_experts_implementation(checkpoint, layout, calls, implementation):
    reference = logits(load(checkpoint))
    model = load(checkpoint, experts_implementation=implementation)
    torch.testing.assert_close(logits(model), reference, rtol=1e-4, atol=1e-4)
    assert len(calls) == (NUM_MOE_LAYERS if implementation == INTERFACE else 0)


def test_layout_without_a_model(kernel):
    with pytest.raises(TypeError, match="LlamaConfig"):
        kernel.layers.MoEExpertsLayout(transformers.LlamaConfig())
