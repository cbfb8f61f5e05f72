"""What Transformers' expert parallelism tells of a rank's part in the work."""

from __future__ import annotations

from torch import nn

_TOTALS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")  # names in configs


def ranks_of(module: nn.Module, top_k: int) -> int:
    """Of how many ranks all slots come to this experts module, which owns the experts of one; 1 if that is not known.

    Where tokens are sent to their experts' owner instead, a row has one slot, and all of them are its own. So a model
    that chooses one expert for a token counts as one of these.
    """
    local = getattr(module, "num_experts", None)
    if top_k == 1 or not local or not getattr(module, "_is_expert_parallel", False):
        return 1
    totals = [getattr(getattr(module, "config", None), name, None) for name in _TOTALS]
    shares = {total / local for total in totals if isinstance(total, int)}
    ranks = shares.pop() if len(shares) == 1 else 1
    return int(ranks) if ranks >= 1 and ranks == int(ranks) else 1
