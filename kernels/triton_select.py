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

from .triton_support import Launch, float32_launch, padded_width


@triton.jit
def _insert(best_scores, best_ids, score, block):
    """Put `block` in place of each row's worst where it scores higher; of equal ones the highest id goes.

    best_scores [ROWS, SLOTS] float32, best_ids [ROWS, SLOTS] int32 distinct in a row, score [ROWS].
    """
    worst = tl.min(best_scores, axis=1)
    leaving = tl.max(tl.where(best_scores == worst[:, None], best_ids, -2147483648), axis=1)
    replaced = (score > worst)[:, None] & (best_ids == leaving[:, None])
    return tl.where(replaced, score[:, None], best_scores), tl.where(replaced, block, best_ids)


@triton.jit
def _rank_step(
    best_scores, best_ids, score, products, step, scales, begin, inside, current,
    local_blocks, init_blocks, PARTS: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Rank the products [ROWS, KEYS] of one step; the last step of a block puts it into the list."""
    score = tl.maximum(score, tl.max(products, axis=1))
    if step % PARTS == PARTS - 1:
        block = step // PARTS
        if SCALED:
            score = score * tl.load(scales + begin + block * BLOCK)
        forced = (block > current - local_blocks) | (block < init_blocks)
        score = tl.where(forced, float("inf"), score)
        score = tl.where(inside & (block <= current), score, float("-inf"))
        best_scores, best_ids = _insert(best_scores, best_ids, score, block)
        score = tl.full(score.shape, float("-inf"), tl.float32)
    return best_scores, best_ids, score


@triton.jit
def _rank_document(
    q, best_scores, best_ids, keys, scales, stride_k, begin, last,
    inside, current, local_blocks, init_blocks,
    WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """Blocks 0 .. last of the document that begins at key `begin`, for the rows `inside` it (int64)."""
    PARTS: tl.constexpr = BLOCK // KEYS
    key = tl.arange(0, KEYS)
    channel = tl.arange(0, WIDTH_P)
    in_tile = key[None, :] * stride_k + channel[:, None]  # [WIDTH_P, KEYS]
    score = tl.full(current.shape, float("-inf"), tl.float32)
    # The products of one step are ranked during the next, so that the tensor cores need not wait.
    products = tl.full([current.shape[0], KEYS], float("-inf"), tl.float32)
    # Block `last` needs no score: whoever sees it has it for its own. The blocks before it lie wholly
    # before some query, so their keys exist: no mask on keys.
    steps = last * PARTS
    for step in range(steps):
        k_tile = keys + (begin + step * KEYS) * stride_k + in_tile
        if WIDTH == WIDTH_P:
            k = tl.load(k_tile)
        else:
            k = tl.load(k_tile, mask=channel[:, None] < WIDTH, other=0.0)
        following = tl.dot(q, k, input_precision="ieee")
        if step > 0:
            best_scores, best_ids, score = _rank_step(
                best_scores, best_ids, score, products, step - 1, scales, begin, inside, current,
                local_blocks, init_blocks, PARTS, BLOCK, SCALED,
            )  # fmt: skip
        products = following
    if steps > 0:
        best_scores, best_ids, score = _rank_step(
            best_scores, best_ids, score, products, steps - 1, scales, begin, inside, current,
            local_blocks, init_blocks, PARTS, BLOCK, SCALED,
        )  # fmt: skip
    own = tl.where(inside & (current == last), float("inf"), float("-inf"))
    return _insert(best_scores, best_ids, own, last)


@triton.jit
def _select(
    queries, keys, scales, starts, block_ids,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_ks, stride_starts_b, stride_scales_b,
    num_queries, num_keys, num_tiles, query_offset, top_k, local_blocks, init_blocks,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    DOCUMENTS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    # The last queries see the most blocks: they go first, so that no long program runs alone at the end.
    tile = num_tiles - 1 - tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, ROWS)
    token, head = row // HEADS, (row % HEADS).to(tl.int64)
    query = tile * TOKENS + token
    valid = (token < TOKENS) & (query < num_queries)
    position = query + query_offset
    channel = tl.arange(0, WIDTH_P)
    rows_q = batch * stride_qb + head * stride_qh + query.to(tl.int64) * stride_qt
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
    if DOCUMENTS:
        at = starts + batch * stride_starts_b + position
        start = tl.load(at, mask=valid, other=0)
        current = (position - start) // BLOCK
        first = query_offset + tile * TOKENS
        end = tl.minimum(first + TOKENS, query_offset + num_queries)
        while first < end:
            begin = tl.load(starts + batch * stride_starts_b + first)
            inside = valid & (start == begin)
            last = tl.max(tl.where(inside, current, 0))
            best_scores, best_ids = _rank_document(
                q, best_scores, best_ids, keys, scales, stride_ks, begin.to(tl.int64), last, inside,
                current, local_blocks, init_blocks, WIDTH, WIDTH_P, BLOCK, KEYS, SCALED,
            )  # fmt: skip
            first = tl.min(tl.where(valid & (start > begin), position, num_keys))
    else:
        current = position // BLOCK
        last = tl.max(tl.where(valid, current, 0))
        begin = tl.full([], 0, tl.int64)
        best_scores, best_ids = _rank_document(
            q, best_scores, best_ids, keys, scales, stride_ks, begin, last, valid, current,
            local_blocks, init_blocks, WIDTH, WIDTH_P, BLOCK, KEYS, SCALED,
        )  # fmt: skip
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
    elif top_k > 32 or padded_width(width) > 128:
        tile = Launch(128, 64, 8, 2)
    else:
        tile = Launch(128, 128, 8, 2)
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
        *index_q.stride()[:3], index_k.stride(0), index_k.stride(2),
        0 if starts is None else starts.stride(0),
        0 if key_scales is None else key_scales.stride(0),
        num_queries, num_keys, num_tiles, query_offset, top_k, local_blocks, init_blocks,
        HEADS=heads, TOKENS=tokens, ROWS=launch.rows, SLOTS=max(2, triton.next_power_of_2(top_k)),
        WIDTH=width, WIDTH_P=padded_width(width), BLOCK=block_size, KEYS=min(launch.keys, block_size),
        DOCUMENTS=starts is not None, SCALED=key_scales is not None,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return block_ids
