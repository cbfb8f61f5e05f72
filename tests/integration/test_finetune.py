"""examples/finetune_lora.py: Trainer and PEFT train on this kernel as they do on the stock model."""

import importlib.util
import re
import sys

import pytest
import torch

from suite import ROOT

STEPS = 20
NUM_MOE_LAYERS = 3

pytestmark = pytest.mark.usefixtures("one_thread", "no_other_kernels")


@pytest.fixture
def example(monkeypatch, tmp_path):
    """The example as a module, on the CPU and in fp32."""
    spec = importlib.util.spec_from_file_location("finetune_lora", ROOT / "examples/finetune_lora.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setenv("USE_HUB_KERNELS", "NO")  # set by the module, and taken back with this
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ON_GPU", False)
    monkeypatch.setattr(module, "CURVE", tmp_path / "curve.png")
    monkeypatch.setattr(module, "CACHE", tmp_path)
    return module


@pytest.fixture
def calls(kernel, record):
    """The arguments of every experts module that is computed here: what proves that a model runs on this kernel."""
    return record(kernel.integration.modules, "_compute")


@pytest.mark.parametrize(
    "experts, full", [("dense", False), ("dense", True), ("fp4", False)], ids=["lora", "full", "fp4"]
)
def test_loss_follows_stock_step_by_step(kernel, example, calls, experts, full):
    checkpointing = experts == "fp4"
    stock_way, way = example.WAYS[experts]
    stock, _ = example.train(example.build(kernel, stock_way, full), full, checkpointing, STEPS, logging_steps=1)
    assert not calls
    kernel.register()
    ours, _ = example.train(example.build(kernel, way, full), full, checkpointing, STEPS, logging_steps=1)
    assert len(calls) == (2 if checkpointing else 1) * STEPS * NUM_MOE_LAYERS
    assert {call[0].down.weight.dtype for call in calls} == {torch.uint8 if experts == "fp4" else torch.float32}
    assert list(ours) == list(stock) == list(range(1, STEPS + 1))
    assert ours == pytest.approx(stock, rel=0, abs=1e-4)
    assert ours[STEPS] < ours[1] - 1


def test_adapters_under_gradient_checkpointing(kernel, example):
    """PEFT's wrapper comes and goes around each forward, the recomputed one too."""
    kernel.register()
    model = example.build(kernel, "use_kernels", full=False).train()
    batch = {name: tensor[None] for name, tensor in example.dataset(32)[0].items()}

    def gradients():
        model.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}

    expected = gradients()
    model.gradient_checkpointing_enable()
    got = gradients()
    assert any(grad.any() for grad in got.values())
    assert all(torch.equal(got[name], grad) for name, grad in expected.items())


def test_both_curves_are_drawn(example, monkeypatch):
    figures = []

    class Figure(example.Figure):
        def savefig(self, *args, **options):
            figures.append(self)

    monkeypatch.setattr(example, "Figure", Figure)
    example.plot("title", {"stock": {1: 3.0, 2: 2.0}, "ours": {1: 3.0, 2: 1.0}})
    (axes,) = figures[0].axes
    assert axes.get_title() == "title"
    assert {line.get_label(): list(line.get_ydata()) for line in axes.lines} == {"stock": [3, 2], "ours": [3, 1]}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["stock", "ours"]


@pytest.mark.parametrize("experts", ["dense", "fp4"])
def test_main(example, calls, monkeypatch, capsys, experts):
    train = example.train
    monkeypatch.setattr(
        example, "train", lambda model, full, checkpointing, *_, **__: train(model, full, checkpointing, 4, 2)
    )
    monkeypatch.setattr(sys, "argv", ["finetune_lora.py", "--experts", experts])
    example.main()
    output = capsys.readouterr().out
    # Of the second model alone; and the loss before and after it was saved.
    assert len(calls) == (4 * (2 if experts == "fp4" else 1) + 2) * NUM_MOE_LAYERS
    for name in example.WAYS[experts]:
        assert re.search(
            rf"^{name} +[0-9]+ s; loss [0-9.]+ over the first ten steps, [0-9.]+ over the last", output, re.M
        )
    assert float(re.search("MB; loaded again, the loss changes by (.*)", output)[1]) == 0
    assert float(re.search("curves lie within ([^ ]+) of each other", output)[1]) < 1e-4
    assert example.CURVE.read_bytes().startswith(b"\x89PNG")


def test_reloaded_adapters_matter(kernel, example):
    """To the loss by which they are told from others."""
    model = example.build(kernel, "fp4", full=False)
    before = example.loss(model)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.fill_(0.1)
    assert abs(example.loss(model) - before) > 0.1
    assert example.save_and_reload(kernel, "fp4", model).endswith("the loss changes by 0.0e+00")


def test_codes_are_not_trained(example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["finetune_lora.py", "--full", "--experts", "fp4"])
    with pytest.raises(SystemExit):
        example.main()
    assert "--full: experts in 4 bits are frozen" in capsys.readouterr().err
