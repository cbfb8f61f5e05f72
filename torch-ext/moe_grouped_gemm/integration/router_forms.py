"""Which router a module computes, found out by trial.

The forward of its class runs on a copy of the module whose tensors are ours: a weight that lets any logits be asked
for, and biases far from zero. Its logits, choice and weights are compared with those of every form that `topk_router`
has, at magnitudes that tell the forms apart. What the forward reads of the module is remembered: the answer holds for
every module of the class with the same values, and for no other.
"""

from __future__ import annotations

import inspect
import itertools
from types import MethodType
from typing import NamedTuple

import torch
from torch import nn

from ..reference import SCORES, RouterForm, router_choice, router_scores, router_weights
from . import switching
from .gates import is_as_its_class, is_closed, undisturbed

ARGUMENT = "<argument>"
_MISSING, _OPAQUE = "<missing>", "<opaque>"
_INTERNAL = frozenset(dir(nn.Module())) - {"training"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_TENSORS = 4


class Router(NamedTuple):
    """How a module is served.

    Attributes:
        form: from logits on.
        weight, bias, correction: where in the module they are; None: there is none; ARGUMENT: the forward's second.
        order: of (router_logits, topk_weights, topk_indices), the one that the forward returns first, second, third.
        ranks: of the hidden states for which it returns (T, ...).
    """

    form: RouterForm
    weight: str
    bias: str | None
    correction: str | None
    order: tuple[int, ...]
    ranks: tuple[int, ...]


# Of each class and dtype of the hidden states: what its forward read in a trial, and which router it then was; None if
# none of ours. Of the newest trials alone: each layer may have attributes of its own, but models do not have so many.
_MOST_TRIALS = 256
_TRIED: dict[tuple[type, torch.dtype], list[tuple[dict[str, object], Router | None]]] = {}


def may_be_router(cls: type) -> bool:
    """Whether to try: its forward takes hidden states, and at most one tensor more, and something asks for a topk."""
    forward = vars(cls).get("forward")
    functions = [inspect.unwrap(value) for value in vars(cls).values() if inspect.isfunction(value)]
    if forward is None or not any("topk" in function.__code__.co_names for function in functions):
        return False
    kinds = [parameter.kind for parameter in inspect.signature(forward).parameters.values()]
    return len(kinds) in (2, 3) and set(kinds) == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def learn(module: nn.Module) -> None:
    """Find out ahead of torch.compile, for hidden states of any dtype."""
    for dtype in DTYPES:
        router_of(module, dtype)


def router_of(module: nn.Module, dtype: torch.dtype) -> Router | None:
    """The router that it is for hidden states of this dtype; None if it is none of ours, or if that is not sure."""
    cls, is_compiling = type(module), torch.compiler.is_compiling()
    state = {} if is_compiling else module.__dict__  # through which torch.compile does not see
    for reads, router in _TRIED.get((cls, dtype), ()):
        for path, value in reads.items():
            # nn.Module's own lookup takes a microsecond.
            found = state[path] if path in state else get(module, path)
            if found is not value and _remembered(found) != value:
                break
        else:
            return router
    if is_compiling or dtype not in DTYPES:
        return None
    trial = _Trial(module, dtype)
    tried = _TRIED.setdefault((cls, dtype), [])
    tried.append((trial.reads, trial.router))
    del tried[:-_MOST_TRIALS]
    return trial.router


def get(module: nn.Module, path: str) -> object:
    """What is there, or _MISSING."""
    for name in path.split("."):
        module = getattr(module, name, _MISSING)
    return module


def _remembered(value: object) -> object:
    """What a read of this value is remembered as."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        return value.dtype
    if isinstance(value, nn.Module):
        return type(value) if is_as_its_class(value) and is_closed(type(value).forward) else _OPAQUE
    return _OPAQUE


class _Trial:
    """Runs the forward that the class of a module had before us, and compares.

    Attributes:
        reads: path -> what the forward read there.
        router: what it is.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        self.reads: dict[str, object] = {}
        self.router = None
        self._forward = switching.below_ours(type(module).forward)
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        matrices = [path for path, tensor in tensors.items() if tensor.ndim == 2 and min(tensor.shape) > 1]
        if len(tensors) > _MOST_TENSORS or len(matrices) != 1 or not is_closed(self._forward):
            return
        (self._weight,) = matrices
        E, H = tensors[self._weight].shape
        if H <= E or any(t.numel() != E for path, t in tensors.items() if path != self._weight):
            return
        with undisturbed():
            generator = torch.Generator().manual_seed(0)
            weight = torch.zeros(E, H)
            weight[:, :E], weight[:, E] = torch.eye(E), 2.0**-9
            self._tensors = {
                path: (weight if path == self._weight else _bias(tensor.shape, generator)).to(tensor.dtype)
                for path, tensor in tensors.items()
            }
            self._argument = _bias((E,), generator)
            self._x = _hidden_states(E, H, generator).to(dtype)
            try:
                self.router = self._recognised(module)
            except Exception:  # it is not written for what it was given
                self.router = None

    def _recognised(self, module: nn.Module) -> Router | None:
        for path, child in module.named_modules():
            if path and _remembered(child) is _OPAQUE:  # which no trial may call
                self.reads[path] = _OPAQUE
                return None
        flat = [self._run(module, x) for x in (self._x, self._x.unflatten(0, (2, -1)))]
        ranks = tuple(rank for rank, results in zip((2, 3), flat) if results is not None)
        if not ranks:
            return None
        results = flat[ranks[0] - 2]
        again = self._run(module, self._x if ranks[0] == 2 else self._x.unflatten(0, (2, -1)))  # noise differs
        if _OPAQUE in self.reads.values() or not all(map(_same, results, again)):
            return None
        if len(ranks) == 2 and not all(map(_same, *flat)):
            return None
        for order in itertools.permutations(range(3)):
            by_role = [results[order.index(role)] for role in range(3)]
            for bias, correction in self._operands():
                form = self._form(*by_role, self._value(bias), self._value(correction))
                if form is not None:
                    return Router(form, self._weight, bias, correction, order, ranks)
        return None

    def _run(self, module: nn.Module, x: torch.Tensor) -> list[torch.Tensor] | None:
        """Three tensors with a row for each token; None if it does not return such."""
        clone, given = self._clone(module, ""), x.clone()
        arguments = [self._argument.clone()] * (len(inspect.signature(self._forward).parameters) - 2)
        before = {path: tensor.clone() for path, tensor in self._tensors.items()}
        try:
            results = self._forward(clone, given, *arguments)
        except Exception:
            return None
        untouched = all(torch.equal(before[path], tensor) for path, tensor in self._tensors.items())
        if not (untouched and torch.equal(given, x) and isinstance(results, tuple) and len(results) == 3):
            return None
        if not all(isinstance(r, torch.Tensor) and r.ndim == 2 and len(r) == len(self._x) for r in results):
            return None
        return list(results)

    def _clone(self, module: nn.Module, prefix: str) -> nn.Module:
        """A module of the same class with our tensors, that notes what is read of it."""
        cls, note = type(module), self._note

        def __getattribute__(self, name):
            value = cls.__getattribute__(self, name)
            note(self, prefix, name, value)
            return value

        def __getattr__(self, name):
            try:
                value = cls.__getattr__(self, name)
            except AttributeError:
                note(self, prefix, name, _MISSING)
                raise
            note(self, prefix, name, value)
            return value

        def __setattr__(self, name, value):
            raise TypeError(f"{name} is written: more than a function")

        hooks = {"__getattribute__": __getattribute__, "__getattr__": __getattr__, "__setattr__": __setattr__}
        clone = object.__new__(type(cls.__name__, (cls,), hooks))
        state = dict(vars(module))
        for kind in ("_parameters", "_buffers"):
            state[kind] = {name: self._tensors.get(prefix + name) for name in state[kind]}
        state["_modules"] = {
            name: self._clone(child, f"{prefix}{name}.") if _has_tensors(child) else child
            for name, child in state["_modules"].items()
        }
        object.__getattribute__(clone, "__dict__").update(state)
        return clone

    def _note(self, module: nn.Module, prefix: str, name: str, value: object) -> None:
        if name in _INTERNAL or name.startswith("__"):
            return
        if isinstance(value, MethodType) and value.__self__ is module:
            if not is_closed(value.__func__):
                self.reads[prefix + name] = _OPAQUE
        elif isinstance(value, nn.Module) and _has_tensors(value):
            self.reads.setdefault(prefix + name, type(value).__base__)  # of the clone
        else:
            self.reads[prefix + name] = _remembered(value)

    def _operands(self):
        """Where bias and correction bias may be: each in one of the vectors that were read, or nowhere."""
        vectors = [path for path in self._tensors if path != self._weight and path in self.reads]
        if len(inspect.signature(self._forward).parameters) == 3:
            vectors.append(ARGUMENT)
        for bias, correction in itertools.product((None, *vectors), repeat=2):
            if bias is None or bias not in (ARGUMENT, correction):
                yield bias, correction

    def _value(self, path: str | None) -> torch.Tensor | None:
        if path is None:
            return None
        return (self._argument if path == ARGUMENT else self._tensors[path]).flatten().float()

    def _form(self, logits, weights, indices, bias, correction) -> RouterForm | None:
        E, k = len(self._tensors[self._weight]), indices.shape[1]
        floats = logits.is_floating_point() and weights.is_floating_point()
        if not floats or indices.dtype != torch.int64 or logits.shape[1] != E or weights.shape != indices.shape:
            return None
        if not ((0 <= indices) & (indices < E)).all() or (indices.sort(dim=1)[0].diff(dim=1) == 0).any():
            return None
        product = self._x.double() @ self._tensors[self._weight].double().T
        product = (product if bias is None else product + bias.double()).float()
        halves = [d for d in dict.fromkeys((self._x.dtype, self._tensors[self._weight].dtype)) if d != torch.float32]
        for product_dtype in (None, *halves):
            if _is_product(logits.float(), product, product_dtype):
                break
        else:
            return None
        logits_dtype, weights_dtype = (_but_fp32(x.dtype) for x in (logits, weights))
        logits = logits.float()
        for chosen in self._choices(k, E, product_dtype):
            form = chosen._replace(product_dtype=product_dtype, logits_dtype=logits_dtype, weights_dtype=weights_dtype)
            scores = router_scores(logits, form)
            if _are_chosen(indices, router_choice(logits, scores, correction, form), form, correction):
                found = self._weighted(form, scores.gather(1, indices), weights)
                if found is not None:
                    return found
        return None

    def _choices(self, k: int, E: int, product_dtype):
        """Every way to choose, with the numbers that the forward reads."""
        integers = {value for value in self.reads.values() if type(value) is int}
        groups = [(1, 1, "top2")]
        for num_group, topk_group in itertools.product(sorted(integers), repeat=2):
            if num_group > 1 and E % num_group == 0 and k * num_group <= topk_group * E < num_group * E:
                kinds = ("top2", "max") if E >= 2 * num_group else ("max",)
                groups += [(num_group, topk_group, kind) for kind in kinds]
        # Where the sum of the chosen is 1, "softmax" is the same, and takes longer.
        order = ("softmax_of_chosen", *(scoring for scoring in SCORES if scoring != "softmax_of_chosen"))
        for (num_group, topk_group, group_score), scoring in itertools.product(groups, order):
            form = RouterForm(k, num_group, topk_group, scoring=scoring, group_score=group_score)
            yield form._replace(choose_by="logits")
            if scoring != "softmax_of_chosen":
                for scores_dtype in dict.fromkeys((None, product_dtype)):
                    yield form._replace(scores_dtype=scores_dtype)

    def _weighted(self, form: RouterForm, scores: torch.Tensor, weights: torch.Tensor) -> RouterForm | None:
        """With the norm and the factor by which these scores of the chosen have these weights."""
        constants = [value for value in self._forward.__code__.co_consts if type(value) is float]
        numbers = [float(value) for value in self.reads.values() if type(value) in (int, float)] + constants
        small = sorted({value for value in numbers if 0 < value < 1e-2})
        norms = [(False, 0.0, 0.0), (True, 0.0, 0.0)]
        norms += [(True, eps, 0.0) for eps in small] + [(True, 0.0, least) for least in small]
        factors = dict.fromkeys((1.0, *(value for value in numbers if value > 0), 1 / form.top_k))
        half = form.scores_dtype or form.weights_dtype
        rtol = 1e-5 if half is None else 4 * torch.finfo(half).eps
        for (norm, eps, least), factor in itertools.product(norms, factors):
            tried = form._replace(norm_topk_prob=norm, norm_eps=eps, norm_min=least, routed_scaling_factor=factor)
            expected = router_weights(scores, tried).to(weights.dtype)
            if torch.allclose(weights.float(), expected.float(), rtol=rtol, atol=1e-35, equal_nan=True):
                return tried
        return None


def _has_tensors(module: nn.Module | None) -> bool:
    return module is not None and any(True for _ in itertools.chain(module.parameters(), module.buffers()))


def _bias(shape: tuple, generator: torch.Generator) -> torch.Tensor:
    """Far from zero for half of the experts, and near enough for the others that the scores decide.

    Negative: a class may take the choice of experts out of the race by zeros.
    """
    bias = -torch.randn(shape, generator=generator).abs()
    return torch.where(torch.rand(shape, generator=generator) < 0.5, bias / 2, bias / 512)


def _hidden_states(E: int, H: int, generator: torch.Generator) -> torch.Tensor:
    """The logits that we want, in E columns; one that adds to all of them what 16 bits round; and noise in the rest.

    Of moderate size; so large that sigmoids are 1; so small that a sum of sigmoids is about 1e-20, or that all of them
    are zero; and so far from one of them that the sum of the others' shares is about 1e-20, too.
    """
    rows = [scale * torch.randn(24, E, generator=generator) for scale in (0.5, 2.0, 6.0, 10.0)]
    rows += [25 + 2 * torch.randn(8, E, generator=generator), -46 + torch.randn(8, E, generator=generator)]
    rows += [-130 + torch.randn(8, E, generator=generator), -25 + torch.randn(16, E, generator=generator)]
    rows[-1][torch.arange(16), torch.arange(16) % E] = 25
    logits = torch.cat(rows)
    return torch.cat([logits, torch.randn(len(logits), H - E, generator=generator)], dim=1)


def _is_product(logits: torch.Tensor, product: torch.Tensor, dtype: torch.dtype | None) -> bool:
    if dtype is None:
        return torch.allclose(logits, product, rtol=2e-6, atol=1e-6)
    eps = torch.finfo(dtype).eps
    return torch.equal(logits, logits.to(dtype).float()) and torch.allclose(logits, product, rtol=2 * eps, atol=eps)


def _are_chosen(indices, choice, form: RouterForm, correction) -> bool:
    """Whether these experts are of the greatest choice, whichever of equals they are."""
    wanted = choice.topk(form.top_k)[0]
    got = choice.gather(1, indices).sort(dim=1, descending=True)[0]
    rows = torch.ones(len(choice), dtype=torch.bool)
    if form.num_group > 1 and correction is None:
        # Scores that are zero in 16 bits are as good as those of other groups, where a class sets these to zero.
        rows = wanted[:, -1] > 0
    return torch.allclose(got[rows], wanted[rows], rtol=2e-6, atol=1e-30)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-35, equal_nan=True)


def _but_fp32(dtype: torch.dtype) -> torch.dtype | None:
    return None if dtype == torch.float32 else dtype
