"""The package reads no network, executes no strings or pickles, starts no process; `tune` alone writes, where told.

Triton, on a GPU, compiles into its own cache and runs its assembler: that is Triton's doing, below every launch.
"""

import ast
import subprocess
import sys

import pytest

from suite import FILES, PACKAGE, ROOT

# Imports are audited in test_layering.py: the standard library without network, processes and pickle; torch; triton.
BUILTINS = {"open", "eval", "exec", "compile", "__import__", "breakpoint", "input"}
# Whatever object they are called on: os, pathlib, shutil, torch.
METHODS = {
    *("system", "popen", "fork", "forkpty", "posix_spawn", "posix_spawnp", "startfile", "putenv", "kill"),
    *("execl", "execle", "execlp", "execv", "execve", "execvp", "spawnl", "spawnv", "spawnve"),
    *("write", "writelines", "write_text", "write_bytes", "touch", "mkdir", "makedirs", "mkdtemp", "mkstemp"),
    *("unlink", "rmdir", "removedirs", "rmtree", "rename", "renames", "symlink_to", "symlink", "hardlink_to"),
    *("chmod", "truncate", "copyfile", "copytree", "move", "fdopen", "dump"),
    *("load_library", "load_inline", "load_state_dict_from_url", "download_url_to_file", "snapshot_download"),
    *("hf_hub_download", "urlopen", "urlretrieve", "connect", "create_connection", "load_url"),
}
# By their full names: `load`, `save` and `replace` mean other things elsewhere.
CALLS = {"torch.load", "torch.save", "torch.hub.load", "torch.jit.load", "torch.package", "os.open", "os.remove"}
# The one function that may write, and how.
WRITER, WRITES = ("tuned_files.py", "write_configs"), {"mkdir", "write_text", "unlink"}


def dotted(node):
    """ "a.b.c" of such an expression."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return getattr(node, "id", "?")


@pytest.mark.parametrize("path", FILES)
def test_no_dangerous_calls(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (path.relative_to(PACKAGE).as_posix(), node.name) == WRITER:
            writes = {id(x) for x in ast.walk(node) if isinstance(x, ast.Attribute) and x.attr in WRITES}
            break
    else:
        writes = set()
    for node in ast.walk(tree):
        if id(node) in writes:
            continue
        if isinstance(node, ast.Name):  # aliased or called
            assert node.id not in BUILTINS, f"line {node.lineno}: {node.id}"
        if isinstance(node, ast.Attribute):
            assert node.attr not in METHODS, f"line {node.lineno}: {dotted(node)}"
            assert dotted(node) not in CALLS, f"line {node.lineno}: {dotted(node)}"
            assert not dotted(node).startswith("os.environ.") or node.attr == "get", f"line {node.lineno}"
            assert dotted(node) != "torch.utils.cpp_extension", f"line {node.lineno}"


AUDITED = """
import importlib.util, os, sys
import torch
import torch._inductor.codecache  # torch makes a folder for its compiler as it imports it, at the first call of any op

sys.dont_write_bytecode = True
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
FORBIDDEN = (
    "socket.", "urllib.", "http.", "ftplib.", "smtplib.", "subprocess.", "pty.", "pickle.", "shutil.",
    "tempfile.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "os.fork", "os.remove",
    "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.putenv",
)
found = []


def audit(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        if (isinstance(flags, int) and flags & WRITING) or (isinstance(mode, str) and set(mode) & set("wax+")):
            found.append((event, path))
    elif event.startswith(FORBIDDEN):
        found.append((event, *arguments))


sys.addaudithook(audit)
spec = importlib.util.spec_from_file_location("_mangled_name", sys.argv[1])
sys.modules[spec.name] = moe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(moe)

torch.manual_seed(0)
x, weights = torch.randn(7, 16, requires_grad=True), torch.rand(7, 2, requires_grad=True)
ids = torch.randint(-1, 5, (7, 2))
gate_up, down = torch.randn(4, 24, 16, requires_grad=True), torch.randn(4, 16, 12, requires_grad=True)
moe.moe_experts(x, ids, weights, gate_up, down).sum().backward()
moe.grouped_gemm(torch.randn(14, 16), gate_up, moe.route(ids, 4).expert_offsets).sum().backward()
moe.topk_router(x, torch.randn(8, 16), torch.rand(8), 2, 2, 1, True, 1.0)[1].sum().backward()
with torch.no_grad():
    moe.moe_experts(x, ids, weights, gate_up, down)
assert not found, found
exec(sys.argv[2])
"""


def audited(then="", *arguments):
    init = ROOT / "build/torch-cpu/__init__.py"
    return subprocess.run([sys.executable, "-c", AUDITED, init, then, *arguments], capture_output=True, text=True)


def test_import_and_calls_under_audit():
    result = audited()
    assert result.returncode == 0, result.stderr


TUNED = """
from pathlib import Path

run = sys.modules["_mangled_name.tuner.run"]
folder = Path(sys.argv[3])


class Trials:
    time = staticmethod(lambda candidate: float(candidate[1].BLOCK_M))
    compare = staticmethod(lambda candidates: {c: Trials.time(c) for c in candidates})


gpu = {"is_available": True, "current_device": 0, "get_device_name": "A GPU", "get_device_capability": (9, 0)}
for name, value in gpu.items():
    setattr(torch.cuda, name, lambda value=value: value)
run.gpu.traits = lambda device: run.gpu.TRAITS["sm_90"]
run.gpu.launchers = run.compile_ahead = run.random_weights = lambda *args: [None, None]
run.Trials = lambda *args: Trials
files = moe.tune([(8, 64, 32, 2), (4, 64, 32, 2)], folder / "new", tokens=[96, 192])
assert len(files) == len(list((folder / "new").iterdir())) == 2
assert {event for event, *_ in found} == {"open", "os.mkdir", "os.rename", "os.remove"}, found
for event, *arguments in found:
    paths = [Path(x) for x in arguments if isinstance(x, (str, Path))]
    assert len(paths) == (2 if event == "os.rename" else 1)
    assert all(path == folder / "new" or path.parent == folder / "new" for path in paths), (event, paths)
"""


def test_tune_writes_into_its_folder_alone(tmp_path):
    result = audited(TUNED, tmp_path)
    assert result.returncode == 0, result.stderr


def test_there_is_one_function_that_writes():
    tree = ast.parse((PACKAGE / WRITER[0]).read_text())
    (writer,) = (node for node in tree.body if getattr(node, "name", None) == WRITER[1])
    assert WRITES == WRITES & {node.attr for node in ast.walk(writer) if isinstance(node, ast.Attribute)}


DEEDS = """
import pickle, socket
for deed in (
    lambda: open(os.devnull, "w"),
    lambda: os.open(os.devnull, os.O_WRONLY),
    lambda: socket.socket(),
    lambda: os.system("true"),
    lambda: os.posix_spawn("/bin/true", ["true"], {}),
    lambda: pickle.loads(pickle.dumps(os.system)),
):
    found.clear()
    deed()
    assert found, deed.__code__.co_names
"""


def test_the_audit_finds_what_it_should():
    result = audited(DEEDS)
    assert result.returncode == 0, result.stderr
