"""Selection for one new token: index scores over the cache, block maxima and top-k, split over the keys.

A decoding step reads every index key once, and little else: it is bound by memory. So the keys of a
row are split over programs enough to fill a GPU at batch 1; all index heads share the one index key, so
a program scores all heads of its blocks together. A block leaves one 64-bit key a head, larger for a
better block and, at equal scores, for the lower id (arXiv 2606.13392, eq. 5-6).

Whoever needs the best blocks takes them from the keys with `best_of_row`: the attention of
triton_decode.py, or `_keep_best` in a launch of its own. Of few blocks it looks at all keys. Of many it
looks at the best key of each share first: a block among the K best lies in one of the K shares that
lead, since each share that leads its own holds a better block. Where even these are too many,
a tree of small top-k programs makes them fewer.

Called by triton_decode.py. Grids and shapes are functions of the cache's capacity and never of a length
on the device: nothing waits for the GPU, and a CUDA graph can capture it.

Shapes: B batch, G groups (= index heads), S cached keys (capacity), C = ceil(S / block) blocks, K selected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_support import interpreting, padded_width, target_arch

DOCUMENT_TILE = 4096
"""Document ids that one program looks through."""


@dataclass(frozen=True)
class SelectLaunch:
    """How the selection is cut into programs; the numbers never change a result beyond rounding."""

    programs: int
    """Programs that share the index keys, all rows together: about two for each multiprocessor."""
    keys: int
    """Index keys per step."""
    chunk: int
    """Blocks that one top-k looks at; a power of two."""
    num_warps: int
    num_stages: int
    """Loads in flight: tiles of `keys` index keys."""

    overlap: bool = True
    """A kernel's programs come to the GPU while the kernel before them still runs (sm_90 and later)."""


@dataclass(frozen=True)
class Ranked:
    """Keys of blocks from which `best_of_row` takes the best: its tensors, counts and constants."""

    keys: Tensor
    """(B, G, count) int64."""
    leaders: Tensor
    """(B, G, splits) int64, the best key of each share; read if `shape["SHARES"]` is not 0."""
    shape: dict[str, Any]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What kernels take as keys, leaders, count, splits."""
        return self.keys, self.leaders, self.keys.shape[2], self.leaders.shape[2]


# Programmatic launch. A kernel launched with it may start once every program of the kernel before it
# has called let_next_start() or ended, so its programs wait on the GPU instead of being sent there
# later. wait_for_previous() ends when all programs of the kernel before have ended and what they wrote
# can be seen. What makes it safe:
# - every program of every such kernel waits, on every path. So a kernel ends after the one before it,
#   and by induction after all of the chain; whatever follows in the stream by an ordinary launch sees all.
# - before it waits, a program reads only what was written before the scores: q, starts, lengths.
#   The scores are launched the ordinary way, so that all of it is there.
# - before it waits, a program writes nothing, so that memory which the allocator hands out again is not
#   touched while an earlier kernel may still read it.
# - the next kernel comes only when all programs of this one have a place: nobody waits for a program
#   that finds no room.


@triton.jit
def let_next_start(OVERLAP: tl.constexpr):
    """Let the next kernel's programs come once all programs of this kernel are here."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Wait until the kernel before has ended and all that it wrote can be seen."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


def overlapping(wanted: bool) -> bool:
    """Whether the kernels use programmatic launch: the device has it and we are not in Python."""
    return wanted and not interpreting() and target_arch() >= 90


@triton.jit
def row_bounds(starts, lengths, batch, num_keys, DOCUMENTS: tl.constexpr, RAGGED: tl.constexpr):
    """First key of the row's last document, and one past the row's last key."""
    start, end = 0, num_keys
    if RAGGED:
        end = tl.load(lengths + batch).to(tl.int32)
    if DOCUMENTS:
        start = tl.load(starts + batch)
    return start, end


@triton.jit(do_not_specialize=["num_keys"])
def _last_starts(
    document_ids, lengths, starts,
    stride_b, stride_s, num_keys,
    TILE: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """One past the last key whose document is not that of the row's last key."""
    batch = tl.program_id(1).to(tl.int64)
    _, end = row_bounds(starts, lengths, batch, num_keys, False, RAGGED)
    position = tl.program_id(0) * TILE + tl.arange(0, TILE)
    ids = document_ids + batch * stride_b
    # A row without keys (end = 0) has no last one to look at.
    own = tl.load(ids + (end - 1).to(tl.int64) * stride_s, mask=end > 0, other=0)
    found = tl.load(ids + position.to(tl.int64) * stride_s, mask=position < end, other=0)
    after = tl.where((position < end) & (found != own), position + 1, 0)
    # A maximum of integers: the order of the programs does not matter.
    tl.atomic_max(starts + batch, tl.max(after, axis=0))


@triton.jit(do_not_specialize=["num_keys", "num_blocks"])
def _block_scores(
    index_q, index_k, starts, lengths, packed, leaders,
    stride_qb, stride_qg, stride_kb, stride_ks,
    groups, num_keys, num_blocks, local_blocks, init_blocks,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_P: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, UNIT: tl.constexpr,
    DOCUMENTS: tl.constexpr, RAGGED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The 64-bit keys of one share of a row's blocks; a unit is a block, or as many as fill a tile."""
    let_next_start(OVERLAP)
    PARTS: tl.constexpr = UNIT // TILE
    BLOCKS: tl.constexpr = UNIT // BLOCK
    batch = tl.program_id(1).to(tl.int64)
    start, end = row_bounds(starts, lengths, batch, num_keys, DOCUMENTS, RAGGED)
    current = tl.maximum(end - 1 - start, 0) // BLOCK
    # Shares of what the row holds, not of the capacity: all programs have work at any length.
    units = tl.cdiv(end - start, UNIT)
    split, splits = tl.program_id(0), tl.num_programs(0)
    begin, stop = units * split // splits, units * (split + 1) // splits
    head = tl.arange(0, HEADS)
    channel = tl.arange(0, WIDTH_P)
    key = tl.arange(0, TILE)
    wide = channel < WIDTH
    q = tl.load(
        index_q + batch * stride_qb + head[None, :] * stride_qg + channel[:, None],
        mask=(head < groups)[None, :] & wide[:, None],
        other=0.0,
    )  # [WIDTH_P, HEADS]
    index_k += batch * stride_kb
    tile = key[:, None] * stride_ks + channel[None, :]
    rows = packed + (batch * groups + head) * num_blocks  # [HEADS]
    best = tl.full([BLOCKS, HEADS], float("-inf"), tl.float32)
    lead = tl.full([HEADS], -0x8000000000000000, tl.int64)
    for step in range(begin * PARTS, stop * PARTS):
        first = start + step * TILE
        here = first + key < end
        k = tl.load(
            index_k + first.to(tl.int64) * stride_ks + tile,
            mask=here[:, None] & wide[None, :],
            other=0.0,
        )
        scores = tl.dot(k, q, input_precision="ieee")  # [TILE, HEADS]
        # What lies beyond the length is masked before the maximum, not after.
        scores = tl.where(here[:, None], scores, float("-inf"))
        found = tl.max(tl.reshape(scores, [BLOCKS, TILE // BLOCKS, HEADS]), axis=1)
        best = tl.where(step % PARTS == 0, found, tl.maximum(best, found))
        block = step // PARTS * BLOCKS + tl.arange(0, BLOCKS)
        forced = (block > current - local_blocks) | (block < init_blocks)
        value = tl.where(forced[:, None], float("inf"), best)
        # Minus zero equals zero, but its bits do not.
        bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
        # Negative floats grow downwards as integers: turn their magnitude round.
        ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
        ranked = (ordered << 32) | (0x7FFFFFFF - block).to(tl.int64)[:, None]
        # Of a block in several parts, the last part's value is that of all.
        inside = (block <= current)[:, None] & (step % PARTS == PARTS - 1)
        lead = tl.maximum(lead, tl.max(tl.where(inside, ranked, -0x8000000000000000), axis=0))
        tl.store(rows[None, :] + block[:, None], ranked, mask=inside & (head < groups)[None, :])
    tl.store(leaders + (batch * groups + head) * splits + split, lead, mask=head < groups)


@triton.jit
def _largest(keys, present, KEEP: tl.constexpr, SIZE: tl.constexpr):
    """The KEEP largest of the first `present` of SIZE keys, falling; missing ones are the least int64."""
    entry = tl.arange(0, SIZE)
    absent = tl.full([SIZE], -0x8000000000000000, tl.int64)
    found = tl.load(keys + entry, mask=entry < present, other=0)
    return tl.topk(tl.where(entry < present, found, absent), KEEP)


@triton.jit
def block_of(key):
    """The block of a 64-bit key; -1 where it is missing."""
    return tl.where(key > -0x8000000000000000, 0x7FFFFFFF - (key & 0x7FFFFFFF), -1).to(tl.int32)


@triton.jit
def best_of_row(
    keys, leaders, row, length, count, splits,
    KEEP: tl.constexpr, SIZE: tl.constexpr, SHARES: tl.constexpr, SHARE: tl.constexpr,
    BLOCK: tl.constexpr, UNIT: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """The KEEP largest keys of row `row` (int64) that holds `length` tokens, falling.

    SIZE holds all `count` keys; or SHARES holds all leaders, and SHARE the blocks of a share.
    FIRST: the keys are those of the blocks in order, and nobody wrote those after the row's last.
    """
    keys += row * count
    present = tl.cdiv(length, BLOCK) if FIRST else count
    if SHARES == 0:
        best = _largest(keys, present, KEEP, SIZE)
    else:
        BLOCKS: tl.constexpr = UNIT // BLOCK
        leader = block_of(_largest(leaders + row * splits, splits, KEEP, SHARES))  # [KEEP]
        units = tl.cdiv(length, UNIT)
        # The share of a unit u, from the bounds in _block_scores: the last s with units * s // splits <= u.
        unit = tl.maximum(leader, 0) // BLOCKS
        share = ((unit + 1) * splits - 1) // tl.maximum(units, 1)
        begin = units * share // splits * BLOCKS
        stop = tl.minimum(units * (share + 1) // splits * BLOCKS, present)
        stop = tl.where(leader >= 0, stop, 0)
        block = begin[:, None] + tl.arange(0, SHARE)[None, :]
        inside = block < stop[:, None]
        found = tl.load(keys + block, mask=inside, other=0)
        found = tl.where(inside, found, -0x8000000000000000)
        best = tl.topk(tl.reshape(found, [KEEP * SHARE]), KEEP)
    return best


@triton.jit(do_not_specialize=["num_keys", "count", "splits"])
def _keep_best(
    keys, leaders, count, splits, kept, starts, lengths, groups, num_keys, top_k,
    KEEP: tl.constexpr, SIZE: tl.constexpr, SHARES: tl.constexpr, SHARE: tl.constexpr,
    BLOCK: tl.constexpr, UNIT: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    DOCUMENTS: tl.constexpr, RAGGED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The KEEP largest of SIZE keys; the last level writes ascending ids instead of keys."""
    let_next_start(OVERLAP)
    chunk, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = batch * groups + group
    start, end = row_bounds(starts, lengths, batch, num_keys, DOCUMENTS, RAGGED)
    wait_for_previous(OVERLAP)
    slot = tl.arange(0, KEEP)
    if LAST:
        best = best_of_row(
            keys, leaders, row, end - start, count, splits,
            KEEP, SIZE, SHARES, SHARE, BLOCK, UNIT, FIRST,
        )  # fmt: skip
        block = block_of(best)
        block = tl.sort(tl.where((slot < top_k) & (block >= 0), block, 0x7FFFFFFF))
        block = tl.where(block == 0x7FFFFFFF, -1, block)
        tl.store(kept + row * top_k + slot, block, mask=slot < top_k)
    else:
        present = tl.cdiv(end - start, BLOCK) if FIRST else count
        first = chunk * SIZE
        best = _largest(keys + row * count + first, present - first, KEEP, SIZE)
        tl.store(kept + (row * tl.num_programs(0) + chunk) * KEEP + slot, best)


def default_launch(width: int, groups: int, dtype: torch.dtype) -> SelectLaunch:
    """Tile sizes that compile without spills (benchmarks/codegen.py)."""
    wide = padded_width(width)
    if dtype == torch.float32:
        keys = 64 if wide <= 128 and groups <= 16 else 32
        return SelectLaunch(programs=256, keys=keys, chunk=1024, num_warps=4, num_stages=2)
    # 16 KiB a tile: two programs, each with three tiles under way, leave a multiprocessor of an H100 room
    # for programs of the attention, which wait there.
    keys = 64 if wide <= 128 else 32
    return SelectLaunch(programs=256, keys=keys, chunk=1024, num_warps=4, num_stages=4)


def last_starts(document_ids: Tensor, lengths: Tensor | None) -> Tensor:
    """First position of the last document of each row: (B,) int32 from ids (B, S), in one pass."""
    batch, num_keys = document_ids.shape
    starts = torch.zeros(batch, dtype=torch.int32, device=document_ids.device)
    _last_starts[(triton.cdiv(num_keys, DOCUMENT_TILE), batch)](
        document_ids, lengths, starts, *document_ids.stride(), num_keys,
        TILE=DOCUMENT_TILE, RAGGED=lengths is not None, num_warps=4,
    )  # fmt: skip
    return starts


def rank(
    index_q: Tensor,
    index_k: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    *,
    block_size: int,
    top_k: int,
    local_blocks: int = 1,
    init_blocks: int = 0,
    launch: SelectLaunch,
) -> Ranked:
    """Keys of all blocks, or of the best, few enough for one `best_of_row`; arguments as in `select`."""
    batch, groups, _, width = index_q.shape
    num_keys = index_k.shape[2]
    num_blocks = triton.cdiv(num_keys, block_size)
    unit = max(block_size, launch.keys)
    units = triton.cdiv(num_keys, unit)
    splits = min(units, max(1, launch.programs // batch))
    flags = {"DOCUMENTS": starts is not None, "RAGGED": lengths is not None}
    flags["OVERLAP"] = overlapping(launch.overlap)
    packed = index_q.new_empty((batch, groups, num_blocks), dtype=torch.int64)
    leaders = index_q.new_empty((batch, groups, splits), dtype=torch.int64)
    _block_scores[(splits, batch)](
        index_q, index_k, starts, lengths, packed, leaders,
        *index_q.stride()[:2], index_k.stride(0), index_k.stride(2),
        groups, num_keys, num_blocks, local_blocks, init_blocks,
        HEADS=max(16, triton.next_power_of_2(groups)), WIDTH=width, WIDTH_P=padded_width(width),
        BLOCK=block_size, TILE=launch.keys, UNIT=unit, **flags,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    keep = max(2, triton.next_power_of_2(top_k))
    # Each level of the tree leaves at most half, so the levels come to an end.
    chunk = max(launch.chunk, 2 * keep)
    shape = {"KEEP": keep, "BLOCK": block_size, "UNIT": unit}
    shape.update(SHARES=0, SHARE=0, FIRST=True)
    shares = max(keep, triton.next_power_of_2(splits))
    share = triton.next_power_of_2(triton.cdiv(units, splits) * (unit // block_size))
    if num_blocks > chunk and max(shares, keep * share) <= chunk:
        return Ranked(packed, leaders, {**shape, "SIZE": 0, "SHARES": shares, "SHARE": share})
    while (count := packed.shape[2]) > chunk:
        chunks = triton.cdiv(count, chunk)
        kept = packed.new_empty((batch, groups, chunks * keep))
        _keep_best[(chunks, groups, batch)](
            packed, leaders, count, splits, kept, starts, lengths, groups, num_keys, top_k,
            **shape, SIZE=chunk, LAST=False, **flags, num_warps=4, launch_pdl=flags["OVERLAP"],
        )  # fmt: skip
        packed = kept
        shape["FIRST"] = False
    return Ranked(packed, leaders, {**shape, "SIZE": max(keep, triton.next_power_of_2(count))})


def choose(
    ranked: Ranked,
    starts: Tensor | None,
    lengths: Tensor | None,
    num_keys: int,
    top_k: int,
    overlap: bool,
) -> Tensor:
    """The best blocks (B, G, K) int32, ascending, in a launch of its own."""
    batch, groups, _ = ranked.keys.shape
    ids = ranked.keys.new_empty((batch, groups, top_k), dtype=torch.int32)
    overlap = overlapping(overlap)
    _keep_best[(1, groups, batch)](
        *ranked.arguments, ids, starts, lengths, groups, num_keys, top_k,
        **ranked.shape, LAST=True,
        DOCUMENTS=starts is not None, RAGGED=lengths is not None, OVERLAP=overlap,
        num_warps=4 if max(ranked.shape["SIZE"], ranked.shape["SHARES"]) >= 256 else 1,
        launch_pdl=overlap,
    )  # fmt: skip
    return ids


def select(
    index_q: Tensor,
    index_k: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    *,
    top_k: int,
    launch: SelectLaunch | None = None,
    **budget: int,
) -> Tensor:
    """Block ids (B, G, K) int32 of the last key of each row, ascending, -1 padded.

    Args:
        index_q: (B, G, 1, D_idx); index_k: (B, 1, S, D_idx), any strides with contiguous channels.
        starts: (B,) int32, first position of the row's last document, or None.
        lengths: (B,) int32, cached keys of the row, the new one included, or None: all S.
        budget: block_size, local_blocks, init_blocks.
    """
    index_q, index_k = (x if x.stride(-1) == 1 else x.contiguous() for x in (index_q, index_k))
    launch = launch or default_launch(index_q.shape[-1], index_q.shape[1], index_q.dtype)
    ranked = rank(index_q, index_k, starts, lengths, top_k=top_k, launch=launch, **budget)
    return choose(ranked, starts, lengths, index_k.shape[2], top_k, launch.overlap)
