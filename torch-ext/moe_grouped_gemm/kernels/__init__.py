"""Triton device code and launchers, one file per stage."""

from .backward import down_dgrad, gate_up_dgrad, wgrad
from .combine import combine
from .decode import down_decode, gate_up_decode
from .decode_fp8 import down_decode_fp8, gate_up_decode_fp8
from .fp8 import gate_up_fp8, grouped_gemm_fp8, quantize_rows, scale_shift
from .grouped_gemm import gate_up, grouped_gemm
from .router import router_logits, router_topk
from .routing import route, tile_schedule

__all__ = [
    "combine",
    "down_decode",
    "down_decode_fp8",
    "down_dgrad",
    "gate_up",
    "gate_up_decode",
    "gate_up_decode_fp8",
    "gate_up_dgrad",
    "gate_up_fp8",
    "grouped_gemm",
    "grouped_gemm_fp8",
    "quantize_rows",
    "route",
    "router_logits",
    "router_topk",
    "scale_shift",
    "tile_schedule",
    "wgrad",
]
