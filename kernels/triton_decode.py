"""Decoding: one new token a row against cached keys, values and index keys, in a fixed number of launches.

    out = softmax over j in the selected blocks of (q . k_j * scale) . v_j        (arXiv 2606.13392, eq. 7)

Selection (triton_decode_select.py) leaves K blocks a group. Each block, or a piece of one, is a program:
few keys a program, so that at batch 1 the K * G blocks reach over the whole GPU. A last kernel joins the
pieces in order, so two runs give the same bits.

Every grid and shape is a function of the cache's capacity S: no launch waits for a value from the
device, so a CUDA graph can capture a step once and replay it while `lengths` and `starts` change in place.

Called through ops.py. Shapes: B batch, H query heads, G groups, R = H / G, S cached keys (capacity), D head
width, K selected blocks, P pieces of them.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_decode_select import SelectLaunch, last_starts, row_bounds, select
from .triton_support import Launch, padded_width

MERGED_PIECES = 64
"""Pieces that the merge adds up at once."""


@triton.jit(do_not_specialize=["num_keys"])
def _attend_piece(
    queries, keys, values, ids, starts, lengths, maxima, sums, partial,
    stride_qb, stride_qh, stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs,
    groups, num_keys, scale, top_k,
    REPEATS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_P: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, DOCUMENTS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """The heads of one group over KEYS keys of one selected block: maximum, sum and weighted values."""
    PARTS: tl.constexpr = BLOCK // KEYS
    piece, num_pieces = tl.program_id(0), tl.num_programs(0)
    group, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start, end = row_bounds(starts, lengths, batch, num_keys, DOCUMENTS, RAGGED)
    block = tl.load(ids + (batch * groups + group) * top_k + piece // PARTS)
    # A slot that no block filled reads nothing and leaves a sum of zero.
    end = tl.where(block >= 0, end, 0)
    first = start + tl.maximum(block, 0) * BLOCK + piece % PARTS * KEYS
    row = tl.arange(0, ROWS)
    key = tl.arange(0, KEYS)
    channel = tl.arange(0, WIDTH_P)
    valid = row < REPEATS
    wide = channel < WIDTH
    here = first + key < end
    keys += batch * stride_kb + group * stride_kg + first.to(tl.int64) * stride_ks
    values += batch * stride_vb + group * stride_vg + first.to(tl.int64) * stride_vs
    loaded = here[:, None] & wide[None, :]
    # Values are asked for before the keys are needed: one wait for both.
    k = tl.load(keys + (key[:, None] * stride_ks + channel[None, :]), mask=loaded, other=0.0)
    v = tl.load(values + (key[:, None] * stride_vs + channel[None, :]), mask=loaded, other=0.0)
    rows_q = queries + batch * stride_qb + (group * REPEATS + row) * stride_qh
    q = tl.load(rows_q[:, None] + channel[None, :], mask=valid[:, None] & wide[None, :], other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [ROWS, KEYS], log2 units
    scores = tl.where(here[None, :], scores, float("-inf"))
    row_max = tl.max(scores, axis=1)
    # Without a key the maximum stays -inf, and -inf - -inf is no number.
    base = tl.where(row_max == float("-inf"), 0.0, row_max)
    weights = tl.math.exp2(scores - base[:, None])
    acc = tl.dot(weights.to(v.dtype), v, input_precision="ieee")  # [ROWS, WIDTH_P]
    entry = ((batch * groups + group) * REPEATS + row) * num_pieces + piece
    tl.store(maxima + entry, row_max, mask=valid)
    tl.store(sums + entry, tl.sum(weights, axis=1), mask=valid)
    tl.store(
        partial + entry[:, None] * WIDTH + channel[None, :],
        acc,
        mask=valid[:, None] & wide[None, :],
    )


@triton.jit
def _merge_pieces(
    maxima, sums, partial, out, stride_ob, stride_oh, num_pieces,
    WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, PIECES_P: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One head's pieces, weighted by what each one's maximum lacks to the largest."""
    head, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = (batch * tl.num_programs(0) + head) * num_pieces
    piece = tl.arange(0, PIECES_P)
    largest = tl.load(maxima + row + piece, mask=piece < num_pieces, other=float("-inf"))
    # The row's own block is always selected and holds the new token: the maximum is finite.
    top = tl.max(largest, axis=0)
    total = tl.load(sums + row + piece, mask=piece < num_pieces, other=0.0)
    total = tl.sum(total * tl.math.exp2(largest - top), axis=0)
    channel = tl.arange(0, WIDTH_P)
    acc = tl.zeros([WIDTH_P], tl.float32)
    for begin in range(0, num_pieces, STEP):
        step = begin + tl.arange(0, STEP)
        there = step < num_pieces
        weight = tl.math.exp2(tl.load(maxima + row + step, mask=there, other=float("-inf")) - top)
        values = tl.load(
            partial + (row + step)[:, None] * WIDTH + channel[None, :],
            mask=there[:, None] & (channel < WIDTH)[None, :],
            other=0.0,
        )
        acc += tl.sum(values * weight[:, None], axis=0)
    tl.store(
        out + batch * stride_ob + head * stride_oh + channel,
        (acc / total).to(out.dtype.element_ty),
        mask=channel < WIDTH,
    )


def default_launch(width: int, repeats: int, block_size: int, dtype: torch.dtype) -> Launch:
    """Tile sizes that compile without spills (benchmarks/codegen.py)."""
    wide = padded_width(width)
    rows = max(16, triton.next_power_of_2(repeats))
    keys = min(block_size, 64 if wide <= 128 else 32)
    num_warps = 4 if rows * wide <= 8192 else 8
    if dtype == torch.float32:
        keys, num_warps = 16, 4 if rows * wide <= 4096 else 8
    return Launch(rows=rows, keys=keys, num_warps=num_warps, num_stages=1)


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
    local_blocks: int,
    init_blocks: int,
    scale: float,
    launch: Launch | None = None,
    select_launch: SelectLaunch | None = None,
) -> Tensor:
    """Selection and attention of the last cached token of each row.

    Args:
        q: (B, H, 1, D); k, v: (B, G, S, D); index_q: (B, G, 1, D_idx); index_k: (B, 1, S, D_idx); any
            strides with contiguous channels.
        starts: (B,) int32, first position of the row's last document, from which block ids count; None: 0.
        lengths: (B,) int32, at least 1: cached keys of the row, the new one included; None: all S. What
            lies beyond is never read.

    Returns:
        out (B, H, 1, D) in q's dtype and layout.
    """
    # One number a row is read from consecutive places.
    lengths = None if lengths is None else lengths.contiguous()
    ids = select(
        index_q, index_k, starts, lengths, block_size=block_size, top_k=top_k,
        local_blocks=local_blocks, init_blocks=init_blocks, launch=select_launch,
    )  # fmt: skip
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, _, width = q.shape
    groups, num_keys = k.shape[1], k.shape[2]
    repeats = heads // groups
    launch = launch or default_launch(width, repeats, block_size, q.dtype)
    piece_keys = min(launch.keys, block_size)
    pieces = top_k * (block_size // piece_keys)
    maxima, sums = q.new_empty((2, batch, heads, pieces), dtype=torch.float32).unbind()
    partial = q.new_empty((batch, heads, pieces, width), dtype=torch.float32)
    _attend_piece[(pieces, groups, batch)](
        q, k, v, ids, starts, lengths, maxima, sums, partial,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
        groups, num_keys, scale * math.log2(math.e), top_k,
        REPEATS=repeats, ROWS=launch.rows, WIDTH=width, WIDTH_P=padded_width(width),
        BLOCK=block_size, KEYS=piece_keys, DOCUMENTS=starts is not None, RAGGED=lengths is not None,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    out = torch.empty_like(q)
    _merge_pieces[(heads, batch)](
        maxima, sums, partial, out, *out.stride()[:2], pieces,
        WIDTH=width, WIDTH_P=padded_width(width), PIECES_P=triton.next_power_of_2(pieces),
        STEP=MERGED_PIECES, num_warps=8,
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
