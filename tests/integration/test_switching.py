"""Switching on and off: every way into a model, in every situation that a program puts a model in.

One table. Each situation gets a model that this kernel serves, and a stock one with the same weights; it returns pairs
of models that must agree, with the number of layers that this kernel is to compute in the first.
"""

import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from kernels import Mode, kernelize
from transformers import KernelConfig

import tiny_models
from situations import SITUATIONS, logits, take_off_what_kernelize_bound
from tiny_models import HUB_NAME, INTERFACE, experts_of, is_switched_on, prompt

WAYS = ["kernel_config", "use_kernels", "by_name"]

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
        kwargs["kernel_config"] = KernelConfig({"DeepseekV3Experts": HUB_NAME})
    elif way == "kernel_config_of_blocks":
        kwargs["kernel_config"] = KernelConfig({"DeepseekV3MoE": HUB_NAME.replace("MoEExperts", "DeepseekV3MoE")})
    return tiny_models.load(path, **kwargs)


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.__name__)
@pytest.mark.parametrize("way", WAYS)
def test_ways_in_situations(checkpoint, kernel, record, way, situation):
    stock = load(checkpoint)
    model = load(checkpoint, way)
    calls = record(kernel.integration.modules, "_compute")
    for ours, expected, served in situation(model, stock, way):
        calls.clear()
        torch.testing.assert_close(logits(ours), logits(expected), rtol=1e-4, atol=1e-4)
        assert len(calls) == served
        lines = [line for name, line in kernel.status(ours).items() if name.endswith(".experts")]
        assert sum(line.split(",")[0] == INTERFACE for line in lines) == served, lines


# Or off; a replica's weights are no parameters.
PART_BY_PART = {
    "wrapped",
    "zero_3",
    "patched_module",
    "weights_that_we_do_not_compute",
    "replicated",
    "kernels_off_by_property",
}


@pytest.mark.usefixtures("blocks_on_cpu", "repeated_on_cpu")
@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.__name__)
@pytest.mark.parametrize("way", ["use_kernels", "kernel_config_of_blocks"])
def test_blocks_in_situations(checkpoint, kernel, record, way, situation):
    """Whole or part by part, in the first call and where a decision is remembered."""
    stock = load(checkpoint)
    model = load(checkpoint, way)
    calls = record(kernel.integration.modules, "_compute")
    whole = record(kernel.integration.blocks, "moe_block")
    logits(model)
    assert (len(calls), len(whole)) == (0, tiny_models.NUM_MOE_LAYERS)
    went_whole = 0
    for ours, expected, served in situation(model, stock, way):
        for _ in range(1 if situation.__name__ == "wrapped" else 2):  # which counts for itself
            calls.clear()
            whole.clear()
            torch.testing.assert_close(logits(ours), logits(expected), rtol=1e-4, atol=1e-4)
            assert len(calls) + len(whole) == served
            went_whole += len(whole)
    assert bool(went_whole) == (situation.__name__ not in PART_BY_PART)


def experts_inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 64, generator=generator, dtype=dtype)
    return x, torch.randint(0, 8, (5, 2), generator=generator), torch.rand(5, 2, generator=generator)


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
    modules = kernel.integration.modules
    experts = modules.read(module)._replace(gate_up=modules.Projection(weight))
    assert modules.obstacle(module, experts) == f"gate_up_proj is on {device}"


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["use_kernels", "by_name"])
def test_cuda_without_triton(checkpoint, kernel, monkeypatch, way):
    stock = load(checkpoint, device_map="cuda")
    model = load(checkpoint, way, device_map="cuda")
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
