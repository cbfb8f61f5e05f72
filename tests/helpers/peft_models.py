"""Stock PEFT's adapters on the tiny DeepSeek-V3, and how a model that runs on this kernel compares with a stock one."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tiny_models import NUM_MOE_LAYERS, logits, prompt

GATE_UP, DOWN = TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


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


def experts_of(model):
    experts = [module.get_base_layer() for name, module in model.named_modules() if name.endswith(".mlp.experts")]
    assert len(experts) == NUM_MOE_LAYERS
    return experts


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
