"""Every experts class of the installed Transformers, alone and in a tiny model, against its own eager forward."""

import runpy
from importlib import import_module

import pytest
import torch
from kernels import Mode, kernelize
from peft import LoraConfig, get_peft_model

from cases import covering
from moe_models import ALONE, experts_classes, tiny_model, tiny_module
from oracle import assert_as_good_as_torch
from suite import ROOT
from tiny_models import INTERFACE, is_switched_on

EXPERTS = [pytest.param(entry, id=entry.name) for entry in experts_classes()]
MODELS = [pytest.param(entry, id=entry.name) for entry in experts_classes() if entry.name not in ALONE]

pytestmark = pytest.mark.usefixtures("one_thread", "no_other_kernels", "registered")


@pytest.fixture
def calls(kernel, record):
    """The arguments of every call of an experts module that is computed here."""
    return record(kernel.integration.modules, "_compute")


def test_enumeration():
    assert len(EXPERTS) > 40
    assert {"deepseek_v3", "gpt_oss", "nemotron_h"} <= {entry.model for entry in experts_classes()}
    assert set(ALONE) <= {entry.name for entry in experts_classes()}


def test_table_is_up_to_date():
    """It is of the newest Transformers; the classes of others have the same rows."""
    script = runpy.run_path(str(ROOT / "scripts/coverage.py"))
    page = script["PAGE"].read_text(encoding="utf-8")
    heading, *rows = script["table"]().splitlines()
    if heading in page:
        assert script["written"](page) == page, "scripts/coverage.py writes it"
    assert set(rows) <= set(page.splitlines())


# Experts alone


def inputs(module, tokens, experts, hidden_dim, device="cpu", dtype=torch.float32):
    """Hidden states, ids and weights; the last expert gets no token."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, hidden_dim, generator=generator).to(device, dtype)
    ids = torch.rand(tokens, experts - 1, generator=generator).topk(2)[1].to(device)
    return x, ids, torch.rand(tokens, 2, generator=generator).to(device, dtype)


def results(module, implementation, x, ids, weights):
    """The output, and the gradient of every input and parameter."""
    module.config._experts_implementation_internal = implementation
    x, weights = (t.detach().clone().requires_grad_() for t in (x, weights))
    out = module(x, ids, weights)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    named = {"hidden_states": x, "top_k_weights": weights, **dict(module.named_parameters())}
    return {"out": out.detach(), **dict(zip(named, torch.autograd.grad(out, list(named.values()), seed)))}


def hidden_dim(module):
    names = ("gate_up_proj", "up_proj")
    weight = next(getattr(module, name) for name in names if hasattr(module, name))
    return weight.shape[1] if module.is_transposed else weight.shape[2]


@pytest.mark.parametrize("entry", EXPERTS)
def test_experts_alone(kernel, entry, calls):
    module = tiny_module(entry)
    args = inputs(module, 20, module.num_experts, hidden_dim(module))
    expected, got = results(module, "eager", *args), results(module, INTERFACE, *args)
    assert len(calls) == 1
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4 * max(1, value.abs().max()), msg=name)
    kernelize(module, mode=Mode.INFERENCE, device="cpu")
    assert is_switched_on(kernel, module)


@pytest.mark.gpu
@pytest.mark.parametrize("entry, tokens, dtype", covering(EXPERTS, [1, 20, 600], [torch.bfloat16, torch.float32]))
def test_experts_alone_on_a_gpu(entry, calls, tokens, dtype):
    module = tiny_module(entry).to("cuda", dtype)
    args = inputs(module, tokens, module.num_experts, hidden_dim(module), "cuda", dtype)
    expected, got = results(module, "eager", *args), results(module, INTERFACE, *args)
    assert len(calls) == 1
    exact = results(module.double(), "eager", *(t.double() if t.is_floating_point() else t for t in args))
    for name in expected:
        assert_as_good_as_torch(got[name], expected[name], exact[name])


COMPILED = ["Qwen3MoeExperts", "GptOssExperts", "NemotronHExperts", "MuseSparkExperts", "AriaExperts"]


@pytest.mark.parametrize("entry", [p for p in EXPERTS if p.id in COMPILED])
def test_experts_compile_into_one_graph(entry):
    torch.compiler.reset()
    module = tiny_module(entry)
    args = inputs(module, 20, module.num_experts, hidden_dim(module))
    expected = results(module, INTERFACE, *args)
    module.forward = torch.compile(module.forward, fullgraph=True, backend="aot_eager")
    for name, value in results(module, INTERFACE, *args).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)


def test_a_gate_that_is_none_of_ours_runs_as_it_is(calls):
    """Also one that a subclass puts in the place of ours."""
    module = tiny_module(next(entry for entry in experts_classes() if entry.name == "MixtralExperts"))

    class SoftCapped(type(module)):
        def _apply_gate(self, gate_up):
            gate, up = gate_up.chunk(2, dim=-1)
            return 2 * torch.tanh(self.act_fn(gate) * up / 2)

    args = inputs(module, 20, module.num_experts, hidden_dim(module))
    uncapped = results(module, INTERFACE, *args)["out"]
    module.__class__ = SoftCapped
    got = results(module, INTERFACE, *args)
    assert not torch.allclose(got["out"], uncapped, rtol=1e-2)
    expected = results(module, "batched_mm", *args)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["MuseSparkExperts", "GptOssExperts", "NemotronHExperts"])
def test_skipped_slots_reach_neither_norm_nor_bias(name):
    """Expert parallelism marks slots of other ranks by the id E; weight and gradient of the output may be NaN there."""
    module = tiny_module(next(entry for entry in experts_classes() if entry.name == name))
    x, ids, weights = inputs(module, 20, module.num_experts, hidden_dim(module))
    expected = results(module, INTERFACE, x[4:], ids[4:], weights[4:])
    ids[:4], x[:4], weights[:4] = module.num_experts, float("nan"), float("nan")
    got = results(module, INTERFACE, x, ids, weights)
    assert not got["out"][:4].any()
    torch.testing.assert_close(got["out"][4:], expected["out"])
    for parameter, _ in module.named_parameters():
        assert got[parameter].isfinite().all(), parameter


# In a model


def loss_and_gradients(model, ids):
    model.zero_grad()
    out = model(input_ids=ids)
    out = out.logits if "logits" in out else out.last_hidden_state
    out.float().square().mean().backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("entry", MODELS)
def test_model(entry, calls, tmp_path):
    model = tiny_model(entry)
    ids = torch.randint(2, 120, (2, 7), generator=torch.Generator().manual_seed(1))
    generate = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}

    model.set_experts_implementation("eager")
    expected, expected_gradients = loss_and_gradients(model, ids)
    tokens = model.generate(ids, **generate) if model.can_generate() else None

    model.set_experts_implementation(INTERFACE)
    calls.clear()
    out, gradients = loss_and_gradients(model, ids)
    assert len(calls) == sum(isinstance(module, entry.load()) for module in model.modules())
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        scale = max(1e-3, gradient.abs().max().item())
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-4 * scale, msg=name)
    if tokens is not None:
        assert torch.equal(model.generate(ids, **generate), tokens)

    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, experts_implementation=INTERFACE)
    saved = model.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in again.state_dict().items())
    with torch.no_grad():
        assert_same_output(again.eval()(input_ids=ids), out)


def assert_same_output(result, expected):
    torch.testing.assert_close(result.logits if "logits" in result else result.last_hidden_state, expected)


# What Transformers' own model tests look at; its source distribution does not hold those of the models.
AS_TRANSFORMERS = ["deepseek_v3", "qwen3_moe", "glm4_moe", "dots1", "mixtral", "gpt_oss"]


@pytest.fixture(params=[p for p in MODELS if p.values[0].model in AS_TRANSFORMERS])
def compare(request):
    """compare(run, **closeness): run(model) gives the same tensors with stock's experts and with ours."""
    model = tiny_model(request.param)

    def compare(run, rtol=1e-4, atol=1e-4):
        results = []
        for name in ("eager", INTERFACE):
            model.set_experts_implementation(name)
            torch.manual_seed(3)
            results.append(run(model))
        expected, got = results
        assert len(expected) == len(got) > 0
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol)

    return compare


def ids_of(batch, length):
    return torch.randint(2, 120, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"do_sample": True}, id="sampling"),
        pytest.param({"num_beams": 3}, id="beams"),
        pytest.param({"cache_implementation": "static", "disable_compile": True}, id="static-cache"),
        pytest.param({"use_cache": False}, id="no-cache"),
        pytest.param({"return_dict_in_generate": True, "output_scores": True}, id="scores"),
    ],
)
def test_generation(compare, options):
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0, "do_sample": False, **options}

    def generate(model):
        out = model.generate(ids_of(2, 6), **options)
        return [out] if isinstance(out, torch.Tensor) else [out.sequences, *out.scores]

    compare(generate)


def test_padding_does_not_matter(compare):
    def logits(model):
        ids, mask = ids_of(2, 8), torch.ones(2, 8, dtype=torch.int64)
        mask[0, :3] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            return [model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[0, 3:]]

    compare(logits)


def test_outputs_of_every_layer(compare):
    def outputs(model):
        options = {"output_hidden_states": True}
        if hasattr(model.config, "output_router_logits"):
            options["output_router_logits"] = True
        out = model(input_ids=ids_of(2, 8), labels=ids_of(2, 8), **options)
        return [out.loss, out.logits, *out.hidden_states, *(out.get("router_logits") or ())]

    compare(outputs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(compare, reentrant):
    def gradients(model):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train().enable_input_require_grads()
        model.zero_grad()
        model(input_ids=ids_of(2, 8), labels=ids_of(2, 8)).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    compare(gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(compare, dtype):
    def logits(model):
        with torch.no_grad():
            return [model.to(dtype)(input_ids=ids_of(2, 8)).logits.float()]

    compare(logits, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("entry", [p for p in MODELS if p.values[0].model in AS_TRANSFORMERS])
def test_use_kernels(kernel, calls, entry):
    """Way 2; of gpt-oss Transformers has a kernel for the whole MoE block, which the fixture leaves out."""
    model = tiny_model(entry)
    with torch.no_grad():
        model.set_experts_implementation("eager")
        expected = model(input_ids=ids_of(2, 8)).logits
        model.set_use_kernels(True)
        experts = [module for module in model.modules() if isinstance(module, entry.load())]
        assert all(is_switched_on(kernel, module) for module in experts)
        torch.testing.assert_close(model(input_ids=ids_of(2, 8)).logits, expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == len(experts)


@pytest.mark.parametrize("name", ["GptOssExperts", "NemotronHExperts", "DeepseekV4Experts", "MuseSparkExperts"])
def test_adapters(kernel, record, name):
    """PEFT's adapters on weights of every layout, with and without the kernel."""
    entry = next(entry for entry in experts_classes() if entry.name == name)
    model = tiny_model(entry)
    up = "up_proj" if entry.options.get("has_gate") is False else "gate_up_proj"
    config = LoraConfig(target_parameters=[f"experts.{up}", "experts.down_proj"], r=3, init_lora_weights=False)
    torch.manual_seed(1)
    model = get_peft_model(model, config)
    ids = torch.randint(2, 120, (2, 7), generator=torch.Generator().manual_seed(1))
    model.base_model.model.set_experts_implementation("eager")
    expected, expected_gradients = loss_and_gradients(model, ids)
    calls = record(import_module(f"{kernel.__name__}.functional"), "moe_experts_lora")
    model.base_model.model.set_experts_implementation(INTERFACE)
    out, gradients = loss_and_gradients(model, ids)
    assert calls and all(len(factors) == 1 for call in calls for factors in call[5:7])
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    for name, gradient in expected_gradients.items():
        scale = max(1e-3, gradient.abs().max().item())
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-4 * scale, msg=name)
