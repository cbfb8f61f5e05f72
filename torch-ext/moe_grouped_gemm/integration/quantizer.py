"""Experts in 4 bits from the moment a model is loaded, by Transformers' registry of quantizers.

The model stays what it is, its experts modules included; their weights alone give way to codes, with scales beside them
as in FP8Experts. All are bytes, codes (E, N, K / 2) and scales (E, N, K / 32), which no cast of the model to another
dtype touches. In files they are as gpt-oss has them: `{name}_blocks` (E, N, K / 32, 16) and `{name}_scales`.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from ..weights import quantize_fp4
from . import modules

_BLOCK = quantize_fp4.GROUP // 2  # bytes
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

    return Mxfp4Config


def _quantizer_class() -> type:
    from transformers import Mxfp4Config
    from transformers.core_model_loading import WeightConverter
    from transformers.quantizers import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    quantize, deserialize = _operations()

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
            if not self.pre_quantized:
                return []
            return [WeightConverter(list(_in_files(name)), name, [deserialize()]) for name in _WEIGHTS]

        def _process_model_after_weight_loading(self, model, **kwargs):
            for _, module in _quantized(model):
                module.is_transposed = False
            # Of weights that are codes now nothing is to be converted back: what is saved is in files' own form.
            model._weight_conversions = [
                conversion
                for conversion in model._weight_conversions
                if not (isinstance(conversion, WeightConverter) and all(map(_is_weight, conversion.target_patterns)))
            ]
            skipped = self.quantization_config.modules_to_not_convert
            model.config.quantization_config = self.quantization_config = Mxfp4Config(skipped)
            model.quantization_method = self.quantization_config.quant_method

        def get_state_dict_and_metadata(self, model):
            state_dict = model.state_dict()
            for path, module in _quantized(model):
                for name in modules.weight_names(module):
                    blocks, scales = _in_files(f"{path}.{name}")
                    state_dict[blocks] = state_dict.pop(f"{path}.{name}").unflatten(-1, (-1, _BLOCK))
                    state_dict[scales] = state_dict.pop(_scale(f"{path}.{name}"))
            return state_dict, {}

    return ExpertsQuantizer


def _operations() -> tuple[type, type]:
    from transformers.core_model_loading import ConversionOps

    class Quantize(ConversionOps):
        """A dense weight, whatever order its module has it in."""

        def convert(self, input_dict, full_layer_name=None, model=None, **kwargs):
            (weight,) = map(_only, input_dict.values())
            module = model.get_submodule(full_layer_name.rpartition(".")[0])
            codes, scale = quantize_fp4.quantize_fp4(weight.mT if module.is_transposed else weight)
            return _named(model, full_layer_name, codes, scale)

    class Deserialize(ConversionOps):
        """Blocks and scales as files have them."""

        def convert(self, input_dict, full_layer_name=None, model=None, **kwargs):
            name = full_layer_name.rpartition(".")[2]
            blocks, scales = (_only(input_dict[key]) for key in _in_files(name))
            return _named(model, full_layer_name, blocks.flatten(-2), scales)

    return Quantize, Deserialize


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


def _quantized(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(path, module) for path, module in model.named_modules() if hasattr(module, _scale("down_proj"))]


def _parameter(*shape: int, **options) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(shape, **options), requires_grad=False)
    parameter._is_hf_initialized = True  # never at random: what a disk keeps stays as it is here
    return parameter


def _is_weight(pattern: str) -> bool:
    return pattern.rstrip("$").endswith(_WEIGHTS)


def _scale(name: str) -> str:
    return f"{name}_scale_inv"


def _in_files(name: str) -> tuple[str, str]:
    return f"{name}_blocks", f"{name}_scales"


def _only(tensors: list[torch.Tensor] | torch.Tensor) -> torch.Tensor:
    return tensors[0] if isinstance(tensors, list) else tensors


def _named(model: nn.Module, name: str, codes: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """What Transformers sets as parameters, or writes to a disk."""
    path, _, weight = name.rpartition(".")
    module = model.get_submodule(path)
    there = getattr(module, weight)
    if any(getattr(placement, "dim", 0) != 0 for placement in getattr(there, "placements", ())):
        raise ValueError(f"{name} in 4 bits cannot be cut into slices of experts, as by tensor parallelism")
    if not hasattr(there, "placements"):
        # Of which, on a disk, this tells shape and dtype.
        setattr(module, weight, _parameter(*codes.shape, dtype=torch.uint8, device="meta"))
    return {name: codes.view(torch.uint8), _scale(name): scale.view(torch.uint8)}
