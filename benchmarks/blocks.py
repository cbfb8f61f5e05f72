#!/usr/bin/env python3
"""Times MoE blocks of Transformers: by their own forward, by this kernel part by part, and as one call of it.

    python benchmarks/blocks.py      # on a GPU: the table, and docs/measurements/<gpu>-blocks.json

Modules in bf16 with random weights, of the sizes of released models; Transformers' experts by the faster of grouped_mm
and batched_mm. Host: until the call returns, with a GPU that has nothing to do. Before anything is timed results are
compared: where bf16 makes logits equal, a token may go to another expert.
"""

from __future__ import annotations

import copy
from importlib import import_module

import torch
import transformers
from kernels import Mode, kernelize

import common

TOKENS = (1, 4, 16, 64, 1024)
# Module, class, config class, and what differs from the config's defaults.
BLOCKS = {
    "Moonlight-16B": (
        *("deepseek_v3", "DeepseekV3MoE", "DeepseekV3Config"),
        {"hidden_size": 2048, "moe_intermediate_size": 1408, "n_routed_experts": 64, "num_experts_per_tok": 6}
        | {"n_group": 1, "topk_group": 1, "n_shared_experts": 2},
    ),
    "GLM-4.5-Air": (
        *("glm4_moe", "Glm4MoeMoE", "Glm4MoeConfig"),
        {"hidden_size": 4096, "moe_intermediate_size": 1408, "n_routed_experts": 128, "num_experts_per_tok": 8}
        | {"n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    ),
    "Qwen1.5-MoE-A2.7B": (
        *("qwen2_moe", "Qwen2MoeSparseMoeBlock", "Qwen2MoeConfig"),
        {"hidden_size": 2048, "moe_intermediate_size": 1408, "num_experts": 60, "num_experts_per_tok": 4}
        | {"shared_expert_intermediate_size": 5632},
    ),
    "Qwen3-30B-A3B": (
        *("qwen3_moe", "Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig"),
        {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
    ),
}


def modules(kernel, name: str, device: str) -> dict[str, torch.nn.Module]:
    """The same weights, in the same memory."""
    model, cls, config, sizes = BLOCKS[name]
    modeling = import_module(f"transformers.models.{model}.modeling_{model}")
    config = getattr(import_module(f"transformers.models.{model}"), config)(**sizes)
    generator = torch.Generator(device).manual_seed(0)
    with torch.device(device):
        stock = getattr(modeling, cls)(config).bfloat16().eval().requires_grad_(False)
    for parameter in stock.parameters():
        parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    for buffer_name, buffer in stock.named_buffers():
        stock.get_submodule(buffer_name.rpartition(".")[0])._buffers[buffer_name.rpartition(".")[2]] = buffer.float()
    tensors = {id(tensor): tensor for tensor in (*stock.parameters(), *stock.buffers())}
    parts, whole = (copy.deepcopy(stock, dict(tensors)) for _ in range(2))
    for block in (parts, whole):
        kernelize(block, mode=Mode.INFERENCE, device=device)
    kernel.integration.switching.switch_off(parts, for_good=True)
    if kernel.status(whole)[""] != "moe_grouped_gemm":
        raise SystemExit(f"{name}: {kernel.status(whole)['']}: nothing is timed")
    return {"stock": stock, "parts": parts, "whole": whole}


def run_case(name, blocks, tokens, device) -> dict:
    stock = blocks["stock"]
    x = torch.randn(tokens, 1, BLOCKS[name][3]["hidden_size"], device=device, dtype=torch.bfloat16)
    expected, case = stock(x).float(), {"block": name, "tokens": tokens}
    for way in ("parts", "whole"):
        out = blocks[way](x).float()
        near = ((out - expected).norm(dim=-1) < 0.02 * expected.norm(dim=-1)).float().mean().item()
        if not near > 0.9:
            raise SystemExit(f"{name}, T={tokens}, {way}: {1 - near:.1%} of the tokens differ: nothing is timed")
        case[f"{way}_same"] = near
        case |= common.all_times(way, [lambda block=blocks[way]: block(x)])
    for implementation in ("grouped_mm", "batched_mm"):
        if implementation == "batched_mm" and tokens > 64:  # it copies the weights of every slot
            continue
        stock.experts.config._experts_implementation = implementation
        case |= common.all_times(implementation, [lambda: stock(x)])
        torch.cuda.empty_cache()
    return case


def best_stock(case, how) -> float:
    return min(case[f"{name}_{how}_us"] for name in ("grouped_mm", "batched_mm") if f"{name}_{how}_us" in case)


@torch.no_grad()
def main() -> None:
    parser = common.argument_parser(__doc__, "docs/measurements/<gpu>-blocks.json")
    parser.add_argument("--blocks", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    args = parser.parse_args()
    common.need_gpu()
    kernel = common.staged_kernel()
    kernel.register()
    result = common.header(transformers, cases=[])
    print("microseconds: in a graph, eager, and of the host alone")
    print(f"{'block':18} {'T':>6}" + 3 * f" {'stock':>9} {'parts':>8} {'whole':>8}")
    for name in args.blocks:
        blocks = modules(kernel, name, "cuda")
        for tokens in args.tokens:
            case = run_case(name, blocks, tokens, "cuda")
            result["cases"].append(case)
            cells = (
                f" {best_stock(case, how):9.1f} {case[f'parts_{how}_us']:8.1f} {case[f'whole_{how}_us']:8.1f}"
                for how in ("graph", "eager", "host")
            )
            print(f"{name:18} {tokens:6}" + "".join(cells), flush=True)
        common.write(args.out, result)
        del blocks
        torch.cuda.empty_cache()
    print(args.out)


if __name__ == "__main__":
    main()
