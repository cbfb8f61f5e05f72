"""A DeepSeek-V3 through ways 2 and 3 with the Transformers that is there; test_versions.py starts it in each.

Usage: versions_worker.py TRANSFORMERS KERNELS FOLDER as_released|accepted|refused

accepted: Transformers would refuse these `kernels`, and its minimum is lowered. refused: it does refuse them.
"""

import inspect
import sys
import warnings
from importlib.metadata import version

import kernels
import torch
import transformers
from transformers.utils import import_utils

expected_transformers, expected_kernels, folder, kernels_are = sys.argv[1:]
assert (transformers.__version__, version("kernels")) == (expected_transformers, expected_kernels)
if kernels_are == "accepted":  # before anything of Transformers asks
    check = inspect.unwrap(import_utils.is_kernels_available)
    assert check.__defaults__[0] == import_utils.KERNELS_MIN_VERSION > expected_kernels
    check.__defaults__ = (expected_kernels, import_utils.KERNELS_MAX_VERSION)
    import_utils.is_kernels_available.cache_clear()

kernel = kernels.get_kernel("org/moe-grouped-gemm", version=1)
if tuple(map(int, expected_transformers.split(".")))[:2] < (5, 17):
    try:
        kernel.register()
    except ImportError as error:
        print(error)
        sys.exit()
    raise AssertionError("register() accepts a Transformers that it does not support")

from transformers import AutoModelForCausalLM  # noqa: E402

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


def register():
    """What it warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kernel.register()
    return [str(warning.message) for warning in caught]


def kernelized(mode):
    return kernels.kernelize(load().train(kernels.Mode.TRAINING in mode), mode=mode, device="cpu")


expected_logits, expected_grads, count = results(load())
assert count == 0
warned = register()
models = {"3": load(experts_implementation="moe_grouped_gemm")}
if kernels_are == "refused":
    (message,) = warned
    installed = f"does not use kernels {expected_kernels}, which is installed"
    wanted = f"{import_utils.KERNELS_MIN_VERSION}, < {import_utils.KERNELS_MAX_VERSION}"
    for part in (installed, wanted, 'experts_implementation="moe_grouped_gemm"', "kernelize", "transformers[kernels]"):
        assert part in message, message
    assert register() == []  # once
    try:
        load(use_kernels=True)
    except ValueError as error:
        assert "Kernels are not available" in str(error)
    else:
        raise AssertionError("Transformers accepts these kernels: they belong with the others of scripts/versions.py")
    models["kernelize"] = kernelized(kernels.Mode.INFERENCE)
    models["kernelize, training"] = kernelized(kernels.Mode.TRAINING)
else:
    assert warned == []  # not of PEFT either, whose version all environments share
    models["2"] = load(use_kernels=True)
    models["2, training"] = load(use_kernels=True).train()

for way, model in models.items():
    assert way == "3" or all(is_switched_on(kernel, experts) for experts in experts_of(model))
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
if kernels_are == "refused":
    kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu")
else:
    model.set_use_kernels(True)
logits, _, count = results(model)
assert count == len(seen) == NUM_MOE_LAYERS
torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
