"""Models in Transformers: the ways in, and what a way leaves behind in a process."""

import pytest
import quantize_checkpoint
import torch
from transformers import AutoModelForCausalLM, KernelConfig
from transformers.integrations import moe
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.monkey_patching import clear_patch_mapping
from transformers.utils import kernel_config as transformers_kernel_config

from peft_models import adapted
from tiny_models import BY_NAME, HUB_NAME, INTERFACE, deepseek_v3_config, load, save_deepseek_v3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("deepseek-v3")
    save_deepseek_v3(path)
    return path


@pytest.fixture
def calls(kernel, record):
    """The arguments of every call of `moe_experts`: what proves that a model runs on this kernel."""
    return record(kernel.functional, "moe_experts")


@pytest.fixture
def routers_on_cpu(kernel, monkeypatch):
    """Where they keep their own forward, in order to test here what a GPU's do."""
    monkeypatch.setattr(kernel.integration.routers, "SERVES_CPU", True)


@pytest.fixture
def blocks_on_cpu(kernel, routers_on_cpu, monkeypatch):
    monkeypatch.setattr(kernel.integration.blocks, "SERVES_CPU", True)


@pytest.fixture(autouse=True)
def part_by_part(kernel, monkeypatch, request):
    """Most tests are of parts, and count calls of them: on a GPU, too, nothing that takes a shorter way."""
    if "blocks_on_cpu" not in request.fixturenames:
        monkeypatch.setattr(kernel.integration.blocks, "SERVES_GPU", False)
        monkeypatch.setattr(kernel.integration.modules, "REPEATS_ON_GPU", False)


@pytest.fixture
def repeated_on_cpu(kernel, monkeypatch):
    """Experts modules take a GPU's way, where what was decided once is not asked again, and the long one beside it."""
    modules = kernel.integration.modules
    again = modules._computed_again

    def both(module, *inputs):
        out = again(module, *inputs)
        if out is not None:
            expected = modules._compute(modules.read(module), *inputs, module.training)
            assert torch.equal(out.nan_to_num(), expected.nan_to_num())
        return out

    monkeypatch.setattr(modules, "REPEATS_ON_CPU", True)
    monkeypatch.setattr(kernel.integration.blocks, "REPEATS_ON_CPU", True)
    monkeypatch.setattr(kernel.block, "_on_gpu", kernel.block._on_cpu)
    monkeypatch.setattr(modules, "_computed_again", both)
    monkeypatch.setattr(modules.ops, "forward_on_gpu", modules.ops.forward_on_cpu)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)


@pytest.fixture
def unregistered(monkeypatch):
    """As in a process that never called register()."""
    monkeypatch.delattr(modeling_deepseek_v3.DeepseekV3Experts, "kernel_layer_name", raising=False)
    monkeypatch.delitem(moe.ALL_EXPERTS_FUNCTIONS._global_mapping, INTERFACE, raising=False)


@pytest.fixture
def kernel_config(unregistered, kernel, loadable_by_kernel_config):
    """A KernelConfig as users write it."""
    return KernelConfig({"DeepseekV3Experts": HUB_NAME})


@pytest.fixture
def loadable_by_kernel_config(monkeypatch):
    """The Hub, unreachable here, would resolve the version to its branch. What a load leaves behind is taken back."""
    monkeypatch.setattr("kernels.layer.layer.select_revision_or_version", lambda **_: "v1")
    yield
    clear_patch_mapping()


@pytest.fixture
def cpu_in_kernel_config(monkeypatch):
    """Lets way 1 run on a CPU, too: Transformers refuses it by this list alone."""
    devices = [*transformers_kernel_config.KERNELS_SUPPORTED_DEVICE_TYPES, "cpu"]
    monkeypatch.setattr(transformers_kernel_config, "KERNELS_SUPPORTED_DEVICE_TYPES", devices)


@pytest.fixture
def pair(checkpoint):
    """(ours, stock), with the same adapters of PEFT."""

    def pair(way=BY_NAME, **configs):
        return adapted(load(checkpoint, **way), **configs), adapted(load(checkpoint), **configs)

    return pair


@pytest.fixture
def quantize(monkeypatch):
    """examples/quantize_checkpoint.py with these arguments."""

    def quantize(*arguments):
        monkeypatch.setattr("sys.argv", ["quantize_checkpoint.py", *map(str, arguments)])
        quantize_checkpoint.main()

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
