"""The public functions: checks, the choice of path, and gradients."""

from __future__ import annotations

import functools
import os

import torch

from . import reference, tuning
from .routing import Routing, route_torch
from .torch_ops import register_op, rejects_transforms

MIN_TRITON = (3, 6)


@functools.cache
def _kernels():
    """The Triton launchers. Imported at the first call on a GPU: the package must load without Triton."""
    wanted = "moe_grouped_gemm needs Triton {}.{} or newer to run on a GPU".format(*MIN_TRITON)
    try:
        import triton
    except ImportError as error:
        raise ImportError(f"{wanted}; none is installed: pip install triton") from error
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MIN_TRITON:
        raise ImportError(f"{wanted}, found {triton.__version__}: pip install -U triton (torch 2.11 brings 3.6)")
    from . import kernels

    return kernels


# --- moe_experts ------------------------------------------------------------------------------------------------------


@rejects_transforms
def moe_experts(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    activation: str = "silu",
) -> torch.Tensor:
    """Gated experts over routed tokens; differentiable in every float input.

    y[t] = sum_k weight[t, k] * down[e] @ (act(gate[e] @ x[t]) * (up[e] @ x[t])),  e = top_k_index[t, k].

    Args:
        hidden_states: (T, H) bf16, fp16 or fp32 (fp64 on CPU).
        top_k_index: (T, top_k) int32 or int64. A slot whose id lies outside [0, E) is skipped and contributes exactly
            nothing, whatever its weight.
        top_k_weights: (T, top_k), any float dtype.
        gate_up_proj: (E, 2I, H), rows [0, I) are gate and [I, 2I) up; dtype of hidden_states.
        down_proj: (E, H, I), dtype of hidden_states.
        activation: "silu", "gelu", "gelu_pytorch_tanh" or "relu", applied to gate.
    Returns:
        (T, H) in hidden_states.dtype. Products with the weights and the sum over k are accumulated in fp32, in a fixed
        order: two calls give bitwise equal results. No host sync on a GPU.
    Raises:
        ValueError: shapes, devices or ids do not fit together, or the activation is unknown.
        TypeError: a dtype is not supported or differs from hidden_states.
        ImportError: on a GPU without Triton >= 3.6.

    Under `torch.autocast` the three float operands of the GEMMs are cast first, as `torch.nn.functional.linear` does.
    """
    hidden_states, gate_up_proj, down_proj = _autocast(hidden_states, gate_up_proj, down_proj)
    _check_experts(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, activation)
    inputs = (hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj)
    # A custom op costs tens of microseconds of dispatch: only those who need its opacity or its gradient pay for it.
    if torch.compiler.is_compiling():
        return _moe_experts_op(*inputs, activation)
    if hidden_states.device.type == "cpu":
        return reference.moe_experts(*inputs, activation)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return _moe_experts_op(*inputs, activation)
    return _experts_gpu(*inputs, activation)


def _autocast(hidden_states, *weights):
    """The operands of the GEMMs in the dtype that `torch.autocast` asks for, if it is on."""
    device_type = _device_type("hidden_states", hidden_states)
    if not torch.is_autocast_enabled(device_type):
        return hidden_states, *weights
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) for x in (hidden_states, *weights))


def _experts_gpu(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, activation):
    """Few slots: two launches. Else four or five: route, gate_up GEMM with the activation, down GEMM, combine."""
    rows, num_experts = top_k_index.numel(), gate_up_proj.shape[0]
    if rows == 0 or hidden_states.numel() == 0:
        return hidden_states.new_zeros(hidden_states.shape)
    device = hidden_states.device.index
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _experts_gpu(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, activation)
    kernels = _kernels()
    if hidden_states.stride(1) != 1:
        hidden_states = hidden_states.contiguous()
    top_k_index, top_k_weights = top_k_index.contiguous(), top_k_weights.contiguous()
    expert_bytes = 3 * down_proj.stride(0) * down_proj.element_size()
    is_decode = tuning.is_decode(rows, top_k_index.shape[0], num_experts, expert_bytes)
    if is_decode and gate_up_proj.stride(2) == down_proj.stride(2) == 1:
        up_config, down_config = tuning.decode_config(hidden_states.dtype)
        a = kernels.gate_up_decode(hidden_states, gate_up_proj, top_k_index, activation, up_config)
        return kernels.down_decode(a, down_proj, top_k_index, top_k_weights, down_config)
    precision = _input_precision()
    up_config, down_config = _config(rows, down_proj)
    _, sorted_slots, slot_positions, schedule = kernels.route(top_k_index, num_experts, up_config.BLOCK_M)
    up_config = _as_readable(up_config, gate_up_proj)
    top_k = top_k_index.shape[1]
    a = kernels.gate_up(hidden_states, gate_up_proj, sorted_slots, schedule, top_k, activation, precision, up_config)
    down_config = _as_readable(down_config, a, down_proj)
    y = kernels.grouped_gemm(a, down_proj, schedule, precision, down_config)
    return kernels.combine(y, slot_positions, top_k_weights)


def _experts_forward(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, activation):
    forward = reference.moe_experts if hidden_states.device.type == "cpu" else _experts_gpu
    return forward(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, activation)


_moe_experts_op = register_op(
    "moe_experts",
    "(Tensor hidden_states, Tensor top_k_index, Tensor top_k_weights, Tensor gate_up_proj, Tensor down_proj,"
    " str activation) -> Tensor",
    _experts_forward,
    fake=lambda hidden_states, *_: torch.empty_like(hidden_states, memory_format=torch.contiguous_format),
)


def _experts_backward_fake(dout, x, top_k_index, top_k_weights, gate_up_proj, down_proj, activation, needs_grad):
    inputs = (x, top_k_weights, gate_up_proj, down_proj)
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if needed else t.new_empty(0)
        for t, needed in zip(inputs, needs_grad)
    )


_moe_experts_backward_op = register_op(
    "moe_experts_backward",
    "(Tensor dout, Tensor hidden_states, Tensor top_k_index, Tensor top_k_weights, Tensor gate_up_proj,"
    " Tensor down_proj, str activation, bool[] needs_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.moe_experts_backward,
    fake=_experts_backward_fake,
)


def _experts_setup_context(ctx, inputs, output):
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _experts_backward(ctx, dout):
    needs_x, _, *needs_others, _ = ctx.needs_input_grad
    needs_grad = [needs_x, *needs_others]
    grads = _moe_experts_backward_op(dout, *ctx.saved_tensors, ctx.activation, needs_grad)
    dx, dweights, dgate_up, ddown = (grad if needed else None for grad, needed in zip(grads, needs_grad))
    return dx, None, dweights, dgate_up, ddown, None


_moe_experts_op.register_autograd(_experts_backward, setup_context=_experts_setup_context)


# --- building blocks --------------------------------------------------------------------------------------------------


def route(top_k_index: torch.Tensor, num_experts: int) -> Routing:
    """Sort routed slots by expert: on the device, stably, without host sync.

    Args:
        top_k_index: (T, top_k) int32 or int64; ids outside [0, num_experts) are skipped.
        num_experts: E, at least 1.
    Returns:
        Routing with expert_offsets (E + 1,), sorted_slots (S,) and slot_positions (S,), all int32; S = T * top_k.
    """
    _check_index(top_k_index)
    if num_experts < 1:
        raise ValueError(f"num_experts: expected at least 1, got {num_experts}")
    return Routing(*_route_op(top_k_index, num_experts))


def _route_forward(top_k_index, num_experts):
    if top_k_index.device.type == "cpu" or top_k_index.numel() == 0:
        return route_torch(top_k_index, num_experts)
    with torch.cuda.device_of(top_k_index):
        return _kernels().route(top_k_index.contiguous(), num_experts, block_m=128)[:3]


def _route_fake(top_k_index, num_experts):
    slots = top_k_index.numel()
    return tuple(top_k_index.new_empty(n, dtype=torch.int32) for n in (num_experts + 1, slots, slots))


_route_op = register_op(
    "route", "(Tensor top_k_index, int num_experts) -> (Tensor, Tensor, Tensor)", _route_forward, fake=_route_fake
)


@rejects_transforms
def grouped_gemm(x: torch.Tensor, weight: torch.Tensor, expert_offsets: torch.Tensor) -> torch.Tensor:
    """y[r] = weight[e] @ x[r] for expert_offsets[e] <= r < expert_offsets[e + 1]; differentiable in x and weight.

    Args:
        x: (S, K) bf16, fp16 or fp32 (fp64 on CPU), rows sorted by expert.
        weight: (E, N, K), dtype of x.
        expert_offsets: (E + 1,) int32 on x.device, leading 0, ascending, exclusive; as `route` returns it.
    Returns:
        (S, N) in x.dtype, accumulated in fp32. Rows from expert_offsets[E] on belong to no expert and are zero.
    Raises:
        ValueError: shapes or devices do not fit together.
        TypeError: a dtype is not supported or differs from x.
    """
    _check_floats(x=x, weight=weight)
    if x.ndim != 2:
        raise ValueError(f"x: expected (S, K), got {_shape(x)}")
    if weight.ndim != 3 or weight.shape[2] != x.shape[1] or weight.shape[0] < 1:
        raise ValueError(
            f"weight: expected (E, N, {x.shape[1]}) with E >= 1 to fit x {_shape(x)}, got {_shape(weight)}"
        )
    if expert_offsets.dtype != torch.int32:
        raise TypeError(f"expert_offsets: expected int32, got {expert_offsets.dtype}")
    if expert_offsets.shape != (weight.shape[0] + 1,) or not expert_offsets.is_contiguous():
        raise ValueError(
            f"expert_offsets: expected contiguous ({weight.shape[0] + 1},) to fit weight {_shape(weight)}, "
            f"got {_shape(expert_offsets)}"
        )
    if expert_offsets.device != x.device:
        raise ValueError(f"expert_offsets: expected on {x.device} like x, got {expert_offsets.device}")
    return _grouped_gemm_op(x, weight, expert_offsets)


def _grouped_gemm_forward(x, weight, expert_offsets):
    if x.device.type == "cpu":
        return reference.grouped_gemm(x, weight, expert_offsets)
    y = x.new_zeros(x.shape[0], weight.shape[1])
    if y.numel() == 0 or x.shape[1] == 0:
        return y
    kernels = _kernels()
    if x.stride(1) != 1:
        x = x.contiguous()
    with torch.cuda.device_of(x):
        config = _config(x.shape[0], weight).down
        schedule = kernels.tile_schedule(expert_offsets, x.shape[0], config.BLOCK_M)
        config = _as_readable(config, x, weight)
        return kernels.grouped_gemm(x, weight, schedule, _input_precision(), config, y)


_grouped_gemm_op = register_op(
    "grouped_gemm",
    "(Tensor x, Tensor weight, Tensor expert_offsets) -> Tensor",
    _grouped_gemm_forward,
    fake=lambda x, weight, expert_offsets: x.new_empty(x.shape[0], weight.shape[1]),
)
_grouped_gemm_dw_op = register_op(
    "grouped_gemm_dw",
    "(Tensor dy, Tensor x, Tensor expert_offsets) -> Tensor",
    reference.grouped_gemm_dw,
    fake=lambda dy, x, expert_offsets: x.new_empty(expert_offsets.shape[0] - 1, dy.shape[1], x.shape[1]),
)


def _grouped_gemm_backward(ctx, dy):
    x, weight, expert_offsets = ctx.saved_tensors
    needs_x, needs_weight, _ = ctx.needs_input_grad
    # The transposed weight is read in place; no copy is made.
    dx = _grouped_gemm_op(dy, weight.transpose(1, 2), expert_offsets) if needs_x else None
    dweight = _grouped_gemm_dw_op(dy, x, expert_offsets) if needs_weight else None
    return dx, dweight, None


_grouped_gemm_op.register_autograd(
    _grouped_gemm_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


# --- checks -----------------------------------------------------------------------------------------------------------

_FLOATS = {
    "cuda": (torch.bfloat16, torch.float16, torch.float32),
    "cpu": (torch.bfloat16, torch.float16, torch.float32, torch.float64),
}


def _device_type(name: str, x: torch.Tensor) -> str:
    if x.device.type not in _FLOATS:
        raise ValueError(f"{name}: expected on cpu or cuda, got {x.device}")
    return x.device.type


def _shape(x: torch.Tensor) -> tuple:
    return tuple(x.shape)


def _check_floats(**tensors: torch.Tensor) -> None:
    """All tensors share the device and the supported dtype of the first."""
    names = iter(tensors)
    first = next(names)
    x = tensors[first]
    device_type = _device_type(first, x)
    allowed = _FLOATS[device_type]
    if x.dtype not in allowed:
        raise TypeError(f"{first}: expected one of {', '.join(map(str, allowed))} on {device_type}, got {x.dtype}")
    for name in names:
        if tensors[name].dtype != x.dtype:
            raise TypeError(f"{name}: expected {x.dtype} like {first}, got {tensors[name].dtype}")
        if tensors[name].device != x.device:
            raise ValueError(f"{name}: expected on {x.device} like {first}, got {tensors[name].device}")


def _check_index(top_k_index: torch.Tensor) -> None:
    if top_k_index.dtype not in (torch.int32, torch.int64):
        # A float tensor that asks for gradients lands here as well.
        raise TypeError(f"top_k_index: expected int32 or int64, got {top_k_index.dtype}")
    if top_k_index.ndim != 2:
        raise ValueError(f"top_k_index: expected (T, top_k), got {_shape(top_k_index)}")


def _check_experts(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, activation) -> None:
    _check_floats(hidden_states=hidden_states, gate_up_proj=gate_up_proj, down_proj=down_proj)
    _check_index(top_k_index)
    if hidden_states.ndim != 2:
        raise ValueError(f"hidden_states: expected (T, H), got {_shape(hidden_states)}")
    tokens, hidden_dim = hidden_states.shape
    if top_k_index.shape[0] != tokens:
        raise ValueError(f"top_k_index: expected ({tokens}, top_k) to fit hidden_states, got {_shape(top_k_index)}")
    if top_k_weights.shape != top_k_index.shape:
        raise ValueError(f"top_k_weights: expected {_shape(top_k_index)} like top_k_index, got {_shape(top_k_weights)}")
    if not top_k_weights.is_floating_point():
        raise TypeError(f"top_k_weights: expected a float dtype, got {top_k_weights.dtype}")
    if gate_up_proj.ndim != 3 or gate_up_proj.shape[2] != hidden_dim or gate_up_proj.shape[1] % 2:
        raise ValueError(
            f"gate_up_proj: expected (E, 2I, {hidden_dim}) to fit hidden_states, got {_shape(gate_up_proj)}"
        )
    experts, rows, _ = gate_up_proj.shape
    if experts == 0:
        raise ValueError(f"gate_up_proj: expected at least one expert, got {_shape(gate_up_proj)}")
    if down_proj.shape != (experts, hidden_dim, rows // 2):
        raise ValueError(
            f"down_proj: expected {(experts, hidden_dim, rows // 2)} to fit gate_up_proj, got {_shape(down_proj)}"
        )
    for name, x in (("top_k_index", top_k_index), ("top_k_weights", top_k_weights)):
        if x.device != hidden_states.device:
            raise ValueError(f"{name}: expected on {hidden_states.device} like hidden_states, got {x.device}")
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(reference.ACTIVATIONS)}, got {activation!r}")


# --- choices ----------------------------------------------------------------------------------------------------------


@functools.cache
def _capability(device: int) -> tuple[int, int]:
    """What tuning.py chooses by. MOE_GROUPED_GEMM_PORTABLE=1, for debugging: as on a GPU that it has no table for."""
    if os.environ.get("MOE_GROUPED_GEMM_PORTABLE") == "1":
        return (0, 0)
    return torch.cuda.get_device_capability(device)


@functools.cache
def _device_name(device: int) -> str:
    """Empty for a GPU that is run as an unknown one: tuned files are for the GPU that it is."""
    return torch.cuda.get_device_name(device) if _capability(device) != (0, 0) else ""


def _config(rows: int, down_proj: torch.Tensor) -> tuning.ExpertsConfig:
    device = down_proj.device.index
    return tuning.experts_config(rows, down_proj.shape, down_proj.dtype, _capability(device), _device_name(device))


def _input_precision() -> str:
    """fp32 GEMMs follow the switch that torch's own follow; 16-bit ones ignore it. CDNA4 has no tf32."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 and torch.version.hip is None else "ieee"


def _as_readable(config: tuning.GemmConfig, *tensors: torch.Tensor) -> tuning.GemmConfig:
    """Without what the tensors, weights last, rule out; plain loads take anything."""
    if config.USE_TMA and not all(_tma_can_read(x) for x in tensors):
        return config._replace(USE_TMA=False, WARP_SPECIALIZED=False)
    if config.WARP_SPECIALIZED and not tensors[-1].is_contiguous():
        return config._replace(WARP_SPECIALIZED=False)
    return config


def _tma_can_read(x: torch.Tensor) -> bool:
    """TMA wants 16-byte aligned bases and strides and a last stride of 1."""
    *strides, last = x.stride()
    return last == 1 and x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in strides)
