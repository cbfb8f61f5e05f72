#!/usr/bin/env python3
"""Times a whole model: stock Transformers against `use_kernels=True`, in prefill and in decoding.

    python benchmarks/generate.py                      # all of it, and benchmarks/results/<gpu>-generate.json
    python benchmarks/generate.py --modes eager        # without the minutes that torch.compile takes
    python benchmarks/generate.py --modes static --batches 64
    python benchmarks/generate.py --model qwen3

Random weights in a DeepSeek-V3 of the 16B "moonlight" size, or in as many layers of Qwen3-30B-A3B as fit; on a CPU in
small ones, to see that the script runs.
Modes: "eager", and "static": `generate(..., cache_implementation="static")`, which compiles the decoding step and
records it as a CUDA graph. Prefill is never compiled. Logits are compared in every mode and batch before anything is
timed, and nothing is written unless they agree. A run adds its cases to those of earlier runs on the same card with the
same versions; a case of another commit says which.

(Not called benchmark_*.py: `kernels benchmark` would ask it for a Benchmark class.)
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import sys
from pathlib import Path

# Read when Transformers is imported: its own Hub kernels (RMSNorm, ...) stay off, so that only ours make a difference.
os.environ["USE_HUB_KERNELS"] = "NO"
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import one_line_errors  # noqa: F401
import torch
import transformers
from demo import DEVICE, Clock, moonlight_config, random_model, small_config
from tqdm import tqdm
from transformers import LogitsProcessor, PreTrainedConfig, PreTrainedModel, Qwen3MoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from common import argument_parser, header, staged_kernel, write

PREFILL, PROMPT, NEW_TOKENS = (4096, 128, 64) if DEVICE == "cuda" else (64, 16, 4)
ROUNDS = 3
GROUPED_MM = "grouped_mm_throughout"


# --- models -----------------------------------------------------------------------------------------------------------


def deepseek_config() -> PreTrainedConfig:
    return moonlight_config(torch.cuda.mem_get_info()[0]) if DEVICE == "cuda" else small_config()


def qwen3_config() -> PreTrainedConfig:
    """The dimensions of Qwen3-30B-A3B: 48 layers, or as many as fit beside what a step needs."""
    if DEVICE == "cpu":
        sizes = {"hidden_size": 256, "moe_intermediate_size": 64, "num_experts": 16, "num_experts_per_tok": 4}
        return Qwen3MoeConfig(vocab_size=512, num_hidden_layers=2, num_attention_heads=4, head_dim=32, **sizes)
    layer_bytes = 2 * 128 * 3 * 2048 * 768
    return Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        moe_intermediate_size=768,
        num_hidden_layers=min(48, int(0.75 * torch.cuda.mem_get_info()[0]) // layer_bytes),
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        tie_word_embeddings=False,
    )


CONFIGS = {"moonlight": deepseek_config, "qwen3": qwen3_config}


def sharing(model: PreTrainedModel) -> PreTrainedModel:
    """Another model with the same weights, in the same memory."""
    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, weights)  # which takes what is in its memo for copied already


def build_models(kernel, config: PreTrainedConfig) -> dict[str, PreTrainedModel]:
    """One set of weights in three models.

    stock: what Transformers does by itself: grouped_mm, but batched_mm while `generate` decodes on a GPU.
    grouped_mm: stock kept from that switch, which helps at batch 1 and hurts beyond.
    use_kernels: this kernel.
    """
    stock = random_model(config)
    models = {name: sharing(stock) for name in ("grouped_mm", "use_kernels")}
    # `generate` switches only what is called "grouped_mm".
    ALL_EXPERTS_FUNCTIONS.register(GROUPED_MM, grouped_mm_experts_forward)
    models["grouped_mm"].set_experts_implementation(GROUPED_MM)
    kernel.register()
    models["use_kernels"].set_use_kernels(True)
    return {"stock": stock, **models}


def check_models(models: dict[str, PreTrainedModel], kernel) -> None:
    """Each model runs what its name says."""
    for name, implementation in (("stock", "grouped_mm"), ("grouped_mm", GROUPED_MM), ("use_kernels", None)):
        model = models[name]
        served = {line for path, line in kernel.status(model).items() if path.endswith(".mlp.experts")}
        if served != {"moe_grouped_gemm" if implementation is None else f"{implementation}: not switched on"}:
            raise SystemExit(f"{name}: {', '.join(sorted(served))}: nothing is timed")


# --- running ----------------------------------------------------------------------------------------------------------


def random_tokens(batch: int, length: int, vocab_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, vocab_size, (batch, length), generator=generator).to(DEVICE)  # neither padding nor end


class ForcedTokens(LogitsProcessor):
    """Whatever a model would choose, the next token is that of `tokens`: all models see the same, routed the same."""

    def __init__(self, tokens: torch.Tensor):
        self.tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = self.tokens[:, input_ids.shape[1], None]
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen, 0)


def generate(model, tokens, prompt_length, mode, progress):
    """(seconds from each token to the next, logits of each); the first of both is prefill."""
    clock = Clock(progress)
    prompt = tokens[:, :prompt_length]
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens.shape[1] - prompt_length,
        do_sample=False,
        pad_token_id=0,
        streamer=clock,
        logits_processor=[ForcedTokens(tokens)],
        output_logits=True,
        return_dict_in_generate=True,
        **({"cache_implementation": "static"} if mode == "static" else {}),
    )
    return [after - before for before, after in zip(clock.times, clock.times[1:])], out.logits


# --- agreement --------------------------------------------------------------------------------------------------------


def compare(logits, expected) -> tuple[float, float]:
    """Of two sequences of (N, vocabulary): the relative difference, and the share of rows with another top token."""
    difference = norm = flips = rows = 0.0
    for a, b in zip(logits, expected):
        a, b = a.float(), b.float()
        difference += (a - b).square().sum().double()
        norm += b.square().sum().double()
        flips += (a.argmax(-1) != b.argmax(-1)).sum()
        rows += len(a)
    return float((difference / norm).sqrt()), float(flips / rows)


@torch.no_grad()
def prefill_logits(model, tokens):
    return model(tokens).logits[0].split(512)


def bf16_noise(model, tokens, expected) -> tuple[float, float]:
    """How far two of Transformers' own implementations are apart: grouped_mm and eager."""
    model.set_experts_implementation("eager")
    noise = compare(prefill_logits(model, tokens), expected)
    model.set_experts_implementation("grouped_mm")
    return noise


def check_logits(case: str, found: tuple[float, float], noise: tuple[float, float]) -> None:
    """Three times the noise, and two flips in a hundred: a batch of 1 has only 65 rows to count."""
    (error, flips), (error_noise, flips_noise) = found, noise
    if not (error <= 3 * error_noise and flips <= 3 * flips_noise + 0.02):
        raise SystemExit(
            f"{case}: logits differ by {error:.2g} and in {flips:.1%} of the top tokens, where Transformers' own "
            f"implementations differ by {error_noise:.2g} and in {flips_noise:.1%}: nothing is timed"
        )


# --- cases ------------------------------------------------------------------------------------------------------------


def run_case(models, phase, mode, batch, noise, progress) -> dict:
    """Milliseconds until the first token, or of a decoding step: the best of three rounds, the models taking turns.

    A round gives the median of its steps: each call of `generate` makes a new static cache, so that the graphs of its
    first steps may be recorded anew. The run before the rounds compiles, warms up and is compared.
    """
    prompt_length, new_tokens = (PREFILL, 1) if phase == "prefill" else (PROMPT, 1 + NEW_TOKENS)
    tokens = random_tokens(batch, prompt_length + new_tokens, models["stock"].config.vocab_size)
    case = {"phase": phase, "mode": mode, "batch": batch, "tokens": prompt_length}
    torch.compiler.reset()  # or a second batch size would be compiled with a symbolic shape
    for name, model in models.items():
        progress.set_description(f"{phase} {mode} batch {batch} {name}")
        seconds, logits = generate(model, tokens, prompt_length, mode, progress)
        if mode == "static":
            case[f"{name}_compile_s"] = sum(seconds[1:4])  # compile, warm up, record
        if name == "stock":
            expected = logits
            continue
        found = compare(logits, expected)
        check_logits(f"{phase} {mode} batch {batch} {name}", found, noise)
        if name == "use_kernels":
            case["relative_error"], case["top1_agreement"] = found[0], 1 - found[1]
            case["stock_relative_error"], case["stock_top1_agreement"] = noise[0], 1 - noise[1]
    del expected, logits
    return case | time_rounds(models, phase, mode, tokens, prompt_length, progress)


def time_rounds(models, phase, mode, tokens, prompt_length, progress) -> dict[str, float]:
    rounds = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            seconds, _ = generate(model, tokens, prompt_length, mode, progress)
            rounds[name].append(1e3 * (seconds[0] if phase == "prefill" else statistics.median(seconds[1:])))
    return {f"{name}_ms": min(times) for name, times in rounds.items()}


def key(case: dict) -> tuple:
    return case["phase"], case["mode"], case["batch"]


def earlier_cases(out: Path, head: dict) -> dict[tuple, dict]:
    """Those in the file, if they were measured on the same card and with the same versions; their commit if another."""
    if not out.exists():
        return {}
    result = json.loads(out.read_text())
    cases = result.pop("cases")
    if result | {"date": head["date"], "commit": head["commit"]} != head:
        return {}
    if result["commit"] != head["commit"]:
        cases = [{"commit": result["commit"]} | case for case in cases]
    return {key(case): case for case in cases}


def row(case: dict) -> str:
    stock = min(case[f"{name}_ms"] for name in ("stock", "grouped_mm") if f"{name}_ms" in case)
    ours = case["use_kernels_ms"]
    tokens = case["batch"] * (case["tokens"] if case["phase"] == "prefill" else 1)
    return (
        f"{case['phase']:8} {case['mode']:7} {case['batch']:5} {case['stock_ms']:10.2f} {stock:10.2f} {ours:10.2f}"
        f" {1e3 * tokens / stock:10.0f} {1e3 * tokens / ours:10.0f} {stock / ours:8.2f}x"
    )


def prefill_noise(models) -> tuple[float, float]:
    """How far Transformers' own implementations are apart, with which ours has to keep up before anything is timed."""
    tokens = random_tokens(1, PREFILL, models["stock"].config.vocab_size)
    expected = prefill_logits(models["stock"], tokens)
    noise = bf16_noise(models["stock"], tokens, expected)
    check_logits("prefill", compare(prefill_logits(models["use_kernels"], tokens), expected), noise)
    return noise


def plan(models, modes, batches) -> list[tuple]:
    """(models, phase, mode, batch) of each case."""
    both = {name: models[name] for name in ("stock", "use_kernels")}
    todo = [("prefill", "eager", 1)] if "eager" in modes else []
    todo += [("decode", mode, batch) for mode in modes for batch in batches]
    # Prefill is grouped_mm anyway, and in eager calls of one token batched_mm is the faster.
    return [(both if (mode, batch) == ("eager", 1) else models, phase, mode, batch) for phase, mode, batch in todo]


def main() -> None:
    parser = argument_parser(__doc__, "benchmarks/results/<gpu>-generate.json")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64], help="sequences decoded at once")
    parser.add_argument("--modes", nargs="+", choices=("eager", "static"), default=["eager", "static"])
    parser.add_argument("--model", choices=CONFIGS, default="moonlight", help="default: %(default)s")
    args = parser.parse_args()
    if args.model != "moonlight" and args.out == parser.get_default("out"):
        args.out = args.out.with_name(args.out.name.replace("-generate", f"-{args.model}-generate"))

    kernel = staged_kernel()
    models = build_models(kernel, CONFIGS[args.model]())
    check_models(models, kernel)
    stock = models["stock"]
    parameters = sum(weight.numel() for weight in stock.parameters())
    layers = stock.config.num_hidden_layers
    head = header(transformers, model=args.model, layers=layers, parameters=parameters)
    cases = earlier_cases(args.out, head)
    noise = prefill_noise(models)
    todo = plan(models, args.modes, args.batches)
    total = sum((1 + ROUNDS) * len(m) * (2 if phase == "prefill" else 2 + NEW_TOKENS) for m, phase, *_ in todo)
    with tqdm(total=total, unit="token") as progress:
        for case_models, phase, mode, batch in todo:
            case = run_case(case_models, phase, mode, batch, noise, progress)
            cases[key(case)] = case
            write(args.out, {**head, "cases": list(cases.values())})

    print(f"{head['gpu']}, {parameters / 1e9:.1f}B parameters; Transformers' own experts differ by {noise[0]:.2g}")
    print(f"{'':22} {'milliseconds':^32} {'tokens/s':^21}")
    print(f"{'phase':8} {'mode':7} {'batch':>5} {'generate':>10} {'best stock':>10} {'ours':>10}", end="")
    print(f" {'best stock':>10} {'ours':>10} {'speed-up':>9}")
    for case in cases.values():
        print(row(case))
    print(args.out)


if __name__ == "__main__":
    main()
