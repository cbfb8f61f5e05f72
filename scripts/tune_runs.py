"""Compiling, checking and timing candidates, for tune.py. A candidate is (kernel, configuration)."""

from __future__ import annotations

import functools
import multiprocessing
import os
import statistics
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from kernels import get_kernel
from tqdm import tqdm

from benchmark import routed_tokens
from compile_only import compile_only, registers_and_stack

os.environ.setdefault("LOCAL_KERNELS", f"org/moe-grouped-gemm={Path(__file__).resolve().parent.parent}")
PACKAGE = get_kernel("org/moe-grouped-gemm", version=1).__name__
kernels, tuning, launch_configs = (
    import_module(f"{PACKAGE}.{name}") for name in ("kernels", "tuning", "launch_configs")
)
SILU = import_module(f"{PACKAGE}.reference").Gate("silu")

QUICK_MS, FINAL_MS, FINAL_ROUNDS = 8, 12, 5
CHECKED_EXPERTS = 8


class Layer(NamedTuple):
    experts: int
    hidden_dim: int
    inter: int
    top_k: int


class Inputs(NamedTuple):
    """What the kernels of one layer call read."""

    x: torch.Tensor  # (T, H)
    top_k_index: torch.Tensor  # (T, top_k)
    sorted_slots: torch.Tensor  # (S,)
    a: torch.Tensor  # (S, I)
    gate_up_proj: torch.Tensor  # (E, 2I, H)
    down_proj: torch.Tensor  # (E, H, I)


def launch(candidate, inputs: Inputs, schedule) -> torch.Tensor:
    kernel, config = candidate
    if kernel == "route":
        return kernels.route(inputs.top_k_index, inputs.down_proj.shape[0], config.BLOCK_M)[-1]
    if kernel == "gate_up":
        x, top_k = inputs.x, inputs.top_k_index.shape[1]
        return kernels.gate_up(x, inputs.gate_up_proj, inputs.sorted_slots, schedule, top_k, SILU, "ieee", config)
    return kernels.grouped_gemm(inputs.a, inputs.down_proj, schedule, "ieee", config)


# --- compiling --------------------------------------------------------------------------------------------------------


def without_memory(layer: Layer, tokens: int, dtype: torch.dtype) -> Inputs:
    """Inputs for which Triton compiles what it compiles for those on the GPU."""
    experts, hidden_dim, inter, top_k = layer
    rows = tokens * top_k
    empty = functools.partial(torch.empty, dtype=dtype, device="meta")
    return Inputs(
        empty(tokens, hidden_dim),
        empty(tokens, top_k, dtype=torch.int64),
        empty(rows, dtype=torch.int32),
        empty(rows, inter),
        empty(experts, 2 * inter, hidden_dim),
        empty(experts, hidden_dim, inter),
    )


def compile_candidate(candidate, calls, dtype, target, shared_limit) -> str | None:
    """Fills Triton's cache with what these calls (layer, tokens) need; says why the candidate must not be used."""
    kernel, config = candidate
    schedule = torch.empty(5, 3, dtype=torch.int32, device="meta")
    for way in launch_configs.ways(config) if kernel != "route" else [config]:
        compiled = compile_only(target)
        try:
            for layer, tokens in calls:
                launch((kernel, way), without_memory(layer, tokens, dtype), schedule)
        except Exception as error:
            return one_line(error)
        if kernel == "route":  # there is no other
            continue
        for name, binary in {binary.hash: (name, binary) for name, binary in compiled}.values():
            if binary.metadata.shared > shared_limit:
                return f"{name} needs {binary.metadata.shared} bytes of shared memory"
            if "cubin" in binary.asm and registers_and_stack(binary.asm["cubin"])[1]:
                return f"{name} spills"
    return None


def compile_ahead(plan: dict, dtype, target, shared_limit) -> dict:
    """Compiles {layer: {tokens: candidates}} on up to 16 cores; returns candidate -> why it must not be used."""
    calls = defaultdict(list)
    for layer, ladder in plan.items():
        for tokens, wanted in ladder.items():
            for candidate in wanted:
                calls[candidate].append((layer, tokens))
    faults = {}
    # Not forked: this process may have the GPU open.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(16, os.cpu_count(), len(calls) or 1), mp_context=context) as pool:
        futures = {c: pool.submit(compile_candidate, c, calls[c], dtype, target, shared_limit) for c in calls}
        for candidate, future in tqdm(futures.items(), "compiling", unit="candidate"):
            if future.result() is not None:
                faults[candidate] = future.result()
    return faults


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# --- checking and timing ----------------------------------------------------------------------------------------------


class Gpu:
    """One layer at one number of tokens, on the GPU. Small inputs are rotated: their weights should not sit in L2."""

    def __init__(self, layer: Layer, tokens: int, gate_up_proj, down_proj):
        experts, hidden_dim, inter, top_k = layer
        dtype, device = down_proj.dtype, down_proj.device
        torch.cuda.empty_cache()  # of the last number of tokens
        self.sets = []
        for _ in range(4 if tokens <= 64 else 1):
            x, index, _ = routed_tokens(tokens, hidden_dim, experts, top_k, device)
            offsets, slots, _, _ = kernels.route(index, experts, 16)
            a = torch.randn(tokens * top_k, inter, dtype=dtype, device=device)
            self.sets.append(Inputs(x.to(dtype), index, slots, a, gate_up_proj, down_proj))
        self.expected = self._expected(offsets.tolist(), self.sets[-1])
        self.schedules = {}
        self.pool = self.stream = self.graph = None

    @staticmethod
    def _expected(offsets, inputs):
        """kernel -> [(rows, fp32 result)]: all rows of some experts, from the one with fewest to that with most."""
        by_rows = sorted(
            (end - begin, begin, e) for e, (begin, end) in enumerate(zip(offsets, offsets[1:])) if end > begin
        )
        last = len(by_rows) - 1
        chosen = {by_rows[round(i * last / (CHECKED_EXPERTS - 1))] for i in range(CHECKED_EXPERTS)}
        expected = {"route": [], "gate_up": [], "down": []}
        for count, begin, e in chosen:
            rows = slice(begin, begin + count)
            tokens = inputs.sorted_slots[rows] // inputs.top_k_index.shape[1]
            gate, up = (inputs.x[tokens].float() @ inputs.gate_up_proj[e].float().T).chunk(2, dim=1)
            expected["gate_up"].append((rows, torch.nn.functional.silu(gate) * up))
            expected["down"].append((rows, inputs.a[rows].float() @ inputs.down_proj[e].float().T))
        return expected

    def _calls(self, candidate):
        block_m = candidate[1].BLOCK_M
        if block_m not in self.schedules:
            experts = self.sets[0].down_proj.shape[0]
            self.schedules[block_m] = [kernels.route(s.top_k_index, experts, block_m)[-1] for s in self.sets]
        return [functools.partial(launch, candidate, *args) for args in zip(self.sets, self.schedules[block_m])]

    def check(self, candidate) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty: a row never written shows
        try:
            out = self._calls(candidate)[-1]()
        finally:
            torch.use_deterministic_algorithms(False)
        if not out.isfinite().all():
            raise ArithmeticError("some of the result is not finite, or was never written")
        for rows, expected in self.expected[candidate[0]]:
            error = ((out[rows].float() - expected).norm(dim=1) / expected.norm(dim=1)).max().item()
            if not error < torch.finfo(out.dtype).eps:
                raise ArithmeticError(f"relative error {error:.2g}")

    def capture(self, candidate) -> torch.cuda.CUDAGraph:
        self.check(candidate)  # and load it: that is not allowed in a capture
        calls = self._calls(candidate)
        # torch.cuda.graph would collect garbage and empty the cache first, which takes longer than the timing.
        graph = torch.cuda.CUDAGraph()
        if self.pool is None:  # one stream, too: memory of a pool is used again only by the stream that had it
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool)
            try:
                for call in calls:
                    call()
            finally:
                graph.capture_end()
        return graph

    def _replay(self, graph, count) -> float:
        """Milliseconds a replay."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / count

    def time(self, candidate) -> float:
        """Microseconds a call, in passing; raises if the candidate does not run or is wrong."""
        self.graph = self.capture(candidate)  # kept until the next is there: a pool lives as long as a graph uses it
        self._replay(self.graph, 1)
        once = self._replay(self.graph, 1)
        return self._replay(self.graph, max(1, round(QUICK_MS / once))) * 1000 / len(self.sets)

    def compare(self, candidates) -> dict:
        """candidate -> microseconds a call: the median of rounds in which each has its turn, as the clock drifts."""
        graphs = {candidate: self.capture(candidate) for candidate in candidates}
        counts = {c: max(1, round(FINAL_MS / self._replay(graph, 1))) for c, graph in graphs.items()}
        rounds = [{c: self._replay(graphs[c], counts[c]) for c in candidates} for _ in range(FINAL_ROUNDS)]
        return {c: statistics.median(times[c] for times in rounds) * 1000 / len(self.sets) for c in candidates}

    @staticmethod
    def recover() -> None:
        """After a failed candidate: some faults leave a process without its GPU."""
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise SystemExit(f"The GPU is lost to this process; run again to go on behind it.\n{error}") from error
