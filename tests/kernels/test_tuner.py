"""`tune`, with a timer of the test's in place of the GPU's."""

import json
import os
import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from kernels import get_kernel
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from compile_only import NoGPU
from moe_models import experts_classes, tiny_module
from suite import HELPERS, REPO_ID

PACKAGE = get_kernel(REPO_ID, version=1).__name__
names = ("candidates", "choice", "run", "trials")
candidates, choice, run, trials = (import_module(f"{PACKAGE}.tuner.{name}") for name in names)
launch_configs = import_module(f"{PACKAGE}.launch_configs")
TRAITS, GemmConfig = launch_configs.TRAITS, launch_configs.GemmConfig
BF16, SM90, GPU = torch.bfloat16, TRAITS["sm_90"], "NVIDIA Test/GPU"
LAYERS = [(64, 2048, 1408, 6), (128, 2048, 768, 8), (256, 7168, 2048, 8)]
LAYER = candidates.Layer(64, 2048, 1408, 8, BF16)


@pytest.mark.parametrize("traits", TRAITS.values(), ids=list(TRAITS))
@pytest.mark.parametrize("sizes", LAYERS, ids=str)
def test_candidates(sizes, traits):
    layer = candidates.Layer(*sizes, BF16)
    counts = candidates.ladder(layer)
    assert counts[-1] * layer.top_k > candidates.MOST_ROWS / 2
    for tokens in counts:
        found = candidates.candidates(layer, tokens, traits)
        assert 10 < len(found) == len(set(found)) < 300
        assert set(candidates.heuristics(layer, tokens, traits)) <= set(found)
        for tile in {config[:2] for _, config in found}:
            assert {kernel for kernel, config in found if config[:2] == tile} == set(candidates.KERNELS)
        gemms = [c for c in found if c[0] != "route"]
        assert not any(launch_configs.fault_of(*c, BF16, traits) for c in gemms)
        assert any(config.USE_TMA for _, config in gemms) == traits.has_tma


class FakeTrials:
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


def cost(kernel, config):
    """gate_up likes 64-row tiles, down 32-row ones: together they take least at 32."""
    if kernel == "route":
        return 1.0
    off = abs(config.BLOCK_M - 64) / 4 if kernel == "gate_up" else abs(config.BLOCK_M - 32)
    return 100 + off + (config.BLOCK_K + config.num_stages + config.num_warps) / 100


def choose(fake, tokens=96):
    wanted, default = (f(LAYER, tokens, SM90) for f in (candidates.candidates, candidates.heuristics))
    return wanted, default, choice.choose(fake, wanted, default)


def test_the_pair_with_the_least_sum_wins():
    wanted, default, (best, us, heuristics_us) = choose(FakeTrials(cost))
    assert best["gate_up"]["BLOCK_M"] == best["down"]["BLOCK_M"] == 32
    for kernel in ("gate_up", "down"):
        of_tile = [c for k, c in wanted if k == kernel and c.BLOCK_M == 32]
        assert cost(kernel, GemmConfig(**best[kernel])) == min(cost(kernel, c) for c in of_tile)
    assert heuristics_us == pytest.approx(sum(cost(*c) for c in default)) and us <= heuristics_us


def test_what_fails_is_left_out():
    def picky(kernel, config):
        return ArithmeticError("wrong") if kernel == "down" and config.BLOCK_M == 32 else cost(kernel, config)

    fake = FakeTrials(picky)
    wanted, _, (best, *_) = choose(fake)
    assert best["down"]["BLOCK_M"] != 32
    assert fake.recovered == len([c for k, c in wanted if k == "down" and c.BLOCK_M == 32]) > 0
    with pytest.raises(RuntimeError, match="no candidate works") as caught:
        choose(FakeTrials(lambda *_: ArithmeticError("wrong")))
    assert str(caught.value.__cause__) == "wrong"


@pytest.fixture
def fake_gpu(monkeypatch):
    """All but the GPU: (fake, the layers and numbers of tokens that were compiled)."""
    fake, compiled = FakeTrials(cost), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in (("current_device", 0), ("get_device_name", GPU), ("get_device_capability", (9, 0))):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(run.gpu, "traits", lambda device: SM90)
    monkeypatch.setattr(run, "compile_ahead", lambda layer, plan: compiled.append((layer, sorted(plan))))
    monkeypatch.setattr(run, "Trials", lambda *_: fake)
    monkeypatch.setattr(run, "random_weights", lambda layer: [None, None])
    return SimpleNamespace(trials=fake, compiled=compiled)


def test_from_sizes_to_files(kernel, fake_gpu, tuning, tmp_path, capsys, monkeypatch):
    sizes, folder = (8, 64, 32, 2), tmp_path / "new" / "folder"
    (path,) = kernel.tune([sizes], folder, tokens=[96, 2048, 96])
    assert list(tmp_path.rglob("*.*")) == [path]
    assert [rows for rows, _ in tuning.read_configs(path, BF16, SM90)] == [192, 4096]
    assert capsys.readouterr().out.count("untuned") == 2
    assert set(json.loads(path.read_text())["tuned_with"]) == {"compute_capability", "torch", "triton", "kernel"}
    # This process uses it from now on, if it is told where it is.
    assert not tuning.experts_config(192, sizes[:3], BF16, SM90, GPU).gate_up.BLOCK_M == 32
    monkeypatch.setenv("MOE_GROUPED_GEMM_CONFIGS", str(folder))
    kernel.tune([sizes], folder, tokens=[96])
    assert tuning.experts_config(192, sizes[:3], BF16, SM90, GPU).gate_up.BLOCK_M == 32


def test_a_run_goes_on_where_another_stopped(kernel, fake_gpu, tuning, tmp_path, monkeypatch):
    sizes = (8, 64, 32, 2)
    layer = candidates.Layer(*sizes, BF16)
    kernel.tune([sizes], tmp_path, tokens=[96])
    (path,) = tmp_path.iterdir()
    fake_gpu.trials.most = len(fake_gpu.trials.timed) + 10
    with pytest.raises(KeyboardInterrupt):
        kernel.tune([sizes], tmp_path, tokens=[96, 192])
    assert [rows for rows, _ in tuning.read_configs(path, BF16, SM90)] == [192]
    fake_gpu.trials.most = 10**9
    kernel.tune([sizes], tmp_path, tokens=[96, 192])
    assert [rows for rows, _ in tuning.read_configs(path, BF16, SM90)] == [192, 384]
    assert fake_gpu.compiled == [(layer, [96]), (layer, [192]), (layer, [192])]
    # What another Triton found says nothing about this one; nor does a file that cannot be read.
    for text in (path.read_text().replace('"triton": "', '"triton": "0.'), "[]"):
        path.write_text(text)
        kernel.tune([sizes], tmp_path, tokens=[192])
        assert [rows for rows, _ in tuning.read_configs(path, BF16, SM90)] == [384]
    assert len(fake_gpu.compiled) == 5


# (E, H, I, top_k) by what their configs call it; top_k under each name that there is.
MODELS = {
    "deepseek_v3": ("n_routed_experts", "hidden_size", "moe_intermediate_size", "num_experts_per_tok"),
    "gpt_oss": ("num_local_experts", "hidden_size", "intermediate_size", "num_experts_per_tok"),  # transposed
    "aria": ("moe_num_experts", "hidden_size", "intermediate_size", "moe_topk"),
    "gemma4": ("num_experts", "hidden_size", "moe_intermediate_size", "top_k_experts"),
    "ernie4_5_moe": ("moe_num_experts", "hidden_size", "moe_intermediate_size", "moe_k"),
}


@pytest.mark.parametrize("name, fields", MODELS.items(), ids=list(MODELS))
def test_layers_of_a_model(kernel, fake_gpu, tmp_path, name, fields):
    entry = next(entry for entry in experts_classes() if entry.model == name)
    experts = tiny_module(entry).to(torch.float16)
    sizes = [getattr(experts.config, field) for field in fields]
    (path,) = kernel.tune(torch.nn.ModuleList([experts, experts]), tmp_path, tokens=[96])
    ((layer, _),) = fake_gpu.compiled
    assert layer == (*sizes, torch.float16)
    assert path.name.startswith("E={},H={},I={},dtype=float16,".format(*sizes))


def test_a_config_that_does_not_say_top_k(kernel, fake_gpu, tmp_path):
    experts = tiny_module(next(entry for entry in experts_classes() if entry.model == "mixtral"))
    experts.config = SimpleNamespace()
    with pytest.raises(ValueError, match="does not say top_k"):
        kernel.tune(experts, tmp_path)


@pytest.mark.parametrize("layers", [[], [(8, 64, 32)], [(8, 64, 32, 0)], [(8, 64, 32, 9)], torch.nn.Linear(2, 2)])
def test_what_is_no_layer(kernel, tmp_path, layers):
    with pytest.raises((ValueError, TypeError), match="expected|missing|nothing to tune"):
        kernel.tune(layers, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu(kernel, tmp_path):
    with pytest.raises(RuntimeError, match="tune: there is no GPU"):
        kernel.tune([(8, 64, 32, 2)], tmp_path)
    assert not list(tmp_path.iterdir())


LAUNCH_AGAIN = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from compile_only import compile_only
from kernels import get_kernel
from triton.backends.compiler import GPUTarget
from importlib import import_module

package = get_kernel("org/moe-grouped-gemm", version=1).__name__
trials, candidates, launch_configs = (
    import_module(f"{package}.{name}") for name in ("tuner.trials", "tuner.candidates", "launch_configs")
)
compiled = compile_only(GPUTarget("cuda", 90, 32))
layer = candidates.Layer(64, 512, 256, 6, torch.bfloat16)
inputs = trials.Inputs(*(torch.zeros(t.shape, dtype=t.dtype) for t in trials.without_memory(layer, 10)))
for candidate in candidates.candidates(layer, 10, launch_configs.TRAITS["sm_90"])[:3]:
    trials.launch(candidate, inputs, torch.zeros(4, 20, dtype=torch.int32))
assert {name for name, _ in compiled} == {"_route_kernel", "_gate_up_kernel", "_grouped_gemm_kernel"}
"""


@pytest.mark.long
def test_compiling_ahead_fills_the_cache(tmp_path, monkeypatch):
    """Without memory; launches of another size with real tensors then compile nothing."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", NoGPU(GPUTarget("cuda", 90, 32), -2))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    layer = candidates.Layer(64, 1024, 768, 6, BF16)
    wanted = candidates.candidates(layer, 10, SM90)[:3]
    too_many = ("down", wanted[2][1]._replace(BLOCK_N=2**20))  # does not compile: no matter
    trials.compile_ahead(layer, {8: [*wanted, too_many]})
    cached = set(os.listdir(tmp_path))
    assert len(cached) >= 3
    subprocess.run([sys.executable, "-c", LAUNCH_AGAIN, HELPERS], check=True)
    assert set(os.listdir(tmp_path)) == cached


CHECK = """
import sys
from importlib import import_module
import torch
from kernels import get_kernel

package = get_kernel("org/moe-grouped-gemm", version=1).__name__
trials, candidates, launch_configs = (
    import_module(f"{package}.{name}") for name in ("tuner.trials", "tuner.candidates", "launch_configs")
)
torch.manual_seed(0)
layer = candidates.Layer(4, 64, 48, 2, torch.float16)
weights = torch.randn(4, 96, 64).half() * 0.1, torch.randn(4, 64, 48).half() * 0.1
gpu = trials.Trials(layer, 20, *weights)
config = launch_configs.GemmConfig(32, 16, 32, 32, 8, 4, 2, False)
wanted = [("route", config), ("gate_up", config), ("down", config)]
for candidate in wanted:
    gpu.check(candidate)
right = gpu.kernels.grouped_gemm
for wrong in (lambda *args: right(*args) * 1.01, lambda *args: torch.empty_like(right(*args))):
    gpu.kernels.grouped_gemm = wrong
    try:
        gpu.check(wanted[-1])
    except ArithmeticError as error:
        print(error)
assert not torch.are_deterministic_algorithms_enabled()
"""


def test_only_right_results_are_timed():
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    check = subprocess.run([sys.executable, "-c", CHECK], env=env, capture_output=True, text=True, check=True)
    first, second = check.stdout.splitlines()
    assert first == "relative error 0.01" and second.endswith(" was never written")
