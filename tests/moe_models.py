"""Every model of the installed Transformers whose experts carry `@use_experts_implementation`, and tiny ones of each."""

from __future__ import annotations

import ast
import functools
import importlib
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

DECORATOR = "use_experts_implementation"


class ExpertsClass(NamedTuple):
    model: str  # folder of transformers.models
    name: str
    options: dict  # of the decorator

    def load(self) -> type:
        return getattr(importlib.import_module(f"transformers.models.{self.model}.modeling_{self.model}"), self.name)


@functools.cache
def experts_classes() -> tuple[ExpertsClass, ...]:
    """From the sources: importing all modeling files takes many seconds."""
    found = []
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        if DECORATOR not in (source := path.read_text(encoding="utf-8")):
            continue
        for node in ast.parse(source).body:
            for decorator in getattr(node, "decorator_list", ()):
                call = decorator if isinstance(decorator, ast.Call) else ast.Call(decorator, [], [])
                if isinstance(node, ast.ClassDef) and getattr(call.func, "id", None) == DECORATOR:
                    options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
                    assert path.stem == f"modeling_{path.parent.name}"
                    found.append(ExpertsClass(path.parent.name, node.name, options))
    return tuple(found)


def config_classes(model: str) -> list[type]:
    """Those of a text model first."""
    module = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
    classes = [
        c for c in vars(module).values() if isinstance(c, type) and issubclass(c, PreTrainedConfig) and c.__module__ == module.__name__
    ]
    return sorted(classes, key=lambda c: "Text" not in c.__name__)


def default_module(entry: ExpertsClass) -> torch.nn.Module:
    """The experts of the default config, without memory."""
    cls = entry.load()
    for config_class in config_classes(entry.model):
        try:
            with torch.device("meta"):
                return cls(config_class())
        except AttributeError:
            continue  # the config of another part of the model
    raise LookupError(f"no config of {entry.model} fits {entry.name}")


# By name of a config's field. What a model needs beyond this is in SPECIAL.
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 32,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts": 8,
    "num_local_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "max_position_embeddings": 128,
    "sliding_window": 16,
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 127,
    "initializer_range": 0.1,  # far from zero, so that experts and routing matter to the logits
}
SPECIAL: dict[str, dict] = {}


def tiny_config(model: str, config_class: type) -> PreTrainedConfig:
    default = config_class().to_dict()
    small = {name: value for name, value in SMALL.items() if default.get(name) is not None}
    return config_class(**{**small, **SPECIAL.get(model, {})})


def model_classes(model: str, config_class: type) -> list[type]:
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    classes = [
        c
        for c in vars(module).values()
        if isinstance(c, type)
        and issubclass(c, PreTrainedModel)
        and c.__module__ == module.__name__
        and c.config_class is config_class
        and not c.__name__.endswith("PreTrainedModel")
    ]
    return sorted(classes, key=lambda c: ("ForCausalLM" not in c.__name__, "ForConditional" not in c.__name__))


def tiny_model(entry: ExpertsClass) -> PreTrainedModel:
    """A random model with these experts in it."""
    errors = []
    for config_class in config_classes(entry.model):
        for cls in model_classes(entry.model, config_class):
            try:
                torch.manual_seed(0)
                model = cls(tiny_config(entry.model, config_class)).eval()
            except Exception as error:
                errors.append(f"{cls.__name__}: {type(error).__name__}: {error}")
                continue
            if any(isinstance(m, entry.load()) for m in model.modules()):
                return model
            errors.append(f"{cls.__name__}: no experts")
    raise LookupError("; ".join(errors))
