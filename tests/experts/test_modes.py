"""Dispatch modes and subclasses of tensors: each public function is one op to them."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import public_functions as public
from oracle import layer

pytestmark = pytest.mark.usefixtures("one_thread")


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


ONE_NODE = {"moe_experts": "moe_experts", "fp8": "moe_experts", "topk_router": "topk_router", "route": "route"}


@pytest.mark.parametrize("name", ONE_NODE)
def test_a_mode_sees_one_node(kernel, device, name):
    function, inputs = getattr(public, name)(kernel)
    args = inputs(0, device)
    expected = function(*args)
    with Recorder() as recorder, torch.no_grad():
        got = function(*args)
    assert [seen.split("::")[1] for seen in recorder.names] == [ONE_NODE[name]]
    public.assert_same(got, expected)


@pytest.mark.parametrize("training", [False, True])
def test_pre_dispatch_tracing_sees_one_node(kernel, device, training):
    """Its modes are on a stack of their own."""
    function, inputs = public.fp8(kernel)
    args = public.leaves(inputs(0, device), training)
    graph = make_fx(function, pre_dispatch=True)(*args)
    ours = [str(node.target) for node in graph.graph.nodes if "moe_grouped_gemm" in str(node.target)]
    assert [name.split(".")[1] for name in ours] == ["moe_experts_training" if training else "moe_experts"]


def test_a_mode_sees_forward_and_backward(kernel, device):
    args = public.leaves(layer(*public.SHAPE, device=device), True)
    with Recorder() as recorder:
        kernel.moe_experts(*args).backward(args[0].detach())
    ours = [seen.split("::")[1] for seen in recorder.names if "moe_grouped_gemm" in seen]
    assert ours == ["moe_experts_training", "moe_experts_backward"]


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE], ids=str)
def test_selective_checkpoint(kernel, device, record, policy):
    """Its policy is asked about the layer as one op, and obeyed."""
    ops = kernel.functional.ops
    forward = (kernel.reference, "moe_experts_training") if device == "cpu" else (ops, "forward_and_save")
    expected = public.leaves(layer(*public.SHAPE, device=device), True)
    kernel.moe_experts(*expected).sum().backward()
    args, runs = public.leaves(layer(*public.SHAPE, device=device), True), record(*forward)

    def of_op(context, op, *args, **kwargs):
        return policy if "moe_experts_training" in op.name() else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, of_op)
    checkpoint(kernel.moe_experts, *args, use_reentrant=False, context_fn=contexts).sum().backward()
    assert len(runs) == (1 if policy == CheckpointPolicy.MUST_SAVE else 2)
    for a, b in zip(args, expected):
        assert a.grad is b.grad is None or (a.grad - b.grad).norm() <= 1e-4 * b.grad.norm()


class Plain(torch.Tensor):
    """As `torch.Tensor` says of its subclasses: results are of it as well."""


class Wrapper(torch.Tensor):
    """Has no memory; around what has."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda t: t.inner, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, cls, func(*args, **kwargs))


@pytest.mark.parametrize("which", ["all", "last"])
@pytest.mark.parametrize("subclass", [Plain, Wrapper])
def test_subclasses(case, device, subclass, which):
    function, inputs = case
    args = inputs(0, device)
    expected = function(*args)

    def wrap(t):
        return t.as_subclass(Plain) if subclass is Plain else Wrapper(t)

    args = [wrap(t) if which == "all" or t is args[-1] else t for t in args]
    with torch.no_grad():
        got = public.outputs(function(*args))
    assert all(type(t) is subclass for t in got)
    public.assert_same(tuple(t.as_subclass(torch.Tensor) if subclass is Plain else t.inner for t in got), expected)


def test_parameters_are_plain(kernel, device, monkeypatch):
    """They do not make inference pay for an op."""
    x, index, top_k_weights, *weights = layer(*public.SHAPE, device=device)
    monkeypatch.setattr(kernel.functional.ops, "moe_experts", None)
    with torch.no_grad():
        kernel.moe_experts(x, index, top_k_weights, *map(torch.nn.Parameter, weights))


@pytest.fixture
def mesh(device):
    backend = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh(device, (1,))
    dist.destroy_process_group()


DTENSORS = {  # of each function: which argument, by what name
    public.moe_experts: {0: "hidden_states", 1: "top_k_index", 3: "gate_up_proj", 4: "down_proj"},
    public.fp8: {0: "hidden_states", 4: "down_proj", 6: "down_proj_scale"},
    public.lora: {0: "hidden_states", 2: "top_k_weights", 4: "down_proj", 5: "gate_up_lora", 8: "down_lora"},
    public.lora_with_norm: {1: "top_k_index", 3: "gate_up_proj", 6: "gate_up_lora"},
    public.grouped_gemm: {0: "x", 1: "weight", 2: "expert_offsets"},
    public.topk_router: {0: "hidden_states", 1: "weight", 2: "e_score_correction_bias"},
    public.route: {0: "top_k_index"},
}


@pytest.mark.parametrize("make", public.FUNCTIONS)
def test_dtensors_are_named(kernel, device, mesh, training, make):
    from torch.distributed.tensor import DTensor, Replicate

    function, inputs = make(kernel)
    for position, name in DTENSORS[make].items():
        args = inputs(0, device)
        args[position] = DTensor.from_local(args[position], mesh, [Replicate()], run_check=False)
        with pytest.raises(TypeError, match=rf"{name}: expected a plain tensor, got a DTensor; .* x\.to_local\(\)"):
            function(*public.leaves(args, training))
