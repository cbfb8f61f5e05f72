"""What torch's FLOP counter counts: every product of the public functions and of a model, forward and backward."""

import subprocess
import sys

import pytest
from torch.utils.flop_counter import FlopCounterMode

import public_functions as public
from oracle import layer
from suite import HELPERS, REPO_ID
from tiny_models import WAYS, prompt, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

LAYER = 2 * public.SLOTS * 3 * public.HIDDEN * public.INTER
FACTORS = 2 * public.SLOTS * 16 * ((public.HIDDEN + 2 * public.INTER) + (public.INTER + public.HIDDEN))
GEMM = 2 * public.TOKENS * 2 * public.INTER * public.HIDDEN
ROUTER = 2 * public.TOKENS * 12 * public.HIDDEN
FLOPS = {  # forward, and backward for every gradient that there is
    public.moe_experts: (LAYER, 2 * LAYER),
    public.fp8: (LAYER, LAYER),
    public.lora: (LAYER + FACTORS, 2 * (LAYER + FACTORS)),
    public.lora_with_norm: (LAYER + FACTORS, 2 * (LAYER + FACTORS)),
    public.grouped_gemm: (GEMM, 2 * GEMM),
    public.topk_router: (ROUTER, 2 * ROUTER),
    public.route: (0, 0),
}


@pytest.mark.parametrize("make", public.FUNCTIONS)
@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu), "meta"])
def test_flops(kernel, training, make, where):
    function, inputs = make(kernel)
    args = public.leaves([t.to(where) for t in inputs(0, "cpu")], training)
    with FlopCounterMode(display=False) as counter:
        public.forward_and_gradients(function, args, training)
    assert counter.get_total_flops() == FLOPS[make][0] + training * FLOPS[make][1]


def test_flops_of_wanted_gradients_alone(kernel, device):
    args = layer(*public.SHAPE, device=device)
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
        BODY
    print(counter.get_total_flops())
"""
CALLS = {  # -> FLOPs
    "moe_experts": ("moe.moe_experts(*args)", LAYER),
    "grouped_gemm": (
        "moe.grouped_gemm(args[0], args[3][:1], torch.tensor([0, 40], dtype=torch.int32))",
        2 * 40 * 64 * 64,
    ),
    "4-bit grouped_gemm": (
        "codes, scale = moe.quantize_fp4(args[3][:1]);"
        "moe.grouped_gemm(args[0], codes, torch.tensor([0, 40], dtype=torch.int32), scale=scale)",
        2 * 40 * 64 * 64,
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("imported", ["before", "after"])
def test_flop_counter_imported_when(imported, call):
    """Importing it takes a third of a second, and Triton with it: the kernel waits until somebody does."""
    body, flops = CALLS[call]
    command = [sys.executable, "-c", COUNT.replace("BODY", body), REPO_ID, HELPERS, imported]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [str(flops)] * 2


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
