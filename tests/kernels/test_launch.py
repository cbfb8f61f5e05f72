"""What `launch` remembers compiled kernels under, audited against Triton's own specialisation; and what it refuses.

Without a GPU: kernels are neither compiled nor launched. Triton's binder says how it would specialise them.
"""

import re
import sys
from importlib import import_module

import pytest
import torch
from torch._subclasses import FakeTensorMode
from triton.runtime import build, driver
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

import compile_kernels
from compile_kernels import TARGETS
from compile_only import NoGPU
from low_rank import adapters, low_rank
from oracle import error, fp8_layer, layer


class Compiled:
    """In place of a compiled kernel: who finds it under its key must want the same specialisation."""

    def __init__(self, kernel, args, options):
        self.kernel, self.options = kernel, options
        self.specialization = self.specialize(args)

    def specialize(self, args):
        *_, binder = self.kernel.device_caches[driver.active.get_current_device()]
        return binder(*args, **self.options)[1]

    def __getitem__(self, grid):
        return self.check

    def check(self, *args):
        triples = zip((p.name for p in self.kernel.params), self.specialization, self.specialize(args))
        different = [triple for triple in triples if triple[1] != triple[2]]
        assert not different, f"{self.kernel.__name__}: one key for {different}"


@pytest.fixture
def launch_module(kernel):
    return import_module(f"{kernel.__name__}.kernels.launch")


@pytest.fixture(params=["sm_90", "gfx942"])
def target(request, launch_module, monkeypatch):
    """Launches for this target ask for the specialisation, and for nothing more."""
    # A device that is nobody's: Triton keeps a binder for each.
    monkeypatch.setattr(driver, "_active", NoGPU(TARGETS[request.param], 100 + len(request.param)))
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, grid, warmup, **options: Compiled(self, args, options))
    monkeypatch.setattr(launch_module, "_compiled", {})
    monkeypatch.setattr(launch_module, "REACH_MATTERS", request.param == "gfx942")
    return request.param


def stand_in(x, offset=0, device="cpu", count=1):
    """What Triton sees of a tensor, at another address."""
    return torch.empty(count + offset, dtype=x.dtype, device=device)[offset:] if isinstance(x, torch.Tensor) else x


def package_modules(kernel):
    prefix = f"{kernel.__name__}.kernels."
    return [module for name, module in sys.modules.items() if name.startswith(prefix)]


def test_what_shares_a_key_shares_a_kernel(kernel, launch_module, target, monkeypatch):
    """For every kernel: with each tensor at another alignment, or beyond 32-bit offsets, and other free numbers."""
    launch, launched = launch_module.launch, set()

    def launch_often(jit, grid, tensors, numbers, constants, *args, **kwargs):
        launched.add(jit.__name__)
        tensors = [stand_in(x) for x in tensors]
        others = [stand_in(x, offset=1) for x in tensors]
        if target == "gfx942":
            others += [stand_in(x, device="meta", count=2**31) for x in tensors]
        variants = [(*tensors[: i % len(tensors)], x, *tensors[i % len(tensors) + 1 :]) for i, x in enumerate(others)]
        free = [tuple(1.5 if isinstance(n, float) else value for n in numbers) for value in (1, 16, 17)]
        for some in (tuple(tensors), *variants):
            launch(jit, grid, some, numbers, constants, *args, **kwargs)
        for some in free:
            launch(jit, grid, tuple(tensors), some, constants, *args, **kwargs)

    for module in package_modules(kernel):
        if getattr(module, "launch", None) is launch:
            monkeypatch.setattr(module, "launch", launch_often)
    for size in ("HIDDEN", "INTER"):
        monkeypatch.setattr(compile_kernels, size, 256)  # real ones would take time to fill
    for _, _, run in compile_kernels.launches(kernel.__name__, target):
        run()
    if target == "sm_90":  # the only one for which there are those of Hopper
        kernels = {
            name
            for module in package_modules(kernel)
            for name, value in vars(module).items()
            if isinstance(value, JITFunction) and name.endswith("_kernel")
        }
        assert launched == kernels


class Wrapper(torch.Tensor):
    """As DTensor: a tensor around others, with no memory of its own."""

    @staticmethod
    def __new__(cls, x):
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, device=x.device)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(function)


def fake(x):
    with FakeTensorMode() as mode:
        return mode.from_tensor(x)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("wrap", [Wrapper, fake])
def test_nothing_is_launched_on_tensors_without_memory(kernel, target, wrap):
    kernels = import_module(f"{kernel.__name__}.kernels")
    args = torch.ones(4, 64), torch.zeros(4, dtype=torch.int32), torch.ones(4, 1)
    kernels.combine(*args)
    for i, x in enumerate(args):
        with pytest.raises(ValueError, match=rf"cannot read \w+ {re.escape(str(tuple(x.shape)))} on cpu, which has no"):
            kernels.combine(*args[:i], wrap(x), *args[i + 1 :])
    # Also not through a descriptor; while an empty tensor has no memory either.
    config = import_module(f"{kernel.__name__}.tuning").EXPERTS.hopper[-1][1].down
    w, schedule = torch.ones(2, 64, 64).bfloat16(), torch.zeros(5, 8, dtype=torch.int32)
    for some in (config, config._replace(WARP_SPECIALIZED=False)):
        with pytest.raises(ValueError, match="has no memory"):
            kernels.grouped_gemm(torch.ones(4, 64).bfloat16(), wrap(w), schedule, "ieee", some)
    kernels.tile_schedule(torch.zeros(3, dtype=torch.int32), 4, 16)
    kernels.zero_skipped(torch.ones(0, 64), torch.zeros(0, dtype=torch.int32))


class Building(NoGPU):
    """As the drivers of Triton: at first use it builds what it calls the GPU by."""

    def get_current_device(self):
        build.compile_module_from_src("", "launcher")
        return self.device


def script(path, code):
    path.write_text(f"#!/bin/sh\n{code}\n")
    path.chmod(0o755)
    return str(path)


def file(path):
    path.write_text("")
    return str(path)


class Hungry:
    """In place of a kernel: each stage takes so many bytes of a GPU that has 1000 to give."""

    __name__ = fn = "_hungry_kernel"

    def __init__(self, stage, resource="shared memory"):
        self.stage, self.resource, self.launched = stage, resource, []

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, num_stages, **options):
        if num_stages * self.stage > 1000:
            raise OutOfResources(num_stages * self.stage, 1000, self.resource)
        self.launched.append((args, num_stages, options["num_warps"]))
        return self

    def warmup(self, *args, grid, **options):
        self.compiled = options

    def run(self, num_stages, device="cpu"):
        args = (self, (1, 1, 1), (torch.ones(1, device=device),), (), (5,))
        return args, {"num_warps": 8, "num_stages": num_stages}


def test_what_does_not_fit_runs_with_fewer_stages(launch_module, monkeypatch, recwarn):
    monkeypatch.setattr(launch_module, "_compiled", {})
    for stage, stages in ((300, 3), (900, 1)):
        kernel = Hungry(stage)
        args, options = kernel.run(num_stages=4)
        with pytest.warns(UserWarning, match="hungry_kernel needs more shared memory.*fewer stages") as warnings:
            launch_module.launch(*args, **options)
        assert len(warnings) == 1
        (launched,) = kernel.launched
        assert launched == ((*args[2], 5), stages, 8)
        launch_module._compiled.clear()
    kernel = Hungry(250)
    args, options = kernel.run(num_stages=4)
    launch_module.launch(*args, **options)
    assert kernel.launched[0][1] == 4 and not recwarn.list


def test_on_meta_nothing_is_launched(launch_module, monkeypatch):
    monkeypatch.setattr(launch_module, "_compiled", {})
    kernel = Hungry(300)
    args, options = kernel.run(4, device="meta")
    launch_module.launch(*args, **options)
    assert kernel.compiled == {"enable_fp_fusion": True, "num_warps": 8, "num_stages": 4}
    assert not kernel.launched and not launch_module._compiled


@pytest.mark.parametrize("hunger", [(2000,), (300, "registers")])
def test_what_never_fits_is_an_error(launch_module, monkeypatch, hunger):
    monkeypatch.setattr(launch_module, "_compiled", {})
    args, options = Hungry(*hunger).run(num_stages=4)
    with pytest.raises(OutOfResources):
        launch_module.launch(*args, **options)


WITHOUT = [  # variables, as functions of a directory; cause and remedy
    pytest.param({"PATH": str, "CC": None}, "no C compiler. Install .*gcc.* set CC", id="no-compiler"),
    pytest.param({"CC": lambda path: ""}, "CC='' cannot be run .*Unset CC", id="empty-CC"),
    pytest.param({"CC": lambda path: str(path / "none")}, "CC='.*none' cannot be run .No such", id="CC-is-not-there"),
    pytest.param({"CC": lambda path: file(path / "cc")}, "CC='.*cc' cannot be run .Permission", id="CC-is-no-program"),
    pytest.param({"CC": lambda path: script(path / "cc", "exit 3")}, "cc failed.*python3-dev", id="no-headers"),
    pytest.param(
        {"CC": lambda path: script(path / "cc", 'for o; do [ "$last" = -o ] && echo > "$o"; last=$o; done')},
        "launcher.*It loads what it built from .*TRITON_CACHE_DIR.*noexec",
        id="not-loadable",
    ),
    pytest.param(
        {"TRITON_CACHE_DIR": lambda path: file(path / "f")},
        "Not a directory.*writes to .*f and .*TRITON_CACHE_DIR",
        id="cache-is-a-file",
    ),
    pytest.param(
        {"TRITON_CACHE_DIR": None, "TRITON_HOME": lambda path: file(path / "f")},
        "Not a directory.*TRITON_CACHE_DIR",
        id="home-is-a-file",
    ),
]


@pytest.mark.parametrize("variables, message", WITHOUT)
def test_what_triton_lacks_is_named(kernel, launch_module, monkeypatch, tmp_path, variables, message):
    kernels = import_module(f"{kernel.__name__}.kernels")
    monkeypatch.setattr(launch_module, "_compiled", {})
    monkeypatch.setattr(driver, "_active", Building(TARGETS["sm_90"], 104))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    if hasattr(build, "_find_compiler"):  # from Triton 3.9 on it remembers
        build._find_compiler.cache_clear()
    for name, value in variables.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value(tmp_path))
    with pytest.raises(RuntimeError, match=f"moe_grouped_gemm: Triton cannot compile: (?s:.*){message}") as caught:
        kernels.zero_skipped(torch.ones(4, 64), torch.zeros(4, dtype=torch.int32))
    assert caught.value.__cause__ is not None


def test_other_errors_stay_what_they_are(launch_module):
    for other in (ValueError("x"), RuntimeError("CUDA error: an illegal memory access"), KeyError("x")):
        with pytest.raises(type(other)) as caught, launch_module.explained():
            raise other
        assert caught.value is other


def training(kernel, args):
    return kernel.moe_experts, layer(*args)


def training_over_fp8(kernel, args):
    inputs, weights, scales = fp8_layer(kernel, *args)

    def function(*inputs):
        return kernel.moe_experts(*inputs, *weights, gate_up_proj_scale=scales[0], down_proj_scale=scales[1])

    return function, inputs


def training_of_adapters(kernel, args):
    *inputs, gate_up_proj, down_proj = layer(*args)
    factors = [*adapters(gate_up_proj, [64], 1), *adapters(down_proj, [64], 2)]
    lora = import_module(f"{kernel.__name__}.functional")

    def function(*tensors):
        *inputs, A1, B1, A2, B2 = tensors
        return low_rank(lora, (*inputs, gate_up_proj, down_proj), [A1, B1], [A2, B2])

    return function, (*inputs, *factors)


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [1, 4])
@pytest.mark.parametrize("make", [training, training_over_fp8, training_of_adapters])
def test_saved_tensors_at_another_alignment(kernel, make, offset):
    """As they come back from an offloader that packs them into one buffer, after a backward with them aligned."""
    function, inputs = make(kernel, (700, 8, 2, 512, 256, torch.bfloat16, "cuda"))
    dout = layer(700, 8, 2, 512, 256, torch.bfloat16, "cuda", seed=1)[0]

    def gradients():
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
        return torch.autograd.grad(function(*leaves), [t for t in leaves if t.requires_grad], dout)

    def pack(x):
        return stand_in(x, offset, x.device, x.numel()).view(x.shape).copy_(x)

    expected = gradients()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        found = gradients()
    for gradient, wanted in zip(found, expected):
        assert error(gradient, wanted.double()) < 1e-2
