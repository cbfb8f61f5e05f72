#!/usr/bin/env python3
"""Rewrites a LoRA on the experts, as PEFT saves it, to one pair of factors for each expert and projection.

    python examples/lora_per_expert.py ADAPTER OUT

PEFT's `target_parameters` keeps the factors of all experts of `gate_up_proj` and `down_proj` in two tensors each.
Servers that name the experts as checkpoints do want `mlp.experts.0.gate_proj.lora_A.weight` and so on: this writes
them, for models whose checkpoints have these names. Of the base model only the configuration is read.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import one_line_errors  # noqa: F401
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from safetensors.torch import load_file, save_file
from torch.nn import Parameter
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def load(adapter: Path) -> PeftModel:
    """The adapted model on the device "meta": no number is there, but every name, shape, rank and scaling."""
    peft_config = PeftConfig.from_pretrained(adapter)
    try:
        config = AutoConfig.from_pretrained(peft_config.base_model_name_or_path)
    except OSError as error:
        raise SystemExit(f"The configuration of the base model is needed. {error}") from None
    conversions = get_checkpoint_conversion_mapping(config.model_type) or []
    names = [pattern for conversion in conversions for pattern in conversion.source_patterns]
    if "mlp.experts.*.gate_proj.weight" not in names:
        raise SystemExit(f"checkpoints of {config.model_type} do not name their experts mlp.experts.0.gate_proj")
    with torch.device("meta"):
        return get_peft_model(AutoModelForCausalLM.from_config(config, dtype=torch.float32), peft_config)


@torch.no_grad()
def per_expert(model: PeftModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapter's file with the factors of each expert in place of those of all experts.

    Servers know one rank r and one scaling alpha / r for a whole adapter: a smaller rank is padded with zeros, and
    another scaling becomes part of B.
    """
    config, result = model.peft_config["default"], dict(tensors)
    if any("lora_embedding" in name for name in tensors):
        raise SystemExit("an adapter of an embedding is not converted")
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or not layer.lora_A:
            continue
        A, B = (result.pop(f"{name}.lora_{factor}.weight") for factor in "AB")
        dtype, experts = A.dtype, isinstance(layer, ParamWrapper)
        if experts:
            layer.lora_A["default"].weight, layer.lora_B["default"].weight = Parameter(A), Parameter(B)
            B, A, _ = layer.get_delta_factors("default")  # (E, rows, rank), (E, rank, columns)
        padding = config.r - A.shape[-2]
        if padding < 0:
            raise SystemExit(f"{name}: rank {A.shape[-2]} is above {config.r}, the r of adapter_config.json")
        A = pad(A, (0, 0, 0, padding)).to(dtype)
        B = pad(B * (layer.scaling["default"] * config.r / config.lora_alpha), (0, padding)).to(dtype)
        if not experts:
            result |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
            continue
        projections = PROJECTIONS[layer.parameter_name]
        name = name.replace(".base_layer", "")  # of the wrapper inside another
        for projection, rows in zip(projections, B.chunk(len(projections), dim=1)):
            for expert in range(len(A)):
                module = f"{name}.{expert}.{projection}"
                result[f"{module}.lora_A.weight"] = A[expert].clone()
                result[f"{module}.lora_B.weight"] = rows[expert].contiguous()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", type=Path, help="folder with adapter_config.json and adapter_model.safetensors")
    parser.add_argument("out", type=Path, help="folder to write")
    args = parser.parse_args()
    file = args.adapter / "adapter_model.safetensors"
    if not file.exists():
        raise SystemExit(f"{file} does not exist")

    model = load(args.adapter)
    tensors = per_expert(model, load_file(file))
    config = model.peft_config["default"]
    modules = {name.split(".lora_")[0] for name in tensors if ".lora_" in name}
    config.target_modules = sorted({module.rsplit(".", 1)[-1] for module in modules})
    config.target_parameters, config.use_rslora, config.rank_pattern, config.alpha_pattern = None, False, {}, {}
    config.save_pretrained(args.out)
    save_file(tensors, args.out / file.name, metadata={"format": "pt"})
    print(f"{args.out}: {len(tensors)} tensors")


if __name__ == "__main__":
    main()
