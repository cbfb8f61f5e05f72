"""Which gates are taken for ours: only those that are, whatever a class or a program does around its `_apply_gate`."""

from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moe_models import experts_classes, tiny_module
from tiny_models import INTERFACE

pytestmark = pytest.mark.usefixtures("one_thread", "registered")


def mixtral():
    return tiny_module(next(entry for entry in experts_classes() if entry.name == "MixtralExperts"))


def split(gate_up):
    return gate_up.chunk(2, dim=-1)


class Plain(MixtralExperts):
    def _apply_gate(self, gate_up):
        gate, up = split(gate_up)
        return up * F.silu(gate)


class OfSigmoids(MixtralExperts):
    """Attributes under names of its own."""

    slope, bound = 1.5, 3.0

    def _halves(self, gate_up):
        return gate_up[..., ::2].clamp(max=self.bound), gate_up[..., 1::2].clamp(-self.bound, self.bound)

    def _apply_gate(self, gate_up):
        gate, up = self._halves(gate_up)
        return gate * torch.sigmoid(gate * self.slope) * (up + 1)


class InAnotherDtype(MixtralExperts):
    def _apply_gate(self, gate_up):
        gate, up = split(gate_up.float())
        return (self.act_fn(gate) * up).to(gate_up.dtype)


@pytest.mark.parametrize(
    "cls, expected",
    [
        (Plain, ("silu", None, 1.702, False)),
        (OfSigmoids, ("swigluoai", 3.0, 1.5, True)),
        (InAnotherDtype, ("silu", None, 1.702, False)),
    ],
)
def test_ours_under_any_name(kernel, cls, expected):
    module = mixtral()
    module.__class__ = cls
    assert kernel.integration.gates.gate_of(module) == expected
    assert runs_as_stock(module)


class ClampedAt7(MixtralExperts):
    def _apply_gate(self, gate_up):
        gate, up = split(gate_up)
        return self.act_fn(gate.clamp(max=7)) * up


class UpClampedAt100(MixtralExperts):
    def _apply_gate(self, gate_up):
        gate, up = split(gate_up)
        return self.act_fn(gate) * up.clamp(-100, 100)


class SoftCapped(MixtralExperts):
    def _apply_gate(self, gate_up):
        gate, up = split(gate_up)
        return self.act_fn(1e4 * torch.tanh(gate / 1e4)) * up


class OfAParameter(MixtralExperts):
    slope = torch.ones(())

    def _apply_gate(self, gate_up):
        gate, up = split(gate_up)
        return self.act_fn(gate * self.slope) * up


class NanToZero(MixtralExperts):
    def _apply_gate(self, gate_up):
        gate, up = split(gate_up)
        return torch.nan_to_num(self.act_fn(gate) * up)


class Dropout(MixtralExperts):
    def _apply_gate(self, gate_up):
        gate, up = split(gate_up)
        return F.dropout(self.act_fn(gate) * up, 0.5, self.training)


class DropoutModule(MixtralExperts):
    dropout = torch.nn.Dropout(0.0)

    def _apply_gate(self, gate_up):
        gate, up = split(gate_up)
        return self.dropout(self.act_fn(gate)) * up


class OnlyOfSmallOnes(MixtralExperts):
    """Works on what a trial would think of, and on nothing else."""

    def _apply_gate(self, gate_up):
        if not gate_up.abs().max() < 1e3:
            raise ValueError("too large")
        gate, up = split(gate_up)
        return self.act_fn(gate) * up


class Remembers(MixtralExperts):
    def _apply_gate(self, gate_up):
        gate, up = split(gate_up)
        self.__dict__["seen"] = self.__dict__.get("seen", 0) + 1
        return self.act_fn(gate) * up


class Writes(MixtralExperts):
    def _apply_gate(self, gate_up):
        gate, up = split(gate_up)
        self.last = gate
        return self.act_fn(gate) * up


CAP = {"value": 1e9}


class OfAGlobal(MixtralExperts):
    def _apply_gate(self, gate_up):
        gate, up = split(gate_up)
        return self.act_fn(gate.clamp(max=CAP["value"])) * up


class ClampedIn16Bits(MixtralExperts):
    def _apply_gate(self, gate_up):
        gate, up = split(gate_up)
        return self.act_fn(gate if gate_up.dtype == torch.float32 else gate.clamp(max=1)) * up


NOT_OURS = [
    Remembers,
    Writes,
    OfAGlobal,
    ClampedIn16Bits,
    ClampedAt7,
    UpClampedAt100,
    SoftCapped,
    OfAParameter,
    NanToZero,
    DropoutModule,
    OnlyOfSmallOnes,
]


def inputs(module, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    x = scale * torch.randn(12, module.hidden_dim, generator=generator)
    ids = torch.rand(12, module.num_experts, generator=generator).topk(2)[1]
    return x, ids, torch.rand(12, 2, generator=generator)


def runs_as_stock(module, scale=1.0):
    args = inputs(module, scale)
    outputs = []
    for implementation in ("batched_mm", INTERFACE):  # eager does not ask for `_apply_gate`
        module.config._experts_implementation_internal = implementation
        torch.manual_seed(0)
        with torch.no_grad():
            outputs.append(module(*args))
    return torch.allclose(*outputs, rtol=1e-4, atol=1e-4 * outputs[0].abs().max().item())


@pytest.mark.parametrize("cls", NOT_OURS)
def test_not_ours(kernel, cls):
    module = mixtral().eval()
    module.__class__ = cls
    assert kernel.integration.gates.gate_of(module) is None
    assert runs_as_stock(module, 1.0 if cls is OnlyOfSmallOnes else 300.0)


def test_dropout_is_ours_while_it_does_nothing(kernel):
    module = mixtral()
    module.__class__ = Dropout
    assert kernel.integration.gates.gate_of(module.eval()).activation == "silu"
    assert kernel.integration.gates.gate_of(module.train()) is None
    assert kernel.integration.gates.gate_of(module.eval()).activation == "silu"
    state = torch.get_rng_state()
    kernel.integration.gates._TRIED.pop(Dropout._apply_gate)
    assert kernel.integration.gates.gate_of(module.train()) is None
    assert torch.equal(torch.get_rng_state(), state), "a trial draws nothing from the program's generator"


class MayBeClamped(MixtralExperts):
    def _apply_gate(self, gate_up):
        gate, up = split(gate_up)
        limit = getattr(self, "clamp_limit", None)
        return self.act_fn(gate if limit is None else gate.clamp(max=limit)) * up


def test_an_attribute_that_comes_later(kernel):
    module = mixtral()
    module.__class__ = MayBeClamped
    gate_of = kernel.integration.gates.gate_of
    assert gate_of(module).activation == "silu" and runs_as_stock(module, 30.0)
    module.clamp_limit = 0.5
    assert gate_of(module) is None and runs_as_stock(module, 30.0)  # up is not clamped
    del module.clamp_limit
    assert gate_of(module).activation == "silu" and runs_as_stock(module, 30.0)


def test_an_attribute_that_changes(kernel):
    module = mixtral()
    module.__class__ = OfSigmoids
    for slope in (1.5, 0.25):
        module.slope = slope
        assert kernel.integration.gates.gate_of(module).alpha == slope and runs_as_stock(module, 5.0)


def test_an_attribute_that_is_new_in_every_step(kernel, monkeypatch):
    gates = kernel.integration.gates
    monkeypatch.setattr(gates, "_MOST_TRIALS", 2)
    module = mixtral()
    module.__class__ = OfSigmoids
    for slope in (0.5, 0.75, 1.0, 1.25):
        module.slope = slope
        assert gates.gate_of(module).alpha == slope
    assert [gate.alpha for _, gate in gates._TRIED[OfSigmoids._apply_gate]] == [1.0, 1.25]


def test_a_hook_on_the_activation(kernel):
    module = mixtral()
    assert kernel.integration.gates.gate_of(module).activation == "silu"
    handle = module.act_fn.register_forward_hook(lambda act, args, out: 2 * out)
    assert kernel.integration.gates.gate_of(module) is None and runs_as_stock(module)
    handle.remove()
    assert kernel.integration.gates.gate_of(module).activation == "silu" and runs_as_stock(module)


@pytest.mark.parametrize("how", ["bound", "function"])
def test_a_gate_on_the_instance(kernel, how):
    module = mixtral()
    if how == "bound":
        module._apply_gate = MethodType(ClampedAt7._apply_gate, module)
    else:
        module._apply_gate = lambda gate_up: ClampedAt7._apply_gate(module, gate_up)
    assert kernel.integration.gates.gate_of(module) is None and runs_as_stock(module, 300.0)


def test_an_activation_that_kernelize_put_a_kernel_in(kernel):
    """Transformers names SiLU for the Hub: the function is the same. Anything else in its place is not known."""
    module = mixtral()
    module.act_fn.forward = MethodType(type(module.act_fn).forward, module.act_fn)
    assert kernel.integration.gates.gate_of(module).activation == "silu"
    module.act_fn.forward = MethodType(torch.nn.SiLU.forward, module.act_fn)  # a layer's
    assert kernel.integration.gates.gate_of(module).activation == "silu"
    module.act_fn.forward = MethodType(lambda act, x: 2 * F.silu(x), module.act_fn)
    assert kernel.integration.gates.gate_of(module) is None and runs_as_stock(module)


def test_a_trial_in_somebody_else_s_modes(kernel):
    from torch._subclasses.fake_tensor import FakeTensorMode

    kernel.integration.gates._TRIED.pop(Plain._apply_gate, None)
    module = mixtral()
    module.__class__ = Plain
    with FakeTensorMode(), torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        assert kernel.integration.gates.gate_of(module).activation == "silu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cls", [Plain, OfSigmoids, ClampedAt7, InAnotherDtype])
def test_a_trial_while_a_model_is_loaded_in_another_dtype(kernel, cls, dtype):
    gates = kernel.integration.gates
    module = mixtral()
    module.__class__ = cls
    gates._TRIED.pop(cls._apply_gate, None)
    expected = gates.gate_of(module)
    gates._TRIED.pop(cls._apply_gate, None)
    torch.set_default_dtype(dtype)
    try:
        assert gates.gate_of(module) == expected
    finally:
        torch.set_default_dtype(torch.float32)
