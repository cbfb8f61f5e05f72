"""The benchmarks run, refuse to time a wrong model, and leave the Hub's own runner what it expects."""

import ast
import json
import runpy
import sys

import pytest
import torch

from conftest import ROOT

BENCHMARKS = ROOT / "benchmarks"


def run(name, *arguments, monkeypatch):
    monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
    monkeypatch.setattr("sys.path", list(sys.path))
    runpy.run_path(str(BENCHMARKS / name), run_name="__main__")


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("benchmark*.py")), ids=lambda path: path.name)
def test_hub_benchmarks_have_a_class(path):
    """`kernels benchmark` runs every file of this name and fails at one without a Benchmark."""
    classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    assert any(getattr(base, "id", None) == "Benchmark" for node in classes for base in node.bases)


@pytest.fixture
def no_gpu(monkeypatch):
    """The small model of the CPU, on any machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module in ("demo", "benchmark_moe"):
        monkeypatch.delitem(sys.modules, module, raising=False)


@pytest.mark.usefixtures("no_gpu")
def test_generate(kernel, monkeypatch, tmp_path, capsys):
    calls = []
    moe_experts = kernel.functional.moe_experts
    monkeypatch.setattr(kernel.functional, "moe_experts", lambda *args: calls.append(args) or moe_experts(*args))
    out = tmp_path / "generate.json"
    # In two runs: the second adds to the first.
    run("generate.py", "--modes", "eager", "--batches", 1, 2, "--out", out, monkeypatch=monkeypatch)
    assert calls
    run("generate.py", "--modes", "static", "--batches", 1, "--out", out, monkeypatch=monkeypatch)
    cases = json.loads(out.read_text())["cases"]
    assert [(case["phase"], case["mode"], case["batch"]) for case in cases] == [
        ("prefill", "eager", 1),
        ("decode", "eager", 1),
        ("decode", "eager", 2),
        ("decode", "static", 1),
    ]
    assert all(case["use_kernels_ms"] > 0 and case["stock_ms"] > 0 for case in cases)
    assert "speed-up" in capsys.readouterr().out


@pytest.mark.usefixtures("no_gpu")
def test_generate_times_nothing_that_is_wrong(kernel, monkeypatch, tmp_path):
    monkeypatch.setattr(kernel.functional, "moe_experts", lambda hidden_states, *_: hidden_states)
    out = tmp_path / "generate.json"
    with pytest.raises(SystemExit, match="logits differ by .*: nothing is timed"):
        run("generate.py", "--batches", 1, "--out", out, monkeypatch=monkeypatch)
    assert not out.exists()
