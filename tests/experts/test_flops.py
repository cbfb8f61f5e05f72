"""What torch's FLOP counter counts: every product of the public functions and of a model, forward and backward."""

import subprocess
import sys

import pytest
from torch.utils.flop_counter import FlopCounterMode

from oracle import layer
from public_functions import (
    FUNCTIONS,
    HIDDEN,
    INTER,
    SHAPE,
    SLOTS,
    TOKENS,
    forward_and_gradients,
    fp8,
    grouped_gemm,
    leaves,
    lora,
    lora_with_norm,
    moe_experts,
    route,
    topk_router,
)
from suite import HELPERS, REPO_ID
from tiny_models import WAYS, prompt, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

LAYER = 2 * SLOTS * 3 * HIDDEN * INTER
FACTORS = 2 * SLOTS * 16 * ((HIDDEN + 2 * INTER) + (INTER + HIDDEN))
GEMM = 2 * TOKENS * 2 * INTER * HIDDEN
ROUTER = 2 * TOKENS * 12 * HIDDEN
FLOPS = {  # forward, and backward for every gradient that there is
    moe_experts: (LAYER, 2 * LAYER),
    fp8: (LAYER, LAYER),
    lora: (LAYER + FACTORS, 2 * (LAYER + FACTORS)),
    lora_with_norm: (LAYER + FACTORS, 2 * (LAYER + FACTORS)),
    grouped_gemm: (GEMM, 2 * GEMM),
    topk_router: (ROUTER, 2 * ROUTER),
    route: (0, 0),
}


@pytest.mark.parametrize("make", FUNCTIONS)
@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu), "meta"])
def test_flops(kernel, training, make, where):
    function, inputs = make(kernel)
    args = leaves([t.to(where) for t in inputs(0, "cpu")], training)
    with FlopCounterMode(display=False) as counter:
        forward_and_gradients(function, args, training)
    assert counter.get_total_flops() == FLOPS[make][0] + training * FLOPS[make][1]


def test_flops_of_wanted_gradients_alone(kernel, device):
    args = layer(*SHAPE, device=device)
    args[0].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        kernel.moe_experts(*args).sum().backward()
    assert counter.get_total_flops() == 2 * LAYER


COUNT = """
import sys
import kernels, torch
sys.path.insert(0, sys.argv[2])
import oracle

if sys.argv[3] == "before":
    import torch.utils.flop_counter
moe = kernels.get_kernel(sys.argv[1], version=1)
assert (sys.argv[3] == "before") == ("torch.utils.flop_counter" in sys.modules)
from torch.utils.flop_counter import FlopCounterMode

args = oracle.layer(40, 4, 2, 64, 32)
for _ in range(2):
    with FlopCounterMode(display=False) as counter:
        moe.moe_experts(*args)
    print(counter.get_total_flops())
"""


@pytest.mark.parametrize("imported", ["before", "after"])
def test_flop_counter_imported_when(imported):
    """Importing it takes a third of a second, and Triton with it: the kernel waits until somebody does."""
    command = [sys.executable, "-c", COUNT, REPO_ID, HELPERS, imported]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [str(LAYER)] * 2


@pytest.mark.parametrize("way", WAYS)
def test_flops_of_a_model(kernel, device, no_other_kernels, way):
    """Those of Transformers' loop over experts, whose products torch counts one by one."""
    counts = []
    for model in (tiny_model(device), tiny_model(device, kernel, way)):
        if not counts:
            model.set_experts_implementation("eager")
        tokens = prompt().to(device)
        with FlopCounterMode(display=False) as counter:
            model(tokens, labels=tokens).loss.backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
