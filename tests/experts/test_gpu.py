"""What only a GPU can show; skipped without one."""

from importlib import import_module

import pytest
import torch

from oracle import layer, router, shared_weights, variant_of

pytestmark = pytest.mark.gpu


def test_true_deepseek_v3_dimensions(kernel):
    # 2 * 256 * 2048 * 7168 weight elements: offsets pass 2**31, and so do those of the routed rows at T = 40000.
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB")
    E, H, I = 256, 7168, 2048
    gate_up_proj = torch.empty(E, 2 * I, H, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)
    down_proj = torch.empty(E, H, I, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)
    for tokens in (1, 33, 40000):
        x = torch.randn(tokens, H, dtype=torch.bfloat16, device="cuda")
        index = torch.rand(tokens, E, device="cuda").topk(8)[1]
        index[-1] = torch.arange(E - 8, E)
        weights = torch.rand(tokens, 8, device="cuda")
        out = kernel.moe_experts(x, index, weights, gate_up_proj, down_proj)
        some = torch.tensor([0, tokens // 2, tokens - 1], device="cuda")
        expected = kernel.reference.moe_experts(x[some], index[some], weights[some], gate_up_proj, down_proj)
        error = (out[some].float() - expected.float()).norm(dim=1) / expected.float().norm(dim=1)
        assert error.max() < 1e-2


@pytest.mark.parametrize("tokens", [1, 40, 600])
def test_graph_replays_with_new_inputs(kernel, tokens):
    static = layer(tokens, 16, 4, 128, 64, torch.bfloat16, "cuda", "sentinels")
    kernel.moe_experts(*static)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel.moe_experts(*static)
    for seed, ids in ((1, "any"), (2, "one"), (3, "sentinels")):
        fresh = layer(tokens, 16, 4, 128, 64, torch.bfloat16, "cuda", ids, seed)
        for old, new in zip(static, fresh):
            old.copy_(new)
        graph.replay()
        assert torch.equal(out, kernel.moe_experts(*fresh))


@pytest.mark.parametrize("tokens", [1, 600])
def test_forward_never_waits_for_the_host(kernel, tokens):
    args = layer(tokens, 16, 4, 128, 64, torch.bfloat16, "cuda", "sentinels")
    expected = kernel.moe_experts(*args)
    # Not before: NaN-filling torch.empty is part of the suite, not of the forward.
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = kernel.moe_experts(*args)
        routing = kernel.route(args[1], 16)
        kernel.grouped_gemm(args[0].repeat(4, 1), args[3], routing.expert_offsets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out, expected)


@pytest.mark.parametrize("variant", ["gpt-oss", "openai-privacy-filter", "aria"])
@pytest.mark.parametrize("tokens", [1, 40, 600])
def test_variants_in_a_graph_without_waiting(kernel, tokens, variant):
    static, kwargs = variant_of(variant, layer(tokens, 16, 4, 128, 64, torch.bfloat16, "cuda", "sentinels"))
    kernel.moe_experts(*static, **kwargs)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # a host sync would raise
        out = kernel.moe_experts(*static, **kwargs)
    for seed in (1, 2):
        fresh, _ = variant_of(variant, layer(tokens, 16, 4, 128, 64, torch.bfloat16, "cuda", "any", seed))
        for old, new in zip(static, fresh):
            old.copy_(new)
        graph.replay()
        assert torch.equal(out, kernel.moe_experts(*fresh, **kwargs))


@pytest.mark.parametrize("tokens", [1, 600])
def test_transposed_weights_are_never_copied(kernel, tokens):
    """Neither forward nor backward; gradients take the memory that they need."""
    args, kwargs = variant_of("gpt-oss", layer(tokens, 32, 2, 512, 512, torch.bfloat16, "cuda"))
    leaves = [t.requires_grad_() if t.is_floating_point() and t.ndim == 2 else t for t in args]
    kernel.moe_experts(*leaves, **kwargs).sum().backward()  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kernel.moe_experts(*leaves, **kwargs).sum().backward()
    # Rows of 32 experts padded to 64 take as much as down_proj; a copy of either weight would be more.
    assert torch.cuda.max_memory_allocated() - before < args[3].numel() * 2


def launches(function):
    """Names of the kernels and copies that a call brings to the GPU."""
    function()
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            function()
            torch.cuda.synchronize()
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


def test_routing_takes_at_most_three_launches(kernel):
    index = layer(4096, 256, 8, 1, 1, device="cuda")[1]
    names = launches(lambda: kernel.route(index, 256))
    assert 1 <= len(names) <= 3, names


@pytest.mark.parametrize("tokens", [1, 64, 4096])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
def test_router_takes_at_most_two_launches(kernel, tokens, requires_grad):
    x, weight, bias = router(tokens, 256, 1024, torch.bfloat16, device="cuda")
    x.requires_grad_(requires_grad)
    names = launches(lambda: kernel.topk_router(x, weight, bias, 8, 8, 4, True, 2.5))
    assert 1 <= len(names) <= 2, names


@pytest.mark.parametrize("gated", [False, True])
def test_decode_with_shared_experts_takes_two_launches(kernel, gated):
    ops, weights = (import_module(f"{kernel.__name__}.{name}") for name in ("experts.ops", "weights"))
    *inputs, gate_up, down = layer(2, 64, 8, 128, 64, torch.bfloat16, "cuda")
    shared = kernel.reference.SharedExperts(*shared_weights(128, 96, torch.bfloat16, "cuda", gated))
    projections = [weights.Projection(w) for w in (gate_up, down)]
    names = launches(lambda: ops.forward_on_gpu(*inputs, *projections, kernel.reference.Gate(), False, shared))
    assert len(names) == 2, names


@pytest.mark.parametrize("tokens", [1, 64, 600])
def test_router_in_a_graph_without_waiting(kernel, tokens):
    args = (8, 8, 4, True, 2.5)
    static = router(tokens, 256, 1024, torch.bfloat16, device="cuda")
    kernel.topk_router(*static, *args)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # a host sync would raise
        results = kernel.topk_router(*static, *args)
    for seed in (1, 2):
        for old, new in zip(static, router(tokens, 256, 1024, torch.bfloat16, device="cuda", seed=seed)):
            old.copy_(new)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, kernel.topk_router(*static, *args)))


def test_two_streams_do_not_disturb_each_other(kernel):
    cases = [layer(tokens, 16, 4, 256, 128, torch.bfloat16, "cuda", seed=tokens) for tokens in (64, 700)]
    expected = [kernel.moe_experts(*args) for args in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    outs = [[], []]
    for _ in range(20):
        for stream, args, out in zip(streams, cases, outs):
            with torch.cuda.stream(stream):
                out.append(kernel.moe_experts(*args))
    torch.cuda.synchronize()
    for out, e in zip(outs, expected):
        assert all(torch.equal(o, e) for o in out)


def test_tensors_may_be_on_a_device_that_is_not_current(kernel):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    args = layer(40, 8, 2, 64, 32, torch.bfloat16, "cuda:1")
    out = kernel.moe_experts(*args)
    assert out.device == torch.device("cuda:1")
    torch.testing.assert_close(out, kernel.reference.moe_experts(*args), rtol=2e-2, atol=2e-2)


def test_mixed_devices_are_named(kernel):
    x, *rest = layer(5, 4, 2, 64, 32)
    with pytest.raises(ValueError, match="gate_up_proj: expected on cuda:0 like hidden_states, got cpu"):
        kernel.moe_experts(x.cuda(), *rest)
