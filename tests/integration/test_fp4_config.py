"""`from_pretrained(..., quantization_config=moe.fp4_config())`: experts in 4 bits from whatever checkpoint."""

import copy
import json
import pickle

import accelerate
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, Mxfp4Config
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, GptOssTopKRouter

import moe_models
from moe_models import ALONE, experts_classes, tiny_config, with_the_numbers_of
from oracle import dequantized_fp4, error
from situations import on_a_gpu
from tiny_models import NUM_MOE_LAYERS, prompt

pytestmark = pytest.mark.usefixtures("one_thread", "no_other_kernels")

WEIGHTS = ("gate_up_proj", "down_proj")


def load(path, dtype=torch.float32, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **kwargs)


@torch.no_grad()
def logits(model):
    return model(prompt().to(model.device)).logits.double()


def generate(model):
    return model.generate(prompt().to(model.device), max_new_tokens=6, min_new_tokens=6, do_sample=False)


def experts_of(model):
    return {name: module for name, module in model.named_modules() if hasattr(module, "down_proj_scale_inv")}


# --- gpt-oss ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt_oss(kernel, tmp_path_factory):
    """A checkpoint as gpt-oss ships: blocks (E, N, K / 32, 16) and exponents (E, N, K / 32), the rest in bf16."""
    path = tmp_path_factory.mktemp("gpt-oss")
    config = tiny_config("gpt_oss", GptOssConfig)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):
            parameter.data.normal_()
    model.save_pretrained(path)
    tensors = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if name.endswith(WEIGHTS):
            codes, scale = kernel.quantize_fp4(tensor.mT)
            tensors[f"{name}_blocks"] = codes.view(torch.uint8).unflatten(-1, (-1, 16))
            tensors[f"{name}_scales"] = scale.view(torch.uint8)
        else:
            tensors[name] = tensor
    assert len(tensors) > 4 * config.num_hidden_layers
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("kwargs", [{}, {"use_kernels": True}], ids=["alone", "use_kernels"])
def test_gpt_oss(gpt_oss, kernel, device, record, monkeypatch, kwargs):
    """As it is in the file, and what Transformers makes of it in bf16; no other kernel is asked for."""
    stock = load(gpt_oss, quantization_config=Mxfp4Config(dequantize=True), device_map=device).float()
    expected, tokens = logits(stock), generate(stock)
    asked = []
    monkeypatch.setattr(
        "transformers.integrations.hub_kernels.lazy_load_kernel", lambda name, *_, **__: asked.append(name)
    )
    model = load(gpt_oss, quantization_config=kernel.fp4_config(), device_map=device, **kwargs)
    assert not asked
    in_file = load_file(gpt_oss / "model.safetensors")
    for path, experts in experts_of(model).items():
        assert type(experts) is GptOssExperts
        assert {p.dtype for name, p in experts.named_parameters() if "bias" not in name} == {torch.uint8}
        for name in WEIGHTS:
            codes, scale = getattr(experts, name), getattr(experts, f"{name}_scale_inv")
            assert torch.equal(codes.flatten().cpu(), in_file[f"{path}.{name}_blocks"].flatten())
            assert torch.equal(scale.cpu(), in_file[f"{path}.{name}_scales"])
    assert sum(isinstance(module, GptOssTopKRouter) for module in model.modules()) == len(experts_of(model)) == 2
    calls = record(kernel.functional, "moe_experts")
    assert error(logits(model), expected) < 1e-5
    assert len(calls) == 2 and calls[0][3].dtype == torch.uint8
    assert torch.equal(generate(model), tokens)
    status = {name: served for name, served in kernel.status(model).items() if name.endswith(".experts")}
    assert set(status.values()) == {"moe_grouped_gemm"}


def test_gpt_oss_is_saved_as_it_was(gpt_oss, kernel, tmp_path):
    model = load(gpt_oss, torch.bfloat16, quantization_config=kernel.fp4_config())
    model.save_pretrained(tmp_path)
    before, after = (load_file(path / "model.safetensors") for path in (gpt_oss, tmp_path))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    config, saved = (json.loads((path / "config.json").read_text()) for path in (gpt_oss, tmp_path))
    assert saved["quantization_config"] == config["quantization_config"]
    # Without us, too.
    stock = load(tmp_path, torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True))
    assert torch.equal(
        logits(stock), logits(load(gpt_oss, torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)))
    )


def test_experts_that_a_checkpoint_has_left_dense(gpt_oss, kernel, tmp_path):
    """As its config says."""
    tensors = load_file(gpt_oss / "model.safetensors")
    first = {name: tensors.pop(name) for name in list(tensors) if "layers.0.mlp.experts" in name and "proj_" in name}
    for name in WEIGHTS:
        key = f"model.layers.0.mlp.experts.{name}"
        tensors[key] = (
            dequantized_fp4(first[f"{key}_blocks"].flatten(-2), first[f"{key}_scales"]).mT.contiguous().bfloat16()
        )
        tensors[f"{key}_bias"] = first[f"{key}_bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((gpt_oss / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"].append("model.layers.0.mlp.experts")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load(tmp_path, quantization_config=kernel.fp4_config())
    assert list(experts_of(model)) == ["model.layers.1.mlp.experts"]
    out = logits(model)
    assert error(out, logits(load(gpt_oss, quantization_config=kernel.fp4_config()))) < 1e-5
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again", quantization_config=kernel.fp4_config())), out)


# --- dense checkpoints ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_size", ["100KB", "1GB"])
def test_dense_checkpoint(checkpoint, kernel, device, record, tmp_path, max_shard_size):
    """One tensor an expert in the file, over many files; codes are those of `quantize_fp4`."""
    dense = load(checkpoint)
    dense.save_pretrained(tmp_path / "dense", max_shard_size=max_shard_size)
    assert (len(list((tmp_path / "dense").glob("*.safetensors"))) > 5) == (max_shard_size == "100KB")
    model = load(tmp_path / "dense", quantization_config=kernel.fp4_config(), device_map=device)
    assert len(experts_of(model)) == NUM_MOE_LAYERS
    for path, experts in experts_of(model).items():
        for name in WEIGHTS:
            codes, scale = kernel.quantize_fp4(getattr(dense.get_submodule(path), name))
            assert torch.equal(getattr(experts, name).cpu(), codes.view(torch.uint8))
            assert torch.equal(getattr(experts, f"{name}_scale_inv").cpu(), scale.view(torch.uint8))
    calls = record(kernel.functional, "moe_experts")
    out, tokens = logits(model), generate(model)
    assert len(calls) == 7 * NUM_MOE_LAYERS
    expected = with_the_numbers_of(model, dense.to(device))
    assert error(out, logits(expected)) < 1e-5 and torch.equal(tokens, generate(expected))

    model.save_pretrained(tmp_path / "fp4")
    calls.clear()
    again = load(tmp_path / "fp4", quantization_config=kernel.fp4_config(), device_map=device)
    assert torch.equal(logits(again), out) and len(calls) == NUM_MOE_LAYERS
    size = (tmp_path / "fp4/model.safetensors").stat().st_size
    assert size < 0.6 * sum(path.stat().st_size for path in (tmp_path / "dense").glob("*.safetensors"))


def test_one_dense_weight_at_a_time(checkpoint, kernel, monkeypatch):
    """While a model is loaded: no weight that has been quantised is alive when the next one is."""
    seen, quantize = [], kernel.weights.quantize_fp4.quantize_fp4

    def quantize_and_look_back(weight):
        assert all(earlier.expired() for earlier in seen)
        seen.append(StorageWeakRef(weight.untyped_storage()))
        return quantize(weight)

    monkeypatch.setattr(kernel.weights.quantize_fp4, "quantize_fp4", quantize_and_look_back)
    model = load(checkpoint, quantization_config=kernel.fp4_config())
    assert len(seen) == 2 * NUM_MOE_LAYERS
    for experts in experts_of(model).values():
        assert {parameter.dtype for parameter in experts.parameters()} == {torch.uint8}


def test_another_dtype_leaves_codes_alone(checkpoint, kernel):
    model = load(checkpoint, quantization_config=kernel.fp4_config())
    expected = logits(model)
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.uint8}
    assert 0 < error(logits(model), expected) < 0.1


def test_the_rest_of_the_model_learns(checkpoint, kernel):
    """Codes do not, and keep no optimizer from anything."""
    model = load(checkpoint, quantization_config=kernel.fp4_config())
    dense = with_the_numbers_of(model, load(checkpoint))
    for other in (model, dense):
        other(prompt()).logits.square().mean().backward()
    expected = {
        name: p.grad
        for name, p in dense.named_parameters()
        if not name.endswith(tuple(f"experts.{w}" for w in WEIGHTS))
    }
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5 * expected[name].abs().max().item())


@pytest.mark.parametrize("entry", [e for e in experts_classes() if e.name not in ALONE], ids=lambda e: e.name)
def test_every_model(kernel, monkeypatch, tmp_path, entry):
    """Whatever order its weights are stored in, its gate, biases and norms; saved and loaded again, too."""
    monkeypatch.setattr(moe_models, "SMALL", in_groups(moe_models.SMALL))
    monkeypatch.setattr(moe_models, "SPECIAL", {name: in_groups(sizes) for name, sizes in moe_models.SPECIAL.items()})
    model = moe_models.tiny_model(entry)
    model.save_pretrained(tmp_path / "dense")
    options = {"dtype": torch.float32, "quantization_config": kernel.fp4_config()}
    quantized = type(model).from_pretrained(tmp_path / "dense", **options)
    assert experts_of(quantized)
    status = kernel.status(quantized)
    assert all(status[path].startswith("moe_grouped_gemm") for path in experts_of(quantized))
    dense = with_the_numbers_of(quantized, type(model).from_pretrained(tmp_path / "dense", dtype=torch.float32))
    assert error(output(quantized), output(dense)) < 1e-5

    quantized.save_pretrained(tmp_path / "fp4")
    again = type(model).from_pretrained(tmp_path / "fp4", **options).state_dict()
    for name, tensor in quantized.state_dict().items():
        torch.testing.assert_close(again.pop(name), tensor, rtol=0, atol=0, equal_nan=True)
    assert not again


def in_groups(sizes):
    """Intermediate sizes in whole groups of columns."""
    return {n: [32] * len(v) if v == [24, 24] else 32 if v == 24 and n != "head_dim" else v for n, v in sizes.items()}


@torch.no_grad()
def output(model):
    out = model(prompt(100))
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).double()


# --- situations -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fp4_checkpoint(checkpoint, kernel, tmp_path):
    load(checkpoint, quantization_config=kernel.fp4_config()).save_pretrained(tmp_path / "fp4")
    return tmp_path / "fp4"


@pytest.mark.parametrize("source", ["checkpoint", "fp4_checkpoint"])
def test_device_map_with_disk(request, checkpoint, kernel, record, tmp_path, source):
    path, names = request.getfixturevalue(source), ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"]
    expected = logits(load(checkpoint, quantization_config=kernel.fp4_config()))
    device_map = {**dict.fromkeys([*names, "model.layers.0", "model.layers.1"], "cpu"), "model.layers.2": "disk"}
    options = {"device_map": device_map, "offload_folder": tmp_path / "offload"}
    model = load(path, quantization_config=kernel.fp4_config(), **options)
    experts = model.model.layers[2].mlp.experts
    assert experts.gate_up_proj.is_meta and experts.gate_up_proj_scale_inv.is_meta
    calls = record(kernel.functional, "moe_experts")
    with torch.no_grad():
        out = model(prompt()).logits  # takes its input from the CPU, though it says that it is on "meta"
    assert torch.equal(out.double(), expected) and len(calls) == NUM_MOE_LAYERS
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again", quantization_config=kernel.fp4_config())), expected)


def test_cpu_offload(fp4_checkpoint, kernel, record):
    model = load(fp4_checkpoint, quantization_config=kernel.fp4_config())
    expected = logits(model)
    model = accelerate.cpu_offload(model, execution_device="cpu")
    assert model.model.layers[2].mlp.experts.down_proj.is_meta
    calls = record(kernel.functional, "moe_experts")
    with torch.no_grad():
        assert torch.equal(model(prompt()).logits.double(), expected)
    assert len(calls) == NUM_MOE_LAYERS


@pytest.fixture
def experts(checkpoint, kernel, device):
    model = load(checkpoint, quantization_config=kernel.fp4_config(), device_map=device)
    return model.model.layers[2].mlp.experts


def inputs(device, tokens):
    generator = torch.Generator().manual_seed(3)
    x, index = torch.randn(tokens, 64, generator=generator), torch.rand(tokens, 8, generator=generator).topk(2)[1]
    return [t.to(device) for t in (x, index, torch.rand(tokens, 2, generator=generator))]


@pytest.mark.parametrize("tokens", [0, 1, 70])
def test_two_calls_are_equal(experts, device, tokens):
    x, *others = inputs(device, tokens)
    results = []
    for _ in range(2):
        x = x.detach().requires_grad_()
        out = experts(x, *others)
        assert out.shape == (tokens, 64)
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    assert all(map(torch.equal, *results))


def test_sentinels_and_nan(experts, device):
    """A slot of no expert here adds nothing; a NaN stays in its token."""
    x, index, weights = inputs(device, 70)
    out = experts(x, index, weights)
    elsewhere, others = index.clone(), weights.clone()
    elsewhere[::2, 1] = 8
    others[::2, 1] = 0
    torch.testing.assert_close(experts(x, elsewhere, weights), experts(x, index, others))
    x[3] = float("nan")
    broken = experts(x, index, weights)
    assert broken[3].isnan().all() and torch.equal(broken.nan_to_num(), torch.where(broken.isnan(), 0, out))
    assert not broken[torch.arange(70) != 3].isnan().any()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_a_copy_of_the_config(checkpoint, kernel, copied):
    """As programs make them that hand their arguments to another process."""
    config = copied(kernel.fp4_config())
    assert isinstance(config, Mxfp4Config)
    assert torch.equal(
        logits(load(checkpoint, quantization_config=config)),
        logits(load(checkpoint, quantization_config=kernel.fp4_config())),
    )


# --- what is refused --------------------------------------------------------------------------------------------------


def test_columns_that_make_no_groups(kernel, tmp_path):
    config = tiny_config("gpt_oss", GptOssConfig)
    config.intermediate_size = 48
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model.layers.0.mlp.experts.down_proj .* has 48 columns, no multiple of 32"):
        load(tmp_path, quantization_config=kernel.fp4_config())


def test_model_without_experts(kernel, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=128, num_hidden_layers=1, **sizes)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts that moe-grouped-gemm could hold in 4 bits"):
        load(tmp_path, quantization_config=kernel.fp4_config())


@pytest.mark.parametrize("name", ["eager", "grouped_mm", {"": "batched_mm"}], ids=str)
def test_nobody_else_computes_them(checkpoint, kernel, name):
    model = load(checkpoint, quantization_config=kernel.fp4_config())
    expected = logits(model)
    with pytest.raises(ValueError, match="experts_implementation: expected .*alone computes DeepseekV3Experts in 4 b"):
        model.set_experts_implementation(name)
    assert torch.equal(logits(model), expected)
    model.set_experts_implementation("moe_grouped_gemm")
    assert torch.equal(logits(model), expected)


def test_generate_changes_the_name_while_it_decodes(checkpoint, kernel):
    """On a GPU grouped_mm for batched_mm: served by `use_kernels`, the experts take no notice of the name."""
    model = load(checkpoint, quantization_config=kernel.fp4_config())
    expected = logits(model)
    model.set_use_kernels(True)
    model.config._experts_implementation = "grouped_mm"
    with on_a_gpu(type(model)), model._optimize_model_for_decode():
        assert model.get_experts_implementation() == {"": "batched_mm"}
        hidden = model.model(prompt()).last_hidden_state
    assert torch.equal(hidden, model.model(prompt()).last_hidden_state) and torch.equal(logits(model), expected)


def test_codes_where_the_kernel_does_not_run(checkpoint, kernel, monkeypatch):
    """Nobody else could take them for what they are."""
    model = load(checkpoint, quantization_config=kernel.fp4_config())
    monkeypatch.setattr(kernel.integration.modules, "_missing_triton", lambda weight: "no Triton")
    with pytest.raises(
        RuntimeError, match="cannot compute DeepseekV3Experts in 4 bits: no Triton. Nor can Transformers"
    ):
        model(prompt())
