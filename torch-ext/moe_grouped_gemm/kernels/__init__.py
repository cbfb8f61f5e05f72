"""Triton device code and launchers, one file per stage."""

from .backward import down_dgrad, gate_up_dgrad, wgrad
from .combine import combine, zero_skipped
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
    "tile_schedule",
    "wgrad",
    "zero_skipped",
]
