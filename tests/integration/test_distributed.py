"""DeepSeek-V3 on two processes (gloo, or NCCL and two GPUs), every parallelism of Transformers and every way in."""

import pytest

from tiny_models import load
from two_processes import run_two_processes

PLANS = ["dispatch", "sentinels", "tensor-parallel", "fully-sharded", "fully-sharded-and-dispatch"]


@pytest.mark.long
@pytest.mark.parametrize("plan", PLANS)
def test_equals_one_process(two_devices, checkpoint, tmp_path, plan):
    """Logits and all gradients: see distributed_worker.py."""
    run_two_processes("distributed_worker.py", two_devices, checkpoint, plan, tmp_path / "rendezvous")


@pytest.mark.long
def test_experts_in_4_bits(two_devices, checkpoint, kernel, tmp_path):
    """From a dense checkpoint and from one in 4 bits: see fp4_worker.py."""
    load(checkpoint, quantization_config=kernel.fp4_config()).save_pretrained(tmp_path / "fp4")
    run_two_processes("fp4_worker.py", two_devices, checkpoint, tmp_path / "fp4", tmp_path / "rendezvous")
