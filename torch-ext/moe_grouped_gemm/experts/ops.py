"""The layer as three torch ops, with fakes and FLOPs. Here, and only here, its inputs are a flat list."""

from __future__ import annotations

import math

import torch

from .. import reference
from ..reference import Gate
from ..torch_ops import differentiable, needs_op, register_autograd, register_op
from ..weights import Projection, are_adapted, matrix_size
from .backward import Differentiable, backward
from .forward import forward as forward_on_gpu
from .forward import forward_and_save, is_empty
from .rows import padded_size


def _projection(name: str) -> str:
    return f"Tensor {name}_proj, " + ", ".join(f"Tensor? {name}_proj_{field}" for field in Projection._fields[1:])


PROJECTIONS = f"{_projection('gate_up')}, {_projection('down')}"
_WEIGHTS = f"Tensor top_k_weights, {PROJECTIONS}"
_INPUTS = f"Tensor hidden_states, Tensor top_k_index, {_WEIGHTS}"
GATE = "str activation, float? limit, float alpha, bool interleaved"
_TENSORS = 3 + 2 * len(Projection._fields)


# --- moe_experts ------------------------------------------------------------------------------------------------------


def forward_on_cpu(
    hidden_states, top_k_index, top_k_weights, gate_up, down, gate, quantize_activations, shared=None, ranks=1
):
    """As forward.py's, but that activations are never quantised; differentiable, but for weights in codes."""
    inputs = (hidden_states, top_k_index, top_k_weights, gate_up.weight, down.weight)
    options = (gate[0], gate_up.bias, down.bias, *gate[1:], gate_up.scale, down.scale)
    return reference.moe_experts(*inputs, *options, shared)


def _by_device(on_cpu, on_gpu):
    """Tensors on meta come to the fakes."""

    def implementation(first, *args):
        return (on_cpu if first.device.type == "cpu" else on_gpu)(first, *args)

    return implementation


def _forward(hidden_states, top_k_index, *args):
    _, *inputs = Differentiable.of((None, *args[:11]))
    forward = forward_on_cpu if hidden_states.device.type == "cpu" else forward_on_gpu
    return forward(hidden_states, top_k_index, *inputs, Gate(*args[11:15]), *args[15:])


def _forward_flops(*args, **_):
    """Of shapes: two for each product of each slot, skipped or not, which only the device knows."""
    _, _, gate_up, down = Differentiable.of((args[0], *args[2:_TENSORS]))
    return 2 * math.prod(args[1]) * sum(_weight_size(p) + _size(p.A) + _size(p.B) for p in (gate_up, down))


def _size(factor) -> int:
    """Of an expert's part, given the shape of all; of None, nothing."""
    return 0 if factor is None else math.prod(factor[1:])


def _weight_size(projection) -> int:
    return matrix_size(projection.weight, projection.scale)


moe_experts = register_op(
    "moe_experts",
    f"({_INPUTS}, {GATE}, bool quantize_activations) -> Tensor",
    _forward,
    fake=lambda hidden_states, *_: torch.empty_like(hidden_states, memory_format=torch.contiguous_format),
    flops=_forward_flops,
)

# --- moe_experts_training: also what the backward reads ---------------------------------------------------------------


def _training_on_cpu(hidden_states, top_k_index, *args):
    inputs, gate = Differentiable.of((hidden_states, *args[:11])), Gate(*args[11:])
    out, z, *routing = reference.moe_experts_training(hidden_states, top_k_index, *inputs[1:], gate)
    return out, z, out.new_empty(0), out.new_empty(0), *routing


def _training_on_gpu(hidden_states, top_k_index, *args):
    inputs, gate = Differentiable.of((hidden_states, *args[:11])), Gate(*args[11:])
    if is_empty(hidden_states, inputs.top_k_weights, inputs.down):
        return tuple(t.zero_() for t in _training_fake(hidden_states, top_k_index, *args))
    out, z, u1, u2, rows = forward_and_save(hidden_states, top_k_index, *inputs[1:], gate)
    u1, u2 = (out.new_empty(0) if u is None else u for u in (u1, u2))
    return out, z, u1, u2, *rows[:3]


def _training_fake(hidden_states, top_k_index, *args):
    _, _, gate_up, down = Differentiable.of((hidden_states, *args[:11]))
    (experts, N, _), slots = gate_up.weight.shape, top_k_index.numel()
    rows = padded_size(slots, experts) if are_adapted(gate_up, down) else slots
    out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    u1, u2 = (out.new_empty(0) if p.A is None else out.new_empty(rows, p.A.shape[1]) for p in (gate_up, down))
    routing = (top_k_index.new_empty(n, dtype=torch.int32) for n in (experts + 1, rows, slots))
    return out, out.new_empty(rows, N), u1, u2, *routing


_training = _by_device(_training_on_cpu, _training_on_gpu)
moe_experts_training = register_op(
    "moe_experts_training",
    f"({_INPUTS}, {GATE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _training,
    fake=_training_fake,
    flops=_forward_flops,
)

# --- moe_experts_backward ---------------------------------------------------------------------------------------------


def _backward_args(args):
    """Inputs, what the forward saved, what needs gradients, and the gate."""
    return Differentiable.of(args[:12]), args[12:18], Differentiable.of(args[18]), Gate(*args[19:])


def _backward_on_gpu(dout, *args):
    inputs, (z, u1, u2, *routing), needs, gate = _backward_args(args)
    if is_empty(dout, inputs.top_k_weights, inputs.down):
        return tuple(t.zero_() for t in _backward_fake(dout, *args))
    return _without_none(dout, backward(dout, inputs, z, u1, u2, routing, needs, gate))


def _backward_on_cpu(dout, *args):
    """Adapters on a CPU are composed.py's."""
    inputs, (z, _, _, offsets, slots, _), needs, gate = _backward_args(args)
    return _without_none(dout, reference.moe_experts_backward(dout, *inputs, z, offsets, slots, needs, gate))


def _without_none(dout, grads):
    return tuple(dout.new_empty(0) if grad is None else grad for grad in Differentiable(*grads).flat())


def _backward_fake(dout, *args):
    """Of each input's size, in the order of a weight's own memory; of size 0 where no gradient is needed."""
    inputs, _, needs, _ = _backward_args(args)
    like = inputs._replace(hidden_states=dout)
    return tuple(_empty(t) if needed else dout.new_empty(0) for t, needed in zip(like.flat(), needs.flat()))


def _empty(t):
    return reference.empty_gradient(t) if t.ndim == 3 else t.new_empty(t.shape)


def _backward_flops(dout, *args, **_):
    inputs, _, needs, _ = _backward_args(args)
    (gate_up, A1, B1), (down, A2, B2) = (
        (_weight_size(p), _size(p.A), _size(p.B)) for p in (inputs.gate_up, inputs.down)
    )
    products = down + B2 + A2  # b and v2
    products += needs.down.weight * down + needs.down.A * A2 + needs.down.B * B2
    products += needs.hidden_states * (gate_up + A1) + (needs.hidden_states or needs.gate_up.A) * B1
    products += needs.gate_up.weight * gate_up + needs.gate_up.A * A1 + needs.gate_up.B * B1
    return 2 * math.prod(inputs.top_k_weights) * products


_backward = _by_device(_backward_on_cpu, _backward_on_gpu)
moe_experts_backward = register_op(
    "moe_experts_backward",
    f"(Tensor dout, Tensor? hidden_states, {_WEIGHTS}, Tensor z, Tensor u1, Tensor u2, Tensor expert_offsets,"
    f" Tensor sorted_slots, Tensor slot_positions, bool[] needs_grad, {GATE}) -> ({', '.join(['Tensor'] * 12)})",
    _backward,
    fake=_backward_fake,
    flops=_backward_flops,
)


# --- the gradient of moe_experts_training -----------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    hidden_states, _, *others = inputs[:_TENSORS]
    needs_x, _, *needs_others = ctx.needs_input_grad[:_TENSORS]
    ctx.needs = [needs_x, *needs_others]
    ctx.gate = inputs[_TENSORS:]
    needs = Differentiable.of(ctx.needs)
    is_read = needs.gate_up.weight or needs.gate_up.A
    ctx.save_for_backward(hidden_states if is_read else None, *others, *output[1:])


def _training_backward(ctx, dout, *_):
    args = (dout, *ctx.saved_tensors, ctx.needs, *ctx.gate)
    # Of second derivatives the op says that there are none.
    as_op = torch.is_grad_enabled() or needs_op(moe_experts_backward, args[:19])
    grads = (moe_experts_backward if as_op else _backward)(*args)
    dx, *others = (grad if needed else None for grad, needed in zip(grads, ctx.needs))
    return dx, None, *others, *(None for _ in ctx.gate)


register_autograd(moe_experts_training, _training_backward, _setup_context)
# For whom nobody looks on: autograd without the dispatch of two ops, 0.2 ms and more.
training = differentiable("moe_experts_training", _training, _training_backward, _setup_context)
