"""The layer with low-rank adapters as two ops, forward and backward, that only launch kernels.

All adapters of a weight are one by now, `A` (E, R, K) and scaled `B` (E, N, R), R a multiple of 16; or None. With the
rows of expert e, t = token and p = weight of a row's slot, dout the gradient of the result:

    u1 = x[t] A1^T    z = x[t] W1^T + bias1 + u1 B1^T    a = act(gate) * up    [gate; up] = z
    u2 = a A2^T       y = a W2^T + bias2 + u2 B2^T       out[t] = sum of p * y
    v2 = dout[t] B2   b = dout[t] W2 + v2 A2             dp = <b, a> + <dout[t], bias2>
    dB2 = dout[t]^T (p u2)    dA2 = v2^T (p a)           dz: of p b through the gate
    v1 = dz B1        dx[t] = sum of dz W1 + v1 A1       dB1 = dz^T u1    dA1 = v1^T x[t]

Rows are in one order throughout, padded as `pad` of kernels/routing.py does. What a product sums over rows is zero in
padding rows on one side: gathered rows, a, and what the gate's backward makes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from . import gpu, training, tuning
from .reference import Gate, is_transposed
from .torch_ops import needs_gradients, needs_op, register_op

PAD = 64  # as in kernels/routing.py
RANK_MULTIPLE = 16  # of the joined factors: the least that a dot takes, and 16-byte rows


class _Pass(NamedTuple):
    """What the GEMMs of one pass have in common."""

    schedule: torch.Tensor
    precision: str
    config: tuning.GemmConfig
    capability: tuple[int, int]

    def product(self, x, weight, bias, first, second):
        """y (P, N) = x weight^T + bias + u second^T, and u (P, R) = x first^T; without factors u is None."""
        u = None if first is None else self.thin(x, first)
        low_rank = None if first is None else (u, second.contiguous())
        args = (x, weight, self.schedule, self.precision, self.config)
        return gpu.launch_grouped_gemm(*args, bias=bias, low_rank=low_rank), u

    def thin(self, x, factor):
        """x factor^T."""
        config = tuning.thin_config(self.config, factor.shape[1], x.dtype, self.capability)
        return gpu.launch_grouped_gemm(x, factor, self.schedule, self.precision, config)

    def thin_wgrad(self, p, q, padded_offsets):
        config = tuning.thin_wgrad_config(p.shape[1], q.shape[1], p.dtype, self.capability)
        return gpu.launchers().wgrad(p, q, padded_offsets, self.precision, config)


def _pass(rows, padded_offsets, down_proj):
    """rows: P. Every expert with rows has PAD at least, so tiles are chosen by P, not by S."""
    config = gpu.config(rows, down_proj).down
    schedule = gpu.launchers().tile_schedule(padded_offsets, rows, config.BLOCK_M)
    capability = gpu.capability(down_proj.device.index)
    return _Pass(schedule, gpu.input_precision(down_proj.dtype), config, capability)


def _padded_rows(slots: int, num_experts: int) -> int:
    return (slots // PAD + torch.sym_min(num_experts, slots)) * PAD


def _is_empty(hidden_states, top_k_weights, down_proj):
    return top_k_weights.numel() == 0 or hidden_states.numel() == 0 or down_proj.numel() == 0


def _empty_outputs(hidden_states, top_k_index, gate_up_proj, A1, A2):
    """Of the forward, with what it saves: out, z, u1, u2, padded offsets, slots and positions."""
    experts, slots = gate_up_proj.shape[0], top_k_index.numel()
    rows = _padded_rows(slots, experts)
    out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    u1, u2 = (out.new_empty(0) if A is None else out.new_empty(rows, A.shape[1]) for A in (A1, A2))
    routing = (top_k_index.new_empty(n, dtype=torch.int32) for n in (experts + 1, rows, slots))
    return out, out.new_empty(rows, gate_up_proj.shape[1]), u1, u2, *routing


def _forward_gpu(
    hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, up_bias, down_bias, A1, B1, A2, B2, *gate
):
    if _is_empty(hidden_states, top_k_weights, down_proj):
        outputs = _empty_outputs(hidden_states, top_k_index, gate_up_proj, A1, A2)
        return tuple(t.zero_() for t in outputs)
    kernels = gpu.launchers()
    with torch.cuda.device_of(hidden_states):
        if hidden_states.stride(1) != 1:
            hidden_states = hidden_states.contiguous()
        up_bias, down_bias = gpu.contiguous(up_bias), gpu.contiguous(down_bias)
        routing = kernels.route(top_k_index.contiguous(), gate_up_proj.shape[0], PAD)
        padded_offsets, padded_slots, padded_positions = kernels.pad(*routing[:2])
        gemms = _pass(padded_slots.numel(), padded_offsets, down_proj)
        x = kernels.gather(hidden_states, padded_slots, padded_offsets, top_k_index.shape[1])
        z, u1 = gemms.product(x, gate_up_proj, up_bias, A1, B1)
        del x
        a = kernels.glu(z, padded_slots, padded_offsets, Gate(*gate))
        y, u2 = gemms.product(a, down_proj, down_bias, A2, B2)
        del a
        out = kernels.combine(y, padded_positions, top_k_weights.contiguous())
    u1, u2 = (out.new_empty(0) if u is None else u for u in (u1, u2))
    return out, z, u1, u2, padded_offsets, padded_slots, padded_positions


def _backward_gpu(
    dout,
    hidden_states,
    top_k_weights,
    gate_up_proj,
    down_proj,
    up_bias,
    down_bias,
    A1,
    B1,
    A2,
    B2,
    z,
    u1,
    u2,
    padded_offsets,
    padded_slots,
    padded_positions,
    needs_grad,
    *gate,
):
    """Gradients of the ten inputs, empty where not needed; of what is (P, H) there is one at a time."""
    inputs = (hidden_states, top_k_weights, gate_up_proj, down_proj, up_bias, down_bias, A1, B1, A2, B2)
    if _is_empty(hidden_states, top_k_weights, down_proj):
        return tuple(t.zero_() for t in training.empty_gradients(dout, inputs, needs_grad))
    grads = _Gradients(*(dout.new_empty(0) for _ in inputs))
    needs = _Gradients(*needs_grad)
    kernels = gpu.launchers()
    with torch.cuda.device_of(dout):
        # What the kernels read row by row.
        dout, hidden_states = (t if t.stride(-1) == 1 else t.contiguous() for t in (dout, hidden_states))
        top_k_weights = top_k_weights.contiguous()
        top_k, experts = top_k_weights.shape[1], gate_up_proj.shape[0]
        gemms = _pass(padded_slots.numel(), padded_offsets, down_proj)
        full = tuning.wgrad_config(padded_positions.numel(), experts, z.dtype, gemms.capability)

        d = kernels.gather(dout, padded_slots, padded_offsets, top_k)
        b, v2 = gemms.product(d, down_proj.mT, None, _mT(B2), _mT(A2))
        dz, weighted_a, dweights = kernels.glu_backward(
            b, z, top_k_weights, padded_slots, padded_positions, padded_offsets, Gate(*gate), needs.down or needs.A2
        )
        del b
        if needs.weights:
            if down_bias is not None:
                of_bias = training.dout_times_bias(dout, down_bias, padded_offsets, padded_positions)
                dweights += torch.where(padded_positions >= 0, of_bias, 0.0)
            grads = grads._replace(weights=dweights.view(top_k_weights.shape).to(top_k_weights.dtype))
        if needs.down:
            args = (d, weighted_a, padded_offsets, gemms.precision, full, is_transposed(down_proj))
            grads = grads._replace(down=gpu.launch_wgrad(*args))
        if needs.A2:
            grads = grads._replace(A2=gemms.thin_wgrad(v2, weighted_a, padded_offsets))
        del weighted_a, v2
        if needs.B2:
            weighted_u2 = kernels.scale_rows(u2, top_k_weights, padded_slots, padded_offsets)
            grads = grads._replace(B2=gemms.thin_wgrad(d, weighted_u2, padded_offsets))
        del d
        if needs.down_bias:
            grads = grads._replace(down_bias=kernels.row_sums(dout, padded_slots, padded_offsets, top_k_weights))
        if needs.up_bias:
            grads = grads._replace(up_bias=kernels.row_sums(dz, padded_slots, padded_offsets))
        if needs.B1:
            grads = grads._replace(B1=gemms.thin_wgrad(dz, u1, padded_offsets))
        v1 = None
        if needs.x:
            rows, v1 = gemms.product(dz, gate_up_proj.mT, None, _mT(B1), _mT(A1))
            ones = torch.ones_like(top_k_weights, dtype=torch.float32)
            grads = grads._replace(x=kernels.combine(rows, padded_positions, ones))
            del rows
        elif needs.A1:
            v1 = gemms.thin(dz, B1.mT)
        if needs.A1 or needs.gate_up:
            x = kernels.gather(hidden_states, padded_slots, padded_offsets, top_k)
        if needs.gate_up:
            args = (dz, x, padded_offsets, gemms.precision, full, is_transposed(gate_up_proj))
            grads = grads._replace(gate_up=gpu.launch_wgrad(*args))
        if needs.A1:
            grads = grads._replace(A1=gemms.thin_wgrad(v1, x, padded_offsets))
    return tuple(grads)


class _Gradients(NamedTuple):
    """Something of each differentiable input, in the order of the ops."""

    x: object
    weights: object
    gate_up: object
    down: object
    up_bias: object
    down_bias: object
    A1: object
    B1: object
    A2: object
    B2: object


def _mT(x: torch.Tensor | None) -> torch.Tensor | None:
    return x if x is None else x.mT


def _forward_fake(hidden_states, top_k_index, _, gate_up_proj, down_proj, up_bias, down_bias, A1, B1, A2, *__):
    return _empty_outputs(hidden_states, top_k_index, gate_up_proj, A1, A2)


def _backward_fake(dout, *args):
    return training.empty_gradients(dout, args[:10], args[16])


def _size(weight) -> int:
    """Of an expert's part, given the shape of all; of None, nothing."""
    return 0 if weight is None else math.prod(weight[1:])


def _forward_flops(*args, **_):
    low_rank = sum(_size(factor) for factor in args[7:11])
    return training.experts_flops(*args) + 2 * math.prod(args[1]) * low_rank


def _backward_flops(dout, *args, **_):
    of, needs = (_Gradients(*of_inputs) for of_inputs in (args[:10], args[16]))
    gate_up, down, A1, B1, A2, B2 = (_size(weight) for weight in (of.gate_up, of.down, of.A1, of.B1, of.A2, of.B2))
    products = down + B2 + A2  # b and v2
    products += needs.down * down + needs.A2 * A2 + needs.B2 * B2 + needs.B1 * B1
    products += needs.x * (gate_up + A1) + (needs.x or needs.A1) * B1
    products += needs.gate_up * gate_up + needs.A1 * A1
    return 2 * math.prod(of.weights) * products


_FACTORS = "Tensor? A1, Tensor? B1, Tensor? A2, Tensor? B2"

_forward_op = register_op(
    "moe_experts_lora",
    f"({training.INPUTS}, {_FACTORS}, {training.GATE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward_gpu,
    fake=_forward_fake,
    flops=_forward_flops,
)

_backward_op = register_op(
    "moe_experts_lora_backward",
    "(Tensor dout, Tensor hidden_states, Tensor top_k_weights, Tensor gate_up_proj, Tensor down_proj,"
    f" Tensor? gate_up_proj_bias, Tensor? down_proj_bias, {_FACTORS}, Tensor z, Tensor u1, Tensor u2,"
    f" Tensor padded_offsets, Tensor padded_slots, Tensor padded_positions, bool[] needs_grad, {training.GATE})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_gpu,
    fake=_backward_fake,
    flops=_backward_flops,
)

training.register_backward(_forward_op, _backward_op, tensors=11)


def moe_experts_lora(*args):
    """The op's arguments, on a GPU -> (T, H). Where nobody needs its opacity or gradient, without the op's dispatch."""
    as_op = needs_op(_forward_op, args[:11]) or needs_gradients(args[:11])
    return (_forward_op if as_op else _forward_gpu)(*args)[0]
