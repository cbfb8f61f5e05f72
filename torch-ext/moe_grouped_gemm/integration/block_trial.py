"""Which MoE block a module computes, and which MLP its shared experts are, found out by trial.

A block's forward runs with stand-ins in place of its children: they note what they are given and return random numbers,
of which the forward makes a block of ours or something else. An MLP is tried likewise, around its real activation. What
the forward reads of the module is remembered, as gates.py does it.
"""

from __future__ import annotations

import itertools
from typing import Callable, NamedTuple

import torch
from torch import nn

from ..reference import ACTIVATIONS, Gate, apply_gate
from . import modules, routers, switching
from .gates import MISSING, OPAQUE, Recorder, activation_name, is_closed, plain, undisturbed
from .router_forms import get, router_of

_TOKENS = (2, 3)  # batch and sequence of a block's trial
_MOST_TRIALS = 256


class Block(NamedTuple):
    """routed(x) * factor + shared(x) * sigmoid(shared_gate(x)), of any shape (B, S, H).

    Attributes:
        router, experts: names of its children.
        shared, shared_gate: likewise; or None, without them.
        correction: of the tensor that the router is given besides hidden states; or None.
        factor: of what the routed experts return.
        returns_weights: whether the forward returns the routing weights as well.
    """

    router: str
    experts: str
    shared: str | None
    shared_gate: str | None
    correction: str | None
    factor: float
    returns_weights: bool


class SharedMLP(NamedTuple):
    """down(act(gate(x)) * up(x)): the names of its linear layers, and ours of the activation."""

    gate: str
    up: str
    down: str
    activation: str


# As in gates.py: of each forward and dtype what it read, and what it then was; None if nothing that we know.
_TRIED: dict[tuple[Callable, torch.dtype], list[tuple[dict[str, object], Block | SharedMLP | None]]] = {}


def block_of(module: nn.Module, dtype: torch.dtype) -> Block | None:
    """The block that the module is for hidden states of this dtype; None if none of ours, or if that is not sure."""
    return _found(module, dtype, _try_block)


def shared_mlp_of(module: nn.Module, dtype: torch.dtype) -> SharedMLP | None:
    """The MLP that the module is; likewise."""
    return _found(module, dtype, _try_mlp)


def _found(module: nn.Module, dtype: torch.dtype, attempt: Callable) -> Block | SharedMLP | None:
    forward = switching.below_ours(type(module).forward)
    for reads, found in _TRIED.get((forward, dtype), ()):
        if all(_seen(_get(module, name)) == value for name, value in reads.items()):
            return found
    if torch.compiler.is_compiling():
        return None
    stand_in = _StandIn(module)
    found = None
    if is_closed(forward):
        with undisturbed():
            try:
                found = attempt(module, forward, stand_in, dtype)
            except LookupError:  # of nothing that is remembered
                return None
            except Exception:  # whatever it is not written for
                found = None
    found = None if OPAQUE in stand_in.reads.values() else found
    tried = _TRIED.setdefault((forward, dtype), [])
    tried.append((stand_in.reads, found))
    del tried[:-_MOST_TRIALS]
    return found


def _get(module: nn.Module, name: str) -> object:
    """Past nn.Module's own look-up, which takes a microsecond for a child."""
    child = module._modules.get(name)
    return getattr(module, name, MISSING) if child is None else child


def _seen(value: object) -> object:
    """What a read of this value is remembered as."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape)
    if isinstance(value, nn.Module):
        return activation_name(value) or type(value)
    return plain(value)


class _Child:
    """Stands in for a child: counts as called once, with what it was given."""

    def __init__(self, module: nn.Module, answer: Callable):
        self.module, self._answer, self.given = module, answer, None

    def __call__(self, *args):
        if self.given is not None:
            raise TypeError("called twice")
        self.given = args
        self.answer = self._answer(self.module, *args)
        return self.answer


class _StandIn(Recorder):
    """Takes the module's place in its own forward, with children that `answer` and tensors that are random."""

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.__dict__.update(children={}, tensors={}, answer=None)

    def __getattr__(self, name: str):
        value = getattr(self._module, name, MISSING)
        if isinstance(value, torch.Tensor):
            self.reads[name] = _seen(value)
            return self.tensors.setdefault(name, torch.randn(value.shape, dtype=torch.float32))
        if isinstance(value, nn.Module) and activation_name(value) is None:
            self.reads[name] = _seen(value)
            return self.children.setdefault(name, _Child(value, self.answer))
        return super().__getattr__(name)

    def answers(self, answer: Callable) -> None:
        """So do children from now on."""
        self.__dict__["answer"] = answer


# --- blocks -----------------------------------------------------------------------------------------------------------


def _try_block(module: nn.Module, forward: Callable, stand_in: _StandIn, dtype: torch.dtype) -> Block | None:
    hidden_dim = _hidden_dim(module, dtype)
    x = torch.randn(*_TOKENS, hidden_dim, dtype=torch.float32).to(dtype)
    given = x.clone()

    def answer(child, *args):
        if modules.is_experts(child):
            return torch.randn(args[0].shape, dtype=torch.float32).to(dtype)
        if routers.is_one(child):
            router, tokens = router_of(child, dtype), args[0].shape[:-1].numel()
            E, k = get(child, router.weight).shape[0], router.form.top_k
            weights = torch.rand(tokens, k, dtype=torch.float32).to(router.form.weights_dtype or torch.float32)
            results = torch.randn(tokens, E, dtype=torch.float32), weights, torch.randint(0, E, (tokens, k))
            return tuple(results[role] for role in router.order)
        width = 1 if getattr(child, "out_features", None) == 1 else args[0].shape[-1]
        return torch.randn(*args[0].shape[:-1], width, dtype=torch.float32).to(dtype)

    stand_in.answers(answer)
    result = forward(stand_in, given)
    if not torch.equal(given, x):
        return None
    roles = {"router": [], "experts": [], "shared": [], "shared_gate": []}
    for name, child in stand_in.children.items():
        if child.given is None:
            return None
        roles[_role(child.module)].append(name)
    if [len(roles["router"]), len(roles["experts"])] != [1, 1] or len(roles["shared"]) > 1:
        return None
    router, experts, shared, shared_gate = (stand_in.children[names[0]] if names else None for names in roles.values())
    order = router_of(router.module, dtype).order
    weights, ids = (router.answer[order.index(role)] for role in (1, 2))
    hidden_states, *correction = router.given
    corrections = [name for name, tensor in stand_in.tensors.items() if [id(tensor)] == list(map(id, correction))]
    rows = x.flatten(0, 1)
    inputs = [child.given for child in (shared, shared_gate) if child is not None]
    if not (
        torch.equal(hidden_states.reshape(rows.shape), rows)
        and len(corrections) == len(correction) == len(stand_in.tensors)
        and len(experts.given) == 3
        and all(map(torch.equal, experts.given, (rows, ids, weights)))
        and all(len(args) == 1 and torch.equal(args[0].reshape(rows.shape), rows) for args in inputs)
        and (shared is not None or shared_gate is None)
    ):
        return None
    returns_weights = isinstance(result, tuple)
    if returns_weights:
        result, returned = result
        if returned is not weights:
            return None
    addend = 0.0 if shared is None else shared.answer.reshape(rows.shape)
    if shared_gate is not None:
        addend = addend * shared_gate.answer.reshape(-1, 1).sigmoid()
    factors = dict.fromkeys((1.0, *(float(v) for v in stand_in.reads.values() if type(v) in (int, float))))
    for factor in factors:
        if result.shape == x.shape and result.dtype == dtype:
            if _is_near(result.flatten(0, 1), experts.answer.float() * factor + addend, dtype):
                names = (roles[role][0] if roles[role] else None for role in ("shared", "shared_gate"))
                children = (roles["router"][0], roles["experts"][0], *names)
                return Block(*children, corrections[0] if corrections else None, factor, returns_weights)
    return None


def _role(child: nn.Module) -> str:
    if modules.is_experts(child):
        return "experts"
    if routers.is_one(child):
        return "router"
    return "shared_gate" if getattr(child, "out_features", None) == 1 else "shared"


def _hidden_dim(module: nn.Module, dtype: torch.dtype) -> int:
    """Of the block's router: forwards reshape by it.

    Raises:
        LookupError: it has not one router of ours for hidden states of this dtype, as it is now.
    """
    for child in module._modules.values():
        router = router_of(child, dtype) if child is not None and routers.is_one(child) else None
        if router is not None:
            return get(child, router.weight).shape[1]
    raise LookupError


def _is_near(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> bool:
    """Up to three roundings to the dtype, of numbers as large as the terms of the sum."""
    tolerance = 8 * torch.finfo(dtype).eps
    return torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance)


# --- shared experts ---------------------------------------------------------------------------------------------------


def _try_mlp(module: nn.Module, forward: Callable, stand_in: _StandIn, dtype: torch.dtype) -> SharedMLP | None:
    x = torch.randn(4, 3, dtype=torch.float32).to(dtype)
    values = torch.linspace(-12, 12, 64, dtype=torch.float32).to(dtype)

    def answer(child, *args):
        is_inner = args[0].shape[1] == x.shape[1]
        return values[torch.randperm(len(values))].expand(4, -1) if is_inner else x + 1

    stand_in.answers(answer)
    result = forward(stand_in, x.clone())
    inner = [name for name, child in stand_in.children.items() if child.given[0].shape[1] == x.shape[1]]
    outer = [name for name in stand_in.children if name not in inner]
    if len(inner) != 2 or len(outer) != 1 or stand_in.tensors:
        return None
    children = [stand_in.children[name] for name in (*inner, *outer)]
    if not all(len(child.given) == 1 for child in children) or result is not children[2].answer:
        return None
    if not all(torch.equal(child.given[0], x) for child in children[:2]):
        return None
    for order, activation in itertools.product(((0, 1), (1, 0)), ACTIVATIONS):
        z = torch.cat([children[i].answer for i in order], dim=1)
        if activation != "swigluoai" and _is_near(children[2].given[0], apply_gate(z.float(), Gate(activation)), dtype):
            return SharedMLP(*(inner[i] for i in order), outer[0], activation)
    return None
