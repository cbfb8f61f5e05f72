"""Runs a script of this folder as the two processes of a torch.distributed group."""

import os
import subprocess
import sys
from pathlib import Path


def run_two_processes(script, *arguments):
    """`script` gets the arguments and its rank; both processes must succeed."""
    processes = [
        subprocess.Popen(
            [sys.executable, Path(__file__).parent / script, *arguments, str(rank)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
