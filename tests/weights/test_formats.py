"""What weights/ promises about its formats."""

import importlib
import inspect
import re

import pytest
import torch

from oracle import layer

# What a format may do without: `dequantize` where there are no scales, `wgrad` where weights are frozen, the two GEMMs
# of a forward where both are a row_gemm, and that over columns in another order.
OPTIONAL = {"dequantize", "wgrad", "first_gemm", "second_gemm", "ordered_gemm"}


def test_formats_answer_the_same_questions(kernel):
    weights = vars(importlib.import_module(f"{kernel.__name__}.weights"))
    questions = re.findall(r"^(\w+) {2,}\S", weights["__doc__"], re.MULTILINE)
    assert {"check", "plan", "row_gemm", *OPTIONAL} <= set(questions)
    for question in questions:
        answers = [getattr(weights[name], question, None) for name in ("dense", "fp8", "fp4")]
        given = [answer for answer in answers if answer is not None]
        assert given and (question in OPTIONAL or len(given) == len(answers)), question
        first, *others = map(inspect.signature, given)
        assert all(other == first for other in others), question


def test_scales_of_halves_are_of_gated_experts_alone(kernel):
    """128 rows are one block; counted as gate and up apart they would be two."""
    inputs = layer(5, 3, 2, 128, 64)[:3]
    (codes, scale), down = (kernel.quantize_fp8(torch.randn(3, 128, 128)) for _ in range(2))

    def run(scale, gated):
        shared = dict(gate_up_proj_scale=scale, down_proj_scale=down[1][:, :, :1], gated=gated)
        return kernel.functional.moe_experts_lora(*inputs, codes, down[0][:, :, : 128 >> gated], (), (), **shared)

    assert run(scale, True).equal(run(scale.repeat(1, 2, 1), True))
    with pytest.raises(ValueError, match=r"gate_up_proj_scale: expected \(3, 1, 1\), got \(3, 2, 1\)"):
        run(scale.repeat(1, 2, 1), False)
