"""The expert layer and the router in plain torch: the CPU path, and what tests and benchmarks compare with.

Everything here works in any float dtype (fp64 makes it an oracle), is deterministic on the CPU, and reads the number of
rows of each expert on the host. Weights in codes are dequantised, and activations stay as they are.
"""

from .experts import moe_experts, moe_experts_backward, moe_experts_training
from .gate import ACTIVATIONS, Gate, apply_gate, gate_backward
from .grouped import (
    acc_dtype,
    combine,
    empty_gradient,
    grouped_gemm,
    grouped_gemm_dw,
    is_transposed,
    row_sums,
    sort_slots,
)
from .router import (
    SCORES,
    RouterForm,
    rounded,
    router_choice,
    router_dtype,
    router_scores,
    router_weights,
    router_weights_backward,
    topk_router,
)
from .shared import SharedExperts, shared_experts
