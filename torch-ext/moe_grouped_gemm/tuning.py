"""Which tile sizes the kernels use: tuned ones from configs/*.json, for other GPUs and layers heuristics.

A heuristic table is a list of UpTo, ascending. A tile should hold the rows of nearly every expert, so it is higher than
their average. Those for Hopper were measured on an H200 (docs/design.md). The others serve every other GPU, and fp32
(on the FMA units) every GPU; they were run on an H100 and an H200 alone, with MOE_GROUPED_GEMM_PORTABLE=1.
"""

from __future__ import annotations

import functools
import math
import warnings
from bisect import bisect_left
from typing import NamedTuple

import torch

from .launch_configs import DecodeConfig, ExpertsConfig, GemmConfig, RouterConfig, ThinConfig
from .tuned_files import config_path, read_configs


class UpTo(NamedTuple):
    """An entry of a table: the configuration that serves sizes up to this one, and above that of the entry before."""

    size: float  # rows per expert, on average; of the router tokens
    config: ExpertsConfig | GemmConfig | RouterConfig


class Tables(NamedTuple):
    """What one kernel, or a pair of kernels, runs with; fp32 serves every GPU."""

    hopper: list[UpTo] | GemmConfig | ThinConfig
    portable: list[UpTo] | GemmConfig | ThinConfig
    fp32: list[UpTo] | GemmConfig | ThinConfig

    def of(self, dtype: torch.dtype, capability: tuple[int, int]):
        """For this dtype on a GPU of this compute capability."""
        if dtype == torch.float32:
            return self.fp32
        return self.hopper if capability[0] == 9 else self.portable


def _gemm(
    BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages, MIN_M=None, GROUP_M=8, USE_TMA=False, WARP_SPECIALIZED=False
):
    """A GEMM whose tiles are all BLOCK_M high, unless MIN_M is given."""
    min_m = MIN_M or BLOCK_M
    return GemmConfig(BLOCK_M, min_m, BLOCK_N, BLOCK_K, GROUP_M, num_warps, num_stages, USE_TMA, WARP_SPECIALIZED)


def _layer(size, both, gate_up, down):
    """The entry of a table for layers, from what its two GEMMs share and what each has of its own."""
    return UpTo(size, ExpertsConfig(_gemm(**both, **gate_up), _gemm(**both, **down)))


# --- decode -----------------------------------------------------------------------------------------------------------

# Measured on an H200 for T = 1, 2 and 4 of the four workloads; within 13 % of the best for each.
DECODE = ExpertsConfig(
    gate_up=DecodeConfig(BLOCK_N=4, BLOCK_K=256, num_warps=2),
    down=DecodeConfig(BLOCK_N=8, BLOCK_K=1024, num_warps=2),
)
# Weights whose rows are not contiguous but whose columns are: a program reads runs of 64 bytes or more of each column.
DECODE_TRANSPOSED = ExpertsConfig(
    gate_up=DecodeConfig(BLOCK_N=32, BLOCK_K=32, num_warps=4),
    down=DecodeConfig(BLOCK_N=32, BLOCK_K=64, num_warps=4),
)
DECODE_FP32 = ExpertsConfig(
    gate_up=DecodeConfig(BLOCK_N=4, BLOCK_K=256, num_warps=2),
    down=DecodeConfig(BLOCK_N=4, BLOCK_K=512, num_warps=4),
)
# Measured on an H200 for T = 1 of dsv3.
DECODE_FP8 = ExpertsConfig(
    gate_up=DecodeConfig(BLOCK_N=4, BLOCK_K=512, num_warps=2),
    down=DecodeConfig(BLOCK_N=4, BLOCK_K=512, num_warps=2),
)

# A tile of the first has these rows of gate and of up, one of the second these for each warp, which has a slot.
DECODE_FP4 = ExpertsConfig(
    gate_up=DecodeConfig(BLOCK_N=32, BLOCK_K=256, num_warps=2),
    down=DecodeConfig(BLOCK_N=32, BLOCK_K=256, num_warps=4),
)

# --- gate_up, grouped_gemm --------------------------------------------------------------------------------------------

EXPERTS = Tables(
    hopper=[
        _layer(
            0.5,
            both=dict(BLOCK_M=16, USE_TMA=True),
            gate_up=dict(BLOCK_N=64, BLOCK_K=128, num_warps=4, num_stages=4),
            down=dict(BLOCK_N=128, BLOCK_K=128, num_warps=4, num_stages=4),
        ),
        _layer(
            10,
            both=dict(BLOCK_M=16, USE_TMA=True),
            gate_up=dict(BLOCK_N=64, BLOCK_K=128, num_warps=4, num_stages=3),
            down=dict(BLOCK_N=128, BLOCK_K=128, num_warps=4, num_stages=3),
        ),
        _layer(
            50,
            both=dict(BLOCK_M=64, USE_TMA=True),
            gate_up=dict(BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=4),
            down=dict(BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=3),
        ),
        _layer(
            math.inf,
            both=dict(BLOCK_M=128, MIN_M=64, USE_TMA=True),
            gate_up=dict(BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=4),
            down=dict(BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=4, WARP_SPECIALIZED=True),
        ),
    ],
    # Little shared memory (64 KiB on CDNA3, 99 KiB on sm_89 and sm_120), no TMA.
    portable=[
        _layer(
            12,
            both=dict(BLOCK_M=16),
            gate_up=dict(BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=3),
            down=dict(BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=3),
        ),
        _layer(
            32,
            both=dict(BLOCK_M=32),
            gate_up=dict(BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=3),
            down=dict(BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=3),
        ),
        _layer(
            math.inf,
            both=dict(BLOCK_M=64),
            gate_up=dict(BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=3),
            down=dict(BLOCK_N=128, BLOCK_K=32, num_warps=4, num_stages=3),
        ),
    ],
    fp32=[
        _layer(
            12,
            both=dict(BLOCK_M=16),
            gate_up=dict(BLOCK_N=32, BLOCK_K=32, num_warps=4, num_stages=2),
            down=dict(BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=2),
        ),
        _layer(
            math.inf,
            both=dict(BLOCK_M=64),
            gate_up=dict(BLOCK_N=32, BLOCK_K=16, num_warps=4, num_stages=2),
            down=dict(BLOCK_N=64, BLOCK_K=16, num_warps=8, num_stages=2),
        ),
    ],
)

# --- gate_up_fp8, grouped_gemm_fp8 ------------------------------------------------------------------------------------

# Activations in fp8. The gate_up GEMM's BLOCK_N is 128, since its result leaves in fp8; both GEMMs read two tiles of
# BLOCK_N weight rows. Measured: docs/measurements/NVIDIA-H200-fp8-sweep.txt.
FP8 = Tables(
    hopper=[
        _layer(
            10,
            both=dict(BLOCK_M=16, USE_TMA=True),
            gate_up=dict(BLOCK_N=128, BLOCK_K=128, num_warps=4, num_stages=4),
            down=dict(BLOCK_N=64, BLOCK_K=128, num_warps=4, num_stages=3),
        ),
        _layer(
            24,
            both=dict(BLOCK_M=32, USE_TMA=True),
            gate_up=dict(BLOCK_N=128, BLOCK_K=128, num_warps=4, num_stages=3),
            down=dict(BLOCK_N=64, BLOCK_K=128, num_warps=4, num_stages=3),
        ),
        _layer(
            50,
            both=dict(BLOCK_M=64, USE_TMA=True),
            gate_up=dict(BLOCK_N=128, BLOCK_K=128, num_warps=8, num_stages=4),
            down=dict(BLOCK_N=64, BLOCK_K=128, num_warps=4, num_stages=3),
        ),
        _layer(
            math.inf,
            both=dict(BLOCK_M=128, MIN_M=64, USE_TMA=True),
            gate_up=dict(BLOCK_N=128, BLOCK_K=128, num_warps=8, num_stages=4),
            down=dict(BLOCK_N=128, BLOCK_K=128, num_warps=8, num_stages=4, WARP_SPECIALIZED=True),
        ),
    ],
    portable=[
        _layer(
            12,
            both=dict(BLOCK_M=16),
            gate_up=dict(BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=3),
            down=dict(BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=3),
        ),
        _layer(
            math.inf,
            both=dict(BLOCK_M=64),
            gate_up=dict(BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
            down=dict(BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
        ),
    ],
    fp32=[],
)
# Activations in another dtype, to which the weights are dequantised. Measured: the same file.
FP8_WEIGHTS = Tables(
    hopper=[
        _layer(
            10,
            both=dict(BLOCK_M=16, USE_TMA=True),
            gate_up=dict(BLOCK_N=64, BLOCK_K=128, num_warps=4, num_stages=3),
            down=dict(BLOCK_N=64, BLOCK_K=128, num_warps=4, num_stages=3),
        ),
        _layer(
            math.inf,
            both=dict(BLOCK_M=128, MIN_M=64, USE_TMA=True),
            gate_up=dict(BLOCK_N=64, BLOCK_K=64, num_warps=8, num_stages=4),
            down=dict(BLOCK_N=64, BLOCK_K=64, num_warps=8, num_stages=4, WARP_SPECIALIZED=True),
        ),
    ],
    portable=[
        _layer(
            12,
            both=dict(BLOCK_M=16),
            gate_up=dict(BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=3),
            down=dict(BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=3),
        ),
        _layer(
            math.inf,
            both=dict(BLOCK_M=64),
            gate_up=dict(BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=3),
            down=dict(BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=3),
        ),
    ],
    fp32=[
        _layer(
            12,
            both=dict(BLOCK_M=16),
            gate_up=dict(BLOCK_N=32, BLOCK_K=32, num_warps=4, num_stages=2),
            down=dict(BLOCK_N=32, BLOCK_K=32, num_warps=4, num_stages=2),
        ),
        _layer(
            math.inf,
            both=dict(BLOCK_M=64),
            gate_up=dict(BLOCK_N=32, BLOCK_K=32, num_warps=8, num_stages=2),
            down=dict(BLOCK_N=32, BLOCK_K=32, num_warps=8, num_stages=2),
        ),
    ],
)

# --- dgrad_fp8, wgrad, an adapter's products --------------------------------------------------------------------------

# A tile of columns has one scale, so BLOCK_N divides 128.
FP8_DGRAD = Tables(
    hopper=_gemm(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3, USE_TMA=True, WARP_SPECIALIZED=True),
    portable=_gemm(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=3),
    fp32=_gemm(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, num_warps=8, num_stages=2),
)

# --- 4 bits -----------------------------------------------------------------------------------------------------------

FP4 = Tables(
    hopper=[
        UpTo(12, _gemm(BLOCK_M=8, BLOCK_N=64, BLOCK_K=64, num_warps=2, num_stages=3)),
        UpTo(
            math.inf,
            _gemm(
                BLOCK_M=128,
                MIN_M=64,
                BLOCK_N=128,
                BLOCK_K=64,
                num_warps=8,
                num_stages=3,
                USE_TMA=True,
                WARP_SPECIALIZED=True,
            ),
        ),
    ],
    portable=[
        UpTo(12, _gemm(BLOCK_M=16, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=3)),
        UpTo(math.inf, _gemm(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=3)),
    ],
    fp32=[UpTo(math.inf, _gemm(BLOCK_M=32, BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=2))],
)
FP4_DGRAD = Tables(
    hopper=_gemm(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3, USE_TMA=True, WARP_SPECIALIZED=True),
    portable=_gemm(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=3),
    fp32=_gemm(BLOCK_M=32, BLOCK_N=64, BLOCK_K=16, num_warps=4, num_stages=2),
)

# --- wgrad ------------------------------------------------------------------------------------------------------------

# BLOCK_K is of rows. USE_TMA goes with WARP_SPECIALIZED, whose tile is fixed. Measured:
# docs/measurements/NVIDIA-H200-backward.json and -training.json.
_wgrad = functools.partial(_gemm, GROUP_M=1)
WGRAD = Tables(
    hopper=[
        UpTo(32, _wgrad(BLOCK_M=64, BLOCK_N=256, BLOCK_K=64, num_warps=4, num_stages=4)),
        UpTo(
            math.inf,
            _wgrad(
                BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=4, USE_TMA=True, WARP_SPECIALIZED=True
            ),
        ),
    ],
    portable=[UpTo(math.inf, _wgrad(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=3))],
    fp32=[UpTo(math.inf, _wgrad(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, num_warps=8, num_stages=2))],
)

# Memory-bound, for which plain loads are faster than TMA. Measured: docs/measurements/NVIDIA-H200-lora-tiles.json.
THIN = Tables(
    hopper=ThinConfig(
        gemm=dict(BLOCK_N=128, BLOCK_K=128, num_stages=3),
        wgrad=_wgrad(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=3),
    ),
    portable=ThinConfig(
        gemm=dict(BLOCK_N=64, BLOCK_K=64, num_stages=3),
        wgrad=_wgrad(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=3),
    ),
    fp32=ThinConfig(
        gemm=dict(BLOCK_N=64, BLOCK_K=16, num_stages=2),
        wgrad=_wgrad(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, num_warps=8, num_stages=2),
    ),
)

# --- router_logits ----------------------------------------------------------------------------------------------------

# Few tokens: small tiles of experts, so that many programs share in reading the weight.
ROUTER = Tables(
    hopper=[
        UpTo(16, RouterConfig(BLOCK_T=16, BLOCK_E=16, BLOCK_K=128, num_warps=4, num_stages=5)),
        UpTo(64, RouterConfig(BLOCK_T=64, BLOCK_E=16, BLOCK_K=128, num_warps=4, num_stages=4)),
        UpTo(512, RouterConfig(BLOCK_T=64, BLOCK_E=64, BLOCK_K=64, num_warps=4, num_stages=4)),
        UpTo(math.inf, RouterConfig(BLOCK_T=128, BLOCK_E=128, BLOCK_K=64, num_warps=8, num_stages=4)),
    ],
    portable=[
        UpTo(16, RouterConfig(BLOCK_T=16, BLOCK_E=16, BLOCK_K=128, num_warps=4, num_stages=3)),
        UpTo(math.inf, RouterConfig(BLOCK_T=64, BLOCK_E=64, BLOCK_K=64, num_warps=8, num_stages=3)),
    ],
    fp32=[
        UpTo(16, RouterConfig(BLOCK_T=16, BLOCK_E=16, BLOCK_K=32, num_warps=4, num_stages=2)),
        UpTo(math.inf, RouterConfig(BLOCK_T=64, BLOCK_E=64, BLOCK_K=32, num_warps=8, num_stages=2)),
    ],
)

# --- the choice -------------------------------------------------------------------------------------------------------


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


def experts_config(rows: int, shape, dtype: torch.dtype, capability: tuple[int, int], device_name: str):
    """Configuration for `rows` routed rows on a GPU of this compute capability and name.

    shape: (E, H, I), that of the down projection. An empty device_name asks for the heuristics.
    """
    return _first_serving(experts_table(shape, dtype, capability, device_name), rows / shape[0])


def _first_serving(table: list[UpTo], size: float):
    """The configuration for this size."""
    return table[bisect_left(table, (size,))].config


@functools.cache
def experts_table(shape, dtype: torch.dtype, capability: tuple[int, int], device_name: str) -> list[UpTo]:
    """Of `experts_config`, from the tuned file if there is one that can be read."""
    path = config_path(shape, dtype, device_name)
    try:
        entries = read_configs(path, dtype, capability)
    except FileNotFoundError:
        return EXPERTS.of(dtype, capability)
    except (OSError, ValueError) as error:
        warnings.warn(f"{path}: {error}. Heuristic configurations are used instead.", stacklevel=3)
        return EXPERTS.of(dtype, capability)
    # Nearest in log(rows): neighbours meet at the geometric mean of theirs.
    limits = [math.sqrt(a * b) / shape[0] for (a, _), (b, _) in zip(entries, entries[1:])]
    return [UpTo(limit, config) for limit, (_, config) in zip([*limits, math.inf], entries)]


def fp8_config(rows: int, num_experts: int, dtype: torch.dtype, capability: tuple[int, int]) -> ExpertsConfig:
    """Configuration for `rows` routed rows of this dtype over `num_experts` experts in fp8."""
    tables = FP8 if dtype == torch.float8_e4m3fn else FP8_WEIGHTS
    return _first_serving(tables.of(dtype, capability), rows / num_experts)


def fp4_config(rows: int, num_experts: int, dtype: torch.dtype, capability: tuple[int, int]) -> GemmConfig:
    """Configuration for `rows` routed rows of this dtype over `num_experts` experts in 4 bits."""
    return _first_serving(FP4.of(dtype, capability), rows / num_experts)


def wgrad_config(rows: int, num_experts: int, dtype: torch.dtype, capability: tuple[int, int]) -> GemmConfig:
    """Configuration of wgrad for `rows` routed rows over `num_experts` experts."""
    return _first_serving(WGRAD.of(dtype, capability), rows / num_experts)


def _narrowed(block: int, size: int) -> int:
    """This block, or the least power of two, 16 or more, that holds `size` if that is less."""
    return min(block, max(16, 1 << (size - 1).bit_length()))


def thin_config(config: GemmConfig, N: int, dtype: torch.dtype, capability: tuple[int, int]) -> GemmConfig:
    """Configuration of a GEMM whose N is an adapter's rank; rows are cut as by `config`, as in its schedule."""
    thin = config._replace(**THIN.of(dtype, capability).gemm)
    return thin._replace(
        BLOCK_N=_narrowed(thin.BLOCK_N, N),
        num_warps=4 if config.BLOCK_M < 128 and dtype != torch.float32 else 8,
        USE_TMA=False,
        WARP_SPECIALIZED=False,
    )


def thin_wgrad_config(M: int, N: int, dtype: torch.dtype, capability: tuple[int, int]) -> GemmConfig:
    """Configuration of a wgrad whose M or N is an adapter's rank."""
    config = THIN.of(dtype, capability).wgrad
    return config._replace(BLOCK_M=_narrowed(config.BLOCK_M, M), BLOCK_N=_narrowed(config.BLOCK_N, N))


def router_config(tokens: int, dtype: torch.dtype, capability: tuple[int, int]) -> RouterConfig:
    """Configuration for this many tokens on a GPU of this compute capability."""
    return _first_serving(ROUTER.of(dtype, capability), tokens)
