"""The layer DeepseekV3TopkRouter in Transformers: a model's results, recorded outputs, gradients, every way in."""

import copy
from importlib import import_module

import accelerate
import pytest
import torch
from kernels import Mode, kernelize
from transformers import AutoModelForCausalLM, KernelConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.monkey_patching import register_patch_mapping

from oracle import in_fp64, router
from suite import COMPILE_BACKENDS, REPO_ID
from tiny_models import NUM_MOE_LAYERS, deepseek_v3_config, is_switched_on, load, prompt, stock_router

HUB_NAME = f"{REPO_ID}:DeepseekV3TopkRouter"

pytestmark = pytest.mark.usefixtures("no_other_kernels", "routers_on_cpu")


@pytest.fixture
def calls(kernel, record):
    return record(import_module(f"{kernel.__name__}.router"), "route_tokens")


def routers_of(model):
    routers = [module for module in model.modules() if isinstance(module, DeepseekV3TopkRouter)]
    assert len(routers) == NUM_MOE_LAYERS
    return routers


def is_kernelized(model, kernel):
    return all(is_switched_on(kernel, r) for r in routers_of(model))


@torch.no_grad()
def run(model):
    # Not model.device: an offloaded model is on "meta", yet takes its input from the CPU.
    device = "cuda" if model.device.type == "cuda" else "cpu"
    outputs = model(prompt().to(device), output_router_logits=True)
    return outputs.logits, outputs.router_logits


def gradients(model):
    model.zero_grad()
    outputs = model(prompt().to(model.device), output_router_logits=True)
    aux_loss = sum(logits.logsumexp(1).square().mean() for logits in outputs.router_logits)
    (outputs.logits.square().mean() + aux_loss).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_model(checkpoint, registered, calls, device, training):
    stock = load(checkpoint, device_map=device)
    model = load(checkpoint, device_map=device, use_kernels=True).train(training)
    assert is_kernelized(model, registered)
    logits, router_logits = run(model)
    assert len(calls) == len(router_logits) == NUM_MOE_LAYERS
    torch.testing.assert_close((logits, router_logits), run(stock), rtol=1e-4, atol=1e-4)
    if training:
        torch.testing.assert_close(gradients(model), gradients(stock.train()), rtol=1e-3, atol=1e-6)


def test_broken_router_breaks_logits(checkpoint, registered, monkeypatch):
    module = import_module(f"{registered.__name__}.router")
    route_tokens = module.route_tokens

    def lowest_experts(*args):
        logits, weights, ids = route_tokens(*args)
        return logits, weights, torch.arange(ids.shape[1]).expand_as(ids)

    monkeypatch.setattr(module, "route_tokens", lowest_experts)
    assert (run(load(checkpoint, use_kernels=True))[0] - run(load(checkpoint))[0]).abs().max() > 0.01


def test_deepcopy_has_its_own_weights(checkpoint, registered, calls):
    model = load(checkpoint, use_kernels=True)
    reference = run(model)
    clone = copy.deepcopy(model)
    torch.nn.init.zeros_(routers_of(model)[0].weight)
    calls.clear()
    assert torch.equal(run(clone)[0], reference[0]) and len(calls) == NUM_MOE_LAYERS


def test_hidden_states_of_any_rank(checkpoint, registered, device):
    module = routers_of(load(checkpoint, device_map=device))[0]
    kernelize(module, mode=Mode.INFERENCE, device=device)
    x = torch.randn(2, 3, 64, device=device)
    for result, flat in zip(module(x), module(x.view(6, 64))):
        assert torch.equal(result, flat) and result.shape[0] == 6


def test_layer_compiles_into_one_graph(checkpoint, registered, device):
    module = routers_of(load(checkpoint, device_map=device))[0]
    kernelize(module, mode=Mode.INFERENCE | Mode.TORCH_COMPILE, device=device)
    compiled = torch.compile(module, fullgraph=True, backend=COMPILE_BACKENDS[device])
    x = torch.randn(2, 3, 64, device=device)
    torch.testing.assert_close(compiled(x), module(x))


def test_offload_hooks_survive_kernelize(checkpoint, registered, calls):
    model = accelerate.cpu_offload(load(checkpoint), execution_device="cpu")
    for module in routers_of(model):
        forward = module.forward
        kernelize(module, mode=Mode.INFERENCE, device="cpu")
        assert module.forward is forward and module.weight.is_meta
    torch.testing.assert_close(run(model), run(load(checkpoint)), rtol=1e-4, atol=1e-4)
    assert len(calls) == NUM_MOE_LAYERS


def test_module_that_computes_something_else(registered, calls):
    class Reversed(DeepseekV3TopkRouter):
        def forward(self, hidden_states):
            return super().forward(-hidden_states)

    x, weight, bias = router(5, 12, 16)
    module = stock_router(weight, bias, 4, 3, 2, True, 1.0)
    module.__class__ = Reversed
    kernelize(module, mode=Mode.INFERENCE, device="cpu")
    assert torch.equal(module(x)[0], -x @ weight.T) and not calls


def test_fp64_module_keeps_its_forward(registered, calls):
    x, weight, bias = in_fp64(router(5, 12, 16))
    module = stock_router(weight, bias, 4, 3, 2, True, 1.0)
    kernelize(module, mode=Mode.INFERENCE, device="cpu")
    assert module(x)[0].dtype == torch.float32 and not calls


# --- KernelConfig -----------------------------------------------------------------------------------------------------


@pytest.fixture
def kernel_config_on_cpu(monkeypatch, loadable_by_kernel_config, cpu_in_kernel_config):
    """As in a process that never called register()."""
    monkeypatch.delattr(DeepseekV3TopkRouter, "kernel_layer_name", raising=False)


@pytest.mark.usefixtures("kernel_config_on_cpu")
@pytest.mark.parametrize("with_experts", [False, True], ids=["router-alone", "with-experts"])
def test_kernel_config(checkpoint, kernel, calls, device, with_experts):
    expected = run(load(checkpoint, device_map=device))
    mapping = {"DeepseekV3TopkRouter": HUB_NAME}
    if with_experts:
        mapping["DeepseekV3Experts"] = f"{REPO_ID}:MoEExperts"
    model = load(checkpoint, device_map=device, use_kernels=True, kernel_config=KernelConfig(mapping))
    assert is_kernelized(model, kernel)
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == NUM_MOE_LAYERS

    calls.clear()
    assert torch.equal(run(load(checkpoint, device_map=device))[0], expected[0]) and not calls  # stock again


@pytest.mark.usefixtures("kernel_config_on_cpu")
def test_layout_is_the_stock_module(checkpoint, kernel, calls):
    expected = run(load(checkpoint))
    register_patch_mapping({"DeepseekV3TopkRouter": kernel.layers.DeepseekV3TopkRouterLayout})
    model = load(checkpoint)
    assert all(
        type(r) is DeepseekV3TopkRouter and isinstance(r, kernel.layers.DeepseekV3TopkRouterLayout)
        for r in routers_of(model)
    )
    assert torch.equal(run(model)[0], expected[0]) and len(run(model)[1]) == NUM_MOE_LAYERS and not calls
    # `_init_weights` asks isinstance(module, DeepseekV3TopkRouter), which is the stand-in while a model is built.
    fresh = AutoModelForCausalLM.from_config(deepseek_v3_config())
    assert all(abs(r.weight.std().item() - 0.1) < 0.02 for r in routers_of(fresh))
