#!/usr/bin/env python3
"""Draws each result in benchmarks/results as an SVG file beside it.

    python benchmarks/plot.py                              # every result
    python benchmarks/plot.py path/to/NVIDIA-H200.json     # one

The end of a name says what it is: `-generate` a whole model, `-side-by-side` the layer beside other kernels, otherwise
the layer beside Transformers. The same numbers give the same bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"
LAYERS = {
    "qwen3-30b": "Qwen3-30B-A3B",
    "moonlight": "Moonlight-16B-A3B",
    "glm45-air": "GLM-4.5-Air",
    "dsv3": "DeepSeek-V3",
}
# Of each at least 4.5:1 on white, which the pictures bring along: they are the same on a dark page.
OURS, STOCK, OTHERS, INK = "#bc4a0e", "#5b6b7d", "#2467ad", "#3d444d"

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
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(path)


# --- the layer --------------------------------------------------------------------------------------------------------


def best_stock(case: dict, mode: str = "") -> float:
    """Microseconds of Transformers' fastest: in a CUDA "graph", "eager", or in either."""
    others = ("ours", "roof", "cublas")
    return min(case[key] for key in case if key.endswith(f"{mode}_us") and not key.startswith(others))


def others_of(case: dict, what: str) -> dict[str, float]:
    """What kernels beside this one and Transformers' reach in a case of a side-by-side result."""
    return {name: value for name, value in case[what].items() if name not in ("ours", "grouped_mm")}


def plot_layer(result: dict, path: Path) -> None:
    """This kernel and Transformers' fastest."""
    cases = [case for case in result["cases"] if case["routing"] == "uniform"]
    lines = {
        ("this kernel", OURS, "o"): lambda case: case["roof_us"] / min(case["ours_graph_us"], case["ours_eager_us"]),
        ("Transformers' fastest", STOCK, "s"): lambda case: case["roof_us"] / best_stock(case),
    }
    plot_shares(result, cases, lines, path)


def plot_side_by_side(result: dict, path: Path) -> None:
    """This kernel, the best of the others and Transformers' grouped_mm, in the first run of each case."""
    cases = [case for case in result["cases"] if case["what"] == "bf16 forward" and case.get("run", 1) == 1]
    lines = {
        ("this kernel", OURS, "o"): lambda case: case["share"]["ours"],
        ("best of two to five other kernels", OTHERS, "D"): lambda case: (
            max(shares) if len(shares := others_of(case, "share").values()) > 1 else None
        ),
        ("Transformers' grouped_mm", STOCK, "s"): lambda case: case["share"].get("grouped_mm"),
    }
    plot_shares(result, cases, lines, path)


def plot_shares(result: dict, cases: list[dict], lines: dict, path: Path) -> None:
    """Share of the hardware's limit over the number of tokens, one panel a layer.

    lines: (label, color, marker) -> what gives the share of a case, None where it was not timed.
    """
    workloads = [name for name in LAYERS if any(case["workload"] == name for case in cases)]
    figure, panels = plt.subplots(1, len(workloads), figsize=(2.45 * len(workloads), 3.2), sharey=True, squeeze=False)
    for axes, workload in zip(panels[0], workloads):
        points = sorted((case for case in cases if case["workload"] == workload), key=lambda case: case["tokens"])
        axes.axhline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        for (label, color, marker), share in reversed(lines.items()):  # this kernel last, above the others
            timed = [(case["tokens"], share(case)) for case in points if share(case) is not None]
            if timed:
                axes.plot(*zip(*timed), color=color, marker=marker, markersize=4.5, linewidth=2, label=label)
            else:
                axes.text(0.5, 0.04, f"{label}:\nnot timed", transform=axes.transAxes, ha="center", color=color, size=9)
        axes.set_title(LAYERS[workload])
        axes.set_xscale("log", base=4)
        axes.set_xlim(0.6, 30000)
        axes.set_xticks([1, 16, 256, 4096], ["1", "16", "256", "4096"])
        axes.set_xlabel("tokens")
    panels[0, 0].set_ylim(0, 1.09)
    panels[0, 0].set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "limit"])
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(
        handles[::-1], labels[::-1], loc="upper left", ncols=len(lines), frameon=False, bbox_to_anchor=(0, 0.94)
    )
    title = f"One MoE layer's experts in bf16 on one {result['gpu']}: share of the hardware's limit"
    figure.text(0.008, 0.945, title, fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.88), w_pad=1.2)
    save(figure, path)


# --- the model --------------------------------------------------------------------------------------------------------


MODES = {"eager": "eager", "static": "static cache, compiled"}


def plot_generate(result: dict, path: Path) -> None:
    """Speed-up over Transformers' fastest, a bar for each case: prefill, then decoding by batch and mode."""
    cases = sorted(result["cases"], key=lambda case: (case["phase"] != "prefill", case["batch"], case["mode"]))
    figure, axes = plt.subplots(figsize=(9.8, 3.2))
    highest = 1
    for position, case in enumerate(cases):
        ours = case["use_kernels_ms"]
        speed_up = min(case[key] for key in ("stock_ms", "grouped_mm_ms") if key in case) / ours
        rate = 1e3 * case["batch"] * (case["tokens"] if case["phase"] == "prefill" else 1) / ours
        axes.bar(position, speed_up, 0.5, color=OURS)
        label = f"{speed_up:.2f}x\n{rate:,.0f}/s"
        axes.annotate(label, (position, speed_up), (0, 2), textcoords="offset points", ha="center", fontsize=9)
        highest = max(highest, speed_up)
    sizes = [f"{case['tokens']} tokens" if case["phase"] == "prefill" else f"batch {case['batch']}" for case in cases]
    labels = [f"{case['phase']}, {size}\n{MODES[case['mode']]}" for case, size in zip(cases, sizes)]
    axes.set_xticks(range(len(cases)), labels)
    axes.axhline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=0.9)  # behind the bars
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 1.25 * highest)
    axes.yaxis.set_major_formatter("{x:g}x")
    model = f"A {result['parameters'] / 1e9:.0f}B MoE model on one {result['gpu']}"
    title = f"{model}: speed-up over Transformers, and this kernel's tokens per second"
    figure.text(0.008, 0.945, title, fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    save(figure, path)


PLOTS = {"-generate": plot_generate, "-side-by-side": plot_side_by_side, "": plot_layer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, default=sorted(RESULTS.glob("*.json")))
    matplotlib.use("svg")
    plt.rcParams.update(STYLE)
    for path in parser.parse_args().results:
        plot = next(plot for end, plot in PLOTS.items() if path.stem.endswith(end))
        plot(json.loads(path.read_text()), path.with_suffix(".svg"))


if __name__ == "__main__":
    main()
