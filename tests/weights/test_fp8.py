"""`moe_experts` over fp8 weights, against fp64."""

from importlib import import_module

import pytest
import torch

from cases import in_turn
from oracle import error, fp8_layer, fp8_weights_in_fp64, in_fp64, round_to_fp8, w8a8

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [  # T, E, top_k, H, I, ids, form of the scales
    pytest.param(0, 4, 2, 128, 128, "distinct", {}, id="no-tokens"),
    pytest.param(1, 64, 8, 256, 128, "distinct", {}, id="decode"),
    pytest.param(1, 4, 1, 97, 47, "distinct", {"e8m0": True}, id="decode-tails-e8m0"),
    pytest.param(3, 100, 5, 272, 208, "sentinels", {}, id="decode-blocks-across-gate-and-up"),
    pytest.param(3, 100, 5, 272, 176, "sentinels", {"split": True}, id="decode-split-scales"),
    pytest.param(33, 4, 1, 256, 384, "distinct", {"e8m0": True}, id="top_k-1-e8m0"),
    pytest.param(100, 7, 2, 97, 47, "any", {}, id="tails-everywhere"),
    pytest.param(60, 9, 3, 272, 208, "zipf", {"e8m0": True}, id="blocks-across-gate-and-up-e8m0"),
    pytest.param(60, 9, 3, 272, 176, "zipf", {"split": True}, id="split-scales"),
    pytest.param(300, 5, 3, 256, 128, "one", {}, id="all-on-one-expert"),
    pytest.param(300, 7, 6, 128, 64, "sentinels", {"split": True, "e8m0": True}, id="sentinels-split-e8m0-scales"),
    pytest.param(500, 4, 4, 128, 256, "distinct", {}, id="every-expert-sees-every-token"),
]
CASE = "tokens, experts, top_k, hidden_dim, inter, ids, form"


def run(kernel, inputs, weights, scales, **options):
    return kernel.moe_experts(*inputs, *weights, gate_up_proj_scale=scales[0], down_proj_scale=scales[1], **options)


def oracle(kernel, inputs, weights, scales, quantized):
    """The exact result, and the error that is allowed.

    quantized: whether activations may be, on a GPU: half as much again as exact sums of fp8 products would be off.
    """
    exact_weights = fp8_weights_in_fp64(weights, scales)
    exact = kernel.reference.moe_experts(*in_fp64(inputs), *exact_weights)
    rounding = 2 * torch.finfo(inputs[0].dtype).eps + 2e-6
    if not quantized or inputs[0].device.type == "cpu":
        return exact, rounding
    return exact, max(1.5 * error(w8a8(inputs, exact_weights, round_to_fp8), exact), rounding)


@pytest.mark.parametrize(f"{CASE}, dtype", in_turn(CASES))
def test_outputs(kernel, device, tokens, experts, top_k, hidden_dim, inter, ids, form, dtype):
    args = (tokens, experts, top_k, hidden_dim, inter, dtype, device, ids)
    inputs, weights, scales = fp8_layer(kernel, *args, **form)
    for quantize_activations in (False, True):
        exact, allowed = oracle(kernel, inputs, weights, scales, quantize_activations)
        out = run(kernel, inputs, weights, scales, quantize_activations=quantize_activations)
        assert out.dtype == dtype and out.shape == exact.shape
        assert error(out, exact) <= allowed
        assert torch.equal(out, run(kernel, inputs, weights, scales, quantize_activations=quantize_activations))


@pytest.mark.parametrize("kind", ["outliers", "zeros", "tiny", "huge"])
def test_activations_of_any_size(kernel, device, kind):
    (x, *routed), weights, scales = fp8_layer(kernel, 80, 4, 2, 384, 256, torch.bfloat16, device, "sentinels")
    if kind == "outliers":
        x[:, torch.tensor([3, 130, 377], device=device)] *= 100
    elif kind == "zeros":
        x[::2], x[:, 128:256] = 0, 0
    elif kind == "tiny":
        x *= 1e-37
        x[::3] *= 1e-3
    else:
        x *= 1e15
    exact, allowed = oracle(kernel, (x, *routed), weights, scales, True)
    out = run(kernel, (x, *routed), weights, scales)
    assert out.isfinite().all()
    if kind == "tiny":  # the result is less than any bf16
        assert out.abs().max() < 1e-36
    else:
        assert error(out, exact) <= allowed


def test_strides(kernel, device):
    (x, index, top_k_weights), weights, scales = fp8_layer(kernel, 40, 4, 2, 256, 128, torch.bfloat16, device)
    exact, allowed = oracle(kernel, (x, index, top_k_weights), weights, scales, True)

    def strided(t):
        return t.mT.contiguous().mT

    for inputs in (
        ((strided(x), strided(index), strided(top_k_weights)), weights, scales),
        ((x, index, top_k_weights), weights, [strided(s) for s in scales]),
        ((x, index, top_k_weights), [strided(w) for w in weights], scales),
    ):
        # Not bit by bit: a CPU's GEMM sums other layouts in another order.
        assert error(run(kernel, *inputs), exact) <= allowed


@pytest.mark.parametrize("wanted", ["nothing", "hidden_states", "top_k_weights"])
@pytest.mark.parametrize("as_op", [False, True], ids=["eager", "op"])
def test_activations_that_require_gradients_are_not_quantised(kernel, monkeypatch, as_op, wanted):
    """Under no_grad neither: so the first pass of reentrant checkpointing computes what the second does."""
    ops = import_module(f"{kernel.__name__}.experts.ops")
    (x, index, top_k_weights), weights, scales = fp8_layer(kernel, 4, 4, 2, 64, 32)
    x.requires_grad_(wanted == "hidden_states")
    top_k_weights.requires_grad_(wanted == "top_k_weights")
    forward = "moe_experts" if as_op else "forward_on_cpu"
    quantized = []
    original = getattr(ops, forward)

    def spy(*args):
        quantized.append(args[-1])
        return original(*args)

    spy._opoverload = getattr(original, "_opoverload", None)
    monkeypatch.setattr(ops, forward, spy)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: as_op)
    with torch.no_grad():
        run(kernel, (x, index, top_k_weights), weights, scales)
    assert quantized == [wanted == "nothing"]


# --- errors -----------------------------------------------------------------------------------------------------------


def test_bad_input_is_named(kernel):
    inputs, (gate_up_proj, down_proj), (up_scale, down_scale) = fp8_layer(kernel, 4, 4, 2, 256, 192)

    def call(gate_up_proj=gate_up_proj, down_proj=down_proj, up_scale=up_scale, down_scale=down_scale, **options):
        return run(kernel, inputs, (gate_up_proj, down_proj), (up_scale, down_scale), **options)

    for kind, message, changes in [
        (ValueError, r"block_size: expected \(128, 128\), got \(1, 32\)", {"block_size": (1, 32)}),
        (ValueError, "down_proj_scale: expected a scale for each block.*got None", {"down_scale": None}),
        (TypeError, "gate_up_proj: expected torch.float8_e4m3fn", {"gate_up_proj": gate_up_proj.to(torch.float8_e5m2)}),
        (TypeError, "down_proj: expected torch.float8_e4m3fn", {"down_proj": down_proj.float()}),
        (TypeError, "down_proj_scale: expected torch.float32 or", {"down_scale": down_scale.half()}),
        (
            ValueError,
            r"gate_up_proj_scale: expected \(4, 3, 2\) or, with blocks of gate and up apart, \(4, 4, 2\), got",
            {"up_scale": up_scale[:, :1]},
        ),
        (ValueError, r"down_proj_scale: expected \(4, 2, 2\) to fit down_proj", {"down_scale": up_scale}),
        (ValueError, "gate_up_proj: expected on cpu like hidden_states", {"gate_up_proj": gate_up_proj.to("meta")}),
    ]:
        with pytest.raises(kind, match=message):
            call(**changes)


def test_fp8_weights_without_scales(kernel):
    inputs, weights, _ = fp8_layer(kernel, 4, 4, 2, 64, 32)
    with pytest.raises(TypeError, match="gate_up_proj: expected torch.float32 like hidden_states, got torch.float8"):
        kernel.moe_experts(*inputs, *weights)


# --- what only a GPU shows --------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("quantize_activations", [True, False])
def test_true_deepseek_v3_dimensions(kernel, quantize_activations):
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB")
    E, H, I = 256, 7168, 2048
    weights = [torch.empty(E, *shape, dtype=torch.float8_e4m3fn, device="cuda") for shape in ((2 * I, H), (H, I))]
    scales = [torch.empty(E, w.shape[1] // 128, w.shape[2] // 128, device="cuda") for w in weights]
    for w, s in zip(weights, scales):
        for expert in range(E):
            dense = torch.empty(w.shape[1:], dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)
            w[expert], s[expert] = kernel.quantize_fp8(dense)
    for tokens in (1, 33, 600, 40000):
        x = torch.randn(tokens, H, dtype=torch.bfloat16, device="cuda")
        index = torch.rand(tokens, E, device="cuda").topk(8)[1]
        index[-1] = torch.arange(E - 8, E)
        top_k_weights = torch.rand(tokens, 8, device="cuda")
        out = run(kernel, (x, index, top_k_weights), weights, scales, quantize_activations=quantize_activations)
        some = torch.tensor([0, tokens // 2, tokens - 1], device="cuda")
        expected = kernel.reference.moe_experts(
            *(t[some] for t in (x, index, top_k_weights)),
            *weights,
            gate_up_proj_scale=scales[0],
            down_proj_scale=scales[1],
        )
        difference = (out[some].float() - expected.float()).norm(dim=1) / expected.float().norm(dim=1)
        assert difference.max() < (6e-2 if quantize_activations else 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 40, 600])
def test_no_host_sync_and_graphs(kernel, tokens):
    inputs, weights, scales = fp8_layer(kernel, tokens, 16, 4, 256, 128, torch.bfloat16, "cuda", "sentinels")
    run(kernel, inputs, weights, scales)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(kernel, inputs, weights, scales)
    for seed in (1, 2):
        fresh, _, _ = fp8_layer(kernel, tokens, 16, 4, 256, 128, torch.bfloat16, "cuda", "any", seed=seed)
        for old, new in zip(inputs, fresh):
            old.copy_(new)
        graph.replay()
        assert torch.equal(out, run(kernel, inputs, weights, scales))


@pytest.mark.gpu
def test_as_on_a_gpu_without_fp8(kernel, monkeypatch):
    gpu = import_module(f"{kernel.__name__}.gpu")
    monkeypatch.setattr(gpu, "traits", lambda device: gpu.TRAITS["sm_80"])
    for tokens in (1, 40, 600):
        inputs, weights, scales = fp8_layer(kernel, tokens, 16, 4, 272, 208, torch.bfloat16, "cuda", "any")
        exact, allowed = oracle(kernel, inputs, weights, scales, False)
        assert error(run(kernel, inputs, weights, scales), exact) < allowed
