"""Triton device code and launchers, one file per stage."""

from .backward import gather, glu_backward, row_sums, wgrad
from .combine import combine, zero_skipped
from .decode import down_decode, gate_up_decode
from .grouped_gemm import gate_up, grouped_gemm
from .grouped_gemm_hopper import can_specialize
from .lora import glu, scale_rows
from .router import router_logits, router_topk
from .routing import pad, route, tile_schedule

__all__ = [
    "can_specialize",
    "combine",
    "down_decode",
    "gate_up",
    "gate_up_decode",
    "gather",
    "glu",
    "glu_backward",
    "grouped_gemm",
    "pad",
    "route",
    "router_logits",
    "router_topk",
    "row_sums",
    "scale_rows",
    "tile_schedule",
    "wgrad",
    "zero_skipped",
]
