"""Triton device code and launchers, one file per stage."""

from .backward import gather, row_sums, scale_rows, wgrad
from .codes_hopper import codes_gemm_hopper
from .combine import combine, zero_skipped, zero_tail
from .decode import down_decode, gate_up_decode
from .decode_fp4 import down_decode_fp4, gate_up_decode_fp4
from .decode_fp8 import down_decode_fp8, gate_up_decode_fp8
from .dgrad_fp8 import dgrad_fp8
from .fp4 import dgrad_fp4, grouped_gemm_fp4
from .fp4_hopper import grouped_gemm_fp4_hopper
from .fp4_registers import grouped_gemm_fp4_few
from .fp8 import gate_up_fp8, grouped_gemm_fp8
from .fp8_hopper import gate_up_fp8_hopper, grouped_gemm_fp8_hopper
from .gate import glu, glu_backward
from .gate_up import gate_up
from .gate_up_hopper import can_specialize_gate_up
from .grouped_gemm import grouped_gemm
from .grouped_gemm_hopper import can_specialize
from .quantize import quantize_rows, quantize_slots, scale_shift
from .replay import Replays
from .router import router_logits, router_topk
from .routing import pad, route, tile_schedule
from .shared import MOST_TOKENS as MOST_SHARED_TOKENS
from .shared import shared_experts
