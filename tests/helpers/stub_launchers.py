"""Triton's own launchers, those of NVIDIA and AMD, around a function in place of the C one. No GPU is needed."""

from importlib import import_module
from types import SimpleNamespace

from triton.compiler import CompiledKernel
from triton.runtime import driver

LAUNCHERS = {"nvidia": "CudaLauncher", "amd": "HIPLauncher"}
FUNCTION = 0x7F0000001234  # the handle of the compiled kernel


class StubDriver:
    """What launchers and compiled kernels ask the driver for."""

    def __init__(self, launch):
        self.device = -1  # as tensors on the CPU say of theirs
        self.streams = {self.device: 7}
        self.utils = SimpleNamespace(launch=launch, build_signature_metadata=lambda types: bytes(len(types)))

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return self.streams[device]


class StubKernel(CompiledKernel):
    """A compiled kernel with this launcher, already loaded."""

    def __init__(self, launcher):
        self._run, self.module, self.function = launcher, object(), FUNCTION
        self.packed_metadata, self.src, self.name = (4, 1, 2048), None, "stub"

    def __del__(self):
        """There is nothing to unload."""


def stub_kernel(backend, signature, launch, monkeypatch, **metadata):
    """A kernel of these types of arguments, whose launcher ends in `launch(*args)`; the active driver is a stub."""
    module = import_module(f"triton.backends.{backend}.driver")
    monkeypatch.setattr(driver, "_active", StubDriver(launch))
    # 3.6 builds a C file for each signature; since then arguments are described to one for all.
    built = SimpleNamespace(launch=launch)
    stubs = {"make_launcher": lambda *args: "", "library_dirs": list, "PyKernelArg": SimpleNamespace}
    stubs["compile_module_from_src"] = lambda *args, **options: built
    for name, stub in stubs.items():
        monkeypatch.setattr(module, name, stub, raising=False)
    names = [f"arg{i}" for i in range(len(signature))]
    source = SimpleNamespace(constants={}, signature=dict(zip(names, signature)), fn=SimpleNamespace(arg_names=names))
    scratch = {f"{kind}_scratch_{what}": 0 for kind in ("global", "profile") for what in ("size", "align")}
    others = {
        "num_ctas": 1,
        "launch_cooperative_grid": False,
        "launch_pdl": False,
        "warp_size": 32,
        "tensordesc_meta": [],
    }
    return StubKernel(getattr(module, LAUNCHERS[backend])(source, SimpleNamespace(**{**scratch, **others, **metadata})))
