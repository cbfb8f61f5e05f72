"""DeepSeek-V4 as it ships: experts in 4 bits, other linear layers in fp8, and names of its own."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV4Config, FineGrainedFP8Config
from transformers.integrations import finegrained_fp8
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from moe_models import tiny_config
from oracle import error
from tiny_models import LOADING_WAYS, prompt

pytestmark = pytest.mark.usefixtures("one_thread", "no_other_kernels")

EXPERT = r"\.ffn\.experts\.\d+\.w[123]\.weight$"
LINEAR = r"(\.attn\.(wq_a|wq_b|wkv|wo_b)|\.shared_experts\.w[123])\.weight$"
NUM_MOE_LAYERS = 2
DENSE = [r".*\.self_attn", r".*\.shared_experts", "lm_head"]


@pytest.fixture(scope="module")
def save(kernel, tmp_path_factory):
    """save(fp8_linear) -> path of a checkpoint."""
    path = tmp_path_factory.mktemp("deepseek-v4") / "dense"
    config = tiny_config("deepseek_v4", DeepseekV4Config)
    config.intermediate_size = config.moe_intermediate_size = 32
    config.swiglu_limit = 0.25  # so that it matters
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(path)

    def save(fp8_linear):
        out = path.parent / f"fp8-{fp8_linear}"
        if out.exists():
            return out
        out.mkdir()
        tensors = {}
        for name, tensor in load_file(path / "model.safetensors").items():
            name = name.removeprefix("model.").replace("embed_tokens.", "embed.")
            is_expert = re.search(EXPERT, name)
            if is_expert or (fp8_linear and re.search(LINEAR, name)):
                tensor, scale = (kernel.quantize_fp4 if is_expert else kernel.quantize_fp8)(tensor)
                scale = scale if is_expert else (2.0 ** scale.log2().ceil()).to(torch.float8_e8m0fnu)
                tensors[name.replace(".weight", ".scale")] = scale
            tensors[name] = tensor
        assert sum(t.dtype == torch.int8 for t in tensors.values()) == NUM_MOE_LAYERS * 8 * 3
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((path / "config.json").read_text())
        quantization = {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
        if not fp8_linear:
            quantization["modules_to_not_convert"] = DENSE
        config.update(expert_dtype="fp4", quantization_config=quantization)
        (out / "config.json").write_text(json.dumps(config))
        return out

    return save


def load(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, **{"dtype": torch.float32, **kwargs})


def experts_of(model):
    experts = [module for name, module in model.named_modules() if name.endswith(".mlp.experts")]
    assert len(experts) == NUM_MOE_LAYERS
    return experts


@torch.no_grad()
def results(model):
    tokens = prompt().to(model.device)
    generated = model.generate(tokens, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    return model(tokens).logits.double(), generated


@pytest.mark.parametrize("kwargs", LOADING_WAYS)
def test_without_a_gpu_transformers_dequantizes(save, registered, record, kwargs):
    """The result is a dense model, which our layer for bf16 and fp32 serves, clamped gate included."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU the experts stay in 4 bits")
    # Transformers dequantises linear layers in fp8 to bf16, whatever one asks for.
    stock = load(save(fp8_linear=True), dtype=torch.bfloat16)
    calls = record(registered.functional, "moe_experts")
    expected, generated = results(stock.float())
    assert not calls
    model = load(save(fp8_linear=True), dtype=torch.bfloat16, **kwargs).float()
    logits, tokens = results(model)
    assert error(logits, expected) < 1e-4 and torch.equal(tokens, generated)
    assert len(calls) == 7 * NUM_MOE_LAYERS and calls[0][3].dtype == torch.float32


@pytest.mark.parametrize("kwargs", LOADING_WAYS)
def test_experts_in_4_bits(save, device, registered, monkeypatch, record, kwargs):
    """As they stay where Transformers finds a GPU: here it does not look for one.

    Experts alone: Transformers' own fp8 layers fetch their kernels from the Hub.
    """
    path, options = save(fp8_linear=False), {"device_map": device}
    dequantize = FineGrainedFP8Config(dequantize=True, modules_to_not_convert=DENSE)
    stock = load(path, quantization_config=dequantize, **options).float()  # what it leaves in bf16, too
    expected, generated = results(stock)
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda self, **_: None)
    model = load(path, **options, **kwargs)
    for experts, dense in zip(experts_of(model), experts_of(stock)):
        assert dense.gate_up_proj.dtype == torch.float32
        assert isinstance(experts, finegrained_fp8.FP8Experts)
        assert experts.gate_up_proj.dtype == torch.int8 and experts.gate_up_proj.shape == (8, 64, 32)
        assert experts.gate_up_proj_scale_inv.dtype == torch.float8_e8m0fnu
        bits = sum(p.numel() * p.element_size() for p in experts.parameters()) * 8
        assert bits == 4.25 * sum(p.numel() for p in dense.parameters())
    calls = record(registered.functional, "moe_experts")
    logits, tokens = results(model)
    assert error(logits, expected) < 1e-4 and torch.equal(tokens, generated)
    assert len(calls) == 7 * NUM_MOE_LAYERS and calls[0][3].dtype == torch.int8
    status = {name: served for name, served in registered.status(model).items() if name.endswith(".experts")}
    assert set(status.values()) == {"moe_grouped_gemm"}
