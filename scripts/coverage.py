#!/usr/bin/env python3
"""Write docs/models.md: how each experts class, router and block of the Transformers that runs this is served.

What is fused, and which router or block it is, is asked of the kernel itself, about tiny modules of each model that are
otherwise as by its default config; what is tested is what test_coverage.py, test_routers.py and test_blocks.py in
tests/integration/ run.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("LOCAL_KERNELS", f"org/moe-grouped-gemm={ROOT}")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(ROOT / "tests/helpers"))

import torch  # noqa: E402
import transformers  # noqa: E402
from kernels import get_kernel  # noqa: E402

from moe_models import (  # noqa: E402
    ALONE,
    OWN_BLOCKS,
    OWN_ROUTERS,
    UNDECORATED,
    block_classes,
    experts_classes,
    lone_block,
    router_classes,
    tiny_block,
    tiny_model,
    tiny_module,
    tiny_router,
)

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
    lines += ["", "The routers beside both:", "", "| model | class | scores | logits | |", "|---|---|---|---|---|"]
    lines += [router_row(kernel, entry) for entry in router_classes()]
    lines += [
        "",
        "The blocks around routers and decorated experts:",
        "",
        "| model | class | beside router and experts | |",
        "|---|---|---|---|",
    ]
    lines += [block_row(kernel, entry) for entry in block_classes()]
    return "\n".join(lines)


def router_row(kernel, entry) -> str:
    how = OWN_ROUTERS.get(entry.name)
    scores = logits = ""
    if how is None or how.startswith("served"):
        module = tiny_router(entry)
        kernel.integration.routers.KIND.meet(type(module).__module__)
        for parameter in module.parameters():
            parameter.data = parameter.data.bfloat16()
        routers = kernel.integration.router_forms
        found = routers.router_of(module, torch.bfloat16) or routers.router_of(tiny_router(entry), torch.float32)
        form = found.form
        words = [form.scoring.replace("_", " ")]
        words += ["in groups"] if form.num_group > 1 else []
        words += ["correction bias"] if found.correction else []
        words += ["bias"] if found.bias else []
        words += ["renormalised"] if form.norm_topk_prob else []
        scores, logits = ", ".join(words), "fp32" if form.product_dtype is None else "the model's dtype"
    return f"| {entry.model} | `{entry.name}` | {scores} | {logits} | {how or 'served'} |"


def block_row(kernel, entry) -> str:
    how, beside = OWN_BLOCKS.get(entry.name), ""
    if how is None:
        experts = next(experts for experts in experts_classes() if experts.model == entry.model)
        try:
            block = tiny_block(entry.load(), tiny_model(experts))
        except LookupError:
            block = lone_block(entry)
        kernel.integration.stand_ins.meet(type(block).__module__)
        found = kernel.integration.block_trial.block_of(block, torch.float32)
        words = ["shared experts"] if found.shared else []
        words += ["their sigmoid gate"] if found.shared_gate else []
        words += ["a factor"] if found.factor != 1.0 else []
        words += ["returns the weights"] if found.returns_weights else []
        beside = ", ".join(words)
    return f"| {entry.model} | `{entry.name}` | {beside} | {f'part by part: {how}' if how else 'one call'} |"


def written(page: str) -> str:
    """The page with the table of today."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
