"""A LoRA on the experts, rewritten to one module per expert and projection: the same weights, wherever it is loaded."""

import json
import runpy

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from safetensors.torch import load_file

from peft_models import DOWN, GATE_UP, TARGETS, adapted, config
from suite import ROOT
from tiny_models import load, logits

pytestmark = pytest.mark.usefixtures("one_thread", "no_other_kernels")

RANKS = {"experts.gate_up_proj": 2, "experts.down_proj": 1}
OPTIONS = [
    pytest.param({}, id="r-3"),
    pytest.param({"r": 5, "use_rslora": True}, id="rslora"),
    pytest.param({"target_parameters": TARGETS[::-1]}, id="other-order"),
    pytest.param({"r": 4, "rank_pattern": RANKS, "alpha_pattern": {"experts.down_proj": 3}}, id="other-rank-and-alpha"),
    pytest.param({"target_modules": ["q_a_proj", "o_proj"]}, id="beside-linear-layers"),
    pytest.param({"target_modules": r".*\.o_proj", "modules_to_save": ["lm_head"]}, id="regex-and-whole-module"),
    pytest.param(
        {"target_modules": ["q_a_proj", "o_proj"], "use_rslora": True, "rank_pattern": {"o_proj": 2}, "r": 4},
        id="all-of-it",
    ),
]


def convert(model, tmp_path, monkeypatch):
    """The folder that examples/lora_per_expert.py writes."""
    model.save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr("sys.argv", ["lora_per_expert.py", str(tmp_path / "adapter"), str(tmp_path / "out")])
    runpy.run_path(str(ROOT / "examples/lora_per_expert.py"), run_name="__main__")
    return tmp_path / "out"


@pytest.mark.parametrize("options", [*OPTIONS, pytest.param({"target_parameters": [GATE_UP]}, id="gate_up-alone")])
def test_every_module_gets_the_same_weights(checkpoint, tmp_path, monkeypatch, options):
    """With one rank and one scaling for the whole adapter, as servers have it."""
    model = adapted(load(checkpoint), default=config(**options))
    expected = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            expected |= deltas(name, layer)
    folder = convert(model, tmp_path, monkeypatch)
    settings = json.loads((folder / "adapter_config.json").read_text())
    tensors, r = load_file(folder / "adapter_model.safetensors"), settings["r"]
    assert not (settings["use_rslora"] or settings["rank_pattern"] or settings["alpha_pattern"])
    assert {name.split(".lora_")[0] for name in tensors if ".lora_" in name} == set(expected)
    for module, delta in expected.items():
        A, B = (tensors[f"{module}.lora_{factor}.weight"] for factor in "AB")
        assert A.shape[0] == B.shape[1] == r
        torch.testing.assert_close(settings["lora_alpha"] / r * B @ A, delta)
    assert {module.rsplit(".")[-1] for module in expected} == set(settings["target_modules"])


def deltas(name, layer):
    """What PEFT adds to the weights, by the modules of a checkpoint."""
    delta = layer.get_delta_weight("default")
    if not isinstance(layer, ParamWrapper):
        return {name: delta}
    projections = {"gate_up_proj": ["gate_proj", "up_proj"], "down_proj": ["down_proj"]}[layer.parameter_name]
    experts = name.replace(".base_layer", "")
    return {
        f"{experts}.{expert}.{projection}": rows
        for expert in range(8)
        for projection, rows in zip(projections, delta[expert].chunk(len(projections)))
    }


@pytest.mark.parametrize("options", OPTIONS)
def test_peft_loads_it(checkpoint, tmp_path, monkeypatch, options):
    """It has its own way back from modules of experts to fused weights."""
    model = adapted(load(checkpoint), default=config(**options))
    loaded = PeftModel.from_pretrained(load(checkpoint), convert(model, tmp_path, monkeypatch))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert (logits(load(checkpoint)) - logits(model)).abs().max() > 0.1


def test_what_is_not_converted(checkpoint, tmp_path, monkeypatch):
    larger = adapted(load(checkpoint), default=config(r=2, rank_pattern={DOWN: 4}))
    with pytest.raises(SystemExit, match="rank 4 is above 2"):
        convert(larger, tmp_path, monkeypatch)
    monkeypatch.setattr("sys.argv", ["lora_per_expert.py", str(tmp_path / "nothing"), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="nothing/adapter_model.safetensors does not exist"):
        runpy.run_path(str(ROOT / "examples/lora_per_expert.py"), run_name="__main__")
    config_file = tmp_path / "adapter/adapter_config.json"
    settings = json.loads(config_file.read_text())
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps({"model_type": "gpt_oss"}))
    config_file.write_text(json.dumps({**settings, "base_model_name_or_path": str(tmp_path / "base")}))
    monkeypatch.setattr("sys.argv", ["lora_per_expert.py", str(tmp_path / "adapter"), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="checkpoints of gpt_oss do not name their experts"):
        runpy.run_path(str(ROOT / "examples/lora_per_expert.py"), run_name="__main__")
    assert not (tmp_path / "out").exists()
