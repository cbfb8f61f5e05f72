"""What `moe_experts` takes: dtypes, also under autocast, and errors that name the argument."""

import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from oracle import layer

ARGUMENTS = ["hidden_states", "top_k_index", "top_k_weights", "gate_up_proj", "down_proj"]


def test_autocast_casts_like_linear(kernel, device):
    args = layer(33, 4, 2, 64, 32, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = kernel.moe_experts(*args)
    x, index, weights, gate_up_proj, down_proj = args
    expected = kernel.moe_experts(x.bfloat16(), index, weights, gate_up_proj.bfloat16(), down_proj.bfloat16())
    assert torch.equal(out, expected)


@pytest.mark.parametrize("operand", [*(name for name in ARGUMENTS if name != "top_k_index"), "gate_up_proj_bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_autocast_casts_what_linear_casts(kernel, device, operand, dtype):
    """fp64 stays what it is; beside other dtypes that is an error here as there."""
    tensors = dict(zip(ARGUMENTS, layer(9, 4, 2, 64, 32, device=device)))
    tensors["gate_up_proj_bias"] = torch.ones(4, 64, device=device)
    mixed = {**tensors, operand: tensors[operand].to(dtype)}
    uniform = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    with torch.autocast(device, dtype=torch.bfloat16):
        linear = F.linear(uniform["hidden_states"], uniform["gate_up_proj"][0])
        if device == "cpu" or dtype != torch.float64:
            assert kernel.moe_experts(**uniform).dtype == linear.dtype
        if dtype == torch.float64 and operand != "top_k_weights":
            with pytest.raises(TypeError, match="got torch"):
                kernel.moe_experts(**mixed)
        else:
            assert kernel.moe_experts(**mixed).dtype == torch.bfloat16


def test_autocast_makes_no_floats(kernel, device):
    """Of integers, and of fp8 codes without their scale, which is forgotten then."""
    args = layer(9, 4, 2, 64, 32, device=device)
    for argument, dtype in ((0, torch.int32), (3, torch.int8), (3, torch.float8_e4m3fn)):
        spoiled = [t.to(dtype) if i == argument else t for i, t in enumerate(args)]
        with torch.autocast(device, dtype=torch.bfloat16), pytest.raises(TypeError, match=f"got {dtype}"):
            kernel.moe_experts(*spoiled)


BAD = [  # argument, how it is spoiled, error, part of the message
    ("hidden_states", lambda x: x[0], ValueError, r"hidden_states: expected \(T, H\), got \(64,\)"),
    ("hidden_states", lambda x: x[:, :60], ValueError, r"gate_up_proj: expected \(E, 2I, 60\).*got \(4, 64, 64\)"),
    ("hidden_states", lambda x: x.int(), TypeError, "hidden_states: expected one of .*got torch.int32"),
    ("hidden_states", lambda x: x.bfloat16(), TypeError, "gate_up_proj: expected torch.bfloat16 like hidden_states"),
    ("hidden_states", lambda x: x.to("meta"), ValueError, "gate_up_proj: expected on meta like hidden_states, got cpu"),
    ("top_k_index", lambda x: x.float(), TypeError, "top_k_index: expected int32 or int64, got torch.float32"),
    ("top_k_index", lambda x: x.float().requires_grad_(), TypeError, "top_k_index: expected int32 or int64"),
    ("top_k_index", lambda x: x.bool(), TypeError, "top_k_index: expected int32 or int64, got torch.bool"),
    ("top_k_index", lambda x: x.to(torch.int16), TypeError, "top_k_index: expected int32 or int64, got torch.int16"),
    ("top_k_index", lambda x: x.flatten(), ValueError, r"top_k_index: expected \(T, top_k\), got \(10,\)"),
    ("top_k_index", lambda x: x[:3], ValueError, r"top_k_index: expected \(5, top_k\) to fit hidden_states"),
    ("top_k_index", lambda x: x.to("meta"), ValueError, "top_k_index: expected on cpu like hidden_states, got meta"),
    ("top_k_weights", lambda x: x[:, :1], ValueError, r"top_k_weights: expected \(5, 2\) like top_k_index"),
    ("top_k_weights", lambda x: x.int(), TypeError, "top_k_weights: expected a float dtype, got torch.int32"),
    ("top_k_weights", lambda x: x.to("meta"), ValueError, "top_k_weights: expected on cpu like hidden_states"),
    ("gate_up_proj", lambda x: x[0], ValueError, r"gate_up_proj: expected \(E, 2I, 64\).*got \(64, 64\)"),
    ("gate_up_proj", lambda x: x[:, :63], ValueError, r"gate_up_proj: expected \(E, 2I, 64\).*got \(4, 63, 64\)"),
    ("gate_up_proj", lambda x: x[:0], ValueError, r"gate_up_proj: expected at least one expert, got \(0, 64, 64\)"),
    ("gate_up_proj", lambda x: x[:, :62], ValueError, r"down_proj: expected \(4, 64, 31\).*got \(4, 64, 32\)"),
    ("gate_up_proj", lambda x: x.half(), TypeError, "gate_up_proj: expected torch.float32 like hidden_states"),
    ("gate_up_proj", lambda x: x.to("meta"), ValueError, "gate_up_proj: expected on cpu like hidden_states, got meta"),
    ("down_proj", lambda x: x[:2], ValueError, r"down_proj: expected \(4, 64, 32\).*got \(2, 64, 32\)"),
    ("down_proj", lambda x: x.mT, ValueError, r"down_proj: expected \(4, 64, 32\).*got \(4, 32, 64\)"),
    ("gate_up_proj_bias", lambda x: x[:, :3], ValueError, r"gate_up_proj_bias: expected \(4, 64\).*got \(4, 3\)"),
    ("down_proj_bias", lambda x: x[:2], ValueError, r"down_proj_bias: expected \(4, 64\).*got \(2, 64\)"),
    ("down_proj_bias", lambda x: x.half(), TypeError, "down_proj_bias: expected torch.float32 like hidden_states"),
    ("limit", lambda x: 0.0, ValueError, "limit: expected a positive number or None, got 0.0"),
    ("activation", lambda x: "swish", ValueError, "activation: expected one of silu, .*got 'swish'"),
]


@pytest.mark.parametrize("argument, spoil, error, message", BAD)
def test_bad_input_is_named(kernel, argument, spoil, error, message):
    kwargs = dict(zip(ARGUMENTS, layer(5, 4, 2, 64, 32)), activation="silu", limit=1.0)
    kwargs |= {name: torch.zeros(4, 64) for name in ("gate_up_proj_bias", "down_proj_bias")}
    kwargs[argument] = spoil(kwargs[argument])
    with pytest.raises(error, match=message):
        kernel.moe_experts(**kwargs)


@pytest.mark.parametrize("version, message", [(None, "none is installed"), ("3.5.1", "found 3.5.1")])
def test_triton_missing_or_too_old_is_said(kernel, monkeypatch, version, message):
    gpu = import_module(f"{kernel.__name__}.gpu")
    fake = None if version is None else SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "triton", fake)  # None: any import of it fails
    with pytest.raises(ImportError, match=f"needs Triton 3.6 or newer.*{message}.*pip install"):
        gpu.launchers()
