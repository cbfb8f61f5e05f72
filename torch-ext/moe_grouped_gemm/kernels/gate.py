"""The gate between the two GEMMs, as their epilogues have it, and alone. Slot s = slots[r], [gate; up] = z of the slot.

    glu:           a[r] = act(gate) * up
    glu_backward:  a = act(gate) * up,  dweight[s] = <b[r], a>,  da = weight[s] * b[r]
                   dz[r] = [da * up * act'(gate); da * act(gate)],  weighted_a[r] = weight[s] * a

GATE is a Gate of reference/; gate and up are clamped first if it has a limit. Padding rows become zero, whatever they
were: with a bias, z there is not zero. With ORDERED the columns of `glu`'s result are in the order of
order.py, and zeros to whole periods. Grid: rows, some at a time.
"""

import torch
import triton
import triton.language as tl

from .launch import cdiv, launch, next_power_of_2
from .order import in_order, ordered_size


@triton.jit
def _clamp(gate, up, GATE: tl.constexpr):
    """What the activation and its product see of gate and up."""
    if GATE.limit is not None:
        # Not minimum and maximum, which drop a NaN.
        gate = tl.where(gate > GATE.limit, GATE.limit, gate)
        up = tl.where(up > GATE.limit, GATE.limit, tl.where(up < -GATE.limit, -GATE.limit, up))
    if GATE.activation == "swigluoai":
        up += 1.0
    return gate, up


@triton.jit
def _activate(x, GATE: tl.constexpr):
    if GATE.activation == "silu":
        return x * tl.sigmoid(x)
    elif GATE.activation == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif GATE.activation == "gelu_pytorch_tanh":
        # 0.5 * (1 + tanh(z)) == sigmoid(2 z)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif GATE.activation == "swigluoai":
        return x * tl.sigmoid(GATE.alpha * x)
    else:
        tl.static_assert(GATE.activation == "relu")
        # Not maximum(x, 0), which drops a NaN.
        return tl.where(x < 0.0, 0.0, x)


@triton.jit
def _activation_slope(x, GATE: tl.constexpr):
    if GATE.activation == "silu":
        s = tl.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif GATE.activation == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif GATE.activation == "gelu_pytorch_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif GATE.activation == "swigluoai":
        s = tl.sigmoid(GATE.alpha * x)
        return s * (1.0 + GATE.alpha * x * (1.0 - s))
    else:
        tl.static_assert(GATE.activation == "relu")
        return tl.where(x <= 0.0, 0.0, 1.0)


@triton.jit
def _glu(gate, up, GATE: tl.constexpr):
    gate, up = _clamp(gate, up, GATE)
    return _activate(gate, GATE) * up


@triton.jit
def _glu_gradients(da, gate, up, GATE: tl.constexpr):
    """a = act(gate) * up, and the gradients of gate and up."""
    g, u = _clamp(gate, up, GATE)
    act = _activate(g, GATE)
    dgate = da * u * _activation_slope(g, GATE)
    dup = da * act
    if GATE.limit is not None:
        dgate = tl.where(gate > GATE.limit, 0.0, dgate)
        dup = tl.where((up > GATE.limit) | (up < -GATE.limit), 0.0, dup)
    return act * u, dgate, dup


@triton.jit
def _gate_and_up(x, GATE: tl.constexpr):
    """The columns of x that are gate, and those that are up."""
    if GATE.interleaved:
        return x.reshape(x.shape[0], x.shape[1] // 2, 2).split()
    else:
        return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _load_gate_and_up(z_ptrs, start, mask_r, I, BLOCK_I: tl.constexpr, GATE: tl.constexpr):
    """BLOCK_I columns of each, in fp32."""
    if GATE.interleaved:
        offs_z = (2 * start + tl.arange(0, 2 * BLOCK_I))[None, :]
        return _gate_and_up(tl.load(z_ptrs + offs_z, mask=mask_r & (offs_z < 2 * I), other=0.0).to(tl.float32), GATE)
    else:
        offs_i = (start + tl.arange(0, BLOCK_I))[None, :]
        mask = mask_r & (offs_i < I)
        gate = tl.load(z_ptrs + offs_i, mask=mask, other=0.0).to(tl.float32)
        return gate, tl.load(z_ptrs + I + offs_i, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _glu_kernel(
    z_ptr,  # (P, 2I), gate and up in the order of the weight's rows
    slots_ptr,  # (P,) int32, -1 for a padding row
    expert_offsets_ptr,  # (E + 1,) int32
    a_ptr,  # (P, a_I)
    E,
    I,
    a_I,
    ROWS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    GATE: tl.constexpr,
    ORDERED: tl.constexpr,
):
    row = tl.program_id(0) * ROWS
    end = tl.load(expert_offsets_ptr + E)
    if row >= end:
        return
    rows = row + tl.arange(0, ROWS)
    mask_r = (rows < end)[:, None]
    is_owned = (tl.load(slots_ptr + rows, mask=rows < end, other=-1) >= 0)[:, None]
    rows = rows.to(tl.int64)[:, None]
    for start in range(0, a_I, BLOCK_I):
        gate, up = _load_gate_and_up(z_ptr + rows * 2 * I, start, is_owned, I, BLOCK_I, GATE)
        # "swigluoai" of zeros is zero too.
        a = _glu(gate, up, GATE).to(a_ptr.dtype.element_ty)
        if ORDERED:
            a = in_order(a)
        offs_i = (start + tl.arange(0, BLOCK_I))[None, :]
        tl.store(a_ptr + rows * a_I + offs_i, a, mask=mask_r & (offs_i < a_I))


@triton.jit
def _glu_backward_kernel(
    b_ptr,  # (P, I)
    z_ptr,  # (S, 2I), gate and up in the order of the weight's rows
    top_k_weights_ptr,  # (S,)
    slots_ptr,  # (P,) int32, -1 for a padding row
    z_positions_ptr,  # (S,) int32: the row of z of each slot
    expert_offsets_ptr,  # (E + 1,) int32
    dz_ptr,  # (P, 2I), as z
    weighted_a_ptr,  # (P, I), or None
    dweights_ptr,  # (S,) fp32
    E,
    I,
    ROWS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    GATE: tl.constexpr,
):
    row = tl.program_id(0) * ROWS
    if row >= tl.load(expert_offsets_ptr + E):
        return
    rows = row + tl.arange(0, ROWS)
    slots = tl.load(slots_ptr + rows)
    is_owned = slots >= 0
    z_rows = tl.load(z_positions_ptr + slots, mask=is_owned, other=0).to(tl.int64)[:, None]
    weight = tl.load(top_k_weights_ptr + slots, mask=is_owned, other=0.0).to(tl.float32)[:, None]
    rows = rows.to(tl.int64)[:, None]
    mask_r = is_owned[:, None]
    dtype = dz_ptr.dtype.element_ty
    products = tl.zeros((ROWS, BLOCK_I), tl.float32)
    for start in range(0, I, BLOCK_I):
        offs_i = (start + tl.arange(0, BLOCK_I))[None, :]
        mask_i = offs_i < I
        b = tl.load(b_ptr + rows * I + offs_i, mask=mask_r & mask_i, other=0.0).to(tl.float32)
        gate, up = _load_gate_and_up(z_ptr + z_rows * 2 * I, start, mask_r, I, BLOCK_I, GATE)
        a, dgate, dup = _glu_gradients(weight * b, gate, up, GATE)
        products += b * a
        dz_ptrs = dz_ptr + rows * 2 * I
        if GATE.interleaved:
            offs_z = (2 * start + tl.arange(0, 2 * BLOCK_I))[None, :]
            tl.store(dz_ptrs + offs_z, tl.interleave(dgate, dup).to(dtype), mask=offs_z < 2 * I)
        else:
            tl.store(dz_ptrs + offs_i, dgate.to(dtype), mask=mask_i)
            tl.store(dz_ptrs + I + offs_i, dup.to(dtype), mask=mask_i)
        if weighted_a_ptr is not None:
            tl.store(weighted_a_ptr + rows * I + offs_i, (weight * a).to(dtype), mask=mask_i)
    tl.store(dweights_ptr + slots, tl.sum(products, axis=1), mask=is_owned)


def glu(z, slots, expert_offsets, gate, ordered=False):
    """z (P, 2I), padded or not -> a (P, I). Padding rows are zero; those from expert_offsets[E] on stay unwritten.

    ordered: columns of a are those of order.py, to whole periods.
    """
    rows, inter, experts = z.shape[0], z.shape[1] // 2, expert_offsets.numel() - 1
    columns = ordered_size(inter) if ordered else inter
    a = z.new_empty(rows, columns)
    block_m, block_i = 4, min(256, next_power_of_2(columns))
    launch(
        _glu_kernel,
        (cdiv(rows, block_m), 1, 1),
        (z, slots, expert_offsets, a),
        (),
        (experts, inter, columns, block_m, block_i, gate, ordered),
    )
    return a


def glu_backward(b, z, top_k_weights, slots, z_positions, expert_offsets, gate, needs_a):
    """b (P, I), z (S, 2I) -> dz (P, 2I), weighted_a (P, I) or None, dweights (S,) fp32, 0 for a skipped slot.

    Padding rows are zero; those from expert_offsets[E] on stay unwritten. top_k_weights are contiguous.
    """
    rows, inter = b.shape
    experts = expert_offsets.numel() - 1
    dz = b.new_empty(rows, 2 * inter)
    weighted_a = torch.empty_like(b) if needs_a else None
    dweights = torch.zeros(z_positions.numel(), dtype=torch.float32, device=b.device)
    block_m, block_i = 4, min(256, next_power_of_2(inter))
    launch(
        _glu_backward_kernel,
        (rows // block_m, 1, 1),
        (b, z, top_k_weights, slots, z_positions, expert_offsets, dz, weighted_a, dweights),
        (),
        (experts, inter, block_m, block_i, gate),
    )
    return dz, weighted_a, dweights
