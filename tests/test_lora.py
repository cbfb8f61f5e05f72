"""Adapters as factors against merged weights: `moe_experts_lora` itself, and stock PEFT on models that we serve."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import accelerate
import peft
import pytest
import torch
from kernels import use_kernel_mapping
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, KernelConfig
from transformers.monkey_patching import clear_patch_mapping
from transformers.utils import kernel_config as kernel_config_module

from oracle import DTYPES, assert_as_good_as_torch, in_fp64, layer
from tiny_models import NUM_MOE_LAYERS, experts_of, prompt, save_deepseek_v3

GATE_UP, DOWN = TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
WAYS = [
    pytest.param({"use_kernels": True}, id="use_kernels"),
    pytest.param({"experts_implementation": "moe_grouped_gemm"}, id="experts_implementation"),
]
BY_NAME = WAYS[1].values[0]


# moe_experts_lora

CASES = [  # T, E, top_k, H, I, ids, ranks for gate_up, ranks for down
    pytest.param(0, 4, 2, 64, 32, "distinct", [4], [4], id="no-tokens"),
    pytest.param(7, 4, 0, 64, 32, "distinct", [4], [4], id="top_k-0"),
    pytest.param(1, 64, 8, 64, 32, "distinct", [16], [16], id="decode"),
    pytest.param(100, 7, 2, 97, 47, "any", [3], [5], id="tails-and-duplicate-ids"),
    pytest.param(100, 8, 2, 64, 32, "zipf", [16, 3], [8, 1, 2], id="several-adapters"),
    pytest.param(100, 8, 2, 64, 32, "distinct", [4], [], id="gate_up-alone"),
    pytest.param(100, 8, 2, 64, 32, "distinct", [], [4], id="down-alone"),
    pytest.param(300, 5, 3, 64, 32, "one", [16], [16], id="all-on-one-expert"),
    pytest.param(300, 7, 6, 97, 47, "sentinels", [3, 16], [16], id="sentinels"),
]
CASE = "tokens, experts, top_k, hidden_dim, inter, ids, up_ranks, down_ranks"


@pytest.fixture(scope="module")
def lora(kernel):
    return import_module(f"{kernel.__name__}.lora")


def adapters(weight, ranks, seed):
    """In turn A (E, R, K) and B (N, R, E), each pair about as large as the weight; B lies as PEFT's does."""
    generator = torch.Generator().manual_seed(seed)
    experts, rows, columns = weight.shape
    for rank in ranks:
        yield torch.randn(experts, rank, columns, generator=generator).to(weight) / columns**0.5
        yield torch.randn(rows, rank, experts, generator=generator).to(weight) / rank**0.5


SCALINGS = [0.7, 2.0, -1.3]


def low_rank(lora, args, up, down):
    factors = [
        tuple(lora.LoraFactors(A, B.permute(2, 0, 1), s) for A, B, s in zip(ts[::2], ts[1::2], SCALINGS))
        for ts in (up, down)
    ]
    return lora.moe_experts_lora(*args, *factors)


def merged(reference, args, up, down):
    *inputs, gate_up_proj, down_proj = args
    for A, B, scaling in zip(up[::2], up[1::2], SCALINGS):
        gate_up_proj = gate_up_proj + scaling * B.permute(2, 0, 1) @ A
    for A, B, scaling in zip(down[::2], down[1::2], SCALINGS):
        down_proj = down_proj + scaling * B.permute(2, 0, 1) @ A
    return reference.moe_experts(*inputs, gate_up_proj, down_proj)


def results(function, args, up, down, dout):
    """The output and every gradient."""
    args, up, down = ([t.detach().requires_grad_(t.is_floating_point()) for t in ts] for ts in (args, up, down))
    out = function(args, up, down)
    floats = [t for t in (*args, *up, *down) if t.requires_grad]
    return [out, *torch.autograd.grad(out, floats, dout.to(out))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(CASE, CASES)
def test_matches_merged_weights(
    kernel, lora, device, tokens, experts, top_k, hidden_dim, inter, ids, up_ranks, down_ranks, dtype
):
    args = layer(tokens, experts, top_k, hidden_dim, inter, dtype, device, ids)
    up, down = list(adapters(args[3], up_ranks, 1)), list(adapters(args[4], down_ranks, 2))
    dout = layer(tokens, experts, top_k, hidden_dim, inter, dtype, device, ids, seed=3)[0]

    def merge(*tensors):
        return merged(kernel.reference, *tensors)

    exact = results(merge, *map(in_fp64, (args, up, down)), dout)
    got = results(lambda *tensors: low_rank(lora, *tensors), args, up, down, dout)
    for g, t, e in zip(got, results(merge, args, up, down, dout), exact):
        assert_as_good_as_torch(g, t, e)
    again = results(lambda *tensors: low_rank(lora, *tensors), args, up, down, dout)
    assert all(map(torch.equal, got, again))


def test_skipped_slots_contribute_nothing(lora, device):
    """Neither to the output nor to a gradient, though token, weight and gradient of the output are NaN."""
    args = list(layer(20, 4, 2, 64, 32, device=device))
    up, down = list(adapters(args[3], [3], 1)), list(adapters(args[4], [3], 2))
    dout = torch.ones_like(args[0])

    def run(skipped):
        inputs = [t[skipped:] for t in args[:3]]
        return results(lambda *ts: low_rank(lora, *ts), [*inputs, *args[3:]], up, down, dout[skipped:])

    expected = run(4)
    args[1][:4] = torch.tensor([-1, 4])
    args[0][:4] = args[2][:4] = dout[:4] = float("nan")
    out, dx, dweights, *others = run(0)
    assert not out[:4].any() and not dx[:4].any() and not dweights[:4].any()
    for g, e in zip((out[4:], dx[4:], dweights[4:], *others), expected):
        torch.testing.assert_close(g, e)


def test_bad_input_is_named(lora):
    args = layer(5, 4, 2, 64, 32)
    with pytest.raises(ValueError, match="down_proj: expected"):
        low_rank(lora, [*args[:4], args[4][:2]], [], [])


# Stock PEFT


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads on such small matrices wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("deepseek-v3")
    save_deepseek_v3(path)
    return path


@pytest.fixture(autouse=True)
def registered(kernel, monkeypatch):
    """Ours alone: neither Transformers' kernels nor what a test before has registered."""
    monkeypatch.setattr("transformers.integrations.hub_kernels._KERNEL_MAPPING_CACHE", {})
    with use_kernel_mapping({}, inherit_mapping=False):
        kernel.register()
        yield


@pytest.fixture
def calls(lora, monkeypatch):
    """The arguments of every call of `moe_experts_lora`: what proves that an adapter is computed here."""
    calls = []
    moe_experts_lora = lora.moe_experts_lora
    monkeypatch.setattr(lora, "moe_experts_lora", lambda *args: calls.append(args) or moe_experts_lora(*args))
    return calls


def load(path, dtype=torch.float32, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **kwargs)


def config(**options):
    return LoraConfig(**{"target_parameters": TARGETS, "r": 3, "lora_alpha": 6, **options})


def adapted(model, **configs):
    """`model` with these adapters, all of them random: PEFT's B = 0 would hide every error."""
    configs = configs or {"default": config()}
    for name, options in configs.items():
        if isinstance(model, PeftModel):
            model.add_adapter(name, options)
        else:
            model = get_peft_model(model, options, adapter_name=name)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) / 8).to(parameter.dtype)
    return model


@torch.no_grad()
def logits(model):
    return model(prompt()).logits


def gradients(model):
    """Of A and B, in the order of their names; nothing else has any."""
    model.zero_grad()
    model(prompt()).logits.square().mean().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert grads and all("lora_" in name for name in grads)
    return grads


def assert_equal(ours, stock, calls, expected_calls=NUM_MOE_LAYERS):
    """Outputs and, where an adapter may learn, gradients."""
    expected = logits(stock)
    assert not calls
    torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == expected_calls
    if any(parameter.requires_grad for parameter in stock.parameters()):
        expected = gradients(stock)
        grads = gradients(ours)
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            scale = expected[name].abs().max()
            assert scale > 1e-5
            torch.testing.assert_close(grad / scale, expected[name] / scale, rtol=0, atol=1e-5)
        assert len(calls) == 2 * expected_calls
    calls.clear()


@pytest.fixture
def pair(checkpoint):
    """(ours, stock), with the same adapters."""

    def pair(way=BY_NAME, **configs):
        return adapted(load(checkpoint, **way), **configs), adapted(load(checkpoint), **configs)

    return pair


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="r-3"),
        pytest.param({"r": 16}, id="r-16"),
        pytest.param({"r": 5, "use_rslora": True}, id="rslora"),
        pytest.param({"target_parameters": [GATE_UP]}, id="gate_up-alone"),
        pytest.param({"target_parameters": [DOWN]}, id="down-alone"),
        pytest.param({"target_parameters": TARGETS[::-1]}, id="other-order"),
        pytest.param({"target_modules": ["q_a_proj", "o_proj"]}, id="beside-linear-layers"),
    ],
)
def test_one_adapter(pair, calls, way, options):
    ours, stock = pair(way, default=config(**options))
    assert_equal(ours, stock, calls)
    with stock.disable_adapter():
        bare = logits(stock)
    assert (logits(stock) - bare).abs().max() > 0.1


def test_bf16(checkpoint, calls):
    """PEFT keeps the factors of a bf16 model in fp32. Against fp32 we may be twice as far off as PEFT."""
    stock = adapted(load(checkpoint, torch.bfloat16))
    assert {p.dtype for n, p in stock.named_parameters() if "lora_" in n} == {torch.float32}
    ours = adapted(load(checkpoint, torch.bfloat16, **BY_NAME))
    exact = adapted(load(checkpoint))
    exact.load_state_dict(stock.state_dict())  # what bf16 has left of the weights
    expected, stock_out, out = logits(exact), logits(stock), logits(ours)
    assert out.dtype == torch.bfloat16 and len(calls) == NUM_MOE_LAYERS
    assert (out.float() - expected).norm() <= 2 * (stock_out.float() - expected).norm()
    expected, stock_grads, grads = gradients(exact), gradients(stock), gradients(ours)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert (grad - expected[name]).norm() <= 2 * (stock_grads[name] - expected[name]).norm(), name


def test_autocast(pair, calls):
    ours, stock = pair()
    exact, grads = logits(stock), gradients(stock)
    with torch.autocast("cpu", torch.bfloat16):
        stock_out, stock_grads = logits(stock), gradients(stock)
        out, our_grads = logits(ours), gradients(ours)
    assert calls[0][0].dtype == torch.float32
    assert 0 < (out - exact).norm() <= 2 * (stock_out - exact).norm()
    for name, grad in our_grads.items():
        assert (grad - grads[name]).norm() <= 2 * (stock_grads[name] - grads[name]).norm(), name


@pytest.mark.parametrize("way", WAYS)
def test_several_adapters(pair, calls, way):
    """Of different ranks: both at once, each alone, none; as PEFT switches them."""
    ours, stock = pair(way, first=config(r=3), second=config(r=16, use_rslora=True))
    seen = []
    for active in (["first", "second"], ["second"], ["first"]):
        for model in (ours, stock):
            model.base_model.set_adapter(active)
        assert_equal(ours, stock, calls)
        seen.append(logits(stock))
    with ours.disable_adapter(), stock.disable_adapter():
        torch.testing.assert_close(logits(ours), logits(stock), rtol=1e-5, atol=1e-5)
        assert not calls
        seen.append(logits(stock))
    assert_equal(ours, stock, calls)
    assert all((a - b).abs().max() > 0.1 for i, a in enumerate(seen) for b in seen[:i])


def test_merge(pair, calls):
    ours, stock = pair(first=config(), second=config(r=4))
    unmerged = logits(stock)
    ours.merge_adapter(["first"])
    torch.testing.assert_close(logits(ours), unmerged, rtol=1e-5, atol=1e-5)
    assert not calls
    ours.unmerge_adapter()
    ours.base_model.set_adapter(["first", "second"])
    stock.base_model.set_adapter(["first", "second"])
    torch.testing.assert_close(logits(ours), logits(stock), rtol=1e-5, atol=1e-5)
    assert len(calls) == NUM_MOE_LAYERS
    calls.clear()
    expected = logits(stock)
    merged = ours.merge_and_unload()
    assert not any(isinstance(module, ParamWrapper) for module in merged.modules())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    assert not calls


@pytest.mark.parametrize("way", WAYS)
def test_save_and_load(checkpoint, pair, calls, tmp_path, way):
    ours, stock = pair(way)
    ours.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(checkpoint, **way), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(stock), rtol=1e-5, atol=1e-5)
    assert len(calls) == NUM_MOE_LAYERS
    torch.testing.assert_close(logits(PeftModel.from_pretrained(load(checkpoint), tmp_path)), logits(stock))


@pytest.mark.parametrize("way", WAYS)
def test_generate(pair, calls, way):
    ours, stock = pair(way)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(prompt(), **options), stock.generate(prompt(), **options))
    assert len(calls) == 8 * NUM_MOE_LAYERS


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_gradient_checkpointing(pair, calls, way, use_reentrant):
    ours, stock = pair(way)
    expected = gradients(stock.train())
    ours.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    ours.enable_input_require_grads()
    grads = gradients(ours.train())
    assert len(calls) == 2 * NUM_MOE_LAYERS
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5 * expected[name].abs().max().item())


def test_kernel_config(checkpoint, pair, calls, monkeypatch):
    """Way 1 neither calls register() nor, but for this test, runs on a CPU."""
    devices = [*kernel_config_module.KERNELS_SUPPORTED_DEVICE_TYPES, "cpu"]
    monkeypatch.setattr(kernel_config_module, "KERNELS_SUPPORTED_DEVICE_TYPES", devices)
    monkeypatch.setattr("kernels.layer.layer.select_revision_or_version", lambda **_: "v1")
    try:
        mapping = KernelConfig({"DeepseekV3Experts": "org/moe-grouped-gemm:MoEExperts"})
        ours, stock = pair({"use_kernels": True, "kernel_config": mapping})
    finally:
        clear_patch_mapping()
    for training in (False, True):
        assert_equal(ours.train(training), stock.train(training), calls)


# No weight is copied


class _Largest(TorchDispatchMode):
    """The size of the largest result of an op that is no view of one of the parameters."""

    def __init__(self, parameters):
        super().__init__()
        self.storages = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in self.storages:
                self.numel = max(self.numel, result.numel())
        return results


def largest_tensor(model):
    """In elements, over forward and backward: by dispatch, and by what the allocator gave to any one op."""
    with _Largest(model.parameters()) as largest:
        gradients(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        gradients(model)
    allocated = max(event.self_cpu_memory_usage for event in profile.events())
    return max(largest.numel, allocated // 4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("active", [["first"], ["first", "second"]], ids=len)
def test_nothing_of_a_weight_s_size_is_made(pair, way, active):
    ours, stock = pair(way, first=config(), second=config())
    for model in (ours, stock):
        model.base_model.set_adapter(active)
    size = min(weight.numel() for weight in experts_of(ours)[0].parameters())
    assert largest_tensor(stock) >= size
    assert largest_tensor(ours) < size / 1.5


# Whatever we do not know keeps PEFT's own way


@pytest.fixture
def unmet(kernel, monkeypatch):
    """As if this process had not met PEFT yet."""
    monkeypatch.setattr(ParamWrapper, "_activate_lora", ParamWrapper._activate_lora.__wrapped__)
    kernel.integration._meet_peft.cache_clear()
    kernel.integration._warn_of_peft.cache_clear()
    yield kernel
    kernel.integration._warn_of_peft.cache_clear()
