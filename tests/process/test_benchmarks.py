"""The benchmarks run, refuse to time a wrong model, and leave the Hub's own runner what it expects."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import torch
from kernels.benchmark import Benchmark

from suite import ROOT

BENCHMARKS = ROOT / "benchmarks"


def run(name, *arguments, monkeypatch):
    monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
    monkeypatch.setattr("sys.path", [str(BENCHMARKS), *sys.path])  # as for a script
    runpy.run_path(str(BENCHMARKS / name), run_name="__main__")


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("benchmark*.py")), ids=lambda path: path.name)
def test_hub_benchmarks_stand_alone(path, monkeypatch, tmp_path):
    """`kernels benchmark` runs every file of this name, without the others, and fails at one without a Benchmark."""
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != str(BENCHMARKS)])
    for sibling in BENCHMARKS.glob("*.py"):
        monkeypatch.delitem(sys.modules, sibling.stem, raising=False)
    found = runpy.run_path(shutil.copy(path, tmp_path)).values()
    assert any(isinstance(value, type) and Benchmark in value.__bases__ for value in found)


@pytest.fixture
def no_gpu(monkeypatch):
    """The small model of the CPU, on any machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module in ("demo", "benchmark", "common", "generate"):
        monkeypatch.delitem(sys.modules, module, raising=False)


@pytest.mark.usefixtures("no_gpu")
def test_generate(kernel, monkeypatch, tmp_path, capsys):
    calls = []
    moe_experts = kernel.functional.moe_experts

    def recorded(*args, **options):
        calls.append(args)
        return moe_experts(*args, **options)

    monkeypatch.setattr(kernel.functional, "moe_experts", recorded)
    out = tmp_path / "generate.json"
    # In two runs: the second adds to the first. Of the smaller model.
    arguments = ("--model", "qwen3", "--out", out)
    run("generate.py", "--modes", "eager", "--batches", 1, 2, *arguments, monkeypatch=monkeypatch)
    assert calls
    run("generate.py", "--modes", "static", "--batches", 1, *arguments, monkeypatch=monkeypatch)
    result = json.loads(out.read_text())
    assert result["model"] == "qwen3"
    cases = result["cases"]
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
    monkeypatch.setattr(kernel.functional, "moe_experts", lambda hidden_states, *_, **__: hidden_states)
    out = tmp_path / "generate.json"
    with pytest.raises(SystemExit, match="logits differ by .*: nothing is timed"):
        run("generate.py", "--batches", 1, "--out", out, monkeypatch=monkeypatch)
    assert not out.exists()


@pytest.mark.usefixtures("no_gpu")
def test_generate_codes(monkeypatch, tmp_path):
    out = tmp_path / "codes.json"
    run("generate_codes.py", "--modes", "eager", "--batches", 2, "--out", out, monkeypatch=monkeypatch)
    result = json.loads(out.read_text())
    (case,) = result["cases"]
    assert all(case[f"{name}_ms"] > 0 for name in ("bf16", "fp8", "fp4"))
    assert 0 < case["fp8_relative_difference"] < case["fp4_relative_difference"]
    assert result["bf16_bytes"] > result["fp8_bytes"] > result["fp4_bytes"]


@pytest.mark.long
@pytest.mark.usefixtures("no_gpu")
def test_continuous(monkeypatch, tmp_path):
    out = tmp_path / "continuous.json"
    run("continuous.py", "--out", out, monkeypatch=monkeypatch)
    result = json.loads(out.read_text())
    assert result["stock_s"] > 0 and result["use_kernels_s"] > 0 and result["same_first_tokens"] == 1


@pytest.mark.usefixtures("no_gpu")
def test_memory(monkeypatch, tmp_path):
    """All but the peaks, which there are none of on a CPU: the steps are taken, of the adapters that they say."""
    out = tmp_path / "memory.json"
    run("memory.py", "--out", out, monkeypatch=monkeypatch)
    result = json.loads(out.read_text())
    sizes = 256 + 2 * 64, 64 + 256  # A and B of gate_up_proj and of down_proj, for each rank, expert and layer
    experts = result["layers"] * 16 * result["rank"] * sum(sizes)
    cases = [(case["adapters"], case["loss"], case["trained"] == experts) for case in result["cases"]]
    losses = ("at once", "in parts")
    assert cases == [(name, loss, name == "experts") for name in ("experts", "attention") for loss in losses]


@pytest.mark.long
def test_parallel(tmp_path):
    """On two CPU processes: every way that Transformers shares a model."""
    out = tmp_path / "parallel.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(BENCHMARKS / "parallel.py"), "--out", str(out)]
    result = subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    cases = json.loads(out.read_text())["cases"]
    assert len({case["way"] for case in cases}) == 4
    assert all(case["ours_ms"] > 0 and case["stock_ms"] > 0 for case in cases)


# Figures

GENERATE = {
    "gpu": "NVIDIA H200",
    "parameters": 16e9,
    "cases": [
        {"phase": "decode", "mode": "static", "batch": 64, "tokens": 128}
        | {"stock_ms": 90.0, "grouped_mm_ms": 20.0, "use_kernels_ms": 16.0},
        {"phase": "prefill", "mode": "eager", "batch": 1, "tokens": 4096, "stock_ms": 90.0, "use_kernels_ms": 64.0},
    ],
}


def texts(svg):
    return [element.text.strip() for element in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("result", sorted(BENCHMARKS.glob("results/*.json")), ids=lambda path: path.name)
def test_figures_are_those_of_the_results(monkeypatch, tmp_path, result):
    """A committed figure, drawn again from the committed numbers, is the same to the byte."""
    shutil.copy(result, tmp_path)
    run("plot.py", tmp_path / result.name, monkeypatch=monkeypatch)
    assert (tmp_path / f"{result.stem}.svg").read_bytes() == result.with_suffix(".svg").read_bytes()


def test_figure_of_the_layer(monkeypatch, tmp_path):
    case = {"routing": "uniform", "roof_us": 10.0, "ours_graph_us": 12.0, "ours_eager_us": 40.0, "eager_eager_us": 90.0}
    cases = [{"workload": name, "tokens": tokens, **case} for name in ("dsv3", "moonlight") for tokens in (1, 64)]
    path = tmp_path / "NVIDIA-H200.json"
    path.write_text(json.dumps({"gpu": "NVIDIA H200", "cases": cases}))
    run("plot.py", path, monkeypatch=monkeypatch)
    assert {"DeepSeek-V3", "Moonlight-16B-A3B", "limit", "this kernel"} <= set(texts(path.with_suffix(".svg")))


def test_figure_of_the_model(monkeypatch, tmp_path):
    path = tmp_path / "NVIDIA-H200-generate.json"
    path.write_text(json.dumps(GENERATE))
    drawn = []
    for _ in range(2):
        run("plot.py", path, monkeypatch=monkeypatch)
        drawn.append(path.with_suffix(".svg").read_bytes())
    assert drawn[0] == drawn[1]
    # Against the faster of the two stock implementations.
    assert {"1.41x", "64,000/s", "1.25x", "4,000/s", "decode, batch 64"} <= set(texts(path.with_suffix(".svg")))
