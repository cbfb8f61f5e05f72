"""The page of the Hub: CARD.md with its placeholders filled in."""

import re
import runpy
import sys

import pytest
import yaml
from jinja2 import Environment, meta

from oracle import layer
from suite import REPO_ID, ROOT

# What kernel-builder knows, too: it renders the card of a release.
PLACEHOLDERS = {"repo_id", "version", "functions", "layers", "has_benchmark", "upstream", "source", "license"}


@pytest.fixture(scope="module")
def publish():
    sys.path.insert(0, str(ROOT / "scripts"))
    yield runpy.run_path(str(ROOT / "scripts/publish.py"))
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def card(publish):
    return publish["render_card"](REPO_ID)


def section(card, title):
    return re.search(rf"## {title}\n(.*?)(\n## |\Z)", card, re.DOTALL)[1]


def test_placeholders():
    assert meta.find_undeclared_variables(Environment().parse((ROOT / "CARD.md").read_text())) <= PLACEHOLDERS


def test_front_matter(card):
    front_matter = yaml.safe_load(card.split("---\n")[1])
    assert (front_matter["library_name"], front_matter["license"]) == ("kernels", "apache-2.0")
    assert "{{" not in card and "{%" not in card


def test_names(card, kernel):
    functions = re.findall("- `(.*)`\n", section(card, "Functions, classes and modules"))
    layers = re.findall("- `(.*)`\n", section(card, "Layers"))
    assert sorted([*functions, "layers"]) == sorted(kernel.__all__)
    assert layers == [name for name, value in vars(kernel.layers).items() if is_public_class(value, name, kernel)]


def is_public_class(value, name, kernel):
    return isinstance(value, type) and value.__module__ == kernel.layers.__name__ and not name.startswith("_")


def test_benchmark_and_source(card):
    assert f"hf download {REPO_ID} --type kernel --revision v1 " in section(card, "Benchmark")
    assert section(card, "Source").strip().startswith("https://")


def test_variants(card, publish):
    assert set(re.findall(r"`(torch-\w+)`", section(card, "Variants"))) == set(publish["build"].variants())


def test_a_part_without_content_is_left_out(publish, monkeypatch):
    monkeypatch.setitem(publish["render_card"].__globals__, "public_names", lambda: ([], []))
    card = publish["render_card"](REPO_ID)
    assert "## Functions" not in card and "## Layers" not in card and "## Variants" in card


def test_use_runs_as_printed(card, kernel, registered):
    names = ("hidden_states", "top_k_index", "top_k_weights", "gate_up_proj", "down_proj")
    variables = dict(zip(names, layer(5, 4, 2, 16, 12)))
    exec(section(card, "Use").split("```python\n")[1].split("```")[0], variables)
    expected = kernel.reference.moe_experts(*(variables[name] for name in names))
    assert variables["out"].equal(expected)
