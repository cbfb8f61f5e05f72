"""Every supported Transformers, in an environment of its own; `make environments` makes them (scripts/versions.py)."""

import os
import runpy
import subprocess
import warnings
from importlib import import_module
from pathlib import Path

import pytest

from moe_models import experts_classes, router_classes
from suite import HELPERS, ROOT

versions = runpy.run_path(str(ROOT / "scripts/versions.py"))


REFUSE_KERNELS = versions["REFUSE_KERNELS"]


def start(version, *args):
    python = versions["python"](version)
    if not python.exists():
        pytest.skip("`make environments` installs it")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([python, *args], env=env, capture_output=True, text=True)


def run(version, folder, kernels_are):
    return start(version, HELPERS / "versions_worker.py", version, versions["VERSIONS"][version], folder, kernels_are)


def assert_runs(*args):
    result = run(*args)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("version", [v for v in versions["VERSIONS"] if v >= "5.17" and v not in REFUSE_KERNELS])
def test_ways_2_and_3(version, tmp_path):
    assert_runs(version, tmp_path, "as_released")


@pytest.mark.parametrize("version", REFUSE_KERNELS)
def test_way_3_and_kernelize_where_kernels_are_refused(version, tmp_path):
    """As released: register() warns, and way 2 ends in Transformers' own error."""
    assert_runs(version, tmp_path, "refused")


@pytest.mark.parametrize("version", REFUSE_KERNELS)
def test_ways_2_and_3_with_the_minimum_for_kernels_lowered(version, tmp_path):
    """Not as released: until the `kernels` that it wants is out, nothing else would test the rest."""
    assert_runs(version, tmp_path, "accepted")


def test_the_table_is_of_the_newest_and_its_new_experts_are_tested():
    """By way 3, what the Transformers of all other tests does not have; and the classes without the decorator."""
    newest = list(versions["VERSIONS"])[-1]
    where = start(newest, "-c", "from importlib.util import find_spec; print(find_spec('transformers').origin)").stdout
    assert f"classes of transformers {newest}:" in (ROOT / "docs/models.md").read_text(encoding="utf-8")
    new = set()
    for classes in (experts_classes, router_classes):
        new |= {entry.name for entry in classes(Path(where).parent)} - {entry.name for entry in classes()}
    tests = " or ".join(["test_table", "(undecorated and (test_all or test_model))", *new])
    files = [ROOT / f"tests/integration/test_{name}.py" for name in ("blocks", "coverage", "routers", "undecorated")]
    result = start(newest, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", *files, "-k", tests)
    assert result.returncode == 0 and "skipped" not in result.stdout, result.stdout + result.stderr


def test_an_older_one_is_refused(tmp_path):
    result = run("5.16.1", tmp_path, "as_released")
    assert result.returncode == 0, result.stderr
    assert result.stdout == (
        "moe-grouped-gemm.register() needs transformers >= 5.17 with a version of kernels that it supports: "
        "found transformers 5.16.1\n"
    )


def test_one_warning_where_kernels_are_refused(kernel, monkeypatch):
    module = import_module(f"{kernel.__name__}.integration.versions")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.check_versions()
    monkeypatch.setattr("transformers.utils.is_kernels_available", lambda: False)
    with pytest.warns(UserWarning, match=r"wants kernels >= .* `pip install .transformers\[kernels\].`"):
        module.check_versions()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.check_versions()
