"""Runs a script of this folder as the two processes of a torch.distributed group, on the CPU or on two GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.integrations import hub_kernels


def run_two_processes(script, device, *arguments):
    """`script` gets the arguments and its rank; both processes must succeed."""
    # Transformers takes a GPU wherever it sees one.
    devices = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    processes = [
        subprocess.Popen(
            [sys.executable, Path(__file__).parent / script, *arguments, str(rank)],
            env={**os.environ, **devices, "OMP_NUM_THREADS": "1", "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)


def join_group(rendezvous, rank) -> str:
    """Makes this process one of the group; its type of device."""
    hub_kernels._KERNEL_MAPPING_CACHE = {}  # as in conftest.no_other_kernels
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = {"cpu": "gloo", "cuda": "nccl"}[device]
    dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    return device
