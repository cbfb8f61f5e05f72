"""The backward. With the names of forward.py, p the weight of a row's slot, and dout the gradient of the result:

    v2 = dout[t] B2   b = dout[t] W2 + v2 A2          dp = <b, a> + <dout[t], bias2>
    dW2 = dout[t]^T (p a)   dB2 = dout[t]^T (p u2)   dA2 = v2^T (p a)    dbias2 = sum of p dout[t]
    dz: of p b through the gate                      dbias1 = sum of dz
    v1 = dz B1        dx[t] = sum of dz W1 + v1 A1   dW1 = dz^T x[t]     dB1 = dz^T u1   dA1 = v1^T x[t]

Rows are padded throughout. What a product sums over rows is zero in padding rows on one side: gathered rows, a, and
what the gate's backward makes. Of what is (rows, H) there is one at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import gpu
from ..weights import Projection, are_adapted, format_of
from ..weights.layout import by_rows
from .lora import product, thin_gemm, thin_wgrad
from .rows import Rows


class Differentiable(NamedTuple):
    """Something of each input that may have a gradient, each field of a Projection among them."""

    hidden_states: object
    top_k_weights: object
    gate_up: Projection
    down: Projection

    @classmethod
    def of(cls, flat) -> Differentiable:
        return cls(*flat[:2], Projection(*flat[2:7]), Projection(*flat[7:]))

    def flat(self) -> tuple:
        return (*self[:2], *self.gate_up, *self.down)


@gpu.on_its_device
def backward(dout, inputs: Differentiable, z, u1, u2, routing, needs: Differentiable, gate) -> Differentiable:
    """Gradients, None where they are not needed. hidden_states are read for those of W1 and A1 alone."""
    dout, weights = by_rows(dout), inputs.top_k_weights.contiguous()
    of_z = Rows(*routing, None, weights)
    gate_up, down = inputs.gate_up, inputs.down
    config = format_of(down).row_config(z.shape[0], down.weight, z.dtype, transposed=True)
    rows = of_z if are_adapted(gate_up, down) else of_z.padded()
    rows = rows.scheduled(config.BLOCK_M)
    dz, dweights, ddown = _of_second_gemm(dout, down, z, u2, of_z, rows, config, gate, needs)
    dx, dgate_up = _of_first_gemm(dz, inputs.hidden_states, gate_up, u1, rows, config, needs)
    return Differentiable(dx, dweights, dgate_up, ddown)


def _of_second_gemm(dout, down, z, u2, of_z, rows, config, gate, needs):
    """dz; the gradients of top_k_weights and of the second projection."""
    kernels, needs_weights, needs = gpu.launchers(), needs.top_k_weights, needs.down
    grads, dweights = Projection(None), None
    d = rows.gather(dout)
    b, v2 = product(d, down, rows, config, transposed=True)
    order = (rows.slots, of_z.positions, rows.offsets)
    if not (needs.weight or needs.B):
        d = None  # read for the last time
    dz, weighted_a, products = kernels.glu_backward(b, z, rows.weights, *order, gate, needs.weight or needs.A)
    del b
    if needs_weights:
        if down.bias is not None:
            of_bias = _dout_times_bias(dout, down.bias, of_z)
            products += torch.where(of_z.positions >= 0, of_bias, 0.0)
        dweights = products.view(rows.weights.shape).to(rows.weights.dtype)
    if needs.weight:
        grads = grads._replace(weight=format_of(down).wgrad(d, weighted_a, rows, down.weight))
    if needs.A:
        grads = grads._replace(A=thin_wgrad(v2, weighted_a, rows))
    del weighted_a, v2
    if needs.B:
        weighted_u2 = kernels.scale_rows(u2, rows.weights, rows.slots, rows.offsets)
        grads = grads._replace(B=thin_wgrad(d, weighted_u2, rows))
    if needs.bias:
        grads = grads._replace(bias=kernels.row_sums(dout, of_z.slots, of_z.offsets, rows.weights))
    return dz, dweights, grads


def _of_first_gemm(dz, hidden_states, gate_up, u1, rows, config, needs):
    """The gradients of hidden_states and of the first projection."""
    needs_x, needs = needs.hidden_states, needs.gate_up
    grads, dx, v1 = Projection(None), None, None
    if needs.bias:
        grads = grads._replace(bias=gpu.launchers().row_sums(dz, rows.slots, rows.offsets))
    if needs.B:
        grads = grads._replace(B=thin_wgrad(dz, u1, rows))
    if needs_x:
        y, v1 = product(dz, gate_up, rows, config, transposed=True)
        dx = rows.combine(y, torch.ones_like(rows.weights, dtype=torch.float32))
        del y
    elif needs.A:
        v1 = thin_gemm(dz, gate_up.B.mT, rows, config)
    if needs.weight or needs.A:
        x = rows.gather(by_rows(hidden_states))
        if needs.weight:
            grads = grads._replace(weight=format_of(gate_up).wgrad(dz, x, rows, gate_up.weight))
        if needs.A:
            grads = grads._replace(A=thin_wgrad(v1, x, rows))
    return dx, grads


def _dout_times_bias(dout, bias, rows):
    """<dout[t], bias[e]> of each slot, in fp32: what the bias adds to the gradient of its weight."""
    products = dout.float() @ bias.float().T
    slots = torch.arange(rows.positions.shape[0], device=dout.device)
    experts = torch.searchsorted(rows.offsets[1:], rows.positions, right=True, out_int32=True)
    return products[slots // rows.top_k, experts]
