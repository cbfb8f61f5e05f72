"""Compiling Triton kernels for a GPU that need not be here: the real launchers run, but nothing is launched."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_run = JITFunction.run


class NoGPU:
    """What JITFunction asks a driver before it compiles."""

    def __init__(self, target, device):
        self.target, self.device = target, device

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0


def compile_only(target, device=0) -> list:
    """From now on every kernel that this process launches is compiled for the target, and goes no further.

    Its arguments may be on the CPU or on "meta", which takes no memory: Triton looks at dtypes, sizes and alignment.
    Returns the list to which (name, compiled kernel) of each is added. Targets need different device numbers.
    """
    compiled = []
    driver.set_active(NoGPU(target, device))

    def run(self, *args, warmup, **options):
        compiled.append((self.__name__, _run(self, *args, warmup=True, **options)))

    JITFunction.run = run
    return compiled


def registers_and_stack(cubin: bytes) -> tuple[int, int]:
    """Registers a thread uses, and bytes of stack: a kernel with a stack spills."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack)
