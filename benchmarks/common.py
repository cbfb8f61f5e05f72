"""What the benchmarks share: the staged kernel, stock's layer, checks, times on the GPU, ceilings, and result files."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

import torch
from kernels import get_kernel
from one_line_errors import need_gpu  # noqa: F401
from torch.utils.benchmark import Timer

from benchmark import WORKLOADS, routed_tokens
from meter import Meter

ROOT = Path(__file__).resolve().parent.parent
REPO_ID = "org/moe-grouped-gemm"

# Under a load that lasts, power pulls the clock down over a second; a short call leaves the card idle in between.
LONG_US = 1000
WARM_UP, WARM_UP_LONG = 0.2, 1.0  # seconds

METER = Meter()  # a script that wants clock and power starts it


def staged_kernel():
    """The kernel as built here, unless LOCAL_KERNELS says otherwise."""
    os.environ.setdefault("LOCAL_KERNELS", f"{REPO_ID}={ROOT}")
    return get_kernel(REPO_ID, version=1)


# --- layers -----------------------------------------------------------------------------------------------------------


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


def input_sets(workload, tokens, zipf=False):
    """Several for few tokens: the weights that one set reads would stay in the cache."""
    hidden_dim, _, experts, top_k, _ = WORKLOADS[workload]
    return [routed_tokens(tokens, hidden_dim, experts, top_k, "cuda", zipf) for _ in range(4 if tokens <= 64 else 1)]


def relative_error(out, expected) -> float:
    return ((out.float() - expected.float()).norm() / expected.float().norm()).item()


def check(what, out, expected, allowed) -> float:
    """The relative error; whoever exceeds what is allowed is not timed."""
    error = relative_error(out, expected)
    if not error < allowed:
        raise SystemExit(f"{what}: relative error {error:.2g}: nothing is timed")
    return error


def forward_flops(workload, tokens) -> int:
    hidden_dim, inter, _, top_k, _ = WORKLOADS[workload]
    return 2 * tokens * top_k * 3 * hidden_dim * inter


def roof(workload, tokens, experts_hit, rate, bandwidth, weight_bytes) -> float:
    """Microseconds that the products take at least, or reading the weights of the experts hit, if that is more."""
    hidden_dim, inter, *_ = WORKLOADS[workload]
    read = experts_hit * 3 * hidden_dim * inter * weight_bytes
    return max(forward_flops(workload, tokens) / rate, read / bandwidth) * 1e6


# --- timing -----------------------------------------------------------------------------------------------------------


def eager_time(calls) -> float:
    """Microseconds a call, one after another without waiting: the host's time or the GPU's, whichever is longer.

    The median of seven batches, each long enough to outlast the clock and the wait at its end, after a warm-up at full
    load, under which the card's clock falls.
    """
    return sustained(calls)[0]


def sustained(calls, inside: int = 1) -> tuple[float, dict[str, float]]:
    """`eager_time`, and of long calls what the meter read meanwhile, if it was started: "sm_mhz" and "watts".

    inside: how many calls each of these makes.
    """
    count = len(calls) * inside

    def run():
        for call in calls:
            call()

    timer = Timer("run()", globals={"run": run})
    timer.timeit(1)  # which may compile
    once = timer.timeit(1).mean
    is_long = once * 1e6 / count > LONG_US
    timer.timeit(max(1, round((WARM_UP_LONG if is_long else WARM_UP) / once)))
    start = time.perf_counter()
    batches = [timer.timeit(max(1, round(0.03 / once))).mean for _ in range(7)]
    read = METER.between(start, time.perf_counter()) if is_long else {}
    return statistics.median(batches) * 1e6 / count, read


def graph_time(calls) -> float:
    """Microseconds a call when all are one CUDA graph: the GPU's time.

    triton.testing.do_bench_cudagraph would put every repeat into the graph, hiding what lies between two replays, and
    begins without a warm-up.
    """
    return sustained_graph(calls)[0]


def sustained_graph(calls) -> tuple[float, dict[str, float]]:
    """`graph_time`, and what the meter read as in `sustained`."""
    for call in calls:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return sustained([graph.replay], inside=len(calls))


def measured(name, measure, calls) -> dict[str, float]:
    """`{name}_us`, and beside it `{name}_sm_mhz` and `{name}_watts` where they were read."""
    us, read = measure(calls)
    return {f"{name}_us": us, **{f"{name}_{what}": value for what, value in read.items()}}


def host_time(calls) -> float:
    """Microseconds of a call until it returns, with a GPU that has nothing to do: the host's time alone.

    The median of 50 batches, each so short that the GPU's queue does not fill.
    """
    batches = []
    for _ in range(50):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for call in calls:
            call()
        batches.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(batches) * 1e6 / len(calls)


def all_times(name, calls) -> dict[str, float]:
    graph, eager = measured(f"{name}_graph", sustained_graph, calls), measured(f"{name}_eager", sustained, calls)
    return {**graph, **eager, f"{name}_host_us": host_time(calls)}


def read_bandwidth():
    """Bytes per second of a kernel that streams 8 GiB once."""
    from read_kernel import read_kernel  # Triton, which a CPU need not have

    x = torch.randn(2**31, device="cuda")
    programs = x.numel() // (8 * 2048)
    out = torch.empty(programs, device="cuda")
    us = eager_time([lambda: read_kernel[(programs,)](x, out, LOADS=8, BLOCK=2048, num_warps=4)])
    return x.numel() * 4 / (us * 1e-6)


def matmul_rate(matmul=torch.mm, dtype=torch.bfloat16) -> float:
    """FLOP per second of back-to-back matmuls on random data, after a second of them."""
    a, b = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
    Timer("matmul(a, b)", globals={"matmul": matmul, "a": a, "b": b}).blocked_autorange(min_run_time=1)
    return 2 * 8192**3 / (eager_time([lambda: matmul(a, b)]) * 1e-6)


def measure_ceilings(**rates) -> dict[str, float]:
    """What the hardware sustains a second: FLOP, by the functions given, and bytes read."""
    torch.manual_seed(0)
    ceilings = {**{name: rate() for name, rate in rates.items()}, "bytes": read_bandwidth()}
    torch.cuda.empty_cache()
    found = ", ".join(f"{name} {value / 1e12:.4g}e12" for name, value in ceilings.items())
    print(f"{gpu_name()}: {found} per second, sustained")
    return ceilings


# --- results ----------------------------------------------------------------------------------------------------------


def commit():
    """$COMMIT, for a copy of the tree; or HEAD, marked if anything but results differs from it."""

    def git(*args):
        command = ["git", "-C", ROOT, *args]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    changes = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/benchmarks/results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changes else "")


def gpu_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def header(*modules, **more) -> dict:
    """What every result file begins with; modules: those besides torch and Triton whose versions matter."""
    if torch.cuda.is_available():
        import triton

        modules = (triton, *modules)
    versions = {m.__name__: m.__version__ for m in (torch, *modules)}
    return {"gpu": gpu_name(), "commit": commit(), "date": date.today().isoformat(), "versions": versions, **more}


def argument_parser(doc: str, out: str) -> argparse.ArgumentParser:
    """With --out; out: its default under the root, in which <gpu> stands for the card's name."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT / out.replace("<gpu>", gpu_name().replace(" ", "-"))
    parser.add_argument("--out", type=Path, default=default, help=f"default: {out}")
    return parser


def write(out: Path, result: dict) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
