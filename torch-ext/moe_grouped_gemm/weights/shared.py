"""What shared experts add to the routed ones, where no launch of the routed ones computes it."""

from __future__ import annotations

from .. import gpu


def addend_of(x, shared, gate):
    """(T, H) on a GPU -> (T, H), for a few tokens by two launches of ours, else by torch; None, if there are none."""
    if shared is None:
        return None
    kernels = gpu.launchers()
    if x.shape[0] <= kernels.MOST_SHARED_TOKENS and x.element_size() == 2:
        return kernels.shared_experts(x, shared, gate)
    return shared.of(x, gate)
