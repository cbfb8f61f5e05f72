"""The public functions with all their tensors as positional arguments, and how results of two calls are compared.

Each of FUNCTIONS takes the kernel and returns the function and (seed, device) -> its arguments.
"""

import functools
from importlib import import_module

import torch

from oracle import fp8_layer, layer, router

SHAPE = TOKENS, EXPERTS, TOP_K, HIDDEN, INTER = 40, 4, 2, 64, 32
SLOTS = TOKENS * TOP_K


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
    module = import_module(f"{kernel.__name__}.functional")

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


def forward_and_gradients(function, args, training):
    result = function(*args)
    if training and any(t.requires_grad for t in args):
        loss(result).backward()
    return result, [t.grad for t in args]
