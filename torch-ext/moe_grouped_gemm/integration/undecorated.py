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
from math import inf
from typing import Callable

import torch
from torch import nn

from .. import functional
from ..experts import blocks
from ..torch_ops import autocast
from . import stand_ins, switching
from .gates import activation_name
from .modules import is_plain, unparametrized
from .switching import Layer, switches_on


def _is_readable(module: nn.Module, path: str) -> bool:
    """Whether the weight is a dense tensor which we may read without calling the submodule that owns it.

    We may not if there is more to that call than stock's forward: hooks, or a wrapper such as PEFT's. To say so, no
    parametrized weight is computed: whoever serves the module then reads it once.
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
    return is_plain(unparametrized(owner, name))


def _gated(module, hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj):
    """`moe_experts` with the `act_fn` of the module, whatever it is."""
    inputs = (hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj)
    activation = activation_name(module.act_fn)
    if activation is not None:
        return functional.moe_experts(*inputs, activation)

    def gate(z):
        gate, up = z.chunk(2, dim=-1)
        return module.act_fn(gate) * up

    return functional.moe_experts_lora(*inputs, (), (), gate)


# `self` is the Transformers module.


class DbrxExperts(Layer):
    """Three weights (E * I, H), of gate, up and down, the last one transposed."""

    @switches_on
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
        rows = blocks.gather(x, slots, positions)
        # A product each: joined into one weight, gate and up would be copied in every call.
        a = self.mlp.activation_fn(functional.grouped_gemm(rows, gate, offsets))
        a = a * functional.grouped_gemm(rows, up, offsets)
        out = blocks.combine(functional.grouped_gemm(a, down.mT, offsets), top_k_weights, slots, positions)
        return out.to(hidden_states.dtype).view(hidden_states.shape)


class JetMoeParallelExperts(Layer):
    """One grouped GEMM, of MLPs and of attention; rows come sorted."""

    @switches_on
    def forward(self, inputs: torch.Tensor, expert_size: list[int]) -> torch.Tensor:
        """(S, in) rows sorted by expert, how many each has -> (S, out)."""
        offsets = torch.tensor([0, *itertools.accumulate(expert_size)], dtype=torch.int32, device=inputs.device)
        return functional.grouped_gemm(*autocast(inputs, self.weight), offsets)


class Llama4TextMoe(Layer):
    """The whole block: its experts get all tokens, times a score that is zero but for the chosen ones.

    As the score multiplies what an expert gets, each slot is a token of its own here.
    """

    @switches_on
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


class LongcatFlashExperts(Layer):
    """Experts with weights, and after them others, without any, that return what they get."""

    @switches_on
    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """(T, H) hidden states, (T, top_k) expert ids, (T, top_k) weights -> (T, H)."""
        # gate_up_proj has rows for all of them. Ids from num_routed_experts on are skipped.
        weights = self.gate_up_proj[: self.num_routed_experts], self.down_proj
        out = _gated(self, hidden_states, top_k_index, top_k_weights, *weights)
        identity = top_k_weights.masked_fill(top_k_index < self.num_routed_experts, 0).sum(dim=1, keepdim=True)
        return (out + hidden_states * identity).to(hidden_states.dtype)


class Step3p7Experts(Layer):
    """Clamps, where it does, after the activation: none of our gates."""

    @switches_on
    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """(T, H) hidden states, (T, top_k) expert ids, (T, top_k) weights -> (T, H)."""
        inputs = (hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj)
        if self.limit == inf:
            out = _gated(self, *inputs)
        else:
            out = functional.moe_experts_lora(*inputs, (), (), self._apply_gate)
        return out.to(hidden_states.dtype)


# By the folder in transformers.models: a layer, which has the name of the class, and the weights that it reads.
SERVED = {
    "dbrx": (DbrxExperts, ("mlp.w1", "mlp.v1", "mlp.w2")),
    "jetmoe": (JetMoeParallelExperts, ("weight",)),
    "llama4": (Llama4TextMoe, ("experts.gate_up_proj", "experts.down_proj")),
    "longcat_flash": (LongcatFlashExperts, ("gate_up_proj", "down_proj")),
    "step3p7": (Step3p7Experts, ("gate_up_proj", "down_proj")),
}


def make_switchable() -> dict[str, type]:
    """Let `kernelize` switch on what this Transformers has of `SERVED`, with the forward that we know: name -> layer.

    No decorator tells when one of these is imported, so they are imported here, in a tenth of a second.
    """
    layers = {}
    for model, (layer, weights) in SERVED.items():
        if importlib.util.find_spec(f"transformers.models.{model}") is None:
            continue
        modeling = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
        cls = getattr(modeling, layer.__name__, None)
        is_known = cls is not None and _arguments(cls) == _arguments(layer)
        # Not where another library has put its own forward.
        if is_known and (switching.is_ours(cls.forward) or cls.forward.__module__ == modeling.__name__):
            switching.make_switchable(cls, functools.partial(_serve, layer, weights))
            switching.name_for_kernelize(cls, layer.__name__, switching.is_switchable)
            layers[layer.__name__] = layer
        stand_ins.meet(modeling.__name__)
    return layers


def _serve(layer: type, weights: tuple[str, ...], module: nn.Module, stock: Callable, *inputs, **options):
    """What `module` computes, by the layer or, for weights that are not plain tensors, by `stock(module, ...)`."""
    if all(_is_readable(module, name) for name in weights):
        return layer.forward(module, *inputs, **options)
    return stock(module, *inputs, **options)


def _arguments(cls: type) -> list[str]:
    return list(inspect.signature(cls.forward).parameters)
