"""Every block class of the installed Transformers against its own forward, and what sends it back part by part."""

import copy
import functools
import gc
import importlib
import pickle
import weakref

import accelerate
import pytest
import torch
from kernels import Mode, kernelize
from peft import LoraConfig, inject_adapter_in_model
from torch import library, nn
from torch.nn.utils import parametrize
from transformers import DeepseekV3Config, GptOssConfig, Qwen2MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from moe_models import OWN_BLOCKS, block_classes, experts_classes, lone_block, tiny_block, tiny_config, tiny_model
from situations import Repository, Theirs
from suite import COMPILE_BACKENDS
from tiny_models import is_switched_on

pytestmark = pytest.mark.usefixtures("one_thread", "no_other_kernels", "registered", "blocks_on_cpu")

OURS = "moe_grouped_gemm"


@pytest.fixture
def calls(kernel, record):
    return record(kernel.integration.blocks, "moe_block")


@functools.cache
def model_of(name):
    return tiny_model(next(entry for entry in experts_classes() if entry.model == name))


def stock_block(entry):
    try:
        return tiny_block(entry.load(), copy.deepcopy(model_of(entry.model)))
    except LookupError:
        return lone_block(entry)


def switched_on(kernel, stock, device="cpu"):
    kernel.integration.stand_ins.meet(type(stock).__module__)
    block = copy.deepcopy(stock)
    kernelize(block, mode=Mode.INFERENCE, device=device)
    return block


def hidden_dim(block):
    return next(p.shape[-1] for name, p in block.named_parameters() if "gate" in name or "router" in name)


def hidden_states(block, batch=2, sequence=3, seed=1):
    x = torch.randn(batch, sequence, hidden_dim(block), generator=torch.Generator().manual_seed(seed))
    parameter = next(block.parameters())
    return x.to(parameter.device, parameter.dtype)


def results(output):
    return output if isinstance(output, tuple) else (output,)


def assert_same(got, expected, tolerance=1e-5):
    for a, b in zip(results(got), results(expected), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


# --- every class ------------------------------------------------------------------------------------------------------


def test_enumeration():
    names = {entry.name for entry in block_classes()}
    assert len(names) > 50 and set(OWN_BLOCKS) <= names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("entry", block_classes(), ids=lambda entry: entry.name)
@torch.no_grad()
def test_alone(kernel, calls, device, entry, dtype):
    """As docs/models.md has it; a new class fails here until somebody looks at it."""
    stock = stock_block(entry).to(device)
    if dtype != torch.float32:
        for name, parameter in stock.named_parameters():
            if parameter.ndim > 1 or "expert_bias" not in name:  # which models keep in fp32
                parameter.data = parameter.data.to(dtype)
    block, x = switched_on(kernel, stock, device), hidden_states(stock)
    try:
        expected = stock(x)
    except (AttributeError, RuntimeError, TypeError) as error:
        pytest.skip(f"{error}")
    got = block(x)
    assert len(calls) == (entry.name not in OWN_BLOCKS)
    if dtype == torch.float32:
        assert_same(got, expected)
    else:  # where a token goes to another expert, it has another result
        a, b = results(got)[0].float(), results(expected)[0].float()
        near = ((a - b).norm(dim=-1) < 0.02 * b.norm(dim=-1)).float().mean()
        assert near >= 0.8
    assert kernel.status(block).get("", "Transformers").startswith(OURS if calls else "Transformers")


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 1)], ids=str)
@torch.no_grad()
def test_shapes(kernel, calls, device, shape):
    stock = deepseek().to(device)
    block, x = switched_on(kernel, stock, device), hidden_states(stock, *shape)
    assert_same(block(x), stock(x))
    assert_same(block(x.mT.contiguous().mT), stock(x))
    assert len(calls) == 2


def deepseek(**sizes):
    return tiny_block(DeepseekV3MoE, nn.ModuleList([DeepseekV3MoE(deepseek_config(**sizes))]))


def deepseek_config(**sizes):
    config = tiny_config("deepseek_v3", DeepseekV3Config)
    for name, value in sizes.items():
        setattr(config, name, value)
    return config


def qwen2():
    config = tiny_config("qwen2_moe", Qwen2MoeConfig)
    return tiny_block(Qwen2MoeSparseMoeBlock, nn.ModuleList([Qwen2MoeSparseMoeBlock(config)]))


# --- what sends it back -----------------------------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def _hook(path):
    def change(block):
        block.get_submodule(path).register_forward_hook(lambda module, args, output: double(output))

    return change


def double(output):
    return (
        tuple(map(double, output))
        if isinstance(output, tuple)
        else output * 2
        if output.is_floating_point()
        else output
    )


def _pre_hook(block):
    block.shared_experts.up_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def _wrapped(path):
    def change(block):
        module = block.get_submodule(path)
        forward = module.forward
        module.forward = lambda *args: double(forward(*args))

    return change


def _offloaded(block):
    accelerate.hooks.add_hook_to_module(block.experts, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))


def _lora(block):
    torch.manual_seed(0)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False), block)


def _lora_on_a_linear(block):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
    inject_adapter_in_model(config, nn.ModuleDict({"mlp": block.shared_experts}))


def _parametrized(block):
    parametrize.register_parametrization(block.shared_experts.gate_proj, "weight", Doubled())


def _parametrized_experts(block):
    parametrize.register_parametrization(block.experts, "down_proj", Doubled())


def _biased(block):
    block.shared_experts.up_proj.bias = nn.Parameter(torch.ones(block.shared_experts.up_proj.out_features))


def _another_linear(block):
    class Linear(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    block.shared_experts.down_proj.__class__ = Linear


def _another_activation(block):
    block.shared_experts.act_fn = nn.Tanh()


def _own_gate(block):
    block.experts.act_fn = nn.Tanh()


def _experts_off(block):
    block.experts.__dict__["_moe_grouped_gemm"] = ""


def _router_off(block):
    block.gate.__dict__["_moe_grouped_gemm"] = ""


def _training(block):
    block.train()


SENT_BACK = {
    "router hooked": _hook("gate"),
    "experts hooked": _hook("experts"),
    "router wrapped": _wrapped("gate"),
    "experts wrapped": _wrapped("experts"),
    "offloaded": _offloaded,
    "lora on the experts": _lora,
    "parametrized": _parametrized,
    "parametrized experts": _parametrized_experts,
    "own gate": _own_gate,
    "experts off": _experts_off,
    "router off": _router_off,
    "training": _training,
}
# Of shared experts, which are called then.
APART = {
    "shared hooked": _hook("shared_experts"),
    "linear hooked": _hook("shared_experts.gate_proj"),
    "activation hooked": _hook("shared_experts.act_fn"),
    "linear pre-hooked": _pre_hook,
    "shared wrapped": _wrapped("shared_experts"),
    "linear wrapped": _wrapped("shared_experts.down_proj"),
    "lora on a linear": _lora_on_a_linear,
    "biased": _biased,
    "another linear": _another_linear,
    "another activation": _another_activation,
}


@pytest.mark.parametrize("is_called_before", [False, True], ids=["at once", "after a call"])
@pytest.mark.parametrize("name", [*SENT_BACK, *APART])
@torch.no_grad()
def test_sent_back(kernel, calls, name, is_called_before):
    stock = deepseek()
    block, x = switched_on(kernel, stock), hidden_states(stock)
    if is_called_before:
        block(x)
        assert len(calls) == 1
        calls.clear()
    for module in (stock, block):
        (SENT_BACK | APART)[name](module)
    assert_same(block(x), stock(x))
    assert_same(block(x), stock(x))
    assert len(calls) == (2 if name in APART else 0)
    by = f"{OURS}, around its own shared experts" if name in APART else "Transformers, part by part"
    assert kernel.status(block)[""] == by


@torch.no_grad()
def test_a_hook_that_is_taken_off(kernel, calls):
    stock = deepseek()
    block, x = switched_on(kernel, stock), hidden_states(stock)
    seen = []
    hook = block.gate.register_forward_hook(lambda module, args, output: seen.append(output))
    block(x)
    assert len(seen) == 1 and not calls
    hook.remove()
    assert_same(block(x), stock(x))
    assert len(seen) == 1 and len(calls) == 1


def _top_k(block):
    block.gate.top_k = 3


def _factor(block):
    block.gate.routed_scaling_factor = 7.0


def _other_data(block):
    for parameter in block.parameters():
        parameter.data = parameter.data * 1.5


def _in_place(block):
    for parameter in block.parameters():
        parameter.mul_(1.5)


def _other_parameter(block):
    block.shared_experts.up_proj.weight = nn.Parameter(block.shared_experts.up_proj.weight * 3)
    block.experts.down_proj = nn.Parameter(block.experts.down_proj * 3)
    block.gate.e_score_correction_bias = block.gate.e_score_correction_bias.flip(0)


def _other_child(block):
    block.shared_experts = copy.deepcopy(block.shared_experts)
    block.shared_experts.gate_proj.weight.mul_(2)


def _other_activation(block):
    for module in (block.shared_experts, block.experts):
        module.act_fn = nn.ReLU()


@pytest.mark.parametrize(
    "change", [_top_k, _factor, _other_data, _in_place, _other_parameter, _other_child, _other_activation]
)
@torch.no_grad()
def test_changed_after_a_call(kernel, calls, change):
    stock = deepseek()
    block, x = switched_on(kernel, stock), hidden_states(stock)
    before = block(x)
    for module in (stock, block):
        change(module)
    got = block(x)
    assert_same(got, stock(x))
    assert len(calls) == 2 and not torch.allclose(got, before)


def _exchanged_hooks(block):
    hooks = type(block.gate._forward_hooks)()
    block.gate._forward_hooks = hooks
    block.gate.register_forward_hook(lambda module, args, output: double(output))


def _exchanged_parameters(block):
    linear = block.shared_experts.up_proj
    linear.__dict__["_parameters"] = {"weight": nn.Parameter(linear.weight * 2), "bias": None}


def _exchanged_strides(block):
    weight = block.shared_experts.gate_proj.weight
    weight.data = weight.data.as_strided(weight.shape, (1, weight.shape[0]))


@pytest.mark.parametrize("change", [_exchanged_hooks, _exchanged_parameters, _exchanged_strides])
@torch.no_grad()
def test_changed_behind_its_back(kernel, change):
    stock = deepseek()
    block, x = switched_on(kernel, stock), hidden_states(stock)
    before = block(x)
    for module in (stock, block):
        change(module)
    got = block(x)
    assert_same(got, stock(x))
    assert not torch.allclose(got, before)


@torch.no_grad()
def test_hooks_on_all_modules(kernel, calls):
    stock = deepseek()
    block, x = switched_on(kernel, stock), hidden_states(stock)
    block(x)
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 2 if isinstance(module, nn.Linear) else None
    )
    try:
        assert_same(block(x), stock(x))
    finally:
        hook.remove()
    assert len(calls) == 1


@torch.no_grad()
def test_class_that_is_wrapped_later(kernel, monkeypatch):
    """Somebody's wrapper calls ours: what it does itself is not to be done twice."""
    stock = deepseek()
    block, x = switched_on(kernel, stock), hidden_states(stock)
    expected = 3 * stock(x)
    forward = DeepseekV3MoE.forward
    block.scale = 3.0
    monkeypatch.setattr(DeepseekV3MoE, "forward", lambda self, hidden_states: forward(self, hidden_states) * self.scale)
    assert_same(block(x), expected)
    assert_same(block(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [1.001, 1.05, 0.96])
@torch.no_grad()
def test_factors_near_one(kernel, factor, dtype):
    entry = next(entry for entry in block_classes() if entry.name == "BeamMoE")
    stock = stock_block(entry)
    stock.routed_scaling_factor = factor
    block = switched_on(kernel, stock.to(dtype))
    found = kernel.integration.block_trial.block_of(block, dtype)
    assert found is None or found.factor == factor
    x = hidden_states(stock)
    assert_same(block(x), stock(x), 1e-5 if dtype == torch.float32 else 0.03)


class Changed:
    """Forwards that a block of ours is not, told apart by what few inputs have."""

    def clamped(out, x):
        return out.clamp(-20, 20)

    def of_long_sequences(out, x):
        return out * 0.5 if x.shape[1] > 8 else out

    def of_large_numbers(out, x):
        return out * 0.5 if x.abs().max() > 30 else out

    def a_little_more(out, x):
        return out * 1.0005


@pytest.mark.parametrize("name", ["clamped", "of_long_sequences", "of_large_numbers", "a_little_more"])
def test_blocks_that_are_none_of_ours(kernel, name):
    change = getattr(Changed, name)

    class Block(DeepseekV3MoE):
        def forward(self, hidden_states):
            shared = self.shared_experts(hidden_states)
            _, weights, ids = self.gate(hidden_states)
            out = self.experts(hidden_states.view(-1, hidden_states.shape[-1]), ids, weights)
            return change(out.view_as(hidden_states) + shared, hidden_states)

    Block.__module__ = DeepseekV3MoE.__module__
    kernel.integration.stand_ins.meet(DeepseekV3MoE.__module__)
    kernel.integration.blocks.KIND.make_switchable(Block)
    for dtype in (torch.float32, torch.bfloat16):
        assert kernel.integration.block_trial.block_of(Block(deepseek_config()).to(dtype), dtype) is None


@pytest.mark.parametrize("bound", [16.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shared_experts_that_are_clamped(kernel, dtype, bound):
    class MLP(type(deepseek().shared_experts)):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=bound) * self.up_proj(x))

    assert kernel.integration.block_trial.shared_mlp_of(MLP(deepseek_config()), dtype) is None


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_of_shared_experts(kernel, dtype, activation):
    module = deepseek(hidden_act=activation).shared_experts.to(dtype)
    found = kernel.integration.block_trial.shared_mlp_of(module, dtype)
    assert found.activation == activation


@torch.no_grad()
def test_shapes_that_torch_broadcasts(kernel):
    """An up_proj of one row: nn.Linear's product is broadcast, a kernel would read beyond it."""
    stock = deepseek()
    stock.shared_experts.up_proj.weight = nn.Parameter(stock.shared_experts.up_proj.weight[:1].clone())
    block, x = switched_on(kernel, stock), hidden_states(stock)
    assert_same(block(x), stock(x))
    assert kernel.status(block)[""].endswith("around its own shared experts")


@torch.no_grad()
def test_another_forward_of_linear_layers(kernel, monkeypatch):
    stock = deepseek()
    block, x = switched_on(kernel, stock), hidden_states(stock)
    block(x)
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: forward(self, x) * 2)
    assert_same(block(x), stock(x))
    assert kernel.status(block)[""] != OURS


@torch.no_grad()
def test_traced(kernel):
    stock = deepseek()
    block, x = switched_on(kernel, stock), hidden_states(stock)
    assert_same(torch.jit.trace(block, (x,))(x), stock(x))


@torch.no_grad()
def test_another_forward_of_a_class(kernel, monkeypatch):
    """Somebody patches the MLP's class: the block asks that, not its linear layers."""
    stock = deepseek()
    block, x = switched_on(kernel, stock), hidden_states(stock)
    block(x)
    cls = type(block.shared_experts)
    forward = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, x: forward(self, x) * 2)
    assert_same(block(x), stock(x))
    assert kernel.status(block)[""] != OURS


def test_gradients_and_modes(kernel, calls, device):
    stock = deepseek().to(device)
    block, x = switched_on(kernel, stock, device), hidden_states(stock)
    losses = [module(x).square().sum() for module in (stock, block)]
    gradients = [torch.autograd.grad(loss, [*m.parameters()]) for loss, m in zip(losses, (stock, block))]
    assert not calls
    for a, b in zip(*gradients):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4 * a.abs().max().item())
    with torch.inference_mode():
        assert_same(block(x), stock(x))
    for module in (stock, block):
        module.requires_grad_(False)
    assert_same(block(x), stock(x))
    assert len(calls) == 2
    x.requires_grad_()
    block(x).sum().backward()
    assert len(calls) == 2 and x.grad is not None
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        torch.testing.assert_close(block(x), stock(x), rtol=0.1, atol=0.1)
    assert len(calls) == 2


@torch.no_grad()
def test_other_hidden_states(kernel, calls):
    """Of a dtype that the weights do not have, of another rank, none, and by keyword: as the class has them."""
    stock = deepseek()
    block, x = switched_on(kernel, stock), hidden_states(stock)
    for given in (x.double(), x[0]):
        try:
            expected = stock(given)
        except RuntimeError as error:
            with pytest.raises(RuntimeError, match=str(error)[:30]):
                block(given)
        else:
            assert_same(block(given), expected)
    assert_same(block(hidden_states=x), stock(x))
    assert not calls
    empty = x[:, :0]
    assert block(empty).shape == empty.shape


@pytest.mark.parametrize("form", ["fp8", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_codes(kernel, calls, device, dtype, form):
    """Routed experts in codes, shared ones as they are."""
    stock = deepseek(moe_intermediate_size=32, hidden_size=64).to(device, dtype)
    block, x = switched_on(kernel, stock, device), hidden_states(stock)
    if form == "fp8":  # as FP8Experts has them
        block.experts.block_size, block.experts.activation_scheme = (128, 128), "dynamic"
    quantize = getattr(kernel, f"quantize_{form}")
    for name in ("gate_up_proj", "down_proj"):
        codes, scale = quantize(getattr(block.experts, name))
        setattr(block.experts, name, nn.Parameter(codes, requires_grad=False))
        block.experts.register_parameter(f"{name}_scale_inv", nn.Parameter(scale, requires_grad=False))
    whole = block(x)
    assert len(calls) == 1 and kernel.status(block)[""] == OURS
    hook = block.gate.register_forward_hook(lambda *args: None)
    assert_same(block(x), whole, 1e-5 if dtype == torch.float32 else 2e-2)
    hook.remove()
    assert len(calls) == 1


# --- ways in and out --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_copies_and_pickles(kernel, calls):
    stock = deepseek()
    block, x = switched_on(kernel, stock), hidden_states(stock)
    expected = block(x)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(other(x), expected)
        other.experts.down_proj.zero_()
        assert torch.equal(block(x), expected)
    assert len(calls) == 5


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_block_is_let_go(kernel, is_wrapped):
    """Also one that a wrapper of its own forward, or a hook, refers to."""
    block = switched_on(kernel, deepseek())
    if is_wrapped:
        accelerate.hooks.add_hook_to_module(block, accelerate.hooks.ModelHook())
        block.experts.register_forward_hook(lambda *args, block=block: None)
    with torch.no_grad():
        block(hidden_states(block))
    reference = weakref.ref(block)
    del block
    gc.collect()
    assert reference() is None


@torch.no_grad()
def test_weights_are_let_go(kernel):
    """Offload takes them away after each forward."""
    block = switched_on(kernel, deepseek())
    x = hidden_states(block)
    block(x)
    references = [weakref.ref(parameter) for parameter in block.parameters()]
    for module in block.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"))
    del parameter
    gc.collect()
    assert not any(reference() is not None for reference in references)


@torch.no_grad()
def test_replicas(kernel, calls):
    """Of nn.DataParallel: copies of the attributes, with other parameters."""
    stock = deepseek()
    block, x = switched_on(kernel, stock), hidden_states(stock)
    block(x)
    replica = block._replicate_for_data_parallel()
    for name, child in block._modules.items():
        replica._modules[name] = copy.deepcopy(child)
    replica.experts.down_proj.mul_(2)
    stock.experts.down_proj.mul_(2)
    assert_same(replica(x), stock(x))
    assert len(calls) == 2


@pytest.mark.parametrize("make", [deepseek, qwen2], ids=["deepseek_v3", "qwen2_moe"])
def test_compiles_into_one_graph(kernel, device, make):
    torch.compiler.reset()
    block = switched_on(kernel, make().to(device), device)
    x, graphs, backend = hidden_states(block), [], COMPILE_BACKENDS[device]
    if device == "cpu":

        def backend(graph, inputs):
            graphs.append([str(node.target) for node in graph.graph.nodes])
            return graph

    with torch.no_grad():
        got = torch.compile(block, fullgraph=True, backend=backend)(x)
        assert_same(got, block(x))
    if device == "cpu":
        assert len(graphs) == 1 and sum("moe_block" in target for target in graphs[0]) == 1


@pytest.mark.parametrize("path", ["gate", "shared_experts.up_proj"])
def test_compiles_around_a_hook(kernel, calls, path):
    torch.compiler.reset()
    stock = deepseek()
    block, x = switched_on(kernel, stock), hidden_states(stock)
    for module in (stock, block):
        _hook(path)(module)
    with torch.no_grad():
        assert_same(torch.compile(block, backend="eager")(x), stock(x))
    assert len(calls) == (path != "gate")


def test_opcheck(kernel, device):
    block = switched_on(kernel, qwen2().to(device), device)
    router, gate_up, down, gate, shared = kernel.integration.blocks._made(block, hidden_states(block)).args()
    rows = hidden_states(block).flatten(0, 1)
    op = kernel.block._moe_block_op
    with torch.no_grad():
        library.opcheck(op, (rows, *router[:3], *gate_up, *down, *shared, *router.form, *gate))


def test_names(kernel, monkeypatch):
    for attribute in ("kernel_layer_name", "kernel_condition"):  # as they are
        monkeypatch.setattr(DeepseekV3MoE, attribute, getattr(DeepseekV3MoE, attribute, None), raising=False)
    assert DeepseekV3MoE.kernel_layer_name == "DeepseekV3MoE"
    assert GptOssMLP.kernel_layer_name == "MegaBlocksMoeMLP"
    for layout in (kernel.layers.DeepseekV3MoELayout, kernel.layers.MoEBlockLayout):
        block = layout(deepseek_config())
        assert type(block) is DeepseekV3MoE and isinstance(block, layout)
        kernelize(block, mode=Mode.INFERENCE, device="cpu")
        assert is_switched_on(kernel, block)


@torch.no_grad()
def test_name_of_transformers(kernel, calls):
    """Whatever `use_kernels` registers before, gpt-oss's block is ours."""
    from transformers.integrations.hub_kernels import register_kernel_mapping_transformers

    register_kernel_mapping_transformers()
    stock = tiny_block(GptOssMLP, nn.ModuleList([GptOssMLP(tiny_config("gpt_oss", GptOssConfig))]))
    kernel.integration.stand_ins.meet(GptOssMLP.__module__)
    block = copy.deepcopy(stock)
    kernelize(block, mode=Mode.INFERENCE, device="cpu")
    x = hidden_states(stock)
    assert_same(block(x), stock(x))
    assert len(calls) == 1


@pytest.mark.parametrize("when", ["before", "around", "never"])
@pytest.mark.parametrize("name", ["MegaBlocksMoeMLP", "DeepseekV3MoE"])
def test_mapping_of_the_user(kernel, name, when):
    """For a name that Transformers has, or its class: the user's, whenever it was made, comes before ours."""
    import kernels

    mapping = {name: {"cpu": {Mode.INFERENCE: Repository(Theirs)}}}
    with kernels.use_kernel_mapping(mapping if when == "before" else {}, inherit_mapping=False):
        kernel.register()
        kernel.register()
        block = deepseek()
        if name != "DeepseekV3MoE":
            block = tiny_block(GptOssMLP, nn.ModuleList([GptOssMLP(tiny_config("gpt_oss", GptOssConfig))]))
        kernel.integration.stand_ins.meet(type(block).__module__)
        with kernels.use_kernel_mapping(mapping if when == "around" else {}):
            kernelize(block, mode=Mode.INFERENCE, device="cpu")
    assert is_switched_on(kernel, block) == (when == "never")
    if when != "never":
        assert block(hidden_states(block)) == "theirs"
    assert kernel.status(block)[""] == (OURS if when == "never" else f"a forward of {Theirs.__module__}")


class TheirExperts(nn.Module):
    can_torch_compile = has_backward = True

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return -hidden_states


class TheirRouter(nn.Module):
    """Sends all tokens to expert 0."""

    can_torch_compile = has_backward = True

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        return x[:, :8], torch.ones(len(x), 2), torch.zeros(len(x), 2, dtype=torch.int64)


@pytest.mark.parametrize("when", ["before", "around", "after"])
@pytest.mark.parametrize(
    "path, name, layer", [("experts", "MoEExperts", TheirExperts), ("gate", "DeepseekV3TopkRouter", TheirRouter)]
)
@torch.no_grad()
def test_parts_of_another_library(kernel, calls, path, name, layer, when):
    """Whichever `kernelize` comes to first: the block is computed part by part, and theirs is one of them."""
    import kernels

    theirs = {name: {"cpu": {Mode.INFERENCE: Repository(layer)}}}
    with kernels.use_kernel_mapping(theirs if when == "before" else {}, inherit_mapping=False):
        kernel.register()
        block = deepseek()
        expected = copy.deepcopy(block)
        part, part_expected = getattr(block, path), getattr(expected, path)
        part_expected.forward = layer.forward.__get__(part_expected)
        with kernels.use_kernel_mapping(theirs if when == "around" else {}):
            kernelize(block, mode=Mode.INFERENCE, device="cpu")
        if when == "after":
            with kernels.use_kernel_mapping(theirs):
                kernelize(block, mode=Mode.INFERENCE, device="cpu")
    x = hidden_states(block)
    assert_same(block(x), expected(x))
    assert not calls and part.forward.__func__ is layer.forward
    served_by = kernel.status(block)
    assert served_by[""] == "Transformers, part by part"
    assert served_by[path] == f"a forward of {layer.__module__}"


def test_a_kernels_to_come(kernel, monkeypatch):
    """That keeps mappings elsewhere: our names are ours, Transformers' are left alone."""
    is_free = kernel.integration.mapping.is_free
    assert is_free("MoEExperts", False) and is_free("DeepseekV3MoE", False)
    with monkeypatch.context() as patch:
        patch.delattr(importlib.import_module("kernels.layer.kernelize"), "_KERNEL_MAPPING")
        assert is_free("MoEExperts", True) and not is_free("MegaBlocksMoeMLP", False)


def test_status_of_what_another_layer_computes(kernel):
    """Which a program put in the place of ours."""
    import kernels

    block = switched_on(kernel, deepseek())
    mapping = {
        name: {"cpu": {Mode.INFERENCE: Repository(Theirs)}} for name in ("DeepseekV3MoE", "DeepseekV3TopkRouter")
    }
    with kernels.use_kernel_mapping(mapping):
        kernelize(block, mode=Mode.INFERENCE, device="cpu")
    assert block(hidden_states(block)) == "theirs"
    served_by = kernel.status(block)
    assert served_by[""] == served_by["gate"] == f"a forward of {Theirs.__module__}"
    assert served_by["experts"] == OURS


@torch.no_grad()
def test_recorded_once(kernel, calls):
    """The hooks that Transformers then leaves on routers send nothing back in calls that record nothing."""
    stock = copy.deepcopy(model_of("qwen3_moe"))
    model = copy.deepcopy(stock)
    model.set_use_kernels(True)
    ids = torch.randint(2, 120, (2, 7), generator=torch.Generator().manual_seed(1))
    for options in ({}, {"output_router_logits": True}, {}, {"output_hidden_states": True}, {}):
        calls.clear()
        got, expected = model(input_ids=ids, **options), stock(input_ids=ids, **options)
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)
        assert got.keys() == expected.keys() and bool(calls) != bool(options)
        for name in ("router_logits", "hidden_states"):
            torch.testing.assert_close(got.get(name), expected.get(name), rtol=1e-4, atol=1e-4)
    assert any(module._forward_hooks for module in model.modules())
    assert OURS in {line for path, line in kernel.status(model).items() if path.endswith(".mlp")}
    # A program's own hook beside one of these, and in its place.
    router = next(module for name, module in model.named_modules() if name.endswith(".mlp.gate"))
    for is_alone in (False, True):
        if is_alone:
            model(input_ids=ids)
            router._forward_hooks.clear()
        seen = []
        handle = router.register_forward_hook(lambda *args, seen=seen: seen.append(args))
        for _ in range(2):
            model(input_ids=ids)
        assert len(router._forward_hooks) == (1 if is_alone else 2) and len(seen) == 2
        handle.remove()


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "qwen2_moe", "glm4_moe", "qwen3_moe"])
@torch.no_grad()
def test_in_a_model(kernel, calls, name):
    model = copy.deepcopy(model_of(name))
    ids = torch.randint(2, 120, (2, 7), generator=torch.Generator().manual_seed(1))
    expected = model(input_ids=ids).logits
    model.set_use_kernels(True)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    blocks = [module for module in model.modules() if kernel.integration.blocks.KIND.is_one(module)]
    assert len(calls) == len(blocks) > 0
    model(input_ids=ids, output_router_logits=True)
    assert len(calls) >= len(blocks)
    calls.clear()
    model.set_use_kernels(False)
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
    assert not calls


def test_forward_that_torch_sees(kernel):
    """FLOPs are those of the parts."""
    from torch.utils.flop_counter import FlopCounterMode

    block = switched_on(kernel, deepseek())
    x = hidden_states(block)
    counts = []
    for hooked in (False, True):
        if hooked:
            block.gate.register_forward_hook(lambda *args: None)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            block(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


# --- launches that are made again -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("make", [deepseek, qwen2], ids=["deepseek_v3", "qwen2_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 40])
@torch.no_grad()
def test_many_calls(kernel, make, dtype, tokens):
    """The third and later ones are replays: of new hidden states, and of weights that were written in place."""
    stock = make().to("cuda", dtype)
    block = switched_on(kernel, stock, "cuda")
    replayed, outputs = [], []
    for call in range(6):
        if call == 4:
            for module in (stock, block):
                for parameter in module.parameters():
                    parameter.mul_(1.25)
        x = torch.randn(1, tokens, hidden_dim(block), device="cuda", dtype=dtype)
        outputs.append((block(x), stock(x)))
        (decided,) = (value for name, value in vars(block).items() if name.startswith("_decided_by"))
        (replay,) = decided.kept[2][1]._replays.values()
        replayed.append(callable(replay) and call > 1)
    # Shared experts of many fp32 tokens are torch's.
    assert replayed == [False, False, *4 * [dtype == torch.bfloat16 or tokens == 1]]
    for got, expected in outputs:
        if dtype == torch.float32:
            assert_same(got, expected, 1e-4)
        else:  # where a token goes to another expert, it has another result
            near = ((got - expected).norm(dim=-1) < 0.02 * expected.norm(dim=-1)).float().mean()
            assert near >= 0.8


@pytest.mark.gpu
@torch.no_grad()
def test_replays_in_graphs_and_streams(kernel):
    stock = deepseek().cuda().bfloat16()
    block = switched_on(kernel, stock, "cuda")
    xs = [torch.randn(1, 1, hidden_dim(block), device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    expected = [block(x) for x in xs]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        side.wait_stream(torch.cuda.default_stream())
        torch.cuda._sleep(10**6)
        assert torch.equal(block(xs[0]), expected[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    x = xs[1].clone()
    with torch.cuda.graph(graph):
        out = block(x)
    for one, wanted in zip(xs, expected):
        x.copy_(one)
        graph.replay()
        assert torch.equal(out, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, launches", [(1, 4), (40, 8)])
@torch.no_grad()
def test_launches_of_a_replay(kernel, monkeypatch, tokens, launches):
    from torch.profiler import ProfilerActivity, profile

    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # by a launch of its own
    block = switched_on(kernel, deepseek().cuda().bfloat16(), "cuda")
    x = torch.randn(1, tokens, hidden_dim(block), device="cuda", dtype=torch.bfloat16)
    for _ in range(4):
        block(x)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        block(x)
        torch.cuda.synchronize()
    kernels = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len([event for event in kernels if not event.name.startswith("Mem")]) == launches
