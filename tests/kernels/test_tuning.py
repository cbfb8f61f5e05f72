"""Tuned configurations: which one a call gets, what a bad file leads to, how a file is written."""

import json
import math
import os
import re
from importlib import import_module
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kernels import get_kernel

from suite import REPO_ID, ROOT

SHAPE = (8, 64, 32)  # E, H, I
TRAITS = import_module(f"{get_kernel(REPO_ID, version=1).__name__}.launch_configs").TRAITS
BF16, SM90, GPU = torch.bfloat16, TRAITS["sm_90"], "NVIDIA Test/GPU"
SHIPPED = sorted((ROOT / "torch-ext/moe_grouped_gemm/configs").glob("*.json"))


@pytest.fixture
def files(kernel):
    return import_module(f"{kernel.__name__}.tuned_files")


def entry(rows, block_m=64, **changes):
    gemm = {"BLOCK_M": block_m, "MIN_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "GROUP_M": 8}
    gemm = {**gemm, "num_warps": 4, "num_stages": 3, "USE_TMA": True}
    return {"rows": rows, "gate_up": {**gemm, **changes}, "down": dict(gemm)}


def of_both(**changes):
    """An entry in which both GEMMs have these."""
    both = entry(64, **changes)
    return {**both, "down": dict(both["gate_up"])}


def specialized(kernel="down", **changes):
    """An entry for the warp-specialized kernel of this GEMM, but for these changes."""
    tile = {"BLOCK_M": 128, "MIN_M": 64, "BLOCK_N": 256 if kernel == "down" else 128, "num_warps": 8, **changes}
    whole = entry(64, **{field: tile[field] for field in ("BLOCK_M", "MIN_M")}, num_warps=8)
    whole["down"].update(whole["gate_up"])
    whole[kernel].update({"USE_TMA": True, "WARP_SPECIALIZED": True, **tile})
    return whole


def content(*entries):
    return {"tuned_with": {"triton": "3.6.0"}, "entries": list(entries)}


def put(tuning, text, dtype=BF16, folder=None):
    path = tuning.config_path(folder or tuning.folders()[-1], SHAPE, dtype, GPU)
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


def test_the_nearest_in_log_rows_is_taken(tuning):
    tuned_for = {64: 16, 1024: 32, 4096: 64}  # rows -> BLOCK_M, by which to tell the entries apart
    put(tuning, content(*(entry(rows, block_m) for rows, block_m in tuned_for.items())))
    for rows in (1, 63, 64, 200, 255, 257, 1024, 2047, 2049, 4096, 10**7):
        nearest = min(tuned_for, key=lambda tuned: abs(math.log(rows / tuned)))
        up, down = tuning.experts_config(rows, SHAPE, BF16, SM90, GPU)
        assert up.BLOCK_M == down.BLOCK_M == tuned_for[nearest], rows


def test_a_file_is_for_one_layer_dtype_and_gpu(tuning):
    put(tuning, content(entry(64, GROUP_M=1)))
    assert tuning.experts_config(64, SHAPE, BF16, SM90, GPU).gate_up.GROUP_M == 1
    heuristic = tuning.experts_config(64, SHAPE, BF16, SM90, "")
    assert heuristic in [config for _, config in tuning.EXPERTS.of(BF16, SM90)]
    for other in (((4, 64, 32), BF16, GPU), (SHAPE, torch.float16, GPU), (SHAPE, BF16, "NVIDIA Other GPU")):
        assert tuning.experts_config(64 * other[0][0] // 8, *other[:2], SM90, other[2]) == heuristic


def test_without_a_file_the_heuristics_serve(tuning, recwarn):
    path = put(tuning, content(entry(64, GROUP_M=1)))
    path.rename(path.with_suffix(".hidden"))
    for rows in (1, 64, 4096):
        assert tuning.experts_config(rows, SHAPE, BF16, SM90, GPU) == tuning.experts_config(rows, SHAPE, BF16, SM90, "")
    assert not recwarn


def test_a_file_is_read_once(tuning, monkeypatch):
    put(tuning, content(entry(64)))
    reads = []
    read = tuning.read_configs
    monkeypatch.setattr(tuning, "read_configs", lambda *args: reads.append(args) or read(*args))
    for rows in range(1, 100):
        tuning.experts_config(rows, SHAPE, BF16, SM90, GPU)
    assert len(reads) == 1


def test_fields_with_a_default_may_be_missing(tuning):
    put(tuning, content(entry(64)))
    written = tuning.experts_config(64, SHAPE, BF16, SM90, GPU).gate_up
    assert written == tuning.GemmConfig(**entry(64)["gate_up"])
    # Every field is understood, those with a default too.
    put(tuning, content({"rows": 64, "gate_up": written._asdict(), "down": written._asdict()}))
    tuning.experts_table.cache_clear()
    assert tuning.experts_config(64, SHAPE, BF16, SM90, GPU).down == written


BAD = [
    pytest.param("", "Expecting value", id="empty"),
    pytest.param(json.dumps(content(entry(64)))[:-20], "delimiter|Unterminated|Expecting", id="truncated"),
    pytest.param("\0\1garbage", "Expecting value", id="garbage"),
    pytest.param([], "the file: expected an object, got list", id="no-object"),
    pytest.param({"entries": [entry(64)]}, "the file: expected the fields tuned_with, entries", id="no-origin"),
    pytest.param(content(), "entries: expected a list of at least one", id="no-entries"),
    pytest.param({**content(), "entries": {}}, "entries: expected a list", id="entries-no-list"),
    pytest.param(content(None), "entry 0: expected an object, got NoneType", id="entry-no-object"),
    pytest.param(content({**entry(64), "hints": 1}), "entry 0: expected the fields .*, hints", id="field-of-entry"),
    pytest.param(content(entry("64")), "entry 0: rows: expected an integer above 0 .*, got '64'", id="rows-text"),
    pytest.param(content(entry(64), entry(64)), "entry 1: rows: expected an integer above 64", id="rows-twice"),
    pytest.param(content(entry(64, BLOCK_Q=4)), "entry 0: gate_up: expected the fields .*BLOCK_Q", id="unknown-field"),
    pytest.param(content(entry(64, BLOCK_N=48)), "BLOCK_N: expected a power of two, 16 or more, got 48", id="no-power"),
    pytest.param(content(entry(64, BLOCK_N=8)), "BLOCK_N: expected a power of two, 16 or more, got 8", id="too-small"),
    pytest.param(content(entry(64, num_warps=-4)), "num_warps: expected a power of two, 1 or more", id="negative"),
    pytest.param(content(entry(64, num_warps=4.0)), "num_warps: expected int, got 4.0", id="float"),
    pytest.param(content(entry(64, num_stages=True)), "num_stages: expected int, got True", id="bool-for-int"),
    pytest.param(content(entry(64, USE_TMA=1)), "USE_TMA: expected bool, got 1", id="int-for-bool"),
    pytest.param(content(entry(64, MIN_M=128)), "MIN_M 128 exceeds BLOCK_M 64", id="min-above-block"),
    pytest.param(content(entry(64, BLOCK_M=128)), "must share BLOCK_M and MIN_M", id="two-block-m"),
    pytest.param(content(entry(64, MIN_M=64)), "must share BLOCK_M and MIN_M", id="two-min-m"),
    pytest.param(content(entry(10**400)), "rows: expected an integer above 0 and below 2", id="rows-no-int32"),
    pytest.param(content(entry(64, BLOCK_N=256)), "gate_up: BLOCK_N: 512 rows or columns are more", id="box-of-both"),
    pytest.param(content(of_both(BLOCK_M=512)), "gate_up: BLOCK_M: 512 rows .* 256 that TMA", id="box-of-rows"),
    pytest.param(content(of_both(BLOCK_M=2**20, USE_TMA=False)), "num_warps: 4 have no registers", id="huge-tile"),
    pytest.param(content(entry(64, num_stages=64)), "num_stages: 64 of them need 1048576 bytes", id="too-many-stages"),
    pytest.param(content(entry(64, num_warps=64)), "num_warps: expected at most 32, got 64", id="too-many-warps"),
    pytest.param(content(entry(64, GROUP_M=2**30)), "GROUP_M: expected at most 32768", id="group-of-all"),
    pytest.param(content(specialized(USE_TMA=False)), "down: USE_TMA: expected true with", id="specialized-loads"),
    pytest.param(content(specialized(num_stages=16)), "down: num_stages: 16 of them", id="specialized-stages"),
    pytest.param(content(specialized(num_stages=1)), "down: num_stages: expected 2 or more with", id="one-stage"),
    *(
        pytest.param(content(specialized(**{field: size})), f"{field}: expected .* with WARP", id=f"{field}-{size}")
        for field, size in (("BLOCK_M", 256), ("BLOCK_M", 64), ("MIN_M", 32), ("BLOCK_N", 128), ("BLOCK_K", 32))
    ),
    *(
        pytest.param(content(specialized("gate_up", **changes)), f"gate_up: {reason}", id=f"gate_up-{reason[:7]}")
        for changes, reason in (
            ({"BLOCK_N": 64}, "BLOCK_N: expected 128 with WARP"),
            ({"BLOCK_K": 32}, "BLOCK_K: expected 64 with WARP"),
            ({"USE_TMA": False}, "USE_TMA: expected true with"),
        )
    ),
]


@pytest.mark.parametrize("text, reason", BAD)
def test_a_bad_file_warns_once_and_leaves_the_heuristics(tuning, text, reason):
    path = put(tuning, text)
    with pytest.warns(UserWarning) as warnings:
        got = [tuning.experts_config(rows, SHAPE, BF16, SM90, GPU) for rows in (64, 65)]
    assert got == [tuning.experts_config(64, SHAPE, BF16, SM90, "")] * 2
    (warning,) = warnings
    assert str(warning.message).startswith(f"{path}: ") and "Heuristic" in str(warning.message)
    assert re.search(reason, str(warning.message))


def test_a_missing_field_is_named(tuning):
    bad = entry(64)
    del bad["down"]["BLOCK_K"]
    put(tuning, content(bad))
    with pytest.warns(UserWarning, match="entry 0: down: expected the fields .*BLOCK_K"):
        tuning.experts_config(64, SHAPE, BF16, SM90, GPU)


def test_calls_look_their_files_up(kernel, tuning, monkeypatch):
    gpu, dense = (import_module(f"{kernel.__name__}.{name}") for name in ("gpu", "weights.dense"))
    put(tuning, content(entry(64, GROUP_M=1)))
    monkeypatch.setattr(gpu, "traits", lambda device: SM90)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    down_proj = torch.empty(SHAPE, dtype=BF16, device="meta")
    assert dense._experts_config(64, down_proj).gate_up.GROUP_M == 1
    # A GPU that is run as another has no tuned files.
    gpu.device_name.cache_clear()
    monkeypatch.setenv("MOE_GROUPED_GEMM_AS", "sm_90")
    assert dense._experts_config(64, down_proj).gate_up.GROUP_M != 1


def test_what_can_work_is_accepted(kernel, tuning):
    """The warp-specialized tile in a file, and every heuristic as if it were in one."""
    for name in ("gate_up", "down"):
        put(tuning, content(specialized(name)))
        tuning.experts_table.cache_clear()
        assert getattr(tuning.experts_config(64, SHAPE, BF16, SM90, GPU), name).WARP_SPECIALIZED
    fault_of = import_module(f"{kernel.__name__}.launch_configs").fault_of
    for dtype, traits in product((BF16, torch.float32), TRAITS.values()):
        for _, (up, down) in tuning.EXPERTS.of(dtype, traits):
            assert not fault_of("gate_up", up, dtype, traits)
            assert not fault_of("down", down, dtype, traits)


@pytest.mark.parametrize("name", ["gate_up", "down"])
@pytest.mark.parametrize("dtype, gpu", [(torch.float32, "sm_90"), (BF16, "sm_80"), (BF16, "sm_100")], ids=str)
def test_a_file_for_another_kind_of_gpu_or_dtype(tuning, dtype, gpu, name):
    put(tuning, content(specialized(name)), dtype)
    with pytest.warns(UserWarning, match=r"WARP_SPECIALIZED: only|USE_TMA: expected false"):
        found = tuning.experts_config(64, SHAPE, dtype, TRAITS[gpu], GPU)
    assert found == tuning.experts_config(64, SHAPE, dtype, TRAITS[gpu], "")


@pytest.mark.parametrize(
    "rows, specialized, num_stages",
    [(50, [False, False], 3), (128, [False, True], 3), (180, [False, True], 3), (181, [True, True], 4)],
)
def test_kernels_for_many_rows_on_hopper(tuning, rows, specialized, num_stages):
    """By rows of an expert; fp16 is as bf16, and fp32 has no such kernels."""
    for dtype in (BF16, torch.float16):
        both = tuning.heuristic_config(64 * rows, 64, dtype, SM90)
        assert [config.WARP_SPECIALIZED for config in both] == specialized and both.down.num_stages == num_stages
    assert not any(c.WARP_SPECIALIZED for c in tuning.heuristic_config(64 * rows, 64, torch.float32, SM90))


def test_writing_is_atomic(tuning, files, monkeypatch, tmp_path):
    path = tuning.config_path(tmp_path, SHAPE, BF16, GPU)
    files.write_configs(path, {"triton": "3.6.0"}, [entry(1024), entry(64)], BF16, SM90)
    assert [rows for rows, _ in files.read_configs(path, BF16, SM90)] == [64, 1024]
    before = path.read_text()
    assert len(before.splitlines()) == 7  # an entry a line
    with pytest.raises(ValueError, match="share BLOCK_M"):
        files.write_configs(path, {"triton": "3.6.0"}, [entry(64, BLOCK_M=128)], BF16, SM90)

    def full(self, text, encoding):
        self.write_bytes(b"{")
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        files.write_configs(path, {"triton": "3.6.0"}, [entry(64)], BF16, SM90)
    assert path.read_text() == before and os.listdir(tmp_path) == [path.name]


def test_a_folder_of_the_users_comes_first(tuning, monkeypatch, tmp_path):
    put(tuning, content(entry(64, GROUP_M=1)))
    monkeypatch.setenv("MOE_GROUPED_GEMM_CONFIGS", str(tmp_path / "mine"))
    assert tuning.experts_config(64, SHAPE, BF16, SM90, GPU).gate_up.GROUP_M == 1  # there is none
    (tmp_path / "mine").mkdir()
    path = put(tuning, content(entry(64, GROUP_M=2)), folder=tmp_path / "mine")
    tuning.experts_table.cache_clear()
    assert tuning.experts_config(64, SHAPE, BF16, SM90, GPU).gate_up.GROUP_M == 2
    # It is trusted no more than what ships.
    path.write_text("[" * 10**6)
    tuning.experts_table.cache_clear()
    with pytest.warns(UserWarning, match="mine.*nested too deeply.*Heuristic"):
        found = tuning.experts_config(64, SHAPE, BF16, SM90, GPU)
    assert found == tuning.heuristic_config(64, SHAPE[0], BF16, SM90)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files(kernel, path):
    """Valid, and named as they are looked up. That their kernels compile is for test_compile.py to show."""
    module = import_module(f"{kernel.__name__}.tuned_files")
    sizes = dict(part.split("=") for part in path.stem.split(","))
    shape = [int(sizes[letter]) for letter in "EHI"]
    assert module.config_path(path.parent, shape, getattr(torch, sizes["dtype"]), sizes["device"]).name == path.name
    origin = json.loads(path.read_text())["tuned_with"]
    assert {"compute_capability", "torch", "triton"} < set(origin)
    capability = origin["compute_capability"]
    traits = TRAITS[f"sm_{capability.replace('.', '')}"]
    assert len(module.read_configs(path, getattr(torch, sizes["dtype"]), traits)) > 5


def properties(**values):
    return SimpleNamespace(**{"shared_memory_per_block": 49152, "warp_size": 32, **values})


NVIDIA = {  # compute capability, shared memory a block may ask for -> the table that its traits choose
    ((8, 0), 163): "large",
    ((8, 6), 99): "small",
    ((8, 9), 99): "small",
    ((9, 0), 227): "hopper",
    ((10, 3), 227): "blackwell",
    ((12, 1), 99): "small_tma",
    ((7, 5), 64): "least",
}


@pytest.mark.parametrize("capability, shared", NVIDIA)
def test_traits_of_nvidia(kernel, tuning, monkeypatch, capability, shared):
    gpu = import_module(f"{kernel.__name__}.gpu")
    major, minor = capability
    found = properties(major=major, minor=minor, shared_memory_per_block_optin=shared * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(torch.version, "hip", None)
    traits = gpu.traits.__wrapped__(0)
    table = NVIDIA[capability, shared]
    assert tuning.EXPERTS.of(BF16, traits) is getattr(tuning.EXPERTS, table)
    # What has no table of its own for sm_120 takes that for its shared memory.
    assert tuning.WGRAD.of(BF16, traits) is getattr(tuning.WGRAD, table.removesuffix("_tma"))
    assert traits.has_fp8 == (capability >= (8, 9)) and traits.has_tma == (major >= 9)
    known = TRAITS.get(f"sm_{major}{minor}")
    assert known in (None, traits)


@pytest.mark.parametrize("gpu_name, shared", [("gfx942", 64), ("gfx950", 160)])
def test_traits_of_amd(kernel, tuning, monkeypatch, gpu_name, shared):
    """torch has capability (9, 4) for an MI300, and in older versions nothing on its shared memory."""
    gpu = import_module(f"{kernel.__name__}.gpu")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    found = properties(major=9, minor=4, warp_size=64, shared_memory_per_block=shared * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert gpu.traits.__wrapped__(0) == TRAITS[gpu_name]
    assert tuning.ROUTER.of(BF16, TRAITS[gpu_name]) is getattr(tuning.ROUTER, {64: "least", 160: "large"}[shared])
    # A dot of AMD's has no fewer rows, and tiles of 8 over 4 bits have a kernel for NVIDIA's.
    assert min(config.BLOCK_M for _, config in tuning.FP4.of(BF16, TRAITS[gpu_name])) == 16
    assert tuning.FP4.of(BF16, TRAITS["sm_80"])[0].config.BLOCK_M == 8
    del found.shared_memory_per_block
    assert gpu.traits.__wrapped__(0) == TRAITS["gfx942"]


def test_a_gpu_runs_as_another(kernel, monkeypatch):
    gpu = import_module(f"{kernel.__name__}.gpu")
    monkeypatch.setenv("MOE_GROUPED_GEMM_AS", "sm_89")
    assert gpu.traits.__wrapped__(0) == TRAITS["sm_89"] and gpu.device_name.__wrapped__(0) == ""
    monkeypatch.setenv("MOE_GROUPED_GEMM_AS", "sm_61")
    with pytest.raises(ValueError, match="MOE_GROUPED_GEMM_AS: expected one of sm_80, .*, got sm_61"):
        gpu.traits.__wrapped__(0)
