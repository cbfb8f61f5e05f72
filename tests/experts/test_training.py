"""What training wraps around the layer: `moe_experts` alone, then a DeepSeek-V3 that runs on this kernel."""

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState
from torch._functorch import config as functorch_config
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from oracle import layer
from suite import COMPILE_BACKENDS
from tiny_models import WAYS, prompt, tiny_model
from two_processes import run_two_processes

pytestmark = pytest.mark.usefixtures("one_thread", "no_other_kernels")


def compiled(function, device):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend=COMPILE_BACKENDS[device])


# --- moe_experts ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["eager", "compiled"])
def experts(request, kernel, device):
    """`moe_experts`. On the CPU only the compiled one runs the op and its own backward; on a GPU both do."""
    return kernel.moe_experts if request.param == "eager" else compiled(kernel.moe_experts, device)


def leaves(*args, **kwargs):
    """`oracle.layer`, every float a leaf: (hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj)."""
    return [t.requires_grad_() if t.is_floating_point() else t for t in layer(*args, **kwargs)]


def floats(args):
    return [t for t in args if t.is_floating_point()]


def test_gradcheck_of_the_op(kernel):
    """test_moe_experts.py checks autograd through the reference; this is the op with its explicit backward."""
    args = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in layer(6, 3, 2, 8, 4)]
    assert torch.autograd.gradcheck(compiled(kernel.moe_experts, "cpu"), args)


def test_one_weight_used_twice(experts, device):
    """The gradient of a shared weight is the sum of those of two copies."""
    x, *routing, gate_up_proj, down_proj = leaves(33, 4, 2, 64, 32, device=device)
    shared = experts(experts(x, *routing, gate_up_proj, down_proj), *routing, gate_up_proj, down_proj)
    copies = [w.detach().clone().requires_grad_() for w in (gate_up_proj, down_proj)]
    unshared = experts(experts(x, *routing, gate_up_proj, down_proj), *routing, *copies)

    got = torch.autograd.grad(shared.square().sum(), [gate_up_proj, down_proj])
    *first, second_gate_up, second_down = torch.autograd.grad(
        unshared.square().sum(), [gate_up_proj, down_proj, *copies]
    )
    torch.testing.assert_close(got, (first[0] + second_gate_up, first[1] + second_down))


def test_retain_graph(experts, device):
    args = leaves(33, 4, 2, 64, 32, device=device)
    # A compiled function may give its buffers away, and then refuses retain_graph itself.
    with functorch_config.patch(donated_buffer=False):
        loss = experts(*args).square().sum()
    first = torch.autograd.grad(loss, floats(args), retain_graph=True)
    second = torch.autograd.grad(loss, floats(args))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, floats(args))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(experts, device, use_reentrant):
    args = leaves(33, 4, 2, 64, 32, device=device)
    experts(*args).square().sum().backward()
    expected = [t.grad for t in floats(args)]
    for t in floats(args):
        t.grad = None
    checkpoint(experts, *args, use_reentrant=use_reentrant).square().sum().backward()
    assert all(torch.equal(t.grad, grad) for t, grad in zip(floats(args), expected))


@pytest.mark.parametrize("tokens", [3, 700])
def test_results_without_gradients(kernel, device, tokens):
    """The first pass of reentrant checkpointing. On a GPU few rows, and on a CPU all, then sum in another order."""
    args = leaves(tokens, 16, 2, 256, 128, torch.bfloat16, device=device)
    expected = kernel.moe_experts(*args)
    with torch.no_grad():
        got = kernel.moe_experts(*args)
    if device == "cuda" and tokens == 700:
        assert torch.equal(got, expected)
    assert (got - expected).float().norm() <= 4 * torch.finfo(torch.bfloat16).eps * expected.float().norm()


def test_non_leaf_weights(kernel, experts, device):
    """As LoRA makes them: the weight itself gets no gradient, what it was made of does."""
    x, *routing, gate_up_proj, down_proj = layer(33, 4, 2, 64, 32, device=device)
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(4, *shape, generator=generator).to(device).requires_grad_() for shape in ((4, 64), (64, 4)))

    def grads(function):
        weight = torch.baddbmm(gate_up_proj, b, a, alpha=0.1)
        return torch.autograd.grad(function(x, *routing, weight, down_proj).square().sum(), [a, b])

    torch.testing.assert_close(grads(experts), grads(kernel.reference.moe_experts), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("inside", [True, False], ids=["whole-step", "backward-only"])
def test_autocast(kernel, experts, device, inside):
    """Gradients of fp32 leaves are fp32, also if autocast covers a backward whose forward it did not."""
    args = leaves(33, 4, 2, 64, 32, device=device)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=inside):
        out = experts(*args)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = torch.autograd.grad(out.float().square().sum(), floats(args))
    expected = torch.autograd.grad(kernel.reference.moe_experts(*args).square().sum(), floats(args))
    for grad, exact in zip(got, expected):
        assert grad.dtype == torch.float32
        assert (grad - exact).norm() <= 0.02 * exact.norm()


# What is not supported


def test_second_derivatives(experts, device, request):
    """The eager CPU path is plain torch, which has them."""
    args = leaves(9, 4, 2, 16, 8, device=device)
    (dx,) = torch.autograd.grad(experts(*args).square().sum(), args[0], create_graph=True)
    if device == "cpu" and "eager" in request.node.callspec.id:
        assert torch.autograd.grad(dx.square().sum(), args[3])[0].any()
    else:
        # torch says it before us for whatever it has compiled.
        with pytest.raises((NotImplementedError, RuntimeError), match="second derivatives|double backward"):
            torch.autograd.grad(dx.square().sum(), args[3])


def test_second_derivatives_of_the_op(kernel, device, monkeypatch):
    """What a GPU runs in eager mode, on either device."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    args = leaves(9, 4, 2, 16, 8, device=device)
    (dx,) = torch.autograd.grad(kernel.moe_experts(*args).square().sum(), args[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="moe_experts_backward cannot be .* second derivatives are not"):
        torch.autograd.grad(dx.square().sum(), args[3])


def test_second_derivatives_of_grouped_gemm(kernel, device):
    x, weight = torch.randn(6, 8, device=device).requires_grad_(), torch.randn(2, 4, 8, device=device).requires_grad_()
    offsets = torch.tensor([0, 4, 6], dtype=torch.int32, device=device)
    loss = kernel.grouped_gemm(x, weight, offsets).square().sum()
    (dweight,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="grouped_gemm_dw cannot be .* second derivatives are not supported"):
        torch.autograd.grad(dweight.square().sum(), x)


def dual(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


TRANSFORMS = {
    "grad": lambda function, x: torch.func.grad(lambda x: function(x).sum())(x),
    "vjp": lambda function, x: torch.func.vjp(function, x),
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (x,)),
    "jacrev": lambda function, x: torch.func.jacrev(function)(x),
    "vmap": lambda function, x: torch.func.vmap(function)(x[None]),
    "forward_ad": dual,
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_are_refused(kernel, device, transform):
    x, index, *rest = layer(9, 4, 2, 16, 8, device=device)
    offsets = torch.tensor([0, 3, 3, 9, 9], dtype=torch.int32, device=device)
    functions = {
        "moe_experts": lambda x: kernel.moe_experts(x, index, *rest),
        "moe_experts_lora": lambda x: kernel.functional.moe_experts_lora(x, index, *rest, (), ()),
        "grouped_gemm": lambda x: kernel.grouped_gemm(x, rest[1], offsets),
        "topk_router": lambda x: kernel.topk_router(x, rest[1][:, 0], rest[1][:, 0, 0], 2, 1, 1, True, 1.0)[1],
    }
    for name, function in functions.items():
        with pytest.raises(NotImplementedError, match=rf"{name}: torch.func transforms .* are not supported"):
            transform(function, x)


def test_transforms_are_refused_in_a_graph(kernel, device):
    x, *rest = layer(9, 4, 2, 16, 8, device=device)
    gradient = torch.func.grad(lambda x: kernel.moe_experts(x, *rest).sum())
    with pytest.raises(torch._dynamo.exc.Unsupported, match="moe_experts: torch.func transforms"):
        compiled(gradient, device)(x)


# --- a model ----------------------------------------------------------------------------------------------------------


def loss_of(model):
    tokens = prompt().to(model.device)
    return model(tokens, labels=tokens, use_cache=False).loss


def gradients(model, loss=loss_of):
    model.zero_grad()
    loss(model).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_bits(got, expected):
    assert got.keys() == expected.keys()
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []


@pytest.fixture(params=WAYS)
def model(request, kernel, device):
    return tiny_model(device, kernel, request.param).train()


@pytest.fixture
def stock(device):
    return tiny_model(device).train()


def test_two_steps_give_the_same_bits(model):
    assert_same_bits(gradients(model), gradients(model))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(model, stock, use_reentrant):
    expected = gradients(stock)
    plain = gradients(model)
    torch.testing.assert_close(plain, expected, rtol=1e-3, atol=1e-5)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert_same_bits(gradients(model), plain)


def distance(gradients, exact):
    return sum((gradients[name] - exact[name]).square().sum() for name in exact).sqrt()


def test_autocast_of_a_model(model, stock):
    """fp32 gradients, no further from those of an fp32 step than twice what stock's are."""
    for of_model in (model, stock):  # the same experts for every token: no rounding may choose others
        for name, bias in of_model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                bias.copy_(10 * torch.arange(len(bias)))
    device = model.device.type
    exact = gradients(stock)
    with torch.autocast(device, dtype=torch.bfloat16):
        got, from_stock = gradients(model), gradients(stock)
    assert {grad.dtype for grad in got.values()} == {torch.float32}
    assert distance(got, exact) <= 2 * distance(from_stock, exact)


@pytest.mark.long  # with inductor, on a GPU
def test_compiled_step(model, stock):
    """Forward and backward of the whole model, one graph."""
    graph = compiled(model, model.device.type)
    got = gradients(model, loss=lambda _: loss_of(graph))
    torch.testing.assert_close(got, gradients(stock), rtol=1e-3, atol=1e-5)


@pytest.fixture(params=["no", "bf16"])
def accelerator(request, device):
    AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(cpu=device == "cpu", mixed_precision=request.param)
    AcceleratorState._reset_state(reset_partial_state=True)


def one_step(model, optimizer, backward):
    optimizer.zero_grad()
    loss = loss_of(model)
    backward(loss)
    optimizer.step()
    return loss.detach()


def test_accelerate(model, stock, accelerator):
    """prepare() and a step, against a plain step of the stock model."""
    expected_loss = one_step(stock, torch.optim.SGD(stock.parameters(), lr=0.1), torch.Tensor.backward)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    loss = one_step(prepared, optimizer, accelerator.backward)
    tolerance = 1e-4 if accelerator.mixed_precision == "no" else 0.05
    torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=tolerance)
    state, expected = (dict(m.named_parameters()) for m in (accelerator.unwrap_model(prepared), stock))
    torch.testing.assert_close(state, expected, rtol=tolerance, atol=tolerance)


def test_fully_sharded(two_devices, tmp_path):
    """A step of two processes equals that of one: see fsdp_worker.py."""
    run_two_processes("fsdp_worker.py", two_devices, tmp_path / "rendezvous")
