"""One of two processes that share a model's experts; test_transformers.py starts both.

Usage: distributed_worker.py CHECKPOINT LOGITS RENDEZVOUS RANK
"""

import gc
import inspect
import sys
import weakref

import kernels
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.monkey_patching import register_patch_mapping

from tiny_models import NUM_MOE_LAYERS, experts_of, prompt

checkpoint, one_process_logits, rendezvous, rank = sys.argv[1:]
one_process_logits = torch.load(one_process_logits)
dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=2)
kernel = kernels.get_kernel("org/moe-grouped-gemm", version=1)

PLANS = {
    # Tokens travel to the experts: the experts see top_k = 1 and unit weights. DeepSeek-V3's own plan.
    "dispatch": DistributedConfig(tp_size=2, ep_size=2),
    # Every rank sees all tokens; the id E marks slots of experts elsewhere.
    "sentinels": DistributedConfig(
        tp_size=2,
        ep_size=2,
        ep_plan={"model.layers.*.mlp.gate": "ep_router", "model.layers.*.mlp.experts": "moe_tp_experts"},
    ),
    # Every rank holds a slice of every expert.
    "tensor parallel": DistributedConfig(tp_size=2),
    # Every rank holds a slice of every tensor, and gathers whole layers for their forward.
    "fully sharded": DistributedConfig(fsdp_size=2),
}

calls = []
moe_experts = kernel.functional.moe_experts


def recording_moe_experts(hidden_states, top_k_index, *args):
    calls.append(top_k_index)
    return moe_experts(hidden_states, top_k_index, *args)


kernel.functional.moe_experts = recording_moe_experts


def load(plan, **kwargs):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, distributed_config=PLANS[plan], **kwargs)
    if plan != "fully sharded":  # a wrapper that must survive
        assert all(not inspect.ismethod(experts.forward) for experts in experts_of(model))
    return model


def check(model, expected_calls):
    """Logits equal those of one process; returns the gradients of the experts' local weights."""
    calls.clear()
    logits = model(prompt()).logits
    assert len(calls) == expected_calls, f"{len(calls)} kernel calls"
    torch.testing.assert_close(logits, one_process_logits, rtol=1e-4, atol=1e-4)
    logits.square().sum().backward()
    return [weight.grad.to_local() for experts in experts_of(model) for weight in experts.parameters()]


def check_plan(plan):
    stock = load(plan)
    expected = check(stock, 0)
    kernel.register()
    stock.set_use_kernels(True)  # after distributing
    stock.zero_grad()
    for way, model in {
        "set_use_kernels": stock,
        "use_kernels": load(plan, use_kernels=True),
        "experts_implementation": load(plan, experts_implementation="moe_grouped_gemm"),
    }.items():
        print(plan, way, flush=True)
        grads = check(model, NUM_MOE_LAYERS)
        torch.testing.assert_close(grads, expected, rtol=1e-3, atol=1e-3)
        if plan == "sentinels":
            assert all((ids == 4).any() and (ids < 4).any() for ids in calls)


for plan in PLANS:
    check_plan(plan)

print("layout", flush=True)
register_patch_mapping({"DeepseekV3Experts": kernel.layers.MoEExpertsLayout})
check(load("dispatch"), 0)

print("layout after a failed load", flush=True)
stock_class = weakref.ref(modeling_deepseek_v3.DeepseekV3Experts)
try:
    load("dispatch", experts_implementation="no such")
except ValueError:
    gc.collect()
assert modeling_deepseek_v3.DeepseekV3Experts is kernel.layers.MoEExpertsLayout  # Transformers forgot to take it back
assert stock_class() is None
check(load("dispatch"), 0)
dist.destroy_process_group()
