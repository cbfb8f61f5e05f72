"""scripts/tune.py, with a timer of the test's."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from triton.backends.compiler import GPUTarget

from suite import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import tune  # noqa: E402
import tune_runs  # noqa: E402

BF16, SM90, GPU = torch.bfloat16, (9, 0), "NVIDIA Test/GPU"
LAYERS = [tune.Layer(E, H, I, top_k) for H, I, E, top_k, _ in tune.WORKLOADS.values()]


@pytest.mark.parametrize("capability", [(9, 0), (8, 0)])
@pytest.mark.parametrize("layer", LAYERS, ids=list(tune.WORKLOADS))
def test_candidates(layer, capability):
    counts = tune.ladder(layer, BF16)
    assert counts[-1] * layer.top_k > tune.MOST_ROWS / 2
    for tokens in counts:
        found = tune.candidates(tokens * layer.top_k / layer.experts, BF16, capability)
        assert 10 < len(found) == len(set(found)) < 300
        for tile in {config[:2] for _, config in found}:
            assert {kernel for kernel, config in found if config[:2] == tile} == set(tune.KERNELS)
        assert capability == (9, 0) or not any(config.USE_TMA for kernel, config in found if kernel != "route")


class FakeGpu:
    """Takes as long as `cost` says; a cost that is an exception is raised."""

    def __init__(self, cost, most=10**9):
        self.cost, self.most, self.timed, self.recovered = cost, most, [], 0

    def time(self, candidate):
        if len(self.timed) == self.most:
            raise KeyboardInterrupt
        self.timed.append(candidate)
        cost = self.cost(*candidate)
        if isinstance(cost, Exception):
            raise cost
        return cost

    def compare(self, candidates):
        return {candidate: self.cost(*candidate) for candidate in candidates}

    def recover(self):
        self.recovered += 1


class Bar:
    def update(self, count=1):
        pass


def cost(kernel, config):
    """gate_up likes 64-row tiles, down 32-row ones: together they take least at 32."""
    if kernel == "route":
        return 1.0
    off = abs(config.BLOCK_M - 64) / 4 if kernel == "gate_up" else abs(config.BLOCK_M - 32)
    return 100 + off + (config.BLOCK_K + config.num_stages + config.num_warps) / 100


def run(gpu, state, tokens=96, rows=768):
    layer = tune.Layer(64, 2048, 1408, 8)
    wanted = tune.candidates(rows / layer.experts, BF16, SM90)
    default = tune.heuristics(layer, tokens, BF16, SM90)
    tune.tune_tokens(gpu, tokens, rows, list(dict.fromkeys(wanted + default)), default, state, Bar())
    return wanted, default


def test_the_pair_with_the_least_sum_wins(tmp_path):
    state = tune.State(tmp_path / "state.jsonl")
    wanted, default = run(FakeGpu(cost), state)
    record = state.entries[96]
    chosen = record["entry"]
    assert chosen["rows"] == 768
    assert chosen["gate_up"]["BLOCK_M"] == chosen["down"]["BLOCK_M"] == 32
    for kernel in ("gate_up", "down"):
        of_tile = [c for k, c in wanted if k == kernel and c.BLOCK_M == 32]
        assert cost(kernel, tune.tuning.GemmConfig(**chosen[kernel])) == min(cost(kernel, c) for c in of_tile)
    assert (
        record["heuristics_us"] == pytest.approx(sum(cost(*c) for c in default))
        and record["us"] <= record["heuristics_us"]
    )


def test_what_fails_is_left_out_and_remembered(tmp_path):
    def picky(kernel, config):
        return ArithmeticError("wrong") if kernel == "down" and config.BLOCK_M == 32 else cost(kernel, config)

    gpu, state = FakeGpu(picky), tune.State(tmp_path / "state.jsonl")
    run(gpu, state)
    assert state.entries[96]["entry"]["down"]["BLOCK_M"] != 32
    errors = [record for record in state.results.values() if "error" in record]
    assert errors and all(record["error"] == "ArithmeticError: wrong" for record in errors)
    assert gpu.recovered == len(errors)

    with pytest.raises(SystemExit, match="no candidate works"):
        run(FakeGpu(lambda *_: RuntimeError("no")), tune.State(tmp_path / "other.jsonl"))


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "state.jsonl"
    first = FakeGpu(cost, most=10)
    with pytest.raises(KeyboardInterrupt):
        run(first, tune.State(path))
    # And in the middle of a line.
    path.write_text(path.read_text()[:-5])
    second = FakeGpu(cost)
    state = tune.State(path)
    run(second, state)
    assert second.timed[0] == first.timed[-1] and not set(second.timed) & set(first.timed[:-1])

    again = tune.State(path)
    assert again.entries == state.entries and again.results == state.results
    # What was cut short stands in a line of its own.
    assert len(again.results) == len(first.timed) + len(second.timed) - 1


def test_the_whole_tuner(tuning, monkeypatch, tmp_path, capsys):
    """All but the GPU: from the command line to the file, with a candidate that does not compile; then once more."""
    gpu = FakeGpu(cost)
    left_out = []
    properties = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 232448})
    driver = SimpleNamespace(utils=properties, get_current_target=lambda: None)
    monkeypatch.setattr(tune.triton.runtime, "driver", SimpleNamespace(active=driver))
    monkeypatch.setattr(tune.one_line_errors, "need_gpu", lambda: None)
    for name, value in (("current_device", 0), ("get_device_name", GPU), ("get_device_capability", SM90)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(tune, "expert_weights", lambda *_: [torch.empty(0)] * 2)
    monkeypatch.setattr(tune, "Gpu", lambda *_: gpu)

    def compile_ahead(plan, *_):
        left_out[:] = [wanted[-1] for ladder in plan.values() for wanted in ladder.values()]
        return dict.fromkeys(left_out, "it spills")

    monkeypatch.setattr(tune, "compile_ahead", compile_ahead)
    command = ["tune.py", "--shape", "64", "64", "32", "8", "--out", str(tmp_path / "out"), "--tokens"]
    monkeypatch.setattr(sys, "argv", [*command, "96", "2048", "--state", str(tmp_path / "state")])
    tune.main()
    (path,) = (tmp_path / "out").iterdir()
    assert path.name == tuning.config_path((64, 64, 32), BF16, GPU).name
    assert [rows for rows, _ in tuning.read_configs(path, BF16, SM90)] == [768, 16384]
    assert not set(left_out) & set(gpu.timed)
    printed = capsys.readouterr().out
    assert str(path) in printed and printed.count("it spills") == len(set(left_out))

    # What is done stays done, and in the file.
    gpu.timed.clear()
    monkeypatch.setattr(sys, "argv", [*command, "96", "192", "--state", str(tmp_path / "state")])
    tune.main()
    assert [rows for rows, _ in tuning.read_configs(path, BF16, SM90)] == [768, 1536, 16384]
    assert set(gpu.timed) < set(
        tune.candidates(24, BF16, SM90) + tune.heuristics(tune.Layer(64, 64, 32, 8), 192, BF16, SM90)
    )


LAUNCH_AGAIN = """
import sys
sys.path[:0] = sys.argv[1:]
import torch, tune, tune_runs
from compile_only import compile_only
from triton.backends.compiler import GPUTarget

compiled = compile_only(GPUTarget("cuda", 90, 32))
meta = tune_runs.without_memory(tune.Layer(64, 512, 256, 6), 10, torch.bfloat16)
inputs = tune_runs.Inputs(*(torch.zeros(t.shape, dtype=t.dtype) for t in meta))
for candidate in tune.candidates(1, torch.bfloat16, (9, 0))[:3]:
    tune_runs.launch(candidate, inputs, torch.zeros(4, 20, dtype=torch.int32))
assert {name for name, _ in compiled} == {"_route_kernel", "_gate_up_kernel", "_grouped_gemm_kernel"}
"""


@pytest.mark.long
def test_compiling_ahead_fills_the_cache(tmp_path, monkeypatch):
    """In processes of its own and without memory; launches of another size with real tensors then compile nothing."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    target = GPUTarget("cuda", 90, 32)
    wanted = tune.candidates(1, BF16, SM90)[:3]
    plan = {tune.Layer(64, 1024, 768, 6): {8: wanted}}
    assert tune_runs.compile_ahead(plan, BF16, target, 232448) == {}
    cached = set(os.listdir(tmp_path))
    assert len(cached) >= 5  # routing, and both ways of reading for each GEMM
    paths = [ROOT / "scripts", ROOT / "benchmarks"]
    subprocess.run([sys.executable, "-c", LAUNCH_AGAIN, *paths], check=True)
    assert set(os.listdir(tmp_path)) == cached

    # What must not run is named.
    faults = tune_runs.compile_ahead(plan, BF16, target, 50000)
    assert set(faults) == set(wanted[1:])
    assert re.fullmatch("_gate_up_kernel needs [0-9]+ bytes of shared memory", faults[wanted[1]])
    spilling = "down", wanted[2][1]._replace(BLOCK_M=128, MIN_M=128, BLOCK_N=256)
    assert tune_runs.compile_ahead({tune.Layer(64, 1024, 768, 6): {8: [spilling]}}, BF16, target, 232448) == {
        spilling: "_grouped_gemm_kernel spills"
    }


CHECK = """
import sys
sys.path[:0] = sys.argv[1:]
import torch, tune, tune_runs

torch.manual_seed(0)
layer = tune.Layer(4, 64, 48, 2)
weights = torch.randn(4, 96, 64).half() * 0.1, torch.randn(4, 64, 48).half() * 0.1
gpu = tune_runs.Gpu(layer, 20, *weights)
config = tune.tuning.GemmConfig(32, 16, 32, 32, 8, 4, 2, False)
candidates = [("route", config), ("gate_up", config), ("down", config)]
for candidate in candidates:
    gpu.check(candidate)
right = tune_runs.kernels.grouped_gemm
for wrong in (lambda *args: right(*args) * 1.01, lambda *args: torch.empty_like(right(*args))):
    tune_runs.kernels.grouped_gemm = wrong
    try:
        gpu.check(candidates[-1])
    except ArithmeticError as error:
        print(error)
"""


def test_only_right_results_are_timed():
    paths = [ROOT / "scripts", ROOT / "benchmarks"]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    check = subprocess.run([sys.executable, "-c", CHECK, *paths], env=env, capture_output=True, text=True, check=True)
    assert re.fullmatch("relative error 0.01\n.* was never written\n", check.stdout), check.stdout
