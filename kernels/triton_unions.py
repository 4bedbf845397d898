"""The union of the blocks that a tile of neighbouring queries selects, with one bit a token.

A tile of `tokens` queries reads each block of its union once; the bit of a token says whether that token
selected the block. Blocks are named by the absolute position of their first key, so packed documents need
no further treatment: blocks of different documents have different first keys.

The mean size of a union over the number of blocks a query keeps is the factor by which the arithmetic of
triton_attend.py exceeds that of the selection; `mean_union` reports it.

Shapes: B batch, G groups, T queries, K selected blocks, L = ceil(T / tokens) tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_TOKENS = 64
"""Tokens of a tile: as many as there are bits."""
TILES_PER_PROGRAM = 8


@dataclass(frozen=True)
class Unions:
    """Unions of all tiles of one selection."""

    first_keys: Tensor
    """(B, G, L, tokens * K) int32 ascending; entries from `counts` on are not set."""
    members: Tensor
    """(B, G, L, tokens * K) int64, bit t for the tile's token t."""
    counts: Tensor
    """(B, G, L) int32, blocks in the union."""
    past_counts: Tensor
    """(B, G, L) int32, how many of them lie before the tile's first query: no causal mask needed."""
    tokens: int

    def mean_union(self) -> Tensor:
        """Mean number of blocks a tile selects together; a scalar on the device."""
        return self.counts.float().mean()


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_tiles", "query_offset"])
def _merge(
    block_ids, starts, first_keys, members, counts, past_counts,
    stride_ids_b, stride_ids_g, stride_ids_t, stride_starts_b,
    groups, num_queries, num_keys, num_tiles, top_k, query_offset,
    BLOCK: tl.constexpr, TOKENS: tl.constexpr, TOKENS_P: tl.constexpr, TILES: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """k-way merge of the ascending lists of a tile's tokens, TILES tiles at a time."""
    plane = tl.program_id(1).to(tl.int64)
    batch, group = plane // groups, plane % groups
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)  # [TILES]
    slot = tl.arange(0, TOKENS_P)
    query = tile[:, None] * TOKENS + slot[None, :]  # [TILES, TOKENS_P]
    valid = (slot[None, :] < TOKENS) & (query < num_queries) & (tile[:, None] < num_tiles)
    # An absent token's list is empty: its cursor stands at the end.
    cursor = tl.where(valid, 0, top_k)
    lists = block_ids + batch * stride_ids_b + group * stride_ids_g
    lists = lists + query.to(tl.int64) * stride_ids_t
    document = tl.zeros([TILES, TOKENS_P], tl.int32)
    if DOCUMENTS:
        at = starts + batch * stride_starts_b + query_offset + query
        document = tl.load(at, mask=valid, other=0)
    bit = tl.full([TILES, TOKENS_P], 1, tl.int64) << slot[None, :].to(tl.int64)
    row = (plane * num_tiles + tile) * TOKENS * top_k  # [TILES]
    size = tl.zeros([TILES], tl.int32)
    past = tl.zeros([TILES], tl.int32)
    first_query = query_offset + tile * TOKENS
    block = tl.load(lists, mask=cursor < top_k, other=-1)
    key = tl.where(block >= 0, document + block * BLOCK, num_keys)
    smallest = tl.min(key, axis=1)
    while tl.min(smallest) < num_keys:
        open_ = smallest < num_keys  # [TILES]
        taken = (key == smallest[:, None]) & open_[:, None]
        mask = tl.sum(tl.where(taken, bit, 0), axis=1)
        tl.store(first_keys + row + size, smallest, mask=open_)
        tl.store(members + row + size, mask, mask=open_)
        size += open_.to(tl.int32)
        past += (open_ & (smallest + BLOCK <= first_query)).to(tl.int32)
        cursor += taken.to(tl.int32)
        block = tl.load(lists + cursor, mask=cursor < top_k, other=-1)
        key = tl.where(block >= 0, document + block * BLOCK, num_keys)
        smallest = tl.min(key, axis=1)
    inside = tile < num_tiles
    tl.store(counts + plane * num_tiles + tile, size, mask=inside)
    tl.store(past_counts + plane * num_tiles + tile, past, mask=inside)


def tile_unions(
    block_ids: Tensor,
    starts: Tensor | None,
    *,
    num_keys: int,
    block_size: int,
    tokens: int,
    query_offset: int = 0,
) -> Unions:
    """Merge the selections of every `tokens` neighbouring queries.

    Args:
        block_ids: (B, G, T, K) int32 ascending, -1 padded, counted from the document's first block.
        starts: (B, S) int32, first position of each key's document, or None.
    """
    assert tokens <= MAX_TOKENS
    batch, groups, num_queries, top_k = block_ids.shape
    if block_ids.stride(3) != 1:
        block_ids = block_ids.contiguous()
    num_tiles = triton.cdiv(num_queries, tokens)
    shape, device = (batch, groups, num_tiles), block_ids.device
    unions = Unions(
        first_keys=torch.empty(*shape, tokens * top_k, dtype=torch.int32, device=device),
        members=torch.empty(*shape, tokens * top_k, dtype=torch.int64, device=device),
        counts=torch.empty(shape, dtype=torch.int32, device=device),
        past_counts=torch.empty(shape, dtype=torch.int32, device=device),
        tokens=tokens,
    )
    grid = (triton.cdiv(num_tiles, TILES_PER_PROGRAM), batch * groups)
    _merge[grid](
        block_ids, starts, unions.first_keys, unions.members, unions.counts, unions.past_counts,
        *block_ids.stride()[:3], 0 if starts is None else starts.stride(0),
        groups, num_queries, num_keys, num_tiles, top_k, query_offset,
        BLOCK=block_size, TOKENS=tokens, TOKENS_P=triton.next_power_of_2(tokens),
        TILES=TILES_PER_PROGRAM, DOCUMENTS=starts is not None, num_warps=4,
    )  # fmt: skip
    return unions
