"""A trial of a module's forward: which router of `topk_router` it computes, if any.

The forward of its class runs on a copy of the module whose tensors are ours: random weights, and biases far from zero.
The hidden states are made such that the logits tell the forms apart: they are large, small, near to each other and not
finite. Logits, choice, weights and gradients are compared with those of every form. What the forward reads of the
module is noted: with other values it may be another router. What cannot be noted ends the trial as it is read.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Iterator
from types import MethodType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin

from ..reference import SCORES, RouterForm, rounded, router_choice, router_scores, router_weights
from . import switching
from .gates import MISSING, OPAQUE, is_as_its_class, is_closed, undisturbed
from .router_inputs import ARGUMENT, MODERATE, SPECIAL, Inputs, make_inputs, normal

_INTERNAL = frozenset(dir(nn.Module())) - {"training"}
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


class _Opaque(Exception):
    """The forward has read something that tells nothing about the next call."""


def remembered(value: object) -> object:
    """What tells whether something that a forward reads is as it was; OPAQUE, if nothing does."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        return OPAQUE if isinstance(value, UninitializedTensorMixin) else (value.dtype, tuple(value.shape))
    if isinstance(value, MethodType):
        return value.__func__ if isinstance(value.__self__, nn.Module) and is_closed(value.__func__) else OPAQUE
    if isinstance(value, nn.Module):
        # A container's forward reads its children past every attribute.
        is_leaf = not any(value._modules.values())
        return type(value) if is_leaf and is_as_its_class(value) and is_closed(type(value).forward) else OPAQUE
    return OPAQUE


class Trial:
    """Of a module, with hidden states of this dtype.

    Attributes:
        reads: path -> what the forward read there, or what else decided; nothing, if not even that could be found out.
        router: what it is; None, if none of ours.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        self.reads: dict[str, object] = {}
        self.router: Router | None = None
        self._classes: dict[str, type] = {}
        with contextlib.suppress(Exception):  # whatever it is not written for
            self._try(module, dtype)

    def _try(self, module: nn.Module, dtype: torch.dtype) -> None:
        tensors = {}
        children = {name: child for name, child in module._modules.items() if child is not None}
        for prefix, owner in {"": module, **{f"{name}.": child for name, child in children.items()}}.items():
            tensors.update((prefix + name, t) for name, t in (owner._parameters | owner._buffers).items())
        self.reads.update((path, remembered(value)) for path, value in (module._modules | tensors).items())
        tensors = {path: tensor for path, tensor in tensors.items() if tensor is not None}
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
        with undisturbed():
            self.router = self._recognised(module, make_inputs(tensors, self._weight, dtype))

    # --- running ---

    def _recognised(self, module: nn.Module, inputs: Inputs) -> Router | None:
        found = {rank: results for rank in (2, 3) if (results := self._run(module, inputs, rank)) is not None}
        if not found:
            return None
        rank, results = next(iter(found.items()))
        again = self._run(module, inputs, rank)
        if not all(_same(a, b) for a, b in zip(results, again)):  # noise
            return None
        for order in itertools.permutations(range(3)):
            by_role = [results[order.index(role)] for role in range(3)]
            if not self._is_plausible(*by_role):
                continue
            for bias, correction in self._operands(inputs):
                for form in self._forms(*by_role, inputs, bias, correction):
                    router = Router(form, self._weight, bias, correction, order, tuple(found))
                    if self._is_confirmed(module, router, inputs, found):
                        return router
        return None

    def _is_confirmed(self, module: nn.Module, router: Router, inputs: Inputs, found: dict[int, list]) -> bool:
        """By what was found in each rank, for one token, with biases of the other sign, and by its gradients."""
        one = inputs._replace(x=inputs.x[MODERATE // 2 : MODERATE // 2 + 1])
        tensors = {path: tensor if path == self._weight else -tensor for path, tensor in inputs.tensors.items()}
        negated = inputs._replace(tensors=tensors, argument=-inputs.argument)
        if not all(self._agrees(router, results, inputs) for results in found.values()):
            return False
        others = ((given, rank) for given in (one, negated) for rank in router.ranks)
        if not all(self._agrees(router, self._run(module, given, rank), given) for given, rank in others):
            return False
        return self._has_gradients(module, router, inputs, router.ranks[0])

    def _run(self, module: nn.Module, inputs: Inputs, rank: int) -> list[torch.Tensor] | None:
        """Three tensors with a row for each token; None if it does not return such, or does more than that."""
        x = inputs.x if rank == 2 else inputs.x.unflatten(0, (2, -1) if len(inputs.x) % 2 == 0 else (1, -1))
        given, argument = x.clone(), inputs.argument.clone()
        before = {path: tensor.detach().clone() for path, tensor in inputs.tensors.items()}
        try:
            clone = self._clone(module, "", inputs.tensors)
            results = self._forward(clone, given, *([argument] if self._takes_two else []))
        except _Opaque:
            raise
        except Exception:
            return None
        written = [(x, given), (inputs.argument, argument), *((before[p], inputs.tensors[p]) for p in before)]
        if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in written):
            return None
        if not (isinstance(results, tuple) and len(results) == 3):
            return None
        if not all(isinstance(r, torch.Tensor) and r.ndim == 2 and len(r) == len(inputs.x) for r in results):
            return None
        return list(results)

    def _clone(self, module: nn.Module, prefix: str, tensors: dict) -> nn.Module:
        """A module of the same class with our tensors, that notes what is read of it."""
        clone = object.__new__(self._recording_class(type(module), prefix))
        state = dict(vars(module))
        for kind in ("_parameters", "_buffers"):
            state[kind] = {name: tensors.get(prefix + name) for name in state[kind]}
        state["_modules"] = {
            name: child if child is None else self._clone(child, f"{prefix}{name}.", tensors)
            for name, child in state["_modules"].items()
        }
        object.__getattribute__(clone, "__dict__").update(state)
        return clone

    def _recording_class(self, cls: type, prefix: str) -> type:
        def note(name, value):
            self.reads[prefix + name] = value
            if value is OPAQUE:
                raise _Opaque

        def __getattribute__(self, name):
            value = cls.__getattribute__(self, name)
            if name not in _INTERNAL and not name.startswith("__"):
                # A tensor that is no parameter and no buffer may have any values.
                note(name, OPAQUE if isinstance(value, torch.Tensor) else remembered(value))
            return value

        def __getattr__(self, name):  # parameters, buffers and modules, of which is noted already what they are
            try:
                return cls.__getattr__(self, name)
            except AttributeError:
                note(name, MISSING)
                raise

        def __setattr__(self, name, value):
            raise _Opaque(f"{name} is written: more than a function")

        if prefix not in self._classes:
            hooks = {"__getattribute__": __getattribute__, "__getattr__": __getattr__, "__setattr__": __setattr__}
            self._classes[prefix] = type(cls.__name__, (cls,), hooks)
        return self._classes[prefix]

    # --- comparing ---

    def _operands(self, inputs: Inputs):
        """Where bias and correction bias may be: each in one of the vectors, or nowhere."""
        vectors = [path for path in inputs.tensors if path != self._weight]
        if self._takes_two:
            vectors.append(ARGUMENT)
        for bias, correction in itertools.product((None, *vectors), repeat=2):
            if bias is None or bias not in (ARGUMENT, correction):
                yield bias, correction

    def _is_plausible(self, logits, weights, indices) -> bool:
        E, k = logits.shape[1], indices.shape[1]
        if not (logits.is_floating_point() and weights.is_floating_point()) or indices.dtype != torch.int64:
            return False
        # Where all are chosen, nothing tells how.
        if weights.shape[1] != k or k >= E:
            return False
        within = ((0 <= indices) & (indices < E)).all()
        return bool(within and (indices.sort(dim=1)[0].diff(dim=1) > 0).all())

    def _forms(self, logits, weights, indices, inputs: Inputs, bias, correction) -> Iterator[RouterForm]:
        """Those that have these results."""
        if logits.shape[1] != len(inputs.tensors[self._weight]):
            return
        dtypes = dict.fromkeys((inputs.x.dtype, inputs.tensors[self._weight].dtype))
        candidates = (d for d in (None, *filter(_is_half, dtypes)) if self._is_product(logits, inputs, bias, d))
        product_dtype = next(candidates, OPAQUE)
        logits_dtype, weights_dtype = (d if _is_half(d) else None for d in (logits.dtype, weights.dtype))
        if product_dtype is OPAQUE or logits_dtype not in (None, product_dtype):
            return
        logits, correction = logits.float(), inputs.value(correction)
        for chosen in self._choices(indices.shape[1], logits.shape[1], product_dtype):
            form = chosen._replace(product_dtype=product_dtype, logits_dtype=logits_dtype, weights_dtype=weights_dtype)
            scores = router_scores(logits, form)
            if _are_chosen(indices, router_choice(logits, scores, correction, form), form, correction):
                of_chosen = scores.gather(1, indices)
                yield from (tried for tried in self._weighings(form) if _are_weights(weights, of_chosen, tried))

    def _agrees(self, router: Router, results: list | None, inputs: Inputs) -> bool:
        """Whether these results are those of the router; of the first rows of the hidden states, if not of all."""
        if results is None:
            return False
        logits, weights, indices = (results[router.order.index(role)] for role in range(3))
        form, correction = router.form, inputs.value(router.correction)
        dtypes = [d if _is_half(d) else None for d in (logits.dtype, weights.dtype)]
        if not self._is_plausible(logits, weights, indices) or indices.shape[1] != form.top_k:
            return False
        if dtypes != [form.logits_dtype, form.weights_dtype]:
            return False
        if not self._is_product(logits, inputs, router.bias, form.product_dtype):
            return False
        logits = logits.float()
        scores = router_scores(logits, form)
        choice = router_choice(logits, scores, correction, form)
        return _are_chosen(indices, choice, form, correction) and _are_weights(weights, scores.gather(1, indices), form)

    def _is_product(self, logits, inputs: Inputs, bias: str | None, dtype: torch.dtype | None) -> bool:
        """Whether the logits are hidden states times weight, plus bias, rounded to the dtype; None: in fp32."""
        rows = [*range(MODERATE), *range(-SPECIAL, 0)] if len(inputs.x) > MODERATE else [*range(len(inputs.x))]
        x, weight, logits = inputs.x[rows].double(), inputs.tensors[self._weight].double(), logits[rows].float()
        product = x @ weight.T
        if bias is not None:
            product = product + inputs.value(bias).double()
        allowed = 1e-6 * x.norm(dim=1, keepdim=True) * weight.norm(dim=1)  # what an order of fp32 sums may change
        expected = product.float()
        if dtype is not None:
            info, roundings = torch.finfo(dtype), 1 if bias is None else 2
            allowed = allowed + 0.51 * roundings * info.eps * product.abs() + info.smallest_normal * info.eps
            expected = expected.to(dtype).float()
            if not torch.equal(logits.nan_to_num(), logits.to(dtype).float().nan_to_num()):
                return False
        finite = expected.isfinite() & logits.isfinite()
        infinite = [x.nan_to_num()[~finite].sign() for x in (logits, expected)]
        if not torch.equal(logits.isnan(), expected.isnan()) or not torch.equal(*infinite):
            return False
        within = ((logits - product).abs() <= allowed)[finite].all()
        return bool(within) and _is_no_multiple(logits, product, 1e-5, 0.0 if dtype is None else info.eps)

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

    def _weighings(self, form: RouterForm):
        """Every norm and factor, with the numbers that the forward reads or has in it."""
        constants = [value for value in self._forward.__code__.co_consts if type(value) is float]
        numbers = [float(value) for value in self.reads.values() if type(value) in (int, float)] + constants
        small = sorted({value for value in numbers if 0 < value < 1e-2})
        norms = [(False, 0.0, 0.0), (True, 0.0, 0.0)]
        norms += [(True, eps, 0.0) for eps in small] + [(True, 0.0, least) for least in small]
        factors = dict.fromkeys((1.0, *(value for value in numbers if value > 0), 1 / form.top_k))
        for (norm, eps, least), factor in itertools.product(norms, factors):
            yield form._replace(norm_topk_prob=norm, norm_eps=eps, norm_min=least, routed_scaling_factor=factor)

    def _has_gradients(self, module: nn.Module, router: Router, inputs: Inputs, rank: int) -> bool:
        """Those of our form in hidden states, weight and bias, none in a correction bias; and the same results."""
        form, operands = router.form, [name for name in (router.weight, router.bias) if name is not None]
        x = inputs.x[: MODERATE // 2].clone().requires_grad_()  # where no score is zero in 16 bits
        tensors = {path: tensor.clone().requires_grad_() for path, tensor in inputs.tensors.items()}
        inputs = Inputs(x, tensors, inputs.argument.clone().requires_grad_())
        with torch.enable_grad():
            results = self._run(module, inputs, rank)
            with torch.no_grad():
                if not self._agrees(router, results, inputs):
                    return False
            logits, weights, indices = (results[router.order.index(role)] for role in range(3))
            if not (logits.requires_grad and weights.requires_grad):
                return False
            leaves = [x, *(tensors[name] for name in operands)]
            others = [inputs.argument, *(tensor for path, tensor in tensors.items() if path not in operands)]
            ours = rounded(F.linear(*(leaf.float() for leaf in leaves)), form.product_dtype)
            our_weights = router_weights(router_scores(ours, form).gather(1, indices), form)
            generator = torch.Generator().manual_seed(1)
            for theirs, our in ((logits, ours), (weights, our_weights)):
                seed = normal(our.shape, generator)
                loss, our_loss = ((result.float() * seed).sum() for result in (theirs, our))
                got = torch.autograd.grad(loss, [*leaves, *others], retain_graph=True, allow_unused=True)
                wanted = torch.autograd.grad(our_loss, leaves, retain_graph=True)
                if any(gradient is not None for gradient in got[len(leaves) :]):
                    return False
                halves = map(_is_half, (x.dtype, theirs.dtype, tensors[router.weight].dtype))
                tolerance = 0.03 if any(halves) else 1e-3
                for a, b in zip(got, wanted):
                    if not (a.float() - b.float()).norm() <= tolerance * b.float().norm() + 1e-6:
                        return False
        return True


# --- what counts as equal ---------------------------------------------------------------------------------------------


def _is_half(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


def _is_no_multiple(a: torch.Tensor, b: torch.Tensor, tolerance: float, eps: float = 0.0) -> bool:
    """Whether a is b and not a little more: the mean of many roundings is much nearer to zero than each of them.

    eps: of the dtype that a has been rounded to. A rounding is 0.2 of it (root mean square), and five deviations of
    the mean are allowed: of as many numbers as weigh in it, few where there are few experts.
    """
    a, b = a[:MODERATE].double(), b[:MODERATE].double()
    if len(a) < MODERATE:
        return True
    squares = b.square()
    allowed = tolerance + eps * squares.square().sum().sqrt() / squares.sum()
    return bool(((a * b).sum() / squares.sum() - 1).abs() <= allowed)


def _are_chosen(indices, choice, form: RouterForm, correction) -> bool:
    """Whether these experts are of the greatest choice, whichever of equals they are."""
    if len(choice) > MODERATE:
        choice, indices = choice[:-SPECIAL], indices[:-SPECIAL]
    wanted = choice.topk(form.top_k)[0]
    got = choice.gather(1, indices).sort(dim=1, descending=True)[0]
    if form.num_group > 1 and correction is None:
        # Scores that are zero in 16 bits are as good as those of other groups, where a class sets these to zero.
        rows = wanted[:, -1] > 0
        got, wanted = got[rows], wanted[rows]
    return torch.allclose(got, wanted, rtol=2e-6, atol=1e-30)


def _are_weights(weights: torch.Tensor, scores: torch.Tensor, form: RouterForm) -> bool:
    """Whether these scores of the chosen have these weights."""
    half = form.scores_dtype or form.weights_dtype
    rtol = 1e-5 if half is None else 4 * torch.finfo(half).eps
    expected, weights = router_weights(scores, form).to(weights.dtype).float(), weights.float()
    if not torch.allclose(weights, expected, rtol=rtol, atol=1e-35, equal_nan=True):
        return False
    return _is_no_multiple(weights, expected, 1e-6 if half is None else 1e-3)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-35, equal_nan=True)
