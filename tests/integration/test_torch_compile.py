"""torch.compile: one graph for any number of tokens, and `generate` with a static cache, which compiles by itself."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig

from cases import covering
from moe_models import with_the_numbers_of
from oracle import layer
from suite import COMPILE_BACKENDS
from tiny_models import NUM_MOE_LAYERS, WAYS, prompt, tiny_model

NUMBERS = [
    # Not first a number that some other dimension has: dynamo would take the two for one.
    pytest.param((7, 2, 64, 300), id="any-number"),
    pytest.param((1,), id="one"),  # which dynamo takes for a constant
]

pytestmark = pytest.mark.usefixtures("no_other_kernels")


TRAINING = [pytest.param(False, id="inference"), pytest.param(True, id="training")]


@pytest.fixture
def backend(device, request):
    """Counts its graphs; inductor on a GPU, unless the test names another."""
    torch.compiler.reset()
    yield CompileCounterWithBackend(getattr(request, "param", COMPILE_BACKENDS[device]))
    torch.compiler.reset()


def run(function, inputs, training):
    """The output; in training also the gradients of all inputs and, of a module, of all parameters."""
    if not training:
        with torch.no_grad():
            return [function(*inputs)]
    inputs = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
    parameters = list(function.parameters()) if isinstance(function, torch.nn.Module) else []
    wanted = [x for x in (*inputs, *parameters) if x.requires_grad]
    out = function(*inputs)
    return [out, *torch.autograd.grad(out.square().sum(), wanted)]


def assert_one_graph(function, inputs, numbers, backend, training):
    """Compiled once for all these numbers of tokens.

    Dynamo itself starts the router over, to make its scaling factor a constant: that is no recompilation.
    """
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    once = None
    for tokens in numbers:
        got, expected = (run(f, inputs(tokens), training) for f in (compiled, function))
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
        once = once or backend.frame_count
        assert backend.frame_count == once <= 2, f"T = {tokens}"


@pytest.mark.parametrize("numbers, training", covering(NUMBERS, TRAINING))
def test_moe_experts_compiles_once(kernel, device, backend, numbers, training):
    def inputs(tokens):
        return layer(tokens, 16, 4, 64, 32, device=device)

    assert_one_graph(kernel.moe_experts, inputs, numbers, backend, training)


# How often dynamo traces is the same under every backend; of a whole block inductor takes a minute on a GPU.
@pytest.mark.parametrize("backend", ["aot_eager"], indirect=True)
@pytest.mark.parametrize("numbers, training, way", covering(NUMBERS, TRAINING, [*WAYS, "fp4"]))
def test_moe_layer_compiles_once(kernel, device, backend, numbers, training, way):
    """Router, experts and shared experts of a model, each way in."""
    moe = tiny_model(device, kernel, way).train(training).model.layers[-1].mlp

    def inputs(tokens):
        generator = torch.Generator().manual_seed(tokens)
        return [torch.randn(1, tokens, 64, generator=generator).to(device)]

    assert_one_graph(moe, inputs, numbers, backend, training)


GENERATE = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("way", [*WAYS, "fp4"])
def test_generate_with_a_static_cache(kernel, way):
    """On a CPU `generate` compiles only if told to, without CUDA graphs."""
    torch.compiler.reset()
    model = tiny_model("cpu", kernel, way)
    expected = with_the_numbers_of(model, tiny_model("cpu")).generate(prompt(), **GENERATE)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_config = CompileConfig(fullgraph=True, backend=backend, mode="default")
    compile_config._compile_all_devices = True
    for _ in range(2):
        out = model.generate(prompt(), cache_implementation="static", compile_config=compile_config, **GENERATE)
        assert torch.equal(out, expected)
    (graph,) = graphs
    ops = [node.target for node in graph.graph.nodes]
    assert ops.count(kernel.functional.ops.moe_experts._opoverload) == NUM_MOE_LAYERS


@pytest.mark.gpu
@pytest.mark.long
@pytest.mark.parametrize("way", [*WAYS, "fp4"])
def test_generate_compiles_by_itself(kernel, monkeypatch, way):
    """Inductor and CUDA graphs, as `generate` chooses: the tokens are those of the stock model in eager mode."""
    torch.compiler.reset()
    # NaN-filling torch.empty is part of the suite, not of the model.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    tokens = prompt().cuda()
    model = tiny_model("cuda", kernel, way)
    expected = with_the_numbers_of(model, tiny_model("cuda")).generate(tokens, **GENERATE)
    calls = []
    ops = kernel.functional.ops
    forward = ops.forward_on_gpu

    def recording_forward(hidden_states, *rest):
        calls.append(hidden_states.shape[0])
        return forward(hidden_states, *rest)

    monkeypatch.setattr(ops, "forward_on_gpu", recording_forward)
    for _ in range(2):
        assert torch.equal(model.generate(tokens, cache_implementation="static", **GENERATE), expected)
    assert calls.count(tokens.numel()) == 2 * NUM_MOE_LAYERS  # prefill, never compiled
    # Decoding calls us to warm up and to record graphs; when one is replayed it launches the kernels without us.
    steps = 2 * (GENERATE["max_new_tokens"] - 1)
    assert 0 < calls.count(tokens.shape[0]) < steps * NUM_MOE_LAYERS
