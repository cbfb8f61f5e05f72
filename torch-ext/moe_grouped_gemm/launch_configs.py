"""What a kernel is launched with besides its tensors, and which GEMM configurations a GPU can run."""

from __future__ import annotations

from typing import NamedTuple, get_type_hints

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
    # The kernel of grouped_gemm_hopper.py, for tiles like SPECIALIZED_TILE; over fp8 weights those of fp8_hopper.py or
    # codes_hopper.py, for both GEMMs where the down GEMM says so.
    WARP_SPECIALIZED: bool = False


GEMM_FIELD_TYPES = get_type_hints(GemmConfig)

# Rows of each expert are padded to a multiple of this, the rows that wgrad takes at a time.
PAD = 64

# The one tile of that kernel, whose schedule and shared memory are made for it.
SPECIALIZED_TILE = {"BLOCK_M": 128, "MIN_M": 64, "BLOCK_N": 256, "BLOCK_K": 64}


class DecodeConfig(NamedTuple):
    """Launch configuration of one kernel of the decode path."""

    BLOCK_N: int  # result columns
    BLOCK_K: int
    num_warps: int


class ExpertsConfig(NamedTuple):
    """The two kernels of one layer call; GEMMs share BLOCK_M and MIN_M, and with them the tile schedule."""

    gate_up: GemmConfig | DecodeConfig
    down: GemmConfig | DecodeConfig


class RouterConfig(NamedTuple):
    """Launch configuration of the router's GEMM."""

    BLOCK_T: int
    BLOCK_E: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


class ThinConfig(NamedTuple):
    """For products of which one side is an adapter's rank: at most these tiles, narrower where the rank is."""

    gemm: dict  # its other fields are those of the GEMM beside it
    wgrad: GemmConfig


def ways(config: GemmConfig) -> set[GemmConfig]:
    """This configuration, and what weights/ makes of it for tensors that its kernel cannot read."""
    without = config._replace(WARP_SPECIALIZED=False)
    return {config, without, without._replace(USE_TMA=False)}


def shared_memory(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that a block may use at most (CUDA C++ programming guide)."""
    if capability[0] in (9, 10, 11):
        return 227 * 1024
    return (163 if capability in ((8, 0), (8, 7)) else 99) * 1024


def fault_of(kernel: str, config: GemmConfig, dtype: torch.dtype, capability: tuple[int, int]) -> str | None:
    """Why "gate_up" or "down" cannot run so on any GPU of this compute capability: a field, and what it must be."""
    if config.WARP_SPECIALIZED:
        if kernel != "down" or capability[0] != 9 or dtype.itemsize != 2:
            return "WARP_SPECIALIZED: only the down GEMM, for 16 bits on Hopper, has such a kernel"
        if not config.USE_TMA:
            return "USE_TMA: expected true with WARP_SPECIALIZED"
        for field, size in SPECIALIZED_TILE.items():
            if getattr(config, field) != size:
                return f"{field}: expected {size} with WARP_SPECIALIZED, got {getattr(config, field)}"
    if config.USE_TMA and capability[0] < 9:
        return f"USE_TMA: expected false for compute capability {capability[0]}.{capability[1]}"
    # gate_up reads rows of gate and of up, the warp-specialized kernel two boxes.
    weight_rows = config.BLOCK_N * (2 if kernel == "gate_up" else 1)
    boxes = {"BLOCK_M": config.BLOCK_M, "BLOCK_N": weight_rows, "BLOCK_K": config.BLOCK_K}
    for field, size in boxes.items():
        if config.USE_TMA and size > 256:
            return f"{field}: {size} rows or columns are more than the 256 that TMA loads at a time"
    if config.num_warps > 32:
        return f"num_warps: expected at most 32, got {config.num_warps}"
    if config.GROUP_M > 2**15:  # times the number of column tiles an int32
        return f"GROUP_M: expected at most {2**15}, got {config.GROUP_M}"
    if config.BLOCK_M * weight_rows > 255 * 32 * config.num_warps:
        return f"num_warps: {config.num_warps} have no registers for {config.BLOCK_M} x {weight_rows} sums"
    size = config.num_stages * (config.BLOCK_M + weight_rows) * config.BLOCK_K * dtype.itemsize
    if size > shared_memory(capability):
        return (
            f"num_stages: {config.num_stages} of them need {size} bytes of the {shared_memory(capability)} shared ones"
        )
    return None
