"""Switching on and off: every way into a model, in every situation that a program puts a model in.

One table. Each situation gets a model that this kernel serves, and a stock one with the same weights; it returns pairs
of models that must agree, with the number of layers that this kernel is to compute in the first.
"""

import copy
import io
import subprocess
import sys
from contextlib import contextmanager
from types import MethodType, SimpleNamespace

import accelerate
import pytest
import torch
from kernels import Mode, kernelize, use_kernel_mapping
from transformers import AutoModelForCausalLM, KernelConfig
from transformers.models.deepseek_v3 import modeling_deepseek_v3

from tiny_models import NUM_MOE_LAYERS, experts_of, is_switched_on, prompt

INTERFACE = "moe_grouped_gemm"
WAYS = ["kernel_config", "use_kernels", "by_name"]
ALL = NUM_MOE_LAYERS

pytestmark = pytest.mark.usefixtures(
    "one_thread", "no_other_kernels", "registered", "loadable_by_kernel_config", "cpu_in_kernel_config"
)


def load(path, way=None, **kwargs):
    """Stock, if no way is given."""
    if way == "by_name":
        kwargs["experts_implementation"] = INTERFACE
    elif way is not None:
        kwargs["use_kernels"] = True
    if way == "kernel_config":
        kwargs["kernel_config"] = KernelConfig({"DeepseekV3Experts": "org/moe-grouped-gemm:MoEExperts"})
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **kwargs)


def logits(model):
    with torch.no_grad():
        return model(prompt()).logits


# What does not last longer than one situation.


def deepcopied(model, stock, way):
    clone = copy.deepcopy(model)
    for weight in model.parameters():
        torch.nn.init.zeros_(weight)
    yield clone, stock, ALL


def pickled(model, stock, way):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    yield torch.load(file, weights_only=False), stock, ALL


def replica(model):
    """As nn.DataParallel makes one for another device; here its weights are doubled."""
    take_off_what_kernelize_bound(model)
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, copied in copies.items():
        for name, child in module._modules.items():
            copied._modules[name] = copies.get(child)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            copied._buffers.pop(name, None)
            copied.__dict__[name] = tensor if tensor is None else 2 * tensor.detach()
    return copies[model]


def take_off_what_kernelize_bound(model):
    """Of layers that are not ours: in a replica a bound method goes on with the weights of the original."""
    for module in model.modules():
        module.__dict__.pop("forward", None)


def replicated(model, stock, way):
    yield replica(model), replica(stock), ALL


def of_one_config(model, stock, way):
    """A second model from the same config object; the name of an implementation stands in that."""
    second = type(model)(model.config).eval()
    second.load_state_dict(model.state_dict())
    yield second, stock, ALL if way == "by_name" else 0
    yield model, stock, ALL


def trained(model, stock, way):
    yield model.train(), stock, ALL
    yield model.eval(), stock, ALL


def moved(model, stock, way):
    """To "meta" and back; buffers that no checkpoint has, too."""
    model.to("meta").to_empty(device="cpu")
    model.load_state_dict(stock.state_dict())
    for name, buffer in model.named_buffers():
        buffer.copy_(stock.get_buffer(name))
    yield model, stock, ALL


def kernels_off(model, stock, way):
    model.set_use_kernels(False)
    yield model.train().eval(), stock, ALL if way == "by_name" else 0
    if way != "by_name":
        model.set_use_kernels(True)
        yield model, stock, ALL


def kernels_off_by_property(model, stock, way):
    model.use_kernels = False
    yield model, stock, ALL if way == "by_name" else 0


def another_implementation(model, stock, way):
    model.set_experts_implementation({"of_no_part": "eager"})
    yield model, stock, ALL
    for implementation in ("eager", "grouped_mm", {"": "batched_mm"}):
        model.set_experts_implementation(implementation)
        yield model.train().eval(), stock, 0  # which kernelizes again
        name = implementation[""] if isinstance(implementation, dict) else implementation
        assert model.get_experts_implementation() == {"": name}
    model.set_experts_implementation(INTERFACE)
    yield model, stock, ALL


def generating(model, stock, way):
    """`generate` on a GPU changes grouped_mm for batched_mm while it decodes: no choice of the user's."""
    with on_a_gpu(type(model)), model._optimize_model_for_decode():
        yield model, stock, ALL
    yield model, stock, ALL


@contextmanager
def on_a_gpu(cls):
    device, cls.device = cls.device, torch.device("cuda")
    try:
        yield
    finally:
        cls.device = device


def hooked(model, stock, way):
    """accelerate's hook, which stays when `kernelize` comes again, and is taken off."""
    for experts in experts_of(model):
        hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu")
        accelerate.hooks.add_hook_to_module(experts, hook)
        forward = experts.forward
        kernelize(experts, mode=Mode.TRAINING, device="cpu")
        kernelize(experts, mode=Mode.INFERENCE, device="xpu")  # nothing is mapped there
        assert experts.forward is forward
    yield model, stock, ALL
    for experts in experts_of(model):
        accelerate.hooks.remove_hook_from_module(experts)
        assert experts.forward.__func__ is type(experts).forward
    yield model, stock, ALL


def wrapped(model, stock, way):
    """As expert and tensor parallelism wrap a forward, for good."""
    seen = []
    for experts in experts_of(model):
        experts.forward = lambda *args, forward=experts.forward: seen.append(forward) or forward(*args)
    if way == "use_kernels":
        model.set_use_kernels(True)
    yield model, stock, ALL
    assert len(seen) == NUM_MOE_LAYERS


def zero_3(model, stock, way):
    """ZeRO-3 leaves nothing of a weight outside of its module's forward; `kernelize` finds it empty."""
    weights = {}
    for experts in experts_of(model):
        for weight in experts.parameters():
            weights[weight], weight.data = weight.data, torch.empty(0)
        experts.register_forward_pre_hook(lambda module, _: fill(module, weights.get))
        experts.register_forward_hook(lambda module, *_: fill(module, lambda _: torch.empty(0)))
    if way == "use_kernels":
        model.set_use_kernels(False)
        model.set_use_kernels(True)
    yield model, stock, ALL


def fill(module, data):
    for weight in module.parameters():
        weight.data = data(weight)


def negated(self, hidden_states, top_k_index, top_k_weights):
    return -hidden_states


def patched_class(model, stock, way):
    """Another library's forward, put on the class after ours: the last word. The mark stays and is not in its way."""
    cls = modeling_deepseek_v3.DeepseekV3Experts
    ours, cls.forward = cls.forward, negated
    try:
        yield model, stock, 0
        kernelize(model, mode=Mode.INFERENCE, device="cpu")
        yield model, stock, 0
    finally:
        cls.forward = ours
    yield model, stock, ALL


def patched_module(model, stock, way):
    for experts in (*experts_of(model), *experts_of(stock)):
        experts.forward = MethodType(negated, experts)
    yield model, stock, 0
    kernelize(model, mode=Mode.INFERENCE, device="cpu")
    yield model, stock, 0


class Negated(torch.nn.Module):
    can_torch_compile = True
    forward = negated


class Layer:
    """A repository of `kernels` with a layer of another library."""

    def load(self):
        return Negated


LAYER = Layer()


def kernelize_with(mapping, model):
    with use_kernel_mapping(mapping, inherit_mapping=False):
        kernelize(model, mode=Mode.INFERENCE, device="cpu")


def another_layer(model, stock, way):
    """Of another library, by `kernelize`: the last one that it is told to take serves."""
    layers = {modeling_deepseek_v3.DeepseekV3Experts.kernel_layer_name: {"cpu": LAYER}}
    kernelize_with(layers, model)
    kernelize_with(layers, stock)
    yield model, stock, 0
    kernelize_with({}, stock)
    kernelize(model, mode=Mode.INFERENCE, device="cpu")
    yield model, stock, ALL
    kernelize_with(layers, model)
    kernelize_with({}, model)
    yield model, stock, ALL


def weights_that_we_do_not_compute(model, stock, way):
    """What was there before serves, with one warning; by name, Transformers' default."""
    stock.set_experts_implementation("eager")
    if way != "by_name":
        model.config._experts_implementation_internal = "eager"
    for experts in (*experts_of(model), *experts_of(stock)):
        experts.double()
        experts.register_forward_pre_hook(lambda _, args: (args[0].double(), *args[1:]))
        experts.register_forward_hook(lambda _, args, out: out.float())
    with pytest.warns(UserWarning, match="does not serve DeepseekV3Experts, as gate_up_proj is torch.float64") as said:
        logits(model)
    assert len(said) == 1
    yield model, stock, 0


def experts_inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 64, generator=generator, dtype=dtype)
    return x, torch.randint(0, 8, (5, 2), generator=generator), torch.rand(5, 2, generator=generator)


SITUATIONS = [
    deepcopied,
    pickled,
    replicated,
    of_one_config,
    trained,
    moved,
    kernels_off,
    kernels_off_by_property,
    another_implementation,
    generating,
    hooked,
    wrapped,
    zero_3,
    patched_class,
    patched_module,
    another_layer,
    weights_that_we_do_not_compute,
]


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.__name__)
@pytest.mark.parametrize("way", WAYS)
def test_ways_in_situations(checkpoint, kernel, record, way, situation):
    kernel.integration.modules._warn.cache_clear()
    stock = load(checkpoint)
    model = load(checkpoint, way)
    calls = record(kernel.integration.modules, "_experts")
    for ours, expected, served in situation(model, stock, way):
        calls.clear()
        torch.testing.assert_close(logits(ours), logits(expected), rtol=1e-4, atol=1e-4)
        assert len(calls) == served
        lines = [line for name, line in kernel.status(ours).items() if name.endswith(".experts")]
        assert sum(line.split(",")[0] == INTERFACE for line in lines) == served, lines


@pytest.mark.parametrize("way", WAYS)
def test_compiled_it_is_served_as_well(checkpoint, kernel, device, way):
    """By the op in the graph: results alone would be stock's, too."""
    experts = experts_of(load(checkpoint, way).to(device))[0]
    targets = []

    def backend(module, inputs):
        targets.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(experts, fullgraph=True, backend=backend)(*(x.to(device) for x in experts_inputs()))
    assert sum(".moe_experts." in target for target in targets) == 1, targets


@pytest.mark.parametrize("device", ["xpu", "mps", "npu"])
def test_a_device_without_a_mapping(checkpoint, kernel, device):
    model = load(checkpoint)
    kernelize(model, mode=Mode.INFERENCE, device=device)
    assert not any(is_switched_on(kernel, module) for module in model.modules())
    assert model.get_experts_implementation() == load(checkpoint).get_experts_implementation()


@pytest.mark.parametrize("device", ["xpu", "mps"])
def test_a_model_that_moved_to_a_device_that_we_do_not_know(checkpoint, kernel, device):
    module = experts_of(load(checkpoint, "use_kernels"))[0]
    weight = SimpleNamespace(ndim=3, shape=(1, 1, 1), device=torch.device(device), dtype=torch.bfloat16)
    weights = kernel.integration.modules.Weights(weight, weight, (None, None), (None, None))
    assert kernel.integration.modules.obstacle(module, weights) == f"gate_up_proj is on {device}"


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["use_kernels", "by_name"])
def test_cuda_without_triton(checkpoint, kernel, monkeypatch, way):
    stock = load(checkpoint, device_map="cuda")
    model = load(checkpoint, way, device_map="cuda")
    kernel.integration.modules._warn.cache_clear()
    monkeypatch.setattr(kernel.gpu, "missing_triton", lambda: "Triton is missing")
    with torch.no_grad(), pytest.warns(UserWarning, match="as Triton is missing") as warnings:
        torch.testing.assert_close(model(prompt().cuda()).logits, stock(prompt().cuda()).logits)
    assert len(warnings) == 1


@pytest.mark.gpu
def test_data_parallel(checkpoint):
    """What Trainer does by itself when one process sees several GPUs; with one, replicas share it."""
    devices = [0, torch.cuda.device_count() - 1]
    ids = torch.randint(0, 128, (4, 9), generator=torch.Generator().manual_seed(1)).cuda()
    stock, model = (load(checkpoint, way).cuda() for way in (None, "use_kernels"))
    take_off_what_kernelize_bound(model)
    with torch.no_grad():
        replicas = torch.nn.parallel.replicate(model, devices)
        out = [replica(ids.to(device)).logits.cuda(0) for replica, device in zip(replicas, devices)]
        for result in out:
            torch.testing.assert_close(result, stock(ids).logits, rtol=1e-3, atol=1e-3)


ELSEWHERE = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
assert not any("moe_grouped_gemm" in name for name in sys.modules)
torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


def test_pickled_into_a_process_that_knows_nothing_of_this_kernel(checkpoint, tmp_path):
    model = load(checkpoint, "use_kernels")
    paths = [tmp_path / name for name in ("model", "ids", "out")]
    torch.save(model, paths[0])
    torch.save(prompt(), paths[1])
    subprocess.run([sys.executable, "-c", ELSEWHERE, *paths], check=True)
    torch.testing.assert_close(torch.load(paths[2]), logits(model), rtol=1e-4, atol=1e-4)


def test_each_parameter_is_read_once(checkpoint, record, kernel):
    """A parametrized one is computed at every read, and may change with it; stock's grouped_mm reads once, too."""

    class Counted(torch.nn.Module):
        reads = 0

        def forward(self, weight):
            type(self).reads += 1
            return 2 * weight

    experts = experts_of(load(checkpoint, "use_kernels"))[0]
    doubled = copy.deepcopy(experts)
    with torch.no_grad():
        doubled.gate_up_proj *= 2
    torch.nn.utils.parametrize.register_parametrization(experts, "gate_up_proj", Counted())
    Counted.reads = 0
    torch.testing.assert_close(experts(*experts_inputs()), doubled(*experts_inputs()))
    assert Counted.reads == 1
    assert kernel.integration.modules.peek(experts) is None and Counted.reads == 1
