"""What people do to the commands ends in one line, with exit code 1, or 2 for arguments: each kind, in a process."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import one_line_errors
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from suite import ROOT

ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "USE_HUB_KERNELS": "NO"}


def run(*command, **environment):
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=ROOT, env={**ENVIRONMENT, **environment}, capture_output=True, text=True)


def last_line(result, code=1):
    """Of what it says; that is all there is, but for progress bars and words of Transformers."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "script",
    [
        "benchmarks/layer.py",
        "scripts/tune.py",
        pytest.param("benchmarks/training.py", marks=pytest.mark.matrix),
        pytest.param("benchmarks/lora.py", marks=pytest.mark.matrix),
    ],
)
def test_no_gpu(script):
    assert last_line(run(script)).startswith("no GPU found, and this needs one: see nvidia-smi; this PyTorch")


def test_no_gpu_to_quantize_on():
    assert last_line(run("examples/quantize_checkpoint.py", "--device", "cuda", "a", "b")).startswith("no GPU found")


def test_no_gpu_for_kernel_config():
    assert last_line(run("examples/generate.py", "a", "kernel_config")).startswith("no GPU found")


def test_no_triton():
    """As where PyTorch was built for a CPU: what measures a GPU says that, and what does not need one runs."""
    program = "import sys; sys.modules['triton'] = None; sys.path.insert(0, 'benchmarks'); sys.argv = ['']; import {}"
    result = run("-c", program.format("fp8, common; print(common.header()['versions']); fp8.main()"))
    assert last_line(result).startswith("no GPU found")
    assert torch.__version__ in result.stdout


def test_no_torchrun():
    assert "torchrun --nproc-per-node 2 benchmarks/parallel.py" in last_line(run("benchmarks/parallel.py"))


@pytest.mark.parametrize(
    "script", ["examples/quantize_checkpoint.py", pytest.param("examples/generate.py", marks=pytest.mark.matrix)]
)
def test_missing_argument(script):
    assert "the following arguments are required" in last_line(run(script), code=2)


def test_wrong_path(tmp_path):
    line = last_line(run("examples/demo.py", "--model", tmp_path / "nothing"))
    assert line.startswith(f"{tmp_path}/nothing: there is no such folder here and no such model on the Hub")


def test_folder_without_a_checkpoint(tmp_path):
    assert re.match(
        f".*{tmp_path}.*: name a folder that save_pretrained", last_line(run("examples/generate.py", tmp_path))
    )


class NoSuchModel(BaseHTTPRequestHandler):
    """What the Hub answers about an id that nobody has."""

    def do_HEAD(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    do_GET = do_HEAD


def test_wrong_id(tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), NoSuchModel) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{hub.server_port}"
        command = "examples/demo.py", "--model", "someone/nothing"
        line = last_line(run(*command, HF_ENDPOINT=url, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="0"))
        hub.shutdown()
    assert line.startswith("someone/nothing is not a local folder and is not a valid model identifier")
    assert line.endswith("a private one needs `hf auth login`")


def test_no_network():
    line = last_line(run("examples/demo.py", "--model", "someone/model", HF_HUB_OFFLINE="1"))
    assert line.startswith("We couldn't connect") and line.endswith("or name a folder that holds the model")


def test_not_built(tmp_path):
    line = last_line(run("examples/finetune_lora.py", LOCAL_KERNELS=f"org/moe-grouped-gemm={tmp_path}"))
    assert line.endswith(f"{tmp_path}: run `make build`")


def test_package_that_is_not_installed(tmp_path):
    """In the first seconds, while packages are imported, too."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('No module named torch', name='torch')")
    line = last_line(run("examples/demo.py", PYTHONPATH=str(tmp_path)))
    assert "No module named torch" in line and "pip install -r requirements.txt" in line


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
def test_full_disk():
    program = "import one_line_errors; f = open('/dev/full', 'w'); f.write('x'); f.flush()"
    line = last_line(run("-c", program, PYTHONPATH=str(ROOT / "examples")))
    assert line == "[Errno 28] No space left on device: make room, or choose another place"


@pytest.mark.parametrize("script", ["demo.py", pytest.param("finetune_lora.py", marks=pytest.mark.matrix)])
def test_ctrl_c(script):
    process = subprocess.Popen(
        [sys.executable, ROOT / "examples" / script],
        env={**ENVIRONMENT, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in stderr
    assert stderr.strip().splitlines()[-1] == "stopped by Ctrl-C"


def test_a_bug_keeps_its_traceback():
    result = run("-c", "import one_line_errors; {}['bug']", PYTHONPATH=str(ROOT / "examples"))
    assert result.returncode == 1 and "Traceback" in result.stderr and "KeyError: 'bug'" in result.stderr


# --- errors that a subprocess meets only with luck --------------------------------------------------------------------


def raised(function):
    with pytest.raises(Exception) as info:
        function()
    return info.value


def test_full_disk_below_safetensors(tmp_path):
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert one_line_errors.explanation(error).endswith("make room, or choose another place")


def test_damaged_weights(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"cut short")
    error = raised(lambda: load_file(path))
    assert one_line_errors.explanation(error).endswith("download it again")


def test_out_of_memory():
    line = one_line_errors.explanation(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore"))
    assert line == "CUDA out of memory. Tried to allocate: take a smaller model, or a GPU that nothing else uses"


def test_cause_is_found_below_other_errors():
    def chained():
        try:
            raise PermissionError(13, "Permission denied", "/root/x")
        except PermissionError as error:
            raise RuntimeError("could not save") from error

    assert one_line_errors.explanation(raised(chained)) == "could not save: choose a place that you may write to"


# --- the Makefile and its environment ---------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    """What `make` reads before it runs anything of ours, and a build that is a line of text."""
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt", "scripts/environment.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "scripts/build.py").write_text("import sys\nprint('built with', sys.prefix)\n")
    return tmp_path


def make(checkout, *arguments):
    if shutil.which("make") is None:
        pytest.skip("needs make")
    # Nothing of the `make` that may have started this: it exports its flags, and PYTHON if that was given.
    environment = {"PATH": os.environ["PATH"], "HOME": str(checkout), "PIP_NO_INDEX": "1"}
    return subprocess.run(["make", *arguments], cwd=checkout, env=environment, capture_output=True, text=True)


def python_that_says(version, path):
    """This Python under another number."""
    program = path.with_suffix(".py")
    program.write_text(
        f"import sys, runpy; sys.version_info = {version}; sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {program} "$@"\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("goal", ["build", "demo", "finetune", "bench", "tune", "plot"])
def test_what_only_tests_need_is_installed_for_tests_alone(checkout, goal):
    for_tests = ("requirements-dev.txt", "triton-")
    commands = make(checkout, "-n", goal).stdout
    assert "environment.py .venv requirements.txt" in commands
    assert not any(word in commands for word in for_tests)
    assert all(word in make(checkout, "-n", "test").stdout for word in for_tests)


@pytest.mark.parametrize("version", [(3, 8, 18), (3, 10, 12), (3, 14, 0)])
def test_interpreter_that_does_not_fit(checkout, tmp_path, version):
    result = make(checkout, "build", f"PYTHON={python_that_says(version, tmp_path / 'python')}")
    assert result.returncode != 0
    said, of_make = result.stderr.splitlines()
    assert f"is Python {version[0]}.{version[1]}, and 3.11 to 3.13 is needed: make PYTHON=python3.12" in said
    assert not (checkout / ".venv").exists()


@pytest.mark.matrix
def test_environment_that_is_not_right_is_made_anew(checkout):
    """One of another Python, then one that failed; between the two, what is complete stays."""
    own, done = f"PYTHON={sys.base_prefix}/bin/python3", checkout / ".venv/.requirements.txt"
    (checkout / "requirements.txt").write_text("")
    (checkout / ".venv").mkdir()
    done.write_text("# Python 3.9\n")
    (checkout / ".venv/left-over").touch()
    result = make(checkout, "build", own)
    assert result.returncode == 0, result.stderr
    assert f"built with {checkout / '.venv'}" in result.stdout
    assert not (checkout / ".venv/left-over").exists()

    (checkout / ".venv/mine").touch()
    for arguments in ([], [own]):
        assert make(checkout, "build", *arguments).returncode == 0
        assert (checkout / ".venv/mine").exists()

    (checkout / "requirements.txt").write_text("nothing-of-this-name==1.0\n")
    result = make(checkout, "build")
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert ".venv is not complete, and the next run makes it anew" in result.stderr
    (checkout / "requirements.txt").write_text("")
    assert make(checkout, "build", own).returncode == 0
    assert not (checkout / ".venv/mine").exists()


def test_environment_of_ones_own_is_taken_as_it_is(checkout, tmp_path):
    own = tmp_path / "own"
    (own / "bin").mkdir(parents=True)
    (own / "bin/python").symlink_to(sys.executable)
    assert make(checkout, "-n", "demo", f"VENV={own}").stdout.startswith(f"{own}/bin/python scripts/build.py")
    (own / "pyvenv.cfg").touch()
    commands = make(checkout, "-n", "test", f"PYTHON={own}/bin/python").stdout
    assert commands.startswith(f"{own}/bin/python -m ruff") and "install" not in commands
    assert "VENV=/nowhere: there is no bin/python in it" in make(checkout, "demo", "VENV=/nowhere").stderr


def test_quantize_without_a_model(checkout):
    for arguments in ([], ["MODEL=here"], ["OUT=there"]):
        result = make(checkout, "quantize", *arguments)
        assert result.returncode == 2 and not (checkout / ".venv").exists()
        assert "make quantize MODEL=path/to/model OUT=path/to/model-fp8" in result.stderr
    command = make(checkout, "-n", "quantize", "MODEL=a b", "OUT=c", "FORMAT=fp8", "LINEAR=1", "DEVICE=cuda").stdout
    assert command.split()[-8:] == [
        '"a',
        'b"',
        '"c"',
        "--format",
        "fp8",
        "--linear",
        "--device",
        "cuda",
    ]
