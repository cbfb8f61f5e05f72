"""The benchmarks run, refuse to time a wrong model, and leave the Hub's own runner what it expects."""

import argparse
import importlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace
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
    monkeypatch.setenv("COMMIT", "abc1234")
    run("generate.py", "--modes", "eager", "--batches", 1, 2, *arguments, monkeypatch=monkeypatch)
    assert calls
    monkeypatch.setenv("COMMIT", "def5678")
    run("generate.py", "--modes", "static", "--batches", 1, *arguments, monkeypatch=monkeypatch)
    result = json.loads(out.read_text())
    assert result["model"] == "qwen3" and result["commit"] == "def5678"
    cases = result["cases"]
    assert [(case["phase"], case["mode"], case["batch"]) for case in cases] == [
        ("prefill", "eager", 1),
        ("decode", "eager", 1),
        ("decode", "eager", 2),
        ("decode", "static", 1),
    ]
    assert [case.get("commit") for case in cases] == 3 * ["abc1234"] + [None]
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
    assert len({case["way"] for case in cases}) == 4 and {case["phase"] for case in cases} == {"prefill", "decode"}
    assert all(case[f"{who}_{what}"] > 0 for case in cases for who in ("ours", "stock") for what in ("ms", "host_us"))
    assert result.stdout.count("decode") == 4


@pytest.mark.parametrize("is_newer", [False, True], ids=["older", "newer"])
def test_table_of_several_gpus(module_of, is_newer):
    case = {"way": "tensors", "tokens": 64, "ours_ms": 20.0, "stock_ms": 30.0}
    if is_newer:
        case |= {"phase": "decode", "speed_up": 1.46, "ours_host_us": 60.0, "stock_host_us": 510.0}
    head, _, row = module_of("tables").parallel([{"gpus": 4, "cases": [case]}]).splitlines()
    assert head.endswith("| speed-up | host, a layer | Transformers |" if is_newer else "| speed-up |")
    wanted = "| 4 | tensors | 64 decoded | 20.0 ms | 30.0 ms | 1.46x | 60 us | 510 us |"
    assert row == (wanted if is_newer else "| 4 | tensors | 64 | 20.0 ms | 30.0 ms | 1.50x |")


# The layer: all but its times, for which there has to be a GPU


@pytest.fixture
def module_of(monkeypatch):
    """name -> that file of benchmarks/, as a script imports it."""
    monkeypatch.setattr("sys.path", [str(BENCHMARKS), *sys.path])
    for path in BENCHMARKS.glob("*.py"):
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    return importlib.import_module


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def nvidia_smi(monkeypatch, tmp_path):
    """answer -> a program of this name that gives it again and again, to whoever asks about the GPU of torch's."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1234"))
    monkeypatch.setitem(sys.modules, "pynvml", None)

    def program(answer):
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/asked\nwhile echo '{answer}'; do sleep 0.01; done\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return tmp_path / "asked"

    return program


def test_meter(module_of, nvidia_smi):
    asked = nvidia_smi("1590, 640.25")
    meter = module_of("meter").Meter()
    start = time.perf_counter()
    assert meter.start()
    wait_for(lambda: meter.between(start, time.perf_counter()))
    assert meter.between(start, time.perf_counter()) == {"sm_mhz": 1590.0, "watts": 640.2}
    assert meter.between(start - 2, start - 1) == {}
    assert "--id=GPU-1234" in asked.read_text() and "clocks.sm,power.draw" in asked.read_text()


def test_meter_by_nvml(module_of, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1234"))
    names = ("nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetClockInfo")
    values = (None, "gpu", 700125, 1755)
    nvml = {name: lambda *_, value=value: value for name, value in zip(names, values)}
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(NVML_CLOCK_SM=1, **nvml))
    meter = module_of("meter").Meter()
    start = time.perf_counter()
    assert meter.start()
    assert meter.between(start, time.perf_counter()) == {"sm_mhz": 1755, "watts": 700.1}


def test_no_meter(module_of, nvidia_smi, monkeypatch):
    meter = module_of("meter").Meter()
    monkeypatch.setenv("PATH", "")
    assert not meter.start() and meter.between(0, time.perf_counter()) == {}


@pytest.mark.parametrize("ms, warm_up, is_read", [(0.1, 0.2, False), (2, 1.0, True)], ids=["short", "long"])
def test_long_calls_are_warmed_up_for_a_second(module_of, monkeypatch, ms, warm_up, is_read):
    common = module_of("common")

    class Timer:
        def __init__(self, statement, globals):
            self.run = globals["run"]

        def timeit(self, number):
            batches.append(number * ms / 1e3)
            return SimpleNamespace(mean=ms / 1e3)

    batches = []
    monkeypatch.setattr(common, "Timer", Timer)
    monkeypatch.setattr(common.METER, "between", lambda start, end: {"sm_mhz": 1.0, "watts": 2.0})
    us, read = common.sustained([print])
    assert us == pytest.approx(1e3 * ms) and batches[2] == pytest.approx(warm_up)
    assert read == ({"sm_mhz": 1.0, "watts": 2.0} if is_read else {})
    # Of a call that makes four, each counts.
    assert common.sustained([print], inside=4) == (pytest.approx(1e3 * ms / 4), {})


@pytest.mark.usefixtures("no_gpu")
def test_cublas_at_the_shapes_of_the_layer(module_of):
    layer = module_of("layer")
    weights = module_of("benchmark").expert_weights(64, 32, 4, "cpu")
    found = layer.time_cublas(weights, tokens=9, top_k=2)
    assert found["cublas_rows"] == 4 and found["cublas_eager_us"] > 0
    assert layer.time_cublas(weights, tokens=1, top_k=1) == {}


@pytest.mark.usefixtures("no_gpu")
def test_backends_that_cannot_be_loaded(module_of, capsys):
    layer = module_of("layer")
    assert layer.backend_names("sonicmoe,deepgemm") == layer.BACKENDS
    with pytest.raises(argparse.ArgumentTypeError, match="expected some of sonicmoe,deepgemm, got sonic"):
        layer.backend_names("sonic")
    reasons = layer.load_backends(layer.BACKENDS)
    assert all(reasons.values())
    assert capsys.readouterr().out.count(" could not be loaded: ") == 2
    assert layer.load_backends(["grouped_mm"]) == {"grouped_mm": None}


def test_a_backend_that_fails_is_reported(module_of, monkeypatch):
    layer, common = module_of("layer"), module_of("common")
    monkeypatch.setattr(common, "sustained", lambda calls: (7.0, {}))
    module, x = lambda x: x, torch.ones(2, 2)
    module.config = SimpleNamespace()
    found = layer.time_backend(module, "sonicmoe", [(x,)], x)  # no GPU for a graph
    assert module.config._experts_implementation == "sonicmoe"
    assert (found["relative_error"], found["eager_us"]) == (0, 7.0) and "failed" in found
    assert set(layer.time_backend(module, "sonicmoe", [(x,)], 2 * x)) == {"relative_error"}


CASE = {"workload": "dsv3", "tokens": 64, "routing": "uniform", "roof_us": 10.0, "ours_graph_us": 12.5}
CASE |= {
    "ours_eager_us": 20.0,
    "ours_as_sm_80_graph_us": 20.0,
    "grouped_mm_graph_us": 25.0,
    "grouped_mm_eager_us": 30.0,
}
MORE = {"cublas_graph_us": 11.0, "ours_graph_sm_mhz": 1590.0, "ours_graph_watts": 699.6}
MORE |= {"against": {"sonicmoe": {"eager_us": 40.0, "graph_us": 15.0}, "deepgemm": {"failed": "no nvcc"}}}


@pytest.mark.parametrize("more", [{}, MORE], ids=["older", "newer"])
def test_table_of_the_layer(module_of, more):
    tables = module_of("tables")
    head, _, row = tables.layer({"cases": [CASE | more]}).splitlines()
    titles = " | cuBLAS at equal rows, of the limit | clock, power | `sonicmoe` |"
    cells = " | 0.91 | 1590 MHz, 700 W | 15 us |"
    assert head.endswith("plain Triton, of the limit" + (titles if more else " |"))
    assert row == "| DeepSeek-V3 | 64 | 12 us | 0.80 | 25 us | 0.40 | 2.0x | 1.5x | 0.50" + (cells if more else " |")


def test_row_of_the_layer(module_of):
    line = module_of("layer").row(CASE | MORE | {"ours_host_us": 9.0})
    assert line.split()[7:10] == ["0.80", "0.40", "2.00x"]
    assert line.endswith("11.0   1590    700  sonicmoe 15.0  deepgemm: no nvcc")


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
