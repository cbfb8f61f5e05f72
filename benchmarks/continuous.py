#!/usr/bin/env python3
"""Times continuous batching, `generate_batch`, of requests of mixed length: stock Transformers and this kernel.

    python benchmarks/continuous.py      # on a GPU: the table, and docs/measurements/<gpu>-continuous.json

Half the layers of Qwen3-30B-A3B with random weights, or on a CPU a small model, to see that the script runs.
(DeepSeek-V3's attention has keys and values of different sizes, which Transformers' paged cache refuses.) Both models
share their weights, take turns, and have to agree in most first tokens before anything is written. What
`generate_batch` does before the first request, CUDA graphs among it, is not timed.
"""

from __future__ import annotations

import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig

from common import argument_parser, header, staged_kernel, write
from generate import DEVICE, build_models, qwen3_config

REQUESTS, SHORTEST, LONGEST, NEW_TOKENS = (64, 16, 384, 64) if DEVICE == "cuda" else (3, 4, 20, 4)
ROUNDS = 1 if DEVICE == "cuda" else 0  # after one that compiles
# Attention is PyTorch's, which needs a mask of the tokens of a step by those in the cache: by default gigabytes of it.
BATCH_TOKENS = 1024


def requests(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (REQUESTS,), generator=generator).tolist()
    return [torch.randint(2, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def run(model, prompts) -> tuple[float, list[list[int]]]:
    """Seconds from the first request's start to the last one's end, and the new tokens of each."""
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    page = ContinuousBatchingConfig().page_size
    blocks = sum(-(-(len(prompt) + NEW_TOKENS) // page) for prompt in prompts) + 1
    batching = ContinuousBatchingConfig(max_batch_tokens=BATCH_TOKENS, num_blocks=blocks)
    outputs = model.generate_batch(inputs=prompts, generation_config=config, continuous_batching_config=batching)
    outputs = list(outputs.values())
    starts, ends = zip(*(output.lifespan for output in outputs))
    seconds, tokens = max(ends) - min(starts), [output.generated_tokens for output in outputs]
    if len(outputs) != len(prompts) or any(len(of_one) != NEW_TOKENS for of_one in tokens):
        raise SystemExit("a request ended early: nothing is reported")
    return seconds, tokens


def main() -> None:
    args = argument_parser(__doc__, "docs/measurements/<gpu>-continuous.json").parse_args()
    kernel = staged_kernel()
    config = qwen3_config()
    if DEVICE == "cuda":
        config.num_hidden_layers = 24
    models = build_models(kernel, config)
    del models["grouped_mm"]  # here stock is that: nothing changes it while it decodes
    prompts = requests(models["stock"].config.vocab_size)
    times, first = {name: [] for name in models}, {}
    for _ in range(1 + ROUNDS):
        for name, model in models.items():
            seconds, tokens = run(model, prompts)
            times[name].append(seconds)
            first[name] = [of_one[0] for of_one in tokens]
    same = sum(a == b for a, b in zip(*first.values())) / len(prompts)
    if not same >= 0.8:
        raise SystemExit(f"{1 - same:.0%} of the first tokens differ: nothing is reported")
    sizes = {"layers": config.num_hidden_layers, "requests": REQUESTS, "prompt_tokens": sum(map(len, prompts))}
    sizes |= {"new_tokens": NEW_TOKENS, "batch_tokens": BATCH_TOKENS}
    result = header(transformers, **sizes, same_first_tokens=same)
    best = {name: min(of_one[1:] or of_one) for name, of_one in times.items()}
    result |= {f"{name}_s": seconds for name, seconds in best.items()}
    write(args.out, result)
    print(f"{result['gpu']}: {REQUESTS} requests, {result['prompt_tokens']} tokens in, {REQUESTS * NEW_TOKENS} out")
    for name, seconds in best.items():
        print(f"{name:12} {seconds:8.2f} s {REQUESTS * NEW_TOKENS / seconds:8.0f} tokens/s")
    print(args.out)


if __name__ == "__main__":
    main()
