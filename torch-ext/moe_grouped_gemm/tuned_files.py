"""configs/*.json, which scripts/tune.py writes: the file of a layer on a GPU, read and checked."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from .launch_configs import GEMM_FIELD_TYPES, ExpertsConfig, GemmConfig, fault_of

CONFIGS = Path(__file__).parent / "configs"


def config_path(shape, dtype: torch.dtype, device_name: str) -> Path:
    """The file with the tuned configurations of layers of this (E, H, I) on this GPU."""
    experts, hidden_dim, inter = shape
    dtype_name = str(dtype).removeprefix("torch.")
    device = re.sub(r"[^\w.-]", "_", device_name)
    return CONFIGS / f"E={experts},H={hidden_dim},I={inter},dtype={dtype_name},device={device}.json"


def read_configs(path: Path, dtype: torch.dtype, capability: tuple[int, int]) -> list[tuple[int, ExpertsConfig]]:
    """(rows it was tuned for, configuration) of each entry of a tuned file, rows ascending.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not what scripts/tune.py writes, or cannot work for this dtype on such a GPU.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    _check_fields("the file", content, ["tuned_with", "entries"])
    if not isinstance(content["entries"], list) or not content["entries"]:
        raise ValueError("entries: expected a list of at least one")
    entries, last_rows = [], 0
    for i, entry in enumerate(content["entries"]):
        _check_fields(f"entry {i}", entry, ["rows", "gate_up", "down"])
        rows = entry["rows"]
        if type(rows) is not int or not last_rows < rows < 2**31:
            raise ValueError(f"entry {i}: rows: expected an integer above {last_rows} and below 2**31, got {rows!r}")
        up, down = (_gemm_config(f"entry {i}: {name}", entry[name]) for name in ("gate_up", "down"))
        if (up.BLOCK_M, up.MIN_M) != (down.BLOCK_M, down.MIN_M):
            raise ValueError(f"entry {i}: gate_up and down must share BLOCK_M and MIN_M")
        for name, config in (("gate_up", up), ("down", down)):
            fault = fault_of(name, config, dtype, capability)
            if fault:
                raise ValueError(f"entry {i}: {name}: {fault}")
        entries.append((rows, ExpertsConfig(up, down)))
        last_rows = rows
    return entries


def _check_fields(name, value, required, optional=()):
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected an object, got {type(value).__name__}")
    if not set(required) <= set(value) <= {*required, *optional}:
        raise ValueError(f"{name}: expected the fields {', '.join([*required, *optional])}, got {', '.join(value)}")


def _gemm_config(name, value) -> GemmConfig:
    defaults = GemmConfig._field_defaults
    _check_fields(name, value, [field for field in GemmConfig._fields if field not in defaults], defaults)
    config = GemmConfig(**value)
    for field, kind in GEMM_FIELD_TYPES.items():
        x = getattr(config, field)
        if type(x) is not kind:
            raise ValueError(f"{name}: {field}: expected {kind.__name__}, got {x!r}")
        # A dot takes nothing below 16.
        least = 16 if field in ("BLOCK_M", "MIN_M", "BLOCK_N", "BLOCK_K") else 1
        if kind is int and (x < least or (field != "num_stages" and x & (x - 1))):
            raise ValueError(f"{name}: {field}: expected a power of two, {least} or more, got {x}")
    if config.MIN_M > config.BLOCK_M:
        raise ValueError(f"{name}: MIN_M {config.MIN_M} exceeds BLOCK_M {config.BLOCK_M}")
    return config
