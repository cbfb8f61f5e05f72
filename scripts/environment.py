"""Makes the virtual environment of the Makefile's commands: environment.py FOLDER REQUIREMENTS.

It gets the Python that runs this. FOLDER/.requirements.txt is written last: a folder without it, or of another Python,
is made anew. Old Pythons can parse this file, and say that they are too old.
"""

import importlib.util
import subprocess
import sys
import venv
from pathlib import Path

OLDEST, NEWEST = (3, 11), (3, 13)  # Transformers' own lower bound; the newest that was tried with these packages


def make(folder, requirements):
    version = "{}.{}".format(*sys.version_info[:2])
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        sys.exit(f"{sys.executable} is Python {version}, and 3.11 to 3.13 is needed: make PYTHON=python3.12 ...")
    if importlib.util.find_spec("ensurepip") is None:
        sys.exit(f"{sys.executable} cannot make environments: on Debian and Ubuntu, apt install python3-venv")
    done = folder / ".requirements.txt"
    python = f"# Python {version}\n"
    found = done.read_text() if done.exists() else ""
    wanted = python + requirements.read_text()
    if found == wanted:
        return
    if found.startswith(python):
        done.unlink()
    else:
        venv.create(folder, clear=True, with_pip=True, symlinks=True)
    pip = [folder / "bin/python", "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--requirement", requirements], check=True)
    done.write_text(wanted)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    try:
        make(folder, Path(sys.argv[2]))
    except KeyboardInterrupt:
        sys.exit(f"stopped: the next run makes {folder} anew")
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"{folder} is not complete, and the next run makes it anew: {error}")
