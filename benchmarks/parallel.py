#!/usr/bin/env python3
"""Times a model that GPUs share, in each way that Transformers has: its own experts against this kernel's.

    torchrun --nproc-per-node 2 benchmarks/parallel.py     # and docs/measurements/<GPUs>x-<gpu>-parallel.json
    torchrun --nproc-per-node 4 benchmarks/parallel.py --repeats 40

Prefill of several lengths, and a step of decoding a batch. A DeepSeek-V3 of the 16B "moonlight" dimensions with LAYERS
layers and random weights (on CPUs a small one, to see that the script runs). Logits are compared for each way and case
before it is timed. The two take turns, since a host that others use, too, is slower at one minute than at another: a
speed-up is the median of those of the rounds, printed with its quartiles. Host time is that of a layer's experts, until
their call returns.
"""

from __future__ import annotations

import gc
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
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from common import argument_parser, header, staged_kernel, write
from generate import bf16_noise, check_logits, compare, deepseek_config, prefill_logits, random_tokens

LAYERS = 9
PREFILL = (1024, 4096, 16384) if DEVICE == "cuda" else (64,)  # tokens of one sequence
BATCH, PROMPT = (64, 128) if DEVICE == "cuda" else (4, 8)  # of a step of decoding
CASES = [("prefill", tokens) for tokens in PREFILL] + [("decode", BATCH)]
REPEATS = 25 if DEVICE == "cuda" else 2
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


class Work:
    """What a case times on a model, and the logits of it that are compared, a sequence of (N, vocabulary)."""

    def __init__(self, model, phase: str, tokens: int):
        self.model = model
        if phase == "prefill":
            self.tokens, self._cache = random_tokens(1, tokens, model.config.vocab_size), None
            return
        prompts = random_tokens(tokens, PROMPT + 1, model.config.vocab_size)
        self.tokens = prompts[:, PROMPT:]
        with torch.no_grad():
            self._cache = model(prompts[:, :PROMPT], use_cache=True, logits_to_keep=1).past_key_values

    @torch.no_grad()
    def run(self) -> torch.Tensor:
        if self._cache is None:
            return self.model(self.tokens, use_cache=False, logits_to_keep=1).logits
        logits = self.model(self.tokens, past_key_values=self._cache, use_cache=True).logits
        self._cache.crop(-1)  # what this step added
        return logits

    def logits(self):
        return prefill_logits(self.model, self.tokens) if self._cache is None else [self.run()[:, -1]]


class Host:
    """How long calls of Transformers' experts implementations take until they return."""

    def __init__(self):
        self.seconds = []
        for name in IMPLEMENTATIONS.values():
            ALL_EXPERTS_FUNCTIONS.register(name, self._timed(ALL_EXPERTS_FUNCTIONS[name]))

    def _timed(self, function):
        def timed(*args):
            start = time.perf_counter()
            out = function(*args)
            self.seconds.append(time.perf_counter() - start)
            return out

        return timed


def time_once(work: Work, host: Host) -> tuple[float, float]:
    """Milliseconds from a common start until this rank has its logits, and microseconds of the host for a layer."""
    synchronize = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    dist.barrier()
    synchronize()
    host.seconds.clear()
    start = time.perf_counter()
    work.run()
    synchronize()
    return 1e3 * (time.perf_counter() - start), 1e6 * statistics.median(host.seconds)


def time_rounds(work: Work, host: Host, repeats: int) -> dict:
    """Medians, after two rounds that do not count; who begins changes from round to round."""
    found = {name: [] for name in IMPLEMENTATIONS}
    gc.collect()
    gc.disable()  # as timeit does
    try:
        for number in range(2 + repeats):
            for name in list(IMPLEMENTATIONS)[:: 1 if number % 2 else -1]:
                work.model.set_experts_implementation(IMPLEMENTATIONS[name])
                found[name].append(time_once(work, host))
    finally:
        gc.enable()
    case = {}
    for name, rounds in found.items():
        ms, us = zip(*rounds[2:])
        case[f"{name}_ms"], case[f"{name}_host_us"] = statistics.median(ms), statistics.median(us)
    speed_ups = [stock[0] / ours[0] for stock, ours in zip(found["stock"][2:], found["ours"][2:])]
    case["speed_up"], (least, _, most) = statistics.median(speed_ups), statistics.quantiles(speed_ups, n=4)
    return case | {"speed_up_quartiles": [least, most]}


def measure_noise(model) -> dict[tuple, tuple[float, float]]:
    """By case, of the whole model: where tokens are sent (top_k 1) Transformers' own experts agree exactly."""
    noise = {}
    for phase, tokens in CASES:
        model.set_experts_implementation("grouped_mm")
        work = Work(model, phase, tokens)
        expected = work.logits()
        if phase == "prefill":
            noise[phase, tokens] = bf16_noise(model, work.tokens, expected)
            continue
        model.set_experts_implementation("eager")
        noise[phase, tokens] = compare(work.logits(), expected)
    return noise


def run_case(model, way: str, phase: str, tokens: int, noise: tuple[float, float], host: Host, repeats: int) -> dict:
    model.set_experts_implementation(IMPLEMENTATIONS["stock"])
    work = Work(model, phase, tokens)
    expected = work.logits()
    model.set_experts_implementation(IMPLEMENTATIONS["ours"])
    found = compare(work.logits(), expected)
    check_logits(f"{way}, {phase}, {tokens} tokens", found, noise)
    del expected
    case = {"way": way, "phase": phase, "tokens": tokens, "relative_error": found[0], "stock_relative_error": noise[0]}
    return case | time_rounds(work, host, repeats)


def row(case: dict) -> str:
    least, most = case["speed_up_quartiles"]
    times = f"{case['stock_ms']:9.2f} {case['ours_ms']:9.2f} {case['speed_up']:7.2f}x ({least:.2f} to {most:.2f})"
    host = f"{case['stock_host_us']:9.0f} {case['ours_host_us']:9.0f}"
    return f"{case['way']:30} {case['phase']:8} {case['tokens']:6} {times} {host}"


def main() -> None:
    ranks, local_rank = (int(os.environ.get(name, 0)) for name in ("WORLD_SIZE", "LOCAL_RANK"))
    parser = argument_parser(__doc__, f"docs/measurements/{ranks}x-<gpu>-parallel.json")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="rounds of a case, two at least")
    args = parser.parse_args()
    if not ranks:
        raise SystemExit(
            "no torchrun: torchrun --nproc-per-node 2 benchmarks/parallel.py starts a process for each GPU"
        )
    if DEVICE == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise SystemExit(f"{ranks} processes and {torch.cuda.device_count()} GPUs: --nproc-per-node says how many")
        torch.cuda.set_device(local_rank)
    staged_kernel().register()
    noise, cases, host = measure_noise(build_model()), [], Host()
    if local_rank == 0:
        print(f"{'':46} {'milliseconds':^19} {'':24} {'host, us a layer':^19}")
        print(f"{'way':30} {'phase':8} {'tokens':>6} {'stock':>9} {'ours':>9} {'speed-up':>8}", end="")
        print(f" {'(quartiles)':15} {'stock':>9} {'ours':>9}")
    for way, plan in plans(ranks).items():
        model = shared(build_model(), plan)
        for phase, tokens in CASES:
            case = run_case(model, way, phase, tokens, noise[phase, tokens], host, args.repeats)
            cases.append(case)
            if dist.get_rank() == 0:
                print(row(case), flush=True)
        layers = model.config.num_hidden_layers
        del model
    if dist.get_rank() == 0:
        write(args.out, header(transformers, gpus=ranks, layers=layers, cases=cases))
        print(args.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
