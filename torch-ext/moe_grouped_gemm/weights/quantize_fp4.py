"""Weights in 4 bits, one power of two for each 32 columns of each row: weight = number * scale. MXFP4, if it is e8m0.

A number is e2m1, a sign and one of 0, 0.5, 1, 1.5, 2, 3, 4, 6; two stand in a byte, that of the lower column in its low
nibble (OCP Microscaling Formats specification 1.0). So codes of (N, K) are (N, K / 2) bytes, scales (N, K / 32).
"""

from __future__ import annotations

import math

import torch

from .finite import check_quantizable, raise_if_not_finite

GROUP = 32  # columns that share a scale
DTYPES = (torch.int8, torch.uint8) + ((torch.float4_e2m1fn_x2,) if hasattr(torch, "float4_e2m1fn_x2") else ())
SCALES = (torch.float8_e8m0fnu, torch.uint8, torch.float32)
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MAX_EXPONENT = 2  # of the greatest magnitude


def is_packed(weight: torch.Tensor) -> bool:
    """Whether this holds 4-bit codes: bytes of two."""
    return weight.dtype in DTYPES


def quantize_fp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The 4-bit codes of a weight, and the scale of each 32 columns of each row.

    By the rule of the OCP specification a scale is 2^(floor(log2(the greatest magnitude)) - 2). Numbers are rounded to
    the nearest, ties to the even code; those beyond 6 * scale become 6 * scale.

    Args:
        weight: (..., N, K), any float dtype; K a multiple of 32.
    Returns:
        codes (..., N, K / 2) int8 and scale (..., N, K / 32) float8_e8m0fnu. Zeros stay zeros.
    Raises:
        TypeError: not a float dtype.
        ValueError: fewer than two dimensions, or K is no multiple of 32; or an infinity or NaN, or what is no finite
            number in fp32.
    """
    check_quantizable(weight)
    if weight.shape[-1] % GROUP:
        raise ValueError(f"weight: expected (..., N, K) with K a multiple of {GROUP}, got {tuple(weight.shape)}")
    weight = weight.detach()
    *batch, N, K = weight.shape
    codes = torch.empty((*batch, N, K // 2), dtype=torch.int8, device=weight.device)
    exponents = torch.empty((*batch, N, K // GROUP), dtype=torch.uint8, device=weight.device)
    middles = [(a + b) / 2 for a, b in zip(_MAGNITUDES, _MAGNITUDES[1:])]
    # One matrix of a stack after another: never a copy of all in fp32.
    matrices = (t.reshape(math.prod(batch), *t.shape[-2:]) for t in (weight, codes, exponents))
    all_finite = torch.ones((), dtype=torch.bool, device=weight.device)
    for matrix, matrix_codes, matrix_exponents in zip(*matrices):
        groups = matrix.float().reshape(N, K // GROUP, GROUP)
        greatest = groups.abs().amax(dim=2)
        all_finite &= greatest.isfinite().all()
        exponent = torch.frexp(greatest).exponent - 1 - _MAX_EXPONENT
        exponent = torch.where(greatest > 0, exponent, -127).clamp(-127, 127)
        matrix_exponents.copy_(exponent + 127)
        # Two steps: 2^127 times a number below 2^-126 may be one, but 2^149 is none.
        scaled = torch.ldexp(torch.ldexp(groups, -(exponent // 2)[:, :, None]), (exponent // 2 - exponent)[:, :, None])
        magnitude = scaled.abs()
        code = torch.zeros(groups.shape, dtype=torch.uint8, device=weight.device)
        for i, middle in enumerate(middles):
            code += magnitude > middle if i % 2 == 0 else magnitude >= middle
        code += scaled.signbit().to(torch.uint8) << 3
        code = code.view(N, K // 2, 2)
        matrix_codes.view(torch.uint8).copy_(code[:, :, 0] | code[:, :, 1] << 4)
    raise_if_not_finite(weight, all_finite)
    return codes, exponents.view(torch.float8_e8m0fnu)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """codes (N, K / 2), scale (N, K / 32) -> (N, K) in dtype, rounded once."""
    acc_dtype = torch.promote_types(dtype, torch.float32)
    magnitudes = torch.tensor(_MAGNITUDES, dtype=acc_dtype, device=codes.device)
    numbers = torch.cat([magnitudes, -magnitudes])
    codes = codes.view(torch.uint8)
    nibbles = torch.stack([codes & 15, codes >> 4], dim=-1)
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    groups = numbers[nibbles.int()].view(*scale.shape, GROUP) * scale.to(torch.float32).to(acc_dtype)[..., None]
    return groups.flatten(-2).to(dtype)
