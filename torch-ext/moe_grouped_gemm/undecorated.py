"""MoE layers of Transformers that do not carry `@use_experts_implementation`, and what we compute in their place.

Nothing dispatches on a config here: `kernelize` finds these classes by a layer name, and the layer takes the arguments
of the class's own forward, which goes from expert to expert in Python (Llama 4's: all experts on all tokens).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import itertools
from collections.abc import Iterator
from math import inf

import torch
from torch import nn

from . import functional, lora, variants
from .torch_ops import autocast


def _or_stock(*weights: str):
    """For the forward of a layer: modules whose `weights` are not plain tensors take their own forward."""

    def decorate(forward):
        @functools.wraps(forward)
        def serve(self, *inputs, **options):
            if all(_is_plain(self, name) for name in weights):
                return forward(self, *inputs, **options)
            return type(self).forward(self, *inputs, **options)

        return serve

    return decorate


def _is_plain(module: nn.Module, path: str) -> bool:
    """Whether the weight is a dense tensor which we may read without calling the submodule that owns it.

    We may not if there is more to that call than stock's forward: hooks, or a wrapper such as PEFT's.
    """
    owner_path, _, name = path.rpartition(".")
    owner = module.get_submodule(owner_path)
    if owner is not module and (
        type(owner).forward.__module__ != type(module).__module__
        or "forward" in vars(owner)
        or owner._forward_hooks
        or owner._forward_pre_hooks
    ):
        return False
    weight = getattr(owner, name, None)
    dense = getattr(weight, "dtype", None) in (torch.bfloat16, torch.float16, torch.float32)
    return dense and not hasattr(weight, "__tensor_flatten__")


def _gated(module, hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj):
    """`moe_experts` with the `act_fn` of the module, whatever it is."""
    inputs = (hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj)
    activation = variants.activation(module)
    if activation is not None:
        return functional.moe_experts(*inputs, activation)

    def gate(z):
        gate, up = z.chunk(2, dim=-1)
        return module.act_fn(gate) * up

    return lora.moe_experts_lora(*inputs, (), (), gate)


# `kernelize` binds `forward` to the module it replaces: `self` is the Transformers module.


class DbrxExperts(nn.Module):
    """Three weights (E * I, H), of gate, up and down, the last one transposed."""

    can_torch_compile = True
    has_backward = True

    @_or_stock("mlp.w1", "mlp.v1", "mlp.w2")
    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """(B, L, H) hidden states, (B * L, top_k) expert ids and weights -> (B, L, H)."""
        x = hidden_states.reshape(-1, self.hidden_size)
        gate, up, down = (
            weight.view(self.num_experts, self.ffn_hidden_size, self.hidden_size)
            for weight in (self.mlp.w1, self.mlp.v1, self.mlp.w2)
        )
        x, gate, up, down = autocast(x, gate, up, down)
        offsets, slots, positions = functional.route(top_k_index, self.num_experts)
        positions = positions.view(top_k_index.shape)
        rows = lora._Gather.apply(x, slots, positions)
        # A product each: joined into one weight, gate and up would be copied in every call.
        a = self.mlp.activation_fn(functional.grouped_gemm(rows, gate, offsets))
        a = a * functional.grouped_gemm(rows, up, offsets)
        out = lora._Combine.apply(functional.grouped_gemm(a, down.mT, offsets), top_k_weights, slots, positions)
        return out.to(hidden_states.dtype).view(hidden_states.shape)


class JetMoeParallelExperts(nn.Module):
    """One grouped GEMM, of MLPs and of attention; rows come sorted."""

    can_torch_compile = True
    has_backward = True

    @_or_stock("weight")
    def forward(self, inputs: torch.Tensor, expert_size: list[int]) -> torch.Tensor:
        """(S, in) rows sorted by expert, how many each has -> (S, out)."""
        offsets = torch.tensor([0, *itertools.accumulate(expert_size)], dtype=torch.int32, device=inputs.device)
        return functional.grouped_gemm(*autocast(inputs, self.weight), offsets)


class Llama4TextMoe(nn.Module):
    """The whole block: its experts get all tokens, times a score that is zero but for the chosen ones.

    As the score multiplies what an expert gets, each slot is a token of its own here.
    """

    can_torch_compile = True
    has_backward = True

    @_or_stock("experts.gate_up_proj", "experts.down_proj")
    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(..., H) hidden states -> (T, H), (T, E) router logits."""
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)
        scores, router_logits = self.router(hidden_states)
        top_k_index = router_logits.topk(self.top_k, dim=1).indices  # as in the router
        rows = hidden_states.unsqueeze(1) * scores.gather(1, top_k_index).unsqueeze(2)
        rows = rows.view(-1, self.hidden_dim)
        weights = self.experts.gate_up_proj.mT, self.experts.down_proj.mT
        routed = _gated(self.experts, rows, top_k_index.view(-1, 1), rows.new_ones(rows.shape[0], 1), *weights)
        routed = routed.view(-1, self.top_k, self.hidden_dim).sum(dim=1)
        return self.shared_expert(hidden_states) + routed, router_logits


class LongcatFlashExperts(nn.Module):
    """Experts with weights, and after them others, without any, that return what they get."""

    can_torch_compile = True
    has_backward = True

    @_or_stock("gate_up_proj", "down_proj")
    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """(T, H) hidden states, (T, top_k) expert ids, (T, top_k) weights -> (T, H)."""
        # gate_up_proj has rows for all of them. Ids from num_routed_experts on are skipped.
        weights = self.gate_up_proj[: self.num_routed_experts], self.down_proj
        out = _gated(self, hidden_states, top_k_index, top_k_weights, *weights)
        identity = top_k_weights.masked_fill(top_k_index < self.num_routed_experts, 0).sum(dim=1, keepdim=True)
        return (out + hidden_states * identity).to(hidden_states.dtype)


class Step3p7Experts(nn.Module):
    """Clamps, where it does, after the activation: none of our gates."""

    can_torch_compile = True
    has_backward = True

    @_or_stock("gate_up_proj", "down_proj")
    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """(T, H) hidden states, (T, top_k) expert ids, (T, top_k) weights -> (T, H)."""
        inputs = (hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj)
        out = _gated(self, *inputs) if self.limit == inf else lora.moe_experts_lora(*inputs, (), (), self._apply_gate)
        return out.to(hidden_states.dtype)


# By the folder in transformers.models; a layer has the name of the class.
SERVED = {
    "dbrx": DbrxExperts,
    "jetmoe": JetMoeParallelExperts,
    "llama4": Llama4TextMoe,
    "longcat_flash": LongcatFlashExperts,
    "step3p7": Step3p7Experts,
}


def served_classes() -> Iterator[tuple[type, type]]:
    """(class, layer) for what this Transformers has of `SERVED`, with the forward that we know.

    No decorator tells when one of these is imported, so they are imported here, in a tenth of a second.
    """
    for model, layer in SERVED.items():
        modeling = f"transformers.models.{model}.modeling_{model}"
        if importlib.util.find_spec(f"transformers.models.{model}") is None:
            continue
        cls = getattr(importlib.import_module(modeling), layer.__name__, None)
        if cls is not None and _arguments(cls) == _arguments(layer):
            yield cls, layer


def _arguments(cls: type) -> list[str]:
    return list(inspect.signature(cls.forward).parameters)


def may_replace_forward(cls: type, layer: type, module: nn.Module) -> bool:
    """The `kernel_condition` of a class: may `kernelize` assign `module.forward`?

    Only that of Transformers' own: no wrapper's on the module, no other library's on the class, no subclass's.
    """
    if type(module) is not cls or cls.forward.__module__ != cls.__module__:
        return False
    return getattr(module.forward, "__func__", None) in (cls.forward, layer.forward)
