"""Selection: index scores, block maximum and the best k blocks in one pass over the index keys.

    M[i, b, g] = max over visible j in b of q_idx[i, g] . k_idx[j]; the k best b are kept
                                                                    (arXiv 2606.13392, eq. 5 and 6)

A program holds a tile of rows, neighbouring tokens times index heads (they share the index keys), and
keeps each row's k best blocks in registers: a better block takes the place of the worst. Ranking needs no
softmax and no scale. A query's own block is always kept, so only blocks that lie wholly in the past are
scored: no causal mask. Nothing of size queries x keys or queries x blocks is ever written.

Shapes: B batch, G index heads, T queries, S keys, D index width, K kept blocks.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_support import Launch, float32_launch, padded_width, shared_by


@triton.jit
def _insert(best_scores, best_ids, score, block):
    """Put `block` in place of each row's worst where it scores higher; of equal ones the highest id goes.

    best_scores [ROWS, SLOTS] float32, best_ids [ROWS, SLOTS] int32 distinct in a row, score [ROWS], block
    [ROWS] or one for all.
    """
    worst = tl.min(best_scores, axis=1)
    leaving = tl.max(tl.where(best_scores == worst[:, None], best_ids, -2147483648), axis=1)
    replaced = (score > worst)[:, None] & (best_ids == leaving[:, None])
    blocks = (tl.zeros(score.shape, tl.int32) + block)[:, None]
    return tl.where(replaced, score[:, None], best_scores), tl.where(replaced, blocks, best_ids)


@triton.jit
def _insert_forced(best_scores, best_ids, valid, current, local_blocks, init_blocks):
    """The blocks that a query keeps whatever they score: the first ones and the ones up to its own."""
    forced = tl.full(current.shape, float("inf"), tl.float32)
    for block in range(init_blocks):
        score = tl.where(valid & (block <= current), forced, float("-inf"))
        best_scores, best_ids = _insert(best_scores, best_ids, score, block)
    for back in range(local_blocks):
        own = current - back
        score = tl.where(valid & (own >= init_blocks), forced, float("-inf"))
        best_scores, best_ids = _insert(best_scores, best_ids, score, own)
    return best_scores, best_ids


@triton.jit
def _rank_document(
    q, best_scores, best_ids, keys, scales, begin, limit, init_blocks, stride_k: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """Blocks init_blocks .. `limit` [ROWS] of the document that begins at key `begin` (int64)."""
    PARTS: tl.constexpr = BLOCK // KEYS
    key = tl.arange(0, KEYS)
    channel = tl.arange(0, WIDTH_P)
    in_tile = key[None, :] * stride_k + channel[:, None]  # [WIDTH_P, KEYS]
    score = tl.full(limit.shape, float("-inf"), tl.float32)
    # These blocks lie wholly before some query, so their keys exist: no mask on keys.
    for step in range(init_blocks * PARTS, (tl.max(limit) + 1) * PARTS):
        k_tile = keys + (begin + step * KEYS) * stride_k + in_tile
        if WIDTH == WIDTH_P:
            k = tl.load(k_tile)
        else:
            k = tl.load(k_tile, mask=channel[:, None] < WIDTH, other=0.0)
        products = tl.dot(q, k, input_precision="ieee")
        score = tl.maximum(score, tl.max(products, axis=1))
        if step % PARTS == PARTS - 1:
            block = step // PARTS
            if SCALED:
                score = score * tl.load(scales + begin + block * BLOCK)
            # Of n blocks a row takes k ln(n / k) or so: most blocks end here, for all rows of the tile.
            score = tl.where(block <= limit, score, float("-inf"))
            best_scores, best_ids = _insert(best_scores, best_ids, score, block)
            score = tl.full(score.shape, float("-inf"), tl.float32)
    return best_scores, best_ids


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_tiles", "query_offset", "top_k"])
def _select(
    queries, keys, scales, starts, block_ids,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_starts_b, stride_scales_b,
    num_queries, num_keys, num_tiles, query_offset, top_k, local_blocks, init_blocks,
    stride_ks: tl.constexpr,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    DOCUMENTS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    # The last queries see the most blocks: they go first, so that no long program runs alone at the end.
    tile = num_tiles - 1 - tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, ROWS)
    token, head = row // HEADS, row % HEADS
    query = tile * TOKENS + token
    valid = (token < TOKENS) & (query < num_queries)
    position = query + query_offset
    channel = tl.arange(0, WIDTH_P)
    rows_q = batch * stride_qb + head.to(tl.int64) * stride_qh + query.to(tl.int64) * stride_qt
    q = tl.load(
        queries + rows_q[:, None] + channel[None, :],
        mask=valid[:, None] & (channel[None, :] < WIDTH),
        other=0.0,
    )
    keys += batch * stride_kb
    scales += batch * stride_scales_b
    slot = tl.arange(0, SLOTS)[None, :] + tl.zeros([ROWS, 1], tl.int32)
    # Slots beyond top_k hold what nothing can beat; free ones are told apart by negative ids.
    best_scores = tl.where(slot < top_k, float("-inf"), float("inf"))
    best_ids = tl.where(slot < top_k, -1 - slot, 2147483647 - slot)
    start = tl.zeros([ROWS], tl.int32)
    if DOCUMENTS:
        start = tl.load(starts + batch * stride_starts_b + position, mask=valid, other=0)
    current = (position - start) // BLOCK
    limit = tl.where(valid, current - local_blocks, -1)
    if DOCUMENTS:
        first = query_offset + tile * TOKENS
        end = tl.minimum(first + TOKENS, query_offset + num_queries)
        while first < end:
            begin = tl.load(starts + batch * stride_starts_b + first)
            best_scores, best_ids = _rank_document(
                q, best_scores, best_ids, keys, scales, begin.to(tl.int64),
                tl.where(start == begin, limit, -1), init_blocks, stride_ks,
                WIDTH, WIDTH_P, BLOCK, KEYS, SCALED,
            )  # fmt: skip
            first = tl.min(tl.where(valid & (start > begin), position, num_keys))
        # Zero, which the compiler cannot know: it makes the rows' numbers anew, where it would keep eight a
        # thread in registers that the loop needs.
        tile += tl.maximum(first - num_keys, 0)
        query = tile * TOKENS + token
        valid = (token < TOKENS) & (query < num_queries)
        position = query + query_offset
        start = tl.load(starts + batch * stride_starts_b + position, mask=valid, other=0)
        current = (position - start) // BLOCK
    else:
        best_scores, best_ids = _rank_document(
            q, best_scores, best_ids, keys, scales, tl.full([], 0, tl.int64),
            limit, init_blocks, stride_ks, WIDTH, WIDTH_P, BLOCK, KEYS, SCALED,
        )  # fmt: skip
    best_scores, best_ids = _insert_forced(
        best_scores, best_ids, valid, current, local_blocks, init_blocks
    )
    unused = 2147483647 - SLOTS
    ids = tl.sort(tl.where(best_ids < 0, unused, best_ids), dim=1)
    ids = tl.where(ids < unused, ids, -1)
    rows_o = ((batch * HEADS + head) * num_queries + query) * top_k
    tl.store(block_ids + rows_o[:, None] + slot, ids, mask=valid[:, None] & (slot < top_k))


def default_launch(
    width: int, heads: int, block_size: int, top_k: int, dtype: torch.dtype
) -> Launch:
    """Tile sizes that compile without spills (benchmarks/codegen.py)."""
    if dtype == torch.float32:
        tile = float32_launch()
    elif padded_width(width) > 128:
        tile = Launch(128, 64, 8, 2)
    elif top_k > 32:
        tile = Launch(64, 64, 4, 2)
    elif width != padded_width(width):
        tile = Launch(128, 64, 8, 2, shared_by(2))
    else:
        # Two programs a multiprocessor: one ranks while the other multiplies.
        tile = Launch(128, 128, 8, 2, shared_by(2))
    rows = max(tile.rows, triton.next_power_of_2(heads))
    return replace(tile, rows=rows, keys=min(tile.keys, block_size))


@torch.no_grad()
def select(
    index_q: Tensor,
    index_k: Tensor,
    starts: Tensor | None,
    *,
    block_size: int,
    top_k: int,
    local_blocks: int = 1,
    init_blocks: int = 0,
    query_offset: int = 0,
    key_scales: Tensor | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """The best blocks of every query.

    Args:
        index_q: (B, G, T, D); index_k: (B, 1, S, D); one dtype, also float8_e4m3fn.
        starts: (B, S) int32, first position of each key's document, or None.
        key_scales: (B, S) float32, the positive factor of each key's block (fp8), or None.

    Returns:
        block ids (B, G, T, top_k) int32, ascending, -1 padded, counted from the document's first block.
    """
    index_q, index_k = (x if x.stride(-1) == 1 else x.contiguous() for x in (index_q, index_k))
    batch, heads, num_queries, width = index_q.shape
    num_keys = index_k.shape[2]
    launch = launch or default_launch(width, heads, block_size, top_k, index_q.dtype)
    tokens = launch.rows // heads
    num_tiles = triton.cdiv(num_queries, tokens)
    block_ids = torch.empty(
        batch, heads, num_queries, top_k, dtype=torch.int32, device=index_q.device
    )
    _select[(num_tiles, batch)](
        index_q, index_k, key_scales if key_scales is not None else index_q, starts, block_ids,
        *index_q.stride()[:3], index_k.stride(0), 0 if starts is None else starts.stride(0),
        0 if key_scales is None else key_scales.stride(0),
        num_queries, num_keys, num_tiles, query_offset, top_k, local_blocks, init_blocks,
        stride_ks=index_k.stride(2), HEADS=heads, TOKENS=tokens, ROWS=launch.rows,
        SLOTS=max(2, triton.next_power_of_2(top_k)),
        WIDTH=width, WIDTH_P=padded_width(width), BLOCK=block_size, KEYS=min(launch.keys, block_size),
        DOCUMENTS=starts is not None, SCALED=key_scales is not None,
        **launch.options,
    )  # fmt: skip
    return block_ids
