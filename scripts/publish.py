#!/usr/bin/env python3
"""Uploads the staged build to a kernel repository on the Hub, from where `kernels.get_kernel` loads it.

As kernel-builder does: variants and benchmarks go to the branch v<version>, CARD.md becomes the README of the main
branch. Only a build of the commit that is checked out, with nothing uncommitted beside it, is uploaded.
"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
from pathlib import Path

from kernels._rust import Digest, DigestValidationError, Metadata

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
    metadata = Metadata.read_from_file(variant / "metadata.json")
    if metadata.id != id:
        raise SystemExit(f"not published: {variant} is {metadata.id}, this commit is {id}, run `make build`")
    actual = Digest.hash_variant(metadata.digest.algorithm, variant)
    try:
        metadata.digest.validate(actual)
    except DigestValidationError as error:
        raise SystemExit(f"not published: {variant} changed after the build, run `make build`\n{error}") from None
    # The digest leaves out the metadata, which holds it, and the metadata's signature, if it is signed.
    signature = [path.name for path in [variant / "metadata.json.sigstore"] if path.exists()]
    return [variant / path for path in sorted([*actual.files, "metadata.json", *signature])]


def render_card(repo_id: str, license: str) -> str:
    """CARD.md with its placeholders filled in; kernel-builder knows the same ones, and more."""
    values = {"repo_id": repo_id, "license": license.lower()}
    return re.sub(r"\{\{ (\w+) \}\}", lambda match: values[match[1]], (build.ROOT / "CARD.md").read_text())


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
    card = render_card(args.repo_id, general["license"])

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
