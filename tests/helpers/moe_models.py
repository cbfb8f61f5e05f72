"""Every model of Transformers with decorated experts, and of the installed one a tiny random model of each."""

from __future__ import annotations

import ast
import functools
import importlib
import itertools
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from oracle import dequantized_fp4

DECORATOR = "use_experts_implementation"
INSTALLED = Path(transformers.__file__).parent


class ExpertsClass(NamedTuple):
    model: str  # folder of transformers.models
    name: str
    options: dict  # of the decorator

    def load(self) -> type:
        return getattr(importlib.import_module(f"transformers.models.{self.model}.modeling_{self.model}"), self.name)


@functools.cache
def experts_classes(package: Path = INSTALLED) -> tuple[ExpertsClass, ...]:
    """From the sources: importing all modeling files takes many seconds."""
    found = []
    for path in sorted((package / "models").glob("*/modeling_*.py")):
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


class RouterClass(NamedTuple):
    model: str
    name: str

    load = ExpertsClass.load


# Why the class's own forward stays: for docs/models.md.
OWN_ROUTERS = {
    "DbrxRouter": "returns logits alone",
    "Llama4Router": "part of `Llama4TextMoe`: returns a score for every expert",
    "AXK2TopkRouter": "served where there is one group; else experts outside of the chosen groups may win",
    "DeepseekV4HashRouter": "the experts follow from the tokens' ids",
    "DiffusionGemmaTextRouter": "normalises and scales its input, and each expert",
    "Gemma4TextRouter": "normalises and scales its input, and each expert",
    "InklingTopkRouter": "weighs shared experts, too",
    "MuseSparkTopkRouter": "scales its logits",
    "PhimoeTopKRouter": "sparse mixer, one expert after another",
    "ZayaRouter": "an MLP with a state, and an expert that skips",
}


# Likewise of blocks that are computed part by part.
OWN_BLOCKS = {
    "AXK1MoE": "normalises the sum",
    "DeepseekV4SparseMoeBlock": "is given the tokens' ids",
    "Ernie4_5_VLMoeSparseMoeBlock": "returns flat results, and logits",
    "InklingMoE": "its router weighs shared experts",
    "MuseSparkMoE": "projects before and after its experts",
    "NemotronHMoE": "projects before and after its experts",
    "OpenAIPrivacyFilterMLP": "returns other weights than it computes with",
    "PhimoeSparseMoeBlock": "its router is not served",
    "ZayaSparseMoeBlock": "is given what another router returned",
}


@functools.cache
def block_classes(package: Path = INSTALLED) -> tuple[RouterClass, ...]:
    """From the sources: those of which `forward` takes hidden states and little more, and calls decorated experts."""
    found = []
    for model in sorted({entry.model for entry in experts_classes(package)}):
        source = (package / f"models/{model}/modeling_{model}.py").read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            functions = [child for child in getattr(node, "body", ()) if isinstance(child, ast.FunctionDef)]
            for forward in functions:
                if forward.name == "forward" and len(forward.args.args) <= 3:
                    if "self.experts(" in ast.unparse(forward):
                        found.append(RouterClass(model, node.name))
    return tuple(found)


def tiny_block(cls: type, model: torch.nn.Module) -> torch.nn.Module:
    """The first that there is in a model, with random parameters and buffers.

    Raises:
        LookupError: it has none.
    """
    block = next((module for module in model.modules() if type(module) is cls), None)
    if block is None:
        raise LookupError(f"{type(model).__name__} has no {cls.__name__}")
    generator = torch.Generator().manual_seed(0)
    for tensor in (*block.parameters(), *block.buffers()):
        tensor.data = 0.2 * torch.randn(tensor.shape, generator=generator)
    return block.eval()


def lone_block(entry: RouterClass) -> torch.nn.Module:
    """As `tiny_block`, of a class that no tiny model has."""
    errors = []
    # Beside the config perhaps an intermediate size, or a layer's number.
    for config_class, other in itertools.product(config_classes(entry.model), ((), (32,), (0,), (1,))):
        try:
            block = entry.load()(tiny_config(entry.model, config_class), *other)
        except (AttributeError, IndexError, StrictDataclassError, TypeError) as error:
            errors.append(error)
        else:
            return tiny_block(type(block), torch.nn.ModuleList([block]))
    raise LookupError(f"no config of {entry.model} fits {entry.name}: {errors}")


@functools.cache
def router_classes(package: Path = INSTALLED) -> tuple[RouterClass, ...]:
    """From the sources: those beside decorated experts, and beside others that are served."""
    found = []
    beside = {entry.model for entry in experts_classes(package)} | {"dbrx", "llama4", "longcat_flash", "step3p7"}
    for model in sorted(beside):
        if not (package / f"models/{model}").exists():  # in an older Transformers
            continue
        source = (package / f"models/{model}/modeling_{model}.py").read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith(("Router", "MoEV1Gate")):
                found.append(RouterClass(model, node.name))
    return tuple(found)


def tiny_router(entry: RouterClass) -> torch.nn.Module:
    """With random parameters and buffers."""
    errors = []
    for config_class, layer in itertools.product(config_classes(entry.model), ((), (0,))):
        try:
            module = entry.load()(tiny_config(entry.model, config_class), *layer)
        except (AttributeError, StrictDataclassError, TypeError) as error:
            errors.append(error)
        else:
            generator = torch.Generator().manual_seed(0)
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.data = 0.3 * torch.randn(tensor.shape, generator=generator)
            return module.eval()
    raise LookupError(f"no config of {entry.model} fits {entry.name}: {errors}")


def config_classes(model: str) -> list[type]:
    """Those of a text model first."""
    module = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
    classes = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, PreTrainedConfig) and c.__module__ == module.__name__
    ]
    return sorted(classes, key=lambda c: "Text" not in c.__name__)


def make_experts(cls: type, config: PreTrainedConfig) -> torch.nn.Module:
    sizes = getattr(config, "moe_intermediate_size", None)
    return cls(config, sizes[0]) if isinstance(sizes, list) else cls(config)  # Ernie's block chooses


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
    "moe_hidden_size": 32,
    "num_experts_per_token": 2,
    "num_expert_group": 2,
    "router_hidden_size": 16,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_dt_rank": 4,
    "shared_intermediate_size": 24,
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 127,
    "initializer_range": 0.1,  # far from zero, so that experts and routing matter to the logits
}
SPECIAL = {
    "deepseek_ocr2": {"n_routed_experts": 8, "num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 24},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1},
    "deepseek_v4": {"head_dim": 16, "o_lora_rank": 16},
    "longcat_flash": {"n_routed_experts": 8, "zero_expert_num": 4, "num_experts_per_tok": 2},
    "dots3_note": {
        "head_dim": 24,
        "layer_types": ["indexed_attention"] * 2,  # sliding has sizes of its own
        "adapter_in_dim": 64,
    },
    "ernie4_5_vl_moe": {"moe_intermediate_size": [24, 24]},
    "flint": {"mlp_only_layers": [0]},
    "gemma4": {
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 8,
    },
    "glm4v_moe": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
        },
    },
    "glm5_next": {"index_kpool": 4, "qk_rope_head_dim": 0},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hy_v4_vl": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16},
    "qwen3_omni_moe": {"shared_expert_intermediate_size": 24},
    "qwen4_exp": {
        "hc_lowrank": 8,
        "ple_embed_dim": 16,
        "ngram_vocab_size_base": 64,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "zaya": {"num_experts_per_tok": 1},
}


# Experts that no model of a few lines of config holds: they are tested alone.
ALONE = {
    "Ernie4_5_VLMoeMoeExperts": "two kinds of experts, for text and for images",
    "MistralLarge4TextExperts": "only in a model with vision",
    "Qwen3OmniMoeTalkerTextExperts": "takes embeddings of another model",
}


def tiny_config(model: str, config_class: type) -> PreTrainedConfig:
    default = config_class().to_dict()
    small = {name: value for name, value in SMALL.items() if default.get(name) is not None}
    if "qk_rope_head_dim" in small:
        small.pop("head_dim", None)  # the same thing, where both exist
    if default.get("num_key_value_heads") == default.get("num_attention_heads"):
        small["num_key_value_heads"] = SMALL["num_attention_heads"]
    for name, value in default.items():
        if isinstance(value, list) and len(value) == default.get("num_hidden_layers"):
            kinds = list(dict.fromkeys(value)) if isinstance(value[0], str) else value
            small[name] = (kinds * 2)[:2]  # one layer of each kind
    return config_class(**{**small, **SPECIAL.get(model, {})})


def tiny_module(entry: ExpertsClass) -> torch.nn.Module:
    """Experts with random parameters."""
    for config_class in config_classes(entry.model):
        try:
            module = make_experts(entry.load(), tiny_config(entry.model, config_class))
        except (AttributeError, StrictDataclassError):
            continue  # the config of another part of the model
        generator = torch.Generator().manual_seed(0)
        for parameter in module.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        return module
    raise LookupError(f"no config of {entry.model} fits {entry.name}")


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
                config = tiny_config(entry.model, config_class)
                with torch.device("meta"):
                    model = cls(config)
            except Exception as error:
                errors.append(f"{cls.__name__}: {type(error).__name__}: {error}")
                continue
            if not any(isinstance(m, entry.load()) for m in model.modules()):
                errors.append(f"{cls.__name__}: no experts")
                continue
            sizes = {name: p.numel() for name, p in model.named_parameters()}
            if sum(sizes.values()) > 3e6:
                errors.append(f"{cls.__name__} is not tiny: {max(sizes, key=sizes.get)}")
                continue
            torch.manual_seed(0)
            return cls(config).eval()
    raise LookupError("; ".join(errors))


# --- Without the decorator --------------------------------------------------------------------------------------------

# (model, class) -> how it is served, or why it is not; for docs/models.md.
UNDECORATED = {
    ("dbrx", "DbrxExperts"): "composed; gate and up are two weights and take a product each",
    ("doge", "DogeCDMoE"): "not served: an expert is two vectors from embeddings, and no GEMM",
    ("inkling", "InklingSharedExperts"): "not served: every token takes all of them",
    (
        "jetmoe",
        "JetMoeParallelExperts",
    ): "a grouped GEMM, in MLPs and attention; what surrounds it is the model's own",
    ("llama4", "Llama4TextExperts"): "only as part of `Llama4TextMoe`: alone it is a `bmm` over all tokens already",
    ("llama4", "Llama4TextMoe"): "fused; the chosen experts, where the class's own forward runs all on every token",
    ("longcat_flash", "LongcatFlashExperts"): "fused; the experts without weights are a weighted sum",
    ("nllb_moe", "NllbMoeExperts"): "not served: each expert is a module, no weights are stacked",
    ("step3p7", "Step3p7Experts"): "fused; composed in layers that clamp, which they do after the activation",
    ("switch_transformers", "SwitchTransformersExperts"): "not served: each expert is a module, no weights are stacked",
    ("vitpose_backbone", "VitPoseNaiveMoe"): "not served: each expert is a module, no weights are stacked",
}


def stacked_without_decorator(package: Path = INSTALLED) -> set[tuple[str, str]]:
    """Classes with parameters (experts, ., .)."""
    found = set()
    for path in sorted((package / "models").glob("*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        if "xperts" not in source:
            continue
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and not any(DECORATOR in ast.dump(d) for d in node.decorator_list):
                if any(_is_stack(call) for call in ast.walk(node)):
                    found.add((path.parent.name, node.name))
    return found


def _is_stack(call: ast.AST) -> bool:
    """torch.empty(num_experts, ., .), or another function of that many sizes."""
    if not isinstance(call, ast.Call) or getattr(call.func, "attr", None) not in ("empty", "zeros", "ones", "randn"):
        return False
    sizes = call.args[0].elts if call.args and isinstance(call.args[0], ast.Tuple) else call.args
    return len(sizes) == 3 and "experts" in ast.unparse(sizes[0])


_TINY = {
    name: SMALL[name]
    for name in (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("intermediate_size", "num_local_experts", "num_experts_per_tok", "max_position_embeddings"),
        *("pad_token_id", "bos_token_id", "eos_token_id", "initializer_range"),
    )
}


def tiny_undecorated_model(model: str, **options) -> PreTrainedModel:
    """A random model for text, of one of the families of UNDECORATED that are served."""
    config, name = {
        "dbrx": (
            {
                "d_model": 64,
                "n_heads": 4,
                "n_layers": 2,
                "max_seq_len": 128,
                "vocab_size": 128,
                "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
                "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 2},
                "initializer_range": 0.1,
            },
            "Dbrx",
        ),
        "jetmoe": ({**_TINY, "kv_channels": 16}, "JetMoe"),
        "llama4": ({**_TINY, "num_experts_per_tok": 1, "intermediate_size_mlp": 48}, "Llama4Text"),
        "longcat_flash": (
            {
                **_TINY,
                "num_layers": 1,
                "ffn_hidden_size": 48,
                "q_lora_rank": 16,
                "kv_lora_rank": 16,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 8,
                "head_dim": 8,
                "v_head_dim": 16,
                "num_key_value_heads": 4,
                "moe_topk": 2,
                "n_routed_experts": 8,
                "zero_expert_num": 4,
                "expert_ffn_hidden_size": 24,
            },
            "LongcatFlash",
        ),
        "step3p7": (
            {
                **_TINY,
                "moe_intermediate_size": 24,
                "n_routed_experts": 8,
                "share_expert_dim": 24,
                "mlp_layer_types": ["dense", "sparse"],
                "sliding_window": 16,
                "num_nextn_predict_layers": 0,
            },
            "Step3p7Text",
        ),
    }[model]
    config_class = next(c for c in config_classes(model) if c.__name__ == f"{name}Config")
    torch.manual_seed(0)
    return model_classes(model, config_class)[0](config_class(**{**config, **options})).eval()


def with_the_numbers_of(quantized: PreTrainedModel, dense: PreTrainedModel) -> PreTrainedModel:
    """`dense` with what the 4-bit codes of `quantized` stand for as its experts' weights."""
    for path, module in quantized.named_modules():
        for name in ("gate_up_proj", "up_proj", "down_proj"):
            scale = getattr(module, f"{name}_scale_inv", None)
            if scale is not None:
                numbers = dequantized_fp4(getattr(module, name), scale)
                twin = dense.get_submodule(path)
                assert not module.is_transposed
                getattr(twin, name).data.copy_(numbers.mT if twin.is_transposed else numbers)
    return dense
