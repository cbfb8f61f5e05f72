#!/usr/bin/env python3
"""The memory of a training step: LoRA over experts in 4 bits, of a model with Qwen3-30B-A3B's dimensions.

    python benchmarks/memory.py      # on a GPU: the peaks, and docs/measurements/<gpu>-memory.json

48 layers, experts in random codes, the rest in bf16; adapters of rank 16 in bf16, on all experts' weights or on those
of attention; 4096 tokens, gradient checkpointing, one forward, backward and step of fused AdamW, as Trainer takes them.
The loss is that of the model, which makes all logits at once, or of 512 tokens at a time, as fused losses make it. On a
CPU a small model, to see that the script runs.
"""

from __future__ import annotations

import os

os.environ["USE_HUB_KERNELS"] = "NO"  # as in generate.py

import peft
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from common import argument_parser, header, staged_kernel, write
from generate import DEVICE, qwen3_config, random_tokens

TOKENS, RANK = (4096, 16) if DEVICE == "cuda" else (64, 4)
LAYERS = 48
WEIGHTS = ("gate_up_proj", "down_proj")
TARGETS = {
    "experts": {"target_modules": [], "target_parameters": [f"mlp.experts.{name}" for name in WEIGHTS]},
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
}


def random_codes(module: nn.Module) -> None:
    """Of numbers about as large as initialised weights: exponents around 2^-7."""
    for name in WEIGHTS:
        experts, N, K = getattr(module, name).shape
        codes = torch.randint(0, 256, (experts, N, K // 2), dtype=torch.uint8, device=DEVICE)
        scale = torch.randint(119, 122, (experts, N, K // 32), dtype=torch.uint8, device=DEVICE)
        setattr(module, name, nn.Parameter(codes, requires_grad=False))
        module.register_parameter(f"{name}_scale_inv", nn.Parameter(scale, requires_grad=False))


def build_model(kernel) -> nn.Module:
    """Never with an expert's weight in more than 4 bits."""
    config = qwen3_config()
    config.num_hidden_layers = LAYERS if DEVICE == "cuda" else config.num_hidden_layers
    config._experts_implementation = "moe_grouped_gemm"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for module in model.modules():
        if kernel.integration.modules.is_experts(module):
            random_codes(module)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                filled = torch.empty(parameter.shape, dtype=parameter.dtype, device=DEVICE)
                filled.fill_(1.0) if parameter.ndim == 1 else filled.normal_(0, 0.02)
                module._parameters[name] = nn.Parameter(filled)
    with torch.device(DEVICE):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers were on "meta"
    return model


def adapted(model: nn.Module, adapters: str) -> nn.Module:
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, **TARGETS[adapters])
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(DEVICE, torch.bfloat16)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    return model.train()


def loss_of(model: nn.Module, tokens: torch.Tensor, in_parts: bool) -> torch.Tensor:
    if not in_parts:
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss
    causal = model.get_base_model()
    hidden_states = causal.model(input_ids=tokens, use_cache=False).last_hidden_state[0, :-1]

    def of_part(hidden_states, labels):
        return F.cross_entropy(causal.lm_head(hidden_states).float(), labels, reduction="sum")

    parts = zip(hidden_states.split(512), tokens[0, 1:].split(512))
    return sum(checkpoint(of_part, *part, use_reentrant=False) for part in parts) / (tokens.numel() - 1)


def count(name: str, parameter: nn.Parameter) -> int:
    """Of the model that the codes stand for."""
    if name.endswith("_scale_inv"):
        return 0
    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)


def gib(size: int) -> float:
    return size / 2**30


def allocated(peak: bool = False) -> int:
    if DEVICE == "cpu":
        return 0
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


def main() -> None:
    parser = argument_parser(__doc__, "docs/measurements/<gpu>-memory.json")
    args = parser.parse_args()

    kernel = staged_kernel()
    kernel.register()
    torch.manual_seed(0)
    model = build_model(kernel)
    numbers = sum(count(*named) for named in model.named_parameters())
    tokens = random_tokens(1, TOKENS, model.config.vocab_size)
    layers = model.config.num_hidden_layers
    sizes = {"tokens": TOKENS, "rank": RANK, "parameters": numbers, "model_gib": gib(allocated())}
    result = header(transformers, peft, layers=layers, **sizes, cases=[])
    print(f"{result['gpu']}: {numbers / 1e9:.1f}B parameters take {result['model_gib']:.1f} GiB")
    print(f"{'adapters':10} {'trained':>8} {'loss':>8} {'peak GiB':>9}")
    for adapters in TARGETS:
        model = adapted(model, adapters)
        for in_parts in (False, True):
            case = step(model, tokens, in_parts)
            result["cases"].append({"adapters": adapters, "loss": "in parts" if in_parts else "at once", **case})
            trained = f"{case['trained'] / 1e6:.0f}M"
            print(f"{adapters:10} {trained:>8} {result['cases'][-1]['loss']:>8} {case['peak_gib']:9.1f}", flush=True)
            write(args.out, result)
        model = model.unload()
    print(args.out)


def step(model: nn.Module, tokens: torch.Tensor, in_parts: bool) -> dict:
    """The peak of two steps: the second has the optimizer's state from its beginning."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    case = {"trained": sum(parameter.numel() for parameter in trained)}
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        loss = loss_of(model, tokens, in_parts)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if not torch.isfinite(loss):
        raise SystemExit(f"the loss is {loss.item()}: nothing is reported")
    return case | {"peak_gib": gib(allocated(peak=True))}


if __name__ == "__main__":
    main()
