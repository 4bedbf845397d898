"""Selection and attention in memory-bounded torch, for any device: tiles over queries.

Nothing larger than one tile of queries by its visible keys is ever kept; the backward pass recomputes the
probabilities from the log-sum-exp. Definitions and shape legend: reference.py. This is the default path
on CPU and the fallback elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .documents import pieces
from .reference import accumulation_dtype, document_starts, top_blocks

TILE_ELEMENTS = 1 << 24
"""Bound of one tile of scores over all heads and rows: 64 MiB in float32."""
TILE_QUERIES = 256
"""Longest tile: shorter ones skip more of the keys that lie in the future."""


def tiles(num_queries: int, num_keys: int, planes: int) -> Iterator[tuple[int, int]]:
    """Query ranges whose scores over `planes` heads and `num_keys` keys stay within TILE_ELEMENTS."""
    step = max(1, min(TILE_QUERIES, TILE_ELEMENTS // max(1, planes * num_keys)))
    for start in range(0, num_queries, step):
        yield start, min(start + step, num_queries)


def future(start: int, stop: int, offset: int, num_keys: int, device: torch.device) -> Tensor:
    """(stop - start, num_keys) bool: keys after the query."""
    queries = torch.arange(start, stop, device=device) + offset
    return torch.arange(num_keys, device=device)[None, :] > queries[:, None]


def token_support(block_ids: Tensor, block_size: int, num_keys: int) -> Tensor:
    """Selected tokens (B, G, T, S) bool, S = num_keys, from block ids (B, G, T, K)."""
    num_blocks = -(-num_keys // block_size)
    # Column 0 takes the -1 padding and ids beyond the visible keys, and is cut off.
    columns = torch.where(block_ids < num_blocks, block_ids + 1, 0).long()
    chosen = torch.zeros(
        *block_ids.shape[:3], num_blocks + 1, dtype=torch.bool, device=block_ids.device
    )
    chosen.scatter_(-1, columns, True)
    return chosen[..., 1:].repeat_interleave(block_size, dim=-1)[..., :num_keys]


def _to_blocks(scores: Tensor, block_size: int, fill: float) -> Tensor:
    """(..., S) to (..., C, block_size), the ragged last block filled up."""
    ragged = -scores.shape[-1] % block_size
    return torch.nn.functional.pad(scores, (0, ragged), value=fill).unflatten(-1, (-1, block_size))


def _current_blocks(start: int, stop: int, offset: int, block_size: int, like: Tensor) -> Tensor:
    here = (torch.arange(start, stop, device=like.device) + offset) // block_size
    return here.expand(like.shape[:3])


@torch.no_grad()
def select_blocks(
    index_q: Tensor,
    index_k: Tensor,
    *,
    block_size: int,
    top_k: int,
    local_blocks: int = 1,
    init_blocks: int = 0,
    document_ids: Tensor | None = None,
    query_offset: int = 0,
) -> Tensor:
    """See reference.select_blocks; scores in float32 tile by tile."""
    batch, groups, num_queries, _ = index_q.shape
    block_ids = index_q.new_empty((batch, groups, num_queries, top_k), dtype=torch.int32)
    dtype = accumulation_dtype(index_q)
    for piece in pieces(num_queries, index_k.shape[2], document_ids, query_offset):
        q = index_q[piece.rows, :, piece.queries].to(dtype)
        k = index_k[piece.rows, :, piece.keys].to(dtype).transpose(-1, -2)
        ids = block_ids[piece.rows, :, piece.queries]
        for start, stop in tiles(q.shape[2], k.shape[-1], q.shape[0] * groups):
            num_keys = piece.offset + stop
            scores = _each_head(q[:, None, :, start:stop], k[..., :num_keys])[:, 0]
            hidden = future(start, stop, piece.offset, num_keys, q.device)
            scores.masked_fill_(hidden, -math.inf)
            best = _to_blocks(scores, block_size, -math.inf).amax(-1)
            here = _current_blocks(start, stop, piece.offset, block_size, best)
            ids[:, :, start:stop] = top_blocks(best, here, top_k, local_blocks, init_blocks)
    return block_ids


@torch.no_grad()
def block_mass(
    q: Tensor, k: Tensor, *, block_size: int, scale: float, offset: int
) -> Iterator[tuple[int, int, Tensor]]:
    """Group-mean attention mass of each block under full attention, for one document.

    Yields (start, stop, mass (B, G, stop - start, C)) per tile of queries; mass sums to 1 over C.
    """
    dtype = accumulation_dtype(q)
    groups = k.shape[1]
    grouped = q.to(dtype).unflatten(1, (groups, -1))
    keys = k.to(dtype).transpose(-1, -2)
    for start, stop in tiles(q.shape[2], k.shape[2], q.shape[0] * q.shape[1]):
        num_keys = offset + stop
        scores = _each_head(grouped[:, :, :, start:stop], keys[..., :num_keys]).mul_(scale)
        scores.masked_fill_(future(start, stop, offset, num_keys, q.device), -math.inf)
        mean = scores.softmax(-1).mean(dim=2)
        yield start, stop, _to_blocks(mean, block_size, 0.0).sum(-1)


@torch.no_grad()
def select_by_mass(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int,
    top_k: int,
    scale: float | None = None,
    local_blocks: int = 1,
    init_blocks: int = 0,
    document_ids: Tensor | None = None,
    query_offset: int = 0,
) -> Tensor:
    """See reference.select_by_mass."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    shape = (q.shape[0], k.shape[1], q.shape[2], top_k)
    block_ids = q.new_empty(shape, dtype=torch.int32)
    for piece in pieces(q.shape[2], k.shape[2], document_ids, query_offset):
        ids = block_ids[piece.rows, :, piece.queries]
        masses = block_mass(
            q[piece.rows, :, piece.queries],
            k[piece.rows, :, piece.keys],
            block_size=block_size,
            scale=scale,
            offset=piece.offset,
        )
        for start, stop, mass in masses:
            here = _current_blocks(start, stop, piece.offset, block_size, mass)
            ids[:, :, start:stop] = top_blocks(mass, here, top_k, local_blocks, init_blocks)
    return block_ids


class TiledAttention(torch.autograd.Function):
    """Causal attention over the selected blocks or over all, document by document; own backward."""

    @staticmethod
    def forward(ctx, q, k, v, block_ids, block_size, scale, parts):
        dtype = accumulation_dtype(q)
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:3], dtype=dtype)
        for part in parts:
            values = v[part.rows, :, part.keys].to(dtype)
            out_part, lse_part = (x[part.rows, :, part.queries] for x in (out, lse))
            for tile in _tile_scores(q, k, block_ids, block_size, scale, part):
                start, stop, num_keys, scores = tile
                # The row's maximum by hand instead of logsumexp: one pass of exponentials, not two.
                largest = scores.amax(-1, keepdim=True)
                weights = scores.sub_(largest).exp_()
                total = weights.sum(-1, keepdim=True)
                attended = _each_head(weights, values[:, :, :num_keys]).div_(total)
                out_part[:, :, start:stop] = attended.flatten(1, 2).to(q.dtype)
                lse_part[:, :, start:stop] = (total.log_() + largest).squeeze(-1).flatten(1, 2)
        ctx.save_for_backward(q, k, v, block_ids, out, lse)
        ctx.block_size, ctx.scale, ctx.parts = block_size, scale, parts
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, _grad_lse):
        q, k, v, block_ids, out, lse = ctx.saved_tensors
        dtype, groups = lse.dtype, k.shape[1]
        grad_q = torch.zeros_like(q)
        grad_k = torch.zeros_like(k, dtype=dtype)
        grad_v = torch.zeros_like(v, dtype=dtype)
        delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1)
        for part in ctx.parts:
            keys, values = (x[part.rows, :, part.keys].to(dtype) for x in (k, v))
            by_query = [x[part.rows, :, part.queries] for x in (q, grad_out, lse, delta)]
            grad_q_part = grad_q[part.rows, :, part.queries]
            grad_k_part, grad_v_part = (x[part.rows, :, part.keys] for x in (grad_k, grad_v))
            for tile in _tile_scores(q, k, block_ids, ctx.block_size, ctx.scale, part):
                start, stop, num_keys, scores = tile
                q_tile, grad_tile, lse_tile, delta_tile = (
                    x[:, :, start:stop].to(dtype).unflatten(1, (groups, -1)) for x in by_query
                )
                probabilities = scores.sub_(lse_tile[..., None]).exp_()
                grad_v_part[:, :, :num_keys] += _sum_heads(probabilities, grad_tile)
                grad_scores = _each_head(grad_tile, values[:, :, :num_keys].transpose(-1, -2))
                grad_scores.sub_(delta_tile[..., None]).mul_(probabilities).mul_(ctx.scale)
                grad_q_tile = _each_head(grad_scores, keys[:, :, :num_keys]).flatten(1, 2)
                grad_q_part[:, :, start:stop] = grad_q_tile.to(q.dtype)
                grad_k_part[:, :, :num_keys] += _sum_heads(grad_scores, q_tile)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None, None


def _tile_scores(q, k, block_ids, block_size, scale, part):
    """Yield (start, stop, num_keys, masked scores (B, G, R, t, num_keys)) tile by tile of one piece."""
    dtype = accumulation_dtype(q)
    q, keys = q[part.rows, :, part.queries], k[part.rows, :, part.keys].to(dtype)
    ids = None if block_ids is None else block_ids[part.rows, :, part.queries]
    for start, stop in tiles(q.shape[2], keys.shape[2], q.shape[0] * q.shape[1]):
        num_keys = part.offset + stop
        q_tile = q[:, :, start:stop].to(dtype).unflatten(1, (k.shape[1], -1))
        scores = _each_head(q_tile, keys[:, :, :num_keys].transpose(-1, -2))
        hidden = future(start, stop, part.offset, num_keys, q.device)
        if ids is not None:
            chosen = token_support(ids[:, :, start:stop], block_size, num_keys)
            hidden = (hidden | ~chosen).unsqueeze(2)
        yield start, stop, num_keys, scores.mul_(scale).masked_fill_(hidden, -math.inf)


def _each_head(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of every head of a group: (B, G, R, t, X), (B, G, X, Y) -> (B, G, R, t, Y).

    One product a group: broadcasting over R would copy `right` for every head, which is most of the time
    where t is 1.
    """
    return (left.flatten(2, 3) @ right).unflatten(2, left.shape[2:4])


def _sum_heads(left: Tensor, right: Tensor) -> Tensor:
    """Sum over heads and queries of left^T right: (B, G, R, t, S), (B, G, R, t, D) -> (B, G, S, D)."""
    return left.flatten(2, 3).transpose(-1, -2) @ right.flatten(2, 3)


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_ids: Tensor | None,
    *,
    block_size: int,
    scale: float | None = None,
    document_ids: Tensor | None = None,
    query_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """See reference.sparse_attention; differentiable in q, k and v (not through the log-sum-exp)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    parts = list(pieces(q.shape[2], k.shape[2], document_ids, query_offset))
    return TiledAttention.apply(q, k, v, block_ids, block_size, scale, parts)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    document_ids: Tensor | None = None,
    query_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """See reference.dense_attention; torch's fused CPU kernel where it applies, else tiles."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    parts = list(pieces(q.shape[2], k.shape[2], document_ids, query_offset))
    whole_rows = q.shape[2] == k.shape[2]
    if not (q.device.type == "cpu" and whole_rows and q.dtype != torch.float16):
        return TiledAttention.apply(q, k, v, None, 1, scale, parts)
    if document_ids is None:
        return _fused_cpu(q, k, v, scale)
    # split, not slices: its backward joins the pieces once instead of padding each to a whole row.
    rows = zip(*(x.split(1) for x in (q, k, v)), strict=True)
    outs, lses = [], []
    for number, row in enumerate(rows):
        lengths = [p.keys.stop - p.keys.start for p in parts if p.rows.start == number]
        alone = zip(*(x.split(lengths, dim=2) for x in row), strict=True)
        found = [_fused_cpu(q_part, k_part, v_part, scale) for q_part, k_part, v_part in alone]
        outs.append(torch.cat([out for out, _ in found], dim=2))
        lses.append(torch.cat([lse for _, lse in found], dim=2))
    return torch.cat(outs), torch.cat(lses)


def _fused_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The operator behind scaled_dot_product_attention on CPU, called for its log-sum-exp."""
    repeats = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, keys, values, 0.0, True, scale=scale
    )
    return out, lse.detach()


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
    batch, _, num_keys, _ = k.shape
    dtype = accumulation_dtype(q)
    last = q.new_full((batch,), num_keys - 1, dtype=torch.long)
    if lengths is not None:
        last = lengths.long() - 1
    starts = torch.zeros_like(last)
    if document_ids is not None:
        starts = document_starts(document_ids).gather(1, last[:, None])[:, 0]
    position = torch.arange(num_keys, device=q.device)[None]
    relative = position - starts[:, None]
    index_scores = _each_head(index_q.to(dtype)[:, None], index_k.to(dtype).transpose(-1, -2))
    scores = index_scores[:, 0, :, 0]
    hidden = (relative < 0) | (position > last[:, None])
    scores = scores.masked_fill(hidden[:, None], -math.inf)
    num_blocks = -(-num_keys // block_size)
    blocks = (relative.clamp(min=0) // block_size)[:, None].expand_as(scores)
    best = scores.new_full((*scores.shape[:2], num_blocks), -math.inf)
    best.scatter_reduce_(-1, blocks, scores, "amax")
    current = ((last - starts) // block_size)[:, None].expand(best.shape[:2])
    ids = top_blocks(best, current, top_k, local_blocks, init_blocks).long()

    within = torch.arange(block_size, device=q.device)
    offsets = (ids[..., None] * block_size + within).flatten(-2)
    positions = offsets + starts[:, None, None]
    newest = last[:, None, None]
    valid = (ids >= 0).repeat_interleave(block_size, dim=-1) & (positions <= newest)
    # What is not selected is read at the newest token: beyond it the cache may hold anything, also NaN.
    rows = torch.where(valid, positions, newest)[..., None].expand(-1, -1, -1, k.shape[-1])
    keys, values = k.gather(2, rows).to(dtype), v.gather(2, rows).to(dtype)
    grouped = q.to(dtype).unflatten(1, (k.shape[1], -1))[:, :, :, 0]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = (grouped @ keys.transpose(-1, -2) * scale).masked_fill(~valid[:, :, None], -math.inf)
    return (logits.softmax(-1) @ values).flatten(1, 2).unsqueeze(2).to(q.dtype)
