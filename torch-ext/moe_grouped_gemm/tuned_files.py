"""Files of tuned configurations, one for a layer on a GPU: found, read and checked; and the one function that writes.

They are looked for in the folder that MOE_GROUPED_GEMM_CONFIGS names, then among those that ship with the package.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import torch

from .launch_configs import GEMM_FIELD_TYPES, ExpertsConfig, GemmConfig, Traits, fault_of

CONFIGS = Path(__file__).parent / "configs"


def folders() -> list[Path]:
    """Where files are looked for, in this order."""
    named = os.environ.get("MOE_GROUPED_GEMM_CONFIGS")
    return [Path(named), CONFIGS] if named else [CONFIGS]


def config_path(folder: Path, shape, dtype: torch.dtype, device_name: str) -> Path:
    """The file with the tuned configurations of layers of this (E, H, I) on this GPU."""
    experts, hidden_dim, inter = shape
    dtype_name = str(dtype).removeprefix("torch.")
    device = re.sub(r"[^\w.-]", "_", device_name)
    return folder / f"E={experts},H={hidden_dim},I={inter},dtype={dtype_name},device={device}.json"


def read_configs(path: Path, dtype: torch.dtype, traits: Traits) -> list[tuple[int, ExpertsConfig]]:
    """(rows it was tuned for, configuration) of each entry of a tuned file, rows ascending.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not what `write_configs` writes, or cannot work for this dtype on such a GPU.
    """
    return _checked(path.read_text(encoding="utf-8"), dtype, traits)


def write_configs(path: Path, tuned_with: dict, entries: list[dict], dtype: torch.dtype, traits: Traits) -> None:
    """Writes the file whole or not at all, an entry a line. What `read_configs` would refuse is a ValueError."""
    lines = ",\n  ".join(json.dumps(entry) for entry in sorted(entries, key=lambda entry: entry["rows"]))
    text = f'{{\n "tuned_with": {json.dumps(tuned_with)},\n "entries": [\n  {lines}\n ]\n}}\n'
    _checked(text, dtype, traits)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _checked(text: str, dtype: torch.dtype, traits: Traits) -> list[tuple[int, ExpertsConfig]]:
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
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
            fault = fault_of(name, config, dtype, traits)
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
