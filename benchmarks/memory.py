#!/usr/bin/env python3
"""The memory of a training step: LoRA over experts in 4 bits, of a model with Qwen3-30B-A3B's dimensions.

    python benchmarks/memory.py             # on a GPU: the peak, and docs/measurements/<gpu>-memory.json
    python benchmarks/memory.py --limit 24  # in GiB: fails as on a card that has no more

48 layers, experts in random codes, the rest in bf16; adapters of rank 16 on all experts' weights, in bf16; 4096 tokens,
gradient checkpointing, one forward, backward and step of AdamW as Trainer takes them. On a CPU a small model, to see
that the script runs.
"""

from __future__ import annotations

import os

os.environ["USE_HUB_KERNELS"] = "NO"  # as in generate.py

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from common import argument_parser, header, staged_kernel, write
from generate import DEVICE, qwen3_config, random_tokens

TOKENS, RANK = (4096, 16) if DEVICE == "cuda" else (64, 4)
LAYERS = 48
WEIGHTS = ("gate_up_proj", "down_proj")


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


def adapted(model: nn.Module) -> nn.Module:
    targets = [f"mlp.experts.{name}" for name in WEIGHTS]
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=[], target_parameters=targets)
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(DEVICE, torch.bfloat16)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    return model.train()


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
    parser.add_argument("--limit", type=float, help="GiB that may be allocated")
    args = parser.parse_args()
    if args.limit is not None and DEVICE == "cuda":
        torch.cuda.set_per_process_memory_fraction(args.limit * 2**30 / torch.cuda.mem_get_info()[1])

    kernel = staged_kernel()
    kernel.register()
    torch.manual_seed(0)
    model = build_model(kernel)
    loaded, numbers = allocated(), sum(count(*named) for named in model.named_parameters())
    model = adapted(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    tokens = random_tokens(1, TOKENS, model.config.vocab_size)
    peaks = []
    for _ in range(2):  # the second has the optimizer's state from its beginning
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        peaks.append(allocated(peak=True))
    if not torch.isfinite(loss):
        raise SystemExit(f"the loss is {loss.item()}: nothing is reported")
    result = header(
        transformers,
        peft,
        layers=model.config.num_hidden_layers,
        tokens=TOKENS,
        rank=RANK,
        parameters=numbers,
        trained=sum(parameter.numel() for parameter in trained),
        model_gib=gib(loaded),
        peak_gib=gib(max(peaks)),
        limit_gib=args.limit,
    )
    write(args.out, result)
    print(f"{result['gpu']}: {result['parameters'] / 1e9:.1f}B parameters take {result['model_gib']:.1f} GiB,", end=" ")
    print(f"a step that trains {result['trained'] / 1e6:.0f}M more, {result['peak_gib']:.1f} GiB at its peak")
    print(args.out)


if __name__ == "__main__":
    main()
