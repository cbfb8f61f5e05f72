"""Adapters on expert weights, from PEFT to the kernel as factors."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from contextlib import contextmanager

import torch
from torch import nn

from ..experts.lora import LoraFactors
from ..weights import Projection
from . import modules, switching
from .adapters import activated


@functools.cache
def meet_peft() -> None:
    """Let PEFT's wrapper of a weight give its factors to a module that runs on this kernel.

    The wrapper registers a parametrization around every forward, and torch evaluates a parametrization as it is
    registered: W + BA would be made for all experts even if nobody read it. So this steps in before. Every other
    module, and a PEFT that does not do what we replace, keeps PEFT's own way.

    Over weights in codes, of which PEFT knows nothing, factors have the size of what the codes stand for, and what
    would take codes for numbers is refused.
    """
    if importlib.util.find_spec("peft") is None:
        return
    try:
        from peft.tuners.lora.layer import ParamWrapper

        materialize, merge = ParamWrapper._activate_lora, ParamWrapper.merge
        get_in_out_features = ParamWrapper._get_in_out_features
        _check_peft()
    except Exception as error:  # whatever PEFT has become
        return _warn(f"{type(error).__name__}: {error}")

    @functools.wraps(materialize)
    @contextmanager
    def activate_lora(self, active_adapters):
        module = self.get_base_layer()
        factors = _factors(self, active_adapters) if runs_on_kernel(module) else None
        context = materialize(self, active_adapters)
        if factors is not None:
            context = activated(module, self.parameter_name, factors)
        elif _is_in_codes(self) and any(adapter in self.lora_A for adapter in active_adapters):
            raise RuntimeError(
                f"adapters on {self.parameter_name} of {type(module).__name__}, which holds codes, are computed by "
                "moe-grouped-gemm alone, and it does not run on it: see status(model)"
            )
        with context:
            yield

    @functools.wraps(get_in_out_features)
    def get_in_out_features_of_codes(self, module):
        features = get_in_out_features(self, module)
        if _is_in_codes(self):
            return Projection(self.get_param()).shape[1:]
        return features

    @functools.wraps(merge)
    def merge_into_numbers(self, *args, **kwargs):
        if _is_in_codes(self):
            raise ValueError(
                f"an adapter cannot be merged into {self.parameter_name}, which holds codes of few bits: to round the "
                "sum would lose most of what it learnt. Keep it beside the model, or merge it into the dense one."
            )
        return merge(self, *args, **kwargs)

    ParamWrapper._activate_lora = activate_lora
    ParamWrapper._get_in_out_features = get_in_out_features_of_codes
    ParamWrapper.merge = merge_into_numbers


def _is_in_codes(wrapper: nn.Module) -> bool:
    """Whether the wrapped weight is not the numbers themselves."""
    return hasattr(wrapper.get_base_layer(), f"{wrapper.parameter_name}_scale_inv") and not modules.is_dense(
        wrapper.get_param()
    )


def runs_on_kernel(module: nn.Module) -> bool:
    """Whether `module(...)` is bound to end in our own computation of an experts module."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if not modules.is_experts(module) or not switching.is_unwrapped(module) or modules.peek(module) is not None:
        return False
    if switching.is_switched_on(module):
        return True
    name = module.config._experts_implementation
    if name != modules.EXPERTS_IMPLEMENTATION or ALL_EXPERTS_FUNCTIONS.get(name) is not modules.experts_forward:
        return False
    return torch.compiler.is_compiling() or modules.is_dispatch(type(module).forward)


def _check_peft() -> None:
    """Ask PEFT itself, on two experts of 4 x 3: does its wrapper add `get_delta_factors` to the weight and no more?"""
    from peft import LoraConfig
    from peft.tuners.lora.layer import ParamWrapper

    # Transformers may be building a model around us: on "meta", in another dtype and with torch.nn.init switched off.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        module = nn.Module()
        module.weight = nn.Parameter(torch.empty(2, 4, 3, dtype=torch.float64))
        options = {"config": LoraConfig(), "lora_alpha": 3}
        wrapper = ParamWrapper(module, "a", parameter_name="weight", r=1, **options)
        wrapper.update_layer("b", r=2, **options)
        for parameter in wrapper.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        expected = module.weight.clone()
        for active in (["a"], ["a", "b"]):
            lhs, rhs, scaling = wrapper.get_delta_factors(active[-1])
            expected += scaling * lhs @ rhs
            with wrapper._activate_lora(active):
                torch.testing.assert_close(module.weight, expected)


def _factors(wrapper: nn.Module, active_adapters: list[str]) -> list[LoraFactors] | None:
    """The factors of the adapters that PEFT would add to the wrapped weight; None if they are not as expected.

    In the dtype of the weight, as in PEFT's own sum: adapters kept in fp32 get their gradients through a cast. Over a
    weight in codes in their own.
    """
    if wrapper.parameter_name not in modules.weight_names(wrapper.get_base_layer()):
        return None
    factors = []
    try:
        experts, rows, columns = Projection(wrapper.get_param()).shape
        for adapter in active_adapters:
            if adapter not in wrapper.lora_A:
                continue
            if _is_in_codes(wrapper):
                uncast = _UncastFactors(wrapper, adapter)
                B, A, scaling = type(wrapper).get_delta_factors(uncast, adapter)
            else:
                B, A, scaling = wrapper.get_delta_factors(adapter)
            rank = A.shape[1]
            if (A.shape, B.shape) != ((experts, rank, columns), (experts, rows, rank)) or wrapper.lora_variant:
                raise TypeError("an adapter is not the product of two plain factors")
            factors.append(LoraFactors(A, B, scaling))
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        return _warn(f"{type(error).__name__}: {error}")
    return factors


class _UncastFactors:
    """A PEFT wrapper of a weight in codes whose factors keep their dtype, where PEFT would round them to codes."""

    def __init__(self, wrapper: nn.Module, adapter: str):
        self._wrapper, self._adapter = wrapper, adapter

    def __getattr__(self, name):
        return getattr(self._wrapper, name)

    def get_param(self):
        return self._wrapper.lora_A[self._adapter].weight


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"moe-grouped-gemm cannot take adapters on expert weights from PEFT ({reason}). Results are right all the same,"
        " but each forward makes W + BA for all experts.",
        stacklevel=2,
    )
