"""Triton device code and launchers, one file per stage."""

from .backward import down_dgrad, gate_up_dgrad, row_sums, wgrad
from .combine import combine
from .decode import down_decode, gate_up_decode
from .grouped_gemm import gate_up, grouped_gemm
from .router import router_logits, router_topk
from .routing import route, tile_schedule

__all__ = [
    "combine",
    "down_decode",
    "down_dgrad",
    "gate_up",
    "gate_up_decode",
    "gate_up_dgrad",
    "grouped_gemm",
    "route",
    "router_logits",
    "router_topk",
    "row_sums",
    "tile_schedule",
    "wgrad",
]
