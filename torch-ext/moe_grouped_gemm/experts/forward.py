"""The forward: a few rows by decode's two launches, else

    route    z = x[t] W1^T + bias1 + u1 B1^T    a = act(gate) * up    y = a W2^T + bias2 + u2 B2^T    combine
             u1 = x[t] A1^T                     [gate; up] = z        u2 = a A2^T

of the rows of expert e, t the token of a row. A1, B1, A2, B2: adapters, if there are any. Then rows are padded, z and a
are made by a launch each, and GEMMs read rows one after another; else the first GEMM gathers rows and applies the gate.
A plan may say so without adapters as well, and that columns of x and a are ordered otherwise.

Shared experts are computed in decode's own launches, if weights are dense; elsewhere apart, and `combine` adds them.
"""

from __future__ import annotations

from .. import gpu
from ..launch_configs import PAD
from ..weights import are_adapted, format_of
from ..weights.layout import by_rows
from ..weights.shared import addend_of
from .lora import product
from .rows import route


@gpu.on_its_device
def forward(hidden_states, top_k_index, top_k_weights, gate_up, down, gate, quantize_activations, shared=None, ranks=1):
    """(T, H) -> (T, H).

    shared: SharedExperts whose result is added, or None.
    ranks: of how many the slots are, if the experts are those of one: about as large a part is routed, the others have
        ids out of range. Tiles are chosen by that.
    """
    if is_empty(hidden_states, top_k_index, down):
        if shared is not None and hidden_states.numel() > 0:
            return shared.of(hidden_states, gate)
        return hidden_states.new_zeros(hidden_states.shape)
    inputs = (by_rows(hidden_states), top_k_index.contiguous(), top_k_weights.contiguous(), gate_up, down, gate)
    if not are_adapted(gate_up, down):
        out = format_of(gate_up).decode(*inputs, shared)
        if out is not None:
            return out
    addend = addend_of(inputs[0], shared, gate)
    return _of_many_rows(*inputs, quantize_activations, save=False, addend=addend, ranks=ranks)[0]


@gpu.on_its_device
def forward_and_save(hidden_states, top_k_index, top_k_weights, gate_up, down, gate):
    """`forward` of inputs that are not empty, and what the backward reads: z (S, 2I), u1, u2 (S, R), and their rows."""
    inputs = (by_rows(hidden_states), top_k_index.contiguous(), top_k_weights.contiguous(), gate_up, down, gate)
    return _of_many_rows(*inputs, quantize_activations=False, save=True)


def is_empty(hidden_states, routing, down):
    """routing: ids or weights. No kernel is launched then."""
    return routing.numel() == 0 or hidden_states.numel() == 0 or down.weight.numel() == 0


def _of_many_rows(x, top_k_index, top_k_weights, gate_up, down, gate, quantize_activations, save, addend=None, ranks=1):
    weights, (experts, rows_of_z, _) = format_of(gate_up), gate_up.weight.shape
    slots = top_k_index.numel()
    if are_adapted(gate_up, down):
        rows = route(top_k_index, top_k_weights, experts, PAD).padded()
        # Every expert with rows has PAD at least, so tiles are chosen by padded rows.
        config = weights.row_config(rows.slots.numel(), down.weight, x.dtype)
        return _of_gathered_rows(x, rows.scheduled(config.BLOCK_M), gate_up, down, gate, config, addend)
    plan = weights.plan(-(-slots // ranks), gate_up, down, gate, x.dtype, quantize_activations)
    rows = route(top_k_index, top_k_weights, experts, plan.gate_up.BLOCK_M)
    if plan.ordered:
        return _of_ordered_rows(x, rows, gate_up, down, gate, plan.down, addend)
    if plan.gathered:
        return _of_gathered_rows(x, rows, gate_up, down, gate, plan.down, addend)
    z = x.new_empty(slots, rows_of_z) if save else None
    a = weights.first_gemm(x, gate_up, rows, gate, plan, z)
    return weights.second_gemm(a, down, rows, plan, addend), z, None, None, rows


def _of_gathered_rows(x, rows, gate_up, down, gate, config, addend):
    gathered = rows.gather(x)
    z, u1 = product(gathered, gate_up, rows, config)
    a = gpu.launchers().glu(z, rows.slots, rows.offsets, gate)
    y, u2 = product(a, down, rows, config, out=gathered)  # as large, and read for the last time
    return rows.combine(y, addend=addend), z, u1, u2, rows


def _of_ordered_rows(x, rows, gate_up, down, gate, config, addend):
    """x and a are read by these GEMMs alone; z, which a backward reads, and y have their columns as ever."""
    gemm = format_of(down).ordered_gemm
    z = gemm(rows.gather(x, ordered=True), gate_up, rows.schedule, config)
    a = gpu.launchers().glu(z, rows.slots, rows.offsets, gate, ordered=True)
    return rows.combine(gemm(a, down, rows.schedule, config), addend=addend), z, None, None, rows
