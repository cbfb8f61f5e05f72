"""Weights in float8_e4m3fn with one scale for each block of 128 x 128: weight = codes * scale.

A scale is fp32 or a power of two in float8_e8m0fnu. Blocks at the end of rows or columns may be smaller. For a
gate_up_proj (E, 2I, H) whose I is no multiple of 128 there are two ways to count blocks: through gate and up together,
ceil(2I / 128) of them, or through each for itself, as checkpoints with one tensor each have them, 2 * ceil(I / 128).
The number of scales tells which; where it is the same, blocks are counted through both.
"""

from __future__ import annotations

import math

import torch

from .finite import check_quantizable, raise_if_not_finite

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
BLOCK = 128
SCALES = (torch.float32, torch.float8_e8m0fnu)
# No scale is less: a block of zeros stays one, and nothing is divided by zero or by a subnormal number.
LEAST_SCALE = torch.finfo(torch.float32).tiny


def scale_shape(*shape: int) -> tuple[int, ...]:
    """(..., N, K) -> (..., ceil(N / 128), ceil(K / 128))."""
    return (*shape[:-2], *(-(-n // BLOCK) for n in shape[-2:]))


def quantize_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The fp8 codes of a weight, and the scale of each block of 128 x 128: the greatest magnitude becomes 448.

    Args:
        weight: (..., N, K), any float dtype; K and N may be any size.
    Returns:
        codes (..., N, K) float8_e4m3fn and scale (..., ceil(N / 128), ceil(K / 128)) fp32, weight ~ codes * scale.
        Zeros stay zeros, and no number becomes infinite or NaN.
    Raises:
        TypeError: not a float dtype.
        ValueError: fewer than two dimensions; or an infinity or NaN, which would take its whole block along. So does
            what is no finite number in fp32.
    """
    check_quantizable(weight)
    weight = weight.detach()
    *batch, N, K = weight.shape
    codes = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    scale = torch.empty(scale_shape(*weight.shape), dtype=torch.float32, device=weight.device)
    # One matrix of a stack after another: never a copy of all in fp32.
    matrices = (t.reshape(math.prod(batch), *t.shape[-2:]) for t in (weight, codes, scale))
    for matrix, matrix_codes, matrix_scale in zip(*matrices):
        rows, columns = matrix_scale.shape
        padded = matrix.new_zeros(rows * BLOCK, columns * BLOCK, dtype=torch.float32)
        padded[:N, :K] = matrix
        blocks = padded.view(rows, BLOCK, columns, BLOCK)
        matrix_scale.copy_((blocks.abs().amax(dim=(1, 3)) / FP8_MAX).clamp(min=LEAST_SCALE))
        blocks /= matrix_scale[:, None, :, None]
        matrix_codes.copy_(padded[:N, :K].clamp(-FP8_MAX, FP8_MAX))
    raise_if_not_finite(weight, scale.isfinite().all())  # any that is not shows in the scale of its block
    return codes, scale


def dequantize(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """codes (N, K) * scale in dtype; the products are rounded once. scale: either of the two ways to count blocks."""
    N, K = codes.shape
    columns = scale.to(torch.float32).repeat_interleave(BLOCK, dim=1)[:, :K]
    if scale.shape[0] == -(-N // BLOCK):
        scales = columns.repeat_interleave(BLOCK, dim=0)[:N]
    else:
        scales = torch.cat([half.repeat_interleave(BLOCK, dim=0)[: N // 2] for half in columns.chunk(2)])
    acc_dtype = torch.promote_types(dtype, torch.float32)
    return (codes.to(acc_dtype) * scales).to(dtype)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations (T, K) as the kernels quantise them: codes, and an fp32 scale for each 128 columns of each row."""
    tokens, K = x.shape
    blocks = torch.nn.functional.pad(x.float(), (0, -K % BLOCK)).view(tokens, -1, BLOCK)
    scale = (blocks.abs().amax(dim=2) / FP8_MAX).clamp(min=LEAST_SCALE)
    codes = (blocks / scale[:, :, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return codes.view(tokens, -1)[:, :K].contiguous(), scale
