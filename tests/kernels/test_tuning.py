"""Tuned configurations: which one a call gets, what a bad file leads to, and the tuner with a timer of the test's."""

import json
import math
import os
import re
import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from triton.backends.compiler import GPUTarget

from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import tune  # noqa: E402
import tune_runs  # noqa: E402

SHAPE = (8, 64, 32)  # E, H, I
BF16, SM90, GPU = torch.bfloat16, (9, 0), "NVIDIA Test/GPU"
SHIPPED = sorted((ROOT / "torch-ext/moe_grouped_gemm/configs").glob("*.json"))


@pytest.fixture
def tuning(kernel, monkeypatch, tmp_path):
    """The module, with an empty directory in place of the shipped files."""
    module = import_module(f"{kernel.__name__}.tuning")
    monkeypatch.setattr(import_module(f"{kernel.__name__}.tuned_files"), "CONFIGS", tmp_path)
    module.experts_table.cache_clear()
    yield module
    module.experts_table.cache_clear()


def entry(rows, block_m=64, **changes):
    gemm = {"BLOCK_M": block_m, "MIN_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "GROUP_M": 8}
    gemm = {**gemm, "num_warps": 4, "num_stages": 3, "USE_TMA": True}
    return {"rows": rows, "gate_up": {**gemm, **changes}, "down": dict(gemm)}


def of_both(**changes):
    """An entry in which both GEMMs have these."""
    both = entry(64, **changes)
    return {**both, "down": dict(both["gate_up"])}


def specialized(**changes):
    """An entry for the warp-specialized kernel, but for these changes."""
    down = {"MIN_M": 64, "BLOCK_N": 256, "num_warps": 8, "USE_TMA": True, "WARP_SPECIALIZED": True, **changes}
    both = {field: {"BLOCK_M": 128, "MIN_M": 64, **changes}[field] for field in ("BLOCK_M", "MIN_M")}
    whole = entry(64, **both)
    return {**whole, "down": {**whole["down"], **down, **both}}


def content(*entries):
    return {"tuned_with": {"triton": "3.6.0"}, "entries": list(entries)}


def put(tuning, text):
    path = tuning.config_path(SHAPE, BF16, GPU)
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


# --- lookup -----------------------------------------------------------------------------------------------------------


def test_the_nearest_in_log_rows_is_taken(tuning):
    tuned_for = {64: 16, 1024: 32, 4096: 64}  # rows -> BLOCK_M, by which to tell the entries apart
    put(tuning, content(*(entry(rows, block_m) for rows, block_m in tuned_for.items())))
    for rows in (1, 63, 64, 200, 255, 257, 1024, 2047, 2049, 4096, 10**7):
        nearest = min(tuned_for, key=lambda tuned: abs(math.log(rows / tuned)))
        up, down = tuning.experts_config(rows, SHAPE, BF16, SM90, GPU)
        assert up.BLOCK_M == down.BLOCK_M == tuned_for[nearest], rows


def test_a_file_is_for_one_layer_dtype_and_gpu(tuning):
    put(tuning, content(entry(64, GROUP_M=1)))
    assert tuning.experts_config(64, SHAPE, BF16, SM90, GPU).gate_up.GROUP_M == 1
    heuristic = tuning.experts_config(64, SHAPE, BF16, SM90, "")
    assert heuristic in tuning.all_configs(BF16, SM90)
    for other in (((4, 64, 32), BF16, GPU), (SHAPE, torch.float16, GPU), (SHAPE, BF16, "NVIDIA Other GPU")):
        assert tuning.experts_config(64 * other[0][0] // 8, *other[:2], SM90, other[2]) == heuristic


def test_without_a_file_the_heuristics_serve(tuning, recwarn):
    path = put(tuning, content(entry(64, GROUP_M=1)))
    path.rename(path.with_suffix(".hidden"))
    for rows in (1, 64, 4096):
        assert tuning.experts_config(rows, SHAPE, BF16, SM90, GPU) == tuning.experts_config(rows, SHAPE, BF16, SM90, "")
    assert not recwarn


def test_a_file_is_read_once(tuning, monkeypatch):
    put(tuning, content(entry(64)))
    reads = []
    read = tuning.read_configs
    monkeypatch.setattr(tuning, "read_configs", lambda *args: reads.append(args) or read(*args))
    for rows in range(1, 100):
        tuning.experts_config(rows, SHAPE, BF16, SM90, GPU)
    assert len(reads) == 1


def test_fields_with_a_default_may_be_missing(tuning):
    put(tuning, content(entry(64)))
    written = tuning.experts_config(64, SHAPE, BF16, SM90, GPU).gate_up
    assert written == tuning.GemmConfig(**entry(64)["gate_up"])
    # Every field is understood, those with a default too.
    put(tuning, content({"rows": 64, "gate_up": written._asdict(), "down": written._asdict()}))
    tuning.experts_table.cache_clear()
    assert tuning.experts_config(64, SHAPE, BF16, SM90, GPU).down == written


BAD = [
    pytest.param("", "Expecting value", id="empty"),
    pytest.param(json.dumps(content(entry(64)))[:-20], "delimiter|Unterminated|Expecting", id="truncated"),
    pytest.param("\0\1garbage", "Expecting value", id="garbage"),
    pytest.param([], "the file: expected an object, got list", id="no-object"),
    pytest.param({"entries": [entry(64)]}, "the file: expected the fields tuned_with, entries", id="no-origin"),
    pytest.param(content(), "entries: expected a list of at least one", id="no-entries"),
    pytest.param({**content(), "entries": {}}, "entries: expected a list", id="entries-no-list"),
    pytest.param(content(None), "entry 0: expected an object, got NoneType", id="entry-no-object"),
    pytest.param(content({**entry(64), "hints": 1}), "entry 0: expected the fields .*, hints", id="field-of-entry"),
    pytest.param(content(entry("64")), "entry 0: rows: expected an integer above 0 .*, got '64'", id="rows-text"),
    pytest.param(content(entry(64), entry(64)), "entry 1: rows: expected an integer above 64", id="rows-twice"),
    pytest.param(content(entry(64, BLOCK_Q=4)), "entry 0: gate_up: expected the fields .*BLOCK_Q", id="unknown-field"),
    pytest.param(content(entry(64, BLOCK_N=48)), "BLOCK_N: expected a power of two, 16 or more, got 48", id="no-power"),
    pytest.param(content(entry(64, BLOCK_N=8)), "BLOCK_N: expected a power of two, 16 or more, got 8", id="too-small"),
    pytest.param(content(entry(64, num_warps=-4)), "num_warps: expected a power of two, 1 or more", id="negative"),
    pytest.param(content(entry(64, num_warps=4.0)), "num_warps: expected int, got 4.0", id="float"),
    pytest.param(content(entry(64, num_stages=True)), "num_stages: expected int, got True", id="bool-for-int"),
    pytest.param(content(entry(64, USE_TMA=1)), "USE_TMA: expected bool, got 1", id="int-for-bool"),
    pytest.param(content(entry(64, MIN_M=128)), "MIN_M 128 exceeds BLOCK_M 64", id="min-above-block"),
    pytest.param(content(entry(64, BLOCK_M=128)), "must share BLOCK_M and MIN_M", id="two-block-m"),
    pytest.param(content(entry(64, MIN_M=64)), "must share BLOCK_M and MIN_M", id="two-min-m"),
    pytest.param(content(entry(10**400)), "rows: expected an integer above 0 and below 2", id="rows-no-int32"),
    pytest.param(content(entry(64, BLOCK_N=256)), "gate_up: BLOCK_N: 512 rows or columns are more", id="box-of-both"),
    pytest.param(content(of_both(BLOCK_M=512)), "gate_up: BLOCK_M: 512 rows .* 256 that TMA", id="box-of-rows"),
    pytest.param(content(of_both(BLOCK_M=2**20, USE_TMA=False)), "num_warps: 4 have no registers", id="huge-tile"),
    pytest.param(content(entry(64, num_stages=64)), "num_stages: 64 of them need 1048576 bytes", id="too-many-stages"),
    pytest.param(content(entry(64, num_warps=64)), "num_warps: expected at most 32, got 64", id="too-many-warps"),
    pytest.param(content(entry(64, GROUP_M=2**30)), "GROUP_M: expected at most 32768", id="group-of-all"),
    pytest.param(content(entry(64, WARP_SPECIALIZED=True)), "gate_up: WARP_SPECIALIZED: only", id="specialized-gate"),
    pytest.param(content(specialized(USE_TMA=False)), "down: USE_TMA: expected true with", id="specialized-loads"),
    pytest.param(content(specialized(num_stages=16)), "down: num_stages: 16 of them", id="specialized-stages"),
    *(
        pytest.param(content(specialized(**{field: size})), f"{field}: expected .* with WARP", id=f"{field}-{size}")
        for field, size in (("BLOCK_M", 256), ("BLOCK_M", 64), ("MIN_M", 32), ("BLOCK_N", 128), ("BLOCK_K", 32))
    ),
]


@pytest.mark.parametrize("text, reason", BAD)
def test_a_bad_file_warns_once_and_leaves_the_heuristics(tuning, text, reason):
    path = put(tuning, text)
    with pytest.warns(UserWarning) as warnings:
        got = [tuning.experts_config(rows, SHAPE, BF16, SM90, GPU) for rows in (64, 65)]
    assert got == [tuning.experts_config(64, SHAPE, BF16, SM90, "")] * 2
    (warning,) = warnings
    assert str(warning.message).startswith(f"{path}: ") and "Heuristic" in str(warning.message)
    assert re.search(reason, str(warning.message))


def test_a_missing_field_is_named(tuning):
    bad = entry(64)
    del bad["down"]["BLOCK_K"]
    put(tuning, content(bad))
    with pytest.warns(UserWarning, match="entry 0: down: expected the fields .*BLOCK_K"):
        tuning.experts_config(64, SHAPE, BF16, SM90, GPU)


def test_calls_look_their_files_up(kernel, tuning, monkeypatch):
    gpu = import_module(f"{kernel.__name__}.gpu")
    put(tuning, content(entry(64, GROUP_M=1)))
    monkeypatch.setattr(gpu, "capability", lambda device: SM90)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    gpu.device_name.cache_clear()
    down_proj = torch.empty(SHAPE, dtype=BF16, device="meta")
    assert gpu.config(64, down_proj).gate_up.GROUP_M == 1
    # A GPU that is run as an unknown one has no tuned files.
    gpu.device_name.cache_clear()
    monkeypatch.setattr(gpu, "capability", lambda device: (0, 0))
    assert gpu.config(64, down_proj) in tuning.all_configs(BF16, (0, 0))
    gpu.device_name.cache_clear()


def test_what_can_work_is_accepted(tuning):
    """The warp-specialized tile in a file, and every heuristic as if it were in one."""
    put(tuning, content(specialized()))
    assert tuning.experts_config(64, SHAPE, BF16, SM90, GPU).down.WARP_SPECIALIZED
    for dtype, capability in ((BF16, SM90), (BF16, (8, 0)), (BF16, (12, 0)), (torch.float32, SM90)):
        for up, down in tuning.all_configs(dtype, capability):
            assert not tune.launch_configs.fault_of("gate_up", up, dtype, capability)
            assert not tune.launch_configs.fault_of("down", down, dtype, capability)


@pytest.mark.parametrize("dtype, capability", [(torch.float32, SM90), (BF16, (8, 0)), (BF16, (10, 0))], ids=str)
def test_a_file_for_another_kind_of_gpu_or_dtype(tuning, dtype, capability):
    tuning.config_path(SHAPE, dtype, GPU).write_text(json.dumps(content(specialized())))
    with pytest.warns(UserWarning, match="USE_TMA|WARP_SPECIALIZED"):
        found = tuning.experts_config(64, SHAPE, dtype, capability, GPU)
    assert found == tuning.experts_config(64, SHAPE, dtype, capability, "")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files(kernel, path):
    """Valid, and named as they are looked up. That their kernels compile is for test_compile.py to show."""
    module = import_module(f"{kernel.__name__}.tuned_files")
    sizes = dict(part.split("=") for part in path.stem.split(","))
    shape = [int(sizes[letter]) for letter in "EHI"]
    assert module.config_path(shape, getattr(torch, sizes["dtype"]), sizes["device"]).name == path.name
    assert set(json.loads(path.read_text())["tuned_with"]) == {"compute_capability", "torch", "triton", "commit"}
    capability = tuple(map(int, json.loads(path.read_text())["tuned_with"]["compute_capability"].split(".")))
    assert len(module.read_configs(path, getattr(torch, sizes["dtype"]), capability)) > 5


# --- the tuner --------------------------------------------------------------------------------------------------------

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


def test_writing_is_atomic(tuning, monkeypatch, tmp_path):
    path = tuning.config_path(SHAPE, BF16, GPU)
    tune.write(path, {"triton": "3.6.0"}, [entry(1024), entry(64)], BF16, SM90)
    assert [rows for rows, _ in tuning.read_configs(path, BF16, SM90)] == [64, 1024]
    before = path.read_text()
    assert len(before.splitlines()) == 7  # an entry a line
    with pytest.raises(ValueError, match="share BLOCK_M"):
        tune.write(path, {"triton": "3.6.0"}, [entry(64, BLOCK_M=128)], BF16, SM90)
    assert path.read_text() == before and os.listdir(tmp_path) == [path.name]


def test_the_whole_tuner(tuning, monkeypatch, tmp_path, capsys):
    """All but the GPU: from the command line to the file, with a candidate that does not compile; then once more."""
    gpu = FakeGpu(cost)
    left_out = []
    properties = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 232448})
    driver = SimpleNamespace(utils=properties, get_current_target=lambda: None)
    monkeypatch.setattr(tune.triton.runtime, "driver", SimpleNamespace(active=driver))
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


def test_an_amd_gpu_is_no_hopper(kernel, tuning, monkeypatch):
    """torch has capability (9, 4) for an MI300."""
    gpu = import_module(f"{kernel.__name__}.gpu")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    gpu.capability.cache_clear()
    try:
        assert tuning.router_configs(BF16, gpu.capability(0)) is tuning.ROUTER_PORTABLE
        assert not import_module(f"{kernel.__name__}.fp8")._multiplies_fp8(0)
    finally:
        gpu.capability.cache_clear()
