#!/usr/bin/env python3
"""Converts a local MoE checkpoint to fp8 with block scales, as DeepSeek-V3 comes, or to 4 bits, as gpt-oss comes.

    python examples/quantize_checkpoint.py path/to/model path/to/model-fp8               # the experts
    python examples/quantize_checkpoint.py --linear path/to/model path/to/model-fp8      # all linear layers
    python examples/quantize_checkpoint.py --format fp4 path/to/model path/to/model-fp4  # the experts

One file of the result after another, with no more than that file and one weight in memory. An interrupted run goes on
where it stopped; a finished one is never written over. Nothing is written before it is known that the checkpoint can be
converted, and that the result has room. It loads in Transformers, which takes its sizes from `config.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import one_line_errors
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from kernels import get_kernel
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

# One tensor per expert, as published checkpoints have it, or the stacks of all experts.
EXPERTS = re.compile(r"(.*\.experts)\.(\d+\.(?:(?:gate|up|down)_proj|w[123])\.weight|(?:gate_up|down)_proj)")
# Matrices that are no linear layers: Transformers keeps them as they are.
KEPT = re.compile(r"(embed_tokens|embeddings?|lm_head|norm|gate|router|shared_expert_gate)\.weight$")
FILE_SIZE = "5GB"  # of the result, or of a single weight that is more
INDEX = "model.safetensors.index.json"
STATE = "quantize_checkpoint.json"  # there as long as the result is not complete


# --- parts of the result ----------------------------------------------------------------------------------------------
# Each knows by their names the tensors that it is made of. Those are mapped: their data stay on disk until it is made.


class Kept(NamedTuple):
    name: str
    weight: torch.Tensor

    def sources(self) -> dict[str, torch.Tensor]:
        return {self.name: self.weight}

    def nbytes(self) -> int:
        return self.weight.nbytes

    def tensors(self, kernel, device: str) -> dict[str, torch.Tensor]:
        return self.sources()


class Fp8Weight(NamedTuple):
    name: str
    weight: torch.Tensor

    def sources(self) -> dict[str, torch.Tensor]:
        return {self.name: self.weight}

    def nbytes(self) -> int:
        *stack, rows, columns = self.weight.shape
        return self.weight.numel() + 4 * math.prod(stack) * -(-rows // 128) * -(-columns // 128)

    def tensors(self, kernel, device: str) -> dict[str, torch.Tensor]:
        codes, scale = quantized(kernel.quantize_fp8, self.name, self.weight, device)
        return {self.name: codes, f"{self.name}_scale_inv": scale}


class Fp4Experts(NamedTuple):
    """One weight (E, N, K) of a layer's experts, to be written as Transformers and gpt-oss do."""

    name: str
    weights: dict[
        str, torch.Tensor
    ]  # of each expert in turn one or, gate and up, two (rows, K); or the stack (E, N, K)
    num_experts: int

    def sources(self) -> dict[str, torch.Tensor]:
        return self.weights

    def nbytes(self) -> int:
        return sum(weight.numel() // 2 + weight.numel() // 32 for weight in self.weights.values())

    def tensors(self, kernel, device: str) -> dict[str, torch.Tensor]:
        codes, scales = [], []
        for key, weight in self.weights.items():
            for tensors, tensor in zip((codes, scales), quantized(kernel.quantize_fp4, key, weight, device)):
                tensors.append(tensor.view(torch.uint8).flatten(0, -2))
        # Rows of all experts one below the other.
        codes, scales = (torch.cat(tensors).unflatten(0, (self.num_experts, -1)) for tensors in (codes, scales))
        return {f"{self.name}_blocks": codes.unflatten(-1, (-1, 16)), f"{self.name}_scales": scales}


def quantized(quantize, name: str, weight: torch.Tensor, device: str) -> list[torch.Tensor]:
    try:
        return [tensor.cpu() for tensor in quantize(weight.to(device))]
    except ValueError as error:  # an infinity or a NaN
        raise SystemExit(f"{name}: {error}") from error


# --- formats ----------------------------------------------------------------------------------------------------------


class Fp8:
    """float8_e4m3fn, with an fp32 scale for each block of 128 x 128."""

    loading = "use_kernels=True"

    def parts(self, weights: dict[str, torch.Tensor], linear: bool) -> list[Fp8Weight]:
        """Of what is quantized; refuses what Transformers' fp8 experts cannot be."""
        for key, weight in weights.items():
            if re.search(r"\.experts\..*bias$", key):
                raise SystemExit(f"{key}: Transformers' fp8 experts have no biases")
            # It joins the scales of gate and up, but counts blocks through both.
            if re.search(r"\.experts\.\d+\.((gate|up)_proj|w[13])\.weight$", key) and (rows := weight.shape[0]) % 128:
                if rows > 64:
                    expected = f"{rows} rows in blocks of 128: expected a multiple of 128"
                    raise SystemExit(f"{key}: Transformers cannot load {expected}")
        return [
            Fp8Weight(key, weight)
            for key, weight in weights.items()
            if EXPERTS.fullmatch(key) or (linear and is_matrix(key, weight) and not KEPT.search(key))
        ]

    def config(self, kept: list[str]) -> dict:
        """kept: the linear layers that are not quantized."""
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": kept,
        }


class Fp4:
    """MXFP4, as docs/fp4.md describes it: of each layer's experts one tensor, however many there were."""

    loading = "quantization_config=moe.fp4_config()"

    def parts(self, weights: dict[str, torch.Tensor], linear: bool) -> list[Fp4Experts]:
        if linear:
            raise SystemExit("--linear: in 4 bits there are experts alone")
        layers = defaultdict(dict)
        for key, weight in weights.items():
            if match := EXPERTS.fullmatch(key):
                path, name = match.groups()
                layers[path][name] = weight
        return [part for path, experts in layers.items() for part in self.layer(path, experts)]

    def layer(self, path: str, experts: dict[str, torch.Tensor]) -> list[Fp4Experts]:
        """experts: by what follows `path` in their names."""
        stacked = "down_proj" in experts
        if stacked:
            num_experts = len(experts["down_proj"])
            names = {"gate_up_proj": ["gate_up_proj"], "down_proj": ["down_proj"]}
        else:
            num_experts = len({name.partition(".")[0] for name in experts})
            if "0.w1.weight" in experts:  # as Mixtral calls them
                projections = {"gate_up_proj": ["w1", "w3"], "down_proj": ["w2"]}
            elif "0.gate_proj.weight" in experts:
                projections = {"gate_up_proj": ["gate_proj", "up_proj"], "down_proj": ["down_proj"]}
            else:
                projections = {"up_proj": ["up_proj"], "down_proj": ["down_proj"]}
            names = {
                name: [f"{expert}.{p}.weight" for expert in range(num_experts) for p in each]
                for name, each in projections.items()
            }
        wanted = {name for each in names.values() for name in each}
        if odd := sorted(wanted ^ experts.keys()):
            raise SystemExit(f"{path}: {odd[0]} is {'missing' if odd[0] in wanted else 'not expected'} there")
        if stacked:
            experts = self.rows_first(path, experts)
        for name, weight in experts.items():
            if weight.shape[-1] % 32:
                columns = f"{weight.shape[-1]} columns make no groups of 32, each of which shares a scale in 4 bits"
                raise SystemExit(f"{path}.{name}: {columns}")
        for each in names.values():
            if len({experts[name].shape for name in each}) > 1:
                raise SystemExit(f"{path}: its experts are not of one size")
        return [
            Fp4Experts(f"{path}.{name}", {f"{path}.{key}": experts[key] for key in each}, num_experts)
            for name, each in names.items()
        ]

    def rows_first(self, path: str, stacks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As (E, 2I, H) and (E, H, I), whichever two of their dimensions are changed in the file."""
        for order in (stacks, {name: stack.mT for name, stack in stacks.items()}):
            (_, up, hidden), (_, down, inter) = order["gate_up_proj"].shape, order["down_proj"].shape
            if (up, hidden) == (2 * inter, down):
                return order
        shapes = " and ".join(str(tuple(stack.shape)) for stack in stacks.values())
        raise SystemExit(f"{path}: {shapes} are not weights of experts with a gate")

    def config(self, kept: list[str]) -> dict:
        return {"quant_method": "mxfp4", "modules_to_not_convert": None}


FORMATS = {"fp8": Fp8(), "fp4": Fp4()}


# --- before anything is written ---------------------------------------------------------------------------------------


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


def read(source: Path) -> dict[str, torch.Tensor]:
    """All tensors, mapped."""
    if (source / INDEX).exists():
        names = sorted(set(json.loads((source / INDEX).read_text())["weight_map"].values()))
    else:
        names = sorted(path.name for path in source.glob("*.safetensors"))
        if len(names) != 1:
            raise SystemExit(f"{source}: expected {INDEX} or one file *.safetensors, found {len(names)}")
    if missing := [name for name in names if not (source / name).exists()]:
        raise SystemExit(f"{source}: incomplete, {len(missing)} of {len(names)} files are missing, {missing[0]} first")
    weights = {}
    for name in names:
        with safe_open(source / name, "pt") as file:
            weights.update((key, file.get_tensor(key)) for key in file.keys())
    return weights


def is_matrix(key: str, weight: torch.Tensor) -> bool:
    return weight.ndim == 2 and key.endswith(".weight")


def plan(source: Path, form, linear: bool) -> list:
    """The parts of the result; refuses what cannot be converted."""
    weights = read(source)
    if not any(map(EXPERTS.fullmatch, weights)):
        endings = ".experts.N.down_proj.weight or .experts.down_proj"
        raise SystemExit(f"{source}: no experts to quantize, no weight has a name that ends in {endings}")
    parts = form.parts(weights, linear)
    quantized = {key: weight for part in parts for key, weight in part.sources().items()}
    for key, weight in quantized.items():
        if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise SystemExit(f"{key}: expected bf16, fp16 or fp32, found {weight.dtype}")
    return [*(Kept(key, weight) for key, weight in weights.items() if key not in quantized), *parts]


def files(parts: list) -> dict[str, list]:
    """The parts of each file of the result, named as Transformers names them."""
    sizes = {part.name: torch.empty(part.nbytes(), dtype=torch.uint8, device="meta") for part in parts}
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=FILE_SIZE)
    by_name = {part.name: part for part in parts}
    return {file: [by_name[name] for name in names] for file, names in split.filename_to_tensors.items()}


def other_files(source: Path) -> list[Path]:
    """The tokenizer and the like; no weights in another format."""
    weights = (".safetensors", ".bin", ".pth", ".gguf")
    return [
        path
        for path in sorted(source.iterdir())
        if path.is_file() and path.suffix not in weights and path.name not in (INDEX, "config.json")
    ]


def check_space(target: Path, needed: int) -> None:
    folder = next(folder for folder in (target.absolute(), *target.absolute().parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        gigabytes = f"{needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
        raise SystemExit(f"{target}: {gigabytes}: make room, or choose another place")


# --- writing ----------------------------------------------------------------------------------------------------------


def write(kernel, path: Path, parts: list, device: str, bar: tqdm) -> None:
    """One file, there at once when it is complete."""
    tensors = {}
    for part in parts:
        tensors.update(part.tensors(kernel, device))
        bar.update(source_bytes([part]))
    save_file(tensors, f"{path}.part", metadata={"format": "pt"})
    os.replace(f"{path}.part", path)


def source_bytes(parts: list) -> int:
    return sum(weight.nbytes for part in parts for weight in part.sources().values())


def finish(source: Path, target: Path, names: list[str], config: dict) -> None:
    """The index, the config, and every other small file; last the note that the result is not complete."""
    weight_map, total_size = {}, 0
    for name in names:
        with safe_open(target / name, "pt") as file:
            for key in sorted(file.keys()):
                weight_map[key] = name
                total_size += file.get_tensor(key).nbytes
    if len(names) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for path in other_files(source):
        shutil.copy(path, target / path.name)
    config = {**json.loads((source / "config.json").read_text()), "quantization_config": config}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (target / STATE).unlink()


def quantize(kernel, source: Path, target: Path, form, linear: bool, device: str, state: str) -> None:
    parts = plan(source, form, linear)
    by_file = files(parts)
    kept = sorted(p.name.removesuffix(".weight") for p in parts if isinstance(p, Kept) and is_matrix(p.name, p.weight))
    missing = {name: file_parts for name, file_parts in by_file.items() if not (target / name).exists()}
    others = sum(path.stat().st_size for path in other_files(source))
    check_space(target, others + sum(part.nbytes() for file_parts in missing.values() for part in file_parts))
    target.mkdir(parents=True, exist_ok=True)
    (target / STATE).write_text(state)
    before, after = source_bytes(parts), sum(part.nbytes() for part in parts)
    try:
        with tqdm(total=before, unit="B", unit_scale=True) as bar:
            bar.update(before - sum(map(source_bytes, missing.values())))
            for name, file_parts in missing.items():
                write(kernel, target / name, file_parts, device, bar)
        finish(source, target, list(by_file), form.config(kept))
    except KeyboardInterrupt:
        raise SystemExit("stopped: the same command goes on from here") from None
    print(f"{target}: {after / 1e9:.2f} GB, and {before / 1e9:.2f} GB before. After moe.register(), this loads it:")
    print(f'AutoModelForCausalLM.from_pretrained("{target}", dtype="auto", device_map="auto", {form.loading})')


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
