"""`tune`: one layer after another, candidates are compiled, timed and chosen, and the file is written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from .. import gpu, tuning
from .._ops import add_op_namespace_prefix
from ..integration.sizes import layers_of
from ..launch_configs import Traits
from ..tuned_files import config_path, read_configs, write_configs
from .candidates import Layer, candidates, heuristics, ladder
from .choice import choose
from .trials import Trials, compile_ahead, random_weights


def tune(
    layers: nn.Module | Iterable[tuple[int, int, int, int]],
    folder: str | os.PathLike,
    tokens: Iterable[int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Path]:
    """Finds the fastest tile sizes for experts layers on the current GPU; writes a file for each into `folder`.

    MOE_GROUPED_GEMM_CONFIGS=folder has them used. Prints a line for each number of tokens as it is done. Interrupted,
    or asked for more tokens, it goes on with the files that are there, if the same kernel and versions wrote them. On
    the GPU there has to be room for the weights of one such layer, which are random, and its activations.

    Args:
        layers: a Transformers model, of which all dense experts layers are tuned, or (E, H, I, top_k) of each layer.
        folder: nothing is written elsewhere, but for what Triton compiles, into its own cache. Made if it is not there.
        tokens: numbers of tokens; by default doubling, from where decoding ends to 131072 routed rows.
        dtype: bf16 or fp16, of layers given by their sizes.
    Returns:
        The files.
    Raises:
        ValueError: there is nothing to tune, or the sizes are none.
        RuntimeError: there is no GPU, or it is lost to this process.
    """
    layers = _layers(layers, dtype)
    tokens = None if tokens is None else sorted(set(tokens))
    if not torch.cuda.is_available():
        raise RuntimeError("tune: there is no GPU that PyTorch can use")
    gpu.launchers()  # or the error that says what is missing
    traits = gpu.traits(torch.cuda.current_device())
    paths = [_tune(layer, tokens or ladder(layer), Path(folder), traits) for layer in layers]
    tuning.experts_table.cache_clear()
    return paths


def _layers(layers, dtype: torch.dtype) -> list[Layer]:
    if isinstance(layers, nn.Module):
        return [Layer(*sizes) for sizes in layers_of(layers)]
    layers = [Layer(*sizes, dtype) for sizes in layers]
    for layer in layers:
        if not all(type(size) is int and size > 0 for size in layer[:4]) or layer.top_k > layer.experts:
            raise ValueError(f"layers: expected (E, H, I, top_k), four positive integers, got {layer[:4]}")
    if not layers:
        raise ValueError("layers: expected at least one")
    return layers


def _tune(layer: Layer, tokens: list[int], folder: Path, traits: Traits) -> Path:
    experts, hidden_dim, inter, top_k, dtype = layer
    path = config_path(folder, layer[:3], dtype, torch.cuda.get_device_name())
    origin = _origin()
    entries = _earlier(path, origin, dtype, traits)
    done = {entry["rows"] for entry in entries}
    plan = {t: candidates(layer, t, traits) for t in tokens if t * top_k not in done}
    name = f"E={experts} H={hidden_dim} I={inter} top_k={top_k}"
    if plan:
        print(f"{name}: compiling {sum(map(len, plan.values()))} candidates", flush=True)
        compile_ahead(layer, plan)
        weights = random_weights(layer)
    for t, wanted in plan.items():
        best, us, heuristics_us = choose(Trials(layer, t, *weights), wanted, heuristics(layer, t, traits))
        entries.append({"rows": t * top_k, **best})
        write_configs(path, origin, entries, dtype, traits)
        print(f"{name} T={t}: {us:.1f} us, {heuristics_us / us:.3f} times as fast as untuned", flush=True)
    print(path, flush=True)
    return path


def _origin() -> dict:
    """What a file is good for: results are worth keeping for the same kernels under the same Triton."""
    import triton

    return {
        "compute_capability": "{}.{}".format(*torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernel": add_op_namespace_prefix("").rstrip(":"),
    }


def _earlier(path: Path, origin: dict, dtype: torch.dtype, traits: Traits) -> list[dict]:
    """The entries of a file that such a run wrote; none, if it is another's or cannot be used."""
    try:
        read_configs(path, dtype, traits)
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return content["entries"] if content["tuned_with"] == origin else []
