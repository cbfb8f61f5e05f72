"""Tracers and tensors without memory: each public function is to them what torch's own layers are."""

import warnings
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoModelForCausalLM

from oracle import layer
from public_functions import SHAPE, assert_alike, assert_same, forward_and_gradients, leaves, loss, outputs
from tiny_models import WAYS, deepseek_v3_config, experts_of

pytestmark = pytest.mark.usefixtures("one_thread")


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
