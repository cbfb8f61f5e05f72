"""The layer with shared experts, as experts/ops.py has it for a CPU and, marked gpu, for a GPU."""

from importlib import import_module

import pytest
import torch

from cases import covering
from oracle import DTYPES, assert_as_good_as_torch, fp4_layer, fp8_layer, in_fp64, layer, shared_weights, variant_of


@pytest.fixture
def forward(kernel, device):
    """(inputs, weights, shared, gate, biases, scales) -> (T, H)."""
    ops = import_module(f"{kernel.__name__}.experts.ops")
    Projection = import_module(f"{kernel.__name__}.weights").Projection
    on_device = ops.forward_on_cpu if device == "cpu" else ops.forward_on_gpu

    def forward(inputs, weights, shared, gate=None, biases=(None, None), scales=(None, None), quantize=False):
        projections = map(Projection, weights, biases, scales)
        return on_device(*inputs, *projections, gate or kernel.reference.Gate(), quantize, shared)

    return forward


ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_pytorch_tanh": torch.nn.GELU(approximate="tanh"),
    "relu": torch.relu,
}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_oracle_is_the_equation(kernel, activation, gated):
    x, index, weights, *experts = layer(5, 4, 3, 32, 16, torch.float64)
    shared = shared_weights(32, 24, torch.float64, gated=gated)
    act_fn, (gate_proj, up_proj, down_proj, gate_weight) = ACTIVATIONS[activation], shared
    expected = kernel.reference.moe_experts(x, index, weights, *experts, activation)
    for t in range(5):
        y = down_proj @ (act_fn(gate_proj @ x[t]) * (up_proj @ x[t]))
        expected[t] += y if gate_weight is None else y / (1 + torch.exp(-gate_weight @ x[t]))
    options = {"activation": activation, "shared": kernel.reference.SharedExperts(*shared)}
    torch.testing.assert_close(kernel.reference.moe_experts(x, index, weights, *experts, **options), expected)


CASES = [  # T, E, top_k, ids
    pytest.param(1, 16, 2, "sentinels", id="decode"),
    pytest.param(2, 64, 8, "distinct", id="decode-of-two"),
    pytest.param(60, 8, 2, "sentinels", id="small-tiles"),
    pytest.param(300, 4, 1, "sentinels", id="one-slot-a-token"),
    pytest.param(600, 4, 2, "any", id="tall-tiles"),
]


@pytest.mark.parametrize(
    "tokens, experts, top_k, ids, hidden_dim, inter, shared_inter, gated, dtype",
    covering(CASES, [pytest.param(64, 40, 80, id="64-40-80"), pytest.param(97, 47, 33, id="97-47-33")], [0, 1], DTYPES),
)
def test_matches_oracle(
    kernel, device, forward, tokens, experts, top_k, ids, hidden_dim, inter, shared_inter, gated, dtype
):
    args = layer(tokens, experts, top_k, hidden_dim, inter, dtype, device, ids)
    shared = shared_weights(hidden_dim, shared_inter, dtype, device, gated, margin=8)
    SharedExperts, moe_experts = kernel.reference.SharedExperts, kernel.reference.moe_experts
    out = forward(args[:3], args[3:], SharedExperts(*shared))
    exact = moe_experts(*in_fp64(args), shared=SharedExperts(*in_fp64(shared)))
    assert_as_good_as_torch(out, moe_experts(*args, shared=SharedExperts(*shared)), exact)


@pytest.mark.parametrize("tokens", [1, 60])
def test_of_variants_and_codes(kernel, device, forward, tokens):
    """What the routed experts are changes nothing for the shared ones."""
    sizes = (tokens, 8, 2, 128, 64, torch.bfloat16, device, "sentinels")
    shared = kernel.reference.SharedExperts(*shared_weights(128, 40, torch.bfloat16, device))
    args, kwargs = variant_of("interleaved", layer(*sizes))
    gate = kernel.reference.Gate(kwargs["activation"], interleaved=True)
    layers = [(args[:3], args[3:], gate, [kwargs["gate_up_proj_bias"], kwargs["down_proj_bias"]])]
    for make in (fp8_layer, fp4_layer):
        inputs, weights, scales = make(kernel, *sizes)
        layers.append((inputs, weights, None, (None, None), scales))
    for inputs, weights, gate, *others in layers:
        out = forward(inputs, weights, shared, gate, *others)
        of_shared = shared.of(inputs[0], gate or kernel.reference.Gate())
        expected = forward(inputs, weights, None, gate, *others).float() + of_shared.float()
        error = (out.float() - expected).abs().max() / expected.abs().max()
        assert error <= 2 * torch.finfo(torch.bfloat16).eps and of_shared.abs().max() > 0.1


def test_under_autocast_in_the_dtype_of_its_tensors(kernel, device, forward):
    args = layer(9, 4, 2, 64, 32, device=device)
    shared = kernel.reference.SharedExperts(*shared_weights(64, 40, device=device))
    expected = forward(args[:3], args[3:], shared)
    with torch.autocast(device, torch.bfloat16):
        assert forward(args[:3], args[3:], shared).equal(expected)
