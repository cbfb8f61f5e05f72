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
from .gates import (
    MISSING,
    OPAQUE,
    Recorder,
    activation_name,
    grid,
    is_closed,
    is_near,
    moderate,
    plain,
    same,
    undisturbed,
)
from .router_forms import DTYPES, get, router_of
from .router_trial import Router

_MOST_TRIALS = 256


class Block(NamedTuple):
    """routed(x) * factor + shared(x) * sigmoid(shared_gate(x)), of any shape (B, S, H).

    Attributes:
        router, experts: names of its children.
        shared, shared_gate: likewise; or None, without them.
        shared_rank: of the hidden states that they are given, (T, H) or (B, S, H).
        correction: of the tensor that the router is given besides hidden states; or None.
        factor: of what the routed experts return.
        returns_weights: whether the forward returns the routing weights as well.
    """

    router: str
    experts: str
    shared: str | None
    shared_gate: str | None
    shared_rank: int
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


class _NotYet(Exception):
    """What a trial needs to know is not known: its answer is not remembered."""


def block_of(module: nn.Module, dtype: torch.dtype) -> Block | None:
    """The block that the module is for hidden states of this dtype; None if none of ours, or if that is not sure."""
    # Somebody may have wrapped the forward of the class since, and calls ours.
    return _found(module, dtype, _try_block) if switching.is_own(type(module).forward) else None


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
    reads, found = {}, None
    if is_closed(forward):
        with undisturbed():
            try:
                found = attempt(module, forward, dtype, reads)
            except _NotYet:
                return None
            except Exception:  # whatever it is not written for
                found = None
    found = None if OPAQUE in reads.values() else found
    tried = _TRIED.setdefault((forward, dtype), [])
    tried.append((reads, found))
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
        # By name: Transformers may make a class anew, and what is remembered here is not to keep the old one.
        return activation_name(value) or f"{type(value).__module__}.{type(value).__qualname__}"
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

    def __init__(self, module: nn.Module, answer: Callable, reads: dict[str, object]):
        super().__init__(module)
        self.__dict__.update(children={}, tensors={}, answer=answer, reads=reads)

    def __getattr__(self, name: str):
        value = getattr(self._module, name, MISSING)
        if isinstance(value, torch.Tensor):
            self.reads[name] = _seen(value)
            return self.tensors.setdefault(name, torch.randn(value.shape, dtype=torch.float32))
        if isinstance(value, nn.Module) and activation_name(value) is None:
            self.reads[name] = _seen(value)
            return self.children.setdefault(name, _Child(value, self.answer))
        return super().__getattr__(name)


# --- blocks -----------------------------------------------------------------------------------------------------------


def _try_block(module: nn.Module, forward: Callable, dtype: torch.dtype, reads: dict) -> Block | None:
    """In fp32, which tells a factor of 1.001, and in the dtype: of any size, number of tokens and kind of numbers."""
    router = _router_of(module)
    found = _run_block(module, forward, torch.float32, reads, router, (2, 3))
    cases = ((2, 3), 1.0, ()), ((1, 1), 1.0, ()), ((1, 40), 1.0, ()), ((2, 3), 1e4, ()), ((2, 3), 1e-4, ())
    cases += (((2, 3), 1.0, (float("inf"), float("-inf"), float("nan"))),)
    for one, case in itertools.product(dict.fromkeys((torch.float32, dtype)), cases):
        if found is None or found != _run_block(module, forward, one, reads, router, *case, found.factor):
            return None
    return found


def _run_block(module, forward, dtype, reads, of_router, shape, scale=1.0, special=(), factor=None) -> Block | None:
    """special: numbers among the others. factor: the only one that may be; None: any number that the forward reads."""
    child, form = of_router
    E, hidden_dim = get(child, form.weight).shape

    def numbers(*size):
        result = scale * torch.randn(size, dtype=torch.float32)
        result.view(-1)[: len(special)] = torch.tensor(special)
        return result.to(dtype)

    def answer(child, *args):
        if modules.is_experts(child):
            return numbers(*args[0].shape)
        if routers.KIND.is_one(child):
            tokens, k = args[0].shape[:-1].numel(), form.form.top_k
            weights = torch.rand(tokens, k, dtype=torch.float32).to(form.form.weights_dtype or torch.float32)
            results = torch.randn(tokens, E, dtype=torch.float32), weights, torch.randint(0, E, (tokens, k))
            return tuple(results[role] for role in form.order)
        width = 1 if getattr(child, "out_features", None) == 1 else args[0].shape[-1]
        return numbers(*args[0].shape[:-1], width)

    x = numbers(*shape, hidden_dim)
    given, stand_in = x.clone(), _StandIn(module, answer, reads)
    result = forward(stand_in, given)
    if not _equal(given, x) or any(child.given is None for child in stand_in.children.values()):
        return None
    roles = {"router": [], "experts": [], "shared": [], "shared_gate": []}
    for name, child in stand_in.children.items():
        roles[_role(child.module)].append(name)
    if [len(roles["router"]), len(roles["experts"])] != [1, 1] or len(roles["shared"]) > 1:
        return None
    router, experts, shared, shared_gate = (stand_in.children[names[0]] if names else None for names in roles.values())
    weights, ids = (router.answer[form.order.index(role)] for role in (1, 2))
    hidden_states, *correction = router.given
    corrections = [name for name, tensor in stand_in.tensors.items() if [id(tensor)] == list(map(id, correction))]
    rows = x.flatten(0, 1)
    inputs = [child.given for child in (shared, shared_gate) if child is not None]
    if not (
        _equal(hidden_states.reshape(rows.shape), rows)
        and len(corrections) == len(correction) == len(stand_in.tensors)
        and len(experts.given) == 3
        and all(map(_equal, experts.given, (rows, ids, weights)))
        and all(len(args) == 1 and _equal(args[0].reshape(rows.shape), rows) for args in inputs)
        and (shared is not None or shared_gate is None)
    ):
        return None
    returns_weights = isinstance(result, tuple)
    if returns_weights:
        result, returned = result
        if returned is not weights:
            return None
    terms = [experts.answer.double()]
    if shared is not None:
        gate = 1.0 if shared_gate is None else shared_gate.answer.reshape(-1, 1).double().sigmoid()
        terms.append(shared.answer.reshape(rows.shape).double() * gate)
    if result.shape != x.shape or result.dtype != dtype:
        return None
    read = (float(value) for value in reads.values() if type(value) in (int, float))
    for tried in dict.fromkeys((1.0, *read)) if factor is None else (factor,):
        if _is_sum(result.flatten(0, 1), [terms[0] * tried, *terms[1:]]):
            names = (roles[role][0] if roles[role] else None for role in ("shared", "shared_gate"))
            children = (roles["router"][0], roles["experts"][0], *names)
            rank = 0 if shared is None else shared.given[0].ndim
            return Block(*children, rank, corrections[0] if corrections else None, tried, returns_weights)
    return None


def _role(child: nn.Module) -> str:
    if modules.is_experts(child):
        return "experts"
    if routers.KIND.is_one(child):
        return "router"
    return "shared_gate" if getattr(child, "out_features", None) == 1 else "shared"


def _router_of(module: nn.Module) -> tuple[nn.Module, Router]:
    """The block's router, and what it is for hidden states of some dtype.

    Raises:
        _NotYet: it has none of ours, as it is now.
    """
    for child in module._modules.values():
        if child is not None and routers.KIND.is_one(child):
            for dtype in DTYPES:
                router = router_of(child, dtype)
                if router is not None:
                    return child, router
    raise _NotYet


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=0, atol=0, equal_nan=True)


def _is_sum(a: torch.Tensor, terms: list[torch.Tensor]) -> bool:
    """Up to the roundings of the terms, and of their sum, to the dtype of a; what has no size is the same."""
    info, total, size = torch.finfo(a.dtype), sum(terms), sum(term.abs() for term in terms)
    near = (a.double() - total).abs() <= 4 * info.eps * size + info.tiny
    equal = (a.isnan() & total.isnan()) | (a == total.to(a.dtype))
    return bool(torch.where(size < info.max / 4, near, equal).all())


# --- shared experts ---------------------------------------------------------------------------------------------------


def _try_mlp(module: nn.Module, forward: Callable, dtype: torch.dtype, reads: dict) -> SharedMLP | None:
    """In fp32 on every pair of magnitudes, infinities and NaN, and in the dtype on moderate ones."""
    z = grid(interleaved=False)
    found = _run_mlp(module, forward, reads, z)
    if found is None or _run_mlp(module, forward, reads, moderate(z).to(dtype), found.activation) != found:
        return None
    return found


def _run_mlp(module, forward, reads, z, activation=None) -> SharedMLP | None:
    """z: what the two inner layers return, side by side. activation: the only one that may be; None: any."""
    x, halves = torch.randn(len(z), 3, dtype=torch.float32).to(z.dtype), list(z.clone().chunk(2, dim=1))

    def answer(child, *args):  # as apply_gate cuts them: gelu's tail depends on how memory is gone through
        return halves.pop(0) if args[0].shape == x.shape else torch.randn_like(x)

    stand_in = _StandIn(module, answer, reads)
    result = forward(stand_in, x.clone())
    given = {name: child.given for name, child in stand_in.children.items()}
    inner = [name for name, args in given.items() if len(args) == 1 and args[0].shape == x.shape]
    outer = [name for name in given if name not in inner]
    if len(inner) != 2 or len(outer) != 1 or halves or stand_in.tensors:
        return None
    if result is not stand_in.children[outer[0]].answer or len(given[outer[0]]) != 1:
        return None
    if not all(torch.equal(given[name][0], x) for name in inner):
        return None
    named = [value for value in reads.values() if value in ACTIVATIONS]
    (a,) = given[outer[0]]
    for (gate, up), name in itertools.product((inner, inner[::-1]), named if activation is None else [activation]):
        answers = torch.cat([stand_in.children[gate].answer, stand_in.children[up].answer], dim=1)
        is_as = same if z.dtype == torch.float32 else is_near
        if name != "swigluoai" and is_as(a, apply_gate(answers.float(), Gate(name))):
            return SharedMLP(gate, up, outer[0], name)
    return None
