"""A DeepSeek-V3 through ways 2 and 3 with the Transformers that is there; test_versions.py starts it in each.

Usage: versions_worker.py TRANSFORMERS KERNELS FOLDER
"""

import sys
import warnings
from importlib.metadata import version

import kernels
import torch
import transformers
from transformers import AutoModelForCausalLM

expected_transformers, expected_kernels, folder = sys.argv[1:]
assert (transformers.__version__, version("kernels")) == (expected_transformers, expected_kernels)

kernel = kernels.get_kernel("org/moe-grouped-gemm", version=1)
if tuple(map(int, expected_transformers.split(".")))[:2] < (5, 17):
    try:
        kernel.register()
    except ImportError as error:
        print(error)
        sys.exit()
    raise AssertionError("register() accepts a Transformers that it does not support")

from tiny_models import NUM_MOE_LAYERS, experts_of, is_switched_on, prompt, save_deepseek_v3  # noqa: E402

save_deepseek_v3(folder)
calls = []
moe_experts = kernel.functional.moe_experts


def recording_moe_experts(*args, **kwargs):
    calls.append(args)
    return moe_experts(*args, **kwargs)


kernel.functional.moe_experts = recording_moe_experts


def load(**kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)


def results(model):
    calls.clear()
    logits = model(prompt()).logits
    logits.square().mean().backward()
    return logits, {name: parameter.grad for name, parameter in model.named_parameters()}, len(calls)


expected_logits, expected_grads, count = results(load())
assert count == 0
with warnings.catch_warnings():
    warnings.simplefilter("error")  # of PEFT, if it is not as we know it
    kernel.register()
model = load(use_kernels=True)
assert all(is_switched_on(kernel, experts) for experts in experts_of(model))
models = {
    "2": model,
    "2, training": load(use_kernels=True).train(),
    "3": load(experts_implementation="moe_grouped_gemm"),
}
for way, model in models.items():
    logits, grads, count = results(model)
    assert count == NUM_MOE_LAYERS, f"way {way}: {count} calls"
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        model.eval().generate(prompt()[:1], max_new_tokens=3, do_sample=False)

# A wrapper, such as a hook of accelerate's, is not thrown away.
model, seen = load(), []
for experts in experts_of(model):
    experts.forward = lambda *args, forward=experts.forward: seen.append(forward) or forward(*args)
model.set_use_kernels(True)
logits, _, count = results(model)
assert count == len(seen) == NUM_MOE_LAYERS
torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
