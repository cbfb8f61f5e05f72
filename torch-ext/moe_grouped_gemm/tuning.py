"""Which configuration a launch gets: from a tuned file if there is one for its layer and GPU, else by heuristics.py."""

from __future__ import annotations

import functools
import math
import warnings
from bisect import bisect_left

import torch

from .heuristics import (
    DECODE,
    DECODE_FP4,  # noqa: F401, taken as it is
    DECODE_FP8,  # noqa: F401, taken as it is
    DECODE_FP32,
    DECODE_TRANSPOSED,
    EXPERTS,
    FP4,
    FP4_DGRAD,  # noqa: F401, taken as it is
    FP4_ORDERED,
    FP8,
    FP8_DGRAD,  # noqa: F401, taken as it is
    FP8_WEIGHTS,
    ROUTER,
    THIN,
    WGRAD,
    UpTo,
)
from .launch_configs import ExpertsConfig, GemmConfig, RouterConfig, Traits
from .tuned_files import config_path, folders, read_configs


def is_decode(rows: int, tokens: int, num_experts: int, expert_bytes: int) -> bool:
    """Whether each of these rows should read its expert's weights for itself.

    Yes as long as hardly two rows share an expert. Up to four times as many rows it still pays if all is read before
    the general path has made its launches, some 150 us.
    """
    return tokens == 1 or rows * 8 <= num_experts or (rows * 2 <= num_experts and rows * expert_bytes < 0.7e9)


def decode_config(dtype: torch.dtype, transposed: bool) -> ExpertsConfig:
    if transposed:
        return DECODE_TRANSPOSED
    return DECODE_FP32 if dtype == torch.float32 else DECODE


def experts_config(rows: int, shape, dtype: torch.dtype, traits: Traits, device_name: str):
    """Configuration for `rows` routed rows on a GPU of these traits and this name.

    shape: (E, H, I), that of the down projection.
    """
    return _first_serving(experts_table(shape, dtype, traits, device_name), rows / shape[0])


def heuristic_config(rows: int, num_experts: int, dtype: torch.dtype, traits: Traits) -> ExpertsConfig:
    """As `experts_config`, without a tuned file."""
    return _first_serving(EXPERTS.of(dtype, traits), rows / num_experts)


def _first_serving(table: list[UpTo], size: float):
    """The configuration for this size."""
    return table[bisect_left(table, (size,))].config


@functools.cache
def experts_table(shape, dtype: torch.dtype, traits: Traits, device_name: str) -> list[UpTo]:
    """Of `experts_config`, from the first tuned file that there is."""
    for folder in folders():
        path = config_path(folder, shape, dtype, device_name)
        try:
            entries = read_configs(path, dtype, traits)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            warnings.warn(f"{path}: {error}. Heuristic configurations are used instead.", stacklevel=3)
            break
        # Nearest in log(rows): neighbours meet at the geometric mean of theirs.
        limits = [math.sqrt(a * b) / shape[0] for (a, _), (b, _) in zip(entries, entries[1:])]
        return [UpTo(limit, config) for limit, (_, config) in zip([*limits, math.inf], entries)]
    return EXPERTS.of(dtype, traits)


def fp8_config(rows: int, num_experts: int, dtype: torch.dtype, traits: Traits) -> ExpertsConfig:
    """Configuration for `rows` routed rows of this dtype over `num_experts` experts in fp8."""
    tables = FP8 if dtype == torch.float8_e4m3fn else FP8_WEIGHTS
    return _first_serving(tables.of(dtype, traits), rows / num_experts)


def fp4_config(rows: int, num_experts: int, dtype: torch.dtype, traits: Traits, can_order: bool = False) -> GemmConfig:
    """Configuration for `rows` routed rows of this dtype over `num_experts` experts in 4 bits.

    can_order: where there is a kernel that takes columns in an order of its own, it may be that.
    """
    table = (can_order and FP4_ORDERED.of(dtype, traits)) or FP4.of(dtype, traits)
    return _first_serving(table, rows / num_experts)


def wgrad_config(rows: int, num_experts: int, dtype: torch.dtype, traits: Traits) -> GemmConfig:
    """Configuration of wgrad for `rows` routed rows over `num_experts` experts."""
    return _first_serving(WGRAD.of(dtype, traits), rows / num_experts)


def _narrowed(block: int, size: int) -> int:
    """This block, or the least power of two, 16 or more, that holds `size` if that is less."""
    return min(block, max(16, 1 << (size - 1).bit_length()))


def thin_config(config: GemmConfig, N: int, dtype: torch.dtype, traits: Traits) -> GemmConfig:
    """Configuration of a GEMM whose N is an adapter's rank; rows are cut as by `config`, as in its schedule."""
    thin = config._replace(**THIN.of(dtype, traits).gemm)
    return thin._replace(
        BLOCK_N=_narrowed(thin.BLOCK_N, N),
        num_warps=4 if config.BLOCK_M < 128 and dtype != torch.float32 else 8,
        USE_TMA=False,
        WARP_SPECIALIZED=False,
    )


def thin_wgrad_config(M: int, N: int, dtype: torch.dtype, traits: Traits) -> GemmConfig:
    """Configuration of a wgrad whose M or N is an adapter's rank."""
    config = THIN.of(dtype, traits).wgrad
    return config._replace(BLOCK_M=_narrowed(config.BLOCK_M, M), BLOCK_N=_narrowed(config.BLOCK_N, N))


def router_config(tokens: int, dtype: torch.dtype, traits: Traits) -> RouterConfig:
    """Configuration for this many tokens on a GPU with these traits."""
    return _first_serving(ROUTER.of(dtype, traits), tokens)
