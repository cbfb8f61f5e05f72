"""Every kernel compiles for every GPU of the supported table, with the oldest Triton; in part with newer ones.

`make test` takes one kernel of each kind, for the GPU that has kernels of its own and for two that are unlike it; all
are marked matrix. What has not changed since the last run comes from Triton's cache.
"""

import os
import subprocess
import sys

import pytest

from compile_kernels import TARGETS
from suite import HELPERS, ROOT

ONE_OF_EACH = [("3.6.0", "sm_90"), ("3.9.0", "sm_90"), ("3.6.0", "sm_80"), ("3.6.0", "gfx942")]
MATRIX = [("3.6.0", gpu) for gpu in TARGETS] + [("3.9.0", "sm_90")]
MATRIX_OF_EACH = [("3.8.0", "sm_90"), ("3.8.0", "sm_100"), ("3.9.0", "sm_80"), ("3.9.0", "sm_100")]


def compile_kernels(version, *arguments):
    """The lines of the kernels that are as they should be."""
    triton = ROOT / f".venv/triton-{version}"
    assert triton.is_dir(), "`make venv` installs it"
    result = subprocess.run(
        [sys.executable, HELPERS / "compile_kernels.py", *arguments],
        env={**os.environ, "PYTHONPATH": str(triton)},
        capture_output=True,
        text=True,
    )
    lines = result.stdout.splitlines()
    faults = [line for line in lines if not line.startswith("ok")]
    assert result.returncode == 0, "\n".join(faults) + result.stderr[-4000:]
    return lines


@pytest.mark.long
@pytest.mark.parametrize(
    "version, gpu", [*ONE_OF_EACH, *(pytest.param(*case, marks=pytest.mark.matrix) for case in MATRIX_OF_EACH)]
)
def test_one_of_each_compiles(version, gpu):
    assert len(compile_kernels(version, "--one-of-each", gpu)) > 40


@pytest.mark.long
@pytest.mark.matrix
@pytest.mark.parametrize("version, gpu", MATRIX)
def test_all_compile(version, gpu):
    assert len(compile_kernels(version, gpu)) > 100
