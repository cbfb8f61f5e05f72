"""FP8 checkpoints in Transformers, end to end; and examples/quantize_checkpoint.py, which makes them."""

import importlib.util
import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations import finegrained_fp8

from oracle import error
from suite import ROOT
from tiny_models import LOADING_WAYS, NUM_MOE_LAYERS, deepseek_v3_config, experts_of, is_switched_on, prompt

pytestmark = pytest.mark.usefixtures("one_thread", "no_other_kernels")


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("quantize_checkpoint", ROOT / "examples/quantize_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def quantize(example, monkeypatch):
    def quantize(*arguments):
        monkeypatch.setattr("sys.argv", ["quantize_checkpoint.py", *map(str, arguments)])
        example.main()

    return quantize


@pytest.fixture(scope="module")
def bf16_checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("bf16")
    config = deepseek_v3_config()
    config.hidden_size, config.moe_intermediate_size = 256, 128
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    model.save_pretrained(path, max_shard_size="1MB")
    return path


@torch.no_grad()
def logits(model):
    return model(prompt().to(model.device)).logits.float()


def test_format_is_deepseeks(bf16_checkpoint, quantize, tmp_path):
    quantize("--linear", bf16_checkpoint, tmp_path / "fp8")
    config = json.loads((tmp_path / "fp8/config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fp8" and config["weight_block_size"] == [128, 128]
    weight_map = json.loads((tmp_path / "fp8/model.safetensors.index.json").read_text())["weight_map"]
    key = "model.layers.2.mlp.experts.7.down_proj.weight"
    assert f"{key}_scale_inv" in weight_map and "model.layers.0.self_attn.o_proj.weight_scale_inv" in weight_map
    assert not [k for k in weight_map if k.endswith("_scale_inv") and ("gate.weight" in k or "embed" in k)]
    with safe_open(tmp_path / "fp8" / weight_map[key], "pt") as file:
        assert file.get_tensor(key).dtype == torch.float8_e4m3fn
        assert file.get_tensor(f"{key}_scale_inv").shape == (2, 1)


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


def test_conversion_goes_on_where_it_stopped(bf16_checkpoint, example, quantize, monkeypatch, tmp_path):
    quantize(bf16_checkpoint, tmp_path / "whole")
    convert = example.convert
    done = []

    def stops(kernel, source, target, name, *others):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(name)
        convert(kernel, source, target, name, *others)

    monkeypatch.setattr(example, "convert", stops)
    with pytest.raises(SystemExit, match="stopped: the same command goes on"):
        quantize(bf16_checkpoint, tmp_path / "parts")
    assert not (tmp_path / "parts/config.json").exists()
    rest = []
    monkeypatch.setattr(example, "convert", lambda *args: rest.append(args[3]) or convert(*args))
    quantize(bf16_checkpoint, tmp_path / "parts")
    assert sorted(done + rest) == example.shards(bf16_checkpoint)
    files = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in (tmp_path / "parts").iterdir()} == files
    for name in files:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_conversion_ends_with_sizes_and_the_line_that_loads(bf16_checkpoint, example, quantize, capsys, tmp_path):
    """What is said is what lies there, and what was expected before anything was written."""
    quantize(bf16_checkpoint, tmp_path / "fp8")
    summary, line = capsys.readouterr().out.splitlines()
    index = json.loads((tmp_path / "fp8" / example.INDEX).read_text())
    names = example.shards(bf16_checkpoint)
    before, after = map(sum, zip(*example.sizes(bf16_checkpoint, names, example.FORMATS["fp8"], False).values()))
    assert after == index["metadata"]["total_size"] < before
    assert before == json.loads((bf16_checkpoint / example.INDEX).read_text())["metadata"]["total_size"]
    assert summary.startswith(f"{tmp_path / 'fp8'}: {after / 1e9:.2f} GB, and {before / 1e9:.2f} GB before")
    model = eval(line, {"AutoModelForCausalLM": AutoModelForCausalLM})
    assert len(experts_of(model)) == NUM_MOE_LAYERS


def without_experts(source):
    for path in source.glob("*.safetensors"):
        tensors = {key: tensor for key, tensor in load_file(path).items() if ".experts." not in key}
        save_file(tensors, path, metadata={"format": "pt"})


def without_a_file(source):
    sorted(source.glob("*.safetensors"))[1].unlink()


def with_experts_in_int8(source):
    path = max(source.glob("*.safetensors"))
    tensors = load_file(path)
    save_file({key: tensor.to(torch.int8) for key, tensor in tensors.items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "spoil, message",
    [
        (without_experts, "no experts to quantize"),
        (without_a_file, "incomplete, 1 of [0-9]+ files are missing, model-00002"),
        (with_experts_in_int8, "expected bf16, fp16 or fp32, found torch.int8"),
    ],
)
@pytest.mark.parametrize("option", [[], ["--linear"]], ids=["experts", "linear"])
def test_conversion_refuses_before_it_writes(bf16_checkpoint, quantize, tmp_path, spoil, message, option):
    shutil.copytree(bf16_checkpoint, tmp_path / "source")
    spoil(tmp_path / "source")
    with pytest.raises(SystemExit, match=message):
        quantize(*option, tmp_path / "source", tmp_path / "fp8")
    assert not (tmp_path / "fp8").exists()


def test_conversion_wants_room_for_what_is_not_there_yet(bf16_checkpoint, example, quantize, monkeypatch, tmp_path):
    names = example.shards(bf16_checkpoint)
    nbytes = example.sizes(bf16_checkpoint, names, example.FORMATS["fp8"], False)
    others = sum(path.stat().st_size for path in example.other_files(bf16_checkpoint))
    needed = others + sum(after for _, after in nbytes.values())

    def disk(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free))

    disk(needed - 1)
    with pytest.raises(SystemExit, match="GB are needed, .* GB are free: make room"):
        quantize(bf16_checkpoint, tmp_path / "new/fp8")
    assert not (tmp_path / "new").exists()
    disk(needed)
    quantize(bf16_checkpoint, tmp_path / "new/fp8")
    # As if it had been interrupted before its last file.
    (tmp_path / "new/fp8" / names[-1]).unlink()
    state = {"source": str(bf16_checkpoint.resolve()), "format": "fp8", "linear": False}
    (tmp_path / "new/fp8" / example.STATE).write_text(json.dumps(state))
    disk(others + nbytes[names[-1]][1])
    quantize(bf16_checkpoint, tmp_path / "new/fp8")


def test_conversion_refuses(bf16_checkpoint, quantize, tmp_path):
    with pytest.raises(SystemExit, match="no such folder; .* hf download someone/model"):
        quantize("someone/model", tmp_path / "x")
    with pytest.raises(SystemExit, match="no checkpoint"):
        quantize(tmp_path, tmp_path / "x")
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="file: not a folder"):
        quantize(bf16_checkpoint, tmp_path / "file")
    (tmp_path / "file").unlink()
    quantize(bf16_checkpoint, tmp_path / "fp8")
    with pytest.raises(SystemExit, match="fp8: not empty"):
        quantize(bf16_checkpoint, tmp_path / "fp8")
    with pytest.raises(SystemExit, match="quantized already"):
        quantize(tmp_path / "fp8", tmp_path / "x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="mine: not empty"):
        quantize(bf16_checkpoint, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_conversion_names_a_weight_that_is_not_finite(bf16_checkpoint, quantize, tmp_path):
    source = tmp_path / "broken"
    shutil.copytree(bf16_checkpoint, source)
    path = sorted(source.glob("*.safetensors"))[-1]
    tensors = load_file(path)
    key = [key for key in sorted(tensors) if ".experts." in key and key.endswith("_proj.weight")][-1]
    tensors[key][1, 2] = float("inf")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        SystemExit, match=re.escape(f"{path}: {key}: weight: expected finite numbers, got inf at (1, 2)")
    ):
        quantize(source, tmp_path / "fp8")
