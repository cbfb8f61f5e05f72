"""Mixture-of-Experts layers for Transformers as grouped GEMMs in Triton.

Everything in `__all__` is the public API of this kernel version.
"""

from . import layers, reference
from .functional import grouped_gemm, moe_experts, route
from .integration.status import status
from .layers import fp4_config, register
from .router import topk_router
from .routing import Routing
from .tuner import tune
from .weights.quantize_fp4 import quantize_fp4
from .weights.quantize_fp8 import quantize_fp8

__all__ = [
    "Routing",
    "fp4_config",
    "grouped_gemm",
    "layers",
    "moe_experts",
    "quantize_fp4",
    "quantize_fp8",
    "reference",
    "register",
    "route",
    "status",
    "topk_router",
    "tune",
]
