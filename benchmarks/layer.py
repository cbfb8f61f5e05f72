"""Times one expert layer, whole, against Transformers' own implementations and against the hardware's roof.

    python benchmarks/layer.py     # on a GPU: the table, and benchmarks/results/<gpu>.json
    python benchmarks/layer.py --against sonicmoe,deepgemm     # Transformers' other backends too, where they load

Roof of a case: max(FLOPs / sustained matmul rate, bytes of the distinct experts hit / read bandwidth), with both
ceilings measured in the same run. Beside it cuBLAS at the layer's own shapes: `torch.bmm` over as many rows for each
expert, both products and nothing else. Of what takes longer than a millisecond a call, the SM clock and the power while
it was timed. Results are checked before anything is timed.
"""

from __future__ import annotations

import argparse
import os
import statistics
from contextlib import contextmanager
from importlib import import_module
from itertools import product

import torch
import transformers

import common
from benchmark import WORKLOADS, expert_weights, routed_tokens

SKEWED_TOKENS = 4096
STOCK = ("grouped_mm", "batched_mm", "eager")
BACKENDS = ("sonicmoe", "deepgemm")  # Transformers' names of what it loads from the Hub
ROUTED = {"moonlight": (1, 1), "dsv3": (8, 4)}  # n_group, topk_group
ROUTED_TOKENS = (1, 64, 1024, 4096)
EXPERT_PARALLEL = ("glm45-air", "dsv3")  # one rank of EP_SIZE, which has 1 / EP_SIZE of the experts
EP_SIZE = 8
EP_TOKENS = (64, 1024, 8192)


# --- cases ------------------------------------------------------------------------------------------------------------


@contextmanager
def run_as(kernel, name):
    """With the tile sizes and the kernels of another GPU, "sm_80" say."""
    gpu = import_module(f"{kernel.__name__}.gpu")

    def forget():
        gpu.traits.cache_clear()
        gpu.device_name.cache_clear()

    os.environ["MOE_GROUPED_GEMM_AS"] = name
    forget()
    try:
        yield
    finally:
        del os.environ["MOE_GROUPED_GEMM_AS"]
        forget()


def checked_error(kernel, what, inputs, weights) -> float:
    out, expected = (layer(*inputs, *weights) for layer in (kernel.moe_experts, kernel.reference.moe_experts))
    return common.check(what, out, expected, 1e-2)


def time_cublas(weights, tokens, top_k) -> dict[str, float]:
    """Both products by `torch.bmm` over all experts at equal rows; empty where there are fewer rows than experts."""
    gate_up, down = weights
    experts, _, inter = down.shape
    rows = round(tokens * top_k / experts)
    if rows < 1:
        return {}
    x, a = (torch.randn(experts, rows, size, dtype=down.dtype, device=down.device) for size in (down.shape[1], inter))

    def both():
        torch.bmm(x, gate_up.mT)
        torch.bmm(a, down.mT)

    on_gpu = down.device.type == "cuda"
    how, measure = ("graph", common.sustained_graph) if on_gpu else ("eager", common.sustained)
    return {"cublas_rows": rows, **common.measured(f"cublas_{how}", measure, [both])}


def why_not(name) -> str | None:
    """What keeps Transformers from loading this backend; None if it computes a small layer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = expert_weights(256, 128, 8, device)
    module = common.stock_module(256, 128, 8, 2, weights)
    module.config._experts_implementation = name
    try:
        module(*routed_tokens(128, 256, 8, 2, device))
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # whatever comes of packages, drivers and networks that are not there
        return one_line(error)
    return None


def one_line(error) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def load_backends(names) -> dict[str, str | None]:
    """Name -> why it could not be loaded, or None."""
    reasons = {name: why_not(name) for name in names}
    for name, reason in reasons.items():
        if reason is not None:
            print(f"{name} could not be loaded: {reason}")
    return reasons


def time_backend(module, name, sets, expected) -> dict:
    """Of one that is loaded; what it fails at is reported, too. Not all of them can be recorded as a graph."""
    module.config._experts_implementation = name
    calls = [lambda args=args: module(*args) for args in sets]
    found = {}
    try:
        found["relative_error"] = error = common.relative_error(calls[0](), expected)
        if not error < 2e-2:
            return found
        found |= common.measured("eager", common.sustained, calls)
        found |= common.measured("graph", common.sustained_graph, calls)
    except Exception as error:
        found["failed"] = one_line(error)
    return found


def run_case(kernel, module, weights, workload, tokens, zipf, ceilings, backends=()):
    hidden_dim, inter, _, top_k, _ = WORKLOADS[workload]
    sets = common.input_sets(workload, tokens, zipf)
    error = checked_error(kernel, f"{workload} T={tokens}", sets[0], weights)
    hit = statistics.mean(index.unique().numel() for _, index, _ in sets)
    ours = [lambda args=args: kernel.moe_experts(*args, *weights) for args in sets]
    case = {
        "workload": workload,
        "tokens": tokens,
        "routing": "zipf" if zipf else "uniform",
        "experts_hit": hit,
        "relative_error": error,
        "roof_us": common.roof(workload, tokens, hit, ceilings["flops"], ceilings["bytes"], weight_bytes=2),
        **common.all_times("ours", ours),
        **time_cublas(weights, tokens, top_k),
    }
    with run_as(kernel, "sm_80"):
        case["ours_as_sm_80_graph_us"] = common.graph_time(ours)
    for name in STOCK:
        if name == "batched_mm":  # it copies the weights of every slot
            copies = tokens * top_k * 3 * hidden_dim * inter * 2
            if copies > 0.8 * torch.cuda.mem_get_info()[0]:
                continue
        if name == "eager" and tokens > 64:  # never the fastest, and slow to time
            continue
        module.config._experts_implementation = name
        stock = [lambda args=args: module(*args) for args in sets]
        case |= common.measured(f"{name}_eager", common.sustained, stock)
        if name != "eager":  # that one waits for the host
            case |= common.measured(f"{name}_graph", common.sustained_graph, stock)
        torch.cuda.empty_cache()
    for name in backends:
        case.setdefault("against", {})[name] = time_backend(module, name, sets, kernel.moe_experts(*sets[0], *weights))
        torch.cuda.empty_cache()
    return case


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
        **common.all_times("ours", [ours]),
        **common.all_times("stock", [lambda: module(x)]),
    }


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
        checked_error(kernel, f"{name} of {workload} T={tokens}", inputs, weights)
        case[f"{name}_graph_us"] = common.graph_time([lambda inputs=inputs: kernel.moe_experts(*inputs, *weights)])
        module.config._experts_implementation = "grouped_mm"
        case[f"{name}_stock_graph_us"] = common.graph_time([lambda inputs=inputs: module(*inputs)])
    return case


# --- the tables -------------------------------------------------------------------------------------------------------


def row(case):
    ours = min(case["ours_graph_us"], case["ours_eager_us"])
    stock = min(time for key, time in case.items() if key.endswith("_us") and key.startswith(STOCK))
    name = case["workload"] + (" zipf" if case["routing"] == "zipf" else "")
    times = (case["roof_us"], *(case[f"ours_{how}_us"] for how in ("graph", "eager", "host")), stock)
    fractions = f"{case['roof_us'] / ours:9.2f} {case['roof_us'] / stock:9.2f} {stock / ours:8.2f}x"
    line = f"{name:15} {case['tokens']:6} " + " ".join(f"{time:10.1f}" for time in times) + " " + fractions
    line += f" {case['cublas_graph_us']:10.1f}" if "cublas_graph_us" in case else " " * 11
    if "ours_graph_sm_mhz" in case:
        line += f" {case['ours_graph_sm_mhz']:6.0f} {case['ours_graph_watts']:6.0f}"
    for name, found in case.get("against", {}).items():
        times = [found[f"{how}_us"] for how in ("graph", "eager") if f"{how}_us" in found]
        line += f"  {name} {min(times):.1f}" if times else f"  {name}: {found.get('failed', 'wrong')}"
    return line


def print_times(case) -> None:
    times = " ".join(f"{us:10.1f}" for key, us in case.items() if key.endswith("_us"))
    print(f"{case['workload']:15} {case['tokens']:6} {times}", flush=True)


def layer_cases(kernel, workloads, ceilings, backends=()):
    print(" " * 22 + "microseconds" + " " * 45 + "fraction of roof")
    print(f"{'workload':15} {'T':>6} {'roof':>10} {'graph':>10} {'eager':>10} {'host':>10} {'best stock':>10}", end="")
    print(f" {'ours':>9} {'stock':>9} {'speed-up':>9} {'cuBLAS':>10} {'MHz':>6} {'W':>6}")
    for workload in workloads:
        *dims, tokens = WORKLOADS[workload]
        weights = expert_weights(*dims[:3], "cuda")
        module = common.stock_module(*dims, weights)
        cases = [(t, False) for t in tokens] + [(SKEWED_TOKENS, False), (SKEWED_TOKENS, True)]
        for t, zipf in dict.fromkeys(cases):
            case = run_case(kernel, module, weights, workload, t, zipf, ceilings, backends)
            print(row(case), flush=True)
            yield case
        del weights, module
        torch.cuda.empty_cache()


def router_cases(kernel, workloads):
    print("router, microseconds: ours and stock, graph and eager")
    for workload, t in product([w for w in workloads if w in ROUTED], ROUTED_TOKENS):
        case = run_router_case(kernel, workload, t)
        print_times(case)
        yield case


def expert_parallel_cases(kernel, workloads):
    print(f"one rank of {EP_SIZE}, microseconds: with all slots and with its own, ours and stock")
    for workload in [w for w in workloads if w in EXPERT_PARALLEL]:
        hidden_dim, inter, experts, top_k, _ = WORKLOADS[workload]
        weights = expert_weights(hidden_dim, inter, experts // EP_SIZE, "cuda")
        module = common.stock_module(hidden_dim, inter, experts // EP_SIZE, top_k, weights)
        for t in EP_TOKENS:
            case = run_expert_parallel_case(kernel, module, weights, workload, t)
            print_times(case)
            yield case
        del weights, module


def backend_names(text: str) -> tuple[str, ...]:
    names = tuple(filter(None, text.split(",")))
    if not set(names) <= set(BACKENDS):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(BACKENDS)}, got {text}")
    return names


@torch.no_grad()
def main() -> None:
    parser = common.argument_parser(__doc__, "benchmarks/results/<gpu>.json")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--against", type=backend_names, default=(), help=f"a list of {', '.join(BACKENDS)}")
    args = parser.parse_args()
    common.need_gpu()
    kernel = common.staged_kernel()
    if not common.METER.start():
        print("neither NVML nor nvidia-smi tells clock and power")
    reasons = load_backends(args.against)
    ceilings = common.measure_ceilings(flops=common.matmul_rate)
    result = common.header(transformers, ceilings=ceilings)
    if reasons:
        result["not_loaded"] = {name: reason for name, reason in reasons.items() if reason is not None}
    backends = [name for name, reason in reasons.items() if reason is None]
    result["cases"] = list(layer_cases(kernel, args.workloads, ceilings, backends))
    result["router_cases"] = list(router_cases(kernel, args.workloads))
    result["expert_parallel_cases"] = list(expert_parallel_cases(kernel, args.workloads))
    common.write(args.out, result)
    print(args.out)


if __name__ == "__main__":
    main()
