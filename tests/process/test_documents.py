"""README.md and docs/ name what exists, and print the numbers that were measured."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

from documents import PAGES, snippets
from suite import PACKAGE, REPO_ID, ROOT

README, *DOCS = PAGES
DOCUMENTS = [*PAGES, ROOT / "CARD.md", ROOT / "CONTRIBUTING.md"]
by_name = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def without_code(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """Of each heading, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_code(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page):
    return re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8")))


@by_name
def test_links(document):
    for link in links(document):
        if link.startswith("https:"):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.is_file(), f"{document.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{document.name}: {link}"


@by_name
def test_files(document):
    """Whatever is written as a path of this checkout, in a command or elsewhere; tests by their names alone, too."""
    text = document.read_text(encoding="utf-8")
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("."))
    for path in re.findall(rf"(?<![\w./-])(?:{folders})/[\w./=,-]*\w\.(?:py|json|md|txt|toml|svg|yml)\b", text):
        assert (ROOT / path).is_file(), f"{document.name}: {path}"
    assert set(re.findall(r"\btest_\w+\.py", text)) <= {path.name for path in (ROOT / "tests").rglob("*.py")}


@by_name
def test_make_targets(document):
    rules = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    known = {name for rule in rules for name in rule.split()}
    text = document.read_text(encoding="utf-8")
    named = re.findall(r"(?:^|`)make (?:[A-Z]+=\S+ )*([a-z]+)", text, re.MULTILINE)
    assert set(named) <= known, document.name


def public_names():
    for node in ast.parse((PACKAGE / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
            return set(ast.literal_eval(node.value))


@by_name
def test_names_of_the_package(document):
    text = document.read_text(encoding="utf-8")
    names = set(re.findall(r"\bmoe\.(\w+)\b(?!\.)", text)) - {"py", "__file__"}
    assert names <= public_names()
    if document.name in ("README.md", "CARD.md", "use.md"):
        assert names, "no use of the API found: the examples should call it `moe`"
    layers = {node.name for node in ast.parse((PACKAGE / "layers.py").read_text()).body if hasattr(node, "name")}
    assert set(re.findall(rf"{REPO_ID}:(\w+)", text)) <= layers


def test_environment_variables():
    variable = re.compile(r"\bMOE_GROUPED_GEMM_[A-Z_]+")
    read = {name for path in PACKAGE.rglob("*.py") for name in variable.findall(path.read_text(encoding="utf-8"))}
    named = {name for document in DOCUMENTS for name in variable.findall(document.read_text(encoding="utf-8"))}
    assert named == read and read


@by_name
def test_version(document):
    version = re.search(r"^version = (\d+)$", (ROOT / "build.toml").read_text(), re.MULTILINE)[1]
    versions = re.findall(r"get_kernel\([^)]*version=(\d+)", document.read_text(encoding="utf-8"))
    assert set(versions) <= {version}


def test_readme_is_one_page():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert {f"docs/{page.name}" for page in DOCS} <= set(links(README))


@pytest.mark.parametrize("page", DOCS, ids=lambda path: path.name)
def test_a_page_begins_with_what_it_is_about(page):
    title, empty, sentence = page.read_text(encoding="utf-8").splitlines()[:3]
    assert title.startswith("# ") and empty == "" and re.match("[A-Z][a-z]* ", sentence)


def sources(*folders):
    """All string literals: neighbours joined, what is filled in replaced by "..."."""
    texts = []
    for path in [path for folder in folders for path in Path(folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_messages():
    """Whatever troubleshooting quotes of this kernel is in its sources, give or take what is filled in."""
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    quoted = [
        text for row in re.findall(r"^\| (`.*?) \| ", page, re.MULTILINE) for text in re.findall("`([^`]+)`", row)
    ]
    ours = [
        text for text in quoted if re.search("moe|Triton cannot|Heuristic|wants kernels", text) and "org/" not in text
    ]
    assert len(ours) > 7
    texts = sources(PACKAGE)
    for message in ours:
        parts = [part.strip(" .,'") for part in re.split(r"\.\.\.|3\.6|: ", message)]
        for part in filter(None, parts):
            assert any(part in text for text in texts), message


def test_tables_are_of_the_measurements(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "plot", raising=False)
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks/tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert tables.TABLE.search(text)
        assert tables.written(text) == text, f"{page.name}: benchmarks/tables.py writes it"


def test_snippets_are_found():
    assert all(snippets(page) for page in (README, ROOT / "docs/use.md", ROOT / "docs/formats.md"))
