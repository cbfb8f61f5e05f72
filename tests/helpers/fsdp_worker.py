"""One of two processes that train a DeepSeek-V3 under torch's fully_shard; test_training.py starts both.

Usage: fsdp_worker.py RENDEZVOUS RANK
"""

import sys

import kernels
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tiny_models import NUM_MOE_LAYERS, WAYS, experts_of, prompt, tiny_model
from two_processes import join_group

rendezvous, rank = sys.argv[1], int(sys.argv[2])
device = join_group(rendezvous, rank)
kernel = kernels.get_kernel("org/moe-grouped-gemm", version=1)
mesh = init_device_mesh(device, (2,))

calls = []
moe_experts = kernel.functional.moe_experts


def recording_moe_experts(*args, **kwargs):
    calls.append(args[0].dtype)
    return moe_experts(*args, **kwargs)


kernel.functional.moe_experts = recording_moe_experts


def shard(model, policy, experts_alone):
    """Each decoder layer and the rest; the experts may be a unit of their own."""
    for module in [*(experts_of(model) if experts_alone else ()), *model.model.layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    return model


def step(model, tokens):
    """Loss, gradients and the weights after one step, whole."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls.clear()
    loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    optimizer.step()

    def whole(tensor):
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    grads = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
    return loss.detach(), grads, {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}


def distance(grads, exact):
    return sum((grads[name] - exact[name]).square().sum() for name in exact).sqrt()


tokens = prompt().to(device)
mine = tokens[rank : rank + 1]  # both sequences are equally long: the mean of the ranks' gradients is the batch's
_, exact_grads, exact_weights = step(tiny_model(device).train(), tokens)
bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
_, stock_bf16_grads, _ = step(shard(tiny_model(device).train(), bf16, False), mine)
assert not calls

for way in WAYS:
    for experts_alone in (False, True):
        print(way, "experts alone" if experts_alone else "layers", flush=True)
        model = shard(tiny_model(device, kernel, way).train(), MixedPrecisionPolicy(), experts_alone)
        _, grads, weights = step(model, mine)
        assert calls == [torch.float32] * NUM_MOE_LAYERS
        torch.testing.assert_close(grads, exact_grads, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(weights, exact_weights, rtol=1e-4, atol=1e-5)

    print(way, "bf16", flush=True)
    _, grads, _ = step(shard(tiny_model(device, kernel, way).train(), bf16, False), mine)
    assert calls == [torch.bfloat16] * NUM_MOE_LAYERS
    assert distance(grads, exact_grads) <= 2 * distance(stock_bf16_grads, exact_grads)

print("kernelized after sharding", flush=True)
model = shard(tiny_model(device).train(), MixedPrecisionPolicy(), False)
model.set_use_kernels(True)
_, grads, weights = step(model, mine)
assert calls == [torch.float32] * NUM_MOE_LAYERS
torch.testing.assert_close(weights, exact_weights, rtol=1e-4, atol=1e-5)
dist.destroy_process_group()
