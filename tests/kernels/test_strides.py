"""Operands so far apart in memory that an index times a stride passes 2**31: the same results as from dense ones.

Whatever has strides in each launcher. Under the interpreter only the pages that are touched take memory.
"""

import mmap
from importlib import import_module

import pytest
import torch

from interpreted import DEVICE, DTYPES, on_triton, under_the_interpreter

T, E, TOP_K, H, I = 5, 2, 2, 136, 24  # H: one step of 128, and then another
FAR = 2**24  # between columns of a weight: H of them, or a step of BLOCK_K, are more than 2**31 apart
ROWS_APART = 2**30
MAP_NORESERVE = 0x4000  # Linux; Python names it from 3.11 on

test_under_the_interpreter = under_the_interpreter(__file__)


@pytest.fixture
def spread():
    """spread(x, *strides): x with these strides. 2**31 elements lie before it: what wraps around reads zeros there."""

    def spread(x, *strides):
        size = 2**31 + 1 + sum((n - 1) * stride for n, stride in zip(x.shape, strides))
        if x.is_cuda:
            if torch.cuda.mem_get_info()[0] < 2 * size * x.element_size():
                pytest.skip("needs more GPU memory")
            memory = torch.empty(size, dtype=x.dtype, device=x.device)[: 2**31].zero_()
        else:
            pages = mmap.mmap(-1, size * x.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
            memory = torch.frombuffer(pages, dtype=x.dtype)
        return memory.as_strided(x.shape, strides, 2**31).copy_(x)

    return spread


def columns_apart(w):
    """Strides of experts (E, N, K) that are stored (K, E, N), among others."""
    return w.shape[1], 1, FAR


def randn(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, DTYPES[0])


def codes(*shape):
    """fp8 weights as bytes, which the interpreter and every GPU read, and their scales."""
    generator = torch.Generator().manual_seed(sum(shape))
    bits = torch.randint(0x70, shape, generator=generator, dtype=torch.uint8)
    scale = torch.rand(shape[0], *(-(-n // 128) for n in shape[1:]), generator=generator)
    return bits.to(DEVICE), scale.to(DEVICE) / 256


def routing(launch, block_m):
    index = torch.arange(T * TOP_K, device=DEVICE).view(T, TOP_K) % E
    return index, launch.route(index, E, block_m)


def assert_same(function, near, far):
    found, expected = function(far), function(near)
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected)


@on_triton
def test_weights_in_decode(kernel, launch, spread):
    gate, decode = kernel.reference.Gate(), import_module(f"{kernel.__name__}.tuning").DECODE_TRANSPOSED
    index, _ = routing(launch, 16)
    x, w = randn(T, H), randn(E, 2 * I, H)
    far = spread(w, *columns_apart(w))
    assert_same(lambda w: launch.gate_up_decode(x, w, index, gate, decode.gate_up), w, far)
    a, w = randn(T * TOP_K, H), randn(E, I, H)  # as many columns here
    far = spread(w, *columns_apart(w))
    weights = torch.ones(T, TOP_K, device=DEVICE)
    assert_same(lambda w: launch.down_decode(a, w, index, weights, decode.down), w, far)


@on_triton
def test_weights_of_shared_experts(kernel, launch, spread):
    gate, decode = kernel.reference.Gate(), import_module(f"{kernel.__name__}.tuning").DECODE
    index, x, weights = routing(launch, 16)[0][:1], randn(1, H), torch.ones(1, TOP_K, device=DEVICE)
    gate_up, down = randn(E, 2 * I, H), randn(E, H, I)

    def run(shared):
        a = launch.gate_up_decode(x, gate_up, index, gate, decode.gate_up, shared=shared)
        return launch.down_decode(a, down, index, weights, decode.down, shared=shared)

    shared = (randn(I, H), randn(I, H), randn(H, I), None)
    assert_same(run, shared, [None if w is None else spread(w, ROWS_APART, 1) for w in shared])


@on_triton
@pytest.mark.parametrize("block_m", [16, 64], ids=["weights-first", "rows-first"])
def test_weights_in_gemms(kernel, launch, config, spread, block_m):
    gate = kernel.reference.Gate()
    config = config(BLOCK_M=block_m, MIN_M=block_m, BLOCK_N=16, BLOCK_K=128)
    _, (_, slots, _, schedule) = routing(launch, block_m)
    x, w = randn(T, H), randn(E, 2 * I, H)
    far = spread(w, *columns_apart(w))
    assert_same(lambda w: launch.gate_up(x, w, slots, schedule, TOP_K, gate, "ieee", config), w, far)
    x = randn(T * TOP_K, H)
    assert_same(lambda w: launch.grouped_gemm(x, w, schedule, "ieee", config), w, far)


@on_triton
def test_weights_in_fp8(kernel, launch, config, spread):
    gate = kernel.reference.Gate()
    config = config(BLOCK_N=16, BLOCK_K=128)
    _, (_, slots, _, schedule) = routing(launch, 16)
    w, scale = codes(E, 2 * I, H)
    far = spread(w, *columns_apart(w))
    x, rows = randn(T, H), randn(T * TOP_K, H)

    def gate_up(w):
        return launch.gate_up_fp8(x, None, w, scale, slots, schedule, TOP_K, gate, "ieee", config)[0]

    def grouped_gemm(w):
        y = rows.new_empty(T * TOP_K, 2 * I)
        return launch.grouped_gemm_fp8(rows, None, w, scale, schedule, "ieee", config, y)

    assert_same(gate_up, w, far)
    assert_same(grouped_gemm, w, far)
    w, scale = codes(E, H, I)
    far = spread(w, I, FAR, 1)
    assert_same(lambda w: launch.dgrad_fp8(rows, w, scale, schedule, "ieee", config), w, far)


@on_triton
def test_rows(kernel, launch, config, spread):
    gate, tuning = kernel.reference.Gate(), import_module(f"{kernel.__name__}.tuning")
    config = config(BLOCK_N=16)
    index, (offsets, slots, _, schedule) = routing(launch, 16)
    x, w = randn(T, H), randn(E, 2 * I, H)
    far = spread(x, ROWS_APART, 1)
    weights, positions = torch.ones(T, TOP_K, device=DEVICE), torch.arange(T, dtype=torch.int32, device=DEVICE)
    for function in (
        lambda x: launch.gather(x, slots, offsets, TOP_K),
        lambda x: launch.row_sums(x, slots, offsets, weights),
        lambda x: launch.gate_up_decode(x, w, index, gate, tuning.DECODE.gate_up),
        lambda x: launch.gate_up(x, w, slots, schedule, TOP_K, gate, "ieee", config),
        lambda x: launch.router_logits(x, w[0], tuning.ROUTER.least[0][1]),
        lambda x: launch.quantize_rows(x)[1],
        lambda x: launch.combine(x.contiguous(), positions, weights[:, :1].contiguous(), x),
    ):
        assert_same(function, x, far)
    rows = torch.tensor([0, 2, T], dtype=torch.int32, device=DEVICE)
    schedule = launch.tile_schedule(rows, T, 16)
    y = randn(T, I)
    for function in (
        lambda x: launch.wgrad(x, y, rows, "ieee", config),
        lambda x: launch.wgrad(y, x, rows, "ieee", config),
        lambda x: launch.grouped_gemm(x, w, schedule, "ieee", config),
    ):
        assert_same(function, x, far)
