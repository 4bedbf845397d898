"""Selection and attention in memory-bounded torch, for any device: tiles over queries.

Nothing larger than one tile of queries by its visible keys is ever kept; the backward pass recomputes the
probabilities from the log-sum-exp. Definitions and shape legend: reference.py. This is the default path
on CPU and the fallback elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .documents import DocumentIds, key_starts, pieces
from .reference import accumulation_dtype, top_blocks

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
    document_ids: DocumentIds = None,
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
            scores = _each_head(q[:, :, start:stop], k[:, 0, :, :num_keys])
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
    grouped, keys = _by_group(q.to(dtype), groups), k.to(dtype).flatten(0, 1)
    for start, stop in tiles(q.shape[2], k.shape[2], q.shape[0] * q.shape[1]):
        num_keys = offset + stop
        hidden = future(start, stop, offset, num_keys, q.device)
        scores = _scores(grouped[:, :, start:stop], keys[:, :num_keys], hidden, scale)
        mean = scores.softmax(-1).mean(dim=1).unflatten(0, (-1, groups))
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
    document_ids: DocumentIds = None,
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
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:3], dtype=accumulation_dtype(q))
        attend, groups = _attend_fused if _is_fused(q) else _attend_plainly, k.shape[1]
        for part in parts:
            keys, values = (x[part.rows, :, part.keys].flatten(0, 1) for x in (k, v))
            q_part, out_part, lse_part = (x[part.rows, :, part.queries] for x in (q, out, lse))
            for tile in _attention_tiles(q, block_ids, block_size, part):
                queries, seen = (slice(None), slice(None), tile.queries), slice(0, tile.num_keys)
                attended, total = attend(
                    _by_group(q_part[queries], groups),
                    keys[:, seen],
                    values[:, seen],
                    tile.hidden,
                    scale,
                )
                out_part[queries] = attended.reshape(out_part[queries].shape)
                lse_part[queries] = total.reshape(lse_part[queries].shape)
        ctx.save_for_backward(q, k, v, block_ids, out, lse)
        ctx.block_size, ctx.scale, ctx.parts = block_size, scale, parts
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, _grad_lse):
        q, k, v, block_ids, out, lse = ctx.saved_tensors
        grad_q = torch.zeros_like(q)
        grad_k, grad_v = (torch.zeros_like(x, dtype=lse.dtype) for x in (k, v))
        back, groups = _back_fused if _is_fused(q) else _back_plainly, k.shape[1]
        for part in ctx.parts:
            keys, values = (x[part.rows, :, part.keys].flatten(0, 1) for x in (k, v))
            by_query = [x[part.rows, :, part.queries] for x in (grad_out, q, out, lse)]
            grad_q_part = grad_q[part.rows, :, part.queries]
            grad_k_part, grad_v_part = (x[part.rows, :, part.keys] for x in (grad_k, grad_v))
            for tile in _attention_tiles(q, block_ids, ctx.block_size, part):
                queries, seen = (slice(None), slice(None), tile.queries), slice(0, tile.num_keys)
                grads = back(
                    [_by_group(x[queries], groups) for x in by_query],
                    keys[:, seen],
                    values[:, seen],
                    tile.hidden,
                    ctx.scale,
                )
                grad_q_part[queries] = grads[0].reshape(grad_q_part[queries].shape)
                for total, grad in ((grad_k_part, grads[1]), (grad_v_part, grads[2])):
                    total[:, :, seen] += grad.unflatten(0, (-1, groups))
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None, None


@dataclass(frozen=True)
class _Tile:
    """Queries of one piece and the keys before them."""

    queries: slice
    num_keys: int
    hidden: Tensor | None
    """(B G or 1, 1, t, num_keys) bool: keys a query does not see; None: those after it, t = num_keys."""


def _attention_tiles(q, block_ids, block_size, part) -> Iterator[_Tile]:
    """Tiles of one piece; a whole document without a selection is one tile of torch's kernel."""
    num_queries = part.queries.stop - part.queries.start
    num_keys = part.offset + num_queries
    if block_ids is None and not part.offset and _is_fused(q):
        yield _Tile(slice(0, num_queries), num_keys, None)
        return
    rows = len(range(q.shape[0])[part.rows])
    for start, stop in tiles(num_queries, num_keys, rows * q.shape[1]):
        seen = part.offset + stop
        hidden = future(start, stop, part.offset, seen, q.device)[None, None]
        if block_ids is not None:
            ids = block_ids[part.rows, :, part.queries][:, :, start:stop]
            hidden = hidden | ~token_support(ids, block_size, seen)
            hidden = hidden.flatten(0, 1).unsqueeze(1)
        yield _Tile(slice(start, stop), seen, hidden)


def _is_fused(q: Tensor) -> bool:
    """Whether torch has a kernel for a whole tile, with its log-sum-exp; for one query it is slower."""
    return q.device.type == "cpu" and q.dtype != torch.float16 and q.shape[2] > 1


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(B, H, ...) to (B G, R, ...)."""
    return x.unflatten(1, (groups, -1)).flatten(0, 1)


def _attend_plainly(q, k, v, hidden, scale):
    """Output and log-sum-exp of a tile. q (B G, R, t, D), k and v (B G, S, D), hidden as in `_Tile`."""
    dtype = accumulation_dtype(q)
    scores = _scores(q.to(dtype), k.to(dtype), hidden, scale)
    # The row's maximum by hand instead of logsumexp: one pass of exponentials, not two.
    largest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(largest).exp_()
    total = weights.sum(-1, keepdim=True)
    attended = _each_head(weights, v.to(dtype)).div_(total)
    return attended.to(q.dtype), (total.log_() + largest).squeeze(-1)


def _back_plainly(by_query, k, v, hidden, scale):
    """Gradients of a tile, q's (B G, R, t, D), k's and v's (B G, S, D), from [grad_out, q, out, lse]."""
    lse = by_query[-1]
    grad_out, q, out, _, k, v = (x.to(lse.dtype) for x in (*by_query, k, v))
    probabilities = _scores(q, k, hidden, scale).sub_(lse[..., None]).exp_()
    delta = (grad_out * out).sum(-1, keepdim=True)
    grad_scores = _each_head(grad_out, v.mT).sub_(delta).mul_(probabilities).mul_(scale)
    grad_k = grad_scores.flatten(1, 2).mT @ q.flatten(1, 2)
    grad_v = probabilities.flatten(1, 2).mT @ grad_out.flatten(1, 2)
    return _each_head(grad_scores, k), grad_k, grad_v


def _scores(q: Tensor, k: Tensor, hidden: Tensor, scale: float) -> Tensor:
    return _each_head(q, k.mT).mul_(scale).masked_fill_(hidden, -math.inf)


def _attend_fused(q, k, v, hidden, scale):
    """`_attend_plainly` by the operator behind scaled_dot_product_attention on CPU.

    Where a query sees no key at all, which no selection gives, the operator's log-sum-exp is 0.
    """
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    keys, values = (x.unsqueeze(1).expand(-1, q.shape[1], -1, -1) for x in (k, v))
    mask = {"attn_mask": _additive(hidden, q)}
    return operator(q, keys, values, 0.0, hidden is None, **mask, scale=scale)


def _back_fused(by_query, k, v, hidden, scale):
    """`_back_plainly` by the operator's own backward pass."""
    grad_out, q, out, lse = by_query
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    keys, values = (x.unsqueeze(1).expand(-1, q.shape[1], -1, -1) for x in (k, v))
    mask = {"attn_mask": _additive(hidden, q)}
    given = (grad_out, q, keys, values, out, lse, 0.0, hidden is None)
    grad_q, grad_k, grad_v = operator(*given, **mask, scale=scale)
    return grad_q, *(x.sum(1, dtype=lse.dtype) for x in (grad_k, grad_v))


def _additive(hidden: Tensor | None, q: Tensor) -> Tensor | None:
    """0 where a key is seen and -inf where not, for every head of a group; no copies for the heads."""
    if hidden is None:
        return None
    mask = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, -math.inf)
    return mask.expand(q.shape[0], q.shape[1], -1, -1)


def _each_head(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of every head of a group: (P, R, t, X), (P, X, Y) -> (P, R, t, Y).

    One product a group: broadcasting over R would copy `right` for every head, which is most of the time
    where t is 1.
    """
    return (left.flatten(1, 2) @ right).unflatten(1, left.shape[1:3])


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_ids: Tensor | None,
    *,
    block_size: int,
    scale: float | None = None,
    document_ids: DocumentIds = None,
    query_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """See reference.sparse_attention; differentiable in q, k and v (not through the log-sum-exp)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    parts = list(pieces(q.shape[2], k.shape[2], document_ids, query_offset))
    # torch's operator takes the last stride for 1 and does not look.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return TiledAttention.apply(q, k, v, block_ids, block_size, scale, parts)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    document_ids: DocumentIds = None,
    query_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """See reference.dense_attention; differentiable in q, k and v (not through the log-sum-exp)."""
    return sparse_attention(
        q,
        k,
        v,
        None,
        block_size=1,
        scale=scale,
        document_ids=document_ids,
        query_offset=query_offset,
    )


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
    document_ids: DocumentIds = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """See reference.sparse_decode; reads all index keys, but only the selected keys and values."""
    batch, _, num_keys, _ = k.shape
    dtype = accumulation_dtype(q)
    last = q.new_full((batch,), num_keys - 1, dtype=torch.long)
    if lengths is not None:
        last = lengths.long() - 1
    firsts, starts = key_starts(document_ids), torch.zeros_like(last)
    if firsts is not None:
        starts = firsts.long().gather(1, last[:, None])[:, 0]
    position = torch.arange(num_keys, device=q.device)[None]
    relative = position - starts[:, None]
    scores = _each_head(index_q.to(dtype), index_k.to(dtype)[:, 0].mT)[:, :, 0]
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
