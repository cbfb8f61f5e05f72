"""A gradient that nobody defines, as a downstream autograd.Function leaves it: no gradients, as torch's own layers."""

from importlib import import_module

import pytest
import torch

from oracle import fp8_layer, layer, router

SHAPE = 9, 4, 2, 64, 32


class Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def module(kernel, name):
    return import_module(f"{kernel.__name__}.{name}")


def leaves(tensors):
    return [t.requires_grad_() if t.dtype in (torch.float32, torch.bfloat16) else t for t in tensors]


def factors(kernel, *weights, dtype):
    """One adapter of each weight (E, N, K), with leaves."""
    generator = torch.Generator().manual_seed(1)
    shapes = [((w.shape[0], 4, w.shape[2]), (w.shape[0], w.shape[1], 4)) for w in weights]
    pairs = [[torch.randn(s, generator=generator).to(weights[0].device, dtype) for s in pair] for pair in shapes]
    return [(module(kernel, "functional").LoraFactors(*leaves(pair), 0.5),) for pair in pairs]


def linear(kernel, device):
    x, weight, _ = leaves(router(9, 12, 16, device=device))
    return torch.nn.functional.linear(x, weight), [x, weight]


def moe_experts(kernel, device):
    args = leaves(layer(*SHAPE, device=device))
    return kernel.moe_experts(*args), args


def biases(kernel, device):
    args = leaves(layer(*SHAPE, device=device))
    of = leaves([torch.ones(weight.shape[:2], device=device) for weight in args[3:]])
    return kernel.moe_experts(*args, "silu", *of), [*args, *of]


def fp8(kernel, device):
    inputs, weights, scales = fp8_layer(kernel, *SHAPE, device=device)
    args = leaves(inputs)
    scales = dict(zip(("gate_up_proj_scale", "down_proj_scale"), scales))
    return kernel.moe_experts(*args, *weights, **scales), args


def lora(kernel, device, **kwargs):
    args = leaves(layer(*SHAPE, device=device))
    of = factors(kernel, *args[3:], dtype=torch.float32)
    out = module(kernel, "functional").moe_experts_lora(*args, *of, **kwargs)
    return out, [*args, *(t for (f,) in of for t in f[:2])]


def lora_with_norm(kernel, device):
    return lora(kernel, device, norm=torch.tanh)


def lora_over_fp8(kernel, device):
    inputs, weights, scales = fp8_layer(kernel, *SHAPE, device=device)
    args, of = leaves(inputs), factors(kernel, *weights, dtype=torch.float32)
    scales = dict(zip(("gate_up_proj_scale", "down_proj_scale"), scales))
    out = module(kernel, "functional").moe_experts_lora(*args, *weights, *of, **scales)
    return out, [*args, *(t for (f,) in of for t in f[:2])]


def grouped_gemm(kernel, device):
    x, _, _, weight, _ = leaves(layer(*SHAPE, device=device))
    offsets = torch.tensor([0, 2, 2, 7, 8], dtype=torch.int32, device=device)
    (bias,) = leaves([torch.ones(weight.shape[:2], device=device)])
    return kernel.grouped_gemm(x, weight, offsets, bias), [x, weight, bias]


def router_logits(kernel, device, which=0):
    x, weight, bias = router(9, 12, 16, device=device)
    args = leaves([x, weight])
    return kernel.topk_router(*args, bias, 4, 3, 2, True, 2.5)[which], args


def router_weights(kernel, device):
    return router_logits(kernel, device, 1)


FUNCTIONS = [
    *(linear, moe_experts, biases, fp8, lora, lora_with_norm, lora_over_fp8),
    *(grouped_gemm, router_logits, router_weights),
]


@pytest.mark.parametrize("as_op", [False, True], ids=["eager", "op"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_gradients(kernel, device, monkeypatch, function, as_op):
    if as_op:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    out, inputs = function(kernel, device)
    elsewhere = torch.ones((), device=device, requires_grad=True)
    (Block.apply(out).sum() + elsewhere).backward()
    assert elsewhere.grad == 1
    assert out.requires_grad and all(t.grad is None for t in inputs)


def test_no_second_gradients(kernel, device, monkeypatch):
    """Not even the error that there are none."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    out, (x, *_) = moe_experts(kernel, device)
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    elsewhere = torch.ones((), device=device, requires_grad=True)
    (Block.apply(dx).sum() + elsewhere).backward()
    assert x.grad is None


@pytest.mark.parametrize("defined", [0, 1], ids=["logits", "weights"])
def test_router_with_one_gradient_undefined(kernel, device, monkeypatch, defined):
    """Is that of the other output alone."""
    grads = []
    for as_op, block in ((False, False), (True, True)):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda as_op=as_op: as_op)
        x, weight, bias = router(9, 12, 16, device=device)
        results = kernel.topk_router(*leaves([x, weight]), bias, 4, 3, 2, True, 2.5)
        loss = results[defined].square().sum()
        if block:
            loss = loss + Block.apply(results[1 - defined]).sum()
        grads.append(torch.autograd.grad(loss, (x, weight)))
    torch.testing.assert_close(*grads)
