#!/usr/bin/env python3
"""Writes the tables of README.md and docs/performance.md from the committed measurements.

    python benchmarks/tables.py

A table stands between `<!-- NAME: benchmarks/tables.py -->` and `<!-- end -->`; NAME is a function of this file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from plot import LAYERS, MODES, best_stock, others_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs/performance.md", ROOT / "docs/tuning.md")
TABLE = re.compile(r"(<!-- (\w+): benchmarks/tables.py -->\n).*?(<!-- end -->)", re.DOTALL)


def measured(path: str) -> dict:
    return json.loads((ROOT / f"{path}.json").read_text())


def glob(pattern: str) -> list[str]:
    return [str(path.relative_to(ROOT).with_suffix("")) for path in ROOT.glob(f"{pattern}.json")]


H200 = measured("benchmarks/results/NVIDIA-H200")
MODEL = measured("benchmarks/results/NVIDIA-H200-generate")
QWEN3 = measured("benchmarks/results/NVIDIA-H200-qwen3-generate")
FP8 = measured("docs/measurements/NVIDIA-H200-fp8")
AS_OTHERS = measured("docs/measurements/NVIDIA-H100-80GB-HBM3-as-other-gpus")
FP4 = measured("docs/measurements/NVIDIA-H200-fp4")
FP4_DECODE = measured("docs/measurements/NVIDIA-H200-fp4-decode")  # newer: decoding, and training
CODES = measured("docs/measurements/NVIDIA-H200-generate-codes")
CONTINUOUS = measured("docs/measurements/NVIDIA-H200-continuous")
ROUTERS = measured("docs/measurements/NVIDIA-H200-routers")
BLOCKS = measured("docs/measurements/NVIDIA-H200-blocks")
STEP_MEMORY = measured("docs/measurements/NVIDIA-H200-memory")
TRAINING = measured("docs/measurements/NVIDIA-H200-training")
LORA = measured("docs/measurements/NVIDIA-H200-lora")
PARALLEL = [measured(path) for path in sorted(glob("docs/measurements/*x-NVIDIA-H100-80GB-HBM3-parallel"))]
SIDE_BY_SIDE = measured("benchmarks/results/NVIDIA-H100-80GB-HBM3-side-by-side")


# --- cells ------------------------------------------------------------------------------------------------------------


def time(us: float) -> str:
    """Three significant digits at most, and every digit before the point."""
    value, unit = (us, "us") if us < 999.5 else (us / 1e3, "ms")
    digits = 0 if value >= 99.95 or (unit == "us" and value >= 9.95) else 1 if unit == "us" or value >= 9.995 else 2
    return f"{value:.{digits}f} {unit}"


def size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 0.9995e9 else f"{count / 1e6:.0f} MB"


def ratio(ours: float, other: float) -> str:
    return f"{other / ours:.1f}x"


def name(case: dict) -> str:
    return LAYERS[case["workload"]] + (", Zipf" if case.get("routing") == "zipf" else "")


def in_order(cases: list[dict]) -> list[dict]:
    return sorted(cases, key=lambda case: (list(LAYERS).index(case["workload"]), case["tokens"]))  # stable: Zipf last


def find(cases: list[dict], **values) -> dict:
    return next(case for case in cases if values.items() <= case.items())


def plain_triton(case: dict) -> float:
    """Without what Hopper alone has; older results, with the tile sizes that all other GPUs had then."""
    return case.get("ours_as_sm_80_graph_us") or case["ours_portable_graph_us"]


def markdown(*rows) -> str:
    head, *body = (f"| {' | '.join(map(str, row))} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


# --- tables -----------------------------------------------------------------------------------------------------------


def speed() -> str:
    """A row for each thing that people do."""
    rows = []
    for workload, tokens in (("qwen3-30b", 1), ("qwen3-30b", 4096), ("glm45-air", 4096), ("dsv3", 64), ("dsv3", 4096)):
        case = find(H200["cases"], workload=workload, tokens=tokens, routing="uniform")
        rows.append((f"experts of {name(case)}", tokens, case["ours_graph_us"], best_stock(case)))
    case = find(H200["router_cases"], workload="dsv3", tokens=4096)
    rows.append((f"router of {name(case)}", 4096, case["ours_graph_us"], case["stock_graph_us"]))
    case = find(BLOCKS["cases"], block="Moonlight-16B", tokens=1)
    stock = min(case[key] for key in case if key.endswith("mm_eager_us"))
    rows.append(("a MoE block of Moonlight-16B-A3B, eager", 1, case["whole_eager_us"], stock))
    for what, cases in (("training", TRAINING["cases"]), ("LoRA with PEFT, r=16,", LORA["cases"])):
        case = find(cases, workload="qwen3-30b", tokens=16384)
        rows.append((f"{what} of {name(case)}'s experts", 16384, case["ours_us"], case["stock_us"]))
    for what, case in (
        ("a whole 16B model, prefill", find(MODEL["cases"], phase="prefill")),
        ("a step of decoding, eager", find(MODEL["cases"], phase="decode", mode="eager", batch=1)),
        ("a step of decoding, compiled", find(MODEL["cases"], phase="decode", mode="static", batch=1)),
    ):
        tokens = case["tokens"] if case["phase"] == "prefill" else 1
        rows.append((what, tokens, 1e3 * case["use_kernels_ms"], 1e3 * case["stock_ms"]))
    return markdown(
        ("", "tokens", "this kernel", "Transformers", "speed-up"),
        *((what, tokens, time(ours), time(stock), ratio(ours, stock)) for what, tokens, ours, stock in rows),
    )


def layer(result: dict = H200) -> str:
    """With columns for what newer results have besides: cuBLAS, the clock and the power, other backends."""
    head = ["layer", "T", "this kernel", "of the limit", "Transformers", "of the limit", "speed-up", "eager"]
    cases, more = in_order(result["cases"]), more_of_layer(result["cases"])
    rows = [(*head, "plain Triton, of the limit", *more)]
    for case in cases:
        ours, stock, limit = case["ours_graph_us"], best_stock(case, "graph"), case["roof_us"]
        eager = ratio(case["ours_eager_us"], best_stock(case, "eager"))
        shares = [f"{limit / us:.2f}" for us in (ours, stock, plain_triton(case))]
        cells = (time(ours), shares[0], time(stock), shares[1], ratio(ours, stock), eager, shares[2])
        rows.append((name(case), case["tokens"], *cells, *(cell(case) for cell in more.values())))
    return markdown(*rows)


def more_of_layer(cases: list[dict]) -> dict:
    """Title -> what gives a case's cell, empty where it was not measured; of columns that are not all empty."""

    def cublas(case):
        return f"{case['roof_us'] / case['cublas_graph_us']:.2f}" if "cublas_graph_us" in case else ""

    def load(case):
        has_load = "ours_graph_sm_mhz" in case
        return f"{case['ours_graph_sm_mhz']:.0f} MHz, {case['ours_graph_watts']:.0f} W" if has_load else ""

    def backend(name):
        def cell(case):
            found = case.get("against", {}).get(name, {})
            times = [found[key] for key in ("graph_us", "eager_us") if key in found]
            return time(min(times)) if times else ""

        return cell

    names = dict.fromkeys(name for case in cases for name in case.get("against", {}))
    columns = {"cuBLAS at equal rows, of the limit": cublas, "clock, power": load}
    columns |= {f"`{name}`": backend(name) for name in names}
    return {title: cell for title, cell in columns.items() if any(map(cell, cases))}


def backends() -> str:
    """Against each of Transformers' own, forward: the range of what it takes, over what this kernel takes."""
    rows = [("Transformers' backend", "this kernel is", "measured")]
    for backend in ("grouped_mm", "batched_mm"):
        key = f"{backend}_graph_us"
        ratios = [case[key] / case["ours_graph_us"] for case in H200["cases"] if key in case]
        where = f"{H200['gpu']}, bf16, CUDA graphs, Transformers {H200['versions']['transformers']}, in the same run"
        rows.append((f"`{backend}`", span(ratios), where))
    for backend, who, what in (
        ("sonicmoe", "SonicMoE", "bf16"),
        ("finegrained-fp8", "finegrained-kernels", "fp8"),
    ):
        cases = [case for case in SIDE_BY_SIDE["cases"] if case["what"] == f"{what} forward" and who in case["us"]]
        ratios = [case["us"][who] / case["us"]["ours"] for case in cases if case.get("run", 1) == 1]
        where = f"{SIDE_BY_SIDE['gpu']}, {SIDE_BY_SIDE['date']}, {what}: {who}, {SIDE_BY_SIDE['versions'][who]}"
        rows.append((f"`{backend}`", span(ratios), where))
    rows.append(("`deepgemm`", "not timed yet", "`python benchmarks/layer.py --against deepgemm`"))
    return markdown(*rows)


def span(ratios: list[float]) -> str:
    least, most = (f"{value:.{0 if value >= 10 else 2}f}x" for value in (min(ratios), max(ratios)))
    return f"{least} to {most} as fast"


def router() -> str:
    rows = [("router", "T", "this kernel", "Transformers", "speed-up")]
    for case in in_order(H200["router_cases"]):
        ours, stock = case["ours_graph_us"], case["stock_graph_us"]
        rows.append((name(case), case["tokens"], time(ours), time(stock), ratio(ours, stock)))
    return markdown(*rows)


def expert_parallel() -> str:
    rows = [
        ("layer", "T", "rows of its own", "all rows", "Transformers", "speed-up", "its own", "Transformers", "speed-up")
    ]
    for case in in_order(H200["expert_parallel_cases"]):
        cells = [name(case), case["tokens"], f"{case['local']} of {case['slots']}"]
        for way in ("sentinels", "dispatched"):
            ours, stock = case[f"{way}_graph_us"], case[f"{way}_stock_graph_us"]
            cells += [time(ours), time(stock), ratio(ours, stock)]
        rows.append(cells)
    return markdown(*rows)


def fp8() -> str:
    head = ("T", "fp8", "of the limit", "activations in bf16", "this kernel in bf16", "fp8 against it")
    rows = [(*head, "torch: dequantize, `grouped_mm`")]
    for case in FP8["cases"]:
        ours, bf16 = case["fp8_graph_us"], case["bf16_graph_us"]
        others = time(case["fp8_weights_graph_us"]), time(bf16), ratio(ours, bf16), time(case["torch_eager_us"])
        rows.append((case["tokens"], time(ours), f"{case['roof_us'] / ours:.2f}", *others))
    return markdown(*rows)


def fp4() -> str:
    rows = [("T", "4 bits", "of the limit", "this kernel in fp8", "4 bits against it", "in bf16", "4 bits against it")]
    formats = ("fp4", "fp8", "bf16")
    times = {case["T"]: (case["roof"], *(case[of] for of in formats)) for case in FP4["rows"] if "fp8" in case}
    for case in FP4_DECODE["cases"]:
        times[case["tokens"]] = (case["roof_us"], *(case[f"{of}_graph_us"] for of in formats))
    for tokens, (limit, ours, fp8, bf16) in sorted(times.items()):
        cells = (time(ours), f"{limit / ours:.2f}", time(fp8), f"{fp8 / ours:.2f}x", time(bf16))
        rows.append((tokens, *cells, f"{bf16 / ours:.2f}x"))
    return markdown(*rows)


def fp4_training() -> str:
    names = {"data_gradients": "gradients of the hidden states", "lora": "LoRA, r=16, with those of its factors"}
    rows = [("forward and backward, T=4096", "over 4 bits", "over bf16", "speed-up")]
    for key, name in names.items():
        ours, bf16 = (FP4_DECODE["training"][f"{key}_{format_name}_us"] for format_name in ("fp4", "bf16"))
        rows.append((name, time(ours), time(bf16), f"{bf16 / ours:.2f}x"))
    return markdown(*rows)


def codes() -> str:
    rows = [("experts in", "weights", *(f"tokens/s, {case['batch']} at once" for case in CODES["cases"]))]
    for key, form in (("bf16", "bf16"), ("fp8", "fp8"), ("fp4", "4 bits")):
        rates = (f"{1e3 * case['batch'] / case[f'{key}_ms']:.0f}" for case in CODES["cases"])
        rows.append((form, size(CODES[f"{key}_bytes"]), *rates))
    return markdown(*rows)


def continuous() -> str:
    ours, stock = (
        CONTINUOUS["new_tokens"] * CONTINUOUS["requests"] / CONTINUOUS[f"{who}_s"] for who in ("use_kernels", "stock")
    )
    return markdown(
        ("requests", "tokens in", "tokens out", "this kernel", "Transformers", "speed-up"),
        (
            CONTINUOUS["requests"],
            CONTINUOUS["prompt_tokens"],
            CONTINUOUS["new_tokens"] * CONTINUOUS["requests"],
            f"{ours:.0f} tokens/s",
            f"{stock:.0f} tokens/s",
            f"{ours / stock:.2f}x",
        ),
    )


def as_others() -> str:
    """Shares of the limit: of wgmma, which the card has, and of mma.sync, which those have."""
    gpus = ("sm_80", "sm_89", "sm_120")
    rows = [("layer", "T", "sm_90", *(f"{gpu}, {mma}" for mma in ("wgmma", "mma.sync") for gpu in gpus))]
    for by_wgmma, by_mma in zip(AS_OTHERS["wgmma"]["forward"], AS_OTHERS["mma.sync"]["forward"]):
        times = [by_wgmma["native_us"], *(case[f"{gpu}_us"] for case in (by_wgmma, by_mma) for gpu in gpus)]
        rows.append((name(by_wgmma), by_wgmma["tokens"], *(f"{by_wgmma['roof_us'] / us:.2f}" for us in times)))
    return markdown(*rows)


def memory(case: dict) -> list[str]:
    return [size(case[f"{who}_{what}_bytes"]) for what in ("saved", "peak") for who in ("ours", "stock")]


MEMORY = ("saved", "Transformers", "peak", "Transformers")


def training() -> str:
    rows = [("layer", "T", "this kernel", "of the limit", "Transformers", "of the limit", "speed-up", *MEMORY)]
    for case in in_order(TRAINING["cases"]):
        ours, stock, limit = case["ours_us"], case["stock_us"], case["roof_us"]
        cells = (time(ours), f"{limit / ours:.2f}", time(stock), f"{limit / stock:.2f}", ratio(ours, stock))
        rows.append((name(case), case["tokens"], *cells, *memory(case)))
    return markdown(*rows)


def lora() -> str:
    rows = [("layer", "T", "this kernel", "Transformers", "speed-up", *MEMORY)]
    for case in in_order(LORA["cases"]):
        ours, stock = case["ours_us"], case["stock_us"]
        rows.append((name(case), case["tokens"], time(ours), time(stock), ratio(ours, stock), *memory(case)))
    return markdown(*rows)


def step_memory() -> str:
    rows = [("adapters, r=16", "trained", "loss", "peak")]
    for case in STEP_MEMORY["cases"]:
        rows.append((case["adapters"], f"{case['trained'] / 1e6:.0f}M", case["loss"], f"{case['peak_gib']:.1f} GiB"))
    return markdown(*rows)


def routers() -> str:
    rows = [("router", "T", "this kernel", "Transformers", "speed-up", "eager")]
    for case in ROUTERS["cases"]:
        ours, stock = case["ours_graph_us"], case["stock_graph_us"]
        cells = (time(ours), time(stock), ratio(ours, stock), ratio(case["ours_eager_us"], case["stock_eager_us"]))
        rows.append((case["router"], case["tokens"], *cells))
    return markdown(*rows)


def blocks() -> str:
    rows = [
        ("block", "T", "this kernel", "part by part", "Transformers", "eager", "part by part", "Transformers", "host")
    ]
    for case in BLOCKS["cases"]:
        cells = []
        for how in ("graph", "eager"):
            stock = min(case[key] for key in case if key.endswith(f"mm_{how}_us"))
            cells += [time(case[f"whole_{how}_us"]), time(case[f"parts_{how}_us"]), time(stock)]
        rows.append((case["block"], case["tokens"], *cells, time(case["whole_host_us"])))
    return markdown(*rows)


def model() -> str:
    rows = [("", "", "sequences", "this kernel", "Transformers", "speed-up")]
    for model_name, result in (("Moonlight-16B-A3B", MODEL), ("Qwen3-30B-A3B", QWEN3)):
        for case in sorted(result["cases"], key=lambda case: (case["phase"] == "decode", case["mode"], case["batch"])):
            what = f"prefill of {case['tokens']} tokens" if case["phase"] == "prefill" else "a step of decoding"
            ours = 1e3 * case["use_kernels_ms"]
            stock = 1e3 * min(case[key] for key in case if key in ("stock_ms", "grouped_mm_ms"))
            cells = (case["batch"], time(ours), time(stock), f"{stock / ours:.2f}x")
            rows.append((model_name, f"{what}, {MODES[case['mode']]}", *cells))
    return markdown(*rows)


def parallel(results: list[dict] = PARALLEL) -> str:
    """Older results have prefill alone, and no time of the host."""
    cases = [(result["gpus"], case) for result in results for case in result["cases"]]
    has_host = any("ours_host_us" in case for _, case in cases)
    rows = [("GPUs", "what ranks share", "tokens", "this kernel", "Transformers", "speed-up")]
    rows[0] += ("host, a layer", "Transformers") if has_host else ()
    for gpus, case in cases:
        ours, stock = 1e3 * case["ours_ms"], 1e3 * case["stock_ms"]
        tokens = f"{case['tokens']} decoded" if case.get("phase") == "decode" else case["tokens"]
        cells = (gpus, case["way"], tokens, time(ours), time(stock), f"{case.get('speed_up', stock / ours):.2f}x")
        if has_host:
            cells += tuple(time(case[f"{who}_host_us"]) if "ours_host_us" in case else "" for who in ("ours", "stock"))
        rows.append(cells)
    return markdown(*rows)


def others() -> str:
    """Microseconds and, behind them, the share of the limit; the least in bold."""
    names = ("ours", "vLLM", "triton_kernels", "finegrained-kernels", "Liger", "SonicMoE", "grouped_mm")
    rows = [("", "T", "this kernel", *names[1:-1], "Transformers")]
    for case in SIDE_BY_SIDE["cases"]:
        cells = []
        for who in names:
            if who not in case["us"]:
                cells.append("")
                continue
            text = f"{case['us'][who]:g}"
            cells.append(
                f"{f'**{text}**' if case['us'][who] == min(case['us'].values()) else text} {case['share'][who]:.2f}"
            )
        run = f", run {case['run']}" if "run" in case else ""
        rows.append((f"{name(case)}, {case['what']}{run}", case["tokens"], *cells))
    return markdown(*rows)


def standing() -> str:
    """Of the first run of each case."""
    cases = [case for case in SIDE_BY_SIDE["cases"] if case.get("run", 1) == 1]
    ahead = [min(others_of(case, "us").values()) / case["us"]["ours"] for case in cases]
    first, near = (sum(times >= least for times in ahead) for least in (1, 0.99))
    return f"This kernel is first at {first} of {len(cases)} points and within 1 % of the first at {near}."


# --- pages ------------------------------------------------------------------------------------------------------------


def written(page: str) -> str:
    """The page with the tables of today."""
    return TABLE.sub(lambda match: f"{match[1]}\n{globals()[match[2]]()}\n\n{match[3]}", page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
