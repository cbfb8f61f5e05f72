"""A stand-in for the Hugging Face Hub: what `huggingface_hub` and `kernels` need to publish and pull a kernel.

Repositories live in memory, as branches that point to commits and commits that are whole trees. Files travel inline
(upload mode "regular"), as the real Hub has it for small text files, so neither LFS nor Xet is ever needed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


class Repo:
    def __init__(self, visibility: str):
        self.visibility = visibility
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.commit("main", {})

    def commit(self, branch: str, tree: dict[str, bytes]) -> str:
        content = repr((len(self.commits), sorted(tree.items()))).encode()
        sha = hashlib.sha1(content).hexdigest()
        self.commits[sha] = tree
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, a ref or a commit id stands for."""
        sha = self.branches.get(revision.removeprefix("refs/heads/"), revision)
        return sha if sha in self.commits else None


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubError(Exception):
    """An error as the Hub reports it: a status, and a code that `huggingface_hub` turns into its exception."""

    def __init__(self, status: int, code: str):
        super().__init__(code)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    # One method per endpoint, found by the first pattern that matches the whole path.
    ROUTES = [
        ("POST", r"/api/repos/create", "create_repo"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/kernels/(\w+/[\w-]+)/branch/(.+)", "create_branch"),
        ("POST", r"/api/kernels/(\w+/[\w-]+)/preupload/(.+)", "preupload"),
        ("POST", r"/api/kernels/(\w+/[\w-]+)/commit/(.+)", "commit"),
        ("GET", r"/api/organizations/(\w+)/overview", "organization"),
        ("GET", r"/api/kernels/(\w+/[\w-]+)/refs", "refs"),
        ("GET", r"/api/kernels/(\w+/[\w-]+)/revision/(.+)", "repo_info"),
        ("GET", r"/api/kernels/(\w+/[\w-]+)/tree/([^/]+)(?:/(.+))?", "tree"),
        ("GET", r"/kernels/(\w+/[\w-]+)/resolve/([^/]+)/(.+)", "download"),
    ]

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        self.recursive = "recursive=true" in url.query.lower()
        self.server.requests.append((self.command, url.path))
        try:
            if self.command == "POST" and "Authorization" not in self.headers:
                raise HubError(401, "Unauthorized")
            for method, pattern, endpoint in self.ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and method == self.command.replace("HEAD", "GET"):
                    arguments = [group and unquote(group) for group in match.groups()]
                    return getattr(self, endpoint)(*arguments, *([body] if body else []))
            raise HubError(404, "NotFound")
        except HubError as error:
            self.reply({"error": error.code}, error.status, {"X-Error-Code": error.code})

    do_GET = do_HEAD = do_POST = handle_request

    def reply(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Quiet: the tests look at `requests`."""

    def repo(self, repo_id: str) -> Repo:
        if repo_id not in self.server.repos:
            raise HubError(404, "RepoNotFound")
        return self.server.repos[repo_id]

    def repo_tree(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self.repo(repo_id)
        sha = repo.resolve(revision)
        if sha is None:
            raise HubError(404, "RevisionNotFound")
        return sha, repo.commits[sha]

    # Publishing.

    def create_repo(self, body: bytes) -> None:
        request = json.loads(body)
        repo_id = f"{request['organization']}/{request['name']}"
        if request["type"] != "kernel":
            raise HubError(400, "OnlyKernels")
        exists = repo_id in self.server.repos
        if not exists:
            self.server.repos[repo_id] = Repo(request.get("visibility", "public"))
        self.reply({"url": f"{self.server.url}/kernels/{repo_id}"}, 409 if exists else 200)

    def create_branch(self, repo_id: str, branch: str, body: bytes) -> None:
        repo = self.repo(repo_id)
        if branch in repo.branches:
            raise HubError(409, "Exists")
        repo.branches[branch] = repo.branches["main"]
        self.reply({})

    def validate_yaml(self, body: bytes) -> None:
        _, front_matter, _ = json.loads(body)["content"].split("---\n", 2)
        errors = [] if "license" in yaml.safe_load(front_matter) else [{"message": "no license"}]
        self.reply({"errors": errors}, 400 if errors else 200)

    def preupload(self, repo_id: str, revision: str, body: bytes) -> None:
        _, tree = self.repo_tree(repo_id, revision)
        paths = [file["path"] for file in json.loads(body)["files"]]
        oids = {path: blob_id(tree[path]) if path in tree else None for path in paths}
        modes = {"uploadMode": "regular", "shouldIgnore": False}
        self.reply({"files": [{"path": path, "oid": oid, **modes} for path, oid in oids.items()]})

    def commit(self, repo_id: str, branch: str, body: bytes) -> None:
        _, tree = self.repo_tree(repo_id, branch)
        tree = dict(tree)
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "deletedFile":
                del tree[value["path"]]
        sha = self.repo(repo_id).commit(branch, tree)
        self.reply({"commitUrl": f"{self.server.url}/kernels/{repo_id}/commit/{sha}", "commitOid": sha})

    # Pulling.

    def organization(self, name: str) -> None:
        if name not in self.server.organizations:
            raise HubError(404, "NotFound")
        trusted = self.server.organizations[name]
        self.reply({"name": name, "fullname": name, "avatarUrl": "", "trustedKernelPublisher": trusted})

    def refs(self, repo_id: str) -> None:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
            for name, sha in self.repo(repo_id).branches.items()
        ]
        self.reply({"branches": branches, "converts": [], "tags": []})

    def repo_info(self, repo_id: str, revision: str) -> None:
        sha, _ = self.repo_tree(repo_id, revision)
        self.reply({"id": repo_id, "sha": sha})

    def tree(self, repo_id: str, revision: str, folder: str | None) -> None:
        _, tree = self.repo_tree(repo_id, revision)
        prefix = f"{folder}/" if folder else ""
        entries = {}
        for path, content in tree.items():
            if not path.startswith(prefix):
                continue
            *parents, _ = path[len(prefix) :].split("/")
            folders = [prefix + "/".join(parents[: depth + 1]) for depth in range(len(parents))]
            for parent in folders if self.recursive else folders[:1]:
                entries[parent] = {"type": "directory", "path": parent, "oid": ""}
            if self.recursive or not parents:
                entries[path] = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
        if folder and not entries:
            raise HubError(404, "EntryNotFound")
        self.reply(list(entries.values()))

    def download(self, repo_id: str, revision: str, path: str) -> None:
        sha, tree = self.repo_tree(repo_id, revision)
        if path not in tree:
            raise HubError(404, "EntryNotFound")
        self.reply(tree[path], headers={"ETag": f'"{blob_id(tree[path])}"', "X-Repo-Commit": sha})


class HubServer(ThreadingHTTPServer):
    """`with HubServer() as hub:` serves at `hub.url` until the block ends."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.organizations: dict[str, bool] = {"org": False}  # is it a trusted publisher of kernels?
        self.requests: list[tuple[str, str]] = []

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.shutdown()
        self.server_close()
