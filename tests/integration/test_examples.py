"""examples/generate.py, every way in, and examples/demo.py; the others have files of their own."""

import re
import runpy

import pytest
import tokenizers
import transformers

from suite import ROOT
from tiny_models import NUM_MOE_LAYERS

pytestmark = pytest.mark.usefixtures("one_thread", "no_other_kernels")


@pytest.fixture(scope="module")
def checkpoint_with_tokenizer(checkpoint):
    words = tokenizers.models.WordLevel({"[UNK]": 0, "layers": 1}, unk_token="[UNK]")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words)).save_pretrained(checkpoint)
    return checkpoint


def run_example(name, *arguments, monkeypatch):
    monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


@pytest.mark.usefixtures("cpu_in_kernel_config", "kernel_config")
@pytest.mark.parametrize("way", ["use_kernels", "experts_implementation", "kernel_config"])
def test_generate_example(checkpoint_with_tokenizer, calls, monkeypatch, way):
    run_example("generate.py", checkpoint_with_tokenizer, way, monkeypatch=monkeypatch)
    assert len(calls) == 32 * NUM_MOE_LAYERS


def test_demo(checkpoint, calls, monkeypatch, capsys):
    run_example("demo.py", "--model", checkpoint, monkeypatch=monkeypatch)
    output = capsys.readouterr().out
    assert "replaced  2 layers: model.layers.1.mlp.experts model.layers.2.mlp.experts\n" in output
    assert float(re.search("max difference ([^;]+);", output)[1]) < 1e-4
    assert calls
    assert re.search(r"prefill +stock .* use_kernels .*x\)\ndecode +stock .* use_kernels .*x\)", output)
