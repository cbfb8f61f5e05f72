"""Expert-sorted order of the routed slots, and the tiles that the grouped GEMMs walk.

A slot is `t * top_k + k`; S = T * top_k. Slots are counting-sorted by expert, stably, so that the order of rows inside
an expert (and with it the order of every sum over them) never depends on timing:

    position[s] = expert_offsets[e] + #{s' < s : id[s'] == e},  e = id[s]

Grid of the sort: a program for each BLOCK_S slots. Each needs the number of slots of every expert, in all and before
its own; up to CHUNKS chunks of slots it counts them itself, beyond that a first launch counts them chunk by chunk.
"""

import torch
import triton
import triton.language as tl

from ..launch_configs import PAD
from .launch import cdiv, launch, next_power_of_2

BLOCK_S = 128
CHUNK = 1024
CHUNKS = 4


@triton.jit
def _load_ids(top_k_index_ptr, offs_s, S, E):
    """Expert ids of some slots as int32; E for a skipped slot, E + 1 for lanes past the last slot."""
    ids = tl.load(top_k_index_ptr + offs_s, mask=offs_s < S, other=-1)
    ids = tl.where((ids >= 0) & (ids < E), ids, E).to(tl.int32)
    return tl.where(offs_s < S, ids, E + 1)


@triton.jit
def _count(ids, mask, E, BLOCK_E: tl.constexpr):
    return tl.histogram(tl.minimum(ids, BLOCK_E - 1), BLOCK_E, mask=mask & (ids < E))


@triton.jit
def _store_schedule(schedule_ptr, counts, block, blocks, max_tiles, BLOCK_M, BLOCK_E: tl.constexpr):
    """This block's share of the schedule (see `route`) of the experts that own `counts` [BLOCK_E] rows."""
    offs_e = tl.arange(0, BLOCK_E)
    row_ends = tl.cumsum(counts, 0)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    # Experts with many rows come first.
    is_popular = counts > 2 * BLOCK_M
    popular_tiles = tl.where(is_popular, tiles, 0)
    popular_ends, ends = tl.cumsum(popular_tiles, 0), tl.cumsum(tiles - popular_tiles, 0)
    first_tile = tl.where(is_popular, popular_ends, tl.sum(popular_tiles, axis=0) + ends) - tiles
    for i in range(block, tl.max(tiles, axis=0), blocks):  # tile i of every expert that has one
        ptrs = schedule_ptr + first_tile + i
        mask = i < tiles
        tl.store(ptrs, offs_e, mask=mask)
        tl.store(ptrs + max_tiles, first_tile, mask=mask)
        tl.store(ptrs + 2 * max_tiles, row_ends - counts, mask=mask)
        tl.store(ptrs + 3 * max_tiles, row_ends, mask=mask)
    num_tiles = tl.sum(tiles, axis=0)
    if block == 0:
        tl.store(schedule_ptr + 4 * max_tiles, num_tiles)
        tl.store(schedule_ptr + 4 * max_tiles + 1, 0)
        least = tl.min(tl.where(counts > 0, counts, BLOCK_M), axis=0)
        is_mixed = (tl.max(counts, axis=0) > 2 * BLOCK_M) & (least < BLOCK_M)
        tl.store(schedule_ptr + 4 * max_tiles + 2, is_mixed.to(tl.int32))
    for start in range(num_tiles + block * BLOCK_E, max_tiles, blocks * BLOCK_E):
        tl.store(schedule_ptr + start + offs_e, -1, mask=start + offs_e < max_tiles)


@triton.jit(do_not_specialize=["S"])
def _count_kernel(
    top_k_index_ptr,  # (S,) int32 | int64
    chunk_counts_ptr,  # (cdiv(S, CHUNK), E) int32
    S,
    E,
    CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    chunk = tl.program_id(0)
    ids = _load_ids(top_k_index_ptr, chunk * CHUNK + tl.arange(0, CHUNK), S, E)
    offs_e = tl.arange(0, BLOCK_E)
    tl.store(chunk_counts_ptr + chunk * E + offs_e, _count(ids, ids < E, E, BLOCK_E), mask=offs_e < E)


@triton.jit
def _count_slots(
    top_k_index_ptr,
    chunk_counts_ptr,
    first_slot,
    S,
    E,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    COUNT_HERE: tl.constexpr,
):
    """Slots of each expert, in all and before first_slot."""
    offs_e = tl.arange(0, BLOCK_E)
    offs_c = tl.arange(0, CHUNK)
    counts = tl.zeros((BLOCK_E,), tl.int32)
    before = tl.zeros((BLOCK_E,), tl.int32)
    if COUNT_HERE:
        for start in range(0, S, CHUNK):
            ids = _load_ids(top_k_index_ptr, start + offs_c, S, E)
            counts += _count(ids, ids < E, E, BLOCK_E)
            before += _count(ids, start + offs_c < first_slot, E, BLOCK_E)
    else:
        ROWS: tl.constexpr = 4096 // BLOCK_E if BLOCK_E < 4096 else 1
        chunks = tl.cdiv(S, CHUNK)
        own = first_slot // CHUNK
        for start in range(0, chunks, ROWS):
            rows = (start + tl.arange(0, ROWS))[:, None]
            some = tl.load(chunk_counts_ptr + rows * E + offs_e, mask=(rows < chunks) & (offs_e < E), other=0)
            counts += tl.sum(some, axis=0)
            before += tl.sum(tl.where(rows < own, some, 0), axis=0)
        ids = _load_ids(top_k_index_ptr, own * CHUNK + offs_c, S, E)
        before += _count(ids, own * CHUNK + offs_c < first_slot, E, BLOCK_E)
    return counts, before


@triton.jit(do_not_specialize=["S", "max_tiles", "BLOCK_M"])
def _route_kernel(
    top_k_index_ptr,  # (S,) int32 | int64
    chunk_counts_ptr,  # (cdiv(S, CHUNK), E) int32; with COUNT_HERE anything
    expert_offsets_ptr,  # (E + 1,) int32
    sorted_slots_ptr,  # (S,) int32
    slot_positions_ptr,  # (S,) int32
    schedule_ptr,  # (5, max_tiles) int32
    S,
    max_tiles,
    BLOCK_M,
    E,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    COUNT_HERE: tl.constexpr,
):
    block = tl.program_id(0)
    first_slot = block * BLOCK_S
    offs_e = tl.arange(0, BLOCK_E)
    offs_s = tl.arange(0, BLOCK_S)

    counts, before = _count_slots(top_k_index_ptr, chunk_counts_ptr, first_slot, S, E, BLOCK_E, CHUNK, COUNT_HERE)
    ends = tl.cumsum(counts, 0)
    routed = tl.sum(counts, axis=0)

    # Rank of each slot among those of this block with the same id.
    ids = _load_ids(top_k_index_ptr, first_slot + offs_s, S, E)
    rank = tl.zeros((BLOCK_S,), tl.int32)
    for start in range(0, BLOCK_S, 16):
        offs_o = start + tl.arange(0, 16)
        others = _load_ids(top_k_index_ptr, first_slot + offs_o, S, E)
        same = (others[:, None] == ids[None, :]) & (offs_o[:, None] < offs_s[None, :])
        rank += tl.sum(same.to(tl.int32), axis=0)

    base = tl.gather(ends - counts + before, tl.minimum(ids, BLOCK_E - 1), 0)
    skipped_before = first_slot - tl.sum(before, axis=0)
    position = tl.where(ids < E, base, routed + skipped_before) + rank
    slots = first_slot + offs_s
    tl.store(sorted_slots_ptr + position, slots, mask=slots < S)
    tl.store(slot_positions_ptr + slots, tl.where(ids < E, position, -1), mask=slots < S)

    if block == 0:
        tl.store(expert_offsets_ptr + offs_e, ends - counts, mask=offs_e < E)
        tl.store(expert_offsets_ptr + E, routed)
    blocks = tl.minimum(tl.num_programs(0), 16)
    if block < blocks:
        _store_schedule(schedule_ptr, counts, block, blocks, max_tiles, BLOCK_M, BLOCK_E)


@triton.jit(do_not_specialize=["num_rows", "max_tiles", "BLOCK_M"])
def _schedule_kernel(
    expert_offsets_ptr,  # (E + 1,) int32
    schedule_ptr,  # (5, max_tiles) int32
    num_rows,
    max_tiles,
    BLOCK_M,
    E,
    BLOCK_E: tl.constexpr,
):
    offs_e = tl.arange(0, BLOCK_E)
    begins = tl.load(expert_offsets_ptr + offs_e, mask=offs_e < E, other=0)
    ends = tl.load(expert_offsets_ptr + offs_e + 1, mask=offs_e < E, other=0)
    # Offsets that promise more rows than there are must not lead out of memory.
    counts = tl.minimum(ends, num_rows) - tl.minimum(begins, num_rows)
    block, blocks = tl.program_id(0), tl.num_programs(0)
    _store_schedule(schedule_ptr, counts, block, blocks, max_tiles, BLOCK_M, BLOCK_E)


@triton.jit
def _pad_kernel(
    expert_offsets_ptr,  # (E + 1,) int32
    sorted_slots_ptr,  # (S,) int32
    padded_offsets_ptr,  # (E + 1,) int32
    padded_slots_ptr,  # (P,) int32
    padded_positions_ptr,  # (S,) int32
    E,
    PAD: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    offs_e = tl.arange(0, BLOCK_E)
    begins = tl.load(expert_offsets_ptr + offs_e, mask=offs_e < E, other=0)
    ends = tl.load(expert_offsets_ptr + offs_e + 1, mask=offs_e < E, other=0)
    padded_counts = (ends - begins + PAD - 1) // PAD * PAD
    padded_ends = tl.cumsum(padded_counts, 0)
    padded_begins = padded_ends - padded_counts
    if tl.program_id(0) == 0:
        tl.store(padded_offsets_ptr + offs_e, padded_begins, mask=offs_e < E)
        tl.store(padded_offsets_ptr + E, tl.sum(padded_counts, axis=0))
    # The PAD rows of a program are one expert's, or padding.
    row = tl.program_id(0) * PAD
    is_here = (padded_begins <= row) & (row < padded_ends)
    first = tl.sum(tl.where(is_here, begins + row - padded_begins, 0), axis=0)
    end = tl.sum(tl.where(is_here, ends, 0), axis=0)
    offs = tl.arange(0, PAD)
    mask = first + offs < end
    slots = tl.load(sorted_slots_ptr + first + offs, mask=mask, other=-1)
    tl.store(padded_slots_ptr + row + offs, slots)
    tl.store(padded_positions_ptr + slots, row + offs, mask=mask)


def max_tiles(num_rows: int, num_experts: int, block_m: int) -> int:
    """Most tiles of block_m rows that num_rows rows can need, however they fall to the experts; at least 3."""
    return max(3, num_rows // block_m + min(num_experts, num_rows))


def route(top_k_index, num_experts, block_m):
    """expert_offsets (E + 1,), sorted_slots (S,), slot_positions (S,), schedule (5, max_tiles); all int32.

    top_k_index is contiguous. Column t of the schedule describes tile t: its expert (-1: no such tile), the expert's
    first tile, its first row and the row after its last. Tiles of an expert follow each other, those of experts with
    more than 2 * block_m rows come first. The last row holds three numbers: how many tiles there are; 0, the counter
    by which the programs of a persistent GEMM share them out, and which they leave as they found it; 1 if there are
    experts with more than 2 * block_m rows and others with less than block_m.
    """
    S = top_k_index.numel()
    tiles = max_tiles(S, num_experts, block_m)

    def empty(*shape):
        return torch.empty(shape, dtype=torch.int32, device=top_k_index.device)

    expert_offsets, sorted_slots, slot_positions = empty(num_experts + 1), empty(S), empty(S)
    schedule = empty(5, tiles)
    block_e = max(16, next_power_of_2(num_experts))
    chunk = min(CHUNK, max(16, next_power_of_2(S)))
    chunks = cdiv(S, chunk)
    block_s = min(BLOCK_S, chunk)
    chunk_counts = expert_offsets
    if chunks > CHUNKS:
        chunk_counts = empty(chunks, num_experts)
        tensors, constants = (top_k_index, chunk_counts), (num_experts, chunk, block_e)
        launch(_count_kernel, (chunks, 1, 1), tensors, (S,), constants)
    launch(
        _route_kernel,
        (cdiv(S, block_s), 1, 1),
        (top_k_index, chunk_counts, expert_offsets, sorted_slots, slot_positions, schedule),
        (S, tiles, block_m),
        (num_experts, block_s, block_e, chunk, chunks <= CHUNKS),
    )
    return expert_offsets, sorted_slots, slot_positions, schedule


def tile_schedule(expert_offsets, num_rows, block_m):
    """The schedule of `route` for rows that are sorted already."""
    num_experts = expert_offsets.numel() - 1
    tiles = max_tiles(num_rows, num_experts, block_m)
    schedule = torch.empty((5, tiles), dtype=torch.int32, device=expert_offsets.device)
    block_e = max(16, next_power_of_2(num_experts))
    launch(
        _schedule_kernel,
        (min(8, cdiv(tiles, block_e)), 1, 1),
        (expert_offsets, schedule),
        (num_rows, tiles, block_m),
        (num_experts, block_e),
    )
    return schedule


def pad(expert_offsets, sorted_slots):
    """The order of `route` with each expert's rows padded to a multiple of PAD: offsets, slots (P,), positions (S,).

    The slot of a padding row is -1, and so is the position of a skipped slot.
    """
    num_experts, S = expert_offsets.numel() - 1, sorted_slots.numel()
    blocks = S // PAD + min(num_experts, S)
    padded_offsets = torch.empty_like(expert_offsets)
    padded_slots = sorted_slots.new_empty(blocks * PAD)
    padded_positions = torch.full_like(sorted_slots, -1)
    launch(
        _pad_kernel,
        (blocks, 1, 1),
        (expert_offsets, sorted_slots, padded_offsets, padded_slots, padded_positions),
        (),
        (num_experts, PAD, max(16, next_power_of_2(num_experts))),
    )
    return padded_offsets, padded_slots, padded_positions
