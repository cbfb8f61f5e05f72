"""One of the experts' two weights as a value, and the plan of a forward over both."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..launch_configs import GemmConfig
from . import quantize_fp4


class Projection(NamedTuple):
    """A weight W and what else goes into its product: y[r] = W[e] @ x[r] + bias[e] + B[e] @ (A[e] @ x[r]).

    Attributes:
        weight: (E, N, K), perhaps a view of (E, K, N).
        bias: (E, N), or None.
        scale: of each block of a weight in codes, as in quantize_fp8.py or quantize_fp4.py; else None.
        A: (E, R, K), or None: the adapters of this weight, joined as in experts/lora.py.
        B: (E, N, R), or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    A: torch.Tensor | None = None
    B: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K), of which 4-bit codes hold two columns a byte."""
        experts, N, K = self.weight.shape
        return (experts, N, 2 * K) if quantize_fp4.is_packed(self.weight) else (experts, N, K)


def matrix_size(weight, scale) -> int:
    """N * K, given the shapes of a weight and of its scale or None: bytes of two codes have a scale for each 16."""
    is_packed = scale is not None and (scale[1], 16 * scale[2]) == (weight[1], weight[2])
    return weight[1] * weight[2] * (2 if is_packed else 1)


def biases_of(gate_up: Projection, down: Projection) -> dict[str, torch.Tensor]:
    """By their names as arguments, those that there are."""
    if gate_up.bias is None and down.bias is None:
        return {}
    biases = {"gate_up_proj_bias": gate_up.bias, "down_proj_bias": down.bias}
    return {name: bias for name, bias in biases.items() if bias is not None}


def are_adapted(gate_up: Projection, down: Projection) -> bool:
    return gate_up.A is not None or down.A is not None


def are_quantized(gate_up: Projection, down: Projection) -> bool:
    """Codes and scales in place of numbers: frozen, and of a dtype of their own."""
    return gate_up.scale is not None or down.scale is not None


class Plan(NamedTuple):
    """How the two GEMMs of a forward are launched, over the tiles of one schedule."""

    gate_up: GemmConfig
    down: GemmConfig
    dtype: torch.dtype  # of hidden_states and of the result
    quantized: bool = False  # activations are multiplied in fp8
    gathered: bool = False  # both GEMMs are row_gemm with `down`, and the gate is a launch between them
    ordered: bool = False  # so too, but ordered_gemm
