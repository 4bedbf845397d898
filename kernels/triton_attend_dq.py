"""Sparse attention, gradient of the queries: a tile of queries reads the union of its blocks again.

    dq = scale * ds k,  ds = p * (dout v^T - delta),  p = exp(q k^T * scale - lse),  delta = sum(dout * out)

The same tiles and unions as in triton_attend.py; p comes from the saved log-sum-exp, so no running maximum.
Everything stays in registers: no atomics, two runs give the same bits.

Shapes: B batch, H query heads, G groups, R = H / G, T queries, S keys, D head width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_support import Launch, padded_width
from .triton_unions import Unions

DELTA_ROWS = 32


@triton.jit(do_not_specialize=["num_queries"])
def _delta(
    out, grads, lse, stats,
    stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt, heads, num_queries,
    WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # Heads of a token are neighbours, in the layout of transformers as in `stats`.
    query, head = row // heads, row % heads
    channel = tl.arange(0, WIDTH_P)
    here = query < num_queries
    mask = here[:, None] & (channel < WIDTH)[None, :]
    far, head = query.to(tl.int64), head.to(tl.int64)
    at = out + (batch * stride_ob + head * stride_oh + far * stride_ot)[:, None] + channel[None, :]
    product = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    at = (
        grads + (batch * stride_gb + head * stride_gh + far * stride_gt)[:, None] + channel[None, :]
    )
    product *= tl.load(at, mask=mask, other=0.0).to(tl.float32)
    natural = tl.load(lse + (batch * heads + head) * num_queries + query, mask=here, other=0.0)
    to = stats + 2 * ((batch * num_queries) * heads + row)
    tl.store(to, natural * 1.4426950408889634, mask=here)
    tl.store(to + 1, tl.sum(product, axis=1), mask=here)


def row_stats(out: Tensor, grad_out: Tensor, lse: Tensor) -> Tensor:
    """What the backward pass needs of each row: (B, T, H, 2) float32, lse in log2 units and delta.

    Args:
        out, grad_out: (B, H, T, D) with contiguous channels.
        lse: (B, H, T) float32, natural logarithm, contiguous.
    """
    batch, heads, num_queries, width = out.shape
    stats = torch.empty(batch, num_queries, heads, 2, dtype=torch.float32, device=out.device)
    _delta[(triton.cdiv(num_queries * heads, DELTA_ROWS), batch)](
        out, grad_out, lse, stats, *out.stride()[:3], *grad_out.stride()[:3], heads, num_queries,
        WIDTH=width, WIDTH_P=padded_width(width), ROWS=DELTA_ROWS, num_warps=4,
    )  # fmt: skip
    return stats


@triton.jit
def _steps(
    query_grad, q, grad, lse, delta,
    keys, values, stride_k, stride_v,
    first_keys, members, begin, end,
    token, position, num_keys, scale,
    WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Entries begin .. end - 1 of the union, KEYS keys a step. Without CAUSAL all lie in the past."""
    PARTS: tl.constexpr = BLOCK // KEYS
    key = tl.arange(0, KEYS)
    channel = tl.arange(0, WIDTH_P)
    wide = channel < WIDTH
    for step in range(begin * PARTS, end * PARTS):
        first = tl.load(first_keys + step // PARTS) + (step % PARTS) * KEYS
        mask = tl.load(members + step // PARTS)
        k_tile = keys + first.to(tl.int64) * stride_k + (key[:, None] * stride_k + channel[None, :])
        v_tile = (
            values + first.to(tl.int64) * stride_v + (key[:, None] * stride_v + channel[None, :])
        )
        here = first + key < num_keys
        # Blocks of the past lie inside the row, so only the causal part masks keys.
        if CAUSAL:
            k = tl.load(k_tile, mask=here[:, None] & wide[None, :], other=0.0)
            v = tl.load(v_tile, mask=here[:, None] & wide[None, :], other=0.0)
        elif EVEN:
            k = tl.load(k_tile)
            v = tl.load(v_tile)
        else:
            k = tl.load(k_tile, mask=wide[None, :], other=0.0)
            v = tl.load(v_tile, mask=wide[None, :], other=0.0)
        support = ((mask >> token) & 1)[:, None] != 0
        if CAUSAL:
            support = support & ((first + key)[None, :] <= position[:, None])
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [ROWS, KEYS], log2 units
        weights = tl.where(support, tl.math.exp2(scores - lse[:, None]), 0.0)
        slope = tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None]
        slope = (weights * slope).to(k.dtype)
        query_grad = tl.dot(slope, k, query_grad, input_precision="ieee")
    return query_grad


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_tiles", "union_len", "query_offset"])
def _query_gradients(
    queries, keys, values, grads, stats, grad_queries,
    first_keys, members, counts, past_counts,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg,
    stride_vb, stride_vg, stride_gb, stride_gh, stride_gt, stride_db, stride_dh, stride_dt,
    groups, num_queries, num_keys, num_tiles, union_len, query_offset, scale,
    stride_ks: tl.constexpr, stride_vs: tl.constexpr,
    REPEATS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634
    tile = tl.program_id(0)
    plane = tl.program_id(1).to(tl.int64)
    batch, group = plane // groups, plane % groups
    row = tl.arange(0, ROWS)
    token = row // REPEATS
    query = tile * TOKENS + token
    valid = (token < TOKENS) & (query < num_queries)
    channel = tl.arange(0, WIDTH_P)
    mask = valid[:, None] & (channel < WIDTH)[None, :]
    # 64 bits a row, once a tile: a head-major row of heads passes 2^31 elements long before 4M tokens.
    head = (group * REPEATS + row % REPEATS).to(tl.int64)
    far = query.to(tl.int64)
    at = queries + (batch * stride_qb + head * stride_qh + far * stride_qt)[:, None]
    q = tl.load(at + channel[None, :], mask=mask, other=0.0)
    at = grads + (batch * stride_gb + head * stride_gh + far * stride_gt)[:, None]
    grad = tl.load(at + channel[None, :], mask=mask, other=0.0)
    stats += 2 * ((batch * num_queries + query) * (groups * REPEATS) + head)
    row_lse = tl.load(stats, mask=valid, other=0.0)
    row_delta = tl.load(stats + 1, mask=valid, other=0.0)
    entry = plane * num_tiles + tile
    first_keys += entry * union_len
    members += entry * union_len
    end, past = tl.load(counts + entry), tl.load(past_counts + entry)
    keys += batch * stride_kb + group * stride_kg
    values += batch * stride_vb + group * stride_vg
    query_grad = tl.zeros([ROWS, WIDTH_P], tl.float32)
    bit = token.to(tl.int64)
    position = query_offset + query
    query_grad = _steps(
        query_grad, q, grad, row_lse, row_delta, keys, values, stride_ks, stride_vs,
        first_keys, members, 0, past, bit, position, num_keys, scale * LOG2E,
        WIDTH, WIDTH_P, BLOCK, KEYS, False, WIDTH == WIDTH_P,
    )  # fmt: skip
    query_grad = _steps(
        query_grad, q, grad, row_lse, row_delta, keys, values, stride_ks, stride_vs,
        first_keys, members, past, end, bit, position, num_keys, scale * LOG2E,
        WIDTH, WIDTH_P, BLOCK, KEYS, True, WIDTH == WIDTH_P,
    )  # fmt: skip
    # Rows once more from an opaque 0: carried through the loops their addresses would take registers.
    tile += tl.minimum(tl.load(counts + entry, volatile=True), 0)
    row = tl.arange(0, ROWS)
    query = tile * TOKENS + row // REPEATS
    valid = (row < TOKENS * REPEATS) & (query < num_queries)
    mask = valid[:, None] & (channel < WIDTH)[None, :]
    head = (group * REPEATS + row % REPEATS).to(tl.int64)
    at = (
        grad_queries
        + (batch * stride_db + head * stride_dh + query.to(tl.int64) * stride_dt)[:, None]
    )
    tl.store(
        at + channel[None, :], (query_grad * scale).to(grad_queries.dtype.element_ty), mask=mask
    )


def query_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    stats: Tensor,
    unions: Unions,
    *,
    block_size: int,
    scale: float,
    query_offset: int,
    launch: Launch,
) -> Tensor:
    """dq (B, H, T, D) in q's dtype and layout.

    Args:
        q, grad_out: (B, H, T, D); k, v: (B, G, S, D); channels contiguous.
        stats: (B, T, H, 2) float32, contiguous, see row_stats.
        unions: of tiles of tile_tokens(launch, R) queries.
    """
    batch, heads, num_queries, width = q.shape
    groups, num_keys = k.shape[1], k.shape[2]
    assert unions.tokens * (heads // groups) <= launch.rows
    grad_q = torch.empty_like(q)
    num_tiles = unions.counts.shape[2]
    _query_gradients[(num_tiles, batch * groups)](
        q, k, v, grad_out, stats, grad_q,
        unions.first_keys, unions.members, unions.counts, unions.past_counts,
        *q.stride()[:3], *k.stride()[:2], *v.stride()[:2], *grad_out.stride()[:3], *grad_q.stride()[:3],
        groups, num_queries, num_keys, num_tiles, unions.first_keys.shape[3], query_offset, scale,
        stride_ks=k.stride(2), stride_vs=v.stride(2),
        REPEATS=heads // groups, TOKENS=unions.tokens, ROWS=launch.rows,
        WIDTH=width, WIDTH_P=padded_width(width), BLOCK=block_size, KEYS=min(launch.keys, block_size),
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return grad_q
