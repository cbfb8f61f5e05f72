#!/usr/bin/env python3
"""Times one expert layer, whole, against Transformers' own implementations and against the hardware's roof.

    python benchmarks/benchmark_moe.py                     # on a GPU: the table, and benchmarks/results/<gpu>.json
    kernels benchmark org/moe-grouped-gemm --version 1     # two cases, in the form that the Hub collects

Roof of a case: max(FLOPs / sustained matmul rate, bytes of the distinct experts hit / read bandwidth), with both
ceilings measured in the same run. Results are checked before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
from contextlib import contextmanager
from importlib import import_module
from itertools import product
from pathlib import Path

import torch
import triton
import triton.language as tl
from kernels.benchmark import Benchmark

WORKLOADS = {  # H, I, E, top_k, T
    "qwen3-30b": (2048, 768, 128, 8, (1, 64, 1024, 8192)),
    "moonlight": (2048, 1408, 64, 6, (1, 64, 1024, 8192)),
    "glm45-air": (4096, 1408, 128, 8, (1, 64, 1024, 8192)),
    "dsv3": (7168, 2048, 256, 8, (1, 16, 64, 256, 1024, 4096, 16384)),
}
SKEWED_TOKENS = 4096
STOCK = ("grouped_mm", "batched_mm", "eager")
ROUTED = {"moonlight": (1, 1), "dsv3": (8, 4)}  # n_group, topk_group
ROUTED_TOKENS = (1, 64, 1024, 4096)
EXPERT_PARALLEL = ("glm45-air", "dsv3")  # one rank of EP_SIZE, which has 1 / EP_SIZE of the experts
EP_SIZE = 8
EP_TOKENS = (64, 1024, 8192)


# --- inputs -----------------------------------------------------------------------------------------------------------


def expert_weights(hidden_dim, inter, experts, device):
    """gate_up_proj (E, 2I, H) and down_proj (E, H, I) in bf16, N(0, 0.02)."""
    return [
        torch.empty(experts, *shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
        for shape in ((2 * inter, hidden_dim), (hidden_dim, inter))
    ]


def routed_tokens(tokens, hidden_dim, experts, top_k, device, zipf=False):
    """hidden_states, top_k_index (each token picks top_k distinct experts) and top_k_weights."""
    odds = torch.ones(experts, device=device)
    if zipf:
        odds = 1 / torch.arange(1, experts + 1, device=device)
    index = torch.multinomial(odds.expand(tokens, -1), top_k)
    weights = torch.softmax(torch.randn(tokens, top_k, device=device), dim=-1)
    return torch.randn(tokens, hidden_dim, device=device, dtype=torch.bfloat16), index, weights


class MoEExpertsBenchmark(Benchmark):
    """Two cases of the moonlight layer for `kernels benchmark`."""

    seed = 0

    def prepare(self, tokens):
        hidden_dim, inter, experts, top_k, _ = WORKLOADS["moonlight"]
        self.weights = expert_weights(hidden_dim, inter, experts, self.device)
        self.inputs = routed_tokens(tokens, hidden_dim, experts, top_k, self.device)

    def setup_decode(self):
        self.prepare(1)

    def benchmark_decode(self):
        self.out = self.kernel.moe_experts(*self.inputs, *self.weights)

    def verify_decode(self):
        return self.kernel.reference.moe_experts(*self.inputs, *self.weights)

    def setup_prefill(self):
        self.prepare(4096)

    benchmark_prefill = benchmark_decode
    verify_prefill = verify_decode


# --- timing -----------------------------------------------------------------------------------------------------------


def timed(run, calls):
    """Microseconds a call: median of 7, each long enough to outlast the clock, after a warm-up at full load."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def batch(n):
        start.record()
        for _ in range(n):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / n

    run()
    once = batch(1)
    repeats = max(1, round(30 / once))
    batch(max(1, round(200 / once)))  # the card's clock falls under load
    return statistics.median(batch(repeats) for _ in range(7)) * 1000 / calls


def eager_time(calls):
    return timed(lambda: [call() for call in calls], len(calls))


def graph_time(calls):
    for call in calls:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return timed(graph.replay, len(calls))


@triton.jit
def _read_kernel(x_ptr, out_ptr, LOADS: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * LOADS * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(LOADS):
        acc += tl.load(x_ptr + offs + i * BLOCK)
    tl.store(out_ptr + tl.program_id(0), tl.sum(acc, axis=0))


def read_bandwidth():
    """Bytes per second of a kernel that streams 8 GiB once."""
    x = torch.randn(2**31, device="cuda")
    programs = x.numel() // (8 * 2048)
    out = torch.empty(programs, device="cuda")
    time = timed(lambda: _read_kernel[(programs,)](x, out, LOADS=8, BLOCK=2048, num_warps=4), 1)
    return x.numel() * 4 / (time * 1e-6)


def matmul_rate():
    """FLOP per second of back-to-back bf16 matmuls on random data, after a second of them."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(700):
        a @ b
    return 2 * 8192**3 / (timed(lambda: a @ b, 1) * 1e-6)


# --- the table --------------------------------------------------------------------------------------------------------


def stock_module(hidden_dim, inter, experts, top_k, weights):
    """Transformers' DeepseekV3Experts around these weights."""
    from transformers.models.deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=hidden_dim,
        moe_intermediate_size=inter,
        n_routed_experts=experts,
        num_experts_per_tok=top_k,
        n_group=1,
        topk_group=1,
    )
    with torch.device("meta"):
        module = DeepseekV3MoE(config).experts
    names = ("gate_up_proj", "down_proj")
    module.load_state_dict(dict(zip(names, weights)), assign=True)
    return module.requires_grad_(False)


@contextmanager
def portable(kernel):
    """As on a GPU that the kernel has no table for."""
    gpu = import_module(f"{kernel.__name__}.gpu")

    def forget():
        gpu.capability.cache_clear()
        gpu.device_name.cache_clear()

    os.environ["MOE_GROUPED_GEMM_PORTABLE"] = "1"
    forget()
    try:
        yield
    finally:
        del os.environ["MOE_GROUPED_GEMM_PORTABLE"]
        forget()


def run_router_case(kernel, workload, tokens):
    """DeepSeek-V3's router against Transformers' own; the weight in bf16 as in its checkpoints."""
    from transformers.models.deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    hidden_dim, _, experts, top_k, _ = WORKLOADS[workload]
    groups, winners = ROUTED[workload]
    config = DeepseekV3Config(
        hidden_size=hidden_dim,
        n_routed_experts=experts,
        num_experts_per_tok=top_k,
        n_group=groups,
        topk_group=winners,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    with torch.device("cuda"):
        module = DeepseekV3TopkRouter(config).bfloat16().requires_grad_(False)
    module.weight.normal_(0, hidden_dim**-0.5)
    module.e_score_correction_bias = torch.rand(experts, device="cuda") / 4
    x = torch.randn(tokens, hidden_dim, device="cuda", dtype=torch.bfloat16)
    args = (module.weight, module.e_score_correction_bias, top_k, groups, winners, True, 2.5)

    def ours():
        return kernel.topk_router(x, *args)

    ids, stock_ids = ours()[2].sort()[0], module(x)[2].sort()[0]
    if not (ids == stock_ids).all(dim=1).float().mean() > 0.999:
        raise SystemExit(f"router of {workload}, T={tokens}: other experts than stock: nothing is timed")
    return {
        "workload": workload,
        "tokens": tokens,
        "ours_graph_us": graph_time([ours]),
        "ours_eager_us": eager_time([ours]),
        "stock_graph_us": graph_time([lambda: module(x)]),
        "stock_eager_us": eager_time([lambda: module(x)]),
    }


def run_case(kernel, module, weights, workload, tokens, zipf, ceilings):
    hidden_dim, inter, experts, top_k, _ = WORKLOADS[workload]
    sets = [routed_tokens(tokens, hidden_dim, experts, top_k, "cuda", zipf) for _ in range(4 if tokens <= 64 else 1)]
    out = kernel.moe_experts(*sets[0], *weights).float()
    expected = kernel.reference.moe_experts(*sets[0], *weights).float()
    error = ((out - expected).norm() / expected.norm()).item()
    if not error < 1e-2:
        raise SystemExit(f"{workload} T={tokens}: relative error {error:.2g}: nothing is timed")
    hit = statistics.mean(index.unique().numel() for _, index, _ in sets)
    flops = 2 * tokens * top_k * 3 * hidden_dim * inter
    roof = max(flops / ceilings["flops"], hit * 3 * hidden_dim * inter * 2 / ceilings["bytes"]) * 1e6
    ours = [lambda args=args: kernel.moe_experts(*args, *weights) for args in sets]
    case = {
        "workload": workload,
        "tokens": tokens,
        "routing": "zipf" if zipf else "uniform",
        "experts_hit": hit,
        "relative_error": error,
        "roof_us": roof,
        "ours_graph_us": graph_time(ours),
        "ours_eager_us": eager_time(ours),
    }
    with portable(kernel):
        case["ours_portable_graph_us"] = graph_time(ours)
    for name in STOCK:
        if name == "batched_mm":  # it copies the weights of every slot
            copies = tokens * top_k * 3 * hidden_dim * inter * 2
            if copies > 0.8 * torch.cuda.mem_get_info()[0]:
                continue
        if name == "eager" and tokens > 64:  # never the fastest, and slow to time
            continue
        module.config._experts_implementation = name
        stock = [lambda args=args: module(*args) for args in sets]
        case[f"{name}_eager_us"] = eager_time(stock)
        if name != "eager":  # that one waits for the host
            case[f"{name}_graph_us"] = graph_time(stock)
        torch.cuda.empty_cache()
    return case


def run_expert_parallel_case(kernel, module, weights, workload, tokens):
    """A rank's share of the layer: its slots among all, the others marked by the id E; and its slots alone, top_k 1.

    Both do the same products, so the first should take little longer than the second.
    """
    hidden_dim, _, experts, top_k, _ = WORKLOADS[workload]
    local = experts // EP_SIZE
    x, index, top_k_weights = routed_tokens(tokens, hidden_dim, experts, top_k, "cuda")
    index = torch.where(index < local, index, local)
    slots = (index.flatten() < local).nonzero().flatten()
    rows = x[slots // top_k], index.view(-1, 1)[slots], torch.ones(len(slots), 1, dtype=x.dtype, device="cuda")
    module._is_expert_parallel = True
    case = {"workload": workload, "tokens": tokens, "ep_size": EP_SIZE, "slots": index.numel(), "local": len(slots)}
    for name, inputs in {"sentinels": (x, index, top_k_weights), "dispatched": rows}.items():
        out = kernel.moe_experts(*inputs, *weights).float()
        expected = kernel.reference.moe_experts(*inputs, *weights).float()
        if not (out - expected).norm() < 1e-2 * expected.norm():
            raise SystemExit(f"{name} of {workload} T={tokens}: wrong result: nothing is timed")
        case[f"{name}_graph_us"] = graph_time([lambda inputs=inputs: kernel.moe_experts(*inputs, *weights)])
        module.config._experts_implementation = "grouped_mm"
        case[f"{name}_stock_graph_us"] = graph_time([lambda inputs=inputs: module(*inputs)])
    return case


def row(case):
    ours = min(case["ours_graph_us"], case["ours_eager_us"])
    stock = min(time for key, time in case.items() if key.endswith("_us") and key.split("_")[0] not in ("ours", "roof"))
    name = case["workload"] + (" zipf" if case["routing"] == "zipf" else "")
    times = (case["roof_us"], case["ours_graph_us"], case["ours_eager_us"], stock)
    fractions = f"{case['roof_us'] / ours:9.2f} {case['roof_us'] / stock:9.2f} {stock / ours:8.2f}x"
    return f"{name:15} {case['tokens']:6} " + " ".join(f"{time:10.1f}" for time in times) + " " + fractions


def commit():
    """$COMMIT, for a copy of the tree; or HEAD, marked if anything but results differs from it."""

    def git(*args):
        command = ["git", "-C", Path(__file__).resolve().parent, *args]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    changes = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/benchmarks/results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changes else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<gpu>.json")
    args = parser.parse_args()

    root = Path(__file__).resolve().parent.parent
    os.environ.setdefault("LOCAL_KERNELS", f"org/moe-grouped-gemm={root}")
    import transformers
    from kernels import get_kernel

    kernel = get_kernel("org/moe-grouped-gemm", version=1)
    torch.manual_seed(0)
    gpu = torch.cuda.get_device_name()
    ceilings = {"flops": matmul_rate(), "bytes": read_bandwidth()}
    torch.cuda.empty_cache()
    result = {
        "gpu": gpu,
        "commit": commit(),
        "versions": {m.__name__: m.__version__ for m in (torch, triton, transformers)},
        "ceilings": ceilings,
        "cases": [],
        "router_cases": [],
        "expert_parallel_cases": [],
    }
    out = args.out or root / "benchmarks/results" / f"{gpu.replace(' ', '-')}.json"
    print(f"{gpu}: {ceilings['flops'] / 1e12:.0f} TFLOP/s sustained, {ceilings['bytes'] / 1e12:.2f} TB/s read")
    print(" " * 22 + "microseconds" + " " * 34 + "fraction of roof")
    print(f"{'workload':15} {'T':>6} {'roof':>10} {'graph':>10} {'eager':>10} {'best stock':>10}", end="")
    print(f" {'ours':>9} {'stock':>9} {'speed-up':>9}")
    for workload in args.workloads:
        *dims, tokens = WORKLOADS[workload]
        weights = expert_weights(*dims[:3], "cuda")
        module = stock_module(*dims, weights)
        cases = [(t, False) for t in tokens] + [(SKEWED_TOKENS, False), (SKEWED_TOKENS, True)]
        for t, zipf in dict.fromkeys(cases):
            with torch.no_grad():
                case = run_case(kernel, module, weights, workload, t, zipf, ceilings)
            print(row(case), flush=True)
            result["cases"].append(case)
        del weights, module
        torch.cuda.empty_cache()
    print("router, microseconds: ours and stock, graph and eager")
    for workload, t in product([w for w in args.workloads if w in ROUTED], ROUTED_TOKENS):
        with torch.no_grad():
            case = run_router_case(kernel, workload, t)
        print(f"{workload:15} {t:6} " + " ".join(f"{us:10.1f}" for key, us in case.items() if key.endswith("_us")))
        result["router_cases"].append(case)
    print(f"one rank of {EP_SIZE}, microseconds: with all slots and with its own, ours and stock")
    for workload in [w for w in args.workloads if w in EXPERT_PARALLEL]:
        hidden_dim, inter, experts, top_k, _ = WORKLOADS[workload]
        weights = expert_weights(hidden_dim, inter, experts // EP_SIZE, "cuda")
        module = stock_module(hidden_dim, inter, experts // EP_SIZE, top_k, weights)
        for t in EP_TOKENS:
            with torch.no_grad():
                case = run_expert_parallel_case(kernel, module, weights, workload, t)
            print(f"{workload:15} {t:6} " + " ".join(f"{us:10.1f}" for key, us in case.items() if key.endswith("_us")))
            result["expert_parallel_cases"].append(case)
        del weights, module
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(out)


if __name__ == "__main__":
    main()
