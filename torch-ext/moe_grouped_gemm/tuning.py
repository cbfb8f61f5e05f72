"""Which tile sizes the GEMMs use."""

from __future__ import annotations

from typing import NamedTuple

import torch


class GemmConfig(NamedTuple):
    """Launch configuration of one grouped GEMM; names as in the kernels."""

    BLOCK_M: int  # token rows
    MIN_M: int  # least height of an expert's last tile, BLOCK_M halved some times
    BLOCK_N: int  # result columns; the gate_up GEMM reads twice as many weight rows
    BLOCK_K: int
    GROUP_M: int  # row tiles of an expert that share a weight tile
    num_warps: int
    num_stages: int
    USE_TMA: bool


class DecodeConfig(NamedTuple):
    """Launch configuration of one kernel of the decode path."""

    BLOCK_N: int  # result columns
    BLOCK_K: int
    num_warps: int


class ExpertsConfig(NamedTuple):
    """The two kernels of one layer call; GEMMs share BLOCK_M, and with it the tile schedule."""

    gate_up: GemmConfig | DecodeConfig
    down: GemmConfig | DecodeConfig


class RouterConfig(NamedTuple):
    """Launch configuration of the router's GEMM."""

    BLOCK_T: int
    BLOCK_E: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


def _pair(block_m, up_n, up_k, up_warps, up_stages, down_n, down_k, down_warps, down_stages, min_m=None, tma=True):
    min_m = min_m or block_m
    return ExpertsConfig(
        GemmConfig(block_m, min_m, up_n, up_k, 8, up_warps, up_stages, tma),
        GemmConfig(block_m, min_m, down_n, down_k, 8, down_warps, down_stages, tma),
    )


# Measured on an H200 for T = 1, 2 and 4 of the four workloads; within 13 % of the best for each.
DECODE = ExpertsConfig(DecodeConfig(4, 256, 2), DecodeConfig(8, 1024, 2))
DECODE_FP32 = ExpertsConfig(DecodeConfig(4, 256, 2), DecodeConfig(4, 512, 4))

# Average rows per expert up to which a configuration serves -> configuration. A tile should hold the rows of nearly
# every expert, so it is higher than the average. Measured on an H200 (docs/design.md).
HOPPER = [
    (0.5, _pair(16, 64, 128, 4, 4, 128, 128, 4, 4)),
    (10, _pair(16, 64, 128, 4, 3, 128, 128, 4, 3)),
    (50, _pair(64, 64, 64, 4, 4, 128, 64, 4, 3)),
    (float("inf"), _pair(128, 128, 64, 8, 4, 256, 64, 8, 4, min_m=64)),
]
# Any other GPU: little shared memory (64 KiB on CDNA3, 99 KiB on sm_89 and sm_120), no TMA.
PORTABLE = [
    (12, _pair(16, 64, 64, 4, 3, 128, 64, 4, 3, tma=False)),
    (32, _pair(32, 64, 64, 4, 3, 128, 64, 4, 3, tma=False)),
    (float("inf"), _pair(64, 64, 32, 4, 3, 128, 32, 4, 3, tma=False)),
]
# fp32 runs on the FMA units.
FP32 = [
    (12, _pair(16, 32, 32, 4, 2, 64, 32, 4, 2, tma=False)),
    (float("inf"), _pair(64, 32, 16, 4, 2, 64, 16, 8, 2, tma=False)),
]

# The router, by tokens. Few tokens: small tiles of experts, so that many programs share in reading the weight.
ROUTER_HOPPER = [
    (16, RouterConfig(16, 16, 128, 4, 5)),
    (64, RouterConfig(64, 16, 128, 4, 4)),
    (512, RouterConfig(64, 64, 64, 4, 4)),
    (float("inf"), RouterConfig(128, 128, 64, 8, 4)),
]
ROUTER_PORTABLE = [(16, RouterConfig(16, 16, 128, 4, 3)), (float("inf"), RouterConfig(64, 64, 64, 8, 3))]
ROUTER_FP32 = [(16, RouterConfig(16, 16, 32, 4, 2)), (float("inf"), RouterConfig(64, 64, 32, 8, 2))]


def is_decode(rows: int, tokens: int, num_experts: int, expert_bytes: int) -> bool:
    """Whether each of these rows should read its expert's weights for itself.

    Yes as long as hardly two rows share an expert. Up to four times as many rows it still pays if all is read before
    the general path has made its launches, some 150 us.
    """
    return tokens == 1 or rows * 8 <= num_experts or (rows * 2 <= num_experts and rows * expert_bytes < 0.7e9)


def decode_config(dtype: torch.dtype) -> ExpertsConfig:
    return DECODE_FP32 if dtype == torch.float32 else DECODE


def _table(dtype: torch.dtype, capability: tuple[int, int]):
    if dtype == torch.float32:
        return FP32
    return HOPPER if capability[0] == 9 else PORTABLE


def all_configs(dtype: torch.dtype, capability: tuple[int, int]) -> list[ExpertsConfig]:
    """Every configuration that may be used for this dtype on a GPU of this compute capability."""
    return [config for _, config in _table(dtype, capability)]


def experts_config(rows: int, num_experts: int, dtype: torch.dtype, capability: tuple[int, int]) -> ExpertsConfig:
    """Configuration for `rows` routed rows over `num_experts` experts on a GPU of this compute capability."""
    rows_per_expert = rows / num_experts
    return next(config for most, config in _table(dtype, capability) if rows_per_expert <= most)


def router_configs(dtype: torch.dtype, capability: tuple[int, int]) -> list[tuple[float, RouterConfig]]:
    """(most tokens, configuration); dtype is that of the products: fp32 unless both operands share a 16-bit type."""
    if dtype == torch.float32:
        return ROUTER_FP32
    return ROUTER_HOPPER if capability[0] == 9 else ROUTER_PORTABLE


def router_config(tokens: int, dtype: torch.dtype, capability: tuple[int, int]) -> RouterConfig:
    """Configuration for this many tokens on a GPU of this compute capability."""
    return next(config for most, config in router_configs(dtype, capability) if tokens <= most)
