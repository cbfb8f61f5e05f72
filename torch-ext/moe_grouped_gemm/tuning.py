"""Which tile sizes the GEMMs use: tuned ones from configs/*.json, for other GPUs and layers heuristics."""

from __future__ import annotations

import functools
import json
import math
import re
import warnings
from bisect import bisect_left
from pathlib import Path
from typing import NamedTuple, get_type_hints

import torch

CONFIGS = Path(__file__).parent / "configs"


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
    # fp8_weights_hopper.py, for both GEMMs where the down GEMM says so.
    WARP_SPECIALIZED: bool = False


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


def _pair(
    block_m, up_n, up_k, up_warps, up_stages, down_n, down_k, down_warps, down_stages, min_m=None, tma=True, ws=False
):
    min_m = min_m or block_m
    return ExpertsConfig(
        GemmConfig(block_m, min_m, up_n, up_k, 8, up_warps, up_stages, tma),
        GemmConfig(block_m, min_m, down_n, down_k, 8, down_warps, down_stages, tma, ws),
    )


# Measured on an H200 for T = 1, 2 and 4 of the four workloads; within 13 % of the best for each.
DECODE = ExpertsConfig(DecodeConfig(4, 256, 2), DecodeConfig(8, 1024, 2))
# Weights whose rows are not contiguous but whose columns are: a program reads runs of 64 bytes or more of each column.
DECODE_TRANSPOSED = ExpertsConfig(DecodeConfig(32, 32, 4), DecodeConfig(32, 64, 4))
DECODE_FP32 = ExpertsConfig(DecodeConfig(4, 256, 2), DecodeConfig(4, 512, 4))

# Average rows per expert up to which a configuration serves -> configuration. A tile should hold the rows of nearly
# every expert, so it is higher than the average. Measured on an H200 (docs/design.md).
HOPPER = [
    (0.5, _pair(16, 64, 128, 4, 4, 128, 128, 4, 4)),
    (10, _pair(16, 64, 128, 4, 3, 128, 128, 4, 3)),
    (50, _pair(64, 64, 64, 4, 4, 128, 64, 4, 3)),
    (float("inf"), _pair(128, 128, 64, 8, 4, 256, 64, 8, 4, min_m=64, ws=True)),
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

# fp8 weights, by rows per expert as above. The gate_up GEMM's BLOCK_N is 128 where its result leaves in fp8; both GEMMs
# read two tiles of BLOCK_N weight rows.
DECODE_FP8 = ExpertsConfig(DecodeConfig(4, 512, 2), DecodeConfig(4, 512, 2))
FP8_HOPPER = [
    (10, _pair(16, 128, 128, 4, 4, 64, 128, 4, 3)),
    (24, _pair(32, 128, 128, 4, 3, 64, 128, 4, 3)),
    (50, _pair(64, 128, 128, 8, 4, 64, 128, 4, 3)),
    (float("inf"), _pair(128, 128, 128, 8, 4, 128, 128, 8, 4, min_m=64, ws=True)),
]
FP8_PORTABLE = [
    (12, _pair(16, 128, 64, 4, 3, 128, 64, 4, 3, tma=False)),
    (float("inf"), _pair(64, 128, 64, 8, 3, 128, 64, 8, 3, tma=False)),
]
# The same weights, dequantised for activations in another dtype.
FP8_WEIGHTS_HOPPER = [
    (10, _pair(16, 64, 128, 4, 3, 64, 128, 4, 3)),
    (float("inf"), _pair(128, 64, 64, 8, 4, 64, 64, 8, 4, min_m=64, ws=True)),
]
FP8_WEIGHTS_PORTABLE = [
    (12, _pair(16, 64, 64, 4, 3, 64, 64, 4, 3, tma=False)),
    (float("inf"), _pair(64, 64, 32, 4, 3, 64, 32, 4, 3, tma=False)),
]
FP8_WEIGHTS_FP32 = [
    (12, _pair(16, 32, 32, 4, 2, 32, 32, 4, 2, tma=False)),
    (float("inf"), _pair(64, 32, 32, 8, 2, 32, 32, 8, 2, tma=False)),
]
# Their dgrad; a tile of columns has one scale, so BLOCK_N divides 128.
FP8_DGRAD_HOPPER = GemmConfig(128, 128, 128, 64, 8, 8, 3, True, True)
FP8_DGRAD_PORTABLE = GemmConfig(64, 64, 64, 32, 8, 4, 3, False)
FP8_DGRAD_FP32 = GemmConfig(64, 64, 64, 16, 8, 8, 2, False)

# wgrad, by rows per expert as above; BLOCK_K is of rows. USE_TMA goes with WARP_SPECIALIZED, whose tile is fixed.
WGRAD_HOPPER = [
    (32, GemmConfig(64, 64, 256, 64, 1, 4, 4, False)),
    (float("inf"), GemmConfig(128, 128, 256, 64, 1, 8, 4, True, True)),
]
WGRAD_PORTABLE = [(float("inf"), GemmConfig(64, 64, 64, 32, 1, 4, 3, False))]
WGRAD_FP32 = [(float("inf"), GemmConfig(64, 64, 64, 16, 1, 8, 2, False))]

# An adapter's products, one side of which is its rank: at most these tiles, narrower where the rank is. Memory-bound,
# for which plain loads are faster than TMA. Measured on an H200 (docs/measurements/NVIDIA-H200-lora-tiles.json).
# (BLOCK_N, BLOCK_K, stages of a GEMM; its other sizes are those of the GEMM beside it), (wgrad).
THIN_HOPPER = (128, 128, 3), GemmConfig(128, 128, 128, 64, 1, 4, 3, False)
THIN_PORTABLE = (64, 64, 3), GemmConfig(64, 64, 64, 32, 1, 4, 3, False)
THIN_FP32 = (64, 16, 2), GemmConfig(64, 64, 64, 16, 1, 8, 2, False)

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


def decode_config(dtype: torch.dtype, transposed: bool) -> ExpertsConfig:
    if transposed:
        return DECODE_TRANSPOSED
    return DECODE_FP32 if dtype == torch.float32 else DECODE


def _for_gpu(dtype: torch.dtype, capability: tuple[int, int], fp32, hopper, portable):
    """The one of three tables that is for this dtype on a GPU of this compute capability."""
    if dtype == torch.float32:
        return fp32
    return hopper if capability[0] == 9 else portable


def _heuristics(dtype: torch.dtype, capability: tuple[int, int]):
    return _for_gpu(dtype, capability, FP32, HOPPER, PORTABLE)


def ways(config: GemmConfig) -> set[GemmConfig]:
    """This configuration, and what gpu.py makes of it for tensors that its kernel cannot read."""
    without = config._replace(WARP_SPECIALIZED=False)
    return {config, without, without._replace(USE_TMA=False)}


def all_configs(dtype: torch.dtype, capability: tuple[int, int]) -> list[ExpertsConfig]:
    """Every heuristic configuration that may be used for this dtype on a GPU of this compute capability."""
    return [config for _, config in _heuristics(dtype, capability)]


def experts_config(rows: int, shape, dtype: torch.dtype, capability: tuple[int, int], device_name: str):
    """Configuration for `rows` routed rows on a GPU of this compute capability and name.

    shape: (E, H, I), that of the down projection. An empty device_name asks for the heuristics.
    """
    return _find(_table(shape, dtype, capability, device_name), rows / shape[0])


def _find(table, size: float):
    """Of (most, configuration), ascending: the first configuration that serves this size."""
    return table[bisect_left(table, (size,))][1]


@functools.cache
def _table(shape, dtype, capability, device_name):
    """(Average rows per expert up to which a configuration serves, configuration), ascending; the last has no limit."""
    path = config_path(shape, dtype, device_name)
    try:
        entries = read_configs(path, dtype, capability)
    except FileNotFoundError:
        return _heuristics(dtype, capability)
    except (OSError, ValueError) as error:
        warnings.warn(f"{path}: {error}. Heuristic configurations are used instead.", stacklevel=3)
        return _heuristics(dtype, capability)
    # Nearest in log(rows): neighbours meet at the geometric mean of theirs.
    limits = [math.sqrt(a * b) / shape[0] for (a, _), (b, _) in zip(entries, entries[1:])]
    return [(limit, config) for limit, (_, config) in zip([*limits, math.inf], entries)]


def fp8_configs(dtype: torch.dtype, capability: tuple[int, int]) -> list[tuple[float, ExpertsConfig]]:
    """(most rows per expert, configuration) for fp8 weights and activations of this dtype."""
    hopper, portable = FP8_WEIGHTS_HOPPER, FP8_WEIGHTS_PORTABLE
    if dtype == torch.float8_e4m3fn:
        hopper, portable = FP8_HOPPER, FP8_PORTABLE
    return _for_gpu(dtype, capability, FP8_WEIGHTS_FP32, hopper, portable)


def fp8_config(rows: int, num_experts: int, dtype: torch.dtype, capability: tuple[int, int]) -> ExpertsConfig:
    """Configuration for `rows` routed rows of this dtype over `num_experts` experts in fp8."""
    return _find(fp8_configs(dtype, capability), rows / num_experts)


def fp8_dgrad_config(dtype: torch.dtype, capability: tuple[int, int]) -> GemmConfig:
    """Configuration of the dgrad of experts in fp8, for gradients of this dtype."""
    return _for_gpu(dtype, capability, FP8_DGRAD_FP32, FP8_DGRAD_HOPPER, FP8_DGRAD_PORTABLE)


def wgrad_configs(dtype: torch.dtype, capability: tuple[int, int]) -> list[tuple[float, GemmConfig]]:
    """(most rows per expert, configuration)."""
    return _for_gpu(dtype, capability, WGRAD_FP32, WGRAD_HOPPER, WGRAD_PORTABLE)


def wgrad_config(rows: int, num_experts: int, dtype: torch.dtype, capability: tuple[int, int]) -> GemmConfig:
    """Configuration of wgrad for `rows` routed rows over `num_experts` experts."""
    return _find(wgrad_configs(dtype, capability), rows / num_experts)


def _thin(dtype: torch.dtype, capability: tuple[int, int]):
    return _for_gpu(dtype, capability, THIN_FP32, THIN_HOPPER, THIN_PORTABLE)


def _block(most: int, size: int) -> int:
    """The least power of two that holds `size`, but 16 to `most`."""
    return min(most, max(16, 1 << (size - 1).bit_length()))


def thin_config(config: GemmConfig, N: int, dtype: torch.dtype, capability: tuple[int, int]) -> GemmConfig:
    """Configuration of a GEMM whose N is an adapter's rank; rows are cut as by `config`, as in its schedule."""
    (most_n, block_k, num_stages), _ = _thin(dtype, capability)
    return config._replace(
        BLOCK_N=_block(most_n, N),
        BLOCK_K=block_k,
        num_warps=4 if config.BLOCK_M < 128 and dtype != torch.float32 else 8,
        num_stages=num_stages,
        USE_TMA=False,
        WARP_SPECIALIZED=False,
    )


def thin_wgrad_config(M: int, N: int, dtype: torch.dtype, capability: tuple[int, int]) -> GemmConfig:
    """Configuration of a wgrad whose M or N is an adapter's rank."""
    _, config = _thin(dtype, capability)
    return config._replace(BLOCK_M=_block(config.BLOCK_M, M), BLOCK_N=_block(config.BLOCK_N, N))


def router_configs(dtype: torch.dtype, capability: tuple[int, int]) -> list[tuple[float, RouterConfig]]:
    """(most tokens, configuration); dtype is that of the products: fp32 unless both operands share a 16-bit type."""
    return _for_gpu(dtype, capability, ROUTER_FP32, ROUTER_HOPPER, ROUTER_PORTABLE)


def router_config(tokens: int, dtype: torch.dtype, capability: tuple[int, int]) -> RouterConfig:
    """Configuration for this many tokens on a GPU of this compute capability."""
    return _find(router_configs(dtype, capability), tokens)


# --- tuned files ------------------------------------------------------------------------------------------------------


def config_path(shape, dtype: torch.dtype, device_name: str) -> Path:
    """The file with the tuned configurations of layers of this (E, H, I) on this GPU."""
    experts, hidden_dim, inter = shape
    dtype_name = str(dtype).removeprefix("torch.")
    device = re.sub(r"[^\w.-]", "_", device_name)
    return CONFIGS / f"E={experts},H={hidden_dim},I={inter},dtype={dtype_name},device={device}.json"


def read_configs(path: Path, dtype: torch.dtype, capability: tuple[int, int]) -> list[tuple[int, ExpertsConfig]]:
    """(rows it was tuned for, configuration) of each entry of a tuned file, rows ascending.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not what scripts/tune.py writes, or cannot work for this dtype on such a GPU.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    _check_fields("the file", content, ["tuned_with", "entries"])
    if not isinstance(content["entries"], list) or not content["entries"]:
        raise ValueError("entries: expected a list of at least one")
    entries, last_rows = [], 0
    for i, entry in enumerate(content["entries"]):
        _check_fields(f"entry {i}", entry, ["rows", "gate_up", "down"])
        rows = entry["rows"]
        if type(rows) is not int or not last_rows < rows < 2**31:
            raise ValueError(f"entry {i}: rows: expected an integer above {last_rows} and below 2**31, got {rows!r}")
        up, down = (_gemm_config(f"entry {i}: {name}", entry[name]) for name in ("gate_up", "down"))
        if (up.BLOCK_M, up.MIN_M) != (down.BLOCK_M, down.MIN_M):
            raise ValueError(f"entry {i}: gate_up and down must share BLOCK_M and MIN_M")
        for name, config in (("gate_up", up), ("down", down)):
            fault = fault_of(name, config, dtype, capability)
            if fault:
                raise ValueError(f"entry {i}: {name}: {fault}")
        entries.append((rows, ExpertsConfig(up, down)))
        last_rows = rows
    return entries


def _check_fields(name, value, required, optional=()):
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected an object, got {type(value).__name__}")
    if not set(required) <= set(value) <= {*required, *optional}:
        raise ValueError(f"{name}: expected the fields {', '.join([*required, *optional])}, got {', '.join(value)}")


def _gemm_config(name, value) -> GemmConfig:
    defaults = GemmConfig._field_defaults
    _check_fields(name, value, [field for field in GemmConfig._fields if field not in defaults], defaults)
    config = GemmConfig(**value)
    for field, kind in get_type_hints(GemmConfig).items():
        x = getattr(config, field)
        if type(x) is not kind:
            raise ValueError(f"{name}: {field}: expected {kind.__name__}, got {x!r}")
        # A dot takes nothing below 16.
        least = 16 if field in ("BLOCK_M", "MIN_M", "BLOCK_N", "BLOCK_K") else 1
        if kind is int and (x < least or (field != "num_stages" and x & (x - 1))):
            raise ValueError(f"{name}: {field}: expected a power of two, {least} or more, got {x}")
    if config.MIN_M > config.BLOCK_M:
        raise ValueError(f"{name}: MIN_M {config.MIN_M} exceeds BLOCK_M {config.BLOCK_M}")
    return config


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
