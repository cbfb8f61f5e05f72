"""What low-rank adapters add: W becomes W + B A, without ever being made."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import gpu, tuning
from ..checks import shape
from ..torch_ops import refuse_dtensors
from ..weights import Projection, dense, format_of

RANK_MULTIPLE = 16  # on a GPU: the least that a dot takes, and 16-byte rows


class LoraFactors(NamedTuple):
    """One adapter of a weight W (E, N, K): each expert's weight becomes W[e] + scaling * B[e] @ A[e].

    Attributes:
        A: (E, R, K), any float dtype.
        B: (E, N, R), any float dtype.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float


def adapted(
    name: str, projection: Projection, adapters: tuple[LoraFactors, ...], dtype: torch.dtype, multiple: int = 1
) -> Projection:
    """With all adapters as one, of the sum of their ranks: its A has theirs as rows, its B theirs, scaled, as columns.

    Zeros bring the rank to a multiple.
    """
    if not adapters:
        return projection
    weight, (experts, N, K) = projection.weight, projection.shape
    refuse_dtensors((name, factor) for adapter in adapters for factor in adapter[:2])
    As = [adapter.A.to(dtype) for adapter in adapters]
    Bs = [(adapter.scaling * adapter.B).to(dtype) for adapter in adapters]
    for A, B in zip(As, Bs):
        if A.shape != (experts, A.shape[1], K) or B.shape != (experts, N, A.shape[1]):
            raise ValueError(
                f"{name}: expected A ({experts}, R, {K}) and B ({experts}, {N}, R) to fit the weight, "
                f"got {shape(A)} and {shape(B)}"
            )
        if A.device != weight.device or B.device != weight.device:
            raise ValueError(f"{name}: expected factors on {weight.device}, got {A.device} and {B.device}")
    rank = sum(A.shape[1] for A in As)
    padding = max(1, -(-rank // multiple)) * multiple - rank
    if padding:
        As.append(As[0].new_zeros(experts, padding, K))
        Bs.append(Bs[0].new_zeros(experts, N, padding))
    return projection._replace(A=torch.cat(As, dim=1), B=torch.cat(Bs, dim=2))


def product(x, projection, rows, config, transposed=False, out=None):
    """y (S, N) = x W^T + bias + u B^T and u (S, R) = x A^T; transposed, y (S, K) = x W + u A and u (S, R) = x B.

    Without adapters u is None.
    """
    A, B = projection.A, projection.B
    u = low_rank = None
    if A is not None:
        first, second = (B.mT, A.mT) if transposed else (A, B)
        u = thin_gemm(x, first, rows, config)
        low_rank = (u, second.contiguous())
    row_gemm = format_of(projection).row_gemm
    return row_gemm(x, projection, rows.schedule, config, transposed, low_rank, out), u


def thin_gemm(x, factor, rows, config):
    """x factor^T, over the tiles of `config`."""
    traits = gpu.traits(x.device.index)
    return dense.gemm(x, factor, rows.schedule, tuning.thin_config(config, factor.shape[1], x.dtype, traits))


def thin_wgrad(p, q, rows):
    """Of a factor (E, M, N): the sum of p[r] q[r]^T over each expert's rows."""
    config = tuning.thin_wgrad_config(p.shape[1], q.shape[1], p.dtype, gpu.traits(p.device.index))
    return gpu.launchers().wgrad(p, q, rows.offsets, gpu.input_precision(p.dtype), config)
