"""4-bit weights that go from memory to registers to the tensor cores, for few rows; NVIDIA's from Ampere on.

    grouped_gemm_fp4_few:  y[r] = w[e] @ x[r] + bias[e]   x (S, K) -> y (S, N), tiles of a schedule with BLOCK_M rows

Weights are the first operand of mma.m16n8k16. A thread loads 16 bytes of a row, which are 32 codes with one scale, as
eight words of four codes; nibble i of all words makes a number of its own, so that two shifts, masks and products make
eight bf16 numbers out of one register. Columns of K are summed in the order that this gives: x is split the same way.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .launch import cdiv, launch
from .tiles import locate_tile

_GROUP = gl.constexpr(32)
_WORDS = gl.constexpr(8)  # of a group: four codes in 16 bits
STEP = 256  # columns: four threads in a row of mma, a group each, twice
_STEP = gl.constexpr(STEP)

# The four codes of each half of $4, a sign and three bits, become the sign and the last bits of exponent and mantissa,
# in bf16 or fp16: numbers that are 2^126 or 2^14 times too small. In bf16 a product moves both at once.
_TO_BF16 = gl.constexpr("""{
.reg .b32 upper, m;
shr.u32 upper, $4, 8;
and.b32 m, $4, 0x000F000F;    mul.lo.u32 m, m, 0x1040; and.b32 $0, m, 0x81C081C0;
and.b32 m, $4, 0x00F000F0;    mul.lo.u32 m, m, 0x0104; and.b32 $1, m, 0x81C081C0;
and.b32 m, upper, 0x000F000F; mul.lo.u32 m, m, 0x1040; and.b32 $2, m, 0x81C081C0;
and.b32 m, upper, 0x00F000F0; mul.lo.u32 m, m, 0x0104; and.b32 $3, m, 0x81C081C0;
}""")
_TO_FP16 = gl.constexpr("""{
.reg .b32 upper, sign, m;
shr.u32 upper, $4, 8;
shl.b32 sign, $4, 12;    and.b32 sign, sign, 0x80008000; shl.b32 m, $4, 9;
and.b32 m, m, 0x0E000E00; or.b32 $0, m, sign;
shl.b32 sign, $4, 8;     and.b32 sign, sign, 0x80008000; shl.b32 m, $4, 5;
and.b32 m, m, 0x0E000E00; or.b32 $1, m, sign;
shl.b32 sign, upper, 12; and.b32 sign, sign, 0x80008000; shl.b32 m, upper, 9;
and.b32 m, m, 0x0E000E00; or.b32 $2, m, sign;
shl.b32 sign, upper, 8;  and.b32 sign, sign, 0x80008000; shl.b32 m, upper, 5;
and.b32 m, m, 0x0E000E00; or.b32 $3, m, sign;
}""")


@gluon.jit
def _scale_layout(ROWS: gl.constexpr, A: gl.constexpr):
    """A tensor [ROWS, groups of a step] laid out so that a thread has the scales of its words."""
    like = gl.zeros((ROWS, _STEP // 4), gl.int16, A).reshape([ROWS, _STEP // _GROUP, _WORDS])
    return gl.zeros((ROWS, _STEP // _GROUP), gl.int32, gl.SliceLayout(2, like.type.layout))


@gluon.jit
def _x_columns(COLUMNS: gl.constexpr, dtype: gl.constexpr, MMA: gl.constexpr):
    """Where x is loaded: columns of K [STEP / 4, 1, 4] and rows [1, COLUMNS, 1], each thread what it multiplies."""
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, _WORDS)
    one = gl.zeros((_STEP // 4, COLUMNS), dtype, B)
    two = gl.join(one, one)
    LAYOUT: gl.constexpr = gl.join(two, two).reshape([_STEP // 4, COLUMNS, 4]).type.layout
    word = gl.arange(0, _STEP // 4, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    row = gl.arange(0, COLUMNS, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    nibble = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    k = gl.expand_dims(gl.expand_dims(word, 1), 2) * 4 + gl.expand_dims(gl.expand_dims(nibble, 0), 1)
    return k, gl.expand_dims(gl.expand_dims(row, 0), 2)


@gluon.jit
def _load_scales(row_ptrs, k, K, LAYOUT: gl.constexpr):
    """[ROWS, groups of a step] from column k on; past the last one those of another, for codes that are zero."""
    groups = k // _GROUP + gl.arange(0, _STEP // _GROUP, gl.SliceLayout(0, LAYOUT))
    return gl.load(gl.expand_dims(row_ptrs, 1) + gl.expand_dims(gl.minimum(groups, K // _GROUP - 1), 0))


@gluon.jit
def _as_scales(scale, dtype: gl.constexpr):
    """Exponents in the dtype of x if they all are numbers in it, everything else in fp32."""
    if scale.dtype != gl.uint8:
        return scale
    elif dtype == gl.bfloat16:
        bits = gl.maximum(scale.to(gl.int32) << 7, 1 << 6)  # 0 is 2^-127
        return gl.where(scale == 255, 0x7FC0, bits).to(gl.int16).to(gl.bfloat16, bitcast=True)
    else:
        bits = gl.maximum(scale.to(gl.int32) << 23, 1 << 22)
        return gl.where(scale == 255, 0x7FC00000, bits).to(gl.float32, bitcast=True)


@gluon.jit
def _scaled(numbers, scale, dtype: gl.constexpr):
    """[ROWS, STEP / 4] times the scales [ROWS, STEP / 32], rounded once."""
    ROWS: gl.constexpr = numbers.shape[0]
    LAYOUT: gl.constexpr = numbers.type.layout
    TO_ONE: gl.constexpr = 2.0**126 if dtype == gl.bfloat16 else 2.0**14
    grouped = numbers.reshape([ROWS, _STEP // _GROUP, _WORDS])
    one = gl.full([1, 1, 1], TO_ONE, dtype, grouped.type.layout)
    if scale.dtype == dtype:
        grouped = grouped * one * gl.expand_dims(scale, 2)  # exactly
    else:
        grouped = ((grouped * one).to(gl.float32) * gl.expand_dims(scale, 2)).to(dtype)
    return gl.convert_layout(grouped.reshape([ROWS, _STEP // 4]), LAYOUT, assert_trivial=True)


@gluon.jit
def _four_bf16(words):
    return gl.inline_asm_elementwise(
        _TO_BF16,
        "=r,=r,=r,=r,r",
        [words],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _four_fp16(words):
    return gl.inline_asm_elementwise(
        _TO_FP16,
        "=r,=r,=r,=r,r",
        [words],
        dtype=(gl.float16, gl.float16, gl.float16, gl.float16),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _multiply(acc, words, scale, x, MMA: gl.constexpr):
    """acc [ROWS, COLUMNS] + weights [ROWS, STEP] @ x: words [ROWS, STEP / 4], x [STEP / 4, COLUMNS, 4]."""
    dtype: gl.constexpr = x.dtype
    if dtype == gl.bfloat16:
        numbers = _four_bf16(words)
    else:
        numbers = _four_fp16(words)
    scale = _as_scales(scale, dtype)
    even, odd = gl.split(x.reshape([x.shape[0], x.shape[1], 2, 2]))
    x0, x2 = gl.split(even)
    x1, x3 = gl.split(odd)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, _WORDS)
    acc = mma_v2(_scaled(numbers[0], scale, dtype), gl.convert_layout(x0, B, assert_trivial=True), acc)
    acc = mma_v2(_scaled(numbers[1], scale, dtype), gl.convert_layout(x1, B, assert_trivial=True), acc)
    acc = mma_v2(_scaled(numbers[2], scale, dtype), gl.convert_layout(x2, B, assert_trivial=True), acc)
    acc = mma_v2(_scaled(numbers[3], scale, dtype), gl.convert_layout(x3, B, assert_trivial=True), acc)
    return acc


@gluon.jit(do_not_specialize=["max_tiles"])
def _grouped_gemm_fp4_few_kernel(
    x_ptr,  # (S, K)
    w_ptr,  # (E, N, K / 4) int16
    w_scale_ptr,  # (E, N, K / 32) fp32 | e8m0 as uint8
    bias_ptr,  # (E, N), or None
    y_ptr,  # (S, N)
    schedule_ptr,  # (5, max_tiles) int32
    max_tiles,
    N,
    K,
    stride_xm,
    stride_we,
    stride_wn,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [gl.num_warps(), 1], [16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, _WORDS)
    expert, _, row, row_end, tile_n = locate_tile(schedule_ptr, max_tiles, gl.cdiv(N, BLOCK_N), BLOCK_M, GROUP_M)
    if expert < 0:
        return
    expert = expert.to(gl.int64)
    offs_n = tile_n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, A))
    offs_w = gl.arange(0, _STEP // 4, gl.SliceLayout(0, A))
    w_ptrs = w_ptr + expert * stride_we + gl.expand_dims(offs_n.to(gl.int64) * stride_wn, 1) + gl.expand_dims(offs_w, 0)
    mask_n = gl.expand_dims(offs_n < N, 1)
    SCALES: gl.constexpr = _scale_layout(BLOCK_N, A).type.layout
    scale_rows = gl.minimum(tile_n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, SCALES)), N - 1)
    scale_ptrs = w_scale_ptr + (expert * N + scale_rows) * (K // _GROUP)
    k_of_x, row_of_x = _x_columns(BLOCK_M, x_ptr.dtype.element_ty, MMA)
    offs_x = row + row_of_x
    x_ptrs = x_ptr + offs_x.to(gl.int64) * stride_xm + k_of_x
    mask_x = offs_x < row_end
    acc = gl.zeros((BLOCK_N, BLOCK_M), gl.float32, MMA)
    words = gl.load(w_ptrs, mask=mask_n & gl.expand_dims(offs_w < K // 4, 0), other=0)
    scale = _load_scales(scale_ptrs, 0, K, SCALES)
    for k in range(0, K, _STEP):
        x = gl.load(x_ptrs + k, mask=mask_x & (k_of_x < K - k), other=0.0)
        ahead = k + _STEP
        next_words = gl.load(w_ptrs + ahead // 4, mask=mask_n & gl.expand_dims(offs_w < (K - ahead) // 4, 0), other=0)
        next_scale = _load_scales(scale_ptrs, ahead, K, SCALES)
        acc = _multiply(acc, words, scale, x, MMA)
        words = next_words
        scale = next_scale
    offs_n = tile_n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, MMA))
    offs_m = row + gl.arange(0, BLOCK_M, gl.SliceLayout(0, MMA))
    if bias_ptr is not None:
        bias = gl.load(bias_ptr + expert * N + offs_n, mask=offs_n < N, other=0.0).to(gl.float32)
        acc += gl.expand_dims(bias, 1)
    y_ptrs = y_ptr + gl.expand_dims(offs_m.to(gl.int64) * N, 0) + gl.expand_dims(offs_n, 1)
    mask = gl.expand_dims(offs_m < row_end, 0) & gl.expand_dims(offs_n < N, 1)
    gl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


def grouped_gemm_fp4_few(x, w, w_scale, schedule, config, y, bias=None):
    """As grouped_gemm_fp4, x in 16 bits; rows and experts of w begin at multiples of 16 bytes."""
    N, K = w.shape[1], x.shape[1]
    tiles = schedule.shape[1]
    words = w.view(torch.int16)
    sizes = (N, K, x.stride(0), words.stride(0), words.stride(1))
    launch(
        _grouped_gemm_fp4_few_kernel,
        (tiles * cdiv(N, config.BLOCK_N), 1, 1),
        (x, words, w_scale, bias, y, schedule),
        (tiles,),
        (*sizes, config.BLOCK_M, config.BLOCK_N, config.GROUP_M),
        num_warps=config.num_warps,
    )
    return y
