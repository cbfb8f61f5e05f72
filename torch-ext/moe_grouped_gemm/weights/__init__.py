"""What a weight is, and which kernels read it: one file for each format, all answering the same questions.

decode        the layer for a few rows, in two launches; or None
plan          how the two GEMMs of a forward are launched
first_gemm    a = gate(x W1^T + bias1) of routed rows, in whatever form second_gemm takes it
second_gemm   out[t] = sum over the token's slots of their weight * (a W2^T + bias2)
row_config    how row_gemm is launched
row_gemm      y = x W^T + bias of rows in expert order; transposed, y = x W, the gradient of x
wgrad         the gradient of W; a format whose weights are frozen has none
"""

from __future__ import annotations

from . import dense, fp8
from .projection import Plan, Projection, are_adapted, are_fp8


def format_of(projection: Projection):
    """The module that knows the kernels for this weight."""
    return dense if projection.scale is None else fp8
