"""4-bit weights times one row of integers, by the tensor cores, NVIDIA's from Ampere on; for decode_fp4.py.

Twice a code is a small integer, and x comes as integers of 15 bits, each 32 of which share a scale (fixed_point.py):
128 * high + low, of 8 bits each. What mma.m16n8k32 sums of these is exact, and one product in fp32 for each group of 32
columns makes it what it should be.

A warp has 16 rows of a weight, a lane 16 bytes of two of them at a time: two groups. Four lanes share a row, and mma
would add up their groups. So its eight columns are four groups by the two halves of x, each zero but in the lanes that
have this group: what a lane gets back is of its own two groups, by high and low.

Words of weights are [A, N, PERIODS, 4, 2, groups, 4]: A, of what there are several at a time, N blocks of 16 rows, the
periods of a step, the eight rows that a warp has one of in a lane, twice, and its four lanes. x in shared memory is a
pair of its integers, eight columns at a time, and its scales.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .fixed_point import _GROUPS, _PERIOD, PERIOD, _fixed_point
from .fp4_registers import STEP
from .hopper import _reinterpret

_ROWS = gl.constexpr(16)  # of a weight, that a warp has
_PERIODS = gl.constexpr(STEP // PERIOD)  # periods of a step

# prmt looks a code up by three bits, and gives zero where the fourth is set: once for what is positive and once, with
# the signs turned, for what is negative.
_LOOK_UP = """
shr.u32 h, {0}, 16; xor.b32 n, {0}, 0x88888888; shr.u32 m, n, 16;
prmt.b32 p{1}, lower, upper, {0}; prmt.b32 p{2}, lower, upper, h;
prmt.b32 n{1}, lower, upper, n; prmt.b32 n{2}, lower, upper, m;"""
_MMA = """
mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {{{0}0, {0}1, {0}2, {0}3}}, {{{1}0, {1}1, {1}2, {1}3}}, {{x0, x1}},
    {{{2}}};"""


def _sum_group():
    """PTX. Of four words of eight codes in each of two rows, $4 to $7 and $8 to $11, and four times eight columns of x,
    $12 to $15, in fp32: (first row, high), (first, low), (second, high), (second, low).

    Sums begin at 1.5 * 2^23, so that their bits are a number in fp32, and a difference of two has none of it.
    """
    lines = ["{ .reg .b32 lower, upper, zero, h, n, m, x0, x1, p<4>, n<4>, ps<4>, ns<4>; .reg .f32 f, g;"]
    lines += ["mov.b32 lower, 0x03020100; mov.b32 upper, 0x0C080604; mov.b32 zero, 0x4B400000;"]
    for word in range(4):
        lines += [_LOOK_UP.format(f"${4 + word}", 0, 2), _LOOK_UP.format(f"${8 + word}", 1, 3)]
        lines += [f"mov.b64 {{x0, x1}}, ${12 + word};"]
        for sign in "pn":
            begin = ", ".join("zero" if word == 0 else f"{sign}s{i}" for i in range(4))
            lines += [_MMA.format(f"{sign}s", sign, begin)]
    lines += [f"mov.b32 f, ps{i}; mov.b32 g, ns{i}; sub.rn.f32 ${i}, f, g;" for i in range(4)]
    return "\n".join([*lines, "}"])


_SUM_GROUP = gl.constexpr(_sum_group())


@gluon.constexpr_function
def _layout(A, N, num_warps):
    """Of words [A, N, PERIODS, 4, 2, groups, 4]: A by warps, N by those that are left.

    Axes 3 and 4 are the eight rows that a warp has one of in a lane, twice, 5 its four lanes.
    """
    threads, warps = [1, 1, 1, 4, 2, _GROUPS.value, 1], [A, num_warps // A, 1, 1, 1, 1, 1]
    return gl.BlockedLayout([1, 1, _PERIODS.value, 1, 1, 1, 4], threads, warps, [6, 5, 4, 3, 2, 1, 0])


@gluon.constexpr_function
def _without(layout, axes):
    for axis in sorted(axes, reverse=True):
        layout = gl.SliceLayout(axis, layout)
    return layout


@gluon.constexpr_function
def _others(axis, dims):
    return tuple(i for i in range(dims) if i != axis)


@gluon.jit
def _along(AXIS: gl.constexpr, SIZE: gl.constexpr, DIMS: gl.constexpr, LAYOUT: gl.constexpr):
    """0 to SIZE along one axis of DIMS."""
    OTHERS: gl.constexpr = _others(AXIS, DIMS)
    return gl.expand_dims(gl.arange(0, SIZE, _without(LAYOUT, OTHERS)), OTHERS)


@gluon.jit
def _places(A: gl.constexpr, N: gl.constexpr):
    """What is where: which of A, first row of a block of N, period of a step, row of eight, group of a period."""
    LAYOUT: gl.constexpr = gl.SliceLayout(6, _layout(A, N, gl.num_warps()))
    which, block = _along(0, A, 6, LAYOUT), _along(1, N, 6, LAYOUT) * _ROWS
    row = _along(3, 4, 6, LAYOUT) * 2 + _along(4, 2, 6, LAYOUT)
    return which, block, _along(2, _PERIODS, 6, LAYOUT), row, _along(5, _GROUPS, 6, LAYOUT)


@gluon.jit
def _sums(first, second, x):
    """Words of two rows, and x alike but for N -> (row, half of x) in place of the words."""
    constraints: gl.constexpr = "=f,=f,=f,=f,r,r,r,r,r,r,r,r,l,l,l,l"
    args = [first, second, x]
    return gl.inline_asm_elementwise(_SUM_GROUP, constraints, args, dtype=gl.float32, is_pure=True, pack=4)


@gluon.jit
def _load_scales(w_scale_ptr, row, places, at, K, mask):
    """Of the lanes' groups in these rows of all experts; if exponents, too large by a factor of 1 + 2^-23."""
    _, _, period, _, group = places
    if w_scale_ptr.dtype.element_ty == gl.int64:
        # Eight exponents, of a row in a step, come to all four lanes, of which each takes its own two.
        eight = gl.load(w_scale_ptr + row * (K // (_PERIODS * _PERIOD)) + at // _PERIODS, mask=mask, other=0)
        exponents = gl.where(period == 0, eight.to(gl.int32), (eight >> 32).to(gl.int32)) >> (8 * group)
    else:
        scale = gl.load(w_scale_ptr + row * (K // 32) + at * _GROUPS + group, mask=mask, other=0)
        if scale.dtype == gl.float32:
            return scale
        exponents = scale.to(gl.int32)
    # With the last bit the greatest exponent is no number.
    return (((exponents << 23) & 0x7F800000) | 1).to(gl.float32, bitcast=True)


@gluon.jit
def _load_weights(weight, rows, places, step, K, EVEN: gl.constexpr, mask):
    """What `_multiply` takes of a lane's two rows: words of each, and their scales. mask: of rows that are read."""
    w_ptr, stride, w_scale_ptr, first_scale = weight
    _, _, period, _, group = places
    first, second = rows
    at = step * _PERIODS + period
    if not EVEN:
        mask = mask & (at * _GROUPS + group < K // 32)
    LAYOUT: gl.constexpr = first.type.layout.parent
    offset = at * (_PERIOD // 8) + group * 4
    word, of_words = _along(6, 4, 7, LAYOUT), gl.expand_dims(mask, 6)
    first_words = gl.load(gl.expand_dims(w_ptr + (first * stride + offset), 6) + word, mask=of_words, other=0)
    second_words = gl.load(gl.expand_dims(w_ptr + (second * stride + offset), 6) + word, mask=of_words, other=0)
    first_scales = _load_scales(w_scale_ptr, first_scale + first, places, at, K, mask)
    second_scales = _load_scales(w_scale_ptr, first_scale + second, places, at, K, mask)
    return (first_words, second_words), (first_scales, second_scales)


@gluon.constexpr_function
def _row_major(dims):
    return gl.SwizzledSharedLayout(1, 1, 1, list(reversed(range(dims))))


@gluon.jit
def _allocate(STEPS: gl.constexpr, A: gl.constexpr):
    """Room for x: codes, eight columns at a time, and scales, for STEPS of A."""
    codes = gl.allocate_shared_memory(gl.int64, [STEPS, A, _PERIODS, 2, _GROUPS, 4], _row_major(5))
    return codes, gl.allocate_shared_memory(gl.float32, [STEPS, A, _PERIODS, _GROUPS], _row_major(3))


@gluon.jit
def _take_x(x_smem, step, LAYOUT: gl.constexpr):
    """What `_multiply` takes of x: integers, and scales of the lanes' groups."""
    x = gl.expand_dims(x_smem[0].index(step).load(_without(LAYOUT, (1, 3))), (1, 3))
    # The column of mma that a lane brings is of one group, and not zero in the lanes that have this group.
    x = gl.where(_along(3, 4, 7, LAYOUT) == _along(5, _GROUPS, 7, LAYOUT), x, 0)
    return x, gl.expand_dims(x_smem[1].index(step).load(_without(LAYOUT, (1, 3, 4, 6))), (1, 3, 4))


@gluon.jit
def _multiply(acc, weights, x):
    """acc, laid out as words are, and the products of a step, in fp32; weights of `_load_weights`, x of `_take_x`."""
    words, scales = weights
    first, second = scales[0] * x[1], scales[1] * x[1]
    factor = gl.join(gl.join(first, second), gl.join(first, second)).reshape(acc.shape)
    factor = gl.convert_layout(factor, acc.type.layout, assert_trivial=True)
    return acc + _sums(words[0], words[1], x[0]) * factor


@gluon.jit
def _rows_of(acc):
    """Sums of all lanes -> [A, rows]."""
    A: gl.constexpr = acc.shape[0]
    N: gl.constexpr = acc.shape[1]
    y = gl.sum(gl.sum(acc, 2), 4).reshape([A, N, 8, 2, 2])
    high, low = gl.split(y)
    # A code was counted twice.
    return (64.0 * high + 0.5 * low).permute((0, 1, 3, 2)).reshape([A, N * _ROWS])


@gluon.jit
def _share_fixed_point(x_smem, x_ptr, K):
    """The row x [K] into shared memory, as integers."""
    codes, scales = x_smem
    ALL: gl.constexpr = codes.shape[0] * codes.shape[1] * codes.shape[2]
    WARPS: gl.constexpr = gl.num_warps()
    BLOCK: gl.constexpr = min(ALL, 8 * WARPS)
    LAYOUT: gl.constexpr = gl.BlockedLayout([8], [32], [WARPS], [0])
    codes = _reinterpret(codes, gl.int8, [ALL // BLOCK, BLOCK, 2, _GROUPS, 32], _row_major(4))
    scales = _reinterpret(scales, gl.float32, [ALL // BLOCK, BLOCK * _GROUPS], _row_major(1))
    for i in range(ALL // BLOCK):
        columns = i * (BLOCK * _PERIOD) + gl.arange(0, BLOCK * _PERIOD, LAYOUT)
        x = gl.load(x_ptr + columns, mask=columns < K, other=0.0).to(gl.float32)
        high, low, scale = _fixed_point(x.reshape([BLOCK * _GROUPS, 32]))
        both = gl.join(high, low).reshape([BLOCK, _GROUPS, 32, 2]).permute((0, 3, 1, 2))
        codes.index(i).store(both)
        scales.index(i).store(scale)
