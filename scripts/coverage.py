#!/usr/bin/env python3
"""Write docs/models.md: how each experts class of the Transformers that runs this is served.

What is fused is asked of the kernel itself, about tiny experts of each model whose activation is the default config's;
what is tested is what tests/integration/test_coverage.py runs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("LOCAL_KERNELS", f"org/moe-grouped-gemm={ROOT}")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(ROOT / "tests/helpers"))

import transformers  # noqa: E402
from kernels import get_kernel  # noqa: E402

from moe_models import ALONE, UNDECORATED, experts_classes, tiny_module  # noqa: E402

PAGE = ROOT / "docs/models.md"
BEGIN, END = "<!-- written by scripts/coverage.py -->", "<!-- end -->"


def layout(module) -> str:
    words = ["gated" if module.has_gate else "not gated"]
    if module.has_gate and not module.is_concatenated:
        words.append("interleaved")
    for option, word in (("is_transposed", "(E, in, out)"), ("has_bias", "biases"), ("has_post_expert_norm", "norm")):
        if getattr(module, option):
            words.append(word)
    return ", ".join(words)


def gate_name(module, gate) -> str:
    if gate is None:
        return type(module.act_fn).__name__
    limits = "" if gate.limit is None else f", clamped at {gate.limit:g}"
    return f"{gate.activation}{limits}"


def table() -> str:
    kernel = get_kernel("org/moe-grouped-gemm", version=1)
    kernel.register()
    lines = [
        f"The {len(experts_classes())} classes of transformers {transformers.__version__}:",
        "",
        "| model | class | layout | gate | | tested |",
        "|---|---|---|---|---|---|",
    ]
    for entry in experts_classes():
        module = tiny_module(entry)
        modules = kernel.integration.modules
        assert modules.peek(module) is None, entry.name
        gate = None if modules.runs_composed(module) else modules.gate_of(module)
        tested = f"alone: {ALONE[entry.name]}" if entry.name in ALONE else "alone, in a model"
        path = "composed" if gate is None else "fused"
        cells = (entry.model, f"`{entry.name}`", layout(module), gate_name(module, gate), path, tested)
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "And those without the decorator:", "", "| model | class | |", "|---|---|---|"]
    lines += [f"| {model} | `{name}` | {how} |" for (model, name), how in UNDECORATED.items()]
    return "\n".join(lines)


def written(page: str) -> str:
    """The page with the table of today."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
