"""FP8 checkpoints and Transformers' FP8Experts, end to end; and examples/quantize_checkpoint.py, which makes them."""

import importlib.util
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from kernels import Mode, kernelize
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM
from transformers.integrations import finegrained_fp8
from transformers.integrations.moe import use_experts_implementation

from conftest import ROOT
from oracle import error, fp8_layer, fp8_weights_in_fp64, in_fp64
from tiny_models import NUM_MOE_LAYERS, deepseek_v3_config, experts_of, is_switched_on, prompt

INTERFACE = "moe_grouped_gemm"
WAYS = [
    pytest.param({"use_kernels": True}, id="use_kernels"),
    pytest.param({"experts_implementation": INTERFACE}, id="experts_implementation"),
]

pytestmark = pytest.mark.usefixtures("one_thread", "no_other_kernels")


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("quantize_checkpoint", ROOT / "examples/quantize_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def quantize(example, monkeypatch):
    def quantize(*arguments):
        monkeypatch.setattr("sys.argv", ["quantize_checkpoint.py", *map(str, arguments)])
        example.main()

    return quantize


@pytest.fixture(scope="module")
def bf16_checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("bf16")
    config = deepseek_v3_config()
    config.hidden_size, config.moe_intermediate_size = 256, 128
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    model.save_pretrained(path, max_shard_size="1MB")
    return path


@torch.no_grad()
def logits(model):
    return model(prompt().to(model.device)).logits.float()


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_format_is_deepseeks(bf16_checkpoint, quantize, tmp_path):
    quantize("--linear", bf16_checkpoint, tmp_path / "fp8")
    config = json.loads((tmp_path / "fp8/config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fp8" and config["weight_block_size"] == [128, 128]
    weight_map = json.loads((tmp_path / "fp8/model.safetensors.index.json").read_text())["weight_map"]
    key = "model.layers.2.mlp.experts.7.down_proj.weight"
    assert f"{key}_scale_inv" in weight_map and "model.layers.0.self_attn.o_proj.weight_scale_inv" in weight_map
    assert not [k for k in weight_map if k.endswith("_scale_inv") and ("gate.weight" in k or "embed" in k)]
    with safe_open(tmp_path / "fp8" / weight_map[key], "pt") as file:
        assert file.get_tensor(key).dtype == torch.float8_e4m3fn
        assert file.get_tensor(f"{key}_scale_inv").shape == (2, 1)


@pytest.mark.parametrize("kwargs", WAYS)
@pytest.mark.parametrize("linear", [True, False], ids=["all-linear", "experts"])
def test_without_a_gpu_transformers_dequantizes(
    bf16_checkpoint, quantize, registered, record, tmp_path, linear, kwargs
):
    """The result is a dense model, which our bf16 layer serves."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU the experts stay in fp8")
    quantize(*(["--linear"] if linear else []), bf16_checkpoint, tmp_path / "fp8")
    calls = record(registered.functional, "moe_experts")
    # DeepSeek's own format loads in bf16 alone: Transformers dequantizes linear layers to it whatever one asks for.
    dtype = torch.bfloat16 if linear else torch.float32
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=dtype)
    expected = logits(stock)
    assert not calls
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=dtype, **kwargs)
    assert error(logits(model), expected.double()) < (3e-2 if linear else 1e-4)
    assert len(calls) == NUM_MOE_LAYERS and calls[0][3].dtype == dtype
    # Of the order of what rounding does to this model: some tokens go to other experts.
    original = AutoModelForCausalLM.from_pretrained(bf16_checkpoint, dtype=dtype)
    assert 0 < error(expected, logits(original).double()) < 0.5
    tokens = model.generate(prompt(), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert tokens.shape == (2, prompt().shape[1] + 4)


@pytest.mark.gpu
@pytest.mark.parametrize("kwargs", WAYS)
def test_fp8_experts_on_a_gpu(bf16_checkpoint, quantize, registered, tmp_path, kwargs):
    """Experts alone: Transformers' own fp8 layers fetch their kernels from the Hub. Stock computes on dense weights."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("Transformers dequantizes")
    quantize(bf16_checkpoint, tmp_path / "fp8")
    dequantize = {"quantization_config": finegrained_config(dequantize=True)}
    options = {"dtype": torch.bfloat16, "device_map": "cuda"}
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", **options, **dequantize))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", **options, **kwargs)
    for experts in experts_of(model):
        assert isinstance(experts, finegrained_fp8.FP8Experts)
        assert experts.gate_up_proj.dtype == torch.float8_e4m3fn
        if "use_kernels" in kwargs:
            assert is_switched_on(registered, experts)
    calls = []
    for experts in experts_of(model):
        experts.register_forward_hook(lambda module, args, out: calls.append((module, args, out)))
    # A few tokens go to other experts than stock's, as rounding decides; the experts themselves are exact enough.
    assert error(logits(model), expected.double()) < 0.3
    assert len(calls) == NUM_MOE_LAYERS
    for experts, args, out in calls:
        scales = {f"{name}_scale": getattr(experts, f"{name}_scale_inv") for name in ("gate_up_proj", "down_proj")}
        with torch.no_grad():
            exact = registered.reference.moe_experts(*args, experts.gate_up_proj, experts.down_proj, **scales)
        assert 0 < error(out, exact.double()) < 0.06
    tokens = model.generate(prompt().cuda(), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert tokens.shape == (2, prompt().shape[1] + 8)


def finegrained_config(**options):
    from transformers import FineGrainedFP8Config

    return FineGrainedFP8Config(**options)


def test_conversion_goes_on_where_it_stopped(bf16_checkpoint, example, quantize, monkeypatch, tmp_path):
    quantize(bf16_checkpoint, tmp_path / "whole")
    convert = example.convert
    done = []

    def stops(kernel, source, target, name, *others):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(name)
        convert(kernel, source, target, name, *others)

    monkeypatch.setattr(example, "convert", stops)
    with pytest.raises(KeyboardInterrupt):
        quantize(bf16_checkpoint, tmp_path / "parts")
    assert not (tmp_path / "parts/config.json").exists()
    rest = []
    monkeypatch.setattr(example, "convert", lambda *args: rest.append(args[3]) or convert(*args))
    quantize(bf16_checkpoint, tmp_path / "parts")
    assert sorted(done + rest) == example.shards(bf16_checkpoint)
    files = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in (tmp_path / "parts").iterdir()} == files
    for name in files:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_conversion_refuses(bf16_checkpoint, quantize, tmp_path):
    with pytest.raises(SystemExit, match="no checkpoint"):
        quantize(tmp_path, tmp_path / "x")
    quantize(bf16_checkpoint, tmp_path / "fp8")
    with pytest.raises(SystemExit, match="fp8: not empty"):
        quantize(bf16_checkpoint, tmp_path / "fp8")
    with pytest.raises(SystemExit, match="quantized already"):
        quantize(tmp_path / "fp8", tmp_path / "x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="mine: not empty"):
        quantize(bf16_checkpoint, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_conversion_names_a_weight_that_is_not_finite(bf16_checkpoint, quantize, tmp_path):
    source = tmp_path / "broken"
    shutil.copytree(bf16_checkpoint, source)
    path = sorted(source.glob("*.safetensors"))[-1]
    tensors = load_file(path)
    key = [key for key in sorted(tensors) if ".experts." in key and key.endswith("_proj.weight")][-1]
    tensors[key][1, 2] = float("inf")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        SystemExit, match=re.escape(f"{path}: {key}: weight: expected finite numbers, got inf at (1, 2)")
    ):
        quantize(source, tmp_path / "fp8")


# --- FP8Experts -------------------------------------------------------------------------------------------------------


def make_experts(kernel, experts=4, hidden_dim=256, inter=128, **options):
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
        experts_class=finegrained_fp8.FP8Experts, experts_interface=finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS
    )
    module = cls(config, **{"block_size": [128, 128], **options})
    _, weights, scales = fp8_layer(kernel, 1, experts, 1, hidden_dim, inter, e8m0=options.get("scale_fmt") == "ue8m0")
    if module.gate_up_proj.dtype == torch.float8_e4m3fn:
        for name, weight, scale in zip(("gate_up_proj", "down_proj"), weights, scales):
            getattr(module, name).data.copy_(weight)
            getattr(module, f"{name}_scale_inv").data.copy_(scale)
    return module, fp8_weights_in_fp64(weights, scales)


def inputs(device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(20, 256, generator=generator).to(device, dtype)
    index = torch.rand(20, 4, generator=generator).topk(2)[1].to(device)
    return x, index, torch.rand(20, 2, generator=generator).to(device)


@pytest.mark.parametrize("way", ["kernelize", "interface"])
@pytest.mark.parametrize("options", [{}, {"scale_fmt": "ue8m0"}, {"hidden_act": "gelu"}], ids=str)
def test_fp8_experts(registered, device, way, options):
    module, weights = make_experts(registered, **options)
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


def test_gradients_reach_the_input_alone(registered):
    module, weights = make_experts(registered)
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
        ({"expert_dtype": "fp4"}, "gate_up_proj is torch.int8"),
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
    registered.integration.modules._warn.cache_clear()
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
def test_any_gate(registered, device, monkeypatch, way, options):
    """Ours between grouped GEMMs, and those that are not ours as they are."""
    softcap, alpha = options.pop("gate_softcap", None), options.pop("swiglu_alpha", None)
    module, weights = make_experts(registered, **options)
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
    x, index, top_k_weights = in_fp64(inputs(device))
    expected = 0
    for k in range(index.shape[1]):
        z = torch.einsum("th,tnh->tn", x, weights[0].to(device)[index[:, k]])
        y = torch.einsum("ti,thi->th", module._apply_gate(z), weights[1].to(device)[index[:, k]])
        expected = expected + top_k_weights[:, k, None] * y
    with torch.no_grad():
        assert error(module(*inputs(device)), expected) < 1e-5


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
def test_lora_over_fp8(registered, device, way):
    """As over the dequantised weights; PEFT itself would add W + BA to the codes."""
    module, weights = make_experts(registered)
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
