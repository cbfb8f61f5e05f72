"""One of two processes that share a model's experts in 4 bits; test_distributed.py starts both.

Usage: fp4_worker.py DENSE_CHECKPOINT FP4_CHECKPOINT RENDEZVOUS RANK
"""

import sys

import kernels
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from tiny_models import NUM_MOE_LAYERS, experts_of, prompt
from two_processes import join_group

PLANS = {
    # As in distributed_worker.py.
    "dispatch": DistributedConfig(tp_size=2, ep_size=2),
    "sentinels": DistributedConfig(
        tp_size=2,
        ep_size=2,
        ep_plan={"model.layers.*.mlp.gate": "ep_router", "model.layers.*.mlp.experts": "moe_tp_experts"},
    ),
    "fully-sharded": DistributedConfig(fsdp_size=2),
    "fully-sharded-and-dispatch": DistributedConfig(fsdp_size=2, ep_size=2),
}
PROMPTS = {"even": prompt(), "uneven slices": prompt()[:1, :7], "an empty slice": prompt()[:1, :1]}

*checkpoints, rendezvous, rank = sys.argv[1:]
device = join_group(rendezvous, int(rank))
kernel = kernels.get_kernel("org/moe-grouped-gemm", version=1)
calls = []
moe_experts = kernel.functional.moe_experts


def recording_moe_experts(hidden_states, top_k_index, top_k_weights, gate_up_proj, *args, **kwargs):
    calls.append((top_k_index, gate_up_proj))
    return moe_experts(hidden_states, top_k_index, top_k_weights, gate_up_proj, *args, **kwargs)


kernel.functional.moe_experts = recording_moe_experts


def results(model):
    """Of each prompt the logits, and the gradient of the embedding, which lies below both layers of experts."""
    found = {}
    for name, tokens in PROMPTS.items():
        model.zero_grad()
        logits = model(tokens.to(device), use_cache=False).logits
        logits.square().mean().backward()
        grad = model.get_input_embeddings().weight.grad
        found[name] = [logits.detach(), grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()]
    return found


def load(checkpoint, **kwargs):
    return AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=kernel.fp4_config(), **kwargs)


expected = results(load(checkpoints[0], device_map=device))
for checkpoint in checkpoints:
    for plan, config in PLANS.items():
        print(checkpoint, plan, flush=True)
        model = load(checkpoint, distributed_config=config)
        for experts in experts_of(model):
            for name, shape in (("gate_up_proj", (64, 32)), ("down_proj", (64, 16))):
                codes, scale = getattr(experts, name), getattr(experts, f"{name}_scale_inv")
                assert codes.shape == (8, *shape) and codes.to_local().shape == (4, *shape), codes.shape
                assert scale.to_local().shape == (4, 64, shape[1] // 16), scale.shape
        calls.clear()
        torch.testing.assert_close(results(model), expected, rtol=1e-4, atol=1e-5)
        assert len(calls) == NUM_MOE_LAYERS * len(PROMPTS)
        local = 8 if plan == "fully-sharded" else 4  # FSDP gathers layers for their forward
        assert all(weight.shape == (local, 64, 32) and weight.dtype == torch.uint8 for _, weight in calls)
        ids = torch.cat([ids.flatten() for ids, _ in calls])
        assert (ids == local).any() == (plan == "sentinels")
        saved = f"{rendezvous}-{plan}"
        model.save_pretrained(saved)
        dist.barrier()
        torch.testing.assert_close(results(load(saved, device_map=device)), expected, rtol=0, atol=0)
    try:
        load(checkpoint, distributed_config=DistributedConfig(tp_size=2))
    except RuntimeError:  # Transformers prints what it was
        continue
    raise AssertionError("half of a group of columns has no scale")
dist.destroy_process_group()
