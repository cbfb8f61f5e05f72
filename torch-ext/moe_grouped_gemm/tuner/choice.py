"""Which candidates win: all are timed once, in passing, then the best of them in turn.

Both GEMMs of a call share a tile's height, and with it the schedule: what counts is the sum of their times and that of
routing, so the winners are the best kernels of the tile with the least sum.
"""

from __future__ import annotations

import math

from .candidates import KERNELS


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


def choose(trials, wanted: list[tuple], default: list[tuple]) -> tuple[dict, float, float]:
    """The best "gate_up" and "down" as a tuned file has them, their microseconds with routing, and those of `default`.

    Args:
        trials: `time(candidate)` checks and times a candidate, and raises if it is wrong or does not run;
            `compare(candidates)` times some against each other.
        wanted: candidates; those that raise are left out.
        default: those of the heuristics, all of them among `wanted`.
    Raises:
        RuntimeError: none is left.
    """
    times, error = {}, None
    for candidate in wanted:
        try:
            times[candidate] = trials.time(candidate)
        except Exception as raised:
            error = raised
            trials.recover()
    if not best_tiles(times, 1):
        raise RuntimeError("no candidate works on this GPU") from error
    times = trials.compare(list(dict.fromkeys(finalists(times) + [c for c in default if c in times])))
    (tile,) = best_tiles(times, 1)
    best = {kernel: fastest(times, kernel, tile)[0][1]._asdict() for kernel in ("gate_up", "down")}
    return best, total(times, tile), sum(times.get(candidate, math.nan) for candidate in default)
