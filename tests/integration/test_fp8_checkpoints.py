"""FP8 checkpoints in Transformers, end to end, as examples/quantize_checkpoint.py makes them."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations import finegrained_fp8

from oracle import error
from tiny_models import LOADING_WAYS, NUM_MOE_LAYERS, experts_of, is_switched_on, prompt

pytestmark = pytest.mark.usefixtures("one_thread", "no_other_kernels")


@torch.no_grad()
def logits(model):
    return model(prompt().to(model.device)).logits.float()


def test_format_is_deepseeks(bf16_checkpoint, quantize, tmp_path):
    quantize("--linear", bf16_checkpoint, tmp_path / "fp8")
    config = json.loads((tmp_path / "fp8/config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fp8" and config["weight_block_size"] == [128, 128]
    key = "model.layers.2.mlp.experts.7.down_proj.weight"
    with safe_open(tmp_path / "fp8/model.safetensors", "pt") as file:
        names = set(file.keys())
        assert file.get_tensor(key).dtype == torch.float8_e4m3fn
        assert file.get_tensor(f"{key}_scale_inv").shape == (2, 1)
    assert "model.layers.0.self_attn.o_proj.weight_scale_inv" in names
    assert not [k for k in names if k.endswith("_scale_inv") and ("gate.weight" in k or "embed" in k)]


@pytest.mark.parametrize("kwargs", LOADING_WAYS)
@pytest.mark.parametrize("linear", [True, False], ids=["all-linear", "experts"])
def test_without_a_gpu_transformers_dequantizes(
    bf16_checkpoint, quantize, registered, record, tmp_path, linear, kwargs
):
    """The result is a dense model, which our bf16 layer serves."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU the experts stay in fp8")
    quantize(*(["--linear"] if linear else []), bf16_checkpoint, tmp_path / "fp8")
    calls = record(registered.functional, "moe_experts")
    # DeepSeek's own format loads in bf16 alone: Transformers dequantizes linear layers to it whatever one asks for.
    dtype = torch.bfloat16 if linear else torch.float32
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=dtype)
    expected = logits(stock)
    assert not calls
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=dtype, **kwargs)
    assert error(logits(model), expected.double()) < (3e-2 if linear else 1e-4)
    assert len(calls) == NUM_MOE_LAYERS and calls[0][3].dtype == dtype
    # Of the order of what rounding does to this model: some tokens go to other experts.
    original = AutoModelForCausalLM.from_pretrained(bf16_checkpoint, dtype=dtype)
    assert 0 < error(expected, logits(original).double()) < 0.5
    tokens = model.generate(prompt(), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert tokens.shape == (2, prompt().shape[1] + 4)


@pytest.mark.gpu
@pytest.mark.parametrize("kwargs", LOADING_WAYS)
def test_fp8_experts_on_a_gpu(bf16_checkpoint, quantize, registered, tmp_path, kwargs):
    """Experts alone: Transformers' own fp8 layers fetch their kernels from the Hub. Stock computes on dense weights."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("Transformers dequantizes")
    quantize(bf16_checkpoint, tmp_path / "fp8")
    dequantize = {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    options = {"dtype": torch.bfloat16, "device_map": "cuda"}
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", **options, **dequantize))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", **options, **kwargs)
    for experts in experts_of(model):
        assert isinstance(experts, finegrained_fp8.FP8Experts)
        assert experts.gate_up_proj.dtype == torch.float8_e4m3fn
        if "use_kernels" in kwargs:
            assert is_switched_on(registered, experts)
    calls = []
    for experts in experts_of(model):
        experts.register_forward_hook(lambda module, args, out: calls.append((module, args, out)))
    # A few tokens go to other experts than stock's, as rounding decides; the experts themselves are exact enough.
    assert error(logits(model), expected.double()) < 0.3
    assert len(calls) == NUM_MOE_LAYERS
    for experts, args, out in calls:
        scales = {f"{name}_scale": getattr(experts, f"{name}_scale_inv") for name in ("gate_up_proj", "down_proj")}
        with torch.no_grad():
            exact = registered.reference.moe_experts(*args, experts.gate_up_proj, experts.down_proj, **scales)
        assert 0 < error(out, exact.double()) < 0.06
    tokens = model.generate(prompt().cuda(), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert tokens.shape == (2, prompt().shape[1] + 8)
