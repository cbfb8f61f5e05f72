#!/usr/bin/env python3
"""Converts a local MoE checkpoint to fp8 with block scales, the format in which DeepSeek-V3 comes.

    python examples/quantize_checkpoint.py path/to/model path/to/model-fp8         # the experts
    python examples/quantize_checkpoint.py --linear path/to/model path/to/model-fp8   # every linear layer, as DeepSeek

One file of weights after another, with no more than one of them in memory. An interrupted run goes on where it stopped;
a finished one is never written over. The result loads in Transformers, which takes its sizes from `config.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from pathlib import Path

from kernels import get_kernel
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

# One tensor per expert, as published checkpoints have it, or the stacks of all experts.
EXPERTS = re.compile(r"\.experts\.(\d+\.(gate|up|down)_proj\.weight|(gate_up|down)_proj)$")
# Matrices that are no linear layers: Transformers keeps them as they are.
KEPT = re.compile(r"(embed_tokens|embeddings?|lm_head|norm|gate|router|shared_expert_gate)\.weight$")
INDEX = "model.safetensors.index.json"
STATE = "quantize_checkpoint.json"  # there as long as the result is not complete


def shards(source: Path) -> list[str]:
    if (source / INDEX).exists():
        return sorted(set(json.loads((source / INDEX).read_text())["weight_map"].values()))
    names = sorted(path.name for path in source.glob("*.safetensors"))
    if len(names) != 1:
        raise SystemExit(f"{source}: expected {INDEX} or one file *.safetensors, found {len(names)}")
    return names


def prepare(source: Path, target: Path, linear: bool) -> None:
    """Refuses what cannot be converted or would be written over; notes in the target what is being made of what."""
    if not (source / "config.json").exists():
        raise SystemExit(f"{source}: no checkpoint, there is no config.json")
    if "quantization_config" in json.loads((source / "config.json").read_text()):
        raise SystemExit(f"{source}: quantized already, see quantization_config in its config.json")
    state = json.dumps({"source": str(source.resolve()), "linear": linear})
    if target.exists() and any(target.iterdir()):
        if not (target / STATE).exists():
            raise SystemExit(f"{target}: not empty, and no conversion was interrupted there")
        if (target / STATE).read_text() != state:
            raise SystemExit(f"{target}: another conversion was interrupted there: {(target / STATE).read_text()}")
    target.mkdir(parents=True, exist_ok=True)
    (target / STATE).write_text(state)


def is_quantized(key: str, shape: list[int], linear: bool) -> bool:
    if EXPERTS.search(key):
        return True
    return linear and len(shape) == 2 and key.endswith(".weight") and not KEPT.search(key)


def check(key: str, shape: list[int]) -> None:
    """What Transformers' fp8 experts cannot be. It joins the scales of gate and up, but counts blocks through both."""
    if re.search(r"\.experts\..*bias$", key):
        raise SystemExit(f"{key}: Transformers' fp8 experts have no biases")
    if re.search(r"\.experts\.\d+\.(gate|up)_proj\.weight$", key):
        rows = shape[0]
        if rows % 128 and rows > 64:
            raise SystemExit(
                f"{key}: Transformers cannot load {rows} rows in blocks of 128: expected a multiple of 128"
            )


def convert(kernel, source: Path, target: Path, name: str, linear: bool, bar: tqdm) -> None:
    """Writes the file `name` of the target, at once when it is complete."""
    tensors = {}
    with safe_open(source / name, "pt") as file:
        for key in file.keys():
            tensor = file.get_tensor(key)
            check(key, list(tensor.shape))
            if is_quantized(key, list(tensor.shape), linear):
                try:
                    tensors[key], tensors[f"{key}_scale_inv"] = kernel.quantize_fp8(tensor)
                except ValueError as error:  # an infinity or a NaN
                    raise SystemExit(f"{source / name}: {key}: {error}") from error
            else:
                tensors[key] = tensor
            bar.update()
        metadata = file.metadata()
    save_file(tensors, target / f"{name}.part", metadata=metadata)
    os.replace(target / f"{name}.part", target / name)


def finish(source: Path, target: Path, names: list[str]) -> None:
    """The index, the config, and every other small file; last the note that the result is not complete."""
    weight_map, total_size, kept = {}, 0, set()
    for name in names:
        with safe_open(target / name, "pt") as file:
            keys = set(file.keys())
            for key in sorted(keys):
                weight_map[key] = name
                tensor = file.get_tensor(key)  # mapped: its data stay on disk
                total_size += tensor.nbytes
                is_matrix = tensor.ndim == 2 and key.endswith(".weight")
                if is_matrix and f"{key}_scale_inv" not in keys:
                    kept.add(key.removesuffix(".weight"))
    if (source / INDEX).exists():
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in (INDEX, "config.json"):
            shutil.copy(path, target / path.name)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": sorted(kept),
    }
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (target / STATE).unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--linear", action="store_true", help="quantize every linear layer, not the experts alone")
    args = parser.parse_args()
    root = Path(__file__).resolve().parent.parent
    os.environ.setdefault("LOCAL_KERNELS", f"org/moe-grouped-gemm={root}")
    kernel = get_kernel("org/moe-grouped-gemm", version=1)
    prepare(args.source, args.target, args.linear)
    names = shards(args.source)
    counts = {}
    for name in names:
        with safe_open(args.source / name, "pt") as file:
            counts[name] = len(file.keys())
    with tqdm(total=sum(counts.values()), unit="tensor") as bar:
        for name in names:
            if (args.target / name).exists():
                bar.update(counts[name])
            else:
                convert(kernel, args.source, args.target, name, args.linear, bar)
    finish(args.source, args.target, names)


if __name__ == "__main__":
    main()
