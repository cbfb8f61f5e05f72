"""Tracers, modes and tensors without memory: each public function is one op to them, as good as torch's own layers."""

import functools
import subprocess
import sys
import warnings
from contextlib import nullcontext
from importlib import import_module

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import AutoModelForCausalLM

from conftest import REPO_ID, ROOT
from oracle import fp8_layer, layer, router
from tiny_models import WAYS, deepseek_v3_config, experts_of, prompt, tiny_model

SHAPE = TOKENS, EXPERTS, TOP_K, HIDDEN, INTER = 40, 4, 2, 64, 32
SLOTS = TOKENS * TOP_K

pytestmark = pytest.mark.usefixtures("one_thread")


# --- the public functions, each with all its tensors as positional arguments ------------------------------------------


def moe_experts(kernel):
    # make_fx takes no defaults.
    return lambda *args: kernel.moe_experts(*args), lambda seed, device: list(layer(*SHAPE, device=device, seed=seed))


def fp8(kernel):
    def function(x, index, top_k_weights, gate_up, down, gate_up_scale, down_scale):
        scales = {"gate_up_proj_scale": gate_up_scale, "down_proj_scale": down_scale}
        return kernel.moe_experts(x, index, top_k_weights, gate_up, down, **scales)

    return function, lambda seed, device: sum(
        map(list, fp8_layer(kernel, *SHAPE, e8m0=True, device=device, seed=seed)), []
    )


def lora(kernel, **kwargs):
    module = import_module(f"{kernel.__name__}.lora")

    def function(x, index, top_k_weights, gate_up, down, *factors):
        pairs = [(module.LoraFactors(A, B, 0.5),) for A, B in (factors[:2], factors[2:])]
        return module.moe_experts_lora(x, index, top_k_weights, gate_up, down, *pairs, **kwargs)

    def inputs(seed, device):
        args = layer(*SHAPE, device=device, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        shapes = [s for w in args[3:] for s in ((EXPERTS, 16, w.shape[2]), (EXPERTS, w.shape[1], 16))]
        return [*args, *((torch.randn(shape, generator=generator) / 8).to(device) for shape in shapes)]

    return function, inputs


def lora_with_norm(kernel):
    return lora(kernel, norm=torch.tanh)


def grouped_gemm(kernel):
    def inputs(seed, device):
        x, *_, weight, _ = layer(*SHAPE, device=device, seed=seed)
        return [x, weight, torch.tensor([0, 2, 2, 17, TOKENS - 1], dtype=torch.int32, device=device)]

    return lambda *args: kernel.grouped_gemm(*args), inputs


def topk_router(kernel):
    function = functools.partial(
        kernel.topk_router, top_k=4, num_group=3, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5
    )
    return function, lambda seed, device: router(TOKENS, 12, HIDDEN, device=device, seed=seed)


def route(kernel):
    return lambda index: tuple(kernel.route(index, EXPERTS)), lambda seed, device: [
        layer(*SHAPE, device=device, seed=seed)[1]
    ]


FUNCTIONS = [moe_experts, fp8, lora, lora_with_norm, grouped_gemm, topk_router, route]


@pytest.fixture(params=FUNCTIONS)
def case(request, kernel):
    """(function, (seed, device) -> its arguments)."""
    return request.param(kernel)


@pytest.fixture(params=[False, True], ids=["inference", "training"])
def training(request):
    with torch.set_grad_enabled(request.param):
        yield request.param


def leaves(args, training):
    return [t.requires_grad_(training and t.dtype == torch.float32) for t in args]


def outputs(result):
    return result if isinstance(result, tuple) else (result,)


def loss(result):
    return sum(t.square().sum() for t in outputs(result) if t.requires_grad)


def assert_same(got, expected):
    """Of the same values, but for the order of sums."""
    torch.testing.assert_close(outputs(got), outputs(expected), rtol=1e-4, atol=1e-4)


def assert_alike(got, expected):
    """Of the same form, on whatever device."""
    for g, e in zip(outputs(got), outputs(expected)):
        assert (g.shape, g.dtype, g.stride()) == (e.shape, e.dtype, e.stride())


# --- tracers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx(case, device, training, tracing_mode):
    function, inputs = case
    graph = make_fx(function, tracing_mode=tracing_mode)(*leaves(inputs(0, device), training))
    args = leaves(inputs(1, device), training)
    assert_same(graph(*args), function(*args))


def test_make_fx_of_forward_and_backward(case, device):
    function, inputs = case

    def gradients(*args):
        args = leaves([t.detach() for t in args], True)
        result = function(*args)
        wanted = [t for t in args if t.requires_grad]
        return torch.autograd.grad(loss(result), wanted, allow_unused=True) if wanted else ()

    graph = make_fx(gradients)(*inputs(0, device))
    args = inputs(1, device)
    for got, expected in zip(graph(*args), gradients(*args)):
        assert got is expected is None or (got - expected).norm() <= 1e-4 * expected.norm()


def test_jit_trace(case, device, training):
    """With torch's own check of the graph, which runs the function again, without gradients."""
    function, inputs = case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit's end, and of shapes that we check
        traced = torch.jit.trace(lambda *args: function(*args), tuple(leaves(inputs(0, device), training)))
    args, ours = (leaves(inputs(1, device), training) for _ in range(2))
    got, expected = traced(*args), function(*ours)
    assert_same(got, expected)
    if training and expected is not None and any(t.requires_grad for t in ours):
        loss(got).backward()
        loss(expected).backward()
        for a, b in zip(args, ours):
            assert a.grad is b.grad is None or (a.grad - b.grad).norm() <= 1e-4 * b.grad.norm()


def test_export(case, device, training):
    function, inputs = case

    class Module(torch.nn.Module):
        def forward(self, *args):
            return function(*args)

    exported = torch.export.export(Module(), tuple(leaves(inputs(0, device), training))).module()
    args = leaves(inputs(1, device), training)
    assert_same(exported(*args), function(*args))


# --- tensors without memory -------------------------------------------------------------------------------------------


def forward_and_gradients(function, args, training):
    result = function(*args)
    if training and any(t.requires_grad for t in args):
        loss(result).backward()
    return result, [t.grad for t in args]


@pytest.mark.parametrize("claimed", ["cpu", "cuda"])
def test_fake_tensors(case, training, claimed):
    """Without a GPU, too. They have the shapes, types and strides of real ones, as have their gradients."""
    if claimed == "cuda" and training and not torch.cuda.is_available():
        pytest.skip("autograd asks the driver for a stream")
    function, inputs = case
    expected, gradients = forward_and_gradients(function, leaves(inputs(0, "cpu"), training), training)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=claimed) for t in inputs(0, "cpu")]
        got, fake_gradients = forward_and_gradients(function, leaves(fakes, training), training)
    assert_alike(got, expected)
    assert all(t.device.type == claimed for t in outputs(got))
    for gradient, fake in zip(gradients, fake_gradients):
        assert gradient is fake is None or (gradient.shape, gradient.dtype) == (fake.shape, fake.dtype)


def test_meta_tensors(case, training):
    function, inputs = case
    expected, gradients = forward_and_gradients(function, leaves(inputs(0, "cpu"), training), training)
    metas = leaves([t.detach().to("meta") for t in inputs(0, "cpu")], training)
    got, meta_gradients = forward_and_gradients(function, metas, training)
    assert all(t.is_meta for t in outputs(got))
    assert_alike(got, expected)
    for gradient, meta in zip(gradients, meta_gradients):
        assert gradient is meta is None or gradient.shape == meta.shape


def test_meta_under_autocast(kernel):
    """Of a GPU or the CPU, as everything else on meta."""
    args = leaves([t.to("meta") for t in layer(*SHAPE)], True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = kernel.moe_experts(*args)
        out.sum().backward()
    assert out.dtype == torch.float32


# --- modes and subclasses ---------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


ONE_NODE = {"moe_experts": "moe_experts", "fp8": "moe_experts_fp8", "topk_router": "topk_router", "route": "route"}


@pytest.mark.parametrize("name", ONE_NODE)
def test_a_mode_sees_one_node(kernel, device, name):
    function, inputs = globals()[name](kernel)
    args = inputs(0, device)
    expected = function(*args)
    with Recorder() as recorder, torch.no_grad():
        got = function(*args)
    assert [seen.split("::")[1] for seen in recorder.names] == [ONE_NODE[name]]
    assert_same(got, expected)


def test_a_mode_sees_forward_and_backward(kernel, device):
    args = leaves(layer(*SHAPE, device=device), True)
    with Recorder() as recorder:
        kernel.moe_experts(*args).backward(args[0].detach())
    ours = [seen.split("::")[1] for seen in recorder.names if "moe_grouped_gemm" in seen]
    assert ours == ["moe_experts_training", "moe_experts_backward"]


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE], ids=str)
def test_selective_checkpoint(kernel, device, record, policy):
    """Its policy is asked about the layer as one op, and obeyed."""
    training = import_module(f"{kernel.__name__}.training")
    forward = (kernel.reference, "moe_experts_training") if device == "cpu" else (training, "_training_gpu")
    expected = leaves(layer(*SHAPE, device=device), True)
    kernel.moe_experts(*expected).sum().backward()
    args, runs = leaves(layer(*SHAPE, device=device), True), record(*forward)

    def of_op(context, op, *args, **kwargs):
        return policy if "moe_experts_training" in op.name() else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, of_op)
    checkpoint(kernel.moe_experts, *args, use_reentrant=False, context_fn=contexts).sum().backward()
    assert len(runs) == (1 if policy == CheckpointPolicy.MUST_SAVE else 2)
    for a, b in zip(args, expected):
        assert a.grad is b.grad is None or (a.grad - b.grad).norm() <= 1e-4 * b.grad.norm()


class Plain(torch.Tensor):
    """As `torch.Tensor` says of its subclasses: results are of it as well."""


class Wrapper(torch.Tensor):
    """Has no memory; around what has."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda t: t.inner, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, cls, func(*args, **kwargs))


@pytest.mark.parametrize("which", ["all", "last"])
@pytest.mark.parametrize("subclass", [Plain, Wrapper])
def test_subclasses(case, device, subclass, which):
    function, inputs = case
    args = inputs(0, device)
    expected = function(*args)

    def wrap(t):
        return t.as_subclass(Plain) if subclass is Plain else Wrapper(t)

    args = [wrap(t) if which == "all" or t is args[-1] else t for t in args]
    with torch.no_grad():
        got = outputs(function(*args))
    assert all(type(t) is subclass for t in got)
    assert_same(tuple(t.as_subclass(torch.Tensor) if subclass is Plain else t.inner for t in got), expected)


def test_parameters_are_plain(kernel, device, monkeypatch):
    """They do not make inference pay for an op."""
    x, index, top_k_weights, *weights = layer(*SHAPE, device=device)
    monkeypatch.setattr(kernel.functional, "_moe_experts_op", None)
    with torch.no_grad():
        kernel.moe_experts(x, index, top_k_weights, *map(torch.nn.Parameter, weights))


@pytest.fixture
def mesh(device):
    backend = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh(device, (1,))
    dist.destroy_process_group()


DTENSORS = {  # of each function: which argument, by what name
    moe_experts: {0: "hidden_states", 1: "top_k_index", 3: "gate_up_proj", 4: "down_proj"},
    fp8: {0: "hidden_states", 4: "down_proj", 6: "down_proj_scale"},
    lora: {0: "hidden_states", 2: "top_k_weights", 4: "down_proj", 5: "gate_up_lora", 8: "down_lora"},
    lora_with_norm: {1: "top_k_index", 3: "gate_up_proj", 6: "gate_up_lora"},
    grouped_gemm: {0: "x", 1: "weight", 2: "expert_offsets"},
    topk_router: {0: "hidden_states", 1: "weight", 2: "e_score_correction_bias"},
    route: {0: "top_k_index"},
}


@pytest.mark.parametrize("make", FUNCTIONS)
def test_dtensors_are_named(kernel, device, mesh, training, make):
    from torch.distributed.tensor import DTensor, Replicate

    function, inputs = make(kernel)
    for position, name in DTENSORS[make].items():
        args = inputs(0, device)
        args[position] = DTensor.from_local(args[position], mesh, [Replicate()], run_check=False)
        with pytest.raises(TypeError, match=rf"{name}: expected a plain tensor, got a DTensor; .* x\.to_local\(\)"):
            function(*leaves(args, training))


# --- a model ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_a_model_without_memory(kernel, no_other_kernels, kind, way):
    """As memory estimators and sharding planners run it, in training as well."""
    with FakeTensorMode(allow_non_fake_inputs=True) if kind == "fake" else nullcontext():
        model = AutoModelForCausalLM.from_config(deepseek_v3_config())
        kernel.register()
        if way == "use_kernels":
            model.set_use_kernels(True)  # before it moves: `kernelize` maps nothing on "meta"
        else:
            model.set_experts_implementation(way)
        if kind == "meta":
            model.to("meta")
        tokens = torch.zeros(2, 11, dtype=torch.long, device=model.device)
        with torch.no_grad():
            assert model(tokens).logits.shape == (2, 11, model.config.vocab_size)
        model(tokens, labels=tokens).loss.backward()
    assert all(p.grad.shape == p.shape for e in experts_of(model) for p in e.parameters())


@pytest.mark.parametrize("way", WAYS)
def test_flops_of_a_model(kernel, device, no_other_kernels, way):
    """Those of Transformers' loop over experts, whose products torch counts one by one."""
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for model in (tiny_model(device), tiny_model(device, kernel, way)):
        if not counts:
            model.set_experts_implementation("eager")
        tokens = prompt().to(device)
        with FlopCounterMode(display=False) as counter:
            model(tokens, labels=tokens).loss.backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


# --- FLOP counters ----------------------------------------------------------------------------------------------------

LAYER = 2 * SLOTS * 3 * HIDDEN * INTER
FACTORS = 2 * SLOTS * 16 * ((HIDDEN + 2 * INTER) + (INTER + HIDDEN))
GEMM = 2 * TOKENS * 2 * INTER * HIDDEN
ROUTER = 2 * TOKENS * 12 * HIDDEN
FLOPS = {  # forward, and backward for every gradient that there is
    moe_experts: (LAYER, 2 * LAYER),
    fp8: (LAYER, LAYER),
    lora: (LAYER + FACTORS, 2 * (LAYER + FACTORS)),
    lora_with_norm: (LAYER + FACTORS, 2 * (LAYER + FACTORS)),
    grouped_gemm: (GEMM, 2 * GEMM),
    topk_router: (ROUTER, 2 * ROUTER),
    route: (0, 0),
}


@pytest.mark.parametrize("make", FUNCTIONS)
@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu), "meta"])
def test_flops(kernel, training, make, where):
    from torch.utils.flop_counter import FlopCounterMode

    function, inputs = make(kernel)
    args = leaves([t.to(where) for t in inputs(0, "cpu")], training)
    with FlopCounterMode(display=False) as counter:
        forward_and_gradients(function, args, training)
    assert counter.get_total_flops() == FLOPS[make][0] + training * FLOPS[make][1]


def test_flops_of_wanted_gradients_alone(kernel, device):
    from torch.utils.flop_counter import FlopCounterMode

    args = layer(*SHAPE, device=device)
    args[0].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        kernel.moe_experts(*args).sum().backward()
    assert counter.get_total_flops() == 2 * LAYER


COUNT = """
import sys
import kernels, torch
sys.path.insert(0, sys.argv[2])
import oracle

if sys.argv[3] == "before":
    import torch.utils.flop_counter
moe = kernels.get_kernel(sys.argv[1], version=1)
assert (sys.argv[3] == "before") == ("torch.utils.flop_counter" in sys.modules)
from torch.utils.flop_counter import FlopCounterMode

args = oracle.layer(40, 4, 2, 64, 32)
for _ in range(2):
    with FlopCounterMode(display=False) as counter:
        moe.moe_experts(*args)
    print(counter.get_total_flops())
"""


@pytest.mark.parametrize("imported", ["before", "after"])
def test_flop_counter_imported_when(imported):
    """Importing it takes a third of a second, and Triton with it: the kernel waits until somebody does."""
    command = [sys.executable, "-c", COUNT, REPO_ID, ROOT / "tests", imported]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [str(LAYER)] * 2
