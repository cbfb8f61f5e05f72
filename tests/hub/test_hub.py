"""Publish and pull for real: scripts/publish.py and `kernels.get_kernel` against a Hub on 127.0.0.1."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kernels import Metadata
from kernels.verify import Digest, VerificationResult, verify_variant

from hub_server import HubServer, Repo
from suite import REPO_ID, ROOT

PULL_AND_RUN = """
import torch
from kernels import get_kernel

moe = get_kernel("org/moe-grouped-gemm", version=1, trust_remote_code=True)

T, E, top_k, H, I = 7, 4, 2, 16, 12
torch.manual_seed(0)
x, ids, weights = torch.randn(T, H), torch.randint(E, (T, top_k)), torch.rand(T, top_k)
gate_up, down = torch.randn(E, 2 * I, H), torch.randn(E, H, I)
out = moe.moe_experts(x, ids, weights, gate_up, down)
x, weights, gate_up, down = x.double(), weights.double(), gate_up.double(), down.double()
expected = torch.zeros_like(x)
for t in range(T):
    for k in range(top_k):
        gate, up = (gate_up[ids[t, k]] @ x[t]).chunk(2)
        expected[t] += weights[t, k] * (down[ids[t, k]] @ (torch.nn.functional.silu(gate) * up))
# Sums of 16 and 12 products, each of which is rounded, and of different signs.
assert (out - expected).abs().max() <= 16 * torch.finfo(torch.float32).eps * expected.abs().max()
print(moe.__file__)
"""


def run(*command, cwd=None, **env):
    """A command as a user types it: none of the suite's own settings, but those of `env`."""
    ours = ("LOCAL_KERNELS", "HF_HUB_OFFLINE", "HF_TOKEN")
    env = {**{key: value for key, value in os.environ.items() if key not in ours}, "NO_PROXY": "127.0.0.1", **env}
    command = [str(word) for word in command]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def git(checkout, *args):
    return run("git", "-C", checkout, "-c", "user.name=test", "-c", "user.email=test@localhost", *args)


def commit(checkout):
    git(checkout, "add", "-A")
    git(checkout, "commit", "-m", "test")
    return git(checkout, "rev-parse", "HEAD").stdout.strip()


def build(checkout):
    assert run(sys.executable, checkout / "scripts/build.py").returncode == 0


def publish(checkout, hub, *options, token="hf_test"):
    home = checkout.with_name("publisher-home")
    return run(
        *(sys.executable, checkout / "scripts/publish.py", *options), HF_ENDPOINT=hub.url, HF_HOME=home, HF_TOKEN=token
    )


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def checkout(tmp_path):
    """The project as it is now, committed and built."""
    target = tmp_path / "checkout"
    for folder in ("scripts", "torch-ext"):
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("build.toml", ".gitignore", "CARD.md"):
        shutil.copyfile(ROOT / file, target / file)
    (target / "benchmarks").mkdir()
    shutil.copyfile(ROOT / "benchmarks/benchmark.py", target / "benchmarks/benchmark.py")
    (target / "benchmarks/helper.py").write_text("# not a benchmark\n")
    git(target, "init")
    commit(target)
    build(target)
    return target


def test_publish(checkout, hub):
    result = publish(checkout, hub)
    assert result.returncode == 0, result.stderr
    assert f"published {hub.url}/kernels/{REPO_ID}/tree/v1" in result.stdout

    repo = hub.repos[REPO_ID]
    assert repo.visibility == "public"
    assert set(repo.branches) == {"main", "v1"}
    v1, main = (repo.commits[repo.branches[branch]] for branch in ("v1", "main"))
    staged = {path for path in checkout.glob("build/*/**/*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path for path in v1 if path.startswith("build/")} == {str(path.relative_to(checkout)) for path in staged}
    assert all(v1[str(path.relative_to(checkout))] == path.read_bytes() for path in staged)
    assert "benchmarks/benchmark.py" in v1 and "benchmarks/helper.py" not in v1
    assert f'get_kernel("{REPO_ID}", version=1' in main["README.md"].decode()


def test_publish_again_replaces_the_version(checkout, hub):
    assert publish(checkout, hub, "--private").returncode == 0
    repo = hub.repos[REPO_ID]
    assert repo.visibility == "private"
    assert "build/torch-cpu/reference/gate.py" in repo.commits[repo.branches["v1"]]

    (checkout / "torch-ext/moe_grouped_gemm/reference/gate.py").unlink()
    (checkout / "benchmarks/benchmark.py").unlink()
    commit(checkout)
    build(checkout)
    result = publish(checkout, hub)
    assert result.returncode == 0, result.stderr
    v1 = repo.commits[repo.branches["v1"]]
    assert "build/torch-cpu/reference/gate.py" not in v1 and "benchmarks/benchmark.py" not in v1
    assert "reference/gate.py" not in json.loads(v1["build/torch-cpu/metadata.json"])["digest"]["files"]


def test_a_signature_is_published(checkout, hub):
    """It signs the metadata, whose digest covers all else: the variant is as good with it as without."""
    assert isinstance(verify_variant(checkout / "build/torch-cpu"), VerificationResult.SignatureBundleMissing)
    (checkout / "build/torch-cpu/metadata.json.sigstore").write_text("a signature")
    result = publish(checkout, hub)
    assert result.returncode == 0, result.stderr
    v1 = hub.repos[REPO_ID].commits[hub.repos[REPO_ID].branches["v1"]]
    assert v1["build/torch-cpu/metadata.json.sigstore"] == b"a signature"
    assert "build/torch-cuda/metadata.json.sigstore" not in v1


def test_dry_run_lists_every_file_and_touches_no_network(checkout, hub):
    result = publish(checkout, hub, "--dry-run", "--repo-id", "someone/moe")
    assert result.returncode == 0, result.stderr
    assert hub.requests == [] and hub.repos == {}
    assert "someone/moe, branch v1" in result.stdout
    assert "README.md" in result.stdout
    for path in checkout.glob("build/*/**/*.py"):
        assert f"{path.stat().st_size:>10,}  {path.relative_to(checkout)}\n" in result.stdout


def change_a_source(checkout):
    (checkout / "torch-ext/moe_grouped_gemm/functional.py").write_text("# changed\n")


def add_an_untracked_file(checkout):
    (checkout / "torch-ext/moe_grouped_gemm/extra.py").write_text("# in no commit\n")
    build(checkout)


def commit_after_the_build(checkout):
    change_a_source(checkout)
    commit(checkout)


def change_the_build(checkout):
    (checkout / "build/torch-cuda/functional.py").write_text("# tampered\n")


def add_to_the_build(checkout):
    (checkout / "build/torch-cuda/extra.py").write_text("# smuggled\n")


def remove_a_variant(checkout):
    shutil.rmtree(checkout / "build/torch-cuda")


def leave_git(checkout):
    shutil.rmtree(checkout / ".git")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (change_a_source, "uncommitted changes"),
        (add_an_untracked_file, "uncommitted changes"),
        (commit_after_the_build, "run `make build`"),
        (change_the_build, "changed after the build (functional.py)"),
        (add_to_the_build, "changed after the build (extra.py)"),
        (remove_a_variant, "torch-cuda does not exist"),
        (leave_git, "not a git checkout"),
    ],
)
def test_refuses_what_is_not_exactly_this_commit(checkout, hub, spoil, reason):
    spoil(checkout)
    result = publish(checkout, hub)
    assert result.returncode == 1
    assert result.stderr.startswith("not published: ") and reason in result.stderr
    assert hub.requests == []


def test_without_a_token_the_error_says_what_to_do(checkout, hub):
    result = publish(checkout, hub, token="")
    assert result.returncode == 1
    assert result.stderr.startswith("not published: log in with `hf auth login`")
    assert hub.repos == {}


@pytest.mark.long
def test_pull_and_run_then_offline(checkout, tmp_path):
    home, offline_home = tmp_path / "home", tmp_path / "offline-home"
    with HubServer() as hub:
        assert publish(checkout, hub).returncode == 0

        result = run(sys.executable, "-c", PULL_AND_RUN, HF_ENDPOINT=hub.url, HF_HOME=home)
        assert result.returncode == 0, result.stderr
        variant = Path(result.stdout.strip()).parent
        assert variant.is_relative_to(home) and variant.name == "torch-cpu"
        metadata = Metadata.read_from_file(variant / "metadata.json")
        metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, variant))

        hf_download = ("-m", "huggingface_hub.cli.hf", "download", REPO_ID, "--type", "kernel", "--revision", "v1")
        result = run(sys.executable, *hf_download, HF_ENDPOINT=hub.url, HF_HOME=offline_home)
        assert result.returncode == 0, result.stderr

    # The server is gone: every request would fail, if HF_HUB_OFFLINE did not forbid it in the first place.
    offline = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"}
    result = run(sys.executable, "-c", PULL_AND_RUN, HF_HOME=offline_home, **offline)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).is_relative_to(offline_home)

    # A pull alone does not do: it looks v1 up on the Hub, and leaves neither that ref nor the other variants behind.
    result = run(sys.executable, "-c", PULL_AND_RUN, HF_HOME=home, **offline)
    assert result.returncode == 1
    assert "Version 1 of 'org/moe-grouped-gemm' is not available in the local cache" in result.stderr


@pytest.mark.long
def test_benchmark_as_the_card_has_it(checkout, hub, tmp_path):
    pytest.importorskip("tabulate", reason="needs kernels[benchmark]")
    assert publish(checkout, hub).returncode == 0
    repo = hub.repos[REPO_ID]
    card = repo.commits[repo.branches["main"]]["README.md"].decode()
    _, download, benchmark = re.search(r"## Benchmark.*?```bash\n(.*?)```", card, re.DOTALL)[1].splitlines()

    words = shlex.split(download)
    assert words[0] == "hf"
    result = run(sys.executable, "-m", "huggingface_hub.cli.hf", *words[1:], cwd=tmp_path, HF_ENDPOINT=hub.url)
    assert result.returncode == 0, result.stderr
    words = shlex.split(benchmark)
    assert words[0] == "kernels"
    words[1:] += ["--iterations", "1", "--warmup", "0", "--output", "times.json", "--visual", "moe"]
    command = (sys.executable, "-c", "from kernels.cli import main; main()", *words[1:])
    result = run(*command, cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "times.json").read_text())["results"]
    assert len(results) == 3 and all(result["verified"] for result in results)
    assert (tmp_path / "media/moe_light_latency.svg").exists()


# What users may see; README.md's troubleshooting names these messages.
PULLS = {
    "trusted": {"repo_id": "trusted/moe-grouped-gemm", "version": 1},
    "untrusted": {"repo_id": REPO_ID, "version": 1},
    "not-an-organization": {"repo_id": "someone/moe-grouped-gemm", "version": 1},
    "unknown-version": {"repo_id": REPO_ID, "version": 7, "trust_remote_code": True},
    "missing-variant": {"repo_id": "org/cuda-only", "version": 1, "trust_remote_code": True},
    "unknown-repository": {"repo_id": "org/nothing", "version": 1, "trust_remote_code": True},
    "no-version": {"repo_id": REPO_ID, "trust_remote_code": True},
}

PULL_ALL = """
import json, sys
from kernels import get_kernel

errors = {}
for name, arguments in json.loads(sys.argv[1]).items():
    try:
        get_kernel(**arguments)
        errors[name] = ["", ""]
    except Exception as error:
        errors[name] = [type(error).__name__, str(error)]
print(json.dumps(errors))
"""


@pytest.fixture(scope="module")
def pull_errors(tmp_path_factory):
    """What each of PULLS raises, in a fresh process."""
    with HubServer() as hub:
        tree = {str(path.relative_to(ROOT)): path.read_bytes() for path in ROOT.glob("build/*/**/*") if path.is_file()}
        hub.organizations["trusted"] = True
        for repo_id in (REPO_ID, "trusted/moe-grouped-gemm", "org/cuda-only"):
            hub.repos[repo_id] = Repo("public")
            hub.repos[repo_id].commit("v1", {p: tree[p] for p in tree if "cuda-only" not in repo_id or "cpu" not in p})
        home = tmp_path_factory.mktemp("home")
        result = run(sys.executable, "-c", PULL_ALL, json.dumps(PULLS), HF_ENDPOINT=hub.url, HF_HOME=home)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("pull", "error", "message"),
    [
        ("trusted", "", ""),
        ("untrusted", "ValueError", "not from a trusted publisher. Set trust_remote_code=True"),
        ("not-an-organization", "ValueError", "could not verify publisher trust status. Set trust_remote_code=True"),
        ("unknown-version", "ValueError", "Version 7 not found, available versions: 1"),
        ("missing-variant", "FileNotFoundError", "Cannot find a build variant for this system in org/cuda-only"),
        ("unknown-repository", "RepositoryNotFoundError", "Repository Not Found"),
        ("no-version", "ValueError", "A kernel version or revision must be specified"),
    ],
)
def test_what_users_see(pull_errors, pull, error, message):
    seen, text = pull_errors[pull]
    assert seen == error
    assert message in text
