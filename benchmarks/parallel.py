#!/usr/bin/env python3
"""Times prefill of a model that GPUs share, in each way that Transformers has: its own experts against this kernel's.

    torchrun --nproc-per-node 2 benchmarks/parallel.py     # and docs/measurements/<GPUs>x-<gpu>-parallel.json

A DeepSeek-V3 of the 16B "moonlight" dimensions with LAYERS layers and random weights (on CPUs a small one, to see that
the script runs). Logits are compared for each way and length before it is timed.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path

# Read when Transformers is imported: its own Hub kernels (RMSNorm, ...) stay off, so that only ours make a difference.
os.environ["USE_HUB_KERNELS"] = "NO"
sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))  # which has a generate.py, too

import one_line_errors  # noqa: F401
import torch
import torch.distributed as dist
import transformers
from demo import DEVICE, random_model
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from common import argument_parser, header, staged_kernel, write
from generate import bf16_noise, check_logits, compare, deepseek_config, prefill_logits, random_tokens

LAYERS = 9
TOKENS = (1024, 4096, 16384) if DEVICE == "cuda" else (64,)
REPEATS = 9 if DEVICE == "cuda" else 1
IMPLEMENTATIONS = {"stock": "grouped_mm", "ours": "moe_grouped_gemm"}


def plans(ranks: int) -> dict[str, DistributedConfig]:
    sentinels = {"model.layers.*.mlp.gate": "ep_router", "model.layers.*.mlp.experts": "moe_tp_experts"}
    return {
        "experts, tokens sent": DistributedConfig(tp_size=ranks, ep_size=ranks),
        "experts, tokens everywhere": DistributedConfig(tp_size=ranks, ep_size=ranks, ep_plan=sentinels),
        "tensors": DistributedConfig(tp_size=ranks),
        "FSDP2 + experts, tokens sent": DistributedConfig(fsdp_size=ranks, ep_size=ranks),
    }


def build_model() -> PreTrainedModel:
    """Whole, with the same weights on every rank."""
    config = deepseek_config()
    config.num_hidden_layers = min(config.num_hidden_layers, LAYERS)
    return random_model(config)


def shared(model, plan: DistributedConfig):
    """This rank's part."""
    plan, _, mesh = type(model).prepare_distribute_model(plan)
    return type(model).maybe_distribute_model(model, plan, mesh)


@torch.no_grad()
def milliseconds(model, tokens) -> float:
    """From a common start until this rank has its logits: the median, after two calls that do not count."""

    synchronize = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None

    def run():
        dist.barrier()
        synchronize()
        start = time.perf_counter()
        model(tokens, use_cache=False, logits_to_keep=1)
        synchronize()
        return 1e3 * (time.perf_counter() - start)

    return statistics.median([run() for _ in range(2 + REPEATS)][2:])


def measure_noise(model) -> dict[int, tuple[float, float]]:
    """By length, of the whole model: where tokens are sent (top_k 1) Transformers' own experts agree exactly."""
    noise = {}
    for length in TOKENS:
        tokens = random_tokens(1, length, model.config.vocab_size)
        noise[length] = bf16_noise(model, tokens, prefill_logits(model, tokens))
    return noise


def run_case(model, way: str, length: int, noise: tuple[float, float]) -> dict:
    tokens = random_tokens(1, length, model.config.vocab_size)
    model.set_experts_implementation(IMPLEMENTATIONS["stock"])
    expected = prefill_logits(model, tokens)
    model.set_experts_implementation(IMPLEMENTATIONS["ours"])
    found = compare(prefill_logits(model, tokens), expected)
    check_logits(f"{way}, {length} tokens", found, noise)
    case = {"way": way, "tokens": length, "relative_error": found[0], "stock_relative_error": noise[0]}
    for name, implementation in IMPLEMENTATIONS.items():
        model.set_experts_implementation(implementation)
        case[f"{name}_ms"] = milliseconds(model, tokens)
    return case


def main() -> None:
    ranks, local_rank = (int(os.environ.get(name, 0)) for name in ("WORLD_SIZE", "LOCAL_RANK"))
    args = argument_parser(__doc__, f"docs/measurements/{ranks}x-<gpu>-parallel.json").parse_args()
    if not ranks:
        raise SystemExit(
            "no torchrun: torchrun --nproc-per-node 2 benchmarks/parallel.py starts a process for each GPU"
        )
    if DEVICE == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise SystemExit(f"{ranks} processes and {torch.cuda.device_count()} GPUs: --nproc-per-node says how many")
        torch.cuda.set_device(local_rank)
    staged_kernel().register()
    noise, cases = measure_noise(build_model()), []
    for way, plan in plans(ranks).items():
        model = shared(build_model(), plan)
        for length in TOKENS:
            case = run_case(model, way, length, noise[length])
            cases.append(case)
            if dist.get_rank() == 0:
                speed_up = case["stock_ms"] / case["ours_ms"]
                print(f"{way:30} {length:6} {case['stock_ms']:8.1f} {case['ours_ms']:8.1f} ms {speed_up:6.2f}x")
        layers = model.config.num_hidden_layers
        del model
    if dist.get_rank() == 0:
        write(args.out, header(transformers, gpus=ranks, layers=layers, cases=cases))
        print(args.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
