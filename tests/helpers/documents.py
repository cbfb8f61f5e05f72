"""README.md and the pages of docs/, and what is in them."""

from __future__ import annotations

import re
from pathlib import Path

from suite import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def snippets(page: Path) -> list[tuple[int, str]]:
    """(number of lines before it, code) of each block of Python."""
    text = page.read_text(encoding="utf-8")
    blocks = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text[: block.start(1)].count("\n"), block[1]) for block in blocks]
