"""Registration of custom ops, so that `torch.compile` sees one opaque, differentiable node per layer call."""

from __future__ import annotations

from typing import Callable

import torch

from ._ops import add_op_namespace_prefix


def register_op(name: str, schema: str, impl: Callable, fake: Callable):
    """Register `impl` as the op `name` of this kernel's own namespace; returns the callable op.

    Args:
        schema: the op's signature without a name; ops neither mutate nor return their inputs.
        fake: same arguments, returns empty tensors of the result's shapes.
    """
    op = torch.library.custom_op(add_op_namespace_prefix(name), impl, mutates_args=(), schema=schema)
    op.register_fake(fake)
    return op
