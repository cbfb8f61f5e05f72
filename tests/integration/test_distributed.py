"""DeepSeek-V3 on two processes (gloo, or NCCL and two GPUs), every parallelism of Transformers and every way in."""

import pytest

from two_processes import run_two_processes

PLANS = ["dispatch", "sentinels", "tensor-parallel", "fully-sharded", "fully-sharded-and-dispatch"]


@pytest.mark.long
@pytest.mark.parametrize("plan", PLANS)
def test_equals_one_process(two_devices, checkpoint, tmp_path, plan):
    """Logits and all gradients: see distributed_worker.py."""
    run_two_processes("distributed_worker.py", two_devices, checkpoint, plan, tmp_path / "rendezvous")
