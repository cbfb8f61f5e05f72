#!/usr/bin/env python3
"""Stages build/torch-<backend> for every backend of build.toml, as kernel-builder does, without Nix.

A variant is the package's files, a generated `_ops.py` and `metadata.json`. Releases are built by kernel-builder.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # a dependency of `kernels` there

ROOT = Path(__file__).resolve().parent.parent

OPS_PY = '''\
import torch

ops = torch.ops.{id}


def add_op_namespace_prefix(op_name: str) -> str:
    """
    Prefix op by namespace.
    """
    return f"{id}::{{op_name}}"
'''


def config() -> dict:
    return tomllib.loads((ROOT / "build.toml").read_text())


def package() -> Path:
    return ROOT / "torch-ext" / config()["general"]["name"].replace("-", "_")


def sources() -> list[Path]:
    """Files that ship, relative to the package."""
    suffixes = {f".{extension}" for extension in config()["torch-noarch"]["pyext"]}
    files = []
    for path in sorted(package().rglob("*")):
        if path.is_symlink():
            raise SystemExit(f"{path} is a link: kernel-builder would leave it out of the build silently")
        if path.suffix in suffixes:
            files.append(path.relative_to(package()))
    return files


def git(*args: str) -> str | None:
    """Output of a git command in this checkout; None without git, a checkout or a first commit."""
    try:
        return subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def revision() -> str:
    """Short commit, with `_dirty` if the checkout differs from it; without a commit, a hash of the sources.

    Unlike kernel-builder's, an untracked file makes the build dirty: it may ship, and is in no commit.
    """
    commit = git("rev-parse", "HEAD")
    if commit is None:
        content = hashlib.sha1()
        for path in sources():
            content.update(path.as_posix().encode() + b"\0" + (package() / path).read_bytes())
        return content.hexdigest()[:7]
    return commit[:7] + ("_dirty" if git("status", "--porcelain") else "")


def variants() -> dict[str, str]:
    """The directory name of each variant, and the id that this checkout gives it.

    `kernels` imports the variant under its id, and torch ops are registered in the namespace of that name: two
    commits, or two backends, can be loaded into one process.
    """
    rev = revision()
    return {f"torch-{backend}": f"_{package().name}_{backend}_{rev}" for backend in config()["general"]["backends"]}


def digests(variant: Path) -> dict[str, str]:
    """The SHA-256 of each file of a variant, but for its metadata and their signature, as `kernels` checks them."""
    files = {path.relative_to(variant).as_posix(): path for path in sorted(variant.rglob("*")) if path.is_file()}
    return {
        name: base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for name, path in files.items()
        if path.suffix != ".pyc" and name not in ("metadata.json", "metadata.json.sigstore")
    }


def provenance() -> dict:
    """What `kernels` warns by when it loads a build of uncommitted changes."""
    commit = git("rev-parse", "HEAD")
    kernel = {"kernel": {"commit": commit, "dirty": revision().endswith("_dirty")}} if commit else {}
    return {"kernel-builder": {"version": "none, scripts/build.py"}, **kernel}


def write_variant(variant: Path, id: str) -> None:
    for path in sources():
        copy = variant / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(package() / path, copy)
    (variant / "_ops.py").write_text(OPS_PY.format(id=id))
    general = config()["general"]
    metadata = {
        "name": general["name"],
        "id": id,
        "version": general["version"],
        "license": general["license"],
        "source": general["source"],
        "python-depends": [],
        "backend": {"type": variant.name.split("-", 1)[1]},
        "digest": {"algorithm": "sha256", "files": digests(variant)},
        "provenance": provenance(),
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def stage(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".staging-", dir=out) as staging:
        for variant, id in variants().items():
            new, old = Path(staging, "new", variant), Path(staging, f"old-{variant}")
            write_variant(new, id)
            # Renames, so that whoever imports the variant meanwhile meets the old or the new one, never half of one.
            if (out / variant).exists():
                (out / variant).rename(old)
            new.rename(out / variant)
            print(f"{out / variant}: {id}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build", help="default: build/")
    stage(parser.parse_args().out)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        raise SystemExit(f"not built: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("not built: stopped by Ctrl-C") from None
