"""Compiling, checking and timing candidates on a GPU."""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from .. import gpu
from ..reference import Gate
from .candidates import Layer

SILU = Gate("silu")
QUICK_MS, FINAL_MS, FINAL_ROUNDS = 8, 12, 5
CHECKED_EXPERTS = 8


class Inputs(NamedTuple):
    """What the kernels of one layer call read."""

    x: torch.Tensor  # (T, H)
    top_k_index: torch.Tensor  # (T, top_k)
    sorted_slots: torch.Tensor  # (S,)
    a: torch.Tensor  # (S, I)
    gate_up_proj: torch.Tensor  # (E, 2I, H)
    down_proj: torch.Tensor  # (E, H, I)


def launch(candidate, inputs: Inputs, schedule) -> torch.Tensor:
    kernels, (kernel, config) = gpu.launchers(), candidate
    if kernel == "route":
        return kernels.route(inputs.top_k_index, inputs.down_proj.shape[0], config.BLOCK_M)[-1]
    if kernel == "gate_up":
        x, top_k = inputs.x, inputs.top_k_index.shape[1]
        return kernels.gate_up(x, inputs.gate_up_proj, inputs.sorted_slots, schedule, top_k, SILU, "ieee", config)
    return kernels.grouped_gemm(inputs.a, inputs.down_proj, schedule, "ieee", config)


# --- compiling --------------------------------------------------------------------------------------------------------


def without_memory(layer: Layer, tokens: int) -> Inputs:
    """Inputs for which Triton compiles what it compiles for those on the GPU."""
    experts, hidden_dim, inter, top_k, dtype = layer
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


def compile_ahead(layer: Layer, plan: dict[int, list]) -> None:
    """Fills Triton's cache with what {tokens: candidates} need, on several cores: compiling takes longer than timing.

    What does not compile is left to be found as it is timed.
    """
    schedule = torch.empty(5, 3, dtype=torch.int32, device="meta")

    def compile_candidate(candidate, tokens):
        with contextlib.suppress(Exception):
            launch(candidate, without_memory(layer, tokens), schedule)

    # Threads: most of the time goes to LLVM and the assembler, which do not hold Python's lock.
    device = (torch.cuda.current_device(),)
    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1), initializer=torch.cuda.set_device, initargs=device)
    try:
        jobs = {candidate: tokens for tokens, wanted in plan.items() for candidate in wanted}
        list(pool.map(compile_candidate, jobs, jobs.values()))
    finally:
        pool.shutdown(cancel_futures=True)


# --- checking and timing ----------------------------------------------------------------------------------------------


def random_weights(layer: Layer) -> list[torch.Tensor]:
    """gate_up_proj (E, 2I, H) and down_proj (E, H, I)."""
    experts, hidden_dim, inter, _, dtype = layer
    shapes = ((experts, 2 * inter, hidden_dim), (experts, hidden_dim, inter))
    return [torch.empty(shape, dtype=dtype, device="cuda").normal_(0, 0.02) for shape in shapes]


class Trials:
    """One layer at one number of tokens, on the GPU. Small inputs are rotated: their weights should not sit in L2."""

    def __init__(self, layer: Layer, tokens: int, gate_up_proj: torch.Tensor, down_proj: torch.Tensor):
        experts, hidden_dim, inter, top_k, dtype = layer
        device = down_proj.device
        torch.cuda.empty_cache()  # of the last number of tokens
        self.kernels, self.sets = gpu.launchers(), []
        for _ in range(4 if tokens <= 64 else 1):
            index = torch.multinomial(torch.ones(tokens, experts, device=device), top_k)  # distinct experts
            x = torch.randn(tokens, hidden_dim, dtype=dtype, device=device)
            offsets, slots, _, _ = self.kernels.route(index, experts, 16)
            a = torch.randn(tokens * top_k, inter, dtype=dtype, device=device)
            self.sets.append(Inputs(x, index, slots, a, gate_up_proj, down_proj))
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
            self.schedules[block_m] = [self.kernels.route(s.top_k_index, experts, block_m)[-1] for s in self.sets]
        return [functools.partial(launch, candidate, *args) for args in zip(self.sets, self.schedules[block_m])]

    def check(self, candidate) -> None:
        with warnings.catch_warnings(), _filled_memory():
            # What runs only with fewer stages is not the candidate.
            warnings.filterwarnings("error", message="moe_grouped_gemm")
            out = self._calls(candidate)[-1]()
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
            raise RuntimeError("The GPU is lost to this process: call again in another, which goes on here") from error


@contextlib.contextmanager
def _filled_memory():
    """Memory that PyTorch hands out holds NaN: a row that is never written shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill
