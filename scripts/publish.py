#!/usr/bin/env python3
"""Uploads the staged build to a kernel repository on the Hub, from where `kernels.get_kernel` loads it.

As kernel-builder does: variants and benchmarks go to the branch v<version>, CARD.md becomes the README of the main
branch. Only a build of the commit that is checked out, with nothing uncommitted beside it, is uploaded.
"""

from __future__ import annotations

import argparse
import ast
import json
import shutil
import tempfile
from pathlib import Path

from jinja2 import Template

import build


def checked_commit() -> str:
    """The commit that is published, provided that it is all there is in the checkout."""
    commit = build.git("rev-parse", "HEAD")
    if commit is None:
        raise SystemExit("not published: this is not a git checkout with a commit")
    if changes := build.git("status", "--porcelain"):
        raise SystemExit(f"not published: uncommitted changes, commit or remove them first\n{changes}")
    return commit


def checked_files(variant: Path, id: str) -> list[Path]:
    """The variant's files, provided that this commit was built and nobody has touched the result."""
    if not (variant / "metadata.json").is_file():
        raise SystemExit(f"not published: {variant} does not exist, run `make build`")
    metadata = json.loads((variant / "metadata.json").read_text())
    if metadata["id"] != id:
        raise SystemExit(f"not published: {variant} is {metadata['id']}, this commit is {id}, run `make build`")
    files = build.digests(variant)
    if changed := files.items() ^ metadata["digest"]["files"].items():
        names = ", ".join(sorted({name for name, _ in changed}))
        raise SystemExit(f"not published: {variant} changed after the build ({names}), run `make build`")
    # The digests leave out the metadata, which hold them, and the metadata's signature, if they are signed.
    signature = [path.name for path in [variant / "metadata.json.sigstore"] if path.exists()]
    return [variant / name for name in sorted([*files, "metadata.json", *signature])]


def public_names() -> tuple[list[str], list[str]]:
    """What `__all__` lists, and the layers; read without an import, as kernel-builder does."""
    body = ast.parse((build.package() / "__init__.py").read_text()).body
    lists = {ast.unparse(node.targets[0]): node.value for node in body if isinstance(node, ast.Assign)}
    names = [name for name in ast.literal_eval(lists["__all__"]) if name != "layers"]
    body = ast.parse((build.package() / "layers.py").read_text()).body
    classes = [node.name for node in body if isinstance(node, ast.ClassDef)]
    return names, [name for name in classes if not name.startswith("_")]


def render_card(repo_id: str) -> str:
    """CARD.md with its placeholders filled in, the same that kernel-builder fills in when it publishes."""
    general = build.config()["general"]
    functions, layers = public_names()
    return Template((build.ROOT / "CARD.md").read_text(), trim_blocks=True).render(
        repo_id=repo_id,
        version=general["version"],
        functions=functions,
        layers=layers,
        has_benchmark=(build.ROOT / "benchmarks/benchmark.py").exists(),
        source=general["source"],
        license=general["license"].lower(),
    )


def upload(repo_id: str, branch: str, files: dict[str, Path], card: str, message: str, private: bool) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    repo = {"repo_id": repo_id, "repo_type": "kernel"}
    try:
        api.create_repo(**repo, private=private or None, exist_ok=True)  # None: as the organisation has it by default
        api.create_branch(**repo, branch=branch, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            for path_in_repo, path in files.items():
                copy = Path(folder, path_in_repo)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
            # What an earlier build of this version left must go: digests cover everything in a variant's directory.
            stale = ["build/*", "benchmarks/benchmark*"]
            api.upload_folder(
                **repo, revision=branch, folder_path=folder, delete_patterns=stale, commit_message=message
            )
        api.upload_file(**repo, path_or_fileobj=card.encode(), path_in_repo="README.md", commit_message=message)
    except HfHubHTTPError.__bases__ as error:  # the HTTP library's, without an answer, and the system's
        refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
        hint = ": log in with `hf auth login`, or set HF_TOKEN" if refused else ""
        raise SystemExit(f"not published{hint}\n{error}") from None
    return f"{api.endpoint}/kernels/{repo_id}/tree/{branch}"


def main() -> None:
    general = build.config()["general"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repo-id", default=general["hub"]["repo-id"], help="default: %(default)s")
    parser.add_argument("--private", action="store_true", help="if the repository is new, create it as private")
    parser.add_argument("--dry-run", action="store_true", help="list what would be uploaded, without any network")
    args = parser.parse_args()

    commit = checked_commit()
    files = {f"benchmarks/{path.name}": path for path in sorted((build.ROOT / "benchmarks").glob("benchmark*.py"))}
    for variant, id in build.variants().items():
        for path in checked_files(build.ROOT / "build" / variant, id):
            files[path.relative_to(build.ROOT).as_posix()] = path
    card = render_card(args.repo_id)

    branch = f"v{general['version']}"
    print(f"{args.repo_id}, branch {branch}: {len(files)} files of commit {commit}")
    if args.dry_run:
        sizes = {path_in_repo: path.stat().st_size for path_in_repo, path in files.items()}
        for path_in_repo, size in [*sizes.items(), ("README.md (branch main)", len(card.encode()))]:
            print(f"{size:>10,}  {path_in_repo}")
    else:
        print("published", upload(args.repo_id, branch, files, card, f"Build of {commit}", args.private))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped by Ctrl-C: run it again, an upload begins anew") from None
