"""One of two processes that share a model's experts; test_distributed.py starts both.

Usage: distributed_worker.py CHECKPOINT PLAN RENDEZVOUS RANK
"""

import gc
import inspect
import sys
import weakref
from unittest import mock

import kernels
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import AutoModelForCausalLM, KernelConfig
from transformers.distributed import DistributedConfig
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.monkey_patching import clear_patch_mapping, register_patch_mapping
from transformers.utils import kernel_config

from tiny_models import HUB_NAME, NUM_MOE_LAYERS, experts_of, is_switched_on, prompt
from two_processes import join_group

PLANS = {
    # Tokens travel to the experts: the experts see top_k = 1 and unit weights. DeepSeek-V3's own plan.
    "dispatch": DistributedConfig(tp_size=2, ep_size=2),
    # Every rank sees all tokens; the id E marks slots of experts elsewhere.
    "sentinels": DistributedConfig(
        tp_size=2,
        ep_size=2,
        ep_plan={"model.layers.*.mlp.gate": "ep_router", "model.layers.*.mlp.experts": "moe_tp_experts"},
    ),
    # Every rank holds a slice of every expert: gate_up_proj "packed_colwise", down_proj "rowwise".
    "tensor-parallel": DistributedConfig(tp_size=2),
    # Every rank holds a slice of every tensor, and gathers whole layers for their forward.
    "fully-sharded": DistributedConfig(fsdp_size=2),
    # So it is for all but the experts, of which every rank has half; tokens travel.
    "fully-sharded-and-dispatch": DistributedConfig(fsdp_size=2, ep_size=2),
}

PROMPTS = {
    "even": prompt(),
    "uneven slices": prompt()[:1, :7],  # where ranks share the tokens: 4 and 3
    "an empty slice": prompt()[:1, :1],
    "one rank's experts only": prompt(),
}


def biased_to_one_rank(model, bias):
    """All tokens go to the experts 0 to 3 if the bias is large: the router's first group, the first rank's experts."""
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias[:4] = bias


def whole(tensor):
    if isinstance(tensor, DTensor):
        mesh, (placement, *others) = tensor.device_mesh, tensor.placements
        if isinstance(placement, _StridedShard) and not others:
            # Packed: each rank has a slice of gate and one of up, which torch 2.11 cannot put in order.
            dim, parts = placement.dim, (mesh.size(), placement.split_factor, -1)
            slices = DTensor.from_local(tensor.to_local(), mesh, [Shard(dim)]).full_tensor()
            tensor = slices.unflatten(dim, parts).transpose(dim, dim + 1).flatten(dim, dim + 2)
        else:
            tensor = tensor.full_tensor()
    return tensor.detach().clone()


def results(model, prompts=tuple(PROMPTS)):
    """For each prompt the logits and every gradient, whole; and the ids that each call of our kernel got."""
    found = {}
    for name in prompts:
        biased_to_one_rank(model, 100 * (name == "one rank's experts only"))
        model.zero_grad()
        calls.clear()
        logits = model(PROMPTS[name].to(device), use_cache=False).logits
        logits.square().mean().backward()
        grads = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
        found[name] = logits.detach(), grads, list(calls)
    biased_to_one_rank(model, 0)
    return found


def compare(got, expected, on_kernel):
    for name, (logits, grads, ids) in got.items():
        expected_logits, expected_grads, _ = expected[name]
        torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(grads, expected_grads, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert len(ids) == (NUM_MOE_LAYERS if on_kernel else 0), f"{name}: {len(ids)} kernel calls"


def check_ids(found):
    """What the plan promises to try has happened."""
    ids = {name: torch.cat([i.flatten() for i in calls]) for name, (_, _, calls) in found.items()}
    if plan in ("dispatch", "fully-sharded-and-dispatch"):
        assert all(i.shape[1] == 1 for _, _, calls in found.values() for i in calls)
        elsewhere = [i.shape[0] for i in found["one rank's experts only"][2]]
        # A rank without tokens computes one dummy. Under FSDP both ranks send what they have.
        per_rank = prompt().numel() * 2 * (2 if plan == "fully-sharded-and-dispatch" else 1)
        assert elsewhere == [per_rank if rank == 0 else 1] * NUM_MOE_LAYERS
    if plan == "sentinels":
        assert (ids["even"] == 4).any() and (ids["even"] < 4).any()
        assert (ids["one rank's experts only"] == 4).all() == (rank == 1)


def load(plan, **kwargs):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, distributed_config=PLANS[plan], **kwargs)
    if plan != "fully-sharded":  # a wrapper that must survive
        assert all(not inspect.ismethod(experts.forward) for experts in experts_of(model))
    return model


def load_by_kernel_config(plan):
    """Transformers knows no "cpu" there, and would look the version up on the Hub."""
    devices = [*kernel_config.KERNELS_SUPPORTED_DEVICE_TYPES, "cpu"]
    with (
        mock.patch.object(kernel_config, "KERNELS_SUPPORTED_DEVICE_TYPES", devices),
        mock.patch("kernels.layer.layer.select_revision_or_version", lambda **_: "v1"),
    ):
        config = KernelConfig({"DeepseekV3Experts": HUB_NAME})
        model = load(plan, use_kernels=True, kernel_config=config)
    clear_patch_mapping()
    return model


def distribute_after_kernelize(plan):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, device_map=device, use_kernels=True)
    assert all(is_switched_on(kernel, experts) for experts in experts_of(model))
    config, _, mesh_manager = type(model).prepare_distribute_model(PLANS[plan])
    return type(model).maybe_distribute_model(model, config, mesh_manager)


def kernelize_after_distributing(plan):
    model = load(plan)
    model.set_use_kernels(True)
    return model


WAYS = {
    "set_use_kernels after distributing": kernelize_after_distributing,
    "distributed after kernelize": distribute_after_kernelize,
    "use_kernels": lambda plan: load(plan, use_kernels=True),
    "experts_implementation": lambda plan: load(plan, experts_implementation="moe_grouped_gemm"),
}


@torch.no_grad()
def check_decisions(model):
    """What was decided about a module holds for the next forward, for which its weights are put on it anew."""
    decisions, decide, decided = modules._plans, modules._plans._decide, []
    decisions._decide = lambda module, *args: decided.append(module) or decide(module, *args)
    wanted, _, _ = expected["uneven slices"]
    for repeats in (device == "cuda", True):
        modules.REPEATS_ON_CPU = repeats
        for _ in range(4):
            logits = model(PROMPTS["uneven slices"].to(device), use_cache=False).logits
            torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    modules.REPEATS_ON_CPU, decisions._decide = False, decide
    few = [NUM_MOE_LAYERS] if device == "cpu" else range(NUM_MOE_LAYERS + 1)  # a GPU may have decided before
    assert len(decided) in few, f"{len(decided)} decisions"


@torch.no_grad()
def check_blocks(model):
    """In inference, where a block may be one call; on a CPU too if it is told so."""
    served = [ours.SERVES_CPU for ours in (blocks, routers)]
    blocks.SERVES_CPU = routers.SERVES_CPU = True
    for prompts in ("even", "even", "uneven slices"):
        logits = model(PROMPTS[prompts].to(device), use_cache=False).logits
        torch.testing.assert_close(logits, expected[prompts][0], rtol=1e-4, atol=1e-4)
    blocks.SERVES_CPU, routers.SERVES_CPU = served


def check_way(model):
    found = results(model)
    compare(found, expected, on_kernel=True)
    check_ids(found)
    for training in (True, False):  # kernelizes again
        model.train(training)
        compare(results(model, ["uneven slices"]), expected, on_kernel=True)
    # Last: under FSDP2 gradients after a forward without any are others, of stock's model as well.
    check_decisions(model)
    check_blocks(model)


def check_kernel_config():
    model = load_by_kernel_config(plan)
    compare(results(model), expected, on_kernel=True)
    model.set_use_kernels(False)
    compare(results(model), expected, on_kernel=False)


def check_layout():
    print("layout", flush=True)
    register_patch_mapping({"DeepseekV3Experts": kernel.layers.MoEExpertsLayout})
    compare(results(load(plan)), expected, on_kernel=False)

    print("layout after a failed load", flush=True)
    stock_class = weakref.ref(modeling_deepseek_v3.DeepseekV3Experts)
    try:
        load(plan, experts_implementation="no such")
    except ValueError:
        gc.collect()
    assert modeling_deepseek_v3.DeepseekV3Experts is kernel.layers.MoEExpertsLayout  # Transformers forgot it
    assert stock_class() is None
    compare(results(load(plan)), expected, on_kernel=False)


checkpoint, plan, rendezvous, rank = sys.argv[1:]
rank = int(rank)
device = join_group(rendezvous, rank)
kernel = kernels.get_kernel("org/moe-grouped-gemm", version=1)

modules, blocks, routers = kernel.integration.modules, kernel.integration.blocks, kernel.integration.routers
if device == "cpu":  # where a GPU's way is taken with this in place of launches
    modules.ops.forward_on_gpu = modules.ops.forward_on_cpu
    torch._C._cuda_getDevice = lambda: 0

calls = []
moe_experts = kernel.functional.moe_experts


def recording_moe_experts(hidden_states, top_k_index, *args, **kwargs):
    calls.append(top_k_index)
    return moe_experts(hidden_states, top_k_index, *args, **kwargs)


kernel.functional.moe_experts = recording_moe_experts

expected = results(AutoModelForCausalLM.from_pretrained(checkpoint, device_map=device))
if plan == "fully-sharded-and-dispatch":
    # Transformers 5.22 gives half of these where an expert has one owner, with its own experts as with ours.
    for _, grads, _ in expected.values():
        grads.update({name: grad / 2 for name, grad in grads.items() if ".mlp.experts." in name})
compare(results(load(plan)), expected, on_kernel=False)  # what Transformers promises without us

print("KernelConfig", flush=True)  # before register(): it works alone
check_kernel_config()

kernel.register()
for way, distribute in WAYS.items():
    print(way, flush=True)
    check_way(distribute(plan))
if plan == "dispatch":
    check_layout()
dist.destroy_process_group()
