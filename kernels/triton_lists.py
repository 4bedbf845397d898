"""For every key block the ascending list of the queries that selected it, cut into chunks of bounded size.

The backward passes that own key blocks (triton_attend_dkv.py, the sparse KL) walk these lists. A list is as
long as its block is popular: on average K * block tokens whatever the length, but the first block of a row
is selected by nearly everybody. So lists are cut into chunks; a chunk, not a block, is a program's work.

Blocks are told apart by a slot. Without documents it is the number of the block; with documents blocks
start wherever a document does, and the slot is the block's first key: one slot a key, of which few are
used. That costs 16 bytes a key and group (the four tables below) and saves the numbering of blocks and the
way back from a number to a place. Empty slots never become a program: the table of chunks skips them.

A stable sort of the edges (slot, query) makes the lists: the same bits every time, and nothing waits for
the device. Every size below follows from shapes, so some entries of the tables are unused at the end.

Shapes: B batch, G groups, P = B * G planes, T queries, S keys, K selected blocks, C slots, N chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

SHORTEST_CHUNK = 2048
"""Queries of a chunk: about the mean list of 16 blocks of 128 tokens."""
LONGEST_TABLE = 1024
"""Chunks of full length a plane: longer rows get longer chunks, so that partial results stay small."""
EDGES_AT_ONCE = 1 << 25
"""Edges per sort: it needs 28 bytes for each, int64 indices and both its buffers."""


@dataclass(frozen=True)
class QueryLists:
    """Lists of all blocks of one selection, and their chunks."""

    queries: Tensor
    """(P, T * K) int32, the lists of a plane one after another."""
    offsets: Tensor
    """(P, C + 1) int32, slot c's list is queries[p, offsets[p, c] : offsets[p, c + 1]]."""
    owners: Tensor
    """(N,) int32, p * C + c of each chunk's list; P * C beyond the last chunk."""
    firsts: Tensor
    """(P * C,) int32, the number of a list's first chunk."""
    count: Tensor
    """(1,) int32, how many chunks there are."""
    partials: Tensor
    """(P * C,) int32, the number of the first partial result of a list of several chunks."""
    split_owners: Tensor
    """(M,) int32, p * C + c of each list of several chunks; P * C beyond the last."""
    max_partials: int
    """Bound on the chunks of all lists that have several."""
    slot_keys: int
    """First key of slot c is c * slot_keys."""
    chunk: int
    """Queries of a chunk, at most."""
    programs: int
    """Enough for one chunk each, unless documents are shorter than a block on average."""
    edges: Tensor | None = None
    """(P, T * K) int32, `queries` as places t * K + i in a plane of the ids, where they were asked for."""

    @property
    def num_slots(self) -> int:
        return self.offsets.shape[1] - 1


@triton.jit
def find_chunk(
    owners, firsts, offsets, item, num_slots, edges, chunk, AGAIN: tl.constexpr = False
):  # fmt: skip
    """Of chunk `item`: owner, plane, slot, begin and size in `queries`, its number in its list of how many.

    AGAIN: read the tables, even if the compiler knows that they were read before.
    """
    owner = tl.load(owners + item, volatile=AGAIN)
    plane = (owner // num_slots).to(tl.int64)
    slot = owner % num_slots
    row = offsets + plane * (num_slots + 1) + slot
    begin, end = tl.load(row), tl.load(row + 1)
    which = item - tl.load(firsts + owner)
    first = begin + which * chunk
    last = tl.minimum(first + chunk, end)
    return (
        owner,
        plane,
        slot,
        plane * edges + first,
        last - first,
        which,
        tl.cdiv(end - begin, chunk),
    )


def default_chunk(num_queries: int, top_k: int) -> int:
    """Queries of a chunk: a power of two."""
    return max(SHORTEST_CHUNK, triton.next_power_of_2(num_queries * top_k // LONGEST_TABLE))


def query_lists(
    block_ids: Tensor,
    starts: Tensor | None,
    *,
    num_keys: int,
    block_size: int,
    query_offset: int = 0,
    chunk: int | None = None,
    keep_edges: bool = False,
) -> QueryLists:
    """Turn "which blocks does a query read" into "which queries read a block".

    Args:
        block_ids: (B, G, T, K) int32, no id twice in a row, -1 padded, counted from the document's first
            block.
        starts: (B, S) int32, first position of each key's document, or None.
        chunk: queries of a chunk; default_chunk by default.
        keep_edges: also say which of a query's ids an entry comes from.
    """
    batch, groups, num_queries, top_k = block_ids.shape
    planes, edges = batch * groups, num_queries * top_k
    num_blocks = triton.cdiv(num_keys, block_size)
    num_slots = num_blocks if starts is None else num_keys
    chunk = chunk or default_chunk(num_queries, top_k)
    edge_numbers, offsets = _sort(block_ids, starts, num_slots, block_size, query_offset)
    chunks = (offsets.diff(dim=1).flatten() + (chunk - 1)) // chunk
    ends = chunks.cumsum(0)
    # Every list ends with at most one chunk that is not full.
    full = planes * (edges // chunk)
    bound = planes * min(num_slots, edges) + full
    several = chunks > 1
    # A list has no query twice, so only more than `chunk` queries can make one of several chunks.
    max_split = full if num_queries > chunk else 0
    partial_ends = torch.where(several, chunks, 0).cumsum(0)
    device = block_ids.device
    return QueryLists(
        queries=edge_numbers // top_k,
        offsets=offsets,
        owners=torch.searchsorted(
            ends, torch.arange(bound, device=device), right=True, out_int32=True
        ),
        firsts=(ends - chunks).to(torch.int32),
        count=ends[-1:].to(torch.int32),
        partials=(partial_ends - chunks).to(torch.int32),
        split_owners=torch.searchsorted(
            several.cumsum(0), torch.arange(1, max_split + 1, device=device), out_int32=True
        ),
        # ceil(x) < 2 x for x > 1.
        max_partials=2 * planes * edges // chunk if max_split else 0,
        slot_keys=block_size if starts is None else 1,
        chunk=chunk,
        programs=min(bound, planes * num_blocks * (1 if starts is None else 2) + full),
        edges=edge_numbers if keep_edges else None,
    )


def _sort(
    block_ids: Tensor, starts: Tensor | None, num_slots: int, block_size: int, query_offset: int
) -> tuple[Tensor, Tensor]:
    """Edges t * K + i (P, T * K) ordered by slot and query, where each slot begins (P, C + 1); int32."""
    batch, groups, num_queries, top_k = block_ids.shape
    planes, edges = batch * groups, num_queries * top_k
    device = block_ids.device
    numbers = torch.empty(planes, edges, dtype=torch.int32, device=device)
    offsets = torch.empty(planes, num_slots + 1, dtype=torch.int32, device=device)
    ids = block_ids.reshape(planes, num_queries, top_k)
    step = max(1, EDGES_AT_ONCE // max(1, edges))
    for begin in range(0, planes, step):
        part = slice(begin, min(begin + step, planes))
        size = part.stop - part.start
        slots = ids[part]
        if starts is not None:
            # Document starts of the planes' batch rows.
            rows = torch.arange(part.start, part.stop, device=device) // groups
            document = starts[rows, query_offset : query_offset + num_queries]
            slots = document[:, :, None] + slots * block_size
        # Slot C takes the padding. A sort of 16 bits takes half the passes of one of 32.
        narrow = torch.int16 if size * (num_slots + 1) < 1 << 15 else torch.int32
        plane = torch.arange(size, device=device, dtype=torch.int32)[:, None] * (num_slots + 1)
        keys = torch.where(ids[part] >= 0, slots, num_slots).view(size, edges) + plane
        found = keys.to(narrow).flatten().sort(stable=True)
        # Each plane has T * K edges, padding included, so the sorted planes are rows of one matrix.
        edge = found.indices.view(size, edges)
        numbers[part] = edge - torch.arange(size, device=device)[:, None] * edges
        bounds = plane + torch.arange(num_slots + 1, device=device, dtype=torch.int32)
        offsets[part] = torch.searchsorted(
            found.values.view(size, edges), bounds.to(narrow), out_int32=True
        )
    return numbers, offsets
