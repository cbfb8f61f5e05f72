"""What a weight is, and which kernels read it: one file for each format, all answering the same questions.

check         what the layer's tensors have to be, before their shapes are looked at
check_one     the same of one weight that multiplies x, whose shape fits
check_scales  whether the scales fit the weights
dequantize    one expert's numbers, for plain PyTorch; a format that has no scales has none
decode        the layer for a few rows, in two launches, and what `shared` experts add to it, if any; or None
plan          how the two GEMMs of a forward are launched
first_gemm    a = gate(x W1^T + bias1) of routed rows, in whatever form second_gemm takes it; a format of which every
              plan says that rows are gathered has neither
second_gemm   out[t] = sum over the token's slots of their weight * (a W2^T + bias2), + addend[t] if there is one
row_config    how row_gemm is launched
row_gemm      y = x W^T + bias of rows in expert order; transposed, y = x W, the gradient of x
ordered_gemm  row_gemm without adapters over x whose columns are in an order that suits the weight; a format of which
              no plan says that rows are ordered has none
wgrad         the gradient of W; a format whose weights are frozen has none
"""

from __future__ import annotations

from . import dense, fp4, fp8, quantize_fp4
from .projection import Plan, Projection, are_adapted, are_quantized, biases_of, matrix_size


def format_of(projection: Projection):
    """The module that knows the kernels for this weight."""
    if projection.scale is None:
        return dense
    return fp4 if quantize_fp4.is_packed(projection.weight) else fp8


def format_of_both(gate_up: Projection, down: Projection):
    """Of two that have not been checked: the one with scales tells what the other should have been."""
    return format_of(down if gate_up.scale is None else gate_up)
