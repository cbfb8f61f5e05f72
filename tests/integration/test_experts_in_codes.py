"""Transformers' FP8Experts, in fp8 and in 4 bits: every way in, any gate, gradients, what is left to Transformers."""

from types import SimpleNamespace

import pytest
import torch
from kernels import Mode, kernelize
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers.integrations import finegrained_fp8
from transformers.integrations.moe import use_experts_implementation

from oracle import dequantized, dequantized_fp4, error, fp4_layer, fp8_layer, in_fp64
from tiny_models import INTERFACE, is_switched_on

pytestmark = pytest.mark.usefixtures("one_thread", "no_other_kernels")


@pytest.fixture(params=["fp8", "fp4"])
def expert_dtype(request):
    return request.param


def make_experts(kernel, expert_dtype="fp8", experts=4, hidden_dim=256, inter=128, **options):
    """An FP8Experts as the quantizer puts it into a model, and its weights in fp64."""
    config = SimpleNamespace(
        hidden_size=hidden_dim,
        num_local_experts=experts,
        moe_intermediate_size=inter,
        hidden_act="silu",
        _experts_implementation="eager",
    )
    for name in ("swiglu_limit", "hidden_act"):
        if name in options:
            setattr(config, name, options.pop(name))
    cls = use_experts_implementation(
        experts_class=finegrained_fp8.FP8Experts,
        experts_interface=finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS,
        has_gate=options.get("has_gate", True),
    )
    module = cls(config, **{"block_size": [128, 128], "expert_dtype": expert_dtype, **options})
    if expert_dtype == "fp4" and inter % 32:
        return module, None
    e8m0, sizes = options.get("scale_fmt") == "ue8m0", (1, experts, 1, hidden_dim, inter)
    if expert_dtype == "fp8":
        _, weights, scales = fp8_layer(kernel, *sizes, e8m0=e8m0)
    else:
        _, weights, scales = fp4_layer(kernel, *sizes, form="e8m0" if e8m0 else "fp32")
    if not module.has_gate:
        weights[0], scales[0] = (t[:, : t.shape[1] // 2] for t in (weights[0], scales[0]))
    names = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    for name, weight, scale in zip(names, weights, scales):
        if getattr(module, name).shape == weight.shape:
            getattr(module, name).data.copy_(weight)
            getattr(module, f"{name}_scale_inv").data.copy_(scale)
    return module, [(dequantized if expert_dtype == "fp8" else dequantized_fp4)(*pair) for pair in zip(weights, scales)]


def inputs(device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(20, 256, generator=generator).to(device, dtype)
    index = torch.rand(20, 4, generator=generator).topk(2)[1].to(device)
    return x, index, torch.rand(20, 2, generator=generator).to(device)


@pytest.mark.parametrize("way", ["kernelize", "interface"])
@pytest.mark.parametrize("options", [{}, {"scale_fmt": "ue8m0"}, {"hidden_act": "gelu"}], ids=str)
def test_outputs(registered, device, expert_dtype, way, options):
    module, weights = make_experts(registered, expert_dtype, **options)
    module.to(device)
    if way == "kernelize":
        kernelize(module, mode=Mode.INFERENCE, device=device)
        assert is_switched_on(registered, module)
    else:
        module.config._experts_implementation = INTERFACE
    args = inputs(device)
    weights = [w.to(device) for w in weights]
    exact = registered.reference.moe_experts(*in_fp64(args), *weights, options.get("hidden_act", "silu"))
    with torch.no_grad():
        out = module(*args)
    assert out.dtype == torch.float32
    assert error(out, exact) < (1e-6 if device == "cpu" else 0.06)


def test_gradients_reach_the_input_alone(registered, expert_dtype):
    module, weights = make_experts(registered, expert_dtype)
    kernelize(module, mode=Mode.TRAINING, device="cpu")
    x, index, top_k_weights = inputs()
    x.requires_grad_()
    module(x, index, top_k_weights).sum().backward()
    exact = x.detach().double().requires_grad_()
    registered.reference.moe_experts(exact, index, top_k_weights.double(), *weights).sum().backward()
    assert error(x.grad, exact.grad) < 1e-5
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"activation_scheme": "static"}, "activation_scheme='static'"),
        ({"expert_dtype": "fp4", "activation_scheme": "static"}, "activation_scheme='static'"),
        (
            {"expert_dtype": "fp4", "inter": 80},
            r"down_proj in 4 bits is \(4, 256, 80\), no multiple of 32 columns",
        ),
        ({"block_size": None}, "block_size=None"),
        ({"block_size": [64, 128]}, r"block_size=\[64, 128\]"),
        ({"inter": 208}, "its intermediate size is 208, neither a multiple of 128 nor at most 64 above one"),
    ],
    ids=str,
)
@pytest.mark.parametrize("way", ["kernelize", "interface"])
def test_schemes_that_we_do_not_compute(registered, monkeypatch, way, options, reason):
    """Transformers serves, with one warning that says why."""
    if options.get("block_size", 1) in (None, [64, 128]):
        module, _ = make_experts(registered)
        module.block_size = options["block_size"]
    else:
        module, _ = make_experts(registered, **options)
    stock = finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS._global_mapping
    monkeypatch.setitem(stock, "grouped_mm", lambda module, hidden_states, *_: -hidden_states)
    module.config._experts_implementation = "grouped_mm" if way == "kernelize" else INTERFACE
    kernelize(module, mode=Mode.INFERENCE, device="cpu")
    with pytest.warns(UserWarning, match=f"does not serve FP8Experts, as {reason}; Transformers") as warnings:
        for _ in range(2):
            assert torch.equal(module(*inputs()), -inputs()[0])
    assert len(warnings) == 1


def _soft_capped(self, gate_up):
    """As FP8Experts of Transformers 5.23 have it."""
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(self.gate_softcap * torch.tanh(gate / self.gate_softcap)) * up


@pytest.mark.parametrize("way", ["kernelize", "interface"])
@pytest.mark.parametrize(
    "options", [{"swiglu_limit": 1.5}, {"hidden_act": "tanh"}, {"gate_softcap": 0.75}, {"swiglu_alpha": 1.5}], ids=str
)
def test_any_gate(registered, device, monkeypatch, record, expert_dtype, way, options):
    """Ours as part of `moe_experts`, and those that are not ours as they are between grouped GEMMs."""
    options = dict(options)
    softcap, alpha = options.pop("gate_softcap", None), options.pop("swiglu_alpha", None)
    module, weights = make_experts(registered, expert_dtype, **options)
    if softcap is not None:
        module.gate_softcap = softcap
        monkeypatch.setattr(finegrained_fp8.FP8Experts, "_apply_gate", _soft_capped)
    if alpha is not None:
        module.swiglu_alpha, module.swiglu_limit = alpha, 1.25
    module.to(device)
    if way == "kernelize":
        kernelize(module, mode=Mode.INFERENCE, device=device)
    else:
        module.config._experts_implementation = INTERFACE
    with torch.no_grad():
        expected = exactly(module._apply_gate, weights, device)
        calls = record(registered.functional, "moe_experts")
        assert error(module(*inputs(device)), expected) < 1e-5
    assert len(calls) == (softcap is None and module.config.hidden_act == "silu")


def exactly(gate, weights, device):
    x, index, top_k_weights = in_fp64(inputs(device))
    out = 0
    for k in range(index.shape[1]):
        z = torch.einsum("th,tnh->tn", x, weights[0].to(device)[index[:, k]])
        y = torch.einsum("ti,thi->th", gate(z), weights[1].to(device)[index[:, k]])
        out = out + top_k_weights[:, k, None] * y
    return out


@pytest.mark.parametrize("way", ["kernelize", "interface"])
def test_without_a_gate(registered, device, expert_dtype, way):
    module, weights = make_experts(registered, expert_dtype, has_gate=False)
    module.to(device)
    if way == "kernelize":
        kernelize(module, mode=Mode.INFERENCE, device=device)
    else:
        module.config._experts_implementation = INTERFACE
    with torch.no_grad():
        assert error(module(*inputs(device)), exactly(module.act_fn, weights, device)) < 1e-5


def test_activations_are_not_quantised_while_a_module_trains(registered, record, monkeypatch):
    """The first pass of reentrant checkpointing has no gradients, the second has: both must be one function."""
    module, _ = make_experts(registered)
    module.config._experts_implementation = INTERFACE
    seen, moe_experts = [], registered.functional.moe_experts
    monkeypatch.setattr(
        registered.functional,
        "moe_experts",
        lambda *args, **kwargs: seen.append(kwargs) or moe_experts(*args, **kwargs),
    )
    for training in (True, False):
        module.train(training)(*inputs())
    assert [kwargs["quantize_activations"] for kwargs in seen] == [False, True]


@pytest.mark.gpu
def test_reentrant_checkpointing_on_a_gpu(registered):
    module, _ = make_experts(registered)
    module.config._experts_implementation = INTERFACE
    module = module.cuda().train()
    x, index, top_k_weights = inputs("cuda", torch.bfloat16)
    x = torch.nn.functional.embedding(torch.arange(2048, device="cuda") % 20, x).requires_grad_()
    index, top_k_weights = (t.repeat(103, 1)[:2048] for t in (index, top_k_weights))
    plain = module(x, index, top_k_weights)
    for use_reentrant in (False, True):
        # Behind a function of the input: in the first pass of the reentrant way, no tensor asks for a gradient.
        out = checkpoint(lambda x: module(x + 0, index, top_k_weights), x, use_reentrant=use_reentrant)
        assert torch.equal(out, plain)


def test_dense_weights_in_fp8_experts(registered):
    """Transformers leaves weights that it cannot cut into blocks as they are."""
    module, weights = make_experts(registered)
    for name, weight in zip(("gate_up_proj", "down_proj"), weights):
        setattr(module, name, torch.nn.Parameter(weight.float()))
    expected = module(*inputs())
    module.config._experts_implementation = INTERFACE
    torch.testing.assert_close(module(*inputs()), expected, rtol=1e-4, atol=1e-4)


# --- LoRA -------------------------------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, *args):
        return self.experts(*args)


@pytest.mark.parametrize("way", ["kernelize", "interface"])
def test_lora(registered, device, expert_dtype, way):
    """As over the dequantised weights; PEFT itself would add W + BA to the codes."""
    module, weights = make_experts(registered, expert_dtype)
    weights = [w.to(device) for w in weights]
    block = Block(module).to(device)
    if way == "kernelize":
        kernelize(block, mode=Mode.TRAINING, device=device)
    else:
        module.config._experts_implementation = INTERFACE
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    model = get_peft_model(block, LoraConfig(target_parameters=targets, r=4, lora_alpha=6))
    adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    generator = torch.Generator().manual_seed(3)
    for p in adapters.values():
        assert p.dtype == torch.float32 and p.requires_grad
        p.data.copy_(torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5)
    x, index, top_k_weights = inputs(device)
    x.requires_grad_()
    out = model(x, index, top_k_weights)
    grads = torch.autograd.grad(out.square().sum(), [x, *adapters.values()])

    exact = {name: p.detach().double().requires_grad_() for name, p in adapters.items()}
    exact_x = x.detach().double().requires_grad_()
    merged = []
    for inner, weight in zip((True, False), weights):
        # The wrapper of the first parameter lies inside that of the second.
        A, B = (next(p for n, p in exact.items() if f"lora_{ab}" in n and ("base_layer" in n) == inner) for ab in "AB")
        A = A.reshape(4, -1, A.shape[1])
        B = B.reshape(B.shape[0], -1, 4).permute(2, 0, 1)
        merged.append(weight + 1.5 * B @ A)
    exact_out = registered.reference.moe_experts(exact_x, index, top_k_weights.double(), *merged)
    exact_grads = torch.autograd.grad(exact_out.square().sum(), [exact_x, *exact.values()])
    for got, expected in zip((out, *grads), (exact_out, *exact_grads)):
        assert error(got, expected) < 1e-5


@pytest.mark.parametrize("safe_merge", [False, True])
def test_adapters_are_not_merged_into_codes(registered, expert_dtype, safe_merge):
    module, _ = make_experts(registered, expert_dtype)
    model = get_peft_model(Block(module), LoraConfig(target_parameters=["experts.gate_up_proj"], r=4))
    before = module.gate_up_proj.clone()
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="cannot be merged into gate_up_proj, which holds codes of few bits"):
            merge(safe_merge=safe_merge)
    assert torch.equal(module.gate_up_proj.view(torch.uint8), before.view(torch.uint8))


def test_adapters_over_codes_that_we_do_not_compute(registered, expert_dtype):
    """PEFT would add W + BA to the codes, so that nothing but an error is right."""
    module, _ = make_experts(registered, expert_dtype)
    model = get_peft_model(Block(module), LoraConfig(target_parameters=["experts.down_proj"], r=4))
    with pytest.raises(RuntimeError, match="on down_proj of FP8Experts, which holds codes.* it does not run on it"):
        model(*inputs())
    module.config._experts_implementation = INTERFACE
    assert model(*inputs()).shape == inputs()[0].shape
