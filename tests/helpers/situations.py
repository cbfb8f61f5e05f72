"""What a program does to a model, for test_switching.py: SITUATIONS, and what they are made of.

Each takes a model that this kernel serves, a stock one with the same weights, and the way in; it yields pairs of models
that must agree, with the number of layers that this kernel is to compute in the first. What it changes in the process
does not last longer.
"""

import copy
import io
from contextlib import contextmanager
from types import MethodType

import accelerate
import pytest
import torch
from kernels import Mode, kernelize, use_kernel_mapping
from transformers.models.deepseek_v3 import modeling_deepseek_v3

from tiny_models import INTERFACE, NUM_MOE_LAYERS, experts_of, prompt

ALL = NUM_MOE_LAYERS


def logits(model):
    """On the CPU, whatever device a situation has the model name."""
    with torch.no_grad():
        return model(prompt()).logits


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


class Theirs(torch.nn.Module):
    """For routers and blocks, which are given hidden states alone."""

    def forward(self, hidden_states):
        return "theirs"


class Repository:
    """Of `kernels`, with a layer of another library."""

    def __init__(self, layer):
        self.layer = layer

    def load(self):
        return self.layer


LAYER = Repository(Negated)


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
