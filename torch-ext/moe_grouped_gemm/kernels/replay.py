"""A call's launches, made again without the Python that led to them the first time.

Where tokens are few the host sets the pace: shapes, strides, configurations and allocations of four launches take it
longer than the launches. They depend on nothing but the call's shapes, so a call is recorded: which kernels, grids and
arguments. Another call like it launches the same with the addresses of its own input, outputs and scratch memory.

Of more tokens the GPU takes longer than the host for this one call, but not for what else a model does between two of
them, above all where GPUs share it. How many there are is then seldom one of a few numbers: the latest are remembered.
"""

import copy
import threading
from collections import OrderedDict

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .launch import is_hooked, recorded

_ALIGNMENT = 512  # as by torch's allocator; a kernel is compiled for what 16 divides
_FEW_TOKENS = 64  # every number of them is remembered
_MOST_TOKENS = 4096
_LATEST = 16  # numbers of more than a few
_MOST_SCRATCH = 2**28  # bytes of one piece, which are held longer than its parts are when they are made one by one
_MOST_WAIT = 64


class Replays:
    """`function(*inputs)` -> a tuple of tensors, for inputs (T, ...) that differ in T.

    Args:
        function: launches kernels of ours. Anything else that it does on the GPU keeps a call from being replayed.
        fixed: a function that returns the other tensors that its kernels read, or None among them: their addresses are
            the same in every call, for as long as somebody has these replays.
        returned: which of its results callers read; the others are None in a replay.
        precision: a function that returns what fp32 products are made in, which a launch has as a constant.
        wait: calls with a number of tokens before one is recorded, which takes as long as a few dozen.
    """

    def __init__(self, function, fixed, returned, precision, wait=1):
        self._function, self._fixed, self._returned, self._precision = function, fixed, returned, precision
        self._wait = wait
        # (tokens, precision of fp32 products) -> a replay; or None, where there is none; or how many calls to wait
        # for, in which kernels are compiled, which is not recorded.
        self._replays, self._latest = {}, OrderedDict()
        self._repeated = 0

    def elsewhere(self):
        """For `fixed` tensors in other memory.

        Those that have moved may do so again: each time it waits longer, until they have stayed for a while.
        """
        wait = 1 if self._repeated > _MOST_WAIT else min(2 * self._wait, _MOST_WAIT)
        return Replays(self._function, self._fixed, self._returned, self._precision, wait)

    def __call__(self, *inputs):
        first = inputs[0]
        tokens = first.shape[0]
        if tokens > _MOST_TOKENS or is_hooked() or first.get_device() != torch._C._cuda_getDevice():
            return self._function(*inputs)
        for x in inputs:
            if x.data_ptr() % 16 or not x.is_contiguous():
                return self._function(*inputs)
        key = tokens, first.dtype == torch.float32 and self._precision()
        replays = self._replays if tokens <= _FEW_TOKENS else self._latest
        replay = replays.get(key, self._wait)
        if type(replay) is int:
            return self._recorded_later(replays, key, replay, inputs)
        if replays is self._latest:
            self._remember(key, replay)
        if replay is None:
            return self._function(*inputs)
        self._repeated += 1
        if self._repeated > _MOST_WAIT:
            self._wait = 1
        return replay(*inputs)

    def _remember(self, key, replay):
        """Of more than a few tokens, as the latest; the one that was called least lately is forgotten."""
        self._latest.pop(key, None)
        self._latest[key] = replay
        while len(self._latest) > _LATEST:
            self._latest.popitem(last=False)

    def _recorded_later(self, replays, key, wait, inputs):
        if not _recording.acquire(blocking=False):
            return self._function(*inputs)
        try:
            results, replay = None, wait - 1
            if wait == 0:
                results, replay = _record(self._function, inputs, self._fixed(), self._returned)
            if replays is self._latest:
                self._remember(key, replay)
            else:
                replays[key] = replay
        finally:
            _recording.release()
        return self._function(*inputs) if results is None else results


_recording = threading.Lock()


def _record(function, inputs, fixed, returned):
    """Results of function(*inputs), and a function of other inputs; None, if what it does cannot be done again."""
    with _Recording() as recording, recorded(recording.launched):
        results = function(*inputs)
    return results, recording.replay(inputs, fixed, results, returned)


class _Recording(TorchDispatchMode):
    """Of this thread: the launches, the memory that was allocated, and whether there was anything else."""

    def __init__(self):
        super().__init__()
        self._thread = threading.get_ident()
        self._launches, self._allocated, self._is_whole = [], [], True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name
        if name in ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided"):
            self._allocated.append(result)  # which keeps its memory from being allocated twice
        elif not function.is_view:
            self._is_whole = False
        return result

    def launched(self, short, grid, args, others):
        if threading.get_ident() != self._thread:
            return
        self._launches.append((short, grid, args, others))

    def replay(self, inputs, fixed, results, returned):
        if not self._is_whole or not self._launches or any(short is None for short, *_ in self._launches):
            return None
        # Where an address may lie: from, to, number of the base, and offset of the first from it. Bases: 0, scratch
        # memory, the inputs, and the outputs.
        fixed = [_span(t) for t in fixed if t is not None]
        if any(_span(x) in fixed for x in inputs):
            return None
        places = [(*span, 0, span[0]) for span in fixed]
        places += [(x.data_ptr(), x.data_ptr() + x.nbytes, i, 0) for i, x in enumerate(inputs, start=2)]
        outputs = [results[i] for i in returned]
        size, bases = 0, {_span(t): i for i, t in enumerate(outputs, start=2 + len(inputs))}
        for t in self._allocated:
            span = _span(t)
            if span in bases:
                places.append((*span, bases[span], 0))
            else:
                places.append((*span, 1, size))
                size += -(-(span[1] - span[0]) // _ALIGNMENT) * _ALIGNMENT
        if size > _MOST_SCRATCH:
            return None
        are_new = set(bases) <= {_span(t) for t in self._allocated}
        if not are_new or not all(t.is_contiguous() and t.storage_offset() == 0 for t in outputs):
            return None
        launches = []
        for (run, _), grid, args, others in self._launches:
            found = [_place(arg, places) for arg in args]
            if any(place is None and arg is not None for arg, place in zip(args, found)):
                return None
            descriptors = [(i, arg) for i, arg in enumerate(args) if hasattr(arg, "base")]
            still = [(i, _at(arg, found[i][1])) for i, arg in descriptors if found[i][0] == 0]
            moving = [(i, _at(arg, 0)) for i, arg in descriptors if found[i][0] != 0]
            launches.append((run, grid, found, still, moving, others))
        shapes = [(t.shape, t.dtype) for t in outputs]
        device, count = inputs[0].device, len(results)
        _, stream_of = self._launches[0][0]

        def play(*inputs):
            scratch = torch.empty(size, dtype=torch.uint8, device=device)
            outputs = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]
            bases = [0, scratch.data_ptr(), *[t.data_ptr() for t in inputs], *[t.data_ptr() for t in outputs]]
            stream = stream_of(device.index)
            for run, grid, places, still, moving, others in launches:
                args = [None if place is None else bases[place[0]] + place[1] for place in places]
                for i, descriptor in still:
                    args[i] = descriptor
                for i, descriptor in moving:
                    args[i] = _at(descriptor, args[i])
                run(grid, stream, (*args, *others))
            results = [None] * count
            for i, output in zip(returned, outputs):
                results[i] = output
            return tuple(results)

        return play


class _Address:
    """All that a launch asks of a descriptor's tensor."""

    __slots__ = ("_address",)

    def __init__(self, address):
        self._address = address

    def data_ptr(self):
        return self._address


def _at(descriptor, address):
    """One like it, of a tensor there. A new one: another thread may be on its way to launch with the old one."""
    moved = copy.copy(descriptor)
    moved.base = _Address(address)
    return moved


def _span(t):
    storage = t.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _place(arg, places):
    """(number of the base, offset from it) of an address, or of a descriptor's; None: nothing that we know."""
    if arg is None:
        return None
    address = arg if isinstance(arg, int) else arg.base.data_ptr()
    for first, end, base, offset in places:
        if first <= address < end:
            return base, offset + address - first
    return None
