"""Sparse attention, gradients of keys and values: a program owns a block of keys and walks its queries.

    dv = p^T dout,   ds = p * (dout v^T - delta),   dk = scale * ds^T q        (p, delta: triton_attend_backward)

The queries of a block come from triton_lists.py, at most a chunk of them a program. Heads are the outer loop:
a step gathers rows of one head, whose channels lie together, and any number of heads a group will do. A block
of one chunk is written by its program; the others leave float32 sums that a second kernel adds in the order
of the chunks. So two runs give the same bits, without atomics.

With ATOMIC the same pass also adds dq = scale * ds k to a float32 buffer, in no fixed order.

Shapes: B batch, H query heads, G groups, R = H / G, T queries, S keys, D head width, M partial sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_lists import QueryLists, find_chunk
from .triton_support import Launch, padded_width


@triton.jit
def _walk(
    key_grad, value_grad, k, v, key,
    queries, grads, lse, delta, grad_queries, list_, size,
    stride_qt, stride_gt, stride_dt, query_offset, scale,
    WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, ROWS: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """The queries of one list in one head, ROWS a step."""
    LOG2E: tl.constexpr = 1.4426950408889634
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH_P)
    for first in range(0, size, ROWS):
        inside = first + row < size
        query = tl.load(list_ + first + row, mask=inside, other=0)
        # Absent rows stand before every key, so that the causal mask hides all from them.
        position = tl.where(inside, query + query_offset, -1)
        # 64 bits a row: neighbours in a list may lie a whole row apart.
        far = query.to(tl.int64)
        mask = inside[:, None]
        if WIDTH != WIDTH_P:
            mask = mask & (channel < WIDTH)[None, :]
        q = tl.load(queries + (far * stride_qt)[:, None] + channel[None, :], mask=mask, other=0.0)
        row_lse = tl.load(lse + query, mask=inside, other=0.0) * LOG2E
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E)  # [KEYS, ROWS]
        seen = key[:, None] <= position[None, :]
        weights = tl.where(seen, tl.math.exp2(scores - row_lse[None, :]), 0.0)
        grad = tl.load(grads + (far * stride_gt)[:, None] + channel[None, :], mask=mask, other=0.0)
        value_grad = tl.dot(weights.to(grad.dtype), grad, value_grad, input_precision="ieee")
        row_delta = tl.load(delta + query, mask=inside, other=0.0)
        slope = tl.dot(v, tl.trans(grad), input_precision="ieee") - row_delta[None, :]
        slope = (weights * slope).to(q.dtype)
        key_grad = tl.dot(slope, q, key_grad, input_precision="ieee")
        if ATOMIC:
            query_grad = tl.dot(tl.trans(slope), k, input_precision="ieee") * scale
            at = grad_queries + (far * stride_dt)[:, None] + channel[None, :]
            tl.atomic_add(at, query_grad, mask=mask, sem="relaxed")
    return key_grad, value_grad


@triton.jit
def _store(to, values, mask):
    tl.store(to, values.to(to.dtype.element_ty), mask=mask)


@triton.jit
def _key_gradients(
    queries, keys, values, grads, lse, delta, grad_queries, grad_keys, grad_values, sums,
    lists, offsets, owners, firsts, count, partials, starts,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_ks,
    stride_vb, stride_vg, stride_vs, stride_gb, stride_gh, stride_gt, stride_db, stride_dh, stride_dt,
    stride_ckb, stride_ckg, stride_cks, stride_cvb, stride_cvg, stride_cvs, stride_starts_b,
    groups, repeats, num_queries, num_keys, num_slots, edges, chunk, programs, query_offset, scale,
    WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    SLOT_KEYS: tl.constexpr, ROWS: tl.constexpr, DOCUMENTS: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = BLOCK // KEYS
    # Neighbouring programs hold the parts of one block, so that the second finds the queries in the cache.
    part = tl.program_id(0) % PARTS
    lane = tl.arange(0, KEYS)
    channel = tl.arange(0, WIDTH_P)
    wide = channel < WIDTH
    for item in range(tl.program_id(0) // PARTS, tl.load(count), programs):
        owner, plane, slot, begin, size, which, num_chunks = find_chunk(
            owners, firsts, offsets, item, num_slots, edges, chunk
        )
        batch, group = plane // groups, plane % groups
        block = slot * SLOT_KEYS
        key = block + part * KEYS + lane
        here = key < num_keys
        if DOCUMENTS:
            # A document's last block ends with it; what follows is the next one's.
            document = tl.load(starts + batch * stride_starts_b + key, mask=here, other=num_keys)
            here = here & (document <= block)
        mask = here[:, None] & wide[None, :]
        far = key.to(tl.int64)[:, None]
        k_tile = keys + (batch * stride_kb + group * stride_kg) + far * stride_ks + channel[None, :]
        v_tile = values + (batch * stride_vb + group * stride_vg) + far * stride_vs + channel[None, :]
        k = tl.load(k_tile, mask=mask, other=0.0)
        v = tl.load(v_tile, mask=mask, other=0.0)
        key_grad = tl.zeros([KEYS, WIDTH_P], tl.float32)
        value_grad = tl.zeros([KEYS, WIDTH_P], tl.float32)
        for repeat in range(repeats):
            head = group * repeats + repeat
            stat = (batch * groups * repeats + head) * num_queries
            key_grad, value_grad = _walk(
                key_grad, value_grad, k, v, key,
                queries + batch * stride_qb + head * stride_qh,
                grads + batch * stride_gb + head * stride_gh, lse + stat, delta + stat,
                grad_queries + batch * stride_db + head * stride_dh, lists + begin, size,
                stride_qt, stride_gt, stride_dt, query_offset, scale,
                WIDTH, WIDTH_P, ROWS, ATOMIC,
            )  # fmt: skip
        key_grad *= scale
        if num_chunks == 1:
            to_keys = grad_keys + (batch * stride_ckb + group * stride_ckg) + far * stride_cks
            to_values = grad_values + (batch * stride_cvb + group * stride_cvg) + far * stride_cvs
            _store(to_keys + channel[None, :], key_grad, mask)
            _store(to_values + channel[None, :], value_grad, mask)
        else:
            # (M, PARTS, 2, KEYS, D): first of keys, then of values.
            number = (tl.load(partials + owner) + which).to(tl.int64) * PARTS + part
            tile = lane[:, None] * WIDTH + channel[None, :]
            to_sums = sums + number * (2 * KEYS * WIDTH) + tile
            tl.store(to_sums, key_grad, mask=wide[None, :])
            tl.store(to_sums + KEYS * WIDTH, value_grad, mask=wide[None, :])


@triton.jit
def _add_partials(
    grad_keys, grad_values, sums, offsets, split_owners, partials, starts,
    stride_ckb, stride_ckg, stride_cks, stride_cvb, stride_cvg, stride_cvs, stride_starts_b,
    groups, num_keys, num_slots, planes, chunk,
    WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    SLOT_KEYS: tl.constexpr, LANES: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Add the partial sums of one list, in order, LANES keys a program."""
    PARTS: tl.constexpr = BLOCK // LANES
    owner = tl.load(split_owners + tl.program_id(0) // PARTS)
    if owner < planes * num_slots:
        plane = (owner // num_slots).to(tl.int64)
        slot = owner % num_slots
        row = offsets + plane * (num_slots + 1) + slot
        num_chunks = tl.cdiv(tl.load(row + 1) - tl.load(row), chunk)
        batch, group = plane // groups, plane % groups
        within = (tl.program_id(0) % PARTS) * LANES + tl.arange(0, LANES)
        channel = tl.arange(0, WIDTH_P)
        wide = channel < WIDTH
        key = slot * SLOT_KEYS + within
        here = key < num_keys
        if DOCUMENTS:
            document = tl.load(starts + batch * stride_starts_b + key, mask=here, other=num_keys)
            here = here & (document <= slot * SLOT_KEYS)
        mask = here[:, None] & wide[None, :]
        tile = (within // KEYS) * (2 * KEYS * WIDTH) + (within % KEYS) * WIDTH
        first = tl.load(partials + owner).to(tl.int64) * (2 * BLOCK * WIDTH)
        at = sums + first + tile[:, None] + channel[None, :]
        key_grad = tl.zeros([LANES, WIDTH_P], tl.float32)
        value_grad = tl.zeros([LANES, WIDTH_P], tl.float32)
        for _ in range(num_chunks):
            key_grad += tl.load(at, mask=mask, other=0.0)
            value_grad += tl.load(at + KEYS * WIDTH, mask=mask, other=0.0)
            at += 2 * BLOCK * WIDTH
        far = key.to(tl.int64)[:, None]
        to_keys = grad_keys + (batch * stride_ckb + group * stride_ckg) + far * stride_cks
        to_values = grad_values + (batch * stride_cvb + group * stride_cvg) + far * stride_cvs
        _store(to_keys + channel[None, :], key_grad, mask)
        _store(to_values + channel[None, :], value_grad, mask)


def key_value_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    lists: QueryLists,
    starts: Tensor | None,
    *,
    block_size: int,
    scale: float,
    query_offset: int,
    launch: Launch,
    grad_q: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dk and dv in k's and v's dtypes and layouts; zero where nobody selected a key.

    Args:
        q, grad_out: (B, H, T, D); k, v: (B, G, S, D); channels contiguous.
        lse, delta: (B, H, T) float32, contiguous.
        launch: `rows` queries of one head a step, `keys` of a block a program.
        grad_q: (B, H, T, D) float32, to which dq is added by atomics, or None.
    """
    batch, heads, num_queries, width = q.shape
    groups, num_keys = k.shape[1], k.shape[2]
    keys = min(launch.keys, block_size)
    grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
    into = q if grad_q is None else grad_q
    sums = torch.empty(
        lists.max_partials, 2 * block_size, width, dtype=torch.float32, device=k.device
    )
    stride_starts = 0 if starts is None else starts.stride(0)
    shape = dict(WIDTH=width, WIDTH_P=padded_width(width), BLOCK=block_size, KEYS=keys)
    _key_gradients[(lists.programs * (block_size // keys),)](
        q, k, v, grad_out, lse, delta, into, grad_k, grad_v, sums,
        lists.queries, lists.offsets, lists.owners, lists.firsts, lists.count, lists.partials, starts,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3], *into.stride()[:3],
        *grad_k.stride()[:3], *grad_v.stride()[:3], stride_starts,
        groups, heads // groups, num_queries, num_keys, lists.num_slots, lists.queries.shape[1],
        lists.chunk, lists.programs, query_offset, scale,
        **shape, SLOT_KEYS=lists.slot_keys, ROWS=launch.rows, DOCUMENTS=starts is not None,
        ATOMIC=grad_q is not None, num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    num_split = lists.split_owners.shape[0]
    if num_split:
        lanes = 16
        _add_partials[(num_split * (block_size // lanes),)](
            grad_k, grad_v, sums, lists.offsets, lists.split_owners, lists.partials, starts,
            *grad_k.stride()[:3], *grad_v.stride()[:3], stride_starts,
            groups, num_keys, lists.num_slots, batch * groups, lists.chunk,
            **shape, SLOT_KEYS=lists.slot_keys, LANES=lanes, DOCUMENTS=starts is not None, num_warps=4,
        )  # fmt: skip
    return grad_k, grad_v
