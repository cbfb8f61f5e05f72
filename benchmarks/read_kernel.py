"""A kernel that only reads: what it streams a second is the read bandwidth of a GPU."""

import triton
import triton.language as tl


@triton.jit
def read_kernel(x_ptr, out_ptr, LOADS: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * LOADS * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(LOADS):
        acc += tl.load(x_ptr + offs + i * BLOCK)
    tl.store(out_ptr + tl.program_id(0), tl.sum(acc, axis=0))
