"""The two ops of LoRA against the layer composed of grouped GEMMs, in fp64; see test_kernels.py."""

from importlib import import_module

import pytest
import torch
import torch._dynamo.testing

from flat import KINDS, ByKind
from interpreted import DEVICE, DTYPES, INTERPRETED, on_triton, under_the_interpreter
from low_rank import SCALINGS, adapters
from oracle import VARIANTS, assert_as_good_as_torch, gate_of, in_fp64, layer, variant_of

test_under_the_interpreter = under_the_interpreter(__file__)


F16, F32 = DTYPES
CASES = [  # T, E, top_k, H, I, ids, ranks for gate_up, ranks for down, variant, dtype, TMA
    pytest.param(20, 2, 2, 72, 40, "any", [16], [16], None, F16, True, id="r-16"),
    pytest.param(20, 2, 2, 40, 24, "any", [16], [16], None, F32, False, id="r-16-fp32"),
    pytest.param(20, 3, 2, 41, 23, "sentinels", [3], [3], None, F16, False, id="r-3-odd-sizes"),
    pytest.param(10, 2, 2, 40, 24, "any", [3, 16], [], None, F32, True, id="gate_up-alone-two-adapters"),
    pytest.param(10, 2, 2, 40, 24, "any", [], [3], None, F32, False, id="down-alone"),
    pytest.param(35, 2, 2, 32, 16, "one", [3], [70], None, F32, True, id="expert-without-rows-and-rank-of-two-tiles"),
    pytest.param(20, 3, 1, 32, 16, "sentinels", [16], [3], None, F32, False, id="one-slot-a-token"),
    # fp32: what a limit cuts off is not a matter of rounding.
    pytest.param(15, 3, 2, 72, 40, "sentinels", [16], [3], "gpt-oss", F32, True, id="gpt-oss"),
    pytest.param(15, 3, 2, 40, 24, "sentinels", [3], [16], "openai-privacy-filter", F32, False, id="biases-and-limit"),
]
CASE = "tokens, experts, top_k, hidden_dim, inter, ids, up_ranks, down_ranks, variant, dtype, use_tma"


@pytest.fixture(scope="module")
def lora(kernel):
    return import_module(f"{kernel.__name__}.experts.lora")


def arguments(lora, args, kwargs, up_ranks, down_ranks):
    """Of the op, but for the gate: inputs, biases or None, joined factors or None."""
    factors = []
    for weight, ranks, seed in ((args[3], up_ranks, 1), (args[4], down_ranks, 2)):
        ts = list(adapters(weight, ranks, seed))
        each = [lora.LoraFactors(A, B.permute(2, 0, 1), s) for A, B, s in zip(ts[::2], ts[1::2], SCALINGS)]
        projection = lora.Projection(weight)
        factors += lora.adapted("lora", projection, each, weight.dtype, lora.RANK_MULTIPLE)[3:]
    return [*args, kwargs.get("gate_up_proj_bias"), kwargs.get("down_proj_bias"), *factors]


def gradients(function, inputs, dout):
    """Result and gradients of the float inputs; None in the place of what is not there."""
    inputs = [t if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    out = function(*inputs)
    grads = iter(torch.autograd.grad(out, [t for t in inputs if t is not None and t.requires_grad], dout.to(out)))
    return [out.detach(), *(None if t is None else next(grads) for t in (inputs[0], *inputs[2:]))]


def composed(kernel, gate):
    """The layer composed of grouped GEMMs, as a function of the op's arguments."""
    functional = kernel.functional

    def function(*inputs):
        factors = [() if A is None else (functional.LoraFactors(A, B, 1.0),) for A, B in (inputs[7:9], inputs[9:])]
        return functional.moe_experts_lora(*inputs[:5], *factors, gate, *inputs[5:7])

    return function


def layer_of(kernel, lora, tokens, experts, top_k, hidden_dim, inter, ids, up_ranks, down_ranks, variant, dtype):
    args = layer(tokens, experts, top_k, hidden_dim, inter, dtype, DEVICE, ids)
    args[2][(args[1] < 0) | (args[1] >= experts)] = float("nan")
    args, kwargs = variant_of(variant, args) if variant in VARIANTS else (args, {})
    dout = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    return arguments(lora, args, kwargs, up_ranks, down_ranks), dout, gate_of(kernel.reference, kwargs)


@on_triton
@pytest.mark.parametrize(CASE, CASES)
def test_gradients(
    kernel,
    lora,
    path_with_adapters,
    tokens,
    experts,
    top_k,
    hidden_dim,
    inter,
    ids,
    up_ranks,
    down_ranks,
    variant,
    dtype,
    use_tma,
):
    case = (tokens, experts, top_k, hidden_dim, inter, ids, up_ranks, down_ranks, variant)
    inputs, dout, gate = layer_of(kernel, lora, *case, dtype)
    path, needs_grad = path_with_adapters(use_tma), [t is not None for t in (inputs[0], *inputs[2:])]
    out, *saved = path.training(*inputs, *gate)
    results = [out, *path.backward(dout, inputs[0], *inputs[2:], *saved, needs_grad, *gate)]
    on_cpu = [t if t is None else t.cpu() for t in inputs]
    torch_results = gradients(composed(kernel, gate), on_cpu, dout.cpu())
    exact = gradients(composed(kernel, gate), in_fp64(on_cpu), dout.cpu())
    for name, got, of_torch, e in zip(("out", *KINDS), results, torch_results, exact):
        if e is None:
            assert got.numel() == 0
            continue
        try:
            assert_as_good_as_torch(got.cpu(), of_torch, e, dtype)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@on_triton
def test_only_what_is_needed(kernel, lora, path_with_adapters):
    """One gradient alone is what it is among all, bit by bit."""
    inputs, dout, gate = layer_of(kernel, lora, 6, 1, 2, 16, 16, "sentinels", [3], [3], "gpt-oss", torch.float32)
    path = path_with_adapters()
    _, *saved = path.training(*inputs, *gate)
    args = (dout, inputs[0], *inputs[2:], *saved)
    together = path.backward(*args, [True] * 10, *gate)
    for needed in range(10):
        alone = path.backward(*args, [i == needed for i in range(10)], *gate)
        for i in range(10):
            assert torch.equal(alone[i], together[i]) if i == needed else alone[i].numel() == 0


@on_triton
def test_row_sums_skip_padding_rows(launch):
    """What lies before the first token and its weight is read for no row."""
    index = torch.tensor([[1, 0], [1, 7], [1, 0]], device=DEVICE)
    dout, weights = torch.full((4, 16), float("nan"), device=DEVICE), torch.full((4, 2), 1e9, device=DEVICE)
    dout[1:], weights[1:] = torch.arange(1.0, 4.0, device=DEVICE)[:, None], 1.0
    offsets, slots, _ = launch.pad(*launch.route(index, 2, 16)[:2])
    sums = launch.row_sums(dout[1:], slots, offsets, weights[1:])
    assert sums.tolist() == [[4.0] * 16, [6.0] * 16]


@on_triton
@pytest.mark.parametrize("tokens, up_ranks, down_ranks", [(10, [3], [17]), (10, [], [3]), (0, [3], [3])])
def test_fakes_are_of_the_results(kernel, lora, path_with_adapters, tokens, up_ranks, down_ranks):
    case = (tokens, 2, 2, 16, 16, "any", up_ranks, down_ranks, "gpt-oss")
    inputs, dout, gate = layer_of(kernel, lora, *case, torch.float32)
    path = path_with_adapters()

    def meta(tensors):
        return [None if t is None else t.to("meta") for t in tensors]

    def layouts(tensors):
        return [(t.shape, t.stride(), t.dtype) for t in tensors]

    outputs = path.training(*inputs, *gate)
    assert layouts(path.training_fake(*meta(inputs), *gate)) == layouts(outputs)
    args = [dout, inputs[0], *inputs[2:], *outputs[1:]]
    for needs_grad in ([t is not None for t in args[1:11]], [False] * 10):
        fakes = path.backward_fake(*meta(args), needs_grad, *gate)
        assert layouts(fakes) == layouts(path.backward(*args, needs_grad, *gate))


@pytest.mark.skipif(INTERPRETED, reason="torch.compile does not work beside the interpreter")
def test_compiles_once_for_all_numbers_of_tokens(kernel, lora):
    """On "meta", where the fakes stand in for the kernels."""
    ops = import_module(f"{kernel.__name__}.experts.ops")
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=graphs, dynamic=True)
    def step(*inputs):
        x, index, *others = inputs
        return ops.moe_experts_training(x, index, *ByKind(ops, 10).flat(others), *kernel.reference.Gate())[0]

    counts = set()
    for tokens in (100, 37, 1000):
        args = arguments(lora, layer(tokens, 4, 2, 64, 32, torch.bfloat16), {}, [3], [16])
        inputs = [t if t is None else t.to("meta") for t in args]
        out, *grads = gradients(step, inputs, inputs[0])
        assert out.shape == inputs[0].shape
        assert [g if g is None else g.shape for g in grads] == [
            t if t is None else t.shape for t in inputs[:1] + inputs[2:]
        ]
        counts.add(graphs.frame_count)  # 2 from the start: dynamo starts over to make alpha a constant
    assert len(counts) == 1


@pytest.fixture
def on_gpu(lora):
    """Arguments of the op that are large enough for the kernels of full training."""
    return arguments(lora, layer(500, 4, 2, 256, 128, torch.bfloat16, "cuda"), {}, [3], [16])


@pytest.mark.gpu
def test_saves_what_it_says(kernel, lora, on_gpu):
    """gate and up of the padded rows, the low-rank products and the routing: no row of H or I values."""
    saved = []

    def pack(t):
        if all(t.data_ptr() != i.data_ptr() for i in on_gpu if i is not None):
            saved.append(t)
        return t

    on_gpu[0].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = composed(kernel, kernel.reference.Gate())(*on_gpu)
    assert out.requires_grad
    rows = (500 * 2 // 64 + 4) * 64
    factors = sum(t.numel() for t in on_gpu[7:])  # joined anew
    limit = 2 * rows * (2 * 128 + 2 * 16) + 4 * (4 + 1 + rows + 500 * 2) + 2 * factors
    assert sum(t.numel() * t.element_size() for t in saved) <= limit


@pytest.mark.gpu
def test_compiled_equals_eager(kernel, lora, on_gpu):
    function = composed(kernel, kernel.reference.Gate())
    dout = torch.ones_like(on_gpu[0])
    compiled = gradients(torch.compile(function, fullgraph=True), on_gpu, dout)
    torch.testing.assert_close(compiled, gradients(function, on_gpu, dout))
