"""Tests of kernels: on a GPU or, in processes of their own, under Triton's interpreter.

It is chosen when Triton is imported, and torch.compile does not work beside it.
"""

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter multiplies the raw bits of bf16. On a GPU either 16-bit type shows what the other would.
DTYPES = [torch.float16 if INTERPRETED else torch.bfloat16, torch.float32]
ROWS_FIRST = {"BLOCK_M": 128, "MIN_M": 64, "num_warps": 8}  # tall tiles in 4 warps take twice as long to compile


def on_triton(test):
    return test if INTERPRETED else pytest.mark.gpu(test)


def under_the_interpreter(file, parts=1):
    """A test for each part of the file's tests, so that workers share them; skipped where they run on a GPU."""

    @pytest.mark.long
    @pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the other tests run in this process")
    @pytest.mark.parametrize("part", range(1, parts + 1))
    def test_under_the_interpreter(part):
        options = ["-q", "-p", "no:cacheprovider", "--no-header", f"--part={part}/{parts}"]
        command = [sys.executable, "-m", "pytest", *options, file]
        subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)

    return test_under_the_interpreter


def enter_no_device(monkeypatch):
    """Where there is none. Not on a GPU: Triton keeps the functions that it finds when it first launches a kernel."""
    if INTERPRETED:
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)  # as the tensors' own
        monkeypatch.setattr(torch.cuda, "device_of", lambda x: nullcontext())
