"""What a remembered kernel is launched with: the same that Triton's own launcher would pass to its C function.

Without a GPU: around Triton's launchers of NVIDIA and AMD stands a function that notes what it is given.
"""

from importlib import import_module

import pytest
import torch
from triton import knobs
from triton.compiler.compiler import LazyDict
from triton.runtime import _allocation, driver
from triton.tools.tensor_descriptor import TensorDescriptor

from oracle import layer
from stub_launchers import LAUNCHERS, stub_kernel

GRID = (6, 5, 4)
SIGNATURE = ("*bf16", "*fp32", "*i32", "fp32", "i32", "constexpr", ("i32", "constexpr"))
DESCRIBED = ("tensordesc<bf16[16, 16]>", "*fp32", "*i32", "fp32", "i32", "constexpr", ("i32", "constexpr"))
REST = (1.5,), (7, 16, (3, "silu"))


class Kernel:
    """In place of a jitted kernel: it has been compiled, and is launched by whoever gets it."""

    fn = object()

    def __init__(self, compiled):
        self.compiled, self.asked = compiled, 0

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **options):
        self.asked += 1
        return self.compiled


@pytest.fixture
def launch_module(kernel, monkeypatch):
    module = import_module(f"{kernel.__name__}.kernels.launch")
    monkeypatch.setattr(module, "_compiled", {})
    return module


@pytest.fixture(params=list(LAUNCHERS))
def make(request, launch_module, monkeypatch):
    """(signature=..., **metadata) -> a kernel, the function that launches it, and the list of what C was given."""

    def make(signature=SIGNATURE, **metadata):
        passed = []
        compiled = stub_kernel(request.param, signature, lambda *args: passed.append(args), monkeypatch, **metadata)
        kernel = Kernel(compiled)

        def launch(tensors):
            launch_module.launch(kernel, GRID, tensors, *REST)
            return passed[-1] if passed else None

        return kernel, launch, passed

    return make


def tensors(dtype=torch.bfloat16):
    return torch.ones(16, 16, dtype=dtype), None, torch.ones(16, dtype=torch.int32)


def remembered(launch_module):
    (value,) = launch_module._compiled.values()
    return value


def plain(passed):
    """Addresses in place of tensors, and nobody's hooks and what would be told to them."""
    if isinstance(passed, (tuple, list)):
        return tuple(map(plain, passed))
    if isinstance(passed, torch.Tensor):
        return passed.data_ptr()
    return None if isinstance(passed, (knobs.HookChain, LazyDict)) else passed


@pytest.mark.parametrize("signature", [SIGNATURE, DESCRIBED], ids=["tensors", "a-descriptor"])
@pytest.mark.parametrize("metadata", [{}, {"launch_pdl": True}], ids=["", "pdl"])
def test_passes_what_triton_would_pass(make, launch_module, signature, metadata):
    kernel, launch, passed = make(signature, **metadata)
    first, *others = tensors()
    args = (TensorDescriptor.from_tensor(first, [16, 16]) if signature == DESCRIBED else first, *others)
    launch(args)
    assert kernel.asked == 1 and not passed
    found = launch(args)
    assert kernel.asked == 1 and len(passed) == 1 and remembered(launch_module)[1] is not None
    assert not any(isinstance(x, knobs.HookChain) for x in found)
    kernel.compiled[GRID](*args, *REST[0], *REST[1])
    assert any(isinstance(x, knobs.HookChain) for x in passed[-1])  # what the shortcut leaves out
    assert plain(found) == plain(passed[-1])


def test_the_stream_is_the_current_one(make):
    _, launch, _ = make()
    launch(tensors())
    for stream in (11, 12, 0):
        driver.active.streams = {-1: stream}
        passed = launch(tensors())
        where = passed.index(GRID[0])
        assert passed[where : where + 4] == (*GRID, stream)


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("way", ["added", "in place", "none"])
def test_hooks_are_told(make, monkeypatch, name, way):
    _, launch, _ = make()

    def hook(metadata):
        pass

    launch(tensors())
    hooks = getattr(knobs.runtime, name)
    if way == "added":
        monkeypatch.setattr(hooks, "calls", [])
        hooks.add(hook)
    else:
        monkeypatch.setattr(knobs.runtime, name, hook if way == "in place" else None)
    assert any(x is getattr(knobs.runtime, name) for x in launch(tensors()))


def test_another_alignment_is_another_kernel(make):
    kernel, launch, passed = make()
    buffer = torch.ones(257, dtype=torch.bfloat16)
    aligned, unaligned = (buffer[i : i + 256].view(16, 16) for i in (0, 1))
    others = tensors()[1:]
    launch((aligned, *others))
    launch((unaligned, *others))
    assert kernel.asked == 2 and not passed
    launch((aligned, *others))
    launch((unaligned, *others))
    assert kernel.asked == 2
    assert [{x.data_ptr() for x in (aligned, unaligned)} & numbers(args) for args in passed] == [
        {aligned.data_ptr()},
        {unaligned.data_ptr()},
    ]


def numbers(passed):
    flat = [y for x in passed for y in (x if isinstance(x, tuple) else (x,))]
    return {x for x in flat if isinstance(x, int)}


def test_scratch_is_triton_s_own_to_allocate(make, launch_module, monkeypatch):
    buffer = torch.empty(1)
    monkeypatch.setattr(_allocation._profile_allocator, "_allocator", lambda size, alignment, stream: buffer)
    _, launch, _ = make(profile_scratch_size=64, profile_scratch_align=16)
    args = tensors()
    launch(args)
    assert remembered(launch_module)[1] is None
    assert any(x is buffer for x in launch(args))


class OtherLauncher:
    """As a later Triton may have it: what is passed on is made anew each time, in another order, or not at all."""

    def __init__(self, launch, way):
        self.launch, self.way = launch, way

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *args):
        if self.way == "something-new":
            self.launch(x, y, z, stream, [], *args)
        elif self.way == "another-order":
            self.launch(stream, x, y, z, *args)
        elif self.way == "args-first":
            self.launch(*args, x, y, z, stream)
        elif self.way == "twice":
            self.launch(x, y, z, stream, *args)
            self.launch(x, y, z, stream, *args)
        elif self.way == "reads-the-grid":
            self.launch(x * y * z, stream, *args)


@pytest.mark.parametrize("way", ["something-new", "another-order", "args-first", "twice", "reads-the-grid", "none"])
def test_another_triton_launches_as_it_wants(make, launch_module, way):
    kernel, launch, passed = make()
    kernel.compiled._run = OtherLauncher(lambda *args: passed.append(args), way)
    args = tensors()
    launch(args)
    assert remembered(launch_module)[1] is None and not passed
    launch(args)
    kernel.compiled[GRID](*args, *REST[0], *REST[1])
    half = len(passed) // 2
    assert [plain(x) for x in passed[:half]] == [plain(x) for x in passed[half:]]
    assert bool(passed) == (way != "none")


@pytest.fixture
def decode(kernel, launch_module):
    """One token's layer, whose two kernels are remembered."""
    args = layer(1, 8, 2, 512, 256, torch.bfloat16, "cuda")
    expected = kernel.moe_experts(*args)
    assert len(launch_module._compiled) == 2
    return (lambda: kernel.moe_experts(*args)), expected


@pytest.mark.gpu
def test_remembered_kernels_take_the_shortcut(decode, launch_module):
    function, expected = decode
    assert all(short is not None for _, short in launch_module._compiled.values())
    assert torch.equal(function(), expected)


@pytest.mark.gpu
def test_remembered_kernels_are_captured(decode):
    """Into a graph, on a stream of its own: a launch on another one would be an error, or missing."""
    function, expected = decode
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.gpu
def test_hooks_are_told_of_remembered_kernels(decode):
    function, expected = decode
    told = []

    def hook(metadata):
        told.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        assert torch.equal(function(), expected)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert told == ["_gate_up_decode_kernel", "_down_decode_kernel"]
    function()
    assert len(told) == 2
