"""How the layer meets torch: as ops, for whoever has to see a call as one node; autograd; torch.func; autocast."""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import Callable

import torch
from torch import library
from torch._C import (
    DispatchKey,
    _dispatch_tls_is_dispatch_key_included,
    _get_tracing_state,
    _len_torch_dispatch_stack,
)
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

from ._ops import add_op_namespace_prefix
from .checks import FLOATS, device_type

# OpOverloadPacket -> its formula, as torch.utils.flop_counter wants it.
_FLOPS: dict = {}
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, type(None)})


def register_op(name: str, schema: str, impl: Callable, fake: Callable, flops: Callable | None = None):
    """Register `impl` as the op `name` of this kernel's own namespace; returns the callable op.

    Until `register_autograd`, differentiating it is an error: there second derivatives end. Inside, autocast is off: an
    op computes in the dtypes that it is given, also in a backward that runs under autocast.

    Args:
        schema: the op's signature without a name, a tensor first; ops neither mutate nor return their inputs.
        fake: same arguments, returns empty tensors of the result's shapes.
        flops: same arguments with shapes for tensors, returns what FlopCounterMode counts; None if that is nothing.
    """

    def in_given_dtypes(tensor, *args):
        with without_autocast(tensor):
            return impl(tensor, *args)

    op = library.custom_op(add_op_namespace_prefix(name), in_given_dtypes, mutates_args=(), schema=schema)
    op.register_fake(fake)
    if flops is not None:
        _FLOPS[op._opoverload.overloadpacket] = flops
        _tell_flop_counters()

    def backward(ctx, *grads):
        raise NotImplementedError(
            f"moe_grouped_gemm: {name} cannot be differentiated; second derivatives are not supported"
        )

    register_autograd(op, backward)
    return op


def register_autograd(op, backward: Callable, setup_context: Callable | None = None) -> None:
    """As the op's own, but undefined gradients of outputs are None; if all are, no input gets one, as torch has it.

    Zeros in their place would be of the size of the outputs, also of those that only the backward reads.
    """
    setup = functools.partial(_setup, setup_context)
    op.register_autograd(functools.partial(_backward_if_defined, backward), setup_context=setup)


def differentiable(name: str, impl: Callable, backward: Callable, setup_context: Callable) -> Callable:
    """The first output of `impl`, with this gradient: the same as an op, for calls that `needs_op` says no to.

    All outputs go through autograd, as an op's: a saved one leads back to the inputs, so that second derivatives meet
    the error of the backward's op.
    """

    def forward(ctx, tensor, *args):
        with without_autocast(tensor):
            output = impl(tensor, *args)
        _setup(setup_context, ctx, (tensor, *args), output)
        return output

    function = type(
        name,
        (torch.autograd.Function,),
        {
            "forward": staticmethod(forward),
            "backward": staticmethod(functools.partial(_backward_if_defined, backward)),
        },
    )
    return lambda *args: function.apply(*args)[0]


def _setup(setup_context, ctx, inputs, output):
    ctx.set_materialize_grads(False)
    if setup_context is not None:
        setup_context(ctx, inputs, output)


def _backward_if_defined(backward, ctx, *grads):
    """In the dtypes that it is given, whatever autocast is on around it."""
    grad = next((grad for grad in grads if grad is not None), None)
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    with without_autocast(grad):
        return backward(ctx, *grads)


def needs_op(op, tensors) -> bool:
    """Whether a call with these first arguments of `op` has to be one; elsewhere inference does without its dispatch.

    Where somebody looks on who has to see one node: torch.compile, export, jit.trace, a dispatch mode (make_fx,
    FakeTensorMode, FlopCounterMode, ...). And where a tensor's memory is not for us to read: on meta, or of a subclass,
    which may have none, or take the op apart itself.
    """
    if torch.compiler.is_compiling():
        return True
    if not _PLAIN.issuperset(map(type, tensors)):
        refuse_dtensors_for(op, tensors)
        return True
    if _len_torch_dispatch_stack() or _dispatch_tls_is_dispatch_key_included(DispatchKey.PreDispatch):
        _tell_flop_counters()
        return True
    return _get_tracing_state() is not None or tensors[0].is_meta


def is_traced() -> bool:
    """By torch.jit.trace."""
    return _get_tracing_state() is not None


def needs_gradients(tensors) -> bool:
    """Whether gradients of a call with these may be asked for.

    jit.trace runs a function again without gradients, and refuses it if that makes another graph: grad mode says
    nothing there.
    """
    if not torch.is_grad_enabled() and _get_tracing_state() is None:
        return False
    return any(x is not None and x.requires_grad for x in tensors)


def refuse_dtensors_for(op, tensors) -> None:
    """The same for the first arguments of `op`. torch.compile cannot read a schema: only who refuses does."""
    refuse_dtensors(())
    for position, x in enumerate(tensors):
        if type(x) not in _PLAIN:
            refuse_dtensors([(op._opoverload._schema.arguments[position].name, x)])


def refuse_dtensors(named_tensors) -> None:
    """torch would say that our ops have no sharding strategy. A counter of FLOPs that came after us is told, too."""
    if not torch.compiler.is_compiling() and _len_torch_dispatch_stack():
        _tell_flop_counters()
    for name, x in named_tensors:
        if type(x) not in _PLAIN and hasattr(x, "to_local"):
            raise TypeError(
                f"{name}: expected a plain tensor, got a {type(x).__name__}; pass its local one, x.to_local()"
            )


def _tell_flop_counters() -> None:
    """Give our formulas to torch.utils.flop_counter, if it is there: importing it imports Triton.

    It may have been imported, and a counter been made, after us: those on duty are told as well.
    """
    flop_counter = sys.modules.get("torch.utils.flop_counter")
    if flop_counter is None:
        return
    registries = [flop_counter.flop_registry]
    for mode in _python_dispatch._get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, flop_counter.FlopCounterMode):
            registries.append(counter.flop_registry)
    for op, formula in _FLOPS.items():
        formula = flop_counter.shape_wrapper(formula)
        for registry in registries:
            registry.setdefault(op, formula)


def are_transforms_active() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def rejects_transforms(function: Callable) -> Callable:
    """Decorates a public function: an error where torch.func or forward-mode AD would fail obscurely or lose tangents.

    On the CPU as well, where some transforms would see through the plain torch: what works there works on a GPU.
    """

    @functools.wraps(function)
    def checked(*args, **kwargs):
        if are_transforms_active():
            raise NotImplementedError(
                f"{function.__name__}: torch.func transforms (grad, vmap, jvp, ...) and forward-mode AD are not "
                "supported; take gradients with backward() or torch.autograd.grad"
            )
        return function(*args, **kwargs)

    return checked


def autocast(hidden_states, *weights):
    """The operands of the GEMMs in the dtype that `torch.autocast` asks for, if it is on.

    As torch does, but for what is not to be cast silently: fp64 stays, and so does what no GEMM here takes.
    """
    if not is_autocast(hidden_states):
        return hidden_states, *weights
    dtype = torch.get_autocast_dtype(hidden_states.device.type)
    return tuple(x.to(dtype) if x is not None and x.dtype in FLOATS["cuda"] else x for x in (hidden_states, *weights))


def is_autocast(hidden_states: torch.Tensor) -> bool:
    if not (torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")):
        return False  # as nearly always; to ask a tensor for its device takes longer
    device = device_type("hidden_states", hidden_states)
    return device != "meta" and torch.is_autocast_enabled(device)


def without_autocast(x: torch.Tensor):
    """A context in which autocast is off for what is computed from x; on meta it never is on."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
