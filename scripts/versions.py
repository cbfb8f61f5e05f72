#!/usr/bin/env python3
"""Makes a virtual environment for each Transformers that the kernel supports, beside the one that runs this script.

.venv-transformers-<version>/ holds that Transformers, the oldest `kernels` that it accepts (the newest there is, if it
asks for one that is not out yet) and what these two need in another version; all else, torch above all, is read from
the environment of this script. tests/process/test_versions.py runs in each environment that it finds.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Transformers -> kernels, the first of the range that its metadata asks for, if there is one. 5.16 is there to be
# refused. 5.19 and 5.21 are left out: what we build on, integrations/moe.py and hub_kernels.py, is as in 5.18 and 5.20.
VERSIONS = {
    "5.16.1": "0.16.0",
    "5.17.0": "0.16.0",
    "5.18.0": "0.17.0",
    "5.20.2": "0.17.2",
    "5.22.2": "0.17.2",
    "5.23.0": "0.17.2",
    "5.24.0": "0.17.2",
}
# Those that want kernels >= 0.18.2, which is not out yet, and refuse the one that `pip install kernels` brings.
REFUSE_KERNELS = ["5.23.0", "5.24.0"]


def environment(version: str) -> Path:
    return ROOT / f".venv-transformers-{version}"


def python(version: str) -> Path:
    return environment(version) / "bin/python"


def make(version: str) -> None:
    done = environment(version) / ".installed"
    if done.exists():
        return
    venv.create(environment(version), with_pip=False, symlinks=True, clear=True)
    own = Path(sysconfig.get_path("purelib", "venv", {"base": str(environment(version))}))
    # After the environment's own packages on sys.path: they win.
    (own / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    wanted = [f"transformers=={version}", f"kernels=={VERSIONS[version]}"]
    install = [sys.executable, "-m", "pip", "--python", python(version), "install", "--quiet", "--no-compile"]
    if subprocess.run([*install, *wanted]).returncode:
        raise SystemExit(f"{environment(version).name} is not complete, pip says why; the next run makes it anew")
    done.touch()
    print(f"{environment(version).name}: {' '.join(wanted)}", flush=True)


if __name__ == "__main__":
    try:
        for version in VERSIONS:
            make(version)
    except KeyboardInterrupt:
        raise SystemExit("stopped: the next run makes what is not complete anew") from None
