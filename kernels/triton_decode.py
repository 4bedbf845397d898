"""Decoding: one new token a row against cached keys, values and index keys, in a fixed number of launches.

    out = softmax over j in the selected blocks of (q . k_j * scale) . v_j        (arXiv 2606.13392, eq. 7)

Three launches that depend on each other: index scores of all blocks (triton_decode_select.py), attention, a
merge. Each selected block, or a piece of one, is a program of the attention: few keys a program, so that at
batch 1 the K * G blocks reach over the whole GPU. Every program takes its block from the scores by itself:
the same top-k in each costs less than a launch of its own, until there are many programs. The merge joins
the pieces in order, so two runs give the same bits. The programs of a launch come to the GPU while the
launch before is still at work, and wait there (`let_next_start`, `wait_for_previous`).

Every grid and shape is a function of the cache's capacity S: no launch waits for a value from the
device, so a CUDA graph can capture a step once and replay it while `lengths` and `starts` change in place.

Called through ops.py. Shapes: B batch, H query heads, G groups, R = H / G, S cached keys (capacity), D head
width, K selected blocks, P pieces of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_decode_select import (
    SelectLaunch,
    best_of_row,
    block_of,
    choose,
    last_starts,
    let_next_start,
    overlapping,
    rank,
    row_bounds,
    wait_for_previous,
)
from .triton_decode_select import default_launch as default_select_launch
from .triton_support import Launch, padded_width

MERGED_PIECES = 64
"""Pieces that the merge adds up at once."""
REPEATED = 2 * 132
"""Programs of the attention that take their block by themselves: two for each multiprocessor of an H100."""


@dataclass(frozen=True)
class DecodeLaunch:
    """How a step is cut into programs; the numbers never change a result beyond rounding."""

    select: SelectLaunch
    attend: Launch
    """Keys per step, and steps whose loads are under way together (num_stages - 1)."""
    piece: int
    """Keys of a block that one program of the attention walks over; a multiple of `attend.keys`."""
    repeated: int = REPEATED
    """Most programs of the attention that repeat the last top-k, each for itself; where there are more, the
    top-k runs once a row and group, in a launch of its own."""


@triton.jit(do_not_specialize=["num_keys", "count", "splits"])
def _attend_piece(
    queries, keys, values, chosen, leaders, count, splits, starts, lengths, maxima, sums, partial,
    stride_qb, stride_qh, stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs,
    groups, num_keys, scale, top_k,
    REPEATS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_P: tl.constexpr,
    PIECE: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, CHOOSE: tl.constexpr,
    KEEP: tl.constexpr, SIZE: tl.constexpr, SHARES: tl.constexpr, SHARE: tl.constexpr,
    UNIT: tl.constexpr, FIRST: tl.constexpr,
    DOCUMENTS: tl.constexpr, RAGGED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The heads of one group over PIECE keys of one selected block: maximum, sum and weighted values.

    CHOOSE: `chosen` holds keys of blocks, of which piece 0 takes the best; else (B, G, K) block ids.
    """
    let_next_start(OVERLAP)
    PARTS: tl.constexpr = BLOCK // PIECE
    piece, num_pieces = tl.program_id(0), tl.num_programs(0)
    group, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start, end = row_bounds(starts, lengths, batch, num_keys, DOCUMENTS, RAGGED)
    row = tl.arange(0, ROWS)
    key = tl.arange(0, KEYS)
    channel = tl.arange(0, WIDTH_P)
    valid = row < REPEATS
    wide = channel < WIDTH
    rows_q = queries + batch * stride_qb + (group * REPEATS + row) * stride_qh
    q = tl.load(rows_q[:, None] + channel[None, :], mask=valid[:, None] & wide[None, :], other=0.0)
    wait_for_previous(OVERLAP)
    if CHOOSE:
        best = best_of_row(
            chosen, leaders, batch * groups + group, end - start, count, splits,
            KEEP, SIZE, SHARES, SHARE, BLOCK, UNIT, FIRST,
        )  # fmt: skip
        slot = tl.arange(0, KEEP)
        mine = tl.where(slot == piece // PARTS, best, -0x8000000000000000)
        block = block_of(tl.max(mine, axis=0))
    else:
        block = tl.load(chosen + (batch * groups + group) * top_k + piece // PARTS)
    # A slot that no block filled reads nothing and leaves a sum of zero.
    end = tl.where(block >= 0, end, 0)
    first = start + tl.maximum(block, 0) * BLOCK + piece % PARTS * PIECE
    keys += batch * stride_kb + group * stride_kg
    values += batch * stride_vb + group * stride_vg
    tile_k = key[:, None] * stride_ks + channel[None, :]
    tile_v = key[:, None] * stride_vs + channel[None, :]
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH_P], tl.float32)
    # In a loop loads become asynchronous copies: all steps ask for theirs before the first needs its own.
    for step in range(PIECE // KEYS):
        here = first + step * KEYS + key < end
        at = (first + step * KEYS).to(tl.int64)
        loaded = here[:, None] & wide[None, :]
        k = tl.load(keys + at * stride_ks + tile_k, mask=loaded, other=0.0)
        v = tl.load(values + at * stride_vs + tile_v, mask=loaded, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [ROWS, KEYS], log2 units
        scores = tl.where(here[None, :], scores, float("-inf"))
        higher = tl.maximum(row_max, tl.max(scores, axis=1))
        # Without a key the maximum stays -inf, and -inf - -inf is no number.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.math.exp2(scores - base[:, None])
        before = tl.math.exp2(row_max - base)
        row_sum = row_sum * before + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * before[:, None], input_precision="ieee")
        row_max = higher
    entry = ((batch * groups + group) * REPEATS + row) * num_pieces + piece
    tl.store(maxima + entry, row_max, mask=valid)
    tl.store(sums + entry, row_sum, mask=valid)
    tl.store(
        partial + entry[:, None] * WIDTH + channel[None, :],
        acc,
        mask=valid[:, None] & wide[None, :],
    )


@triton.jit
def _merge_pieces(
    maxima, sums, partial, out, stride_ob, stride_oh, num_pieces,
    WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, PIECES_P: tl.constexpr, STEP: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One head's pieces, weighted by what each one's maximum lacks to the largest."""
    head, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = (batch * tl.num_programs(0) + head) * num_pieces
    channel = tl.arange(0, WIDTH_P)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([WIDTH_P], tl.float32)
    wait_for_previous(OVERLAP)
    for begin in range(0, PIECES_P, STEP):
        step = begin + tl.arange(0, STEP)
        there = step < num_pieces
        # All three are asked for at once: one wait for memory.
        largest = tl.load(maxima + row + step, mask=there, other=float("-inf"))
        weight = tl.load(sums + row + step, mask=there, other=0.0)
        values = tl.load(
            partial + (row + step)[:, None] * WIDTH + channel[None, :],
            mask=there[:, None] & (channel < WIDTH)[None, :],
            other=0.0,
        )
        # The best block comes first, or the first block: its first key exists, so `higher` is finite.
        higher = tl.maximum(top, tl.max(largest, axis=0))
        factor = tl.math.exp2(largest - higher)
        before = tl.math.exp2(top - higher)
        total = total * before + tl.sum(weight * factor, axis=0)
        acc = acc * before + tl.sum(values * factor[:, None], axis=0)
        top = higher
    tl.store(
        out + batch * stride_ob + head * stride_oh + channel,
        (acc / total).to(out.dtype.element_ty),
        mask=channel < WIDTH,
    )


def default_launch(
    width: int,
    index_width: int,
    heads: int,
    groups: int,
    block_size: int,
    dtype: torch.dtype,
) -> DecodeLaunch:
    """Tile sizes that compile without spills (benchmarks/codegen.py)."""
    wide = padded_width(width)
    rows = max(16, triton.next_power_of_2(heads // groups))
    piece, keys = min(block_size, 64), min(block_size, 32)
    num_warps = 4 if rows * wide <= 8192 else 8
    if dtype == torch.float32:
        piece, keys, num_warps = 16, 16, 4 if rows * wide <= 4096 else 8
    return DecodeLaunch(
        select=default_select_launch(index_width, groups, dtype),
        attend=Launch(rows=rows, keys=keys, num_warps=num_warps, num_stages=3),
        piece=piece,
        # In float32 Triton 3.6 spills where top-k and products share a program.
        repeated=0 if dtype == torch.float32 else REPEATED,
    )


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    *,
    block_size: int,
    top_k: int,
    scale: float,
    launch: DecodeLaunch | None = None,
    **forced: int,
) -> Tensor:
    """Selection and attention of the last cached token of each row.

    Args:
        q: (B, H, 1, D); k, v: (B, G, S, D); index_q: (B, G, 1, D_idx); index_k: (B, 1, S, D_idx); any
            strides with contiguous channels.
        starts: (B,) int32, first position of the row's last document, from which block ids count; None: 0.
        lengths: (B,) int32, at least 1: cached keys of the row, the new one included; None: all S. What
            lies beyond is never read.
        forced: local_blocks, init_blocks.

    Returns:
        out (B, H, 1, D) in q's dtype and layout.
    """
    # All copies come before the scores: what follows reads them before it waits for the scores.
    # One number a row is read from consecutive places.
    lengths = None if lengths is None else lengths.contiguous()
    q, k, v, index_q, index_k = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, index_q, index_k)
    )
    batch, heads, _, width = q.shape
    groups, num_keys = k.shape[1], k.shape[2]
    launch = launch or default_launch(width, index_q.shape[-1], heads, groups, block_size, q.dtype)
    attend = launch.attend
    piece = min(launch.piece, block_size)
    pieces = top_k * (block_size // piece)
    ranked = rank(
        index_q, index_k, starts, lengths, block_size=block_size, top_k=top_k,
        launch=launch.select, **forced,
    )  # fmt: skip
    repeated = pieces * groups * batch <= launch.repeated
    overlap = launch.select.overlap
    chosen, *others = ranked.arguments
    if not repeated:
        chosen = choose(ranked, starts, lengths, num_keys, top_k, overlap)
    overlap = overlapping(overlap)
    maxima, sums = q.new_empty((2, batch, heads, pieces), dtype=torch.float32).unbind()
    partial = q.new_empty((batch, heads, pieces, width), dtype=torch.float32)
    _attend_piece[(pieces, groups, batch)](
        q, k, v, chosen, *others, starts, lengths, maxima, sums, partial,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
        groups, num_keys, scale * math.log2(math.e), top_k,
        REPEATS=heads // groups, ROWS=attend.rows, WIDTH=width, WIDTH_P=padded_width(width),
        PIECE=piece, KEYS=min(attend.keys, piece), CHOOSE=repeated, **ranked.shape,
        DOCUMENTS=starts is not None, RAGGED=lengths is not None, OVERLAP=overlap,
        num_warps=attend.num_warps, num_stages=attend.num_stages, launch_pdl=overlap,
    )  # fmt: skip
    out = torch.empty_like(q)
    pieces_p = triton.next_power_of_2(pieces)
    _merge_pieces[(heads, batch)](
        maxima, sums, partial, out, *out.stride()[:2], pieces,
        WIDTH=width, WIDTH_P=padded_width(width), PIECES_P=pieces_p,
        STEP=min(MERGED_PIECES, pieces_p), OVERLAP=overlap, num_warps=8, launch_pdl=overlap,
    )  # fmt: skip
    return out


@torch.no_grad()
def sparse_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    *,
    block_size: int,
    top_k: int,
    local_blocks: int = 1,
    init_blocks: int = 0,
    scale: float | None = None,
    document_ids: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """See reference.sparse_decode; reads all index keys, but only the selected keys and values."""
    return decode(
        q,
        k,
        v,
        index_q,
        index_k,
        None if document_ids is None else last_starts(document_ids, lengths),
        lengths,
        block_size=block_size,
        top_k=top_k,
        local_blocks=local_blocks,
        init_blocks=init_blocks,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
    )
