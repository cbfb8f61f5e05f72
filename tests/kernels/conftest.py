"""Launchers in small tiles, on a GPU or under the interpreter; tuned configurations in a folder of the test's."""

from contextlib import nullcontext
from importlib import import_module

import pytest
import torch


@pytest.fixture(scope="module")
def launch(kernel):
    return import_module(f"{kernel.__name__}.kernels")


@pytest.fixture(scope="module")
def config(kernel):
    GemmConfig = import_module(f"{kernel.__name__}.tuning").GemmConfig
    return lambda **changes: GemmConfig(16, 16, 64, 32, 2, 4, 2, False)._replace(**changes)


@pytest.fixture(params=[False, True], ids=["loads", "tma"])
def path(kernel, monkeypatch, config, request):
    """training.py, with small tiles, run on what is there."""
    training, gpu, tuning = (import_module(f"{kernel.__name__}.{name}") for name in ("training", "gpu", "tuning"))
    config = config(USE_TMA=request.param)
    monkeypatch.setattr(gpu, "config", lambda *args: tuning.ExpertsConfig(config, config))
    monkeypatch.setattr(gpu, "capability", lambda device: (9, 0))
    monkeypatch.setattr(tuning, "wgrad_config", lambda *args: config)
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: nullcontext())
    return training


@pytest.fixture
def tuning(kernel, monkeypatch, tmp_path):
    """The module, with an empty directory in place of the shipped files."""
    module = import_module(f"{kernel.__name__}.tuning")
    monkeypatch.setattr(import_module(f"{kernel.__name__}.tuned_files"), "CONFIGS", tmp_path)
    module.experts_table.cache_clear()
    yield module
    module.experts_table.cache_clear()
