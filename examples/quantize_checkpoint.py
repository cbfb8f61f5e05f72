#!/usr/bin/env python3
"""Converts a local MoE checkpoint to fp8 with block scales, the format in which DeepSeek-V3 comes.

    python examples/quantize_checkpoint.py path/to/model path/to/model-fp8           # the experts
    python examples/quantize_checkpoint.py --linear path/to/model path/to/model-fp8  # every linear layer, as DeepSeek

One file of weights after another, with no more than one of them in memory. An interrupted run goes on where it stopped;
a finished one is never written over. Nothing is written before it is known that the checkpoint can be converted, and
that the result has room. It loads in Transformers, which takes its sizes from `config.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
from pathlib import Path

import one_line_errors
import torch
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


class Fp8:
    """float8_e4m3fn, with an fp32 scale for each block of 128 x 128."""

    def obstacle(self, key: str, weight: torch.Tensor) -> str | None:
        """What Transformers' fp8 experts cannot be."""
        if re.search(r"\.experts\..*bias$", key):
            return "Transformers' fp8 experts have no biases"
        # It joins the scales of gate and up, but counts blocks through both.
        rows = weight.shape[0]
        if re.search(r"\.experts\.\d+\.(gate|up)_proj\.weight$", key) and rows % 128 and rows > 64:
            return f"Transformers cannot load {rows} rows in blocks of 128: expected a multiple of 128"
        return None

    def nbytes(self, weight: torch.Tensor) -> int:
        *stack, rows, columns = weight.shape
        return weight.numel() + 4 * math.prod(stack) * -(-rows // 128) * -(-columns // 128)

    def tensors(self, kernel, key: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        codes, scale = kernel.quantize_fp8(weight)
        return {key: codes, f"{key}_scale_inv": scale}

    def config(self, kept: list[str]) -> dict:
        """kept: the linear layers that are not quantized."""
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": kept,
        }


FORMATS = {"fp8": Fp8()}


# --- before anything is written ---------------------------------------------------------------------------------------


def shards(source: Path) -> list[str]:
    if (source / INDEX).exists():
        names = sorted(set(json.loads((source / INDEX).read_text())["weight_map"].values()))
    else:
        names = sorted(path.name for path in source.glob("*.safetensors"))
        if len(names) != 1:
            raise SystemExit(f"{source}: expected {INDEX} or one file *.safetensors, found {len(names)}")
    if missing := [name for name in names if not (source / name).exists()]:
        raise SystemExit(f"{source}: incomplete, {len(missing)} of {len(names)} files are missing, {missing[0]} first")
    return names


def check_folders(source: Path, target: Path, state: str) -> None:
    if not source.is_dir():
        raise SystemExit(f"{source}: no such folder; a model of the Hub: hf download {source} --local-dir FOLDER")
    if not (source / "config.json").exists():
        raise SystemExit(f"{source}: no checkpoint, there is no config.json")
    if "quantization_config" in json.loads((source / "config.json").read_text()):
        raise SystemExit(f"{source}: quantized already, see quantization_config in its config.json")
    if target.exists() and not target.is_dir():
        raise SystemExit(f"{target}: not a folder")
    if target.exists() and any(target.iterdir()):
        if not (target / STATE).exists():
            raise SystemExit(f"{target}: not empty, and no conversion was interrupted there: choose another place")
        if (target / STATE).read_text() != state:
            raise SystemExit(f"{target}: another conversion was interrupted there: {(target / STATE).read_text()}")


def is_quantized(key: str, tensor: torch.Tensor, linear: bool) -> bool:
    if EXPERTS.search(key):
        return True
    return linear and tensor.ndim == 2 and key.endswith(".weight") and not KEPT.search(key)


def other_files(source: Path) -> list[Path]:
    """The tokenizer and the like; no weights in another format."""
    weights = (".safetensors", ".bin", ".pth", ".gguf")
    return [
        path
        for path in sorted(source.iterdir())
        if path.is_file() and path.suffix not in weights and path.name not in (INDEX, "config.json")
    ]


def sizes(source: Path, names: list[str], form, linear: bool) -> dict[str, tuple[int, int]]:
    """Bytes of the tensors of each file, before and after; refuses what cannot be converted."""
    found, has_experts = {}, False
    for name in names:
        before = after = 0
        with safe_open(source / name, "pt") as file:
            for key in file.keys():
                tensor = file.get_tensor(key)  # mapped: its data stay on disk
                if obstacle := form.obstacle(key, tensor):
                    raise SystemExit(f"{key}: {obstacle}")
                before += tensor.nbytes
                if is_quantized(key, tensor, linear):
                    if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
                        raise SystemExit(f"{key}: expected bf16, fp16 or fp32, found {tensor.dtype}")
                    after += form.nbytes(tensor)
                else:
                    after += tensor.nbytes
                has_experts = has_experts or EXPERTS.search(key) is not None
        found[name] = before, after
    if not has_experts:
        endings = ".experts.N.down_proj.weight or .experts.down_proj"
        raise SystemExit(f"{source}: no experts to quantize, no weight has a name that ends in {endings}")
    return found


def check_space(target: Path, needed: int) -> None:
    folder = next(folder for folder in (target.absolute(), *target.absolute().parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        gigabytes = f"{needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
        raise SystemExit(f"{target}: {gigabytes}: make room, or choose another place")


# --- writing ----------------------------------------------------------------------------------------------------------


def convert(kernel, source: Path, target: Path, name: str, form, linear: bool, device: str, bar: tqdm) -> None:
    """Writes the file `name` of the target, at once when it is complete."""
    tensors = {}
    with safe_open(source / name, "pt") as file:
        for key in file.keys():
            tensor = file.get_tensor(key)
            if is_quantized(key, tensor, linear):
                try:
                    quantized = form.tensors(kernel, key, tensor.to(device))
                except ValueError as error:  # an infinity or a NaN
                    raise SystemExit(f"{source / name}: {key}: {error}") from error
                tensors.update((name, value.cpu()) for name, value in quantized.items())
            else:
                tensors[key] = tensor
            bar.update(tensor.nbytes)
        metadata = file.metadata()
    save_file(tensors, target / f"{name}.part", metadata=metadata)
    os.replace(target / f"{name}.part", target / name)


def finish(source: Path, target: Path, names: list[str], form, linear: bool) -> None:
    """The index, the config, and every other small file; last the note that the result is not complete."""
    weight_map, total_size, kept = {}, 0, set()
    for name in names:
        with safe_open(target / name, "pt") as file:
            for key in sorted(file.keys()):
                weight_map[key] = name
                tensor = file.get_tensor(key)
                total_size += tensor.nbytes
                if tensor.ndim == 2 and key.endswith(".weight") and not is_quantized(key, tensor, linear):
                    kept.add(key.removesuffix(".weight"))
    if (source / INDEX).exists():
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for path in other_files(source):
        shutil.copy(path, target / path.name)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = form.config(sorted(kept))
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (target / STATE).unlink()


def quantize(kernel, source: Path, target: Path, form, linear: bool, device: str, state: str) -> None:
    names = shards(source)
    nbytes = sizes(source, names, form, linear)
    done = [name for name in names if (target / name).exists()]
    others = sum(path.stat().st_size for path in other_files(source))
    check_space(target, others + sum(after for name, (_, after) in nbytes.items() if name not in done))
    target.mkdir(parents=True, exist_ok=True)
    (target / STATE).write_text(state)
    before, after = (sum(column) for column in zip(*nbytes.values()))
    try:
        with tqdm(total=before, unit="B", unit_scale=True) as bar:
            bar.update(sum(nbytes[name][0] for name in done))
            for name in names:
                if name not in done:
                    convert(kernel, source, target, name, form, linear, device, bar)
        finish(source, target, names, form, linear)
    except KeyboardInterrupt:
        raise SystemExit("stopped: the same command goes on from here") from None
    print(f"{target}: {after / 1e9:.2f} GB, and {before / 1e9:.2f} GB before. After register(), this loads it:")
    print(f'AutoModelForCausalLM.from_pretrained("{target}", dtype="auto", device_map="auto", use_kernels=True)')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--format", choices=FORMATS, default="fp8", help="default: %(default)s")
    parser.add_argument("--linear", action="store_true", help="quantize every linear layer, not the experts alone")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="that computes; default: %(default)s")
    args = parser.parse_args()
    if args.device == "cuda":
        one_line_errors.need_gpu()
    root = Path(__file__).resolve().parent.parent
    os.environ.setdefault("LOCAL_KERNELS", f"org/moe-grouped-gemm={root}")
    kernel = get_kernel("org/moe-grouped-gemm", version=1)
    state = json.dumps({"source": str(args.source.resolve()), "format": args.format, "linear": args.linear})
    check_folders(args.source, args.target, state)
    quantize(kernel, args.source, args.target, FORMATS[args.format], args.linear, args.device, state)


if __name__ == "__main__":
    main()
