"""Every kernel compiles for every GPU of the supported table, with the oldest Triton and in part with the newest."""

import os
import subprocess
import sys

import pytest

from conftest import ROOT


# The newest for the two that have kernels or instructions of their own.
@pytest.mark.parametrize("version, targets", [("3.6.0", ""), ("3.9.0", "90,100")])
def test_kernels_compile(version, targets):
    triton = ROOT / f".venv/triton-{version}"
    assert triton.is_dir(), "`make venv` installs it"
    result = subprocess.run(
        [sys.executable, ROOT / "tests/compile_kernels.py"],
        env={**os.environ, "PYTHONPATH": str(triton), "TARGETS": targets},
        capture_output=True,
        text=True,
    )
    faults = [line for line in result.stdout.splitlines() if not line.startswith("ok")]
    assert result.returncode == 0, "\n".join(faults) + result.stderr[-4000:]
    assert result.stdout.count("ok ") > 200
