"""What kernel-builder's `nix run .#ci-test` runs: the marked tests, from the files and packages that it has."""

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from suite import REPO_ID, ROOT


@pytest.fixture
def packages(tmp_path):
    """A folder with torch, `kernels`, pytest and what they depend on, and nothing else that is installed here."""
    folder, needed, todo = tmp_path / "packages", set(), ["torch", "kernels", "pytest"]
    folder.mkdir()
    while todo:
        name = canonicalize_name(todo.pop())
        if name in needed:
            continue
        needed.add(name)
        distribution = metadata.distribution(name)
        for entry in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            (folder / entry).symlink_to(distribution.locate_file(entry))
        requirements = map(Requirement, distribution.requires or [])
        todo += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert not needed & {"transformers", "peft", "hypothesis", "pytest-xdist"}
    return folder


@pytest.fixture
def source(tmp_path):
    """The files that kernel-builder copies."""
    for folder in ("tests", "torch-ext"):
        shutil.copytree(ROOT / folder, tmp_path / "source" / folder, ignore=ignore_by_suffix)
    shutil.copyfile(ROOT / "build.toml", tmp_path / "source/build.toml")
    return tmp_path / "source"


def ignore_by_suffix(folder, names):
    files = [name for name in names if not os.path.isdir(os.path.join(folder, name))]
    return {"__pycache__", *(name for name in files if not name.endswith((".py", ".json")))}


def test_ci_test(source, packages, tmp_path):
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    env["LOCAL_KERNELS"] = f"{REPO_ID}={ROOT / 'build'}"
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "build/torch-cpu"), str(packages)])
    env["CUDA_VISIBLE_DEVICES"] = ""
    # -S: without the packages of this environment.
    command = [sys.executable, "-S", "-m", "pytest", source / "tests", "-m", "kernels_ci", "-p", "no:cacheprovider"]
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) > 30
