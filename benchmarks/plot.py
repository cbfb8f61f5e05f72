#!/usr/bin/env python3
"""Draws benchmarks/results/<gpu>.json and, if it is there, <gpu>-generate.json as SVG files beside them.

    python benchmarks/plot.py                              # every result
    python benchmarks/plot.py path/to/NVIDIA-H200.json     # one

The same numbers give the same bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"
OURS, STOCK, INK = "#e8762b", "#7d8fa3", "#7f858d"  # all legible on white and on GitHub's dark grey

STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "moe-grouped-gemm",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "xtick.minor.visible": False,
    **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], INK),
}


def save(figure, path: Path) -> None:
    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)
    print(path)


# --- the layer --------------------------------------------------------------------------------------------------------


def best_stock(case: dict) -> float:
    """Microseconds of Transformers' fastest."""
    return min(case[key] for key in case if key.endswith("_us") and not key.startswith(("ours", "roof")))


def plot_roof(result: dict, path: Path) -> None:
    """Fraction of the roof over T, one panel a workload."""
    cases = [case for case in result["cases"] if case["routing"] == "uniform"]
    workloads = list(dict.fromkeys(case["workload"] for case in cases))
    figure, panels = plt.subplots(1, len(workloads), figsize=(2.45 * len(workloads), 3.1), sharey=True, squeeze=False)
    for axes, workload in zip(panels[0], workloads):
        points = sorted((case for case in cases if case["workload"] == workload), key=lambda case: case["tokens"])
        tokens = [case["tokens"] for case in points]
        ours = [case["roof_us"] / min(case["ours_graph_us"], case["ours_eager_us"]) for case in points]
        stock = [case["roof_us"] / best_stock(case) for case in points]
        axes.axhline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.plot(tokens, stock, color=STOCK, marker="o", markersize=4, linewidth=2, label="Transformers' fastest")
        axes.plot(tokens, ours, color=OURS, marker="o", markersize=4, linewidth=2, label="this kernel")
        axes.set_title(workload)
        axes.set_xscale("log", base=4)
        axes.set_xlim(0.6, 30000)
        axes.set_xticks([1, 16, 256, 4096], ["1", "16", "256", "4096"])
        axes.set_xlabel("tokens")
    panels[0, 0].set_ylim(0, 1.09)
    panels[0, 0].set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "roof"])
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="lower right", ncols=2, frameon=False, bbox_to_anchor=(1, 0.9))
    figure.text(0.008, 0.945, f"One expert layer, {result['gpu']}: share of what the hardware allows", fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.93), w_pad=1.2)
    save(figure, path)


# --- the model --------------------------------------------------------------------------------------------------------


def generate_groups(cases: list[dict]) -> list[tuple[str, dict]]:
    """(label, {mode: (tokens/s, speed-up over Transformers' fastest)}) of prefill, then of each decoding batch."""
    groups = {}
    for case in sorted(cases, key=lambda case: (case["phase"] != "prefill", case["batch"], case["mode"])):
        stock = min(case[key] for key in ("stock_ms", "grouped_mm_ms") if key in case)
        tokens = case["batch"] * (case["tokens"] if case["phase"] == "prefill" else 1)
        label = f"prefill\n{case['tokens']} tokens" if case["phase"] == "prefill" else f"decode\nbatch {case['batch']}"
        ours = case["use_kernels_ms"]
        groups.setdefault(label, {})[case["mode"]] = (1e3 * tokens / ours, stock / ours)
    return list(groups.items())


MODES = {"eager": ("#f0b48a", "eager"), "static": (OURS, "static cache, compiled")}


def plot_generate(result: dict, path: Path) -> None:
    """Speed-up of `generate` in bars; the labels add our tokens per second."""
    groups = generate_groups(result["cases"])
    figure, axes = plt.subplots(figsize=(9.8, 3.1))
    width = 0.38
    for position, (_, modes) in enumerate(groups):
        for number, (mode, (rate, speed_up)) in enumerate(modes.items()):
            x = position + (number - (len(modes) - 1) / 2) * (width + 0.03)
            axes.bar(x, speed_up, width, color=MODES[mode][0])
            label = f"{speed_up:.2f}x\n{rate:,.0f}/s"
            axes.annotate(label, (x, speed_up), (0, 2), textcoords="offset points", ha="center", fontsize=9)
    axes.axhline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=0.9)  # behind the bars
    axes.set_xticks(range(len(groups)), [label for label, _ in groups])
    axes.tick_params(axis="x", length=0)
    highest = max(speed_up for _, modes in groups for _, speed_up in modes.values())
    axes.set_ylim(0, 1.25 * max(1, highest))
    axes.yaxis.set_major_formatter("{x:g}x")
    used = [mode for mode in MODES if any(mode in modes for _, modes in groups)]
    handles = [plt.Rectangle((0, 0), 1, 1, color=MODES[mode][0]) for mode in used]
    labels = [MODES[mode][1] for mode in used]
    figure.legend(handles, labels, loc="lower right", ncols=2, frameon=False, bbox_to_anchor=(1, 0.9))
    model = f"{result['parameters'] / 1e9:.0f}B DeepSeek-V3, {result['gpu']}"
    figure.text(0.008, 0.945, f"{model}: times stock, and our tokens per second", fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, default=sorted(RESULTS.glob("*.json")))
    matplotlib.use("svg")
    plt.rcParams.update(STYLE)
    for path in parser.parse_args().results:
        plot = plot_generate if path.stem.endswith("-generate") else plot_roof
        plot(json.loads(path.read_text()), path.with_suffix(".svg"))


if __name__ == "__main__":
    main()
