"""Launches that are made again: with the addresses of another call, and only where nothing else was done."""

import ctypes
import threading

import pytest
import torch

pytest.importorskip("triton")


@pytest.fixture
def replay(kernel, monkeypatch):
    module = pytest.importorskip(f"{kernel.__name__}.kernels.replay")
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)  # as a CPU tensor has it
    return module


class Kernel:
    """In the place of a compiled one: out = x * w + number, of fp32 numbers at addresses."""

    def __init__(self, replay):
        self.launch, self.calls, self.streams = replay.recorded.__wrapped__.__globals__, 0, []

    def run(self, grid, stream, args):
        self.calls += 1
        self.streams.append(stream)
        x, w, out, size, number = args
        x, w, out = (None if a is None else (ctypes.c_float * size).from_address(a) for a in (x, w, out))
        for i in range(size):
            out[i] = x[i] * (1.0 if w is None else w[i]) + number

    def __call__(self, x, w, out, number):
        args = [None if t is None else t.data_ptr() for t in (x, w, out)]
        if self.launch["_recorder"] is not None:
            self.launch["_recorder"]((self.run, lambda device: "stream"), (1, 1, 1), args, (x.numel(), number))
        self.run((1, 1, 1), "stream", (*args, x.numel(), number))


def replays_of(replay, function, fixed, returned, precision=lambda: "ieee"):
    return replay.Replays(function, lambda: fixed, returned, precision)


def aligned(*shape):
    """As a GPU's allocator aligns."""
    storage = torch.empty(4096)
    start = -storage.data_ptr() % 64 // 4
    size = torch.Size(shape).numel()
    return storage[start : start + size].view(shape).normal_()


def two_steps(kernel, w):
    def function(x):
        a = torch.empty(x.shape)
        kernel(x, w, a, 1.0)
        out, other = torch.empty(x.shape), x.new_empty(x.shape)
        kernel(a, None, out, 2.0)
        kernel(a, w, other, 3.0)
        return out.view(x.shape), other

    return function


def expected(x, w):
    return x * w + 3.0, (x * w + 1.0) * w + 3.0


def test_other_calls(replay):
    kernel, w = Kernel(replay), aligned(2, 4)
    replays = replays_of(replay, two_steps(kernel, w), [w, None], (0, 1))
    results = []
    for _ in range(5):
        x = aligned(2, 4)
        results.append((replays(x), expected(x, w)))
    for got, wanted in results:  # none of them has been written by a later call
        torch.testing.assert_close(got, wanted)
    assert kernel.calls == 15 and callable(replays._replays[2, "ieee"])
    w.mul_(2)
    x = aligned(2, 4)
    torch.testing.assert_close(replays(x), expected(x, w))


class Descriptor:
    def __init__(self, base):
        self.base, self.shape = base, base.shape


def test_descriptors(replay):
    """Those of memory that moves are made anew, with all but their address; nobody's tensor is kept."""
    kernel, w, seen = Kernel(replay), aligned(2, 4), []

    def run(grid, stream, args):
        x, weight, a, size, number = args
        seen.append((weight, a))
        kernel.run(grid, stream, (x, weight.base.data_ptr(), a.base.data_ptr(), size, number))

    def function(x):
        a, out = torch.empty(x.shape), torch.empty(x.shape)
        args = [x.data_ptr(), Descriptor(w), Descriptor(a)]
        if kernel.launch["_recorder"] is not None:
            kernel.launch["_recorder"]((run, lambda device: "stream"), (1, 1, 1), args, (x.numel(), 1.0))
        run((1, 1, 1), "stream", (*args, x.numel(), 1.0))
        kernel(a, None, out, 2.0)
        return (out,)

    replays = replays_of(replay, function, [w], (0,))
    for _ in range(5):
        x = aligned(2, 4)
        torch.testing.assert_close(replays(x), (x * w + 3.0,))
    (w3, a3), (w4, a4) = seen[-2:]
    assert w3 is w4 and a3 is not a4 and a3.shape == (2, 4)
    assert not any(isinstance(d.base, torch.Tensor) for d in (w3, a3))


def test_results_that_nobody_reads(replay):
    kernel, w = Kernel(replay), aligned(2, 4)
    replays = replays_of(replay, two_steps(kernel, w), [w], (1,))
    for _ in range(4):
        x = aligned(2, 4)
        got = replays(x)
    assert got[0] is None
    torch.testing.assert_close(got[1], expected(x, w)[1])


def computed(x):
    return x + 1


def written(x):
    return torch.empty(x.shape).fill_(1.0)


@pytest.mark.parametrize("step", [computed, written, torch.clone])
def test_not_where_torch_computes(replay, step):
    kernel, w = Kernel(replay), aligned(2, 4)

    def function(x):
        out = torch.empty(x.shape)
        kernel(step(x), w, out, 1.0)
        return (out,)

    replays = replays_of(replay, function, [w], (0,))
    for _ in range(4):
        x = aligned(2, 4)
        torch.testing.assert_close(replays(x), (step(x) * w + 1.0,))
    assert replays._replays[2, "ieee"] is None


def test_not_where_an_address_is_unknown(replay):
    kernel, w, other = Kernel(replay), aligned(2, 4), aligned(2, 4)
    replays = replays_of(replay, two_steps(kernel, w), [other], (0, 1))
    for _ in range(4):
        x = aligned(2, 4)
        torch.testing.assert_close(replays(x), expected(x, w))
    assert replays._replays[2, "ieee"] is None


def test_not_for_other_inputs(replay, monkeypatch):
    kernel, w = Kernel(replay), aligned(2, 4)
    calls = []
    function = two_steps(kernel, w)
    replays = replays_of(replay, lambda x: calls.append(x) or function(x), [w], (0, 1))
    for _ in range(3):
        replays(aligned(2, 4))
    assert len(calls) == 2
    unaligned = aligned(3, 4).flatten()[1:9].view(2, 4)
    torch.testing.assert_close(replays(unaligned), expected(unaligned, w))
    monkeypatch.setattr(replay, "is_hooked", lambda: True)
    replays(aligned(2, 4))
    monkeypatch.setattr(replay, "is_hooked", lambda: False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1, raising=False)
    replays(aligned(2, 4))
    assert len(calls) == 5


def test_other_threads(replay):
    """What another thread launches meanwhile is not of this call; nor do two record at once."""
    kernel, w = Kernel(replay), aligned(2, 4)
    function, of_another = two_steps(kernel, w), aligned(2, 4)

    def disturbed(x):
        thread = threading.Thread(target=function, args=(of_another,))
        thread.start()
        thread.join()
        return function(x)

    replays = replays_of(replay, disturbed, [w], (0, 1))
    for _ in range(2):
        replays(aligned(2, 4))
    before = kernel.calls
    x = aligned(2, 4)
    torch.testing.assert_close(replays(x), expected(x, w))
    assert kernel.calls == before + 3
    others = replays_of(replay, function, [w], (0, 1))
    others(aligned(2, 4))
    with replay._recording:
        others(aligned(2, 4))
    assert others._replays[2, "ieee"] == 0


def test_an_error_while_it_records(replay):
    kernel, w = Kernel(replay), aligned(2, 4)
    function, fails = two_steps(kernel, w), [False, True, False, False]

    def failing(x):
        if fails.pop(0):
            raise RuntimeError("out of memory")
        return function(x)

    replays = replays_of(replay, failing, [w], (0, 1))
    replays(aligned(2, 4))
    with pytest.raises(RuntimeError, match="out of memory"):
        replays(aligned(2, 4))
    for _ in range(2):
        x = aligned(2, 4)
        torch.testing.assert_close(replays(x), expected(x, w))
    assert fails == [False] and kernel.launch["_recorder"] is None


def test_another_precision_is_another_replay(replay):
    kernel, w, precision = Kernel(replay), aligned(2, 4), ["ieee"]
    calls, function = [], two_steps(kernel, w)
    replays = replays_of(replay, lambda x: calls.append(1) or function(x), [w], (0, 1), lambda: precision[0])
    for _ in range(3):
        replays(aligned(2, 4))
    precision[0] = "tf32"
    for _ in range(3):
        replays(aligned(2, 4))
    assert len(calls) == 4


def test_an_input_that_lies_with_a_weight(replay):
    """Its address would pass for one of the weight's."""
    kernel, both = Kernel(replay), aligned(4, 4)
    w = both[:2]
    replays = replays_of(replay, two_steps(kernel, w), [w], (0, 1))
    for _ in range(2):
        replays(both[2:])
    x = aligned(2, 4)
    torch.testing.assert_close(replays(x), expected(x, w))


def called(replays, *tokens):
    for count in tokens:
        replays(aligned(count, 4))
    return {count for count, _ in replays._latest}


def test_of_many_tokens_the_latest(replay, monkeypatch):
    """What was called least lately goes; numbers that take turns are recorded, whatever was before them."""
    monkeypatch.setattr(replay, "_FEW_TOKENS", 1)
    monkeypatch.setattr(replay, "_LATEST", 2)
    kernel = Kernel(replay)

    def function(x):
        out = torch.empty(x.shape)
        kernel(x, None, out, 1.0)
        return (out,)

    replays = replays_of(replay, function, [], (0,))
    assert called(replays, 1, 1, 2, 3) == {2, 3} and callable(replays._replays[1, "ieee"])
    assert called(replays, 2, 4) == {2, 4}
    assert called(replays, 4, 4, 2, 2) == {2, 4} and all(map(callable, replays._latest.values()))
    assert called(replays, 5, 6, 5, 6) == {5, 6} and all(map(callable, replays._latest.values()))
    assert called(replays, 5, 7) == {5, 7}
    x = aligned(5, 4)
    torch.testing.assert_close(replays(x), (x + 1.0,))
    assert callable(replays._replays[1, "ieee"])


def test_weights_that_move_are_waited_for(replay):
    kernel, w, calls = Kernel(replay), aligned(2, 4), []
    function = two_steps(kernel, w)
    replays = replays_of(replay, lambda x: calls.append(1) or function(x), [w], (0, 1))
    for expected_calls in (2, 3, 5):
        calls.clear()
        for _ in range(8):
            replays(aligned(2, 4))
        assert len(calls) == expected_calls
        replays = replays.elsewhere()
    for _ in range(9):
        replays = replays.elsewhere()
    assert replays._wait == replay._MOST_WAIT
    for _ in range(2 * replay._MOST_WAIT + 2):  # and then stay
        replays(aligned(2, 4))
    assert replays._wait == replays.elsewhere()._wait == 1


def test_not_in_one_piece_that_is_too_large(replay, monkeypatch):
    monkeypatch.setattr(replay, "_MOST_SCRATCH", 511)
    kernel, w = Kernel(replay), aligned(2, 4)
    replays = replays_of(replay, two_steps(kernel, w), [w], (0, 1))
    for _ in range(3):
        x = aligned(2, 4)
        assert len(replays(x)) == 2
    assert replays._replays[2, "ieee"] is None
