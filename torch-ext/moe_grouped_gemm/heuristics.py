"""Tile sizes for layers and GPUs that nobody tuned for.

A table is a list of UpTo, ascending. A tile should hold the rows of nearly every expert, so it is higher than their
average. There is a table for each kind of GPU, by what it has. Those for Hopper were measured on an H200
(docs/design.md); the others compile for the GPUs that they are for, without spills, and have not run there.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from .launch_configs import DecodeConfig, ExpertsConfig, GemmConfig, RouterConfig, ThinConfig, Traits


class UpTo(NamedTuple):
    """An entry of a table: the configuration that serves sizes up to this one, and above that of the entry before."""

    size: float  # rows per expert, on average; of the router tokens
    config: ExpertsConfig | GemmConfig | RouterConfig


class Tables(NamedTuple):
    """What one kernel, or a pair of kernels, runs with: each a list of UpTo, or one configuration for all sizes."""

    fp32: list | tuple  # on every GPU, since it runs on the FMA units
    hopper: list | tuple
    blackwell: list | tuple  # of data centres, whose MMA is tcgen05: sm_100
    large: list | tuple  # 160 KiB of shared memory: sm_80, gfx950
    small: list | tuple  # 96 KiB: sm_86, sm_89
    least: list | tuple  # 64 KiB: gfx942, and what is left
    small_tma: list | tuple | None = None  # where it differs from `small`: sm_120
    large_mfma: list | tuple | None = None  # where it differs from `large`: gfx950

    def of(self, dtype: torch.dtype, traits: Traits):
        """For this dtype on a GPU with these traits."""
        if dtype == torch.float32:
            return self.fp32
        if traits.mma == "wgmma":
            return self.hopper
        if traits.mma == "tcgen05":
            return self.blackwell
        if traits.shared_memory >= 160 * 1024:
            return self.large_mfma if traits.mma == "mfma" and self.large_mfma is not None else self.large
        if traits.shared_memory < 96 * 1024:
            return self.least
        return self.small_tma if traits.has_tma and self.small_tma is not None else self.small


def _gemm(
    BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages, MIN_M=None, GROUP_M=8, USE_TMA=False, WARP_SPECIALIZED=False
):
    """A GEMM whose tiles are all BLOCK_M high, unless MIN_M is given."""
    min_m = MIN_M or BLOCK_M
    return GemmConfig(BLOCK_M, min_m, BLOCK_N, BLOCK_K, GROUP_M, num_warps, num_stages, USE_TMA, WARP_SPECIALIZED)


def _layer(size, rows, gate_up, down, USE_TMA=False, specialized=()):
    """The entry of a table for layers; `rows`: BLOCK_M, MIN_M; the GEMMs: BLOCK_N, BLOCK_K, num_warps, num_stages.

    specialized: names of the GEMMs with WARP_SPECIALIZED.
    """
    block_m, min_m = rows
    up, down = (
        _gemm(block_m, *sizes, MIN_M=min_m, USE_TMA=USE_TMA, WARP_SPECIALIZED=name in specialized)
        for name, sizes in (("gate_up", gate_up), ("down", down))
    )
    return UpTo(size, ExpertsConfig(up, down))


_tma_layer = functools.partial(_layer, USE_TMA=True)

# --- decode -----------------------------------------------------------------------------------------------------------

# Measured on an H200 for T = 1 of three workloads and a block, together within 1 % of the best for each, not for more
# tokens: docs/measurements/NVIDIA-H200-decode.json.
DECODE = ExpertsConfig(
    gate_up=DecodeConfig(BLOCK_N=2, BLOCK_K=256, num_warps=1),
    down=DecodeConfig(BLOCK_N=8, BLOCK_K=2048, num_warps=8),
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
# A tile of the first has these rows of gate and of up, 16 a warp, so that two warps split the columns of the same rows;
# one of the second has these for each warp, which has a slot. Measured like those of fp8: docs/design.md.
DECODE_FP4 = ExpertsConfig(
    gate_up=DecodeConfig(BLOCK_N=32, BLOCK_K=256, num_warps=4),
    down=DecodeConfig(BLOCK_N=16, BLOCK_K=256, num_warps=8),
)

# --- gate_up, grouped_gemm --------------------------------------------------------------------------------------------

EXPERTS = Tables(
    fp32=[
        _layer(12, (16, 16), gate_up=(32, 32, 4, 2), down=(64, 32, 4, 2)),
        _layer(math.inf, (64, 64), gate_up=(32, 16, 4, 2), down=(64, 16, 8, 2)),
    ],
    hopper=[
        _tma_layer(0.5, (16, 16), gate_up=(64, 128, 4, 4), down=(128, 128, 4, 4)),
        _tma_layer(10, (16, 16), gate_up=(64, 128, 4, 3), down=(128, 128, 4, 3)),
        _tma_layer(50, (64, 64), gate_up=(64, 64, 4, 4), down=(128, 64, 4, 3)),
        # Measured with 128 rows an expert and with 256: docs/design.md.
        _tma_layer(180, (128, 64), gate_up=(128, 64, 8, 4), down=(256, 64, 8, 3), specialized=["down"]),
        _tma_layer(math.inf, (128, 64), gate_up=(128, 64, 8, 4), down=(256, 64, 8, 4), specialized=["gate_up", "down"]),
    ],
    # Two programs on a multiprocessor: one multiplies while the other stores. tcgen05 multiplies 64 rows in the time of
    # 128, so last tiles are as high as the others.
    blackwell=[
        _tma_layer(10, (16, 16), gate_up=(64, 128, 4, 3), down=(128, 128, 4, 3)),
        _tma_layer(50, (64, 64), gate_up=(64, 64, 4, 4), down=(128, 64, 4, 4)),
        _tma_layer(math.inf, (128, 128), gate_up=(64, 64, 8, 3), down=(128, 64, 4, 3)),
    ],
    large=[
        _layer(12, (16, 16), gate_up=(64, 128, 4, 3), down=(128, 128, 4, 3)),
        _layer(32, (32, 32), gate_up=(64, 64, 4, 4), down=(128, 64, 4, 4)),
        _layer(50, (64, 64), gate_up=(64, 64, 4, 3), down=(128, 64, 4, 3)),
        _layer(math.inf, (128, 64), gate_up=(64, 64, 8, 4), down=(128, 64, 8, 4)),
    ],
    small=[
        _layer(12, (16, 16), gate_up=(64, 128, 4, 2), down=(128, 128, 4, 2)),
        _layer(32, (32, 32), gate_up=(64, 64, 4, 3), down=(128, 64, 4, 3)),
        _layer(50, (64, 64), gate_up=(64, 64, 8, 3), down=(128, 64, 4, 3)),
        _layer(math.inf, (128, 64), gate_up=(64, 64, 8, 3), down=(128, 64, 8, 3)),
    ],
    # Low tiles by plain loads: with TMA the assembler puts some registers aside.
    small_tma=[
        _layer(12, (16, 16), gate_up=(64, 128, 4, 2), down=(128, 128, 4, 2)),
        _layer(32, (32, 32), gate_up=(64, 64, 4, 3), down=(128, 64, 4, 3)),
        _tma_layer(50, (64, 64), gate_up=(64, 64, 8, 3), down=(128, 64, 4, 3)),
        _tma_layer(math.inf, (128, 128), gate_up=(64, 64, 8, 3), down=(128, 64, 8, 3)),
    ],
    least=[
        _layer(12, (16, 16), gate_up=(64, 64, 4, 2), down=(128, 64, 4, 2)),
        _layer(32, (32, 32), gate_up=(64, 64, 4, 2), down=(128, 64, 4, 2)),
        _layer(50, (64, 64), gate_up=(64, 64, 4, 2), down=(128, 64, 4, 2)),
        _layer(math.inf, (128, 64), gate_up=(64, 64, 8, 2), down=(128, 64, 8, 2)),
    ],
)

# --- gate_up_fp8, grouped_gemm_fp8 ------------------------------------------------------------------------------------

# Activations in fp8, on GPUs that multiply it. The gate_up GEMM's BLOCK_N is 128, since its result leaves in fp8; both
# GEMMs read two tiles of BLOCK_N weight rows. Measured: docs/measurements/NVIDIA-H200-fp8-sweep.txt.
FP8 = Tables(
    fp32=[],
    hopper=[
        _tma_layer(10, (16, 16), gate_up=(128, 128, 4, 4), down=(64, 128, 4, 3)),
        _tma_layer(24, (32, 32), gate_up=(128, 128, 4, 3), down=(64, 128, 4, 3)),
        _tma_layer(50, (64, 64), gate_up=(128, 128, 8, 4), down=(64, 128, 4, 3)),
        _tma_layer(math.inf, (128, 64), gate_up=(128, 128, 8, 4), down=(128, 128, 8, 4), specialized=["down"]),
    ],
    blackwell=[
        _tma_layer(10, (16, 16), gate_up=(128, 128, 4, 4), down=(64, 128, 4, 3)),
        _tma_layer(50, (64, 64), gate_up=(128, 128, 8, 4), down=(64, 128, 4, 3)),
        _tma_layer(math.inf, (128, 128), gate_up=(128, 128, 8, 3), down=(64, 128, 8, 3)),
    ],
    large=[],
    small=[
        _layer(12, (16, 16), gate_up=(128, 64, 4, 3), down=(128, 64, 4, 3)),
        _layer(math.inf, (64, 64), gate_up=(128, 64, 8, 3), down=(128, 64, 8, 3)),
    ],
    least=[],
)
# Activations in another dtype, to which the weights are dequantised. Measured: the same file.
FP8_WEIGHTS = Tables(
    fp32=[
        _layer(12, (16, 16), gate_up=(32, 32, 4, 2), down=(32, 32, 4, 2)),
        _layer(math.inf, (64, 64), gate_up=(32, 32, 8, 2), down=(32, 32, 8, 2)),
    ],
    hopper=[
        _tma_layer(10, (16, 16), gate_up=(64, 128, 4, 3), down=(64, 128, 4, 3)),
        _tma_layer(math.inf, (128, 64), gate_up=(64, 64, 8, 4), down=(64, 64, 8, 4), specialized=["down"]),
    ],
    blackwell=[
        _layer(10, (16, 16), gate_up=(64, 128, 4, 3), down=(64, 128, 4, 3)),
        _tma_layer(math.inf, (128, 64), gate_up=(64, 64, 8, 4), down=(64, 64, 8, 4)),
    ],
    large=[
        _layer(12, (16, 16), gate_up=(64, 128, 4, 3), down=(64, 128, 4, 3)),
        _layer(math.inf, (128, 64), gate_up=(64, 32, 8, 4), down=(64, 32, 8, 4)),
    ],
    small=[
        _layer(12, (16, 16), gate_up=(64, 64, 4, 3), down=(64, 64, 4, 3)),
        _layer(math.inf, (128, 64), gate_up=(64, 32, 8, 4), down=(64, 32, 8, 4)),
    ],
    least=[
        _layer(12, (16, 16), gate_up=(64, 64, 4, 2), down=(64, 64, 4, 2)),
        _layer(math.inf, (128, 64), gate_up=(64, 32, 8, 2), down=(64, 32, 8, 2)),
    ],
)

# --- dgrad_fp8 --------------------------------------------------------------------------------------------------------

# A tile of columns has one scale, so BLOCK_N divides 128.
FP8_DGRAD = Tables(
    fp32=_gemm(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, num_warps=8, num_stages=2),
    hopper=_gemm(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3, USE_TMA=True, WARP_SPECIALIZED=True),
    blackwell=_gemm(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3, USE_TMA=True),
    large=_gemm(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, num_warps=8, num_stages=4),
    small=_gemm(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, num_warps=8, num_stages=4),
    least=_gemm(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, num_warps=8, num_stages=2),
)

# --- 4 bits -----------------------------------------------------------------------------------------------------------

# The kernel of fp4_registers.py, whose tiles have 8 rows; NVIDIA's. A dot of AMD's has at least 16.
_FEW_FP4 = UpTo(12, _gemm(BLOCK_M=8, BLOCK_N=64, BLOCK_K=64, num_warps=2, num_stages=3))
_LOW_FP4 = UpTo(12, _gemm(BLOCK_M=16, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=2))
FP4 = Tables(
    fp32=[UpTo(math.inf, _gemm(BLOCK_M=32, BLOCK_N=64, BLOCK_K=32, num_warps=8, num_stages=2))],
    hopper=[
        _FEW_FP4,
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
    blackwell=[_FEW_FP4, UpTo(math.inf, _gemm(128, 128, 64, num_warps=8, num_stages=3, MIN_M=64))],
    large=[_FEW_FP4, UpTo(math.inf, _gemm(128, 64, 64, num_warps=8, num_stages=4, MIN_M=64))],
    small=[_FEW_FP4, UpTo(math.inf, _gemm(128, 64, 64, num_warps=8, num_stages=3, MIN_M=64))],
    least=[_LOW_FP4, UpTo(math.inf, _gemm(128, 64, 64, num_warps=8, num_stages=2, MIN_M=64))],
    large_mfma=[_LOW_FP4, UpTo(math.inf, _gemm(128, 64, 64, num_warps=8, num_stages=3, MIN_M=64))],
)
# grouped_gemm_fp4_hopper, whose BLOCK_N is fixed. Measured: docs/design.md.
_ordered = functools.partial(_gemm, BLOCK_N=256, num_warps=4, USE_TMA=True, WARP_SPECIALIZED=True)
FP4_ORDERED = Tables(
    fp32=[],
    hopper=[
        _FEW_FP4._replace(size=4),
        UpTo(11, _ordered(BLOCK_M=16, BLOCK_K=256, num_stages=5)),
        UpTo(26, _ordered(BLOCK_M=32, BLOCK_K=256, num_stages=4)),
        UpTo(52, _ordered(BLOCK_M=64, MIN_M=32, BLOCK_K=256, num_stages=3)),
        UpTo(math.inf, _ordered(BLOCK_M=128, MIN_M=64, BLOCK_K=128, num_stages=4)),
    ],
    blackwell=[],
    large=[],
    small=[],
    least=[],
)
FP4_DGRAD = Tables(
    fp32=_gemm(BLOCK_M=32, BLOCK_N=64, BLOCK_K=16, num_warps=4, num_stages=2),
    hopper=_gemm(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3, USE_TMA=True, WARP_SPECIALIZED=True),
    blackwell=_gemm(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
    large=_gemm(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
    small=_gemm(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
    least=_gemm(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, num_warps=8, num_stages=2),
)

# --- wgrad, an adapter's products -------------------------------------------------------------------------------------

# BLOCK_K is of rows. USE_TMA goes with WARP_SPECIALIZED, whose tile is fixed. Measured:
# docs/measurements/NVIDIA-H200-backward.json and -training.json.
_wgrad = functools.partial(_gemm, GROUP_M=1)
WGRAD = Tables(
    fp32=[UpTo(math.inf, _wgrad(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, num_warps=8, num_stages=2))],
    hopper=[
        UpTo(32, _wgrad(BLOCK_M=64, BLOCK_N=256, BLOCK_K=64, num_warps=4, num_stages=4)),
        UpTo(
            math.inf,
            _wgrad(
                BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=4, USE_TMA=True, WARP_SPECIALIZED=True
            ),
        ),
    ],
    blackwell=[UpTo(math.inf, _wgrad(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=3))],
    large=[UpTo(math.inf, _wgrad(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3))],
    small=[UpTo(math.inf, _wgrad(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3))],
    least=[UpTo(math.inf, _wgrad(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=2))],
)

# Memory-bound, for which plain loads are faster than TMA. Measured: docs/measurements/NVIDIA-H200-lora-tiles.json.
THIN = Tables(
    fp32=ThinConfig(
        gemm=dict(BLOCK_N=64, BLOCK_K=16, num_stages=2),
        wgrad=_wgrad(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, num_warps=8, num_stages=2),
    ),
    hopper=ThinConfig(
        gemm=dict(BLOCK_N=128, BLOCK_K=128, num_stages=3),
        wgrad=_wgrad(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=3),
    ),
    blackwell=ThinConfig(
        gemm=dict(BLOCK_N=128, BLOCK_K=64, num_stages=3),
        wgrad=_wgrad(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=3),
    ),
    large=ThinConfig(
        gemm=dict(BLOCK_N=128, BLOCK_K=64, num_stages=3),
        wgrad=_wgrad(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
    ),
    small=ThinConfig(
        gemm=dict(BLOCK_N=128, BLOCK_K=64, num_stages=3),
        wgrad=_wgrad(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
    ),
    least=ThinConfig(
        gemm=dict(BLOCK_N=128, BLOCK_K=64, num_stages=2),
        wgrad=_wgrad(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=2),
    ),
)

# --- router_logits ----------------------------------------------------------------------------------------------------

# Few tokens: small tiles of experts, so that many programs share in reading the weight.
_ROUTER = [
    UpTo(16, RouterConfig(BLOCK_T=16, BLOCK_E=16, BLOCK_K=128, num_warps=4, num_stages=3)),
    UpTo(math.inf, RouterConfig(BLOCK_T=64, BLOCK_E=64, BLOCK_K=64, num_warps=8, num_stages=3)),
]
_ROUTER_HOPPER = [
    UpTo(16, RouterConfig(BLOCK_T=16, BLOCK_E=16, BLOCK_K=128, num_warps=4, num_stages=5)),
    UpTo(64, RouterConfig(BLOCK_T=64, BLOCK_E=16, BLOCK_K=128, num_warps=4, num_stages=4)),
    UpTo(512, RouterConfig(BLOCK_T=64, BLOCK_E=64, BLOCK_K=64, num_warps=4, num_stages=4)),
    UpTo(math.inf, RouterConfig(BLOCK_T=128, BLOCK_E=128, BLOCK_K=64, num_warps=8, num_stages=4)),
]
ROUTER = Tables(
    fp32=[
        UpTo(16, RouterConfig(BLOCK_T=16, BLOCK_E=16, BLOCK_K=32, num_warps=4, num_stages=2)),
        UpTo(math.inf, RouterConfig(BLOCK_T=64, BLOCK_E=64, BLOCK_K=32, num_warps=8, num_stages=2)),
    ],
    hopper=_ROUTER_HOPPER,
    blackwell=_ROUTER_HOPPER,
    large=_ROUTER_HOPPER,
    small=_ROUTER,
    least=_ROUTER,
)
