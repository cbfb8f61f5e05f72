"""What a kernel is launched with besides its tensors, and which GEMM configurations a GPU can run."""

from __future__ import annotations

from typing import NamedTuple, get_type_hints

import torch


class Traits(NamedTuple):
    """What of a GPU decides which configurations it can run, and which suit it."""

    shared_memory: int  # bytes that a block may use
    mma: str = "mma.sync"  # its matrix instruction: on Hopper "wgmma", on Blackwell "tcgen05", on AMD's "mfma"
    has_tma: bool = False
    has_fp8: bool = False  # multiplies float8_e4m3fn
    warp_size: int = 32


# One GPU of each kind, as CUDA's programming guide and the ISA guides of CDNA 3 and 4 have them. A GPU in use is asked
# for its own (gpu.py); it may also be run as one of these, which are what the tests compile for.
TRAITS = {
    "sm_80": Traits(163 * 1024),
    "sm_89": Traits(99 * 1024, has_fp8=True),
    "sm_90": Traits(227 * 1024, "wgmma", has_tma=True, has_fp8=True),
    "sm_100": Traits(227 * 1024, "tcgen05", has_tma=True, has_fp8=True),
    "sm_120": Traits(99 * 1024, has_tma=True, has_fp8=True),
    "gfx942": Traits(64 * 1024, "mfma", warp_size=64),
    "gfx950": Traits(160 * 1024, "mfma", warp_size=64),
}


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
    # The kernels of gate_up_hopper.py and grouped_gemm_hopper.py, for tiles like SPECIALIZED_TILE; over fp8 weights
    # those of fp8_hopper.py or codes_hopper.py, over 4 bits fp4_hopper.py, for both GEMMs where the down GEMM says so.
    # num_warps, and of gate_up num_stages, are those of the plain kernel, which takes what these cannot.
    WARP_SPECIALIZED: bool = False


GEMM_FIELD_TYPES = get_type_hints(GemmConfig)

# Rows of each expert are padded to a multiple of this, the rows that wgrad takes at a time.
PAD = 64

# The tile of grouped_gemm_hopper.py's kernel, whose schedule and shared memory are made for it.
SPECIALIZED_TILE = {"BLOCK_M": 128, "MIN_M": 64, "BLOCK_N": 256, "BLOCK_K": 64}
# With as few stages there is room for 192 rows, and an expert's last 64 or fewer go with the tile before.
TALL_STAGES = 3


def specialized_tile(kernel: str) -> dict[str, int]:
    """That of "gate_up" has half the columns, of as many weight rows."""
    columns = SPECIALIZED_TILE["BLOCK_N"] // (2 if kernel == "gate_up" else 1)
    return {**SPECIALIZED_TILE, "BLOCK_N": columns}


def fits_specialized_gate_up(hidden_dim: int, inter: int) -> bool:
    """Whether a layer of these sizes has whole steps of K, and columns of gate and of up that leave 64 at a time."""
    return hidden_dim % SPECIALIZED_TILE["BLOCK_K"] == 0 and inter % 64 == 0


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


def fault_of(kernel: str, config: GemmConfig, dtype: torch.dtype, traits: Traits) -> str | None:
    """Why "gate_up" or "down" cannot run so on a GPU with these traits: a field, and what it must be."""
    if config.WARP_SPECIALIZED:
        if traits.mma != "wgmma" or dtype.itemsize != 2:
            return "WARP_SPECIALIZED: only 16 bits on Hopper have such a kernel"
        if not config.USE_TMA:
            return "USE_TMA: expected true with WARP_SPECIALIZED"
        for field, size in specialized_tile(kernel).items():
            if getattr(config, field) != size:
                return f"{field}: expected {size} with WARP_SPECIALIZED, got {getattr(config, field)}"
        if config.num_stages < 2:  # a consumer gives a stage back while it multiplies the next
            return f"num_stages: expected 2 or more with WARP_SPECIALIZED, got {config.num_stages}"
    if config.USE_TMA and not traits.has_tma:
        return "USE_TMA: expected false for a GPU without TMA"
    # gate_up reads rows of gate and of up, the warp-specialized kernel two boxes.
    weight_rows = config.BLOCK_N * (2 if kernel == "gate_up" else 1)
    boxes = {"BLOCK_M": config.BLOCK_M, "BLOCK_N": weight_rows, "BLOCK_K": config.BLOCK_K}
    for field, size in boxes.items():
        if config.USE_TMA and size > 256:
            return f"{field}: {size} rows or columns are more than the 256 that TMA loads at a time"
    if config.num_warps > 1024 // traits.warp_size:
        return f"num_warps: expected at most {1024 // traits.warp_size}, got {config.num_warps}"
    if config.GROUP_M > 2**15:  # times the number of column tiles an int32
        return f"GROUP_M: expected at most {2**15}, got {config.GROUP_M}"
    if config.BLOCK_M * weight_rows > 255 * traits.warp_size * config.num_warps:
        return f"num_warps: {config.num_warps} have no registers for {config.BLOCK_M} x {weight_rows} sums"
    # An MMA that reads shared memory by itself has a stage of its own; others have put theirs in registers by then.
    stages = config.num_stages if traits.mma in ("wgmma", "tcgen05") else max(config.num_stages - 1, 1)
    size = stages * (config.BLOCK_M + weight_rows) * config.BLOCK_K * dtype.itemsize
    if size > traits.shared_memory:
        return f"num_stages: {config.num_stages} of them need {size} bytes of the {traits.shared_memory} shared ones"
    return None
