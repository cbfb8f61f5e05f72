"""`moe_experts` with gradients, as two ops: a forward that also returns what the backward needs, and that."""

from __future__ import annotations

import math

import torch

from . import gpu, reference, tuning
from .reference import Gate, is_transposed
from .routing import route_fake, route_torch
from .torch_ops import register_autograd, register_op

INPUTS = (
    "Tensor hidden_states, Tensor top_k_index, Tensor top_k_weights, Tensor gate_up_proj, Tensor down_proj,"
    " Tensor? gate_up_proj_bias, Tensor? down_proj_bias"
)
GATE = "str activation, float? limit, float alpha, bool interleaved"


def _training_gpu(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, up_bias, down_bias, *gate):
    """As `_experts_gpu` for many slots; also z (S, 2I) before the gate, and the routing."""
    experts, rows, _ = gate_up_proj.shape
    z = hidden_states.new_empty(top_k_index.numel(), rows)
    if z.numel() == 0 or hidden_states.numel() == 0:
        return hidden_states.new_zeros(hidden_states.shape), z, *route_torch(top_k_index, experts)
    kernels = gpu.launchers()
    gate, up_bias, down_bias = Gate(*gate), gpu.contiguous(up_bias), gpu.contiguous(down_bias)
    with torch.cuda.device_of(hidden_states):
        if hidden_states.stride(1) != 1:
            hidden_states = hidden_states.contiguous()
        precision = gpu.input_precision(z.dtype)
        up_config, down_config = gpu.config(z.shape[0], down_proj)
        *routing, schedule = kernels.route(top_k_index.contiguous(), experts, up_config.BLOCK_M)
        _, sorted_slots, slot_positions = routing
        up_config = gpu.as_readable_gate(up_config, gate_up_proj, gate)
        inputs = (hidden_states, gate_up_proj, sorted_slots, schedule, top_k_index.shape[1])
        a = kernels.gate_up(*inputs, gate, precision, up_config, z, up_bias)
        order = (sorted_slots, slot_positions, schedule)
        out = gpu.down_and_combine(a, down_proj, down_bias, *order, top_k_weights.contiguous(), precision, down_config)
        return out, z, *routing


def _training_forward(hidden_states, *args):
    forward = reference.moe_experts_training if hidden_states.device.type == "cpu" else _training_gpu
    return forward(hidden_states, *args)


def training_fake(hidden_states, top_k_index, top_k_weights, gate_up_proj, *_):
    out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    z = hidden_states.new_empty(top_k_index.numel(), gate_up_proj.shape[1])
    return out, z, *route_fake(top_k_index, gate_up_proj.shape[0])


def experts_flops(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, *_, **__):
    """Of shapes: two for each product of each slot, skipped or not, which only the device knows."""
    return 2 * math.prod(top_k_index) * (math.prod(gate_up_proj[1:]) + math.prod(down_proj[1:]))


training_op = register_op(
    "moe_experts_training",
    f"({INPUTS}, {GATE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _training_forward,
    fake=training_fake,
    flops=experts_flops,
)


def _backward_gpu(
    dout,
    hidden_states,
    top_k_weights,
    gate_up_proj,
    down_proj,
    up_bias,
    down_bias,
    z,
    offsets,
    slots,
    positions,
    needs_grad,
    *gate,
):
    """Gradients by kernels, as in kernels/backward.py; of what is (rows, H) there is one at a time."""
    inputs = (hidden_states, top_k_weights, gate_up_proj, down_proj, up_bias, down_bias)
    if z.numel() == 0 or hidden_states.numel() == 0:
        return tuple(t.zero_() for t in empty_gradients(dout, inputs, needs_grad))
    needs_x, needs_weights, needs_gate_up, needs_down, needs_up_bias, needs_down_bias = needs_grad
    dx, dweights, dgate_up, ddown, dup_bias, ddown_bias = (dout.new_empty(0) for _ in inputs)
    kernels = gpu.launchers()
    with torch.cuda.device_of(dout):
        # What the kernels read row by row.
        dout, hidden_states = (t if t.stride(-1) == 1 else t.contiguous() for t in (dout, hidden_states))
        top_k_weights = top_k_weights.contiguous()
        precision = gpu.input_precision(z.dtype)
        experts, top_k = gate_up_proj.shape[0], top_k_weights.shape[1]
        gemm_config = gpu.config(z.shape[0], down_proj).down
        wgrad_config = tuning.wgrad_config(z.shape[0], experts, z.dtype, gpu.capability(dout.device.index))
        padded_offsets, padded_slots, padded_positions = kernels.pad(offsets, slots)
        schedule = kernels.tile_schedule(padded_offsets, padded_slots.numel(), gemm_config.BLOCK_M)

        rows = kernels.gather(dout, padded_slots, padded_offsets, top_k)
        b = gpu.launch_grouped_gemm(rows, down_proj.mT, schedule, precision, gemm_config)
        dz, weighted_a, dweights_of_slots = kernels.glu_backward(
            b, z, top_k_weights, padded_slots, positions, padded_offsets, Gate(*gate), needs_down
        )
        del b
        if needs_weights:
            if down_bias is not None:
                of_bias = dout_times_bias(dout, down_bias, offsets, positions)
                dweights_of_slots += torch.where(positions >= 0, of_bias, 0.0)
            dweights = dweights_of_slots.view(top_k_weights.shape).to(top_k_weights.dtype)
        if needs_down:
            ddown = gpu.launch_wgrad(
                rows, weighted_a, padded_offsets, precision, wgrad_config, is_transposed(down_proj)
            )
        del rows, weighted_a
        if needs_down_bias:
            ddown_bias = kernels.row_sums(dout, slots, offsets, top_k_weights)
        if needs_up_bias:
            dup_bias = kernels.row_sums(dz, padded_slots, padded_offsets)
        if needs_gate_up:
            rows = kernels.gather(hidden_states, padded_slots, padded_offsets, top_k)
            transposed = is_transposed(gate_up_proj)
            dgate_up = gpu.launch_wgrad(dz, rows, padded_offsets, precision, wgrad_config, transposed)
            del rows
        if needs_x:
            rows = gpu.launch_grouped_gemm(dz, gate_up_proj.mT, schedule, precision, gemm_config)
            dx = kernels.combine(rows, padded_positions, torch.ones_like(top_k_weights, dtype=torch.float32))
    return dx, dweights, dgate_up, ddown, dup_bias, ddown_bias


def dout_times_bias(dout, down_bias, offsets, positions):
    """<dout[t], down_bias[e]> of each slot, in fp32: what the bias adds to the gradient of its weight."""
    products = dout.float() @ down_bias.float().T
    slots = torch.arange(positions.shape[0], device=dout.device)
    experts = torch.searchsorted(offsets[1:], positions, right=True, out_int32=True)
    return products[slots // (positions.shape[0] // dout.shape[0]), experts]


def _backward_impl(dout, *args):
    backward = reference.moe_experts_backward if dout.device.type == "cpu" else _backward_gpu
    return backward(dout, *args)


def empty_gradients(dout, inputs, needs_grad):
    """Uninitialised, of (hidden_states, top_k_weights, gate_up_proj, down_proj, others or None); size 0 if unneeded."""
    x, top_k_weights, gate_up_proj, down_proj, *others = inputs
    empty = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, top_k_weights)]
    empty += [reference.empty_gradient(weight) for weight in (gate_up_proj, down_proj)]
    empty += [None if t is None else t.new_empty(t.shape) for t in others]
    return tuple(t if needed else dout.new_empty(0) for t, needed in zip(empty, needs_grad))


def _backward_flops(dout, hidden_states, top_k_weights, gate_up_proj, down_proj, *args, **_):
    needs_x, _, needs_gate_up, needs_down, *_ = args[6]
    gate_up, down = (2 * math.prod(top_k_weights) * math.prod(weight[1:]) for weight in (gate_up_proj, down_proj))
    return gate_up * (needs_x + needs_gate_up) + down * (1 + needs_down)


_backward_op = register_op(
    "moe_experts_backward",
    "(Tensor dout, Tensor hidden_states, Tensor top_k_weights, Tensor gate_up_proj, Tensor down_proj,"
    " Tensor? gate_up_proj_bias, Tensor? down_proj_bias, Tensor z, Tensor expert_offsets, Tensor sorted_slots,"
    f" Tensor slot_positions, bool[] needs_grad, {GATE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    fake=lambda dout, *args: empty_gradients(dout, args[:6], args[10]),
    flops=_backward_flops,
)


def register_backward(forward_op, backward_op, tensors: int) -> None:
    """The gradients of `forward_op` are what `backward_op` returns.

    Of the forward's first `tensors` inputs the second, the ids, has none and is not saved; those after them describe
    the gate. The backward takes dout, the saved inputs, the forward's outputs but the first, needs_grad, and the gate.
    """

    def setup_context(ctx, inputs, output):
        hidden_states, _, *others = inputs[:tensors]
        ctx.gate = inputs[tensors:]
        ctx.save_for_backward(hidden_states, *others, *output[1:])

    def backward(ctx, dout, *_):
        needs_x, _, *needs_others = ctx.needs_input_grad[:tensors]
        needs_grad = [needs_x, *needs_others]
        grads = backward_op(dout, *ctx.saved_tensors, needs_grad, *ctx.gate)
        dx, *others = (grad if needed else None for grad, needed in zip(grads, needs_grad))
        return dx, None, *others, *(None for _ in ctx.gate)

    register_autograd(forward_op, backward, setup_context)


register_backward(training_op, _backward_op, tensors=7)
