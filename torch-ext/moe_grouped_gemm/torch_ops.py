"""How the layer meets torch: `torch.compile`, for which a call is one opaque node, torch.func, and autocast."""

from __future__ import annotations

import functools
from typing import Callable

import torch
from torch import library
from torch.autograd import forward_ad

from ._ops import add_op_namespace_prefix
from .checks import device_type


def register_op(name: str, schema: str, impl: Callable, fake: Callable):
    """Register `impl` as the op `name` of this kernel's own namespace; returns the callable op.

    Until the op's own `register_autograd`, differentiating it is an error: there second derivatives end. Inside,
    autocast is off: an op computes in the dtypes that it is given, also in a backward that runs under autocast.

    Args:
        schema: the op's signature without a name, a tensor first; ops neither mutate nor return their inputs.
        fake: same arguments, returns empty tensors of the result's shapes.
    """

    def without_autocast(tensor, *args):
        with torch.autocast(tensor.device.type, enabled=False):
            return impl(tensor, *args)

    op = library.custom_op(add_op_namespace_prefix(name), without_autocast, mutates_args=(), schema=schema)
    op.register_fake(fake)

    def backward(ctx, *grads):
        raise NotImplementedError(
            f"moe_grouped_gemm: {name} cannot be differentiated; second derivatives are not supported"
        )

    op.register_autograd(backward)
    return op


def rejects_transforms(function: Callable) -> Callable:
    """Decorates a public function: an error where torch.func or forward-mode AD would fail obscurely or lose tangents.

    On the CPU as well, where some transforms would see through the plain torch: what works there works on a GPU.
    """

    @functools.wraps(function)
    def checked(*args, **kwargs):
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            raise NotImplementedError(
                f"{function.__name__}: torch.func transforms (grad, vmap, jvp, ...) and forward-mode AD are not "
                "supported; take gradients with backward() or torch.autograd.grad"
            )
        return function(*args, **kwargs)

    return checked


def autocast(hidden_states, *weights):
    """The operands of the GEMMs in the dtype that `torch.autocast` asks for, if it is on."""
    device = device_type("hidden_states", hidden_states)
    if not torch.is_autocast_enabled(device):
        return hidden_states, *weights
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x is None else x.to(dtype) for x in (hidden_states, *weights))
