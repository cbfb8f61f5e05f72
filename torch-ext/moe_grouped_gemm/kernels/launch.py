"""Launching without the specialisation of every argument at every call, which takes longer than a small layer runs."""

import contextlib
import functools
import os
import warnings

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

from .shortcut import is_hooked, shortcut

_compiled = {}

# Called with every launch while somebody records them, in this thread or another.
_recorder = None

# AMD's compiler specialises on whether 32-bit offsets reach all of a tensor's storage.
REACH_MATTERS = torch.version.hip is not None


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """1 for a device that is no GPU: kernels are only compiled with tensors from there."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def warp_size(device: torch.device) -> int:
    """Threads of a warp of this device, which is the current one."""
    with explained():
        return driver.active.get_current_target().warp_size


# Triton's own functions of these names are wrapped for use inside kernels too, at 2 us a call.
def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n; n is positive."""
    return 1 << (n - 1).bit_length()


def launch(kernel, grid, tensors, numbers, constants, num_warps=4, num_stages=None):
    """kernel[grid](*tensors, *numbers, *constants), and the compiled kernel remembered.

    Under all that Triton specialises on, so that callers need not know: device, dtypes and alignment of the tensors,
    values of the constants. With tensors on "meta" it is compiled into Triton's cache, and that is all.

    Args:
        grid: three integers.
        tensors: or None in place of one, or descriptors, whose boxes follow from dtypes and constants. The last one is
            a tensor.
        numbers: that the kernel does not specialise on: floats, and its `do_not_specialize`, sizes that follow the
            number of tokens, of which a new one must not compile anew.
        constants: integers, tuples of them, and constexprs.
    Raises:
        ValueError: a tensor has elements and no memory; the kernel would read at address 0.
    """
    # Its function in place of the kernel, whose hash takes Triton a microsecond.
    key = [kernel.fn, constants, num_warps, num_stages]
    args, addresses = [], 0
    for x in tensors:
        if x is None:
            key.append(None)
            args.append(None)
            continue
        if isinstance(x, Tensor):
            address = x.data_ptr()
            args.append(address)
        else:
            args.append(x)
            x = x.base  # which a descriptor demands to be aligned
            address = x.data_ptr()
        if not address:
            _check_address(x)
        addresses |= address
        key.append(x.dtype)
    device = x.get_device()
    key.append(device)
    if addresses % 16 or REACH_MATTERS:
        key += [_alignment_and_reach(x) for x in tensors]
    key = tuple(key)
    remembered = _compiled.get(key)
    recorder = _recorder  # once: another thread may end its recording
    if remembered is None:
        if recorder is not None:
            recorder(None, grid, args, ())
        _launch_first(key, kernel, grid, x.is_meta, (*tensors, *numbers, *constants), num_warps, num_stages)
        return
    compiled, short = remembered
    if recorder is not None:
        recorder(short, grid, args, (*numbers, *constants))
    if short is None or is_hooked():
        compiled[grid](*tensors, *numbers, *constants)
    else:
        run, stream_of = short
        run(grid, stream_of(device), (*args, *numbers, *constants))


@contextlib.contextmanager
def recorded(recorder):
    """recorder(shortcut or None, grid, addresses, other arguments) is called with each launch; not to be nested."""
    global _recorder
    _recorder = recorder
    try:
        yield
    finally:
        _recorder = None


def _launch_first(key, kernel, grid, is_meta, args, num_warps, num_stages):
    options = {"enable_fp_fusion": True, "num_warps": num_warps}
    if num_stages is not None:
        options["num_stages"] = num_stages
    with explained():
        if is_meta:
            kernel.warmup(*args, grid=grid, **options)
            return
        compiled = _launch_what_fits(kernel, grid, args, options)
    if compiled is not None:  # as from the interpreter
        _compiled[key] = compiled, shortcut(compiled, len(args))


def _launch_what_fits(kernel, grid, args, options):
    """With as many stages as the GPU has shared memory for, at most those of `options`: the result is the same."""
    most = options.get("num_stages")
    if most is None:
        return kernel[grid](*args, **options)
    for stages in range(most, 0, -1):
        try:
            compiled = kernel[grid](*args, **{**options, "num_stages": stages})
        except OutOfResources as error:
            if error.name != "shared memory" or stages == 1:
                raise
            continue
        if stages < most:
            name = kernel.__name__.strip("_")
            warnings.warn(
                f"moe_grouped_gemm: {name} needs more shared memory than this GPU has, with the tile sizes that were "
                "chosen for it, and runs with fewer stages. `tune` finds what suits it.",
                stacklevel=2,
            )
        return compiled


def _alignment_and_reach(x):
    return (x.data_ptr() % 16, x.untyped_storage().nbytes() < 2**31) if isinstance(x, Tensor) else None


def _check_address(x):
    """That of a fake tensor, or of a wrapper around others, is 0. So it is on "meta", where kernels only compile."""
    if x.numel() and not x.is_meta:
        raise ValueError(
            f"a kernel cannot read {type(x).__name__} {tuple(x.shape)} on {x.device}, which has no memory of its own; "
            "expected plain tensors, in place of a wrapper such as DTensor its local one"
        )


@contextlib.contextmanager
def explained():
    """What keeps Triton from building its launcher or from writing its cache becomes an error that says what to do."""
    try:
        yield
    except Exception as error:
        remedy = _remedy(error)
        if remedy is None:
            raise
        raise RuntimeError(f"moe_grouped_gemm: Triton cannot compile: {remedy}") from error


def _remedy(error):
    """What to do about an error, or None: then it is not about what Triton runs and writes."""
    compiler = os.environ.get("CC")
    if isinstance(error, OSError) and compiler is not None and error.filename == compiler:
        return f"CC={compiler!r} cannot be run ({error.strerror}). Unset CC, or have it name a C compiler."
    if isinstance(error, OSError):
        return (
            f"{error}. It writes to {knobs.cache.dir} and to the directory for temporary files: set TRITON_CACHE_DIR, "
            "or TMPDIR, to one that can be made, can be written and has space left."
        )
    if isinstance(error, ImportError):
        return (
            f"{error}. It loads what it built from {knobs.cache.dir}: set TRITON_CACHE_DIR to a directory of a file "
            "system that is not mounted noexec."
        )
    if hasattr(error, "cmd"):  # subprocess.CalledProcessError
        return (
            f"{error.cmd[0]} failed, for the reason that it printed. If Python.h is missing, install the headers of "
            "your Python (apt install python3-dev)."
        )
    if isinstance(error, RuntimeError) and "C compiler" in str(error):
        return "there is no C compiler. Install one (apt install gcc), or set CC to the path of one."
    return None
