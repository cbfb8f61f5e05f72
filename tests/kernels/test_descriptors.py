"""Descriptors that are made without their class's checks are those that it would make."""

from importlib import import_module

import pytest
import torch

pytest.importorskip("triton")


@pytest.fixture
def module(kernel, monkeypatch):
    module = import_module(f"{kernel.__name__}.kernels.descriptors")
    monkeypatch.setattr(module, "_forms", {})
    return module


def by_triton(x, shape, strides, box):
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, shape, strides, box)


def by_gluon(kernel):
    return import_module(f"{kernel.__name__}.kernels.hopper")._with_layout


@pytest.mark.parametrize("kind", ["triton", "gluon"])
def test_another_tensor_of_the_same_form(kernel, module, kind):
    make = by_triton if kind == "triton" else by_gluon(kernel)
    for rows in (256, 128, 512):
        x = torch.empty(rows, 64, dtype=torch.bfloat16)
        got, expected = (f(x, x.shape, x.stride(), [128, 64]) for f in (lambda *a: module.described(make, *a), make))
        assert type(got) is type(expected) and got.base is x
        assert {**vars(got), "base": None} == {**vars(expected), "base": None}
    (fields,) = [fields for _, fields in module._forms.values()]
    assert not any(isinstance(value, torch.Tensor) for value in fields.values())


def test_forms_are_told_apart(module):
    x = torch.empty(256, 128, dtype=torch.bfloat16)
    for tensor, box in ((x, [128, 64]), (x, [64, 64]), (x[:, :64], [128, 64]), (x.half(), [128, 64])):
        got = module.described(by_triton, tensor, tensor.shape, tensor.stride(), box)
        assert (got.block_shape, got.strides) == (box, tensor.stride())
    assert len(module._forms) == 3 + 1 - (x.stride() == x[:, :64].stride())


def test_an_unaligned_tensor_is_refused(module):
    x = torch.empty(256, 64, dtype=torch.bfloat16)
    module.described(by_triton, x, x.shape, x.stride(), [128, 64])
    x = torch.empty(128 * 64 + 1, dtype=torch.bfloat16)[1:].view(128, 64)
    with pytest.raises(AssertionError, match="16-byte aligned"):
        module.described(by_triton, x, x.shape, x.stride(), [128, 64])
