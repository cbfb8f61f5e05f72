"""A DeepSeek-V3 that fits a test: every kind of layer, one of them dense, random weights; and a router alone."""

from __future__ import annotations

import tempfile
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, PreTrainedModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from suite import REPO_ID

NUM_MOE_LAYERS = 2
INTERFACE = "moe_grouped_gemm"
HUB_NAME = f"{REPO_ID}:MoEExperts"
WAYS = ["use_kernels", INTERFACE]
# The same as arguments of from_pretrained.
BY_NAME = {"experts_implementation": INTERFACE}
LOADING_WAYS = [
    pytest.param({"use_kernels": True}, id="use_kernels"),
    pytest.param(BY_NAME, id="experts_implementation"),
]


def deepseek_v3_config() -> DeepseekV3Config:
    return DeepseekV3Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=1 + NUM_MOE_LAYERS,
        first_k_dense_replace=1,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        max_position_embeddings=64,
        num_mtp_layers=0,
        initializer_range=0.1,  # far from zero, so that experts and routing matter to the logits
    )


def save_deepseek_v3(path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(deepseek_v3_config()).save_pretrained(path)


def load(path, dtype=torch.float32, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **kwargs)


def experts_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    experts = [module for name, module in model.named_modules() if name.endswith(".mlp.experts")]
    assert len(experts) == NUM_MOE_LAYERS
    return experts


def is_switched_on(kernel, module) -> bool:
    return kernel.integration.switching.is_switched_on(module)


def is_kernelized(model, kernel):
    return all(is_switched_on(kernel, experts) for experts in experts_of(model))


def tiny_model(device, kernel=None, way=None):
    """Stock without a way; the weights are the same every time, with the way "fp4" rounded to 4 bits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(deepseek_v3_config()).to(device).eval()
    if way == "fp4":
        with tempfile.TemporaryDirectory() as path:
            model.save_pretrained(path)
            return load(path, device_map=device, quantization_config=kernel.fp4_config())
    if way is not None:
        kernel.register()
    if way == "use_kernels":
        model.set_use_kernels(True)
        assert is_kernelized(model, kernel)
    elif way is not None:
        model.set_experts_implementation(way)
    return model


def prompt(vocab_size: int = 128) -> torch.Tensor:
    return torch.randint(0, vocab_size, (2, 11), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model):
    # Not model.device: accelerate leaves an offloaded model on "meta", yet takes its input from the CPU.
    device = "cuda" if model.device.type == "cuda" else "cpu"
    return model(prompt().to(device)).logits


def assert_runs_on_kernel(model, reference, calls):
    calls.clear()
    torch.testing.assert_close(logits(model), reference, rtol=1e-4, atol=1e-4)
    assert len(calls) == NUM_MOE_LAYERS


def gradients(model):
    model.zero_grad()
    model(prompt().to(model.device)).logits.square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def stock_router(weight, bias, top_k, num_group, topk_group, norm, scaling):
    """Transformers' router with these parameters."""
    config = SimpleNamespace(
        num_experts_per_tok=top_k,
        num_local_experts=weight.shape[0],
        hidden_size=weight.shape[1],
        routed_scaling_factor=scaling,
        n_group=num_group,
        topk_group=topk_group,
        norm_topk_prob=norm,
    )
    module = DeepseekV3TopkRouter(config)
    module.weight = torch.nn.Parameter(weight)
    module.e_score_correction_bias = bias
    return module
