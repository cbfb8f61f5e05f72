"""compute-sanitizer over the tests of the kernels by themselves; minutes, so marked apart from other GPU tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PARTS = 8


@pytest.mark.memcheck
@pytest.mark.parametrize("part", range(1, PARTS + 1))
def test_memcheck_finds_nothing(part):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    # Not the variants of the layer: the sanitizer is slow.
    files = [Path(__file__).with_name(f"test_{name}.py") for name in ("kernels", "router_kernels")]
    tests = [*files, "-k", "float or route or offsets"]
    pytest_part = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--part={part}/{PARTS}", *tests]
    run = subprocess.run(
        [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", *pytest_part],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert "ERROR SUMMARY: 0 errors" in run.stdout and " passed" in run.stdout
