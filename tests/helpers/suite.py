"""What the whole suite shares: the checkout and the package in it, the kernel's name, torch.compile's backends."""

from pathlib import Path

import pytest

HELPERS = Path(__file__).resolve().parent
ROOT = HELPERS.parent.parent
PACKAGE = ROOT / "torch-ext/moe_grouped_gemm"
FILES = [
    pytest.param(path, id=str(path.relative_to(PACKAGE)))
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "_ops.py"  # kernel-builder leaves it here
]
REPO_ID = "org/moe-grouped-gemm"

# Of torch.compile. No C++ compiler is needed on the CPU; on a GPU it is the default.
COMPILE_BACKENDS = {"cpu": "aot_eager", "cuda": "inductor"}
