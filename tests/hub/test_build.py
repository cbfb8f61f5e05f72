"""The staged build is what kernel-builder's own parser, and the Hub, expect."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys

import pytest
import torch
from kernels import Metadata

# kernel-builder's own parsers. Their public package, kernels-data, ends at 0.16.2, without Build and provenance.
from kernels._rust import Backend, Build, Digest, DigestAlgorithm

from suite import PACKAGE, REPO_ID, ROOT

BUILD = runpy.run_path(str(ROOT / "scripts/build.py"))
VARIANTS = {"torch-cpu": Backend.CPU, "torch-cuda": Backend.CUDA, "torch-rocm": Backend.ROCm}


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the build needs, outside any git checkout."""
    shutil.copytree(PACKAGE, tmp_path / "torch-ext/moe_grouped_gemm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "build.toml", tmp_path / "build.toml")
    return tmp_path


def stage(checkout):
    """Builds and returns the id of the CPU variant."""
    # Whatever lies above the temporary directory, git does not look there.
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(checkout.parent)}
    subprocess.run([sys.executable, checkout / "scripts/build.py"], check=True, env=env, stdout=subprocess.DEVNULL)
    return Metadata.read_from_file(checkout / "build/torch-cpu/metadata.json").id


def git(checkout, *args):
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(["git", "-C", checkout, *identity, *args], check=True, capture_output=True)


def commit(checkout):
    git(checkout, "add", "-A")
    git(checkout, "commit", "--allow-empty", "-m", "test")


def test_build_toml():
    build = Build.open(ROOT)
    assert set(build.general.backends) == set(VARIANTS.values())
    assert not any(build.all_kernel_depends(backend) for backend in VARIANTS.values())
    general = BUILD["config"]()["general"]
    assert (general["name"], general["hub"]["repo-id"]) == ("moe-grouped-gemm", REPO_ID)
    versions = re.findall(r"get_kernel\([^)]*version=(\d+)", (ROOT / "README.md").read_text())
    assert set(versions) == {str(general["version"])}


@pytest.mark.parametrize("variant", VARIANTS)
def test_metadata(variant):
    metadata = Metadata.read_from_file(ROOT / "build" / variant / "metadata.json")
    assert str(metadata.name) == "moe-grouped-gemm"
    assert metadata.version == BUILD["config"]()["general"]["version"]
    assert metadata.license == "Apache-2.0"
    assert metadata.source == BUILD["config"]()["general"]["source"]
    assert metadata.backend.backend_type == VARIANTS[variant]
    assert metadata.python_depends == [] and metadata.kernel_depends == []
    assert metadata.digest.algorithm == DigestAlgorithm.SHA256
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, ROOT / "build" / variant))
    assert metadata.id.isidentifier()


@pytest.mark.parametrize("variant", VARIANTS)
def test_files_are_the_sources(checkout, variant):
    (checkout / "torch-ext/moe_grouped_gemm/configs").mkdir(exist_ok=True)
    (checkout / "torch-ext/moe_grouped_gemm/configs/tuned.json").write_text("{}")
    (checkout / "torch-ext/moe_grouped_gemm/notes.txt").write_text("not in pyext")
    (checkout / "torch-ext/moe_grouped_gemm/_ops.py").write_text("left by kernel-builder")
    (checkout / "torch-ext/moe_grouped_gemm/__pycache__").mkdir()
    (checkout / "torch-ext/moe_grouped_gemm/__pycache__/x.pyc").write_text("")
    stage(checkout)
    sources = {path.relative_to(PACKAGE) for suffix in ("py", "json") for path in PACKAGE.rglob(f"*.{suffix}")}
    built = checkout / "build" / variant
    files = {path.relative_to(built) for path in built.rglob("*") if path.is_file()}
    extra = {str(path) for path in files - sources}
    assert extra == {"_ops.py", "metadata.json", "configs/tuned.json"} and sources <= files
    assert all((built / path).read_bytes() == (PACKAGE / path).read_bytes() for path in sources if path.stem != "_ops")


def test_provenance(checkout):
    def provenance():
        stage(checkout)
        return Metadata.read_from_file(checkout / "build/torch-cpu/metadata.json").provenance

    assert provenance().kernel is None and not provenance().dirty
    (checkout / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    git(checkout, "init")
    commit(checkout)
    head = (checkout / ".git/HEAD").read_text().split()[1]
    assert provenance().kernel.commit == (checkout / ".git" / head).read_text().strip()
    assert not provenance().dirty
    (checkout / "torch-ext/moe_grouped_gemm/untracked.py").write_text("")
    assert provenance().kernel.dirty and provenance().dirty


def test_digests_are_those_of_kernels(checkout):
    stage(checkout)
    variant = checkout / "build/torch-cpu"
    (variant / "__pycache__").mkdir()
    for name in ("metadata.json.sigstore", "__pycache__/layers.cpython-311.pyc", "configs/metadata.json"):
        (variant / name).write_text(name)
    assert BUILD["digests"](variant) == Digest.hash_variant(DigestAlgorithm.SHA256, variant).files


def test_links_are_refused(checkout):
    (checkout / "torch-ext/moe_grouped_gemm/link.py").symlink_to("layers.py")
    with pytest.raises(subprocess.CalledProcessError):
        stage(checkout)


def test_every_commit_has_ops_of_its_own(checkout):
    without_git = stage(checkout)
    assert stage(checkout) == without_git
    (checkout / "torch-ext/moe_grouped_gemm/new.py").write_text("x = 1\n")
    assert stage(checkout) != without_git

    (checkout / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    git(checkout, "init")
    commit(checkout)
    first = stage(checkout)
    assert re.fullmatch("_moe_grouped_gemm_cpu_[0-9a-f]{7}", first)
    commit(checkout)
    second = stage(checkout)
    assert second != first and stage(checkout) == second

    (checkout / "torch-ext/moe_grouped_gemm/new.py").write_text("x = 2\n")
    assert stage(checkout) == f"{second}_dirty"
    git(checkout, "checkout", ".")
    assert stage(checkout) == second
    (checkout / "torch-ext/moe_grouped_gemm/untracked.py").write_text("")
    assert stage(checkout) == f"{second}_dirty"


def test_staging_again_replaces_everything(checkout):
    stage(checkout)
    (checkout / "build/torch-cpu/leftover.py").write_text("")
    (checkout / "torch-ext/moe_grouped_gemm/layers.py").unlink()
    stage(checkout)
    assert not (checkout / "build/torch-cpu/leftover.py").exists()
    assert not (checkout / "build/torch-cpu/layers.py").exists()
    assert sorted(os.listdir(checkout / "build")) == sorted(VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_ops_py(variant):
    """What kernel-builder generates: a namespace of its own, which is the variant's id."""
    id = json.loads((ROOT / "build" / variant / "metadata.json").read_text())["id"]
    ops = runpy.run_path(str(ROOT / "build" / variant / "_ops.py"))
    assert ops["add_op_namespace_prefix"]("route") == f"{id}::route"
    assert ops["ops"] is getattr(torch.ops, id)


def test_suite_poisons_memory_that_nobody_wrote():
    assert torch.empty(8).isnan().all()


def test_kernel_src_shows_the_device_code():
    link = ROOT / "kernel_src"
    assert link.is_symlink() and not os.path.isabs(os.readlink(link))
    assert link.resolve() == PACKAGE / "kernels"
