"""What the layer is made of, as ops: route, gather, grouped_gemm and its weight gradient, row_sums, combine."""

from __future__ import annotations

import torch

from .. import gpu, reference, tuning
from ..routing import route_torch
from ..torch_ops import register_autograd, register_op
from ..weights import Projection, format_of, matrix_size
from ..weights.layout import by_rows, is_transposed

# --- route ------------------------------------------------------------------------------------------------------------


def _route(top_k_index, num_experts):
    if top_k_index.device.type == "cpu" or top_k_index.numel() == 0:
        return route_torch(top_k_index, num_experts)
    with torch.cuda.device_of(top_k_index):
        return gpu.launchers().route(top_k_index.contiguous(), num_experts, block_m=128)[:3]


def _route_fake(top_k_index, num_experts):
    slots = top_k_index.numel()
    return tuple(top_k_index.new_empty(n, dtype=torch.int32) for n in (num_experts + 1, slots, slots))


route = register_op("route", "(Tensor top_k_index, int num_experts) -> (Tensor, Tensor, Tensor)", _route, _route_fake)

# --- grouped_gemm -----------------------------------------------------------------------------------------------------


def _grouped_gemm(x, weight, bias, scale, expert_offsets, transposed):
    """y[r] = W[e] @ x[r] + bias[e]; transposed: W[e]^T @ x[r]. The weight is read in place."""
    if x.device.type == "cpu":
        return reference.grouped_gemm(x, weight, expert_offsets, bias, scale, transposed)
    projection = Projection(weight, bias, scale)
    rows, columns = x.shape[0], projection.shape[2 if transposed else 1]
    if rows == 0 or columns == 0 or (x.shape[1] == 0 and bias is None):
        return x.new_zeros(rows, columns)
    return _grouped_gemm_on_gpu(x, projection, expert_offsets, transposed)


@gpu.on_its_device
def _grouped_gemm_on_gpu(x, projection, expert_offsets, transposed):
    kernels, weights, x = gpu.launchers(), format_of(projection), by_rows(x)
    config = weights.row_config(x.shape[0], projection.weight, x.dtype, transposed)
    schedule = kernels.tile_schedule(expert_offsets, x.shape[0], config.BLOCK_M)
    y = weights.row_gemm(x, projection, schedule, config, transposed)
    kernels.zero_tail(y, expert_offsets)
    return y


def _grouped_gemm_fake(x, weight, bias, scale, expert_offsets, transposed):
    return x.new_empty(x.shape[0], Projection(weight, bias, scale).shape[2 if transposed else 1])


grouped_gemm = register_op(
    "grouped_gemm",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor expert_offsets, bool transposed) -> Tensor",
    _grouped_gemm,
    _grouped_gemm_fake,
    flops=lambda x, weight, bias, scale, *_, **__: 2 * x[0] * matrix_size(weight, scale),
)


def _grouped_gemm_dw(dy, x, expert_offsets):
    if x.device.type == "cpu":
        return reference.grouped_gemm_dw(dy, x, expert_offsets)
    experts = expert_offsets.shape[0] - 1
    if x.numel() == 0 or dy.numel() == 0:
        return x.new_zeros(experts, dy.shape[1], x.shape[1])
    with torch.cuda.device_of(x):
        config = tuning.wgrad_config(x.shape[0], experts, x.dtype, gpu.traits(x.device.index))
        config = config._replace(WARP_SPECIALIZED=False)  # these rows are not padded
        return gpu.launchers().wgrad(by_rows(dy), by_rows(x), expert_offsets, gpu.input_precision(x.dtype), config)


grouped_gemm_dw = register_op(
    "grouped_gemm_dw",
    "(Tensor dy, Tensor x, Tensor expert_offsets) -> Tensor",
    _grouped_gemm_dw,
    fake=lambda dy, x, expert_offsets: x.new_empty(expert_offsets.shape[0] - 1, dy.shape[1], x.shape[1]),
    flops=lambda dy, x, *_, **__: 2 * x[0] * dy[1] * x[1],
)


def _row_sums(y, expert_offsets):
    if y.device.type == "cpu" or y.numel() == 0:
        return reference.row_sums(y, expert_offsets)
    with torch.cuda.device_of(y):
        return gpu.launchers().row_sums(by_rows(y), expert_offsets, expert_offsets)


row_sums = register_op(
    "row_sums",
    "(Tensor y, Tensor expert_offsets) -> Tensor",
    _row_sums,
    fake=lambda y, expert_offsets: y.new_empty(expert_offsets.shape[0] - 1, y.shape[1]),
)


def _grouped_gemm_setup_context(ctx, inputs, output):
    x, weight, _, scale, expert_offsets, ctx.transposed = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, scale, expert_offsets)


def _grouped_gemm_backward(ctx, dy):
    x, weight, scale, expert_offsets = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    dx = grouped_gemm(dy, weight, None, scale, expert_offsets, not ctx.transposed) if needs_x else None
    dweight = None
    if needs_weight:
        p, q = (x, dy) if ctx.transposed else (dy, x)
        if is_transposed(weight):
            dweight = grouped_gemm_dw(q, p, expert_offsets).mT
        else:
            dweight = grouped_gemm_dw(p, q, expert_offsets)
    return dx, dweight, row_sums(dy, expert_offsets) if needs_bias else None, None, None, None


register_autograd(grouped_gemm, _grouped_gemm_backward, _grouped_gemm_setup_context)

# --- gather and combine -----------------------------------------------------------------------------------------------
# Autograd's own gradient of indexing adds rows one by one, in their dtype. But the inverse order is known: the gradient
# of a gather is a sum over a token's slots, in fp32 and in the order of k, and that of the sum is a gather.


def _gather(hidden_states, sorted_slots, slot_positions):
    return hidden_states[_tokens(sorted_slots, slot_positions)]


# (T, H) tokens -> (S, H) rows in expert order; rows that no expert owns hold anything.
gather = register_op(
    "gather",
    "(Tensor hidden_states, Tensor sorted_slots, Tensor slot_positions) -> Tensor",
    _gather,
    fake=lambda hidden_states, sorted_slots, _: hidden_states.new_empty(sorted_slots.shape[0], hidden_states.shape[1]),
)


def _gather_backward(ctx, dx):
    sorted_slots, slot_positions = ctx.saved_tensors
    weights = torch.ones_like(slot_positions, dtype=reference.acc_dtype(dx))
    return combine(dx, weights, sorted_slots, slot_positions), None, None


def _combine(y, top_k_weights, _, slot_positions):
    slot_positions = slot_positions.view(-1)
    if y.device.type == "cpu" or y.numel() == 0:
        return reference.combine(y, slot_positions, top_k_weights)
    with torch.cuda.device_of(y):
        return gpu.launchers().combine(y.contiguous(), slot_positions, top_k_weights.contiguous())


# (S, H) rows in expert order, (T, top_k) weights -> (T, H), each token the weighted sum of its rows.
combine = register_op(
    "combine",
    "(Tensor y, Tensor top_k_weights, Tensor sorted_slots, Tensor slot_positions) -> Tensor",
    _combine,
    fake=lambda y, top_k_weights, *_: y.new_empty(top_k_weights.shape[0], y.shape[1]),
)


def _combine_backward(ctx, dout):
    y, top_k_weights, sorted_slots, slot_positions = ctx.saved_tensors
    dy = dweights = None
    if ctx.needs_input_grad[0]:
        row_weights = top_k_weights.reshape(-1, 1)[sorted_slots]
        dy = (dout[_tokens(sorted_slots, slot_positions)] * row_weights.to(reference.acc_dtype(y))).to(y.dtype)
        # Rows that no expert owns: a norm's own gradient would take them in, and they may be NaN.
        dy = dy.masked_fill(slot_positions.view(-1, 1)[sorted_slots] < 0, 0)
    if ctx.needs_input_grad[1]:
        dweights = torch.zeros_like(top_k_weights)
        for k, positions in enumerate(slot_positions.unbind(1)):
            products = (dout.to(reference.acc_dtype(y)) * y[positions.clamp(min=0)]).sum(dim=1)
            dweights[:, k] = products.masked_fill(positions < 0, 0)
    return dy, dweights, None, None


register_autograd(gather, _gather_backward, lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:]))
register_autograd(combine, _combine_backward, lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def _tokens(sorted_slots, slot_positions):
    """The token of each row; top_k is 0 only where there are no slots."""
    return sorted_slots // max(slot_positions.shape[1], 1)
