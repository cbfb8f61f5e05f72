"""examples/quantize_checkpoint.py: what it writes, on what it refuses, and that it goes on where it stopped.

How Transformers loads fp8 is in test_fp8_checkpoints.py, and 4 bits in test_fp4_config.py.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import quantize_checkpoint as example
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moe_models
from moe_models import ALONE, experts_classes, tiny_model
from tiny_models import NUM_MOE_LAYERS, experts_of

pytestmark = pytest.mark.usefixtures("one_thread", "no_other_kernels")

FORMATS = pytest.mark.parametrize("form", ["fp8", "fp4"])


def tensors(path):
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def config(path):
    return json.loads((path / "config.json").read_text())


@pytest.fixture
def several_files(monkeypatch):
    monkeypatch.setattr(example, "FILE_SIZE", "300KB")


# --- 4 bits -----------------------------------------------------------------------------------------------------------

# Their experts are one tensor of another name.
REFUSED = {"AriaExperts", "GraniteMoeExperts", "GraniteMoeHybridExperts", "GraniteMoeSharedExperts"}


@pytest.mark.parametrize("entry", [e for e in experts_classes() if e.name not in ALONE], ids=lambda e: e.name)
def test_fp4_is_what_transformers_makes_and_saves(kernel, quantize, monkeypatch, tmp_path, entry):
    """The same files bit for bit, of every model: one tensor an expert or stacks in either order, gate, biases."""
    whole_groups = {name: 32 for name, size in moe_models.SMALL.items() if size == 24}
    monkeypatch.setattr(moe_models, "SMALL", {**moe_models.SMALL, **whole_groups})
    special = moe_models.SPECIAL.get(entry.model, {})
    if special.get("moe_intermediate_size") == 24:
        monkeypatch.setitem(moe_models.SPECIAL, entry.model, {**special, "moe_intermediate_size": 32})
    model = tiny_model(entry)
    model.save_pretrained(tmp_path / "dense")
    if entry.name in REFUSED:
        with pytest.raises(SystemExit, match="no experts to quantize"):
            quantize("--format", "fp4", tmp_path / "dense", tmp_path / "fp4")
        return
    quantize("--format", "fp4", tmp_path / "dense", tmp_path / "fp4")
    model = type(model).from_pretrained(tmp_path / "dense", dtype="auto", quantization_config=kernel.fp4_config())
    model.save_pretrained(tmp_path / "saved")
    expected, written = tensors(tmp_path / "saved"), tensors(tmp_path / "fp4")
    assert written.keys() == expected.keys() and any(name.endswith("_blocks") for name in written)
    for name, tensor in expected.items():
        torch.testing.assert_close(written[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert config(tmp_path / "fp4")["quantization_config"] == config(tmp_path / "saved")["quantization_config"]


@pytest.mark.usefixtures("several_files")
def test_fp4_experts_of_many_files(bf16_checkpoint, kernel, quantize, tmp_path):
    """A layer's experts lie in several files; what is loaded has the codes of the dense model."""
    quantize("--format", "fp4", bf16_checkpoint, tmp_path / "fp4")
    assert len(list((tmp_path / "fp4").glob("*.safetensors"))) > 2

    def load(path):
        return AutoModelForCausalLM.from_pretrained(path, dtype="auto", quantization_config=kernel.fp4_config())

    expected = load(bf16_checkpoint).state_dict()
    weight_map = json.loads((bf16_checkpoint / example.INDEX).read_text())["weight_map"]
    assert len({file for key, file in weight_map.items() if ".layers.1.mlp.experts." in key}) > 1
    state = load(tmp_path / "fp4").state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
    assert state["model.layers.1.mlp.experts.gate_up_proj_scale_inv"].shape == (8, 256, 8)


def test_experts_stay_on_disk_until_they_are_quantized(bf16_checkpoint, kernel, quantize, monkeypatch, tmp_path):
    quantize_fp4, seen = kernel.quantize_fp4, []

    def is_mapped(weight):
        for line in Path("/proc/self/maps").read_text().splitlines():
            first, last = (int(address, 16) for address in line.split()[0].split("-"))
            if first <= weight.data_ptr() < last:
                return line.endswith(".safetensors")

    def spy(weight):
        seen.append(is_mapped(weight) and tuple(weight.shape))
        return quantize_fp4(weight)

    monkeypatch.setattr(kernel, "quantize_fp4", spy)
    quantize("--format", "fp4", bf16_checkpoint, tmp_path / "fp4")
    assert seen == NUM_MOE_LAYERS * (16 * [(128, 256)] + 8 * [(256, 128)])


def with_odd_columns(tensors):
    key = "model.layers.2.mlp.experts.5.down_proj.weight"
    tensors[key] = tensors[key][:, 1:].contiguous()


def without_an_expert(tensors):
    for projection in ("gate", "up", "down"):
        del tensors[f"model.layers.1.mlp.experts.3.{projection}_proj.weight"]


def without_a_projection(tensors):
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]


def with_a_small_expert(tensors):
    key = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[key] = tensors[key][:64].contiguous()


def with_stacks_that_do_not_fit(tensors):
    for key in [key for key in tensors if ".layers.1.mlp.experts." in key]:
        del tensors[key]
    tensors["model.layers.1.mlp.experts.gate_up_proj"] = torch.zeros(8, 256, 256)
    tensors["model.layers.1.mlp.experts.down_proj"] = torch.zeros(8, 256, 256)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (with_odd_columns, "model.layers.2.mlp.experts.5.down_proj.weight: 127 columns make no groups of 32"),
        (without_an_expert, "model.layers.1.mlp.experts: 3.down_proj.weight is missing"),
        (without_a_projection, "model.layers.1.mlp.experts: 3.up_proj.weight is missing"),
        (with_a_small_expert, "model.layers.1.mlp.experts: its experts are not of one size"),
        (with_stacks_that_do_not_fit, r"experts: \(8, 256, 256\) and \(8, 256, 256\) are not weights of experts"),
    ],
)
def test_fp4_refuses_before_it_writes(bf16_checkpoint, quantize, tmp_path, spoil, message):
    weights = tensors(bf16_checkpoint)
    spoil(weights)
    (tmp_path / "source").mkdir()
    save_file(weights, tmp_path / "source/model.safetensors", metadata={"format": "pt"})
    shutil.copy(bf16_checkpoint / "config.json", tmp_path / "source")
    with pytest.raises(SystemExit, match=message):
        quantize("--format", "fp4", tmp_path / "source", tmp_path / "fp4")
    assert not (tmp_path / "fp4").exists()


def test_fp4_refuses_linear(bf16_checkpoint, quantize, tmp_path):
    with pytest.raises(SystemExit, match="--linear: in 4 bits there are experts alone"):
        quantize("--format", "fp4", "--linear", bf16_checkpoint, tmp_path / "fp4")
    assert not (tmp_path / "fp4").exists()


# --- either format ----------------------------------------------------------------------------------------------------


@FORMATS
@pytest.mark.usefixtures("several_files")
def test_conversion_goes_on_where_it_stopped(bf16_checkpoint, quantize, monkeypatch, tmp_path, form):
    quantize("--format", form, bf16_checkpoint, tmp_path / "whole")
    write, done, rest = example.write, [], []

    def stops(kernel, path, *others):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(path.name)
        write(kernel, path, *others)

    monkeypatch.setattr(example, "write", stops)
    with pytest.raises(SystemExit, match="stopped: the same command goes on"):
        quantize("--format", form, bf16_checkpoint, tmp_path / "parts")
    assert not (tmp_path / "parts/config.json").exists()
    with pytest.raises(SystemExit, match="another conversion was interrupted there"):
        quantize("--format", {"fp4": "fp8", "fp8": "fp4"}[form], bf16_checkpoint, tmp_path / "parts")
    monkeypatch.setattr(example, "write", lambda *args: rest.append(args[1].name) or write(*args))
    quantize("--format", form, bf16_checkpoint, tmp_path / "parts")
    files = {path.name for path in (tmp_path / "whole").iterdir()}
    assert len(rest) > 0 and set(done + rest) == {name for name in files if name.endswith(".safetensors")}
    assert len(done + rest) == len(set(done + rest))
    assert {path.name for path in (tmp_path / "parts").iterdir()} == files
    for name in files:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@FORMATS
@pytest.mark.usefixtures("several_files")
def test_conversion_ends_with_sizes_and_the_line_that_loads(
    bf16_checkpoint, registered, quantize, capsys, tmp_path, form
):
    """What is said is what lies there, and what was expected before anything was written."""
    quantize("--format", form, bf16_checkpoint, tmp_path / "out")
    summary, line = capsys.readouterr().out.splitlines()
    index = json.loads((tmp_path / "out" / example.INDEX).read_text())
    parts = example.plan(bf16_checkpoint, example.FORMATS[form], False)
    before, after = example.source_bytes(parts), sum(part.nbytes() for part in parts)
    assert after == index["metadata"]["total_size"] < before
    assert before == json.loads((bf16_checkpoint / example.INDEX).read_text())["metadata"]["total_size"]
    assert summary.startswith(f"{tmp_path / 'out'}: {after / 1e9:.2f} GB, and {before / 1e9:.2f} GB before")
    model = eval(line, {"AutoModelForCausalLM": AutoModelForCausalLM, "moe": registered})
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
@pytest.mark.parametrize("option", [[], ["--linear"], ["--format", "fp4"]], ids=["experts", "linear", "fp4"])
def test_conversion_refuses_before_it_writes(bf16_checkpoint, quantize, tmp_path, spoil, message, option):
    shutil.copytree(bf16_checkpoint, tmp_path / "source")
    spoil(tmp_path / "source")
    with pytest.raises(SystemExit, match=message):
        quantize(*option, tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@FORMATS
@pytest.mark.usefixtures("several_files")
def test_conversion_wants_room_for_what_is_not_there_yet(bf16_checkpoint, quantize, monkeypatch, tmp_path, form):
    by_file = example.files(example.plan(bf16_checkpoint, example.FORMATS[form], False))
    nbytes = {name: sum(part.nbytes() for part in parts) for name, parts in by_file.items()}
    others = sum(path.stat().st_size for path in example.other_files(bf16_checkpoint))
    needed = others + sum(nbytes.values())

    def disk(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free))

    disk(needed - 1)
    with pytest.raises(SystemExit, match="GB are needed, .* GB are free: make room"):
        quantize("--format", form, bf16_checkpoint, tmp_path / "new/out")
    assert not (tmp_path / "new").exists()
    disk(needed)
    quantize("--format", form, bf16_checkpoint, tmp_path / "new/out")
    # As if it had been interrupted before its last file.
    last = max(nbytes)
    (tmp_path / "new/out" / last).unlink()
    state = {"source": str(bf16_checkpoint.resolve()), "format": form, "linear": False}
    (tmp_path / "new/out" / example.STATE).write_text(json.dumps(state))
    disk(others + nbytes[last])
    quantize("--format", form, bf16_checkpoint, tmp_path / "new/out")


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


@FORMATS
def test_conversion_names_a_weight_that_is_not_finite(bf16_checkpoint, quantize, tmp_path, form):
    source = tmp_path / "broken"
    shutil.copytree(bf16_checkpoint, source)
    path = sorted(source.glob("*.safetensors"))[-1]
    tensors = load_file(path)
    key = [key for key in sorted(tensors) if ".experts." in key and key.endswith("_proj.weight")][-1]
    tensors[key][1, 2] = float("inf")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=re.escape(f"{key}: weight: expected finite numbers, got inf at (1, 2)")):
        quantize("--format", form, source, tmp_path / "out")
