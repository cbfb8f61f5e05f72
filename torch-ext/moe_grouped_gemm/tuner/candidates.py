"""What is tried: for a layer the numbers of tokens, for each the kernels and their configurations.

A candidate is (kernel, configuration); the kernels of a layer call are "route", "gate_up" and "down".
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch

from .. import tuning
from ..launch_configs import GemmConfig, Traits, fault_of, fits_specialized_gate_up, specialized_tile

MOST_ROWS = 131072


class Layer(NamedTuple):
    """The sizes of an experts layer, and the dtype of its weights."""

    experts: int
    hidden_dim: int
    inter: int
    top_k: int
    dtype: torch.dtype


class Tile(NamedTuple):
    """What the kernels of one layer call share; of "route", which is the same for every MIN_M, the configuration."""

    BLOCK_M: int
    MIN_M: int


KERNELS = ("route", "gate_up", "down")
TILES = [Tile(16, 16), Tile(32, 16), Tile(64, 32), Tile(64, 64), Tile(128, 64), Tile(128, 128)]
WEIGHT_ROWS = (128, 256)  # that a tile reads at a time: of gate_up gate and up
# BLOCK_K and num_stages. An MMA that reads shared memory by itself takes long steps.
ASYNC_MMA = ((64, 128), (3, 4, 5))
OTHER_MMA = ((32, 64), (2, 3, 4))


def candidates(layer: Layer, tokens: int, traits: Traits) -> list[tuple]:
    """20 or so for few rows an expert, some 130 where several tile heights compete; the heuristics' own come last."""
    rows_per_expert = tokens * layer.top_k / layer.experts
    block_ks, stages = ASYNC_MMA if traits.mma in ("wgmma", "tcgen05") else OTHER_MMA
    found = []
    # A tile should hold the rows of nearly every expert: more than their average.
    tiles = [t for t in TILES if min(rows_per_expert, 127) < t.BLOCK_M <= max(16, 6 * rows_per_expert)]
    for block_m, min_m in tiles:
        found.append(("route", Tile(block_m, min_m)))
        # With fewer row tiles an expert, all are in one group.
        groups = (4, 8, 16) if rows_per_expert > 4 * block_m else (8,)
        for n, k, num_stages, warps, group in product(WEIGHT_ROWS, block_ks, stages, (4, 8), groups):
            accumulators = block_m * n // (traits.warp_size * warps)  # registers of a thread
            if not (16 if warps == 4 else 32) * 32 // traits.warp_size <= accumulators <= 128:
                continue
            for kernel, block_n in (("gate_up", n // 2), ("down", n)):
                config = GemmConfig(block_m, min_m, block_n, k, group, warps, num_stages, USE_TMA=traits.has_tma)
                found.append((kernel, config))
        for group in groups:
            for kernel, num_stages in (("gate_up", 4), ("down", 3), ("down", 4)):
                tile = {**specialized_tile(kernel), "BLOCK_M": block_m, "MIN_M": min_m}
                specialized = {"USE_TMA": True, "WARP_SPECIALIZED": True}
                config = GemmConfig(**tile, GROUP_M=group, num_warps=8, num_stages=num_stages, **specialized)
                found.append((kernel, config))
    # What a tuned file may not say, and what cannot serve this layer, need not be tried.
    found = [c for c in found if c[0] == "route" or not fault_of(*c, layer.dtype, traits)]
    if not fits_specialized_gate_up(layer.hidden_dim, layer.inter):
        found = [c for c in found if c[0] != "gate_up" or not c[1].WARP_SPECIALIZED]
    return list(dict.fromkeys(found + heuristics(layer, tokens, traits)))


def heuristics(layer: Layer, tokens: int, traits: Traits) -> list[tuple]:
    """What runs without a tuned file, as candidates."""
    up, down = tuning.heuristic_config(tokens * layer.top_k, layer.experts, layer.dtype, traits)
    if not fits_specialized_gate_up(layer.hidden_dim, layer.inter):
        up = up._replace(WARP_SPECIALIZED=False)
    return [("route", Tile(up.BLOCK_M, up.MIN_M)), ("gate_up", up), ("down", down)]


def ladder(layer: Layer) -> list[int]:
    """Token counts, doubling, from where decoding ends to MOST_ROWS rows."""
    expert_bytes = 3 * layer.hidden_dim * layer.inter * layer.dtype.itemsize
    counts = [2**i for i in range(MOST_ROWS.bit_length()) if 2**i * layer.top_k <= MOST_ROWS]
    return [t for t in counts if not tuning.is_decode(t * layer.top_k, t, layer.experts, expert_bytes)]
