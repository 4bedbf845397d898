"""Gradients of the index branch from a scratch of ds = p - t: device functions of triton_kl_full.py.

The scratch, (B * G, chunk's tokens, S) in the inputs' dtype, holds some tiles of TILE query tokens: the
places first_place .. of `tiles`; only keys that a tile may see are set. Both kernels wait for memory: large
tiles read index q and k less often. Equations: triton_kl_tile.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_kl_tile import load_keys, load_rows


@triton.jit
def tile_bounds(
    starts, batch, first_query, num_tokens, TILE: tl.constexpr, DOCUMENTS: tl.constexpr
):
    """First and past-the-last key that a tile of TILE queries may see."""
    begin = 0
    if DOCUMENTS:
        begin = tl.load(starts + batch * num_tokens + first_query)
    return begin, tl.minimum(first_query + TILE, num_tokens)


# Numbers that change from launch to launch would compile a kernel for each divisibility.
@triton.jit(do_not_specialize=["stride_tiles", "first_place", "groups", "num_tokens"])
def query_gradient_kernel(
    scratch, index_keys, starts, tiles, partial,
    stride_ikb, stride_ik, stride_tiles, stride_sp, stride_st,
    first_place, groups, num_tokens,
    TILE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PIECE: tl.constexpr,
    INDEX: tl.constexpr, INDEX_P: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """ds k_idx over PIECE keys: (pieces, B * G, chunk's tokens, INDEX) float32; zero if none is seen."""
    PARTS: tl.constexpr = TILE // ROWS
    part, piece = tl.program_id(0), tl.program_id(1)
    plane = tl.program_id(2).to(tl.int64)
    batch = plane // groups
    first_query = tl.load(tiles + batch * stride_tiles + first_place + part // PARTS) * TILE
    # What the whole tile sees is written, with zeros where this part sees less.
    begin, end = tile_bounds(starts, batch, first_query, num_tokens, TILE, DOCUMENTS)
    begin = tl.maximum(begin, piece * PIECE) // KEYS
    end = tl.cdiv(tl.minimum(end, piece * PIECE + PIECE), KEYS)
    slot = tl.arange(0, ROWS)
    scratch += plane * stride_sp + (part * ROWS).to(tl.int64) * stride_st
    index_keys += batch * stride_ikb
    acc = tl.zeros([ROWS, INDEX_P], tl.float32)
    for step in range(begin, end):
        first = step * KEYS
        position = first + tl.arange(0, KEYS)
        difference = tl.load(scratch + (slot[:, None] * stride_st + position[None, :]))
        index_k = load_keys(index_keys, first, stride_ik, num_tokens, KEYS, INDEX, INDEX_P)
        acc = tl.dot(difference, index_k, acc, input_precision="ieee")
    channel = tl.arange(0, INDEX_P)
    at = (piece * tl.num_programs(2) + plane) * tl.num_programs(0) + part
    to = partial + at * (ROWS * INDEX) + (slot[:, None] * INDEX + channel[None, :])
    tl.store(to, acc, mask=(channel < INDEX)[None, :])


@triton.jit(
    do_not_specialize=[
        "stride_tiles", "stride_bounds", "first_place", "last_place", "groups", "num_tokens", "share",
    ]
)  # fmt: skip
def key_gradient_kernel(
    scratch, index_queries, tiles, begins, ends, grad_k,
    stride_iqb, stride_iqg, stride_iqt, stride_tiles, stride_bounds, stride_sp, stride_st,
    stride_gs, stride_gb,
    first_place, last_place, groups, num_tokens, share,
    TILE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    INDEX: tl.constexpr, INDEX_P: tl.constexpr,
):  # fmt: skip
    """Adds ds^T q_idx of the places first_place .. last_place - 1 and of `share` groups to KEYS rows of
    grad_k: (groups / share, B, S, INDEX) float32.
    """
    PARTS: tl.constexpr = TILE // ROWS
    key_tile = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    bounds = batch * stride_bounds + key_tile
    begin = tl.maximum(tl.load(begins + bounds), first_place)
    end = tl.minimum(tl.load(ends + bounds), last_place)
    position = key_tile * KEYS + tl.arange(0, KEYS)
    slot = tl.arange(0, ROWS)
    channel = tl.arange(0, INDEX_P)
    to = grad_k + split * stride_gs + batch * stride_gb + (key_tile * KEYS).to(tl.int64) * INDEX
    to += tl.arange(0, KEYS)[:, None] * INDEX + channel[None, :]
    mask = (position < num_tokens)[:, None] & (channel < INDEX)[None, :]
    acc = tl.load(to, mask=mask, other=0.0)
    for group in range(split * share, split * share + share):
        plane = batch * groups + group
        for step in range(begin * PARTS, end * PARTS):
            place = step // PARTS
            first_query = (
                tl.load(tiles + batch * stride_tiles + place) * TILE + (step % PARTS) * ROWS
            )
            # Rows past the end have a difference of 0.
            row = tl.minimum(slot, num_tokens - 1 - first_query)
            base = batch * stride_iqb + group * stride_iqg + first_query.to(tl.int64) * stride_iqt
            index_q = load_rows(index_queries + base, row, stride_iqt, INDEX, INDEX_P)
            at = plane * stride_sp + ((step - first_place * PARTS) * ROWS).to(tl.int64) * stride_st
            difference = tl.load(scratch + at + (slot[:, None] * stride_st + position[None, :]))
            acc = tl.dot(tl.trans(difference), index_q, acc, input_precision="ieee")
    tl.store(to, acc, mask=mask)


def query_bounds(
    tiles: Tensor, starts: Tensor | None, num_tokens: int, tile: int, keys: int
) -> tuple[Tensor, Tensor]:
    """First of `tiles` that sees each key tile, and past the last: (B, ceil(S / keys)) int32 each."""
    batch, num_taken = tiles.shape
    first_keys = (
        torch.arange(0, num_tokens, keys, device=tiles.device).expand(batch, -1).contiguous()
    )
    taken = tiles.long().contiguous()
    # A tile ends before key j if its number is below j // tile.
    begins = torch.searchsorted(taken, first_keys // tile, out_int32=True)
    if starts is None:
        return begins, torch.full_like(begins, num_taken)
    # Starts ascend, so tiles whose first query starts after the last key end the list.
    first_starts = torch.gather(starts.long(), 1, taken * tile)
    last_keys = (first_keys + (keys - 1)).clamp(max=num_tokens - 1)
    return begins, torch.searchsorted(first_starts, last_keys, right=True, out_int32=True)
