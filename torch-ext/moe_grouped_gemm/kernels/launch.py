"""Launching without the specialisation of every argument at every call, which takes longer than a small layer runs."""

import functools

import torch
from triton.runtime import driver

_compiled = {}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """1 for a device that is no GPU: kernels are only compiled with tensors from there."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def warp_size(device: torch.device) -> int:
    """Threads of a warp of this device, which is the current one."""
    return driver.active.get_current_target().warp_size


# Triton's own functions of these names are wrapped for use inside kernels too, at 2 us a call.
def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n; n is positive."""
    return 1 << (n - 1).bit_length()


def launch(kernel, grid, args, key, **options):
    """kernel[grid](*args, **options), with the compiled kernel remembered under `key`.

    Args:
        grid: three integers.
        args: every parameter of the kernel in order, constexprs too.
        key: hashable, different wherever Triton would specialise differently: device, dtypes, whether pointers and
            integers are divisible by 16, constexprs. Integers that a kernel does not specialise on may vary.
    """
    key = (kernel, key)
    compiled = _compiled.get(key)
    if compiled is None:
        # The interpreter compiles nothing and returns None.
        _compiled[key] = kernel[grid](*args, enable_fp_fusion=True, **options)
    else:
        compiled[grid](*args)
