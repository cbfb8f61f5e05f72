"""The Python in README.md and docs/ runs as it is printed, page by page, with small models in the Hub's place."""

import runpy
import shutil

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from documents import PAGES, snippets
from suite import ROOT
from tiny_models import deepseek_v3_config

QWEN, DEEPSEEK = "Qwen/Qwen3-30B-A3B", "deepseek-ai/DeepSeek-V3"

pytestmark = pytest.mark.usefixtures(
    "one_thread", "no_other_kernels", "hub", "cpu_in_kernel_config", "loadable_by_kernel_config"
)


def qwen3_moe_config():
    return Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_experts=8,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
    )


def save(config, path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(path)


def quantize(path, out):
    """By the example, to the format in which DeepSeek publishes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["quantize_checkpoint.py", "--linear", str(path), str(out)])
        runpy.run_path(str(ROOT / "examples/quantize_checkpoint.py"), run_name="__main__")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache as the Hub's client leaves it: small models under the names of those that the pages load."""
    cache = tmp_path_factory.mktemp("hub")
    made = tmp_path_factory.mktemp("made")
    save(qwen3_moe_config(), made / QWEN)
    config = deepseek_v3_config()
    config.hidden_size, config.moe_intermediate_size = 256, 128  # blocks of scales are 128 x 128
    save(config, made / "bf16")
    quantize(made / "bf16", made / DEEPSEEK)
    for name in (QWEN, DEEPSEEK):
        repo = cache / f"models--{name.replace('/', '--')}"
        shutil.move(made / name, repo / "snapshots/0")
        (repo / "refs").mkdir()
        (repo / "refs/main").write_text("0")
    return cache


@pytest.fixture
def hub(cache, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)  # a Trainer writes here


@pytest.fixture
def calls(kernel, record):
    """Of every experts module that this kernel computes, with adapters or without."""
    return record(kernel.integration.modules, "_compute")


def run(page, namespace, calls):
    """Every model that a snippet makes has to compute its experts with this kernel."""
    for line, code in snippets(page):
        before = namespace.get("model")
        exec(compile("\n" * line + code, page.name, "exec"), namespace)
        model = namespace.get("model")
        if isinstance(model, torch.nn.Module) and model is not before:
            calls.clear()
            model(input_ids=torch.tensor([[1, 2, 3]], device=model.device))
            assert calls, f"{page.name}:{line}: nothing ran on the kernel"


@pytest.fixture
def dataset():
    tokens = torch.randint(0, 128, (2, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in tokens]


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda page: page.name)
def test_snippets(page, kernel, calls, dataset, monkeypatch, capsys):
    loaded = []
    if page.name == "parallel.md":  # for eight processes; tests/integration/test_distributed.py shares a model
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name, **kwargs: loaded.append(kwargs))
    namespace = {"dataset": dataset}
    if page.name in ("troubleshooting.md", "tuning.md"):  # about a model of the reader's
        namespace |= {"moe": kernel, "model": AutoModelForCausalLM.from_pretrained(QWEN)}
    tuned = []
    if page.name == "tuning.md":  # for a GPU; tests/kernels/test_tuner.py tunes
        monkeypatch.setattr(kernel, "tune", lambda layers, folder: tuned.append(layers))
    run(page, namespace, calls)
    if page.name == "tuning.md":
        assert tuned == [namespace["model"], [(64, 2048, 1408, 6)]]
    if loaded:
        config = loaded[0]["distributed_config"]
        assert isinstance(config, transformers.distributed.DistributedConfig) and config.ep_size == 8
    if page.name == "README.md":
        printed = "model.layers.0.mlp.experts moe_grouped_gemm"
        assert printed in page.read_text() and printed in capsys.readouterr().out.splitlines()
