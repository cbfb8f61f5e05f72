"""Launchers in small tiles, on a GPU or under the interpreter; tuned configurations in a folder of the test's."""

from importlib import import_module
from types import SimpleNamespace

import pytest

from flat import ByKind
from interpreted import INTERPRETED, enter_no_device


@pytest.fixture(scope="module")
def launch(kernel):
    return import_module(f"{kernel.__name__}.kernels")


@pytest.fixture(scope="module")
def config(kernel):
    GemmConfig = import_module(f"{kernel.__name__}.tuning").GemmConfig
    return lambda **changes: GemmConfig(16, 16, 64, 32, 2, 4, 2, False)._replace(**changes)


@pytest.fixture(params=[False, True], ids=["loads", "tma"])
def path(kernel, monkeypatch, config, request):
    """experts/ops.py for a GPU, with small tiles, run on what is there."""
    return with_tiles(kernel, monkeypatch, config(USE_TMA=request.param))


@pytest.fixture
def path_with_adapters(kernel, monkeypatch, config):
    """(use_tma=False) -> the same, with tiles for padded rows."""
    tiles = config(BLOCK_M=64, num_warps=8)  # of more K or fewer warps, slow to compile
    return lambda use_tma=False: with_tiles(kernel, monkeypatch, tiles._replace(USE_TMA=use_tma), kinds=10)


def with_tiles(kernel, monkeypatch, config, kinds=6):
    names = ("experts.ops", "weights.dense", "gpu", "tuning")
    ops, dense, gpu, tuning = (import_module(f"{kernel.__name__}.{name}") for name in names)
    monkeypatch.setattr(dense, "_experts_config", lambda *args: tuning.ExpertsConfig(config, config))
    monkeypatch.setattr(gpu, "traits", lambda device: gpu.TRAITS["sm_90"])
    monkeypatch.setattr(tuning, "wgrad_config", lambda *args: config)
    enter_no_device(monkeypatch)
    return ByKind(ops, kinds)


@pytest.fixture
def tuning(kernel, monkeypatch, tmp_path):
    """The module, with an empty directory in place of the shipped files."""
    module = import_module(f"{kernel.__name__}.tuning")
    monkeypatch.setattr(import_module(f"{kernel.__name__}.tuned_files"), "CONFIGS", tmp_path)
    return module


@pytest.fixture
def whole(kernel, monkeypatch):
    """The modules of the layer by name, with the configurations of Hopper, run on what is there."""
    names = {
        "gpu": "gpu",
        "fp8": "weights.fp8",
        "fp4": "weights.fp4",
        "forward": "experts.forward",
        "ops": "experts.ops",
    }
    names |= {"blocks": "experts.blocks", "weights": "weights"}
    modules = {name: import_module(f"{kernel.__name__}.{path}") for name, path in names.items()}
    gpu = modules["gpu"]
    enter_no_device(monkeypatch)
    monkeypatch.setattr(gpu, "traits", lambda device: gpu.TRAITS["sm_90"])
    if INTERPRETED:  # Gluon has no interpreter
        for weights in (modules["fp8"], modules["fp4"]):
            monkeypatch.setattr(weights, "_can_specialize", lambda *_: False)
        monkeypatch.setattr(modules["fp4"], "_fits_registers", lambda *_: False)
        monkeypatch.setattr(weights.tuning, "is_decode", lambda *_: False)
    return SimpleNamespace(**modules)
