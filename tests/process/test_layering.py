"""The package's structure: what imports what, where it runs, and that the documents name what exists."""

import ast
import re
import subprocess
import sys

import pytest

from suite import FILES, PACKAGE, ROOT

# From docs/design.md: an import points to the right, or to a neighbour.
LEVELS = [
    ["__init__"],
    ["layers", "tuner"],
    ["integration"],
    ["functional", "router", "block"],
    ["experts"],
    ["torch_ops", "routing", "reference"],
    ["weights"],
    ["gpu", "checks"],
    ["kernels", "tuning"],
    ["heuristics", "tuned_files"],
    ["launch_configs"],
    ["_ops"],
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}

NETWORK = {"ftplib", "http", "smtplib", "socket", "socketserver", "ssl", "urllib", "xmlrpc"}
CODE_EXECUTION = {"ctypes", "marshal", "multiprocessing", "pickle", "runpy", "shelve", "subprocess"}


def unit(path):
    """The module, or the subpackage, that a file belongs to: a key of LEVEL."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """(names, relative, in a function) of each import; names are units of the package if relative, else packages."""
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield {alias.name.split(".")[0] for alias in node.names}, False, id(node) in inside
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield {node.module.split(".")[0]}, False, id(node) in inside
        elif isinstance(node, ast.ImportFrom):
            folder = path.parents[node.level - 1].relative_to(PACKAGE)
            base = [*folder.parts, *(node.module.split(".") if node.module else [])]
            yield {base[0]} if base else {alias.name for alias in node.names}, True, id(node) in inside


def test_the_rules_have_something_to_check():
    assert len(FILES) > 5
    assert any(relative for file in FILES for _, relative, _ in imports(file.values[0]))


@pytest.mark.parametrize("path", FILES)
def test_imports_point_right(path):
    for names, relative, _ in imports(path):
        for name in names if relative else ():
            assert name in LEVEL, f"{name} has no place in the order of modules"
            assert LEVEL[name] >= LEVEL[unit(path)], f"{unit(path)} imports {name}, which lies to its left"


@pytest.mark.parametrize("path", FILES)
def test_foreign_imports(path):
    for names, relative, in_function in imports(path):
        if relative:
            continue
        allowed = {*sys.stdlib_module_names, "torch"} - NETWORK - CODE_EXECUTION
        if unit(path) == "kernels" or in_function:
            allowed.add("triton")  # the package imports without it
        if unit(path) in ("integration", "versions") and in_function:
            allowed |= {"transformers", "peft", "kernels"}
        assert names <= allowed, f"{', '.join(names - allowed)} may not be imported here"


# What later versions added, as keyword arguments and as names of the standard library.
NEWER_KEYWORDS = {"slots", "kw_only", "strict", "weakref_slot"}
NEWER_NAMES = {
    *("pairwise", "batched", "bit_count", "UnionType", "NoneType", "EllipsisType", "TypeAlias", "ParamSpec", "Self"),
    *("Concatenate", "TypeGuard", "StrEnum", "aclosing", "chdir", "stdlib_module_names", "tomllib", "assert_never"),
    *("anext", "aiter", "ExceptionGroup", "get_annotations", "override", "add_note", "TaskGroup"),
}


@pytest.mark.parametrize("path", FILES)
def test_python_3_9(path):
    tree = ast.parse(path.read_text(), feature_version=(3, 9))  # no match, no except*
    future = any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)
    annotations = [getattr(node, field, None) for node in ast.walk(tree) for field in ("annotation", "returns")]
    in_annotations = {id(node) for annotation in filter(None, annotations) for node in ast.walk(annotation)}
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            if id(node) in in_annotations:
                assert future, f"line {node.lineno}: X | Y in an annotation needs `from __future__ import annotations`"
            else:
                types = is_type(node.left) or is_type(node.right)
                assert not types, f"line {node.lineno}: X | Y of types is evaluated"
        if isinstance(node, ast.keyword):
            assert node.arg not in NEWER_KEYWORDS, f"line {node.value.lineno}: {node.arg}="
        name = getattr(node, "attr", None) or getattr(node, "id", None)
        assert name not in NEWER_NAMES, f"line {getattr(node, 'lineno', '?')}: {name}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert not {alias.name for alias in node.names} & NEWER_NAMES, f"line {node.lineno}"


def is_type(node):
    """None, or a name in CamelCase or of a builtin type, as far as one can see."""
    if isinstance(node, ast.Constant):
        return node.value is None
    name = getattr(node, "attr", None) or getattr(node, "id", "")
    return bool(re.fullmatch("_?[A-Z][A-Za-z0-9]*[a-z][A-Za-z0-9]*", name)) or name in {
        *("int", "str", "float", "bool", "bytes", "dict", "list", "tuple", "set", "type", "dtype", "device")
    }


@pytest.mark.parametrize("path", FILES)
def test_python_3_9_evaluates_the_hints_that_are_asked_for(path):
    """`get_type_hints` runs the annotations of a class, whatever `from __future__` says: no X | Y among them."""
    tree = ast.parse(path.read_text())
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and getattr(call.func, "attr", getattr(call.func, "id", "")) == "get_type_hints":
            (argument,) = call.args
            for node in ast.walk(classes[argument.id]):
                assert not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr)), f"line {node.lineno}"


IMPORT = """
import importlib.util, socket, sys, time
import torch

blocked = set(sys.argv[2:])
sys.modules.update(dict.fromkeys(blocked))  # None: any import of it fails
socket.socket = socket.create_connection = None
before = set(sys.modules)
start = time.process_time()
spec = importlib.util.spec_from_file_location("_mangled_name", sys.argv[1])
sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
seconds = time.process_time() - start
heavy = {"triton", "transformers", "peft", "kernels", "huggingface_hub"} & (set(sys.modules) - before)
assert not heavy, heavy
assert seconds < 1, seconds
"""


@pytest.mark.parametrize("blocked", [[], ["triton", "transformers", "peft", "kernels"]], ids=["as-is", "torch-alone"])
def test_import_is_light(blocked):
    init = ROOT / "build/torch-cpu/__init__.py"
    result = subprocess.run([sys.executable, "-c", IMPORT, init, *blocked], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
