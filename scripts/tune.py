#!/usr/bin/env python3
"""Tunes the grouped GEMMs for this GPU and writes torch-ext/moe_grouped_gemm/configs/*.json, one file a layer.

    python scripts/tune.py                                    # the four workloads of benchmarks/benchmark.py
    python scripts/tune.py --shape 64 2048 1408 6             # a layer of your own: E H I top_k
    python scripts/tune.py --out ~/tiles                      # elsewhere, for MOE_GROUPED_GEMM_CONFIGS to name

The command line of `moe.tune`, in this checkout. `make build` afterwards puts files in configs/ to use.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

import one_line_errors
import torch
from kernels import get_kernel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from benchmark import WORKLOADS  # noqa: E402

CONFIGS = ROOT / "torch-ext/moe_grouped_gemm/configs"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="default: all four")
    what.add_argument("--shape", nargs=4, type=int, metavar=("E", "H", "I", "TOP_K"))
    parser.add_argument("--tokens", nargs="+", type=int, help="default: doubling, up to 131072 routed rows")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--out", type=Path, default=CONFIGS, help="default: %(default)s")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    one_line_errors.need_gpu()
    os.environ.setdefault("LOCAL_KERNELS", f"org/moe-grouped-gemm={ROOT}")
    moe = get_kernel("org/moe-grouped-gemm", version=1)
    layers = [(E, H, I, top_k) for H, I, E, top_k, _ in map(WORKLOADS.get, args.workloads)]
    try:
        moe.tune([args.shape] if args.shape else layers, args.out, args.tokens, getattr(torch, args.dtype))
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from here")


if __name__ == "__main__":
    main()
