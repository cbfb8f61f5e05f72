"""What a process may do around the layer: run out of memory, call it from threads, fork, load a second version."""

import gc
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from oracle import layer
from suite import HELPERS, ROOT
from tiny_models import prompt, tiny_model

HERE = [ROOT / "tests", ROOT / "tests/process"]  # for processes that run a function of this file as the suite runs it

# Threads


def with_gradients(kernel, args):
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in args]
    out = kernel.moe_experts(*leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [t for t in leaves if t.is_floating_point()])]


THREADED = """
import sys
import torch
sys.path[:0] = sys.argv[1:3]
import conftest, kernels
import test_robustness
test_robustness.from_many_threads(kernels.get_kernel("org/moe-grouped-gemm", version=1), sys.argv[3])
"""


def from_many_threads(kernel, device):
    """Each thread its own layers, all at once from the first call on; the results are those of one thread."""
    cases = [
        layer(tokens, 8, 2, 64, 32, dtype, device, "sentinels", seed=tokens)
        for tokens in (1, 40, 300)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    together = Barrier(8)

    def work(thread):
        together.wait()
        order = [(thread + i) % len(cases) for i in range(3 * len(cases))]
        results = [(i, with_gradients(kernel, cases[i])) for i in order]
        if device == "cuda":
            torch.cuda.current_stream().synchronize()
        return results

    with ThreadPoolExecutor(8) as threads:
        results = [result for thread in threads.map(work, range(8)) for result in thread]
    expected = [with_gradients(kernel, case) for case in cases]
    for i, tensors in results:
        assert all(torch.equal(got, e) for got, e in zip(tensors, expected[i])), f"case {i}"


@pytest.mark.long  # on a GPU
def test_many_threads(kernel, device):
    """In a fresh process: the first calls of all threads meet."""
    command = [sys.executable, "-c", THREADED, *HERE, device]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# Fork


def test_fork_after_import(kernel):
    """A data loader's worker, say. Forward, gradients and a model in the child; a GPU's driver allows no fork."""
    args = layer(33, 4, 2, 64, 32)
    expected = kernel.moe_experts(*args)  # in the parent first: its threads do not come along
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            assert torch.equal(kernel.moe_experts(*args), expected)
            assert all(t.isfinite().all() for t in with_gradients(kernel, args))
            kernel.register()
            assert tiny_model("cpu", kernel, "use_kernels")(prompt()).logits.isfinite().all()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


# Two versions

SIDE_BY_SIDE = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1:2]
import torch
from kernels import get_local_kernel
from oracle import layer
from tiny_models import NUM_MOE_LAYERS, prompt, tiny_model

first, second = [get_local_kernel(Path(folder)) for folder in sys.argv[2:]]
assert first is not second and first.__name__ != second.__name__ and first.functional is not second.functional
args = [t.requires_grad_() if t.is_floating_point() else t for t in layer(20, 4, 2, 64, 32)]
offsets = first.route(args[1], 4).expert_offsets
assert torch.equal(offsets, second.route(args[1], 4).expert_offsets)  # an op of each
assert torch.equal(first.moe_experts(*args), second.moe_experts(*args))

calls = []
for kernel in (first, second):
    def recording(*args, kernel=kernel, moe_experts=kernel.functional.moe_experts, **kwargs):
        calls.append(kernel)
        return moe_experts(*args, **kwargs)
    kernel.functional.moe_experts = recording

expected = tiny_model("cpu")(prompt()).logits
models = {kernel: tiny_model("cpu", kernel, "use_kernels") for kernel in (first, second)}
for kernel, model in models.items():
    calls.clear()
    torch.testing.assert_close(model(prompt()).logits, expected, rtol=1e-4, atol=1e-4)
    assert calls == [kernel] * NUM_MOE_LAYERS  # each model keeps the one that it was given
# By name, the last one registered serves.
calls.clear()
named = tiny_model("cpu", first, "moe_grouped_gemm")
torch.testing.assert_close(named(prompt()).logits, expected, rtol=1e-4, atol=1e-4)
models[second].train()(prompt())  # kernelized again, it keeps its own
assert calls == [first] * NUM_MOE_LAYERS + [second] * NUM_MOE_LAYERS
"""


def test_two_versions_side_by_side(tmp_path):
    """Another version is another build, under an id, and so a module name and an op namespace, of its own."""
    for version, name in ((1, "one"), (2, "two")):
        shutil.copytree(ROOT / "build", tmp_path / name / "build")
        for variant in (tmp_path / name / "build").iterdir():
            metadata = json.loads((variant / "metadata.json").read_text())
            new_id = f"{metadata['id']}_{name}"
            ops = (variant / "_ops.py").read_text().replace(metadata["id"], new_id)
            (variant / "_ops.py").write_text(ops)
            metadata.pop("digest")
            (variant / "metadata.json").write_text(json.dumps({**metadata, "id": new_id, "version": version}))
    command = [sys.executable, "-c", SIDE_BY_SIDE, HELPERS, tmp_path / "one", tmp_path / "two"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# Out of memory


@pytest.mark.gpu
@pytest.mark.long
@pytest.mark.parametrize("training", [False, True])
def test_out_of_memory_in_the_middle_of_a_forward(training):
    """In a process of its own: what other tests left of the allocator's blocks would serve in place of new memory."""
    command = [sys.executable, "-c", SHORT_OF_MEMORY, *HERE, str(int(training))]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


SHORT_OF_MEMORY = """
import sys
import torch
sys.path[:0] = sys.argv[1:3]
import conftest, kernels
import test_robustness
test_robustness.run_short_of_memory(kernels.get_kernel("org/moe-grouped-gemm", version=1), sys.argv[3] == "1")
"""


def run_short_of_memory(kernel, training):
    """With ever more memory it fails later in the call; nothing leaks, and afterwards the same call works."""
    args = layer(4096, 8, 4, 1024, 512, torch.bfloat16, "cuda")
    call = (lambda: with_gradients(kernel, args)) if training else (lambda: [kernel.moe_experts(*args)])
    expected = call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.reset_peak_memory_stats()
    call()
    peak = torch.cuda.max_memory_allocated()
    failures = 0
    try:
        for extra in range(0, peak - before, 2**23):
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + extra) / total)
            try:
                call()
            except torch.OutOfMemoryError:
                failures += 1
            # After a failed backward autograd goes on holding one gradient, however often that happens.
            held = args[0].nbytes if training else 0
            deadline = time.monotonic() + 5
            while torch.cuda.memory_allocated() > before + held and time.monotonic() < deadline:
                gc.collect()
            assert torch.cuda.memory_allocated() <= before + held
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert failures > 2, "memory was hardly ever short"
    assert all(torch.equal(got, e) for got, e in zip(call(), expected))
