"""Definitions of every operation, in plain torch: the truth that each kernel is tested against.

Nothing here is fast or small: full score matrices are made on purpose. Inputs are computed in float32, or
in float64 where they are float64. All functions take keyword `document_ids` (B, S) int32 over the keys,
equal ids in a row marking one document; None means one document a row. Queries are the tokens
`query_offset .. query_offset + T - 1` of the S keys.

Shape legend: B batch, T query, S key, H query heads, G key/value groups (= index heads), R = H / G heads
per group, D head width, C blocks, K selected blocks.

Source: MiniMax Sparse Attention, arXiv 2606.13392, sections 2 (forward) and 3 (loss).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64 inputs, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def document_starts(document_ids: Tensor) -> Tensor:
    """First position of each token's document: (B, S) int64 from ids (B, S)."""
    batch, length = document_ids.shape
    positions = torch.arange(length, device=document_ids.device).expand(batch, length)
    changed = torch.ones_like(document_ids, dtype=torch.bool)
    changed[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.where(changed, positions, 0).cummax(dim=1).values


def visibility(
    num_queries: int,
    num_keys: int,
    query_offset: int,
    document_ids: Tensor | None,
    device: torch.device,
) -> Tensor:
    """(B or 1, T, S) bool: key j is visible to query i if j <= i and both are in one document."""
    query_positions = torch.arange(num_queries, device=device) + query_offset
    key_positions = torch.arange(num_keys, device=device)
    causal = key_positions[None, :] <= query_positions[:, None]
    if document_ids is None:
        return causal[None]
    same = document_ids[:, query_positions][:, :, None] == document_ids[:, None, :]
    return causal[None] & same


def key_blocks(
    num_keys: int, block_size: int, document_ids: Tensor | None, device: torch.device
) -> Tensor:
    """(B or 1, S) int64: the block of each key, counted from its document's first token."""
    positions = torch.arange(num_keys, device=device)[None]
    if document_ids is not None:
        positions = positions - document_starts(document_ids)
    return positions // block_size


def top_blocks(
    block_scores: Tensor, current: Tensor, top_k: int, local_blocks: int, init_blocks: int
) -> Tensor:
    """The `top_k` best visible blocks, forced ones first, ties to the lower id.

    Args:
        block_scores: (..., C); any value where a block is not visible.
        current: (...) int64, the block that holds the query; later blocks are not visible.

    Returns:
        (..., top_k) int32, ascending, padded on the right with -1.
    """
    num_blocks = block_scores.shape[-1]
    block = torch.arange(num_blocks, device=block_scores.device)
    here = current[..., None]
    visible = block <= here
    forced = visible & ((block > here - local_blocks) | (block < init_blocks))
    ranked = block_scores.masked_fill(forced, math.inf).masked_fill(~visible, -math.inf)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    kept = torch.where(torch.gather(visible.expand_as(ranked), -1, order), order, num_blocks)
    kept = kept.sort(dim=-1).values
    ids = torch.where(kept < num_blocks, kept, -1).to(torch.int32)
    return torch.nn.functional.pad(ids, (0, top_k - ids.shape[-1]), value=-1)


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
    """Rank blocks by their best visible token: M[i,b,g] = max over j <= i in b of q_i,g . k_j (eq. 5-6).

    Args:
        index_q: (B, G, T, D) index queries, one head a group.
        index_k: (B, 1, S, D) the shared index key head.

    Returns:
        block ids (B, G, T, top_k) int32, ascending, -1 padded.
    """
    dtype = accumulation_dtype(index_q)
    scores = index_q.to(dtype) @ index_k.to(dtype).transpose(-1, -2)
    return _best_blocks(
        scores,
        torch.amax,
        block_size=block_size,
        top_k=top_k,
        local_blocks=local_blocks,
        init_blocks=init_blocks,
        document_ids=document_ids,
        query_offset=query_offset,
        invisible=-math.inf,
    )


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
    """Oracle selection: rank blocks by the group's mean attention mass under full attention.

    Args:
        q: (B, H, T, D); k: (B, G, S, D).

    Returns:
        block ids (B, G, T, top_k) int32, ascending, -1 padded.
    """
    probabilities = _main_scores(q, k, scale, None, document_ids, query_offset, 0).softmax(-1)
    return _best_blocks(
        probabilities.mean(dim=2),
        torch.sum,
        block_size=block_size,
        top_k=top_k,
        local_blocks=local_blocks,
        init_blocks=init_blocks,
        document_ids=document_ids,
        query_offset=query_offset,
        invisible=0.0,
    )


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    document_ids: Tensor | None = None,
    query_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Causal softmax attention: out (B, H, T, D) in q's dtype, lse (B, H, T) in float32 or float64."""
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
    """Softmax attention over the visible tokens of the selected blocks (eq. 7).

    Args:
        q: (B, H, T, D); k, v: (B, G, S, D); block_ids: (B, G, T, K) int32, or None for all.

    Returns:
        out (B, H, T, D) in q's dtype and the log-sum-exp of the scaled scores, (B, H, T).
    """
    scores = _main_scores(q, k, scale, block_ids, document_ids, query_offset, block_size)
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp() @ v.to(scores.dtype).unsqueeze(2)
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


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
    document_ids: Tensor | None = None,
) -> Tensor:
    """Mean over rows and index heads of KL(teacher || student) (section 3); a scalar.

    The teacher is the group's mean of its heads' probabilities, each head normalised over the support
    first; the student is the softmax of the index scores over the same support: every visible token, or
    the visible tokens of `block_ids`. `lse` (B, H, T) is not needed for the definition: the teacher is
    normalised here.
    """
    assert lse.shape == q.shape[:3]
    size = block_size or 1
    scores = _main_scores(q.detach(), k.detach(), scale, block_ids, document_ids, 0, size)
    teacher = scores.softmax(-1).mean(dim=2)
    index_scale = index_q.shape[-1] ** -0.5 if index_scale is None else index_scale
    dtype = scores.dtype
    student = (index_q.to(dtype) @ index_k.to(dtype).transpose(-1, -2)) * index_scale
    support = _support(q.shape[2], k.shape[2], size, block_ids, document_ids, 0, q.device)
    log_student = student.masked_fill(~support, -math.inf).log_softmax(-1)
    log_student = torch.where(support, log_student, 0.0)
    divergence = torch.xlogy(teacher, teacher) - teacher * log_student
    return divergence.sum(-1).mean()


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
    """One new token, the last of S cached ones: selection and sparse attention; out (B, H, 1, D).

    `lengths` (B,) int32, at least 1: cached tokens of each row, the new one (key lengths[b] - 1) included;
    what lies beyond is never read. None means all S.
    """
    assert q.shape[2] == 1
    if lengths is not None:
        rows = [
            sparse_decode(
                q[row : row + 1],
                k[row : row + 1, :, :length],
                v[row : row + 1, :, :length],
                index_q[row : row + 1],
                index_k[row : row + 1, :, :length],
                block_size=block_size,
                top_k=top_k,
                local_blocks=local_blocks,
                init_blocks=init_blocks,
                scale=scale,
                document_ids=None if document_ids is None else document_ids[row : row + 1, :length],
            )
            for row, length in enumerate(lengths.tolist())
        ]
        return torch.cat(rows)
    offset = k.shape[2] - 1
    block_ids = select_blocks(
        index_q,
        index_k,
        block_size=block_size,
        top_k=top_k,
        local_blocks=local_blocks,
        init_blocks=init_blocks,
        document_ids=document_ids,
        query_offset=offset,
    )
    return sparse_attention(
        q,
        k,
        v,
        block_ids,
        block_size=block_size,
        scale=scale,
        document_ids=document_ids,
        query_offset=offset,
    )[0]


def _best_blocks(
    scores: Tensor,
    reduce,
    *,
    block_size: int,
    top_k: int,
    local_blocks: int,
    init_blocks: int,
    document_ids: Tensor | None,
    query_offset: int,
    invisible: float,
) -> Tensor:
    """Reduce token scores (B, G, T, S) to blocks, masking before the reduction (trap 7), and rank them."""
    _, _, num_queries, num_keys = scores.shape
    visible = visibility(num_queries, num_keys, query_offset, document_ids, scores.device)
    scores = scores.masked_fill(~visible[:, None], invisible)
    blocks = key_blocks(num_keys, block_size, document_ids, scores.device)
    per_block = [
        reduce(scores.masked_fill((blocks != b)[:, None, None], invisible), dim=-1)
        for b in range(int(blocks.max()) + 1)
    ]
    current = blocks[:, query_offset : query_offset + num_queries]
    current = current[:, None].expand(scores.shape[:3])
    return top_blocks(torch.stack(per_block, -1), current, top_k, local_blocks, init_blocks)


def _support(
    num_queries: int,
    num_keys: int,
    block_size: int,
    block_ids: Tensor | None,
    document_ids: Tensor | None,
    query_offset: int,
    device: torch.device,
) -> Tensor:
    """(B or 1, G or 1, T, S) bool: what the softmax runs over."""
    visible = visibility(num_queries, num_keys, query_offset, document_ids, device)[:, None]
    if block_ids is None:
        return visible
    blocks = key_blocks(num_keys, block_size, document_ids, device)
    chosen = (block_ids[..., None] == blocks[:, None, None, None, :]).any(dim=-2)
    return visible & chosen


def _main_scores(
    q: Tensor,
    k: Tensor,
    scale: float | None,
    block_ids: Tensor | None,
    document_ids: Tensor | None,
    query_offset: int,
    block_size: int,
) -> Tensor:
    """Masked and scaled main scores (B, G, R, T, S)."""
    dtype = accumulation_dtype(q)
    groups = k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    grouped = q.to(dtype).unflatten(1, (groups, -1))
    scores = grouped @ k.to(dtype).unsqueeze(2).transpose(-1, -2) * scale
    support = _support(
        q.shape[2], k.shape[2], block_size, block_ids, document_ids, query_offset, q.device
    )
    return scores.masked_fill(~support.unsqueeze(2), -math.inf)
