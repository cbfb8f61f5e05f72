"""Transformers' `FP8Experts`: what it holds instead of dense weights, and which of its forms we compute."""

from __future__ import annotations

import torch
from torch import nn

from . import functional, lora, quant, variants
from .reference import Gate

WEIGHTS = ("gate_up_proj", "down_proj")
_SUPPORTED = (
    "weights in float8_e4m3fn with a scale for each 128 x 128 block, activations quantised dynamically, "
    "down @ (act(gate @ x) * (up @ x)) without clamping"
)


def is_fp8_experts(module: nn.Module) -> bool:
    """Also one that has been given dense weights in place of quantised ones."""
    return hasattr(module, "down_proj_scale_inv") and hasattr(module, "activation_scheme")


def obstacle(module: nn.Module) -> str | None:
    """What of an `FP8Experts` we do not compute; None if we serve it."""
    weights = [getattr(module, name, None) for name in WEIGHTS]
    if weights[0] is None:
        return "experts without a gate"
    if module.activation_scheme != "dynamic":
        return f"activation_scheme={module.activation_scheme!r}"
    for name, weight in zip(WEIGHTS, weights):
        if weight.dtype != quant.FP8 or hasattr(weight, "__tensor_flatten__"):
            return f"{name} of type {type(weight).__name__} in {weight.dtype}"
    if module.block_size is None or tuple(module.block_size) != (quant.BLOCK, quant.BLOCK):
        return f"block_size={module.block_size}"
    inter = weights[1].shape[2]
    if inter % quant.BLOCK > quant.BLOCK // 2:
        # As many blocks whether they are counted through gate and up, as by the module, or, as in checkpoints, apart.
        return f"an intermediate size of {inter}, neither a multiple of 128 nor at most 64 above one"
    if getattr(module, "has_bias", False):
        return "biases"
    for name in ("swiglu_alpha", "swiglu_limit", "limit"):
        if getattr(module, name, None) is not None:
            return f"a gate with {name}={getattr(module, name)}"
    if variants.activation(module) is None:
        return f"the activation {module.act_fn}"
    return None


def forward(module, hidden_states, top_k_index, top_k_weights, adapters) -> torch.Tensor:
    """(T, H) -> (T, H); adapters: (name of a weight, factors) of each active one.

    The weights get no gradient, as in Transformers, whatever their `requires_grad` says.
    """
    reason = obstacle(module)
    if reason is not None:
        raise NotImplementedError(
            f"moe-grouped-gemm does not compute FP8 experts with {reason}; supported: {_SUPPORTED}. "
            "Another experts_implementation, or use_kernels=False, leaves them to Transformers."
        )
    weights = [getattr(module, name).detach() for name in WEIGHTS]
    inputs = (hidden_states, top_k_index, top_k_weights, *weights)
    act = variants.activation(module)
    scales = {f"{name}_scale": getattr(module, f"{name}_scale_inv").detach() for name in WEIGHTS}
    if adapters:
        factors = [tuple(f for name, f in adapters if name == weight) for weight in WEIGHTS]
        out = lora.moe_experts_lora(*inputs, *factors, Gate(act), **scales)
    else:
        out = functional.moe_experts(*inputs, act, **scales)
    return out.to(hidden_states.dtype)


class UncastFactors:
    """A PEFT wrapper of an fp8 weight whose factors keep their dtype, where PEFT would round them to fp8 codes."""

    def __init__(self, wrapper: nn.Module, adapter: str):
        self._wrapper, self._adapter = wrapper, adapter

    def __getattr__(self, name):
        return getattr(self._wrapper, name)

    def get_param(self):
        return self._wrapper.lora_A[self._adapter].weight
