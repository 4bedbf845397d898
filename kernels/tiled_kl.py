"""KL of the index branch in memory-bounded torch: the value and both gradients in one pass over tiles.

With teacher t and student p over the same support, dKL/ds = (p - t) / (rows * index heads)
(arXiv 2606.13392, section 3), so the gradients of index q and k are matrix products of a tile that is
thrown away afterwards. Queries are never split over calls: T = S. Definitions: reference.index_kl.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .documents import DocumentIds, Piece, pieces
from .reference import accumulation_dtype
from .tiled import future, tiles, token_support


class TiledKL(torch.autograd.Function):
    """Scalar KL; gradients of index q and k are made in the forward pass, where the tiles are."""

    @staticmethod
    def forward(ctx, index_q, index_k, q, k, lse, block_ids, settings):
        scale, index_scale, block_size, document_ids, needs_gradient, sampled = settings
        dtype = accumulation_dtype(q)
        total = q.new_zeros((), dtype=torch.float64)
        # Rows that are not taken keep a gradient of zero.
        grad_q = torch.zeros_like(index_q, dtype=dtype) if needs_gradient else None
        grad_k = torch.zeros_like(index_k, dtype=dtype) if needs_gradient else None
        documents = list(pieces(q.shape[2], k.shape[2], document_ids, 0))
        taken, share = _taken(documents, q, *sampled)
        for number, piece in enumerate(documents):
            inputs = (index_q, index_k, q, k, lse, block_ids)
            for tile in _tiles_of(piece, *inputs, block_size, scale, taken[number]):
                start, stop, hidden, teacher, student_q, student_k = tile
                scores = student_q @ student_k.transpose(-1, -2) * index_scale
                log_student = scores.masked_fill_(hidden, -math.inf).log_softmax(-1)
                finite = log_student.masked_fill(hidden, 0.0)
                total += (torch.xlogy(teacher, teacher) - teacher * finite).sum(dtype=torch.float64)
                if grad_q is None or grad_k is None:
                    continue
                difference = log_student.exp_().sub_(teacher).mul_(index_scale)
                grad_q[piece.rows, :, piece.queries][:, :, start:stop] = difference @ student_k
                keys = grad_k[piece.rows, :, piece.keys][:, :, : student_k.shape[2]]
                keys += _sum_groups(difference, student_q)
        count = index_q.shape[0] * index_q.shape[1] * index_q.shape[2] * share
        if grad_q is not None and grad_k is not None:
            ctx.save_for_backward(grad_q.div_(count), grad_k.div_(count))
            ctx.dtypes = (index_q.dtype, index_k.dtype)
        return (total / count).to(dtype)

    @staticmethod
    def backward(ctx, grad):
        grad_q, grad_k = ctx.saved_tensors
        dtype_q, dtype_k = ctx.dtypes
        return (grad * grad_q).to(dtype_q), (grad * grad_k).to(dtype_k), *[None] * 5


def index_kl(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    *,
    scale: float | None = None,
    index_scale: float | None = None,
    block_ids: Tensor | None = None,
    block_size: int | None = None,
    document_ids: DocumentIds = None,
    fraction: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """See reference.index_kl; `lse` (B, H, T) must be over the same support as `block_ids`.

    With `fraction` below 1 that share of the query tiles is drawn from `seed` and stands for all.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    index_scale = index_q.shape[-1] ** -0.5 if index_scale is None else index_scale
    needs_gradient = torch.is_grad_enabled() and (index_q.requires_grad or index_k.requires_grad)
    settings = (scale, index_scale, block_size or 1, document_ids, needs_gradient, (fraction, seed))
    return TiledKL.apply(
        index_q, index_k, q.detach(), k.detach(), lse.detach(), block_ids, settings
    )


def _tile_bounds(piece: Piece, q: Tensor) -> list[tuple[int, int]]:
    """Query ranges of a piece, for q (B, H, T, D) of all pieces."""
    num_rows = len(range(*piece.rows.indices(q.shape[0])))
    num_queries = piece.queries.stop - piece.queries.start
    num_keys = piece.keys.stop - piece.keys.start
    return list(tiles(num_queries, num_keys, num_rows * q.shape[1]))


def _taken(
    documents: list[Piece], q: Tensor, fraction: float, seed: int
) -> tuple[list[list[tuple[int, int]]], float]:
    """Query ranges to compute of each piece, and the share of all tiles that they are.

    A fixed number of tiles, evenly spread from an offset that is drawn: each is as likely, so sums over
    them divided by the share are unbiased.
    """
    bounds = [_tile_bounds(piece, q) for piece in documents]
    places = [(number, one) for number, ranges in enumerate(bounds) for one in ranges]
    if fraction == 1.0:
        return bounds, 1.0
    kept = max(1, round(fraction * len(places)))
    offset = int(torch.randint(len(places), (), generator=torch.Generator().manual_seed(seed)))
    taken: list[list[tuple[int, int]]] = [[] for _ in documents]
    for which in range(kept):
        place = (which * len(places) + offset) // kept
        number, one = places[place]
        taken[number].append(one)
    return taken, kept / len(places)


def _tiles_of(piece: Piece, index_q, index_k, q, k, lse, block_ids, block_size, scale, ranges):
    """Yield (start, stop, hidden, teacher (B, G, t, S), index q (B, G, t, D), index k (B, 1, S, D))."""
    dtype = accumulation_dtype(q)
    groups = k.shape[1]
    rows, queries, keys = piece.rows, piece.queries, piece.keys
    q, lse = (part[rows, :, queries].to(dtype).unflatten(1, (groups, -1)) for part in (q, lse))
    k, index_k = (part[rows, :, keys].to(dtype) for part in (k, index_k))
    index_q = index_q[rows, :, queries].to(dtype)
    ids = None if block_ids is None else block_ids[rows, :, queries]
    for start, stop in ranges:
        num_keys = piece.offset + stop
        hidden = future(start, stop, piece.offset, num_keys, q.device)
        if ids is not None:
            hidden = hidden | ~token_support(ids[:, :, start:stop], block_size, num_keys)
        scores = q[:, :, :, start:stop] @ k[:, :, None, :num_keys].transpose(-1, -2)
        scores.mul_(scale).sub_(lse[:, :, :, start:stop, None])
        teacher = scores.exp_().mean(dim=2).masked_fill_(hidden, 0.0)
        yield start, stop, hidden, teacher, index_q[:, :, start:stop], index_k[:, :, :num_keys]


def _sum_groups(difference: Tensor, index_q: Tensor) -> Tensor:
    """(B, G, t, S), (B, G, t, D) -> (B, 1, S, D): the key head is shared by the groups."""
    return (difference.flatten(1, 2).transpose(-1, -2) @ index_q.flatten(1, 2)).unsqueeze(1)
