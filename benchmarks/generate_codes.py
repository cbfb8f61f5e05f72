#!/usr/bin/env python3
"""Times decoding of a whole model with its experts in bf16, in fp8 and in 4 bits, all on this kernel.

    python benchmarks/generate_codes.py      # on a GPU: the table, and docs/measurements/<gpu>-generate-codes.json

The 16B model of generate.py, or on a CPU a small one, to see that the script runs; static cache, compiled. Everything
but the experts' weights is the same, in the same memory. Tokens are forced, so that all models see the same. Random
weights lose more in few bits than a trained model's; logits are compared all the same, and a model that is further off
than codes are is not timed.
"""

from __future__ import annotations

import torch
import transformers
from torch import nn
from tqdm import tqdm

from common import argument_parser, header, staged_kernel, write
from generate import (
    DEVICE,
    NEW_TOKENS,
    PROMPT,
    ROUNDS,
    compare,
    deepseek_config,
    generate,
    qwen3_config,
    random_model,
    random_tokens,
    sharing,
    time_rounds,
)

MOST_DIFFERENCE = {"fp8": 0.3, "fp4": 0.8}


def in_codes(kernel, model, quantize, **attributes):
    """A model that shares all but its experts' weights, which are quantised one after another."""
    model = sharing(model)
    for module in model.modules():
        if not kernel.integration.modules.is_experts(module):
            continue
        for name in ("gate_up_proj", "down_proj"):
            codes, scale = quantize(getattr(module, name).detach())
            setattr(module, name, nn.Parameter(codes, requires_grad=False))
            module.register_parameter(f"{name}_scale_inv", nn.Parameter(scale, requires_grad=False))
        for name, value in attributes.items():
            setattr(module, name, value)
    return model


@torch.no_grad()
def build_models(kernel) -> dict[str, nn.Module]:
    kernel.register()
    bf16 = random_model(deepseek_config() if DEVICE == "cuda" else qwen3_config())
    models = {
        "bf16": bf16,
        # As FP8Experts has them.
        "fp8": in_codes(kernel, bf16, kernel.quantize_fp8, block_size=(128, 128), activation_scheme="dynamic"),
        "fp4": in_codes(kernel, bf16, kernel.quantize_fp4),
    }
    for name, model in models.items():
        model.set_use_kernels(True)
        served = {line for path, line in kernel.status(model).items() if path.endswith(".experts")}
        if served != {"moe_grouped_gemm"}:
            raise SystemExit(f"{name}: {', '.join(sorted(served))}: nothing is timed")
    return models


def run_case(models, mode, batch, progress) -> dict:
    """One model after another: what torch.compile has to check before a step grows with the models it has compiled."""
    tokens = random_tokens(batch, PROMPT + 1 + NEW_TOKENS, models["bf16"].config.vocab_size)
    case = {"mode": mode, "batch": batch, "tokens": PROMPT}
    for name, model in models.items():
        progress.set_description(f"{mode} batch {batch} {name}")
        torch.compiler.reset()
        _, logits = generate(model, tokens, PROMPT, mode, progress)
        if name == "bf16":
            expected = logits
        else:
            case[f"{name}_relative_difference"] = difference = compare(logits, expected)[0]
            if not difference < MOST_DIFFERENCE[name]:
                raise SystemExit(
                    f"batch {batch}: logits of {name} differ from bf16's by {difference:.2g}: nothing is timed"
                )
        case |= time_rounds({name: model}, "decode", mode, tokens, PROMPT, progress)
    return case


def main() -> None:
    parser = argument_parser(__doc__, "docs/measurements/<gpu>-generate-codes.json")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--modes", nargs="+", choices=("eager", "static"), default=["static"])
    args = parser.parse_args()

    kernel = staged_kernel()
    models = build_models(kernel)
    layers = models["bf16"].config.num_hidden_layers
    parameters = sum(weight.numel() for weight in models["bf16"].parameters())
    sizes = {f"{name}_bytes": sum(p.nbytes for p in model.parameters()) for name, model in models.items()}
    result = header(transformers, layers=layers, parameters=parameters, **sizes, cases=[])
    todo = [(mode, batch) for mode in args.modes for batch in args.batches]
    with tqdm(total=len(todo) * (1 + ROUNDS) * len(models) * (2 + NEW_TOKENS), unit="token") as progress:
        for mode, batch in todo:
            result["cases"].append(run_case(models, mode, batch, progress))
            write(args.out, result)

    print(f"{result['gpu']}, {parameters / 1e9:.1f}B parameters on {DEVICE}; tokens per second of decoding")
    print(f"{'mode':7} {'batch':>5}", *(f"{name:>9}" for name in models))
    for case in result["cases"]:
        rates = (1e3 * case["batch"] / case[f"{name}_ms"] for name in models)
        print(f"{case['mode']:7} {case['batch']:5}", *(f"{rate:9.0f}" for rate in rates))
    print(args.out)


if __name__ == "__main__":
    main()
