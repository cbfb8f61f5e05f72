"""examples/generate.py, every way in, and examples/demo.py; the others have files of their own."""

import importlib
import re
import runpy

import one_line_errors
import pytest
import tokenizers
import torch
import transformers

from suite import ROOT
from tiny_models import NUM_MOE_LAYERS, deepseek_v3_config

pytestmark = pytest.mark.usefixtures("one_thread", "no_other_kernels")


@pytest.fixture(scope="module")
def checkpoint_with_tokenizer(checkpoint):
    words = tokenizers.models.WordLevel({"[UNK]": 0, "layers": 1}, unk_token="[UNK]")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words)).save_pretrained(checkpoint)
    return checkpoint


def run_example(name, *arguments, monkeypatch):
    monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


@pytest.mark.usefixtures("cpu_in_kernel_config", "kernel_config")
@pytest.mark.parametrize("way", ["use_kernels", "experts_implementation", "kernel_config"])
def test_generate_example(checkpoint_with_tokenizer, calls, monkeypatch, way):
    monkeypatch.setattr(one_line_errors, "need_gpu", lambda: None)
    run_example("generate.py", checkpoint_with_tokenizer, way, monkeypatch=monkeypatch)
    assert len(calls) == 32 * NUM_MOE_LAYERS


SPREAD = r"[0-9.]+ \([0-9.]+ to [0-9.]+\)"


def test_demo(checkpoint, calls, monkeypatch, capsys):
    run_example("demo.py", "--model", checkpoint, monkeypatch=monkeypatch)
    output = capsys.readouterr().out
    assert "replaced  2 layers: model.layers.1.mlp.experts model.layers.2.mlp.experts\n" in output
    assert float(re.search("relative difference ([^;]+);", output)[1]) < 1e-5
    assert calls
    assert all(re.search(rf"^{phase}( +{SPREAD}){{3}}$", output, re.M) for phase in ("prefill", "decode"))
    verdict = "verdict   With use_kernels=True the logits are the same up to rounding, "
    assert re.search(rf"^{verdict}prefill is .* fast.*, decode is .* fast", output, re.M)


def test_demo_says_that_logits_differ(kernel, checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(kernel.functional, "moe_experts", lambda hidden_states, *_, **__: 1.1 * hidden_states)
    with pytest.raises(SystemExit, match="verdict .* the logits are not stock's"):
        run_example("demo.py", "--model", checkpoint, monkeypatch=monkeypatch)


def test_demo_without_experts(tmp_path, monkeypatch, capsys):
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="Nothing to compare, no layer .*: it has no experts"):
        run_example("demo.py", "--model", tmp_path, monkeypatch=monkeypatch)
    assert not re.search("prefill|decode|speed", capsys.readouterr().out)


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.setenv("USE_HUB_KERNELS", "NO")  # set by the module, and taken back with this
    return importlib.import_module("demo")


def test_small_checkpoint_is_written_once(demo, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "small_config", deepseek_v3_config)
    path = demo.small_checkpoint(tmp_path)
    written = path.stat().st_mtime_ns
    assert demo.small_checkpoint(tmp_path) == path and path.stat().st_mtime_ns == written
    (tmp_path / "demo-model-0.part").mkdir()  # of an interrupted run
    config = deepseek_v3_config()
    config.vocab_size = 64
    monkeypatch.setattr(demo, "small_config", lambda: config)
    other = demo.small_checkpoint(tmp_path)
    assert list(tmp_path.iterdir()) == [other] != [path]


def test_verdict_on_speed(demo, monkeypatch, capsys):
    stock = {"prefill": [10.0, 12.0, 11.0], "decode": [10.0, 10.0, 10.0]}
    ours = {"prefill": [20.0, 30.0, 22.0], "decode": [9.0, 11.0, 12.0]}
    monkeypatch.setattr(demo, "speeds", lambda models: {"stock": stock, "use_kernels": ours})
    assert demo.compare_speed({}) == "prefill is 2.00 times as fast, decode is as fast (within the spread)"
    assert "2.00 (2.00 to 2.50)" in capsys.readouterr().out


def test_demo_in_fp8(demo, kernel, device, monkeypatch, capsys):
    monkeypatch.setattr(demo, "DEVICE", device)
    monkeypatch.setattr(demo, "LENGTH", 8)
    experts = torch.nn.Module()
    for name, shape in (("gate_up_proj", (8, 256, 256)), ("down_proj", (8, 256, 128))):
        weight = torch.randn(shape, device=device, dtype=torch.bfloat16)
        setattr(experts, name, torch.nn.Parameter(weight))
    demo.compare_fp8(kernel, experts)
    output = capsys.readouterr().out
    assert all(0 < float(error) < 0.1 for error in re.findall("differ by (.*)", output))
    assert len(re.findall(r"us in bf16, .* us in fp8 \(.*x\)", output)) == 2
