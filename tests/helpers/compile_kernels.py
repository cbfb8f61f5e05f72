"""Compiles every kernel in every dtype and shipped configuration for GPUs that need not be here; see test_compile.py.

The real launchers run, on CPU tensors, with a driver that only names the target (compile_only.py): Triton
specialises the kernels as it would on that GPU, compiles them, and launches nothing. Prints one line a kernel; exits
with 1 if any check failed. What has not changed comes from Triton's cache.

    compile_kernels.py sm_90 gfx942            # for these GPUs, by default for all
    compile_kernels.py --one-of-each sm_90     # of each launcher, dtype and way of reading one configuration
"""

import argparse
import json
import re
import sys
from functools import partial
from importlib import import_module
from itertools import chain, product

import torch
from kernels import get_kernel
from triton.backends.compiler import GPUTarget

from compile_only import compile_only, registers_and_stack
from oracle import ROUTER_FORMS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8 = torch.float8_e4m3fn
EXPERTS, HIDDEN, INTER = 8, 2048, 768
GPT_OSS = {"activation": "swigluoai", "limit": 7.0, "interleaved": True}  # with biases and transposed weights


MMA = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma.sync": "mma.sync", "mfma": "v_mfma_"}
GATE_UP = "_gate_up_hopper_kernel"
# Those of kernels/fp4_registers.py and decode_fp4.py multiply alike on all of NVIDIA's.
FROM_REGISTERS = ("_grouped_gemm_fp4_few_kernel", "_gate_up_decode_fp4_kernel", "_down_decode_fp4_kernel")


def check(gpu, traits, name, kernel, dtype, config) -> bool:
    faults = []
    shared = kernel.metadata.shared
    if shared > traits.shared_memory:
        faults.append("too much shared memory")
    if "cubin" in kernel.asm:
        code = kernel.asm["ptx"]
        registers, stack = registers_and_stack(kernel.asm["cubin"])
    else:
        code = kernel.asm["amdgcn"]
        registers, stack = (
            int(re.search(rf"\.{field}:\s+(\d+)", code)[1]) for field in ("vgpr_count", "private_segment_fixed_size")
        )
    # Less is a value or two put aside outside the loop over K. With fp8 activations the assembler begins the second
    # product while it scales the first, and pays with some registers; from registers it may keep itself to 128.
    # The warp-specialized gate_up puts some aside once a tile: beside the sums of three blocks of rows little is free.
    if stack > (128 if dtype == FP8 else 64 if name == GATE_UP else 32 if name in FROM_REGISTERS else 16):
        faults.append("spills")
    mma = "mma.sync" if name in FROM_REGISTERS else traits.mma
    multiplies = "gemm" in name or "grad" in name
    multiplies |= name in ("_gate_up_kernel", GATE_UP, "_gate_up_fp8_kernel", *FROM_REGISTERS)
    if multiplies and dtype != torch.float32 and MMA[mma] not in code:
        if mma not in ("wgmma", "tcgen05") or is_of_warpgroups(name, config):
            faults.append(f"no {mma}")
    reads_by_tma = getattr(config, "USE_TMA", False) and name != "_wgrad_kernel"  # which has none of its own
    if reads_by_tma and "cp.async.bulk.tensor" not in code:
        faults.append("no TMA")
    if name == "_router_logits_kernel" and not re.search(r"add(\.rn)?(\.ftz)?\.f32|v_(pk_)?add_f32", code):
        faults.append("sums in the tensor cores alone")
    label = f"{gpu} {name} {str(dtype).removeprefix('torch.')} {config or ''}"
    usage = f"{registers} registers, {stack} B stack, {shared} B shared"
    print(f"{'FAULT: ' + ', '.join(faults) if faults else 'ok'}  {label}  {usage}", flush=True)
    return not faults


def is_of_warpgroups(name, config) -> bool:
    """Four warps and 64 rows: of the weight in a GEMM of low tiles, of p in wgrad. A rank may be less."""
    first = config.BLOCK_M if "grad" in name or config.MIN_M >= 64 else config.BLOCK_N
    return (first >= 64 and config.num_warps >= 4) or config.WARP_SPECIALIZED


def ways(config) -> set:
    """This configuration, and what weights/ makes of it for tensors that its kernel cannot read."""
    without = config._replace(WARP_SPECIALIZED=False)
    return {config, without, without._replace(USE_TMA=False)}


def gemm_launches(package, dtype, config, precision, experts, hidden, inter, is_tuned=False):
    """As `launches`, for both GEMMs of a layer. On "meta", where the weights of a real model take no memory.

    is_tuned: from a file, as it is and for the layout that was tuned.
    """
    kernels, Gate = import_module(f"{package}.kernels"), import_module(f"{package}.reference").Gate

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, a, w1, w2 = empty(96, hidden), empty(96, inter), empty(experts, 2 * inter, hidden), empty(experts, hidden, inter)
    slots, schedule = empty(96, dtype=torch.int32), empty(5, 96, dtype=torch.int32)
    for up in {config.gate_up} if is_tuned else ways(config.gate_up):
        for z in (None, empty(96, 2 * inter)):
            yield dtype, up, partial(kernels.gate_up, x, w1, slots, schedule, 6, Gate(), precision, up, z)
    for down in {config.down} if is_tuned else ways(config.down):
        yield dtype, down, partial(kernels.grouped_gemm, a, w2, schedule, precision, down)
        args = (empty(96, hidden), slots, empty(96, dtype=torch.float32))
        yield dtype, down, partial(kernels.grouped_gemm, a, w2, schedule, precision, down, *args)
    if is_tuned:
        return
    # Transposed weights, interleaved and not, with biases.
    w1, w2 = empty(experts, hidden, 2 * inter).mT, empty(experts, inter, hidden).mT
    b1, b2, z = empty(experts, 2 * inter), empty(experts, hidden), empty(96, 2 * inter)
    for up in ways(config.gate_up):
        for gate in (Gate(**GPT_OSS), Gate()):
            if not up.WARP_SPECIALIZED and (gate.interleaved or not up.USE_TMA):
                yield dtype, up, partial(kernels.gate_up, x, w1, slots, schedule, 6, gate, precision, up, z, b1)
    for down in ways(config.down):
        yield dtype, down, partial(kernels.grouped_gemm, a, w2, schedule, precision, down)
        if down.WARP_SPECIALIZED:  # rows of N that TMA cannot store
            yield dtype, down, partial(kernels.grouped_gemm, a, empty(experts, 100, inter), schedule, precision, down)
        else:
            yield dtype, down, partial(kernels.grouped_gemm, a, w2, schedule, precision, down, bias=b2)


def backward_launches(package, dtype, configs, precisions):
    """As `launches`, for what only the backward runs."""

    kernels, Gate = import_module(f"{package}.kernels"), import_module(f"{package}.reference").Gate

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, a, z = empty(16, HIDDEN), empty(96, INTER), empty(96, 2 * INTER)
    weights, slots = empty(96, dtype=torch.float32), empty(96, dtype=torch.int32)
    offsets = empty(EXPERTS + 1, dtype=torch.int32)
    for order in ({}, {"ordered": True}):
        yield dtype, None, partial(kernels.gather, x, slots, offsets, 6, **order)
    for needs_a, gate in product((True, False), (Gate(), Gate(**GPT_OSS))):
        yield dtype, None, partial(kernels.glu_backward, a, z, weights, slots, slots, offsets, gate, needs_a)
    for (_, config), precision in product(configs, precisions):
        for way in ways(config):
            yield dtype, way, partial(kernels.wgrad, z, a, offsets, precision, way)
            if way.WARP_SPECIALIZED:  # tiles of M that TMA cannot store
                yield dtype, way, partial(kernels.wgrad, empty(96, 72), a, offsets, precision, way)
    yield dtype, None, partial(kernels.row_sums, z, slots, offsets)
    yield dtype, None, partial(kernels.row_sums, x, slots, offsets, weights.view(16, 6))


def fp8_launches(package, traits, precisions):
    """As `launches`, for fp8 weights: as bytes where the target does not know the type."""
    kernels, tuning = import_module(f"{package}.kernels"), import_module(f"{package}.tuning")
    Gate = import_module(f"{package}.reference").Gate

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    codes = FP8 if traits.has_fp8 else torch.uint8
    w1, w2 = empty(EXPERTS, 2 * INTER, HIDDEN, dtype=codes), empty(EXPERTS, HIDDEN, INTER, dtype=codes)
    blocks = HIDDEN // 128, INTER // 128
    slots, schedule = empty(96, dtype=torch.int32), empty(5, 96, dtype=torch.int32)
    weights, index = empty(16, 6), empty(16, 6, dtype=torch.int64)
    for dtype, scale in [(d, torch.float32) for d in ((FP8,) if traits.has_fp8 else ()) + DTYPES] + [
        (FP8 if traits.has_fp8 else torch.bfloat16, torch.uint8)
    ]:
        s1, s2 = empty(EXPERTS, 2 * blocks[1], blocks[0], dtype=scale), empty(EXPERTS, *blocks, dtype=scale)
        out = torch.bfloat16 if dtype == FP8 else dtype
        x, a, y = empty(16, HIDDEN, dtype=dtype), empty(96, INTER, dtype=dtype), empty(96, HIDDEN, dtype=out)
        x_scale, a_scale = (empty(16, blocks[0]), empty(96, blocks[1])) if dtype == FP8 else (None, None)
        z = None if dtype == FP8 else empty(96, 2 * INTER, dtype=dtype)
        tables = tuning.FP8 if dtype == FP8 else tuning.FP8_WEIGHTS
        for (_, config), precision in product(tables.of(dtype, traits), precisions[dtype]):
            for up in ways(config.gate_up):
                for z_or_none in {id(t): t for t in (None, z)}.values():
                    args = (x, x_scale, w1, s1, slots, schedule, 6, Gate(), precision, up, z_or_none)
                    yield dtype, up, partial(kernels.gate_up_fp8, *args)
            if dtype == FP8 and config.down.WARP_SPECIALIZED:
                rows, row_scales = empty(96, HIDDEN, dtype=FP8), [empty(n, 96) for n in blocks]
                args = (rows, row_scales[0], w1, s1, schedule, Gate(), config.gate_up)
                yield dtype, config.down, partial(kernels.gate_up_fp8_hopper, *args)
                for out in (y, y.float()):
                    args = (a, row_scales[1], w2, s2, schedule, config.down, out)
                    yield dtype, config.down, partial(kernels.grouped_gemm_fp8_hopper, *args)
            elif config.down.WARP_SPECIALIZED:
                args = (empty(96, HIDDEN, dtype=dtype), w1, s1, schedule, config.down, z)
                yield dtype, config.down, partial(kernels.codes_gemm_hopper, *args)
            for down in ways(config.down._replace(WARP_SPECIALIZED=False)):
                args = (a, a_scale, w2, s2, schedule, precision, down, y)
                yield dtype, down, partial(kernels.grouped_gemm_fp8, *args)
        if dtype == FP8:
            continue
        config = tuning.FP8_DGRAD.of(dtype, traits)
        for precision in precisions[dtype]:
            yield dtype, config, partial(kernels.dgrad_fp8, y, w2, s2, schedule, precision, config)
            yield dtype, config, partial(kernels.dgrad_fp8, z, w1, s1, schedule, precision, config)
            if config.WARP_SPECIALIZED:
                yield dtype, config, partial(kernels.codes_gemm_hopper, z, w1, s1, schedule, config, y, transposed=True)
        up, down = tuning.DECODE_FP8
        yield dtype, up, partial(kernels.gate_up_decode_fp8, x, w1, s1, index, Gate(), up)
        for addend in (None, y):
            yield dtype, down, partial(kernels.down_decode_fp8, a, w2, s2, index, weights, down, addend)
        if traits.has_fp8:
            yield dtype, None, partial(kernels.quantize_rows, x)
            yield dtype, None, partial(kernels.quantize_slots, x, slots)


def fp4_launches(package, traits, precisions):
    """As `launches`, for weights in 4 bits; fp16 turns codes into numbers by instructions of its own."""
    kernels, tuning = import_module(f"{package}.kernels"), import_module(f"{package}.tuning")
    Gate = import_module(f"{package}.reference").Gate
    like_fixed_point = import_module(f"{package}.kernels.fixed_point").like_fixed_point

    def empty(*shape, dtype=torch.uint8):
        return torch.empty(shape, dtype=dtype, device="meta")

    schedule, index = empty(5, 96, dtype=torch.int32), empty(16, 6, dtype=torch.int64)
    for dtype in DTYPES:  # an adapter's products, over the same rows
        configs = [config for _, config in tuning.FP4.of(dtype, traits)] + [tuning.FP4_DGRAD.of(dtype, traits)]
        x, u = empty(96, INTER, dtype=dtype), empty(96, 16, dtype=dtype)
        A, B = empty(EXPERTS, 16, INTER, dtype=dtype), empty(EXPERTS, HIDDEN, 16, dtype=dtype)
        for config, precision in product(configs, precisions[dtype]):
            thin = tuning.thin_config(config, 16, dtype, traits)
            for factor in (A, A.mT.contiguous().mT):
                yield dtype, thin, partial(kernels.grouped_gemm, x, factor, schedule, precision, thin)
            wide = config._replace(USE_TMA=False, WARP_SPECIALIZED=False)
            for factor in (B, B.mT.contiguous().mT):
                yield dtype, wide, partial(kernels.grouped_gemm, u, factor, schedule, precision, wide)
    # Inner sizes of whole steps of fp4_registers.py, and with a tail.
    for dtype, scale, inter in product(DTYPES, (torch.float32, torch.uint8), (INTER, INTER + 32)):
        in_registers = dtype != torch.float32 and traits.mma != "mfma"
        x, a, y = (empty(96, n, dtype=dtype) for n in (HIDDEN, inter, HIDDEN))
        w1, w2 = empty(EXPERTS, 2 * inter, HIDDEN // 2), empty(EXPERTS, HIDDEN, inter // 2)
        s1, s2 = (empty(*w.shape[:2], w.shape[2] // 16, dtype=scale) for w in (w1, w2))
        b1, b2 = (empty(*w.shape[:2], dtype=dtype) for w in (w1, w2))
        for (_, config), precision in product(tuning.FP4.of(dtype, traits), precisions[dtype]):
            if in_registers and config.BLOCK_M == 8:
                for bias in (None, b2):
                    yield dtype, config, partial(kernels.grouped_gemm_fp4_few, a, w2, s2, schedule, config, y, bias)
            for way in ways(config):
                if way.WARP_SPECIALIZED:
                    yield dtype, way, partial(kernels.codes_gemm_hopper, a, w2, s2, schedule, way, y)
                    continue
                for bias in (None, b2):
                    args = (a, w2, s2, schedule, precision, way, y, bias)
                    yield dtype, way, partial(kernels.grouped_gemm_fp4, *args)
        ordered = empty(96, -(-inter // 128) * 128, dtype=dtype)
        for _, config in tuning.FP4_ORDERED.of(dtype, traits) if scale == torch.uint8 else ():
            for bias in (None, b2) if config.WARP_SPECIALIZED else ():
                args = (ordered, w2, s2, schedule, config, y, bias)
                yield dtype, config, partial(kernels.grouped_gemm_fp4_hopper, *args)
        config = tuning.FP4_DGRAD.of(dtype, traits)
        for way, precision in product(ways(config), precisions[dtype]):
            if way.WARP_SPECIALIZED:
                yield dtype, way, partial(kernels.codes_gemm_hopper, y, w2, s2, schedule, way, a, transposed=True)
            else:
                yield dtype, way, partial(kernels.dgrad_fp4, y, w2, s2, schedule, precision, way, a)
        if not in_registers:
            continue
        up, down = tuning.DECODE_FP4
        weights = empty(16, 6, dtype=torch.float32)
        for gate, biases in ((Gate(), (None, None)), (Gate(**GPT_OSS), (b1, b2))):
            yield dtype, up, partial(kernels.gate_up_decode_fp4, x, w1, s1, index, gate, up, biases[0])
            args = (like_fixed_point(*a.shape, a.device), w2, s2, index, weights, down, dtype, biases[1])
            for addend in (None, y):
                yield dtype, down, partial(kernels.down_decode_fp4, *args, addend)
        # More columns than are in shared memory at a time.
        w2, s2 = empty(EXPERTS, HIDDEN, 4096), empty(EXPERTS, HIDDEN, 256, dtype=scale)
        args = (like_fixed_point(96, 8192, a.device), w2, s2, index, weights, down, dtype)
        yield dtype, down, partial(kernels.down_decode_fp4, *args)


def lora_launches(package, dtype, traits, precisions):
    """As `launches`, for an adapter's products and what lies between them."""
    kernels, tuning = import_module(f"{package}.kernels"), import_module(f"{package}.tuning")
    Gate = import_module(f"{package}.reference").Gate

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    slots, offsets = empty(128, dtype=torch.int32), empty(EXPERTS + 1, dtype=torch.int32)
    schedule, weights, x = empty(5, 96, dtype=torch.int32), empty(96, dtype=torch.float32), empty(128, HIDDEN)
    for gate in (Gate(), Gate(**GPT_OSS)):
        for order in ({}, {"ordered": True}):
            yield dtype, None, partial(kernels.glu, empty(128, 2 * INTER), slots, offsets, gate, **order)
    for rank in (16, 128):
        u = empty(128, rank)
        yield dtype, None, partial(kernels.scale_rows, u, weights, slots, offsets)
        A, B, weight = (empty(EXPERTS, *shape) for shape in ((rank, HIDDEN), (HIDDEN, rank), (HIDDEN, HIDDEN)))
        first, *others, last = (entry.config.down for entry in tuning.EXPERTS.of(dtype, traits))
        wanted = [first, *(config for config in others if config.WARP_SPECIALIZED), last]
        for config, precision in product(wanted, precisions):
            thin = tuning.thin_config(config, rank, dtype, traits)
            for factor in (A, B.mT):
                yield dtype, thin, partial(kernels.grouped_gemm, x, factor, schedule, precision, thin)
            for way, w in product(ways(config), (weight, weight.mT)):
                args = (x, w, schedule, precision, way)
                yield dtype, way, partial(kernels.grouped_gemm, *args, low_rank=(u, B))
        for (p, q), precision in product(((x, u), (u, x)), precisions):
            config = tuning.thin_wgrad_config(p.shape[1], q.shape[1], dtype, traits)
            yield dtype, config, partial(kernels.wgrad, p, q, offsets, precision, config)


def launches(package, gpu):
    """(dtype, config, launch) for all that can be launched on this GPU of TRAITS."""
    kernels, tuning = import_module(f"{package}.kernels"), import_module(f"{package}.tuning")
    Gate = import_module(f"{package}.reference").Gate
    for ids in (torch.int32, torch.int64):
        for tokens in (1, 1000):  # counted in place, and by a launch of its own
            index = torch.zeros(tokens, 6, dtype=ids)
            yield ids, None, partial(kernels.route, index, EXPERTS, 64)
    offsets = torch.zeros(EXPERTS + 1, dtype=torch.int32)
    yield torch.int32, None, partial(kernels.tile_schedule, offsets, 100, 64)
    yield torch.int32, None, partial(kernels.pad, offsets, torch.zeros(96, dtype=torch.int32))
    slots = torch.zeros(96, dtype=torch.int32)
    traits = import_module(f"{package}.launch_configs").TRAITS[gpu]
    nvidia = traits.mma != "mfma"
    for dtype in DTYPES if gpu == "sm_90" else (torch.bfloat16, torch.float32):  # fp16 shows what bf16 does
        x, a, y = (torch.empty(96, n, dtype=dtype) for n in (HIDDEN, INTER, HIDDEN))
        w1, w2 = (torch.empty(EXPERTS, n, k, dtype=dtype) for n, k in ((2 * INTER, HIDDEN), (HIDDEN, INTER)))
        weights = torch.empty(16, 6)
        yield dtype, None, partial(kernels.combine, y, slots, weights)
        yield dtype, None, partial(kernels.combine, y, slots, weights, addend=y)
        yield dtype, None, partial(kernels.zero_skipped, y, slots)
        yield dtype, None, partial(kernels.zero_tail, y, offsets)
        index = torch.zeros(16, 6, dtype=torch.int64)
        for gate, transposed in ((Gate(), False), (Gate(), True), (Gate(**GPT_OSS), True)):
            up, down = tuning.decode_config(dtype, transposed)
            v1, v2 = (w.mT.contiguous().mT if transposed else w for w in (w1, w2))
            b1, b2 = (torch.empty(EXPERTS, n, dtype=dtype) if gate.interleaved else None for n in (2 * INTER, HIDDEN))
            yield dtype, up, partial(kernels.gate_up_decode, x, v1, index, gate, up, b1)
            yield dtype, down, partial(kernels.down_decode, a, v2, index, weights, down, b2)
            if gate.interleaved:  # of which no model has shared experts
                continue
            for gate_weight in (x[:1], None):
                shared = (w1[0], w1[1], w2[0], gate_weight)
                yield dtype, up, partial(kernels.gate_up_decode, x, v1, index, gate, up, shared=shared)
                yield dtype, down, partial(kernels.down_decode, a, v2, index, weights, down, shared=shared)
                for tokens in (16, 32, 64) if dtype != torch.float32 and not transposed else ():
                    yield dtype, None, partial(kernels.shared_experts, x[:tokens], shared, gate)
        # fp32 follows torch's tf32 switch on NVIDIA GPUs; the 16-bit types ignore the precision.
        precisions = ("ieee", "tf32") if dtype == torch.float32 and nvidia else ("ieee",)
        for (_, config), precision in product(tuning.EXPERTS.of(dtype, traits), precisions):
            yield from gemm_launches(package, dtype, config, precision, EXPERTS, HIDDEN, INTER)
        yield from backward_launches(package, dtype, tuning.WGRAD.of(dtype, traits), precisions)
        yield from lora_launches(package, dtype, traits, precisions)
        for _, config in tuning.ROUTER.of(dtype, traits):
            yield dtype, config, partial(kernels.router_logits, x, torch.empty(256, HIDDEN, dtype=dtype), config)
    precisions = {dtype: ("ieee",) for dtype in (FP8, *DTYPES)}
    if nvidia:
        precisions[torch.float32] = ("ieee", "tf32")
    yield from fp8_launches(package, traits, precisions)
    yield from fp4_launches(package, traits, precisions)
    for _, config in tuning.ROUTER.of(torch.float32, traits):
        x, w = torch.empty(96, HIDDEN, dtype=torch.bfloat16), torch.empty(256, HIDDEN)
        yield torch.float32, config, partial(kernels.router_logits, x, w, config)
    RouterForm = import_module(f"{package}.reference").RouterForm
    for dtype, splits, num_group in product((torch.bfloat16, torch.float32), (1, 16), (1, 8)):
        partials, bias = torch.empty(splits, 96, 256), torch.empty(256, dtype=dtype)
        yield dtype, None, partial(kernels.router_topk, partials, None, bias, RouterForm(8, num_group))
    for experts, has_bias, has_correction, args, options in ROUTER_FORMS.values():
        partials, vector = torch.empty(4, 96, experts), torch.empty(experts)
        vectors = (vector if has_bias else None, vector if has_correction else None)
        yield torch.float32, None, partial(kernels.router_topk, partials, *vectors, RouterForm(*args, **options))


def tuned_launches(package, gpu):
    """As `launches`, for the tuned files of GPUs of this compute capability."""
    tuned_files = import_module(f"{package}.tuned_files")
    for path in sorted(tuned_files.CONFIGS.glob("*.json")):
        capability = json.loads(path.read_text())["tuned_with"]["compute_capability"]
        if gpu != f"sm_{capability.replace('.', '')}":
            continue
        sizes = dict(part.split("=") for part in path.stem.split(","))
        dtype, shape = getattr(torch, sizes["dtype"]), [int(sizes[letter]) for letter in "EHI"]
        configs = tuned_files.read_configs(path, dtype, import_module(f"{package}.launch_configs").TRAITS[gpu])
        for config in dict.fromkeys(config for _, config in configs):
            yield from gemm_launches(package, dtype, config, "ieee", *shape, is_tuned=True)


def one_of_each(launches):
    """Of these launches the first of each launcher, with the same options, dtypes and way of reading.

    But for fp16, which shows what bf16 does, unless there are codes of 4 bits.
    """
    kinds = set()
    for dtype, config, launch in launches:
        if dtype == torch.float16 and "fp4" not in launch.func.__name__:
            continue
        dtypes = tuple(x.dtype for x in launch.args if isinstance(x, torch.Tensor))
        reading = getattr(config, "USE_TMA", None), getattr(config, "WARP_SPECIALIZED", None) and config.num_stages
        kind = (launch.func.__name__, *launch.keywords, *dtypes, reading)
        if kind not in kinds:
            kinds.add(kind)
            yield dtype, config, launch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gpus", nargs="*", metavar="GPU", help=", ".join(TARGETS))
    parser.add_argument("--one-of-each", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.gpus) - set(TARGETS):
        parser.error(f"no such target: {', '.join(unknown)}")

    package = get_kernel("org/moe-grouped-gemm", version=1).__name__
    traits = import_module(f"{package}.launch_configs").TRAITS
    good = True
    for device, (gpu, target) in enumerate(TARGETS.items()):
        if args.gpus and gpu not in args.gpus:
            continue
        compiled = compile_only(target, device)
        import_module(f"{package}.kernels.launch").warp_size.cache_clear()  # "meta" stands for every target
        wanted = chain(launches(package, gpu), tuned_launches(package, gpu))
        checked = set()
        for dtype, config, launch in one_of_each(wanted) if args.one_of_each else wanted:
            compiled.clear()
            launch()
            for name, kernel in compiled:
                if (kernel.hash, config) not in checked:
                    checked.add((kernel.hash, config))
                    good &= check(gpu, traits[gpu], name, kernel, dtype, config)
    return not good


if __name__ == "__main__":
    sys.exit(main())
