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
STEP = 256  # columns: four threads in a row of mma, a group each, twice
_STEP = gl.constexpr(STEP)
_WORDS = gl.constexpr(8)  # of a group: four codes in 16 bits
# Weights in bf16 with exponents for scales are this much too small until the end, see `as_factors`.
TOO_SMALL = gl.constexpr(2.0**-32)

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
def four_numbers(words, dtype: gl.constexpr):
    """Of each word its nibbles 0 to 3, as tensors of their own, too small by what is said above."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            _TO_BF16,
            "=r,=r,=r,=r,r",
            [words],
            dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        return gl.inline_asm_elementwise(
            _TO_FP16,
            "=r,=r,=r,=r,r",
            [words],
            dtype=(gl.float16, gl.float16, gl.float16, gl.float16),
            is_pure=True,
            pack=2,
        )


@gluon.jit
def as_factors(scale, dtype: gl.constexpr):
    """What `scaled` takes: of exponents in bf16, what makes weights TOO_SMALL of `four_numbers` in one exact product.

    So scales from 2^-94 to 2^33 give what they should, greater ones NaN. Otherwise the scales in fp32.
    """
    if scale.dtype != gl.uint8:
        return scale
    elif dtype == gl.bfloat16:
        # 2^126 * 2^(exponent - 127) * 2^-32
        bits = gl.where(scale > 160, 0x7FC0, (scale.to(gl.int32) + (126 - 32)) << 7)
        return bits.to(gl.int16).to(gl.bfloat16, bitcast=True)
    else:
        bits = gl.maximum(scale.to(gl.int32) << 23, 1 << 22)
        return gl.where(scale == 255, 0x7FC00000, bits).to(gl.float32, bitcast=True)


@gluon.jit
def scaled(numbers, factor):
    """[ROWS, words] times factors [ROWS, groups], rounded once."""
    ROWS: gl.constexpr = numbers.shape[0]
    W: gl.constexpr = numbers.shape[1]
    LAYOUT: gl.constexpr = numbers.type.layout
    dtype: gl.constexpr = numbers.dtype
    grouped = numbers.reshape([ROWS, W // _WORDS, _WORDS])
    factor = gl.expand_dims(factor, 2)
    if factor.dtype == dtype:
        grouped = grouped * factor
    else:
        # Two products: 2^126 times a scale may be no number.
        TO_ONE: gl.constexpr = 2.0**126 if dtype == gl.bfloat16 else 2.0**14
        grouped = ((grouped.to(gl.float32) * TO_ONE) * factor).to(dtype)
    return gl.convert_layout(grouped.reshape([ROWS, W]), LAYOUT, assert_trivial=True)


@gluon.jit
def _scale_layout(ROWS: gl.constexpr, MMA: gl.constexpr):
    """A tensor [ROWS, groups of a step] laid out so that a thread has the scales of its words."""
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, _WORDS)
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
def _load_x(x_ptrs, k_of_x, k, K, EVEN: gl.constexpr):
    return gl.load(x_ptrs + k) if EVEN else gl.load(x_ptrs + k, mask=k_of_x < K - k, other=0.0)


@gluon.jit
def _load_words(w_ptrs, k, K, EVEN: gl.constexpr):
    """Pairs [ROWS, STEP / 8] from column k on; past the last one zero."""
    if EVEN:
        return gl.load(w_ptrs + k // 8)
    else:
        offs_w = gl.arange(0, _STEP // 8, gl.SliceLayout(0, w_ptrs.type.layout))
        return gl.load(w_ptrs + k // 8, mask=gl.expand_dims(offs_w < (K - k) // 8, 0), other=0)


@gluon.jit
def _load_scales(w_scale_ptr, rows, k, K):
    """[ROWS, STEP / 32] of these rows of all experts, int64, from column k on; past the last one another's.

    Four threads share a row. Exponents come as int64, eight at a time and to all four, and each takes its own two.
    """
    GROUPS: gl.constexpr = _STEP // _GROUP
    SCALES: gl.constexpr = rows.type.layout.parent
    ROWS: gl.constexpr = rows.shape[0]
    if w_scale_ptr.dtype.element_ty == gl.int64:
        like = gl.zeros((ROWS, GROUPS), gl.int32, SCALES).reshape([ROWS, 2, 4])
        FOURS: gl.constexpr = gl.SliceLayout(2, like.type.layout)
        rows = gl.convert_layout(rows, gl.SliceLayout(1, FOURS), assert_trivial=True)
        eights = gl.expand_dims(gl.load(w_scale_ptr + rows * (K // _STEP) + k // _STEP), 1)
        half = gl.expand_dims(gl.arange(0, 2, gl.SliceLayout(0, FOURS)), 0)
        fours = gl.where(half == 0, eights.to(gl.int32), (eights >> 32).to(gl.int32))
        place = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(0, like.type.layout)))
        scales = gl.expand_dims(fours, 2) >> (8 * gl.expand_dims(gl.expand_dims(place, 0), 0))
        return gl.convert_layout(scales.reshape([ROWS, GROUPS]), SCALES, assert_trivial=True).to(gl.uint8)
    else:
        groups = gl.minimum(k // _GROUP + gl.arange(0, GROUPS, gl.SliceLayout(0, SCALES)), K // _GROUP - 1)
        return gl.load(w_scale_ptr + gl.expand_dims(rows * (K // _GROUP), 1) + gl.expand_dims(groups, 0))


@gluon.jit
def _load_weights(w_ptrs, w_scale_ptr, rows, k, K, EVEN: gl.constexpr):
    """What `_multiply` takes of weights, from column k on."""
    return _load_words(w_ptrs, k, K, EVEN), _load_scales(w_scale_ptr, rows, k, K)


@gluon.jit
def _next_step(k, K):
    """The one after k; after the last, that one again, whose weights are near."""
    return gl.minimum(k + _STEP, (gl.cdiv(K, _STEP) - 1) * _STEP)


@gluon.jit
def _multiply(acc, pairs, scale, x, MMA: gl.constexpr):
    """acc [ROWS, COLUMNS] + weights [ROWS, STEP] @ x: pairs of words [ROWS, STEP / 8], x [STEP / 4, COLUMNS, 4]."""
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, _WORDS)
    # As one tensor of registers until here: one of halves would be taken apart and put together wherever it goes.
    words = gl.join(pairs.to(gl.int16), (pairs >> 16).to(gl.int16)).reshape([pairs.shape[0], 2 * pairs.shape[1]])
    words = gl.convert_layout(words, A, assert_trivial=True)
    dtype: gl.constexpr = x.dtype
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, _WORDS)
    numbers = four_numbers(words, dtype)
    factor = as_factors(scale, dtype)
    even, odd = gl.split(x.reshape([x.shape[0], x.shape[1], 2, 2]))
    x0, x2 = gl.split(even)
    x1, x3 = gl.split(odd)
    acc = mma_v2(scaled(numbers[0], factor), gl.convert_layout(x0, B, assert_trivial=True), acc)
    acc = mma_v2(scaled(numbers[1], factor), gl.convert_layout(x1, B, assert_trivial=True), acc)
    acc = mma_v2(scaled(numbers[2], factor), gl.convert_layout(x2, B, assert_trivial=True), acc)
    acc = mma_v2(scaled(numbers[3], factor), gl.convert_layout(x3, B, assert_trivial=True), acc)
    return acc


@gluon.jit
def _rescaled(acc, scale, dtype: gl.constexpr):
    """acc without what `as_factors` left out."""
    return acc * (1.0 / TOO_SMALL) if dtype == gl.bfloat16 and scale.dtype == gl.uint8 else acc


@gluon.jit(do_not_specialize=["max_tiles"])
def _grouped_gemm_fp4_few_kernel(
    x_ptr,  # (S, K)
    w_ptr,  # (E, N, K / 8) int32
    w_scale_ptr,  # (E, N, K / 32) fp32 | e8m0 as uint8, or (E, N, K / 256) as int64
    bias_ptr,  # (E, N), or None
    y_ptr,  # (S, N)
    schedule_ptr,  # (5, max_tiles) int32
    max_tiles,
    N,
    K,
    stride_xm,
    stride_we,  # these two in 16 bytes
    stride_wn,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    GROUP_M: gl.constexpr,
    EVEN: gl.constexpr,
):
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [gl.num_warps(), 1], [16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, _WORDS // 2)
    SCALES: gl.constexpr = _scale_layout(BLOCK_N, MMA).type.layout
    expert, _, row, row_end, tile_n = locate_tile(schedule_ptr, max_tiles, gl.cdiv(N, BLOCK_N), BLOCK_M, GROUP_M)
    if expert < 0:
        return
    expert = expert.to(gl.int64)
    # Rows and weight rows past the last are the last again, and their products are not stored.
    offs_n = gl.minimum(tile_n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, A)), N - 1)
    w_ptrs = w_ptr + expert * stride_we * 4 + gl.expand_dims(offs_n.to(gl.int64) * stride_wn * 4, 1)
    w_ptrs += gl.expand_dims(gl.arange(0, _STEP // 8, gl.SliceLayout(0, A)), 0)
    scale_rows = gl.minimum(tile_n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, SCALES)), N - 1) + expert * N
    k_of_x, row_of_x = _x_columns(BLOCK_M, x_ptr.dtype.element_ty, MMA)
    x_ptrs = x_ptr + gl.minimum(row + row_of_x, row_end - 1).to(gl.int64) * stride_xm + k_of_x
    acc = gl.zeros((BLOCK_N, BLOCK_M), gl.float32, MMA)
    words, scale = _load_weights(w_ptrs, w_scale_ptr, scale_rows, 0, K, EVEN)
    for k in range(0, K, _STEP):
        x = _load_x(x_ptrs, k_of_x, k, K, EVEN)
        next_words, next_scale = _load_weights(w_ptrs, w_scale_ptr, scale_rows, _next_step(k, K), K, EVEN)
        acc = _multiply(acc, words, scale, x, MMA)
        words, scale = next_words, next_scale
    acc = _rescaled(acc, scale, x_ptr.dtype.element_ty)
    offs_n = tile_n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, MMA))
    offs_m = row + gl.arange(0, BLOCK_M, gl.SliceLayout(0, MMA))
    if bias_ptr is not None:
        bias = gl.load(bias_ptr + expert * N + offs_n, mask=offs_n < N, other=0.0).to(gl.float32)
        acc += gl.expand_dims(bias, 1)
    y_ptrs = y_ptr + gl.expand_dims(offs_m.to(gl.int64) * N, 0) + gl.expand_dims(offs_n, 1)
    mask = gl.expand_dims(offs_m < row_end, 0) & gl.expand_dims(offs_n < N, 1)
    gl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


def in_registers(w, w_scale, K, step=STEP):
    """Codes and scales as these kernels load them: exponents of a step, 128 or 256 columns, as one integer."""
    exponents, size = w_scale.dtype != torch.float32, step // 32
    if exponents and K % step == w_scale.data_ptr() % size == w_scale.storage_offset() % size == 0:
        return w.view(torch.int32), w_scale.view(torch.int64 if size == 8 else torch.int32)
    return w.view(torch.int32), w_scale.view(torch.uint8) if exponents else w_scale


def grouped_gemm_fp4_few(x, w, w_scale, schedule, config, y, bias=None):
    """As grouped_gemm_fp4, x in 16 bits; rows and experts of w begin at multiples of 16 bytes."""
    N, K = w.shape[1], x.shape[1]
    tiles = schedule.shape[1]
    words, w_scale = in_registers(w, w_scale, K)
    sizes = (N, K, x.stride(0), words.stride(0) // 4, words.stride(1) // 4)
    launch(
        _grouped_gemm_fp4_few_kernel,
        (tiles * cdiv(N, config.BLOCK_N), 1, 1),
        (x, words, w_scale, bias, y, schedule),
        (tiles,),
        (*sizes, config.BLOCK_M, config.BLOCK_N, config.GROUP_M, K % STEP == 0),
        num_warps=config.num_warps,
    )
    return y
