"""Stages the build and has `kernels` load it under the name that it has on the Hub, as users do."""

import functools
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

HELPERS = Path(__file__).resolve().parent / "helpers"
sys.path.insert(0, str(HELPERS))
pytest.register_assert_rewrite(*(path.stem for path in HELPERS.glob("*.py")))
from suite import REPO_ID, ROOT  # noqa: E402

# All of this comes before anything imports huggingface_hub or torch, which read their environment once.
BUILD_SCRIPT = ROOT / "scripts/build.py"
IN_CHECKOUT = BUILD_SCRIPT.exists()  # not so in kernel-builder's CI, which brings the tests and a build of its own
if IN_CHECKOUT:
    # A pytest that a test starts, and a worker of pytest-xdist, share the build.
    if not {"PYTEST_CURRENT_TEST", "PYTEST_XDIST_WORKER"} & set(os.environ):
        subprocess.run([sys.executable, BUILD_SCRIPT], check=True, stdout=subprocess.DEVNULL)
    os.environ["LOCAL_KERNELS"] = f"{REPO_ID}={ROOT}"
# It also puts the build's own files on the path, where kernels/ would hide the library of that name.
sys.path[:] = [folder for folder in sys.path if not Path(folder, "metadata.json").exists()]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or deterministic mode warns about every cuBLAS call
if "PYTEST_XDIST_WORKER" in os.environ:  # workers, and what they start, share the cores: more threads only wait
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # by default a pool of processes for each worker

import kernels  # noqa: E402
import torch  # noqa: E402

# Fills torch.empty with NaN: an output row that no kernel writes shows.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_addoption(parser):
    # From the environment: a pytest that a test starts draws the same numbers.
    seed = int(os.environ.get("PYTEST_SEED", "0"))
    parser.addoption("--seed", type=int, default=seed, help="added to every seed: N other runs of the same tests")
    parser.addoption("--part", metavar="I/N", help="the I-th of N parts of the tests, about equal, each test in one")


def pytest_configure(config):
    seed = config.getoption("seed")
    if seed:
        os.environ["PYTEST_SEED"] = str(seed)
        shift_seeds(seed)


def shift_seeds(by):
    """A test that names a seed still gets what it asks for again and again, yet other numbers than without this."""
    manual_seed = torch.manual_seed

    class Generator(torch.Generator):
        def manual_seed(self, seed):
            return super().manual_seed(seed + by)

    torch.Generator = Generator
    torch.manual_seed = lambda seed: manual_seed(seed + by)


@pytest.fixture(autouse=True)
def seeded(request):
    """What a test draws without naming a seed is the same in every run, whatever ran before it."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()))


@pytest.fixture(autouse=True)
def nothing_remembered():
    """A test that replaces Triton, the GPU or a folder leaves nothing that was found out there to the next one."""
    forget()
    yield
    forget()


def forget():
    once = {"config_class", "meet_peft", "_teach_conditions"}  # register or wrap something of another library's
    for name in [name for name in sys.modules if name.startswith("_moe_grouped_gemm")]:
        for function in vars(sys.modules[name]).values():
            if isinstance(function, functools._lru_cache_wrapper) and function.__name__ not in once:
                function.cache_clear()


def pytest_ignore_collect(collection_path):
    """kernel-builder's CI has torch, `kernels` and pytest alone: it imports no file without a test for it."""
    files = [collection_path] if collection_path.is_file() else collection_path.rglob("test_*.py")
    if not IN_CHECKOUT and not any("mark.kernels_ci" in file.read_text() for file in files):
        return True


@pytest.hookimpl(trylast=True)  # what -m and -k leave out is out by now
def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") or item.get_closest_marker("memcheck"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if config.getoption("part"):
        part, parts = map(int, config.getoption("part").split("/"))
        # By name rather than in turn, which would give all of one dtype to one part.
        items[:] = [item for item in items if zlib.crc32(item.name.encode()) % parts == part - 1]
    start_with_long_ones(items)


def start_with_long_ones(items):
    """So that no worker is left alone with one of them at the end; each of xdist's begins with an equal share."""
    long, short = [], []
    for item in items:
        (long if item.get_closest_marker("long") else short).append(item)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    order = []
    for worker in range(workers):
        mine = long[worker::workers]
        share = (len(items) - len(order)) // (workers - worker) - len(mine)
        order += mine + short[:share]
        del short[:share]
    items[:] = order


@pytest.fixture(scope="session")
def kernel():
    return kernels.get_kernel(REPO_ID, version=1)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture
def two_devices(device):
    """For run_two_processes: each process needs a GPU of its own."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    return device


@pytest.fixture(scope="module")
def one_thread():
    """Two threads on such small matrices wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_other_kernels(monkeypatch):
    """`use_kernels=True` on a GPU also looks for Transformers' own kernels (RMSNorm, ...) on the Hub."""
    # Not there where Transformers refuses the installed `kernels`.
    monkeypatch.setattr("transformers.integrations.hub_kernels._KERNEL_MAPPING_CACHE", {}, raising=False)
    with kernels.use_kernel_mapping({}, inherit_mapping=False):
        yield


@pytest.fixture
def record(monkeypatch):
    """record(module, name): a list that gets the positional arguments of every call, which goes on."""

    def record(module, name):
        calls = []
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.append(args) or function(*args, **kwargs))
        return calls

    return record


@pytest.fixture
def registered(kernel):
    kernel.register()
    return kernel
