"""Experts in 4 bits from the moment a model is loaded, by Transformers' registry of quantizers.

The model stays what it is, its experts modules included; their weights alone give way to codes, with scales beside them
as in FP8Experts. All are bytes, codes (E, N, K / 2) and scales (E, N, K / 32), which no cast of the model to another
dtype touches. In files they are as gpt-oss has them: `{name}_blocks` (E, N, K / 32, 16) and `{name}_scales`.
"""

from __future__ import annotations

import functools
import re

import torch
from torch import nn

from ..weights import quantize_fp4
from . import modules

_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


@functools.cache
def config_class() -> type:
    """Of what `from_pretrained` takes as `quantization_config`."""
    import transformers
    from transformers.quantizers.auto import register_quantizer

    method = __name__.partition(".")[0]  # each build has its own
    register_quantizer(method)(_quantizer_class())

    # Over the config of a checkpoint that is in 4 bits already, Transformers takes a class of the same name alone.
    class Mxfp4Config(transformers.Mxfp4Config):
        def __init__(self):
            super().__init__()
            self.quant_method = method

        def get_loading_attributes(self):
            return {"quant_method": self.quant_method}

        def __reduce__(self):  # nobody finds a class that is made here by its name
            return _new_config, (), self.__dict__

    return Mxfp4Config


def _new_config():
    return config_class()()


def _quantizer_class() -> type:
    from transformers import Mxfp4Config
    from transformers.core_model_loading import WeightConverter, WeightRenaming
    from transformers.quantizers import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    quantize, of_blocks = _operations()

    def conversions(path=""):
        """From files, and back to them. Only of names that end there: other modules have a `gate_up_proj.weight`."""
        for name in (rf"{path}\.{weight}" for weight in _WEIGHTS):
            yield WeightConverter(f"{name}_blocks", rf"{name}(?![\w.])", [of_blocks()])
            yield WeightRenaming(f"{name}_scales", _scale(name))

    class ExpertsQuantizer(HfQuantizer):
        requires_calibration = False
        is_trainable = True  # adapters, and what else is dense
        is_compileable = True
        quantized_element_size = 1  # two codes
        # What stands beside a weight is sharded as it is.
        serialized_names = {name: [name, _scale(name)] for name in _WEIGHTS}

        def is_serializable(self):
            return True

        def param_needs_quantization(self, model, param_name, **kwargs):
            path, _, name = param_name.rpartition(".")
            return name in _WEIGHTS and hasattr(model.get_submodule(path), _scale(name))

        def _process_model_before_weight_loading(self, model, **kwargs):
            skipped, experts = self.quantization_config.modules_to_not_convert, {}
            for name, module in model.named_modules():
                if modules.is_experts(module) and should_convert_module(name, skipped):
                    experts[name] = module
            if not experts:
                raise ValueError(f"{type(model).__name__} has no experts that moe-grouped-gemm could hold in 4 bits")
            for name, module in experts.items():
                _make_room(name, module, self.pre_quantized)
            for config in (model.config, *(module.config for module in experts.values())):
                config._experts_implementation = modules.EXPERTS_IMPLEMENTATION

        def get_quantize_ops(self):
            return quantize()

        def get_weight_conversions(self):
            return list(conversions()) if self.pre_quantized else []

        def _process_model_after_weight_loading(self, model, **kwargs):
            # What is saved, whatever was loaded, of these modules alone: others may have dense experts.
            saved = [c for c in model._weight_conversions if not all(map(_is_of_experts, c.target_patterns))]
            for path, module in model.named_modules():
                if modules.is_ours_alone(module):
                    module.is_transposed = False
                    saved += conversions(re.escape(path))
            model._weight_conversions = saved
            skipped = self.quantization_config.modules_to_not_convert
            model.config.quantization_config = self.quantization_config = Mxfp4Config(skipped)
            model.quantization_method = self.quantization_config.quant_method

    return ExpertsQuantizer


def _operations() -> tuple[type, type]:
    from transformers.core_model_loading import ConversionOps

    class Quantize(ConversionOps):
        """A dense weight, whatever order its module has it in."""

        def convert(self, input_dict, full_layer_name=None, model=None, **kwargs):
            (weight,) = map(_only, input_dict.values())
            path, _, name = full_layer_name.rpartition(".")
            module = model.get_submodule(path)
            _check_whole(model, full_layer_name)
            codes, scale = quantize_fp4.quantize_fp4(weight.mT if module.is_transposed else weight)
            if not hasattr(getattr(module, name), "placements"):
                # Of codes that go to a disk this tells shape and dtype.
                setattr(module, name, _parameter(*codes.shape, dtype=torch.uint8, device="meta"))
            return {full_layer_name: codes.view(torch.uint8), _scale(full_layer_name): scale.view(torch.uint8)}

    class Codes(ConversionOps):
        """Of blocks (E, N, K / 32, 16) as files have them."""

        def convert(self, input_dict, full_layer_name=None, model=None, **kwargs):
            _check_whole(model, full_layer_name)
            (blocks,) = map(_only, input_dict.values())
            return {full_layer_name: blocks.flatten(-2)}

        @property
        def reverse_op(self):
            return Blocks()

    class Blocks(ConversionOps):
        def convert(self, input_dict, full_layer_name=None, **kwargs):
            (codes,) = map(_only, input_dict.values())
            return {full_layer_name: codes.unflatten(-1, (-1, quantize_fp4.GROUP // 2))}

    return Quantize, Codes


def _make_room(path: str, module: nn.Module, pre_quantized: bool) -> None:
    """Parameters for codes and scales in a module that is being loaded."""
    experts = modules.read(module)
    reason = modules.obstacle(module, experts)
    if reason is not None:
        raise ValueError(f"{path} cannot be held in 4 bits: {reason}")
    for name, projection in zip(modules.weight_names(module), experts):
        num_experts, N, K = projection.shape
        if K % quantize_fp4.GROUP:
            raise ValueError(
                f"{path}.{name} cannot be held in 4 bits: it has {K} columns, no multiple of {quantize_fp4.GROUP}"
            )
        # To another dtype than the parameter's, Transformers would cast a dense weight before it is quantised.
        dtype = torch.uint8 if pre_quantized else projection.weight.dtype
        setattr(module, name, _parameter(num_experts, N, K // 2, dtype=dtype))
        module.register_parameter(_scale(name), _parameter(num_experts, N, K // quantize_fp4.GROUP, dtype=torch.uint8))


def _parameter(*shape: int, **options) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(shape, **options), requires_grad=False)
    parameter._is_hf_initialized = True  # never at random: what a disk keeps stays as it is here
    return parameter


def _check_whole(model: nn.Module, name: str) -> None:
    placements = getattr(model.get_parameter(name), "placements", ())
    if any(getattr(placement, "dim", 0) != 0 for placement in placements):
        raise ValueError(f"{name} in 4 bits cannot be cut into slices of experts, as by tensor parallelism")


def _is_of_experts(pattern: str) -> bool:
    return pattern.endswith((*_WEIGHTS, *map(_scale, _WEIGHTS)))


def _scale(name: str) -> str:
    return f"{name}_scale_inv"


def _only(tensors: list[torch.Tensor] | torch.Tensor) -> torch.Tensor:
    return tensors[0] if isinstance(tensors, list) else tensors
