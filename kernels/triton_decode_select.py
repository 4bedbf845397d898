"""Selection for one new token: index scores over the cache, block maxima and top-k, split over the keys.

A decoding step reads every index key once, and little else: it is bound by memory. So the keys of a
row are split over programs enough to fill a GPU at batch 1; all index heads share the one index key, so
a program scores all heads of its blocks together. A block leaves one 64-bit key a head, larger for a
better block and, at equal scores, for the lower id (arXiv 2606.13392, eq. 5-6); a tree of small top-k
programs reduces them.

Called by triton_decode.py. Grids and shapes are functions of the cache's capacity and never of a length
on the device: nothing waits for the GPU, and a CUDA graph can capture it.

Shapes: B batch, G groups (= index heads), S cached keys (capacity), C = ceil(S / block) blocks, K selected.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_support import padded_width

DOCUMENT_TILE = 4096
"""Document ids that one program looks through."""


@dataclass(frozen=True)
class SelectLaunch:
    """How the selection is cut into programs; the numbers never change a result beyond rounding."""

    programs: int
    """Programs that share the index keys, all rows together: two for each multiprocessor of an H200."""
    keys: int
    """Index keys per step."""
    chunk: int
    """Blocks that one program of the top-k tree looks at; a power of two."""
    num_warps: int
    num_stages: int
    """Loads in flight: tiles of `keys` index keys."""


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
    index_q, index_k, starts, lengths, packed,
    stride_qb, stride_qg, stride_kb, stride_ks,
    groups, num_keys, num_blocks, local_blocks, init_blocks,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_P: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, UNIT: tl.constexpr,
    DOCUMENTS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """The 64-bit keys of one share of a row's blocks; a unit is a block, or as many as fill a tile."""
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
        # Of a block in several parts, the last part's value stays.
        inside = (block <= current)[:, None] & (head < groups)[None, :]
        tl.store(rows[None, :] + block[:, None], ranked, mask=inside)


@triton.jit(do_not_specialize=["num_keys", "count"])
def _keep_best(
    packed, kept, ids, starts, lengths,
    groups, num_keys, count, top_k,
    KEEP: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, DOCUMENTS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """The KEEP largest of CHUNK keys; the last level unpacks them into ascending ids."""
    chunk, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = batch * groups + group
    present = count
    if FIRST:
        start, end = row_bounds(starts, lengths, batch, num_keys, DOCUMENTS, RAGGED)
        # Nobody wrote the keys of blocks after the row's last.
        present = tl.cdiv(end - start, BLOCK)
    entry = chunk * CHUNK + tl.arange(0, CHUNK)
    absent = tl.full([CHUNK], -0x8000000000000000, tl.int64)
    keys = tl.load(packed + row * count + entry, mask=entry < present, other=0)
    best = tl.topk(tl.where(entry < present, keys, absent), KEEP)
    slot = tl.arange(0, KEEP)
    if LAST:
        chosen = (slot < top_k) & (best > -0x8000000000000000)
        block = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
        block = tl.sort(tl.where(chosen, block, 0x7FFFFFFF))
        block = tl.where(block == 0x7FFFFFFF, -1, block)
        tl.store(ids + row * top_k + slot, block, mask=slot < top_k)
    else:
        tl.store(kept + (row * tl.num_programs(0) + chunk) * KEEP + slot, best)


def default_launch(width: int, groups: int, dtype: torch.dtype) -> SelectLaunch:
    """Tile sizes that compile without spills (benchmarks/codegen.py)."""
    wide = padded_width(width)
    if dtype == torch.float32:
        keys = 64 if wide <= 128 and groups <= 16 else 32
        return SelectLaunch(programs=264, keys=keys, chunk=1024, num_warps=4, num_stages=2)
    # 32 KiB a tile: two programs of three stages fit a multiprocessor of an H200 together.
    keys = 128 if wide <= 128 else 64
    return SelectLaunch(programs=264, keys=keys, chunk=1024, num_warps=4, num_stages=3)


def last_starts(document_ids: Tensor, lengths: Tensor | None) -> Tensor:
    """First position of the last document of each row: (B,) int32 from ids (B, S), in one pass."""
    batch, num_keys = document_ids.shape
    starts = torch.zeros(batch, dtype=torch.int32, device=document_ids.device)
    _last_starts[(triton.cdiv(num_keys, DOCUMENT_TILE), batch)](
        document_ids, lengths, starts, *document_ids.stride(), num_keys,
        TILE=DOCUMENT_TILE, RAGGED=lengths is not None, num_warps=4,
    )  # fmt: skip
    return starts


def select(
    index_q: Tensor,
    index_k: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    *,
    block_size: int,
    top_k: int,
    local_blocks: int = 1,
    init_blocks: int = 0,
    launch: SelectLaunch | None = None,
) -> Tensor:
    """Block ids (B, G, K) int32 of the last key of each row, ascending, -1 padded.

    Args:
        index_q: (B, G, 1, D_idx); index_k: (B, 1, S, D_idx), any strides with contiguous channels.
        starts: (B,) int32, first position of the row's last document, or None.
        lengths: (B,) int32, cached keys of the row, the new one included, or None: all S.
    """
    index_q, index_k = (x if x.stride(-1) == 1 else x.contiguous() for x in (index_q, index_k))
    batch, groups, _, width = index_q.shape
    num_keys = index_k.shape[2]
    launch = launch or default_launch(width, groups, index_q.dtype)
    num_blocks = triton.cdiv(num_keys, block_size)
    unit = max(block_size, launch.keys)
    splits = min(triton.cdiv(num_keys, unit), max(1, launch.programs // batch))
    optional = {"DOCUMENTS": starts is not None, "RAGGED": lengths is not None}
    packed = index_q.new_empty((batch, groups, num_blocks), dtype=torch.int64)
    _block_scores[(splits, batch)](
        index_q, index_k, starts, lengths, packed,
        *index_q.stride()[:2], index_k.stride(0), index_k.stride(2),
        groups, num_keys, num_blocks, local_blocks, init_blocks,
        HEADS=max(16, triton.next_power_of_2(groups)), WIDTH=width, WIDTH_P=padded_width(width),
        BLOCK=block_size, TILE=launch.keys, UNIT=unit, **optional,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return _top_of(packed, starts, lengths, num_keys, block_size, top_k, launch.chunk, optional)


def _top_of(
    packed: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    num_keys: int,
    block_size: int,
    top_k: int,
    chunk: int,
    optional: dict[str, bool],
) -> Tensor:
    """Levels of top-k until one chunk holds what is left of the keys (B, G, C)."""
    batch, groups, count = packed.shape
    keep = max(2, triton.next_power_of_2(top_k))
    chunk = max(chunk, 2 * keep)  # Each level leaves at most half, so the levels come to an end.
    ids = packed.new_empty((batch, groups, top_k), dtype=torch.int32)
    first = True
    while True:
        last = count <= chunk
        size = max(keep, triton.next_power_of_2(count)) if last else chunk
        chunks = triton.cdiv(count, size)
        kept = packed if last else packed.new_empty((batch, groups, chunks * keep))
        _keep_best[(chunks, groups, batch)](
            packed, kept, ids, starts, lengths, groups, num_keys, count, top_k,
            KEEP=keep, CHUNK=size, BLOCK=block_size, FIRST=first, LAST=last, **optional,
            num_warps=4 if size >= 512 else 1,
        )  # fmt: skip
        if last:
            return ids
        packed, count, first = kept, chunks * keep, False
