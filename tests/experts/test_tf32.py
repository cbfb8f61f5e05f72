"""fp32 GEMMs follow torch's TF32 switch as torch.matmul does, whichever API set it; 16-bit ones do not ask.

Each way of setting it has a process of its own: reading the older API raises for good once both have been used.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from suite import HELPERS, REPO_ID

NEW = "torch.backends.cuda.matmul.fp32_precision = "
ALL = "torch.backends.fp32_precision = "
OLD = "torch.backends.cuda.matmul.allow_tf32 = "
SETTINGS = {  # -> what fp32 GEMMs do then
    "": "ieee",
    NEW + "'tf32'": "tf32",
    NEW + "'ieee'": "ieee",
    ALL + "'tf32'": "tf32",
    ALL + "'ieee'": "ieee",
    f"{ALL}'tf32'; {NEW}'ieee'": "ieee",
    OLD + "True": "tf32",
    f"{OLD}True; {OLD}False": "ieee",
    "torch.set_float32_matmul_precision('high')": "tf32",
    "torch.set_float32_matmul_precision('medium')": "tf32",
    "torch.set_float32_matmul_precision('highest')": "ieee",
    f"{OLD}True; {NEW}'ieee'": "ieee",
    f"{OLD}True; {ALL}'ieee'": "tf32",  # the matmul's own setting wins
    f"{NEW}'ieee'; {OLD}True": "tf32",
    f"{NEW}'tf32'; {OLD}False": "ieee",
    f"{ALL}'tf32'; {OLD}False": "ieee",
    f"torch.set_float32_matmul_precision('high'); {NEW}'ieee'": "ieee",
    f"{ALL}'tf32'; torch.set_float32_matmul_precision('highest')": "ieee",
    "TrainingArguments('unused', tf32=True, report_to='none')": "tf32",
    "TrainingArguments('unused', tf32=False, report_to='none')": "ieee",
    "TrainingArguments('unused', torch_compile=True, report_to='none')": "tf32",
}

# Imports once, then a process for each setting. It has not touched a GPU: that would not survive the fork.
PARENT = """
import json, os, sys, warnings
import kernels, torch
from transformers import TrainingArguments, training_args

sys.path.insert(0, sys.argv[2])
import oracle

training_args.is_torch_tf32_available = lambda: True
moe = kernels.get_kernel(sys.argv[1], version=1)
device = sys.argv[3]

def distance(x, exact):
    return ((x - exact).norm() / exact.norm()).item()

def layers_and_torchs_error():
    args = oracle.layer(100, 4, 2, 256, 128, device=device)
    inputs = [t.requires_grad_() if t.is_floating_point() else t for t in args]
    exact_inputs = oracle.in_fp64([t.detach() for t in args])
    exact_inputs[0].requires_grad_()
    out, exact = moe.moe_experts(*inputs), moe.reference.moe_experts(*exact_inputs)
    out.sum().backward()
    exact.sum().backward()
    with torch.no_grad():
        inference = moe.moe_experts(*args)
    x, weight = args[0].detach(), args[3][0].detach()
    ours = [distance(inference, exact), distance(out, exact), distance(args[0].grad, exact_inputs[0].grad)]
    return ours, distance(x @ weight.T, x.double() @ weight.double().T)

def run_in_bf16():
    args = oracle.layer(64, 4, 2, 256, 128, torch.bfloat16, device)
    inputs = [t.requires_grad_() if t.is_floating_point() else t for t in args]
    moe.moe_experts(*inputs).sum().backward()

def fork(setting):
    pid = os.fork()
    if pid:
        return pid
    try:
        exec(setting)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = {"precision": moe.gpu.input_precision(torch.float32)}
        if device == "cuda":
            result["ours"], result["torchs"] = layers_and_torchs_error()
            run_in_bf16()
    except BaseException as error:
        result = {"error": repr(error)}
    os.write(1, (json.dumps([setting, result]) + "\\n").encode())  # at once: others write to the same pipe
    os._exit(0)

# The first two, one of each precision, compile the kernels that the others find in Triton's cache.
settings = json.loads(sys.argv[4])
for begin, end in ((0, 2), *((i, i + 10) for i in range(2, len(settings), 10))):
    for pid in list(map(fork, settings[begin:end])):
        os.waitpid(pid, 0)
"""


def results(device):
    command = [sys.executable, "-c", PARENT, REPO_ID, HELPERS, device, json.dumps(list(SETTINGS))]
    # Variables that set the switch as well.
    env = {name: value for name, value in os.environ.items() if "TF32" not in name}
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return dict(json.loads(line) for line in run.stdout.splitlines() if line.startswith("["))


@pytest.mark.long
def test_fp32_follows_the_switch(device):
    """One test of all settings: their processes share what the first imports."""
    by_setting = results(device)
    assert {setting: result.get("precision", result) for setting, result in by_setting.items()} == SETTINGS
    if device == "cuda":
        assert not {setting: result for setting, result in by_setting.items() if "error" in result}
        for setting, result in by_setting.items():
            is_coarse = [error > 1e-5 for error in (*result["ours"], result["torchs"])]
            assert is_coarse == [SETTINGS[setting] == "tf32"] * 4, (setting, result)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gemms_do_not_ask(kernel, monkeypatch, dtype):
    monkeypatch.setattr(torch.backends.cuda, "matmul", None)
    assert kernel.gpu.input_precision(dtype) == "ieee"
    with pytest.raises(AttributeError):
        kernel.gpu.input_precision(torch.float32)
