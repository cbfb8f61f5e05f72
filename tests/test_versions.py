"""Every supported Transformers, in an environment of its own; `make environments` makes them (scripts/versions.py)."""

import os
import runpy
import subprocess

import pytest

from conftest import ROOT

versions = runpy.run_path(str(ROOT / "scripts/versions.py"))


def run(version, folder):
    python = versions["python"](version)
    if not python.exists():
        pytest.skip("`make environments` installs it")
    worker = [python, ROOT / "tests/versions_worker.py", version, versions["VERSIONS"][version], folder]
    return subprocess.run(worker, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


@pytest.mark.parametrize("version", [version for version in versions["VERSIONS"] if version >= "5.17"])
def test_ways_2_and_3(version, tmp_path):
    result = run(version, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_an_older_one_is_refused(tmp_path):
    result = run("5.16.1", tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == (
        "moe-grouped-gemm.register() needs transformers >= 5.17 with a version of kernels that it supports: "
        "found transformers 5.16.1\n"
    )
