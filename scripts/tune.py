#!/usr/bin/env python3
"""Tunes the grouped GEMMs for this GPU and writes torch-ext/moe_grouped_gemm/configs/*.json, one file a layer.

    python scripts/tune.py                                    # the four workloads of benchmarks/benchmark.py
    python scripts/tune.py --shape 64 2048 1408 6             # a layer of your own: E H I top_k

For a ladder of token counts, every candidate is compiled, checked against fp32 and timed in a CUDA graph; the best
are timed again in turn, together with the heuristics. An interrupted run goes on where it stopped. The four workloads
take about five minutes on an H200 with 16 CPU cores. `make build` afterwards puts the files to use.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "benchmarks")]
from benchmark import WORKLOADS, expert_weights  # noqa: E402
from common import commit  # noqa: E402
from tune_runs import Gpu, Layer, compile_ahead, kernels, launch_configs, one_line, tuning  # noqa: E402

CONFIGS = ROOT / "torch-ext/moe_grouped_gemm/configs"
MOST_ROWS = 131072


# --- candidates -------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """What the kernels of one layer call share; the candidate of "route", which is the same for every MIN_M."""

    BLOCK_M: int
    MIN_M: int


# Rows of weights that a tile reads at a time (gate_up: gate and up), BLOCK_K, num_stages.
HOPPER = ((128, 256), (64, 128), (3, 4, 5))
OTHERS = ((64, 128), (32, 64), (2, 3, 4))
KERNELS = ("route", "gate_up", "down")
TILES = [Tile(16, 16), Tile(32, 16), Tile(64, 32), Tile(64, 64), Tile(128, 64), Tile(128, 128)]


def candidates(rows_per_expert: float, dtype: torch.dtype, capability: tuple[int, int]) -> list[tuple]:
    """(kernel, configuration) to try: 21 for few rows an expert, some 130 where several tile heights compete."""
    hopper = capability[0] == 9
    weight_rows, block_ks, stages = HOPPER if hopper else OTHERS
    found = []
    # A tile should hold the rows of nearly every expert: more than their average.
    tiles = [t for t in TILES if min(rows_per_expert, 127) < t.BLOCK_M <= max(16, 6 * rows_per_expert)]
    for block_m, min_m in tiles:
        found.append(("route", Tile(block_m, min_m)))
        # With fewer row tiles an expert, all are in one group.
        groups = (4, 8, 16) if rows_per_expert > 4 * block_m else (8,)
        for n, k, num_stages, warps, group in product(weight_rows, block_ks, stages, (4, 8), groups):
            accumulators = block_m * n // (32 * warps)  # registers of a thread
            if not (16 if warps == 4 else 32) <= accumulators <= 128:
                continue
            for kernel, block_n in (("gate_up", n // 2), ("down", n)):
                config = tuning.GemmConfig(block_m, min_m, block_n, k, group, warps, num_stages, USE_TMA=hopper)
                found.append((kernel, config))
        for group in groups:
            tile = {**launch_configs.SPECIALIZED_TILE, "BLOCK_M": block_m, "MIN_M": min_m}
            specialized = {"USE_TMA": True, "WARP_SPECIALIZED": True}
            found.append(("down", tuning.GemmConfig(**tile, GROUP_M=group, num_warps=8, num_stages=4, **specialized)))
    # What a tuned file may not say need not be tried.
    return [c for c in found if c[0] == "route" or not launch_configs.fault_of(*c, dtype, capability)]


def heuristics(layer: Layer, tokens: int, dtype: torch.dtype, capability: tuple[int, int]) -> list[tuple]:
    """What runs without a tuned file, as candidates."""
    rows = tokens * layer.top_k
    up, down = tuning.experts_config(rows, layer[:3], dtype, capability, device_name="")
    return [("route", Tile(up.BLOCK_M, up.MIN_M)), ("gate_up", up), ("down", down)]


def ladder(layer: Layer, dtype: torch.dtype) -> list[int]:
    """Token counts, doubling, from where decoding ends to MOST_ROWS rows."""
    expert_bytes = 3 * layer.hidden_dim * layer.inter * dtype.itemsize
    counts = [2**i for i in range(MOST_ROWS.bit_length()) if 2**i * layer.top_k <= MOST_ROWS]
    return [t for t in counts if not tuning.is_decode(t * layer.top_k, t, layer.experts, expert_bytes)]


# --- choosing ---------------------------------------------------------------------------------------------------------


def fastest(times: dict, kernel: str, tile: tuple, count: int = 1) -> list[tuple]:
    """The candidates of this kernel and tile that took least; times: candidate -> microseconds."""
    of_tile = [c for c in times if c[0] == kernel and c[1][:2] == tuple(tile)]
    return sorted(of_tile, key=times.get)[:count]


def total(times: dict, tile: tuple) -> float:
    """Microseconds of the best kernels that share this tile; infinite if one of them has no candidate left."""
    return sum(min((times[c] for c in fastest(times, kernel, tile)), default=math.inf) for kernel in KERNELS)


def best_tiles(times: dict, count: int) -> list[tuple]:
    tiles = {config[:2] for _, config in times}
    return sorted((t for t in tiles if total(times, t) < math.inf), key=lambda tile: total(times, tile))[:count]


def finalists(times: dict) -> list[tuple]:
    """The two best of each kernel, for the three best tiles."""
    return [c for tile in best_tiles(times, 3) for kernel in KERNELS for c in fastest(times, kernel, tile, 2)]


class State:
    """Results so far on disk, a line of JSON each: an interrupted run finds them again."""

    def __init__(self, path: Path):
        self.path, self.results, self.entries = path, {}, {}
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    self._remember(json.loads(line))
                except ValueError:
                    pass  # cut short when the run was interrupted
        path.parent.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def _key(tokens, kernel, config: dict):
        return tokens, kernel, tuple(config.items())

    def _remember(self, record):
        if "entry" in record:
            self.entries[record["tokens"]] = record
        else:
            self.results[self._key(record["tokens"], record["kernel"], record["config"])] = record

    def add(self, **record) -> dict:
        """Remember {tokens, kernel, config, us or error}, or the {tokens, entry} that they led to."""
        with self.path.open("a") as file:
            file.write("\n" + json.dumps(record))  # the line break first: the last line may have been cut short
        self._remember(record)
        return record

    def find(self, tokens, kernel, config: dict) -> dict | None:
        return self.results.get(self._key(tokens, kernel, config))


def tune_tokens(gpu, tokens, rows, wanted, default, state, progress) -> None:
    """Leaves in `state` the entry of the tuned file for this many tokens.

    gpu: `time(candidate)` checks and times a candidate, and raises if it is wrong or does not run;
    `compare(candidates)` times some against each other. wanted: candidates; default: those of the heuristics.
    """
    times = {}
    for candidate in wanted:
        kernel, config = candidate
        result = state.find(tokens, kernel, config._asdict())
        if result is None:
            try:
                outcome = {"us": gpu.time(candidate)}
            except Exception as error:
                outcome = {"error": one_line(error)}
            result = state.add(tokens=tokens, kernel=kernel, config=config._asdict(), **outcome)
            if "error" in result:
                gpu.recover()
        if "us" in result:
            times[candidate] = result["us"]
        progress.update()
    if not best_tiles(times, 1):
        raise SystemExit(f"no candidate works for {tokens} tokens: see {state.path}")
    times = gpu.compare(list(dict.fromkeys(finalists(times) + [c for c in default if c in times])))
    (tile,) = best_tiles(times, 1)
    (up,), (down,) = (fastest(times, kernel, tile) for kernel in ("gate_up", "down"))
    entry = {"rows": rows, "gate_up": up[1]._asdict(), "down": down[1]._asdict()}
    default_us = sum(times.get(candidate, math.nan) for candidate in default)
    state.add(tokens=tokens, entry=entry, us=total(times, tile), heuristics_us=default_us)


def write(path: Path, tuned_with: dict, entries: list[dict], dtype, capability) -> None:
    """The tuned file, whole or not at all; an entry a line."""
    lines = ",\n  ".join(json.dumps(entry) for entry in sorted(entries, key=lambda entry: entry["rows"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tune-", dir=path.parent) as folder:
        new = Path(folder, path.name)
        new.write_text(f'{{\n "tuned_with": {json.dumps(tuned_with)},\n "entries": [\n  {lines}\n ]\n}}\n')
        tuning.read_configs(new, dtype, capability)  # what the package would refuse must not be written
        new.replace(path)


# --- running ----------------------------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="default: all four")
    what.add_argument("--shape", nargs=4, type=int, metavar=("E", "H", "I", "TOP_K"))
    parser.add_argument("--tokens", nargs="+", type=int, help=f"default: doubling, up to {MOST_ROWS} routed rows")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--out", type=Path, default=CONFIGS, help="default: %(default)s")
    parser.add_argument("--state", type=Path, default=ROOT / ".tune", help="results so far; default: %(default)s")
    return parser.parse_args()


def fingerprint() -> str:
    """Results are worth keeping for the same kernels under the same Triton."""
    sources = sorted(Path(kernels.__file__).parent.glob("*.py"))
    return sha256(b"".join(path.read_bytes() for path in sources) + triton.__version__.encode()).hexdigest()[:8]


def main() -> None:
    args = parse_args()
    dtype, device_name = getattr(torch, args.dtype), torch.cuda.get_device_name()
    capability = torch.cuda.get_device_capability()
    layers = [Layer(E, H, I, top_k) for H, I, E, top_k, _ in map(WORKLOADS.get, args.workloads)]
    if args.shape:
        layers = [Layer(*args.shape)]

    states, plan = {}, {}
    for layer in layers:
        name = tuning.config_path(layer[:3], dtype, device_name).stem
        states[layer] = State(args.state / f"{name},top_k={layer.top_k}.{fingerprint()}.jsonl")
        plan[layer] = {}
        for tokens in sorted(set(args.tokens or ladder(layer, dtype)) - set(states[layer].entries)):
            wanted = candidates(tokens * layer.top_k / layer.experts, dtype, capability)
            plan[layer][tokens] = list(dict.fromkeys(wanted + heuristics(layer, tokens, dtype, capability)))

    driver = triton.runtime.driver.active
    shared_limit = driver.utils.get_device_properties(torch.cuda.current_device())["max_shared_mem"]
    faults = compile_ahead(plan, dtype, driver.get_current_target(), shared_limit)
    tuned_with = {
        "compute_capability": "{}.{}".format(*capability),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
    }
    torch.manual_seed(0)
    with tqdm(total=sum(len(wanted) for ladder in plan.values() for wanted in ladder.values()), unit="run") as progress:
        for layer, todo in plan.items():
            experts, hidden_dim, inter, _ = layer
            if todo:
                weights = [w.to(dtype) for w in expert_weights(hidden_dim, inter, experts, "cuda")]
            for tokens, wanted in todo.items():
                progress.set_description(f"E={experts} H={hidden_dim} I={inter} T={tokens}")
                good = [candidate for candidate in wanted if candidate not in faults]
                progress.update(len(wanted) - len(good))
                gpu, default = Gpu(layer, tokens, *weights), heuristics(layer, tokens, dtype, capability)
                tune_tokens(gpu, tokens, tokens * layer.top_k, good, default, states[layer], progress)
            gpu = weights = None  # before the next layer's are made
            out = args.out / tuning.config_path(layer[:3], dtype, device_name).name
            entries = [record["entry"] for record in states[layer].entries.values()]
            write(out, tuned_with, entries, dtype, capability)
            progress.write(str(out))
    report(states, faults)


def report(states: dict, faults: dict) -> None:
    """What the heuristics lose, and what was left out."""
    print(f"{'E':>4} {'H':>5} {'I':>5} {'top_k':>5} {'T':>6} {'tuned us':>9} {'heuristics':>10}")
    left_out = {(kernel, *config._asdict().items()): fault for (kernel, config), fault in faults.items()}
    for layer, state in states.items():
        for tokens, record in sorted(state.entries.items()):
            sizes = "{:4} {:5} {:5} {:5}".format(*layer)
            print(f"{sizes} {tokens:6} {record['us']:9.1f} {record['heuristics_us'] / record['us']:9.3f}x")
        for (_, kernel, config), record in state.results.items():
            if "error" in record:
                left_out[(kernel, *config)] = record["error"]
    for (kernel, *config), reason in left_out.items():
        print(f"left out: {kernel} {' '.join(f'{name}={value}' for name, value in config)}: {reason}")


if __name__ == "__main__":
    main()
