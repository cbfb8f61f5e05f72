#!/usr/bin/env python3
"""Times routers of Transformers, one of each form, by their own forward and by this kernel.

    python benchmarks/routers.py      # on a GPU: the table, and docs/measurements/<gpu>-routers.json

Modules in bf16, with buffers in fp32, as models are loaded. Eager times are those of a call of the module, Python and
launches included. Before anything is timed the experts are compared: equal logits, of which bf16 has some, may swap.
"""

from __future__ import annotations

import copy
from importlib import import_module

import torch
import transformers
from kernels import Mode, kernelize

import common

TOKENS = (1, 64, 1024, 4096)
# Class, and what differs from the default of its config: the sizes of released models.
ROUTERS = {
    "Qwen3-30B-A3B": ("qwen3_moe", "Qwen3Moe", {"hidden_size": 2048, "num_experts": 128, "num_experts_per_tok": 8}),
    "Mixtral-8x7B": ("mixtral", "Mixtral", {"hidden_size": 4096, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "gpt-oss-120b": ("gpt_oss", "GptOss", {"hidden_size": 2880, "num_local_experts": 128, "num_experts_per_tok": 4}),
    "OLMoE-1B-7B": ("olmoe", "Olmoe", {"hidden_size": 2048, "num_experts": 64, "num_experts_per_tok": 8}),
    "GLM-4.5-Air": (
        *("glm4_moe", "Glm4Moe"),
        {"hidden_size": 4096, "n_routed_experts": 128, "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1},
    ),
    "DeepSeek-V3": (
        *("deepseek_v3", "DeepseekV3"),
        {"hidden_size": 7168, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4},
    ),
}


def router_class(model: str, prefix: str) -> type:
    modeling = import_module(f"transformers.models.{model}.modeling_{model}")
    names = (f"{prefix}TopKRouter", f"{prefix}TopkRouter")
    return next(getattr(modeling, name) for name in names if hasattr(modeling, name))


def modules(kernel, name: str, device: str) -> dict[str, torch.nn.Module]:
    model, prefix, sizes = ROUTERS[name]
    config = getattr(import_module(f"transformers.models.{model}"), f"{prefix}Config")(**sizes)
    generator = torch.Generator(device).manual_seed(0)
    with torch.device(device):
        stock = router_class(model, prefix)(config).eval().requires_grad_(False)
    for parameter in stock.parameters():
        parameter.data = parameter.data.bfloat16().normal_(0, config.hidden_size**-0.5, generator=generator)
    for buffer in stock.buffers():
        buffer.uniform_(0, 0.25, generator=generator)
    kernel.integration.routers.KIND.meet(type(stock).__module__)
    ours = copy.deepcopy(stock)
    kernelize(ours, mode=Mode.INFERENCE, device=device)
    if kernel.status(torch.nn.ModuleList([ours])) != {"0": "moe_grouped_gemm"}:
        raise SystemExit(f"{name}: not served: nothing is timed")
    return {"ours": ours, "stock": stock}


def run_case(name, routers, tokens, device) -> dict:
    hidden_size = ROUTERS[name][2]["hidden_size"]
    x = torch.randn(tokens, hidden_size, device=device, dtype=torch.bfloat16)
    ids, stock_ids = (module(x)[2].sort(dim=1)[0] for module in routers.values())
    same = (ids == stock_ids).all(dim=1).float().mean().item()
    if not same > 0.9:
        raise SystemExit(f"{name}, T={tokens}: {1 - same:.1%} of the tokens go to other experts: nothing is timed")
    case = {"router": name, "tokens": tokens, "same_experts": same}
    for way, module in routers.items():
        case |= common.all_times(way, [lambda module=module: module(x)])
    return case


@torch.no_grad()
def main() -> None:
    parser = common.argument_parser(__doc__, "docs/measurements/<gpu>-routers.json")
    args = parser.parse_args()
    common.need_gpu()
    kernel = common.staged_kernel()
    kernel.register()
    result = common.header(transformers, cases=[])
    print("microseconds in a graph, and eager; tokens that go to the same experts")
    print(f"{'router':15} {'T':>6} {'ours':>8} {'stock':>8} {'ours':>8} {'stock':>8} {'same':>8}")
    for name in ROUTERS:
        routers = modules(kernel, name, "cuda")
        for tokens in TOKENS:
            case = run_case(name, routers, tokens, "cuda")
            result["cases"].append(case)
            times = " ".join(f"{case[f'{way}_{how}_us']:8.1f}" for how in ("graph", "eager") for way in routers)
            print(f"{name:15} {tokens:6} {times} {case['same_experts']:8.2%}", flush=True)
    common.write(args.out, result)
    print(args.out)


if __name__ == "__main__":
    main()
