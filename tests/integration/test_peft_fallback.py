"""Whatever we do not know keeps PEFT's own way; and how this kernel and PEFT come to know each other."""

import subprocess
import sys
from contextlib import contextmanager
from functools import partial

import accelerate
import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper
from transformers import KernelConfig

from peft_models import DOWN, GATE_UP, TARGETS, adapted, assert_equal, config, experts_of
from tiny_models import HUB_NAME, LOADING_WAYS, NUM_MOE_LAYERS, load, logits

# In this order: what is registered is ours alone.
pytestmark = pytest.mark.usefixtures("one_thread", "no_other_kernels", "registered")


@pytest.fixture
def calls(kernel, record):
    """The arguments of every call of `moe_experts_lora`: what proves that an adapter is computed here."""
    return record(kernel.functional, "moe_experts_lora")


@pytest.fixture
def unmet(kernel, monkeypatch):
    """As if this process had not met PEFT yet."""
    monkeypatch.setattr(ParamWrapper, "_activate_lora", ParamWrapper._activate_lora.__wrapped__)
    kernel.integration.peft.meet_peft.cache_clear()
    return kernel


@pytest.mark.usefixtures("loadable_by_kernel_config", "cpu_in_kernel_config")
def test_kernel_config(pair, unmet, calls):
    """Way 1 meets PEFT without register(), while Transformers builds the model; here on a CPU."""
    mapping = KernelConfig({"DeepseekV3Experts": HUB_NAME})
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
functional = kernel.functional
functional.moe_experts_lora = lambda x, *_, **__: print("served") or x
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


@pytest.mark.parametrize("way", LOADING_WAYS)
def test_weights_that_we_do_not_serve(checkpoint, calls, recwarn, way):
    eager = {"experts_implementation": "eager"}  # which takes fp64
    ours, stock = (adapted(load(checkpoint, torch.float64, **{**eager, **kwargs})) for kwargs in (way, {}))
    assert_equal(ours, stock, calls, 0)
    assert not [warning for warning in recwarn if "cannot take adapters" in str(warning.message)]


@pytest.mark.parametrize("way", LOADING_WAYS)
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


def test_failing_forward_leaves_nothing_behind(pair, kernel, calls, monkeypatch):
    ours, stock = pair()
    with monkeypatch.context() as patch:
        patch.setattr(kernel.functional, "moe_experts_lora", None)
        with pytest.raises(TypeError):
            logits(ours)
    assert_equal(ours, stock, calls)
    with ours.disable_adapter(), stock.disable_adapter():
        torch.testing.assert_close(logits(ours), logits(stock), rtol=1e-5, atol=1e-5)
    assert not calls
