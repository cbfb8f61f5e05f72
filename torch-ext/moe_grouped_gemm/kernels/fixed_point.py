"""Rows as integers of 15 bits, each 32 of which share a power of two, for decode_fp4.py.

    x[r, k] = (128 * high[r, k] + low[r, k]) * scale[r, k // 32]

high and low have 8 bits. Of an x in bf16 nothing is lost, but where it is less than a 64th of its group's largest, and
then no more than 2^-14 of that, if that is 2^-113 or more. In memory a row is high and low of 128 columns, and of the
next.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .launch import cdiv

PERIOD = 128
_PERIOD = gl.constexpr(PERIOD)
_GROUPS = gl.constexpr(PERIOD // 32)
_TO_INTEGER = gl.constexpr(1.5 * 2.0**23)  # added to a number, rounds it and leaves it in the last bits


@gluon.jit
def _fixed_point(x):
    """x [GROUPS, 32] in fp32 -> high, low, alike, and scale [GROUPS], which is NaN if an x is not finite."""
    largest = gl.max(x.to(gl.int32, bitcast=True) & 0x7FFFFFFF, 1)  # in the order of the numbers, NaN above all
    # 2^e <= largest < 2^(e + 1), and the scale is 2^(e - 13), if that is no denormal.
    exponent = gl.maximum(largest >> 23, 14)
    scale = ((exponent - 13) << 23).to(gl.float32, bitcast=True)
    inverse = ((254 + 13 - exponent) << 23).to(gl.float32, bitcast=True)
    bits = (x * gl.expand_dims(inverse, 1) + _TO_INTEGER).to(gl.int32, bitcast=True)
    integer = gl.minimum(bits - 0x4B400000, 2**14 - 1)
    nan = gl.full(scale.shape, float("nan"), gl.float32, scale.type.layout)
    return (integer >> 7).to(gl.int8), (integer & 127).to(gl.int8), gl.where(largest >= 0x7F800000, nan, scale)


@gluon.jit
def _store_fixed_point(codes_ptr, scale_ptr, row, first, x, K):
    """x [columns from `first` on] of a row, which begins at a group."""
    N: gl.constexpr = x.shape[0] // 32
    high, low, scale = _fixed_point(x.reshape([N, 32]))
    periods = gl.cdiv(K, _PERIOD)
    group = first // 32 + gl.arange(0, N, scale.type.layout)
    column = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, high.type.layout)), 0)
    gl.store(scale_ptr + row * (periods * _GROUPS) + group, scale, mask=group < K // 32)
    period, place = group // _GROUPS, group % _GROUPS
    ptrs = codes_ptr + gl.expand_dims((row * periods + period) * (2 * _PERIOD) + place * 32, 1) + column
    mask = gl.expand_dims(group < K // 32, 1) & (column >= 0)
    gl.store(ptrs, high, mask=mask)
    gl.store(ptrs + _PERIOD, low, mask=mask)


def like_fixed_point(rows, K, device):
    """Room for `rows` of them: codes (rows, periods, 2, 128) int8 and scales (rows, periods * 4)."""
    periods = cdiv(K, PERIOD)
    codes = torch.empty((rows, periods, 2, PERIOD), dtype=torch.int8, device=device)
    return codes, torch.empty((rows, periods * _GROUPS.value), dtype=torch.float32, device=device)
