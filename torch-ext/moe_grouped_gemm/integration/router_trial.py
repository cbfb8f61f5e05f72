"""A trial of a module's forward: which router of `topk_router` it computes, if any.

The forward of its class runs on a copy of the module whose tensors are ours: random weights, and biases far from zero.
The hidden states are made such that the logits tell the forms apart: they are large, small, near to each other and not
finite. Logits, choice, weights and gradients are compared with those of every form. All that the forward reads of the
module is noted: with other values it may be another router.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from types import MethodType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..reference import SCORES, RouterForm, rounded, router_choice, router_scores, router_weights
from . import switching
from .gates import is_as_its_class, is_closed, undisturbed

ARGUMENT = "<argument>"
MISSING, OPAQUE = "<missing>", "<opaque>"
_INTERNAL = frozenset(dir(nn.Module())) - {"training"}
_MOST_TENSORS = 4
_MODERATE, _SPECIAL = 96, 4  # rows of the hidden states: the first ones, and the last


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


def remembered(value: object) -> object:
    """What tells whether something that a forward reads is as it was; OPAQUE, if that is not enough."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape)
    if isinstance(value, MethodType):
        return value.__func__ if is_closed(value.__func__) else OPAQUE
    if isinstance(value, nn.Module):
        return type(value) if is_as_its_class(value) and is_closed(type(value).forward) else OPAQUE
    return OPAQUE


class Trial:
    """Of a module, with hidden states of this dtype.

    Attributes:
        reads: path -> what the forward read there, or what else decided.
        router: what it is; None, if none of ours.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        self.reads: dict[str, object] = {}
        self.router = None
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        children = {path: child for path, child in module.named_modules() if path}
        self.reads.update((path, remembered(value)) for path, value in {**tensors, **children}.items())
        # Somebody may have wrapped the forward of the class since, and calls ours.
        if not switching.is_own(type(module).forward) or OPAQUE in self.reads.values():
            return
        self._forward = switching.below_ours(type(module).forward)
        matrices = [path for path, tensor in tensors.items() if tensor.ndim == 2 and min(tensor.shape) > 1]
        if len(tensors) > _MOST_TENSORS or len(matrices) != 1 or not is_closed(self._forward):
            return
        (self._weight,) = matrices
        E, H = tensors[self._weight].shape
        if H <= E or any(t.numel() != E for path, t in tensors.items() if path != self._weight):
            return
        self._takes_two = len(inspect.signature(self._forward).parameters) == 3
        with undisturbed(), contextlib.suppress(Exception):  # whatever it is not written for
            generator = torch.Generator().manual_seed(0)
            weight = _normal((E, H), generator) * torch.linspace(0.5, 2, E, dtype=torch.float32)[:, None]
            self._tensors = {
                path: (weight if path == self._weight else _bias(tensor.shape, generator)).to(tensor.dtype)
                for path, tensor in tensors.items()
            }
            self._argument = _bias((E,), generator)
            self._x = _hidden_states(self._tensors[self._weight].float(), dtype, generator)
            self.router = self._recognised(module)

    # --- running ---

    def _recognised(self, module: nn.Module) -> Router | None:
        by_rank = {2: self._x, 3: self._x.unflatten(0, (2, -1))}
        found = {rank: results for rank, x in by_rank.items() if (results := self._run(module, x)) is not None}
        if not found or OPAQUE in self.reads.values():
            return None
        rank, results = next(iter(found.items()))
        others = [*found.values(), self._run(module, by_rank[rank])]  # twice: noise differs
        if not all(_same(a, b) for other in others for a, b in zip(results, other)):
            return None
        for order in itertools.permutations(range(3)):
            by_role = [results[order.index(role)] for role in range(3)]
            if not self._is_plausible(*by_role):
                continue
            for bias, correction in self._operands():
                form = self._form(*by_role, self._value(bias), self._value(correction))
                if form is not None:
                    router = Router(form, self._weight, bias, correction, order, tuple(found))
                    return router if self._has_gradients(module, router, by_role, by_rank[rank]) else None
        return None

    def _run(self, module: nn.Module, x: torch.Tensor, tensors: dict | None = None) -> list[torch.Tensor] | None:
        """Three tensors with a row for each token; None if it does not return such, or does more than that."""
        tensors = self._tensors if tensors is None else tensors
        given, argument = x.clone(), self._argument.clone()
        before = {path: tensor.detach().clone() for path, tensor in tensors.items()}
        try:
            results = self._forward(self._clone(module, "", tensors), given, *([argument] if self._takes_two else []))
        except Exception:
            return None
        after = [(x, given), (self._argument, argument), *((before[path], tensors[path]) for path in before)]
        if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in after):
            return None
        if not (isinstance(results, tuple) and len(results) == 3):
            return None
        tokens = x.shape[:-1].numel()
        if not all(isinstance(r, torch.Tensor) and r.ndim == 2 and len(r) == tokens for r in results):
            return None
        return list(results)

    def _clone(self, module: nn.Module, prefix: str, tensors: dict) -> nn.Module:
        """A module of the same class with our tensors, that notes what is read of it."""
        cls, reads = type(module), self.reads

        def __getattribute__(self, name):
            value = cls.__getattribute__(self, name)
            if name not in _INTERNAL and not name.startswith("__"):
                # A tensor that is no parameter and no buffer may have any values.
                reads[prefix + name] = OPAQUE if isinstance(value, torch.Tensor) else remembered(value)
            return value

        def __getattr__(self, name):  # parameters, buffers and modules, of which is noted already what they are
            try:
                return cls.__getattr__(self, name)
            except AttributeError:
                reads[prefix + name] = MISSING
                raise

        def __setattr__(self, name, value):
            raise TypeError(f"{name} is written: more than a function")

        hooks = {"__getattribute__": __getattribute__, "__getattr__": __getattr__, "__setattr__": __setattr__}
        clone = object.__new__(type(cls.__name__, (cls,), hooks))
        state = {
            name: value.detach().clone() if isinstance(value, torch.Tensor) else value
            for name, value in vars(module).items()
        }
        for kind in ("_parameters", "_buffers"):
            state[kind] = {name: tensors.get(prefix + name) for name in state[kind]}
        state["_modules"] = {
            name: child if child is None else self._clone(child, f"{prefix}{name}.", tensors)
            for name, child in state["_modules"].items()
        }
        object.__getattribute__(clone, "__dict__").update(state)
        return clone

    # --- comparing ---

    def _operands(self):
        """Where bias and correction bias may be: each in one of the vectors, or nowhere."""
        vectors = [path for path in self._tensors if path != self._weight]
        if self._takes_two:
            vectors.append(ARGUMENT)
        for bias, correction in itertools.product((None, *vectors), repeat=2):
            if bias is None or bias not in (ARGUMENT, correction):
                yield bias, correction

    def _value(self, path: str | None) -> torch.Tensor | None:
        if path is None:
            return None
        return (self._argument if path == ARGUMENT else self._tensors[path]).flatten().float()

    def _is_plausible(self, logits, weights, indices) -> bool:
        E, k = len(self._tensors[self._weight]), indices.shape[1]
        if not (logits.is_floating_point() and weights.is_floating_point()) or indices.dtype != torch.int64:
            return False
        # Where all are chosen, nothing tells how.
        if logits.shape[1] != E or weights.shape[1] != k or k >= E:
            return False
        within = ((0 <= indices) & (indices < E)).all()
        return bool(within and (indices.sort(dim=1)[0].diff(dim=1) > 0).all())

    def _form(self, logits, weights, indices, bias, correction) -> RouterForm | None:
        some = [*range(_MODERATE), *range(-_SPECIAL, 0)]
        x, weight = self._x[some].double(), self._tensors[self._weight].double()
        product = x @ weight.T if bias is None else x @ weight.T + bias.double()
        accumulation = 1e-6 * x.norm(dim=1, keepdim=True) * weight.norm(dim=1)  # what an order of fp32 sums may change
        halves = [d for d in dict.fromkeys((self._x.dtype, self._tensors[self._weight].dtype)) if _is_half(d)]
        roundings = 1 if bias is None else 2
        fitting = (d for d in (None, *halves) if _is_product(logits[some].float(), product, accumulation, d, roundings))
        product_dtype = next(fitting, OPAQUE)
        logits_dtype, weights_dtype = (d if _is_half(d) else None for d in (logits.dtype, weights.dtype))
        if product_dtype is OPAQUE or logits_dtype not in (None, product_dtype):
            return None
        logits = logits.float()
        for chosen in self._choices(indices.shape[1], logits.shape[1], product_dtype):
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
            expected = router_weights(scores, tried).to(weights.dtype).float()
            if torch.allclose(weights.float(), expected, rtol=rtol, atol=1e-35, equal_nan=True):
                if _slope(weights, expected, 1e-6 if half is None else 1e-3):
                    return tried
        return None

    def _has_gradients(self, module: nn.Module, router: Router, expected: list, x: torch.Tensor) -> bool:
        """Those of our form in hidden states, weight and bias; and the same results as without them."""
        rows, form = slice(0, _MODERATE // 2), router.form  # where no score is zero in 16 bits
        names = [name for name in (router.weight, router.bias) if name is not None]
        with torch.enable_grad():
            tensors = {p: t.clone().requires_grad_(p in names) for p, t in self._tensors.items()}
            x = (self._x[rows] if x.ndim == 2 else self._x[rows][None]).clone().requires_grad_()
            results = self._run_with_gradients(module, x, tensors)
            logits, weights, indices = (results[router.order.index(role)] for role in range(3))
            if not all(_same(a, b[rows]) for a, b in zip((logits, weights, indices), expected)):
                return False
            if not (logits.requires_grad and weights.requires_grad):
                return False
            leaves = [x, *(tensors[name] for name in names)]
            operands = (x.flatten(0, -2), *leaves[1:])
            ours = rounded(F.linear(*(t.float() for t in operands)), form.product_dtype)
            our_weights = router_weights(router_scores(ours, form).gather(1, indices), form)
            generator = torch.Generator().manual_seed(1)
            for theirs, our in ((logits, ours), (weights, our_weights)):
                seed = _normal(our.shape, generator)
                both = [
                    torch.autograd.grad((result.float() * seed).sum(), leaves, retain_graph=True)
                    for result in (theirs, our)
                ]
                halves = map(_is_half, (x.dtype, theirs.dtype, tensors[router.weight].dtype))
                tolerance = 0.03 if any(halves) else 1e-3
                for a, b in zip(*both):
                    if not (a.float() - b.float()).norm() <= tolerance * b.float().norm() + 1e-6:
                        return False
        return True

    def _run_with_gradients(self, module, x, tensors):
        argument = [self._argument] if self._takes_two else []
        return self._forward(self._clone(module, "", tensors), x, *argument)


# --- what is tried ----------------------------------------------------------------------------------------------------


def _normal(shape: tuple, generator: torch.Generator) -> torch.Tensor:
    """In fp32, whatever a model that is being loaded has made the default."""
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def _bias(shape: tuple, generator: torch.Generator) -> torch.Tensor:
    """Beyond any score for some experts, as large as one for others, and for the rest so small that scores decide.

    Negative: a class may take the choice of experts out of the race by zeros.
    """
    size = _normal(shape, generator).abs()
    kinds = torch.stack([1 + size, size / 2, size / 512])
    return -kinds.gather(0, torch.randint(3, (1, *shape), generator=generator))[0]


def _hidden_states(weight: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """(T, H) for about the logits that we want, with noise that the weight does not see; and rows that are not finite.

    Logits of moderate size; so large that sigmoids are 1; so small that a sum of sigmoids is about 1e-20, or that all
    of them are zero; so far from one of them that the sum of the others' shares is about 1e-20; and so near to each
    other that scores in 16 bits are equal.
    """
    E, H = weight.shape

    def normal(rows, columns=E):
        return _normal((rows, columns), generator)

    logits = [scale * normal(_MODERATE // 4) for scale in (0.5, 2.0, 6.0, 10.0)]
    logits += [25 + 2 * normal(8), -46 + normal(8), -130 + normal(8), -25 + normal(16)]
    logits[-1][torch.arange(16), torch.arange(16) % E] = 25
    logits += [3.5 + 0.2 * normal(64), 0.15 + 0.02 * normal(64)]
    logits = torch.cat(logits)
    # The least hidden states with these logits.
    x = logits @ torch.linalg.solve(weight @ weight.T, weight)
    noise = normal(len(logits), H) / H**0.5
    x += noise - (noise @ weight.T) @ torch.linalg.solve(weight @ weight.T, weight)
    special = normal(_SPECIAL, H)
    special[0] *= 1e4  # beyond any clamp, and within fp16
    special[1, 0], special[2, 0], special[3, 0] = float("inf"), -float("inf"), float("nan")
    return torch.cat([x, special]).to(dtype)


# --- what counts as equal ---------------------------------------------------------------------------------------------


def _is_half(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


def _is_product(logits, product, accumulation, dtype: torch.dtype | None, roundings: int) -> bool:
    """Whether the logits are this fp64 product, rounded to the dtype so many times; None: in fp32."""
    expected = product.float() if dtype is None else product.float().to(dtype).float()
    if dtype is not None and not torch.equal(logits.nan_to_num(), logits.to(dtype).float().nan_to_num()):
        return False
    if not torch.equal(logits.isnan(), expected.isnan()):
        return False
    finite = expected.isfinite() & logits.isfinite()
    if not torch.equal(logits.nan_to_num()[~finite].sign(), expected.nan_to_num()[~finite].sign()):
        return False
    allowed = accumulation.float()
    if dtype is not None:
        info = torch.finfo(dtype)
        allowed = allowed + 0.51 * roundings * info.eps * product.abs().float() + info.smallest_normal * info.eps
    within = ((logits - product.float()).abs() <= allowed)[finite].all()
    return bool(within) and _slope(logits, product, 1e-6 if dtype is None else 3e-4)


def _slope(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    """Whether a is b and no multiple of it: the mean of roundings is much nearer to zero than each of them."""
    a, b = a[:_MODERATE].double(), b[:_MODERATE].double()
    return bool(((a * b).sum() / (b * b).sum() - 1).abs() <= tolerance)


def _are_chosen(indices, choice, form: RouterForm, correction) -> bool:
    """Whether these experts are of the greatest choice, whichever of equals they are."""
    choice, indices = choice[:-_SPECIAL], indices[:-_SPECIAL]
    wanted = choice.topk(form.top_k)[0]
    got = choice.gather(1, indices).sort(dim=1, descending=True)[0]
    if form.num_group > 1 and correction is None:
        # Scores that are zero in 16 bits are as good as those of other groups, where a class sets these to zero.
        rows = wanted[:, -1] > 0
        got, wanted = got[rows], wanted[rows]
    return torch.allclose(got, wanted, rtol=2e-6, atol=1e-30)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-35, equal_nan=True)
