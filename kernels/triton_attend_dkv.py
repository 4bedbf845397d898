"""Sparse attention, gradients of keys and values: a program owns a block of keys and walks its queries.

    dv = p^T dout,  ds = p * (dout v^T - delta),  dk = scale * ds^T q     (p, delta: triton_attend_backward)

The queries of a block come from triton_lists.py, at most a chunk of them a program. Rows of a step are
queries times neighbouring heads of the group: as many heads as the largest power of two in R, so all of
them where R is one. Heads of a query lie together in the layout of transformers: a step gathers few long
pieces and reads few entries of the list. What is left of an R like 6 or 7 is walked one piece of heads
after another, by the same loop.

A block of one chunk is written by its program; the others leave float32 sums that a second kernel adds in
the order of the chunks. So two runs give the same bits, without atomics.

Scores are made transposed, [keys, rows]: as left operands of the two products that follow they stay in
registers. Those are full (two sums of [keys, channels] live through the loop), hence what looks odd below:
products for both sums stand last, so that 16-bit weights need not live beside the slope; the list is read
again for dq; tables are read a second time after the loop; strides of queries are constants, as they follow
from the layout and not from the length (an address is then one instruction). A step's queries are read one
step early, for the gathers that follow from them are copied ahead of the products only if their addresses
wait for no load of the same step.

With ATOMIC the same pass also adds dq / scale = ds k to a float32 buffer, in no fixed order.

Shapes: B batch, H query heads, G groups, R = H / G, T queries, S keys, D head width, M partial sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_lists import QueryLists, find_chunk
from .triton_support import Launch, padded_width, target_arch

TAIL_PROGRAMS = 256
"""Programs that share the chunks beyond QueryLists.programs, if there are any."""
MERGED_KEYS = 16
"""Keys of a program that adds partial sums."""
CHANGING = [
    "num_queries", "num_keys", "num_slots", "edges", "chunk", "query_offset", "done", "programs",
]  # fmt: skip
"""Integers that change with the length: never a reason to compile anew."""


@triton.jit
def _rows(start, offset, WIDTH: tl.constexpr, WIDTH_P: tl.constexpr):
    """[ROWS, WIDTH_P] from [ROWS] offsets."""
    channel = tl.arange(0, WIDTH_P)[None, :]
    # What stays the same in every step first: it is added once.
    at = (start + channel) + offset[:, None]
    if WIDTH == WIDTH_P:
        return tl.load(at)
    else:
        return tl.load(at, mask=channel < WIDTH, other=0.0)


@triton.jit
def _spread(x, HEADS: tl.constexpr):
    """[TOKENS * HEADS] from [TOKENS]: each entry once a head."""
    if HEADS == 1:
        return x
    else:
        return tl.reshape(tl.broadcast_to(x[:, None], [x.shape[0], HEADS]), [x.shape[0] * HEADS])


@triton.jit
def _stats(stats, query, heads: tl.constexpr, HEADS: tl.constexpr):
    """lse (log2 units) and delta of a step's rows, [ROWS] each, by loads of 8 bytes a row."""
    head = tl.arange(0, query.shape[0] * HEADS) % HEADS
    both = stats.to(tl.pointer_type(tl.int64), bitcast=True)
    at = (both + head) + _spread(query, HEADS).to(tl.int64) * heads
    # The heads of a token lie together: neighbouring rows come by one load.
    both = tl.load(tl.max_contiguous(tl.multiple_of(at, 8 * HEADS), HEADS))
    lse = both.to(tl.int32).to(tl.float32, bitcast=True)
    return lse, (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _walk(
    key_grad, value_grad, k, v, key,
    queries, grads, stats, grad_queries, list_, size, masked,
    stride_qh, stride_gh, stride_dh, pieces, query_offset, scale,
    stride_qt: tl.constexpr, stride_gt: tl.constexpr, stride_dt: tl.constexpr, heads: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
    STAGES: tl.constexpr, ATOMIC: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """A list in every head of the group: TOKENS queries in HEADS neighbouring heads a step."""
    LOG2E: tl.constexpr = 1.4426950408889634
    TOKENS: tl.constexpr = ROWS // HEADS
    token = tl.arange(0, TOKENS)
    head = (tl.arange(0, ROWS) % HEADS).to(tl.int64)
    channel = tl.arange(0, WIDTH_P)[None, :]
    tiles = tl.cdiv(size, TOKENS)
    # Rows past the end are the last query again: loads need no mask, and no other block's NaN gets in.
    last = size - 1
    query = tl.load(list_ + tl.minimum(token, last))
    tile = 0
    first = tl.zeros([], tl.int64)  # head of the piece
    for _ in tl.range(0, tiles * pieces, num_stages=STAGES):
        # 64 bits a row: neighbours in a list may lie a whole row apart.
        far = _spread(query, HEADS).to(tl.int64)
        q = _rows(queries + head[:, None] * stride_qh, far * stride_qt, WIDTH, WIDTH_P)
        grad = _rows(grads + head[:, None] * stride_gh, far * stride_gt, WIDTH, WIDTH_P)
        lse, delta = _stats(stats + 2 * first, query, heads, HEADS)
        # `query` once more: the copies run ahead, and it would stay in registers until here.
        place = tile * TOKENS + token
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")  # [KEYS, ROWS]
        scores = scores * (scale * LOG2E) - lse[None, :]
        # Only queries of the block itself, which come first, and rows past the end need a mask.
        if (tile * TOKENS < masked) | (tile == tiles - 1):
            position = tl.load(list_ + place, mask=place < size, other=-(1 << 30)) + query_offset
            scores = tl.where(
                key[:, None] <= _spread(position, HEADS)[None, :], scores, float("-inf")
            )
        weights = tl.math.exp2(scores)
        slope = tl.dot(v, tl.trans(grad), input_precision="ieee")
        slope = (weights * (slope - delta[None, :])).to(q.dtype)
        value_grad = tl.dot(weights.to(grad.dtype), grad, value_grad, input_precision="ieee")
        key_grad = tl.dot(slope, q, key_grad, input_precision="ieee")
        if ATOMIC:
            if TURNED:
                query_grad = tl.trans(tl.dot(tl.trans(k), slope, input_precision="ieee"))
            else:
                query_grad = tl.dot(tl.trans(slope), k, input_precision="ieee")
            again = tl.load(list_ + tl.minimum(place, last))
            into = _spread(again, HEADS).to(tl.int64) * stride_dt
            at = (grad_queries + (first + head)[:, None] * stride_dh + channel) + into[:, None]
            # Rows past the end add 0 to the last query.
            if WIDTH == WIDTH_P:
                tl.atomic_add(at, query_grad, sem="relaxed")
            else:
                tl.atomic_add(at, query_grad, channel < WIDTH, sem="relaxed")
        tile += 1
        if pieces != 1:
            ends = tile == tiles
            tile = tl.where(ends, 0, tile)
            # Four pointers that move, or none of them, would spill.
            further = tl.where(ends, HEADS, 0)
            first += further
            queries += further * stride_qh
            grads += further * stride_gh
        query = tl.load(list_ + tl.minimum(tile * TOKENS + token, last))
    return key_grad, value_grad


@triton.jit
def _place(
    plane, slot, within, starts, stride_starts_b, groups, num_keys,
    SLOT_KEYS: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Keys `within` a slot's block, and which of them belong to it."""
    first = slot * SLOT_KEYS
    key = first + within
    here = key < num_keys
    if DOCUMENTS:
        # A document's last block ends with it; what follows is the next one's.
        batch = plane // groups
        document = tl.load(starts + batch * stride_starts_b + key, mask=here, other=num_keys)
        here = here & (document <= first)
    return key, here


@triton.jit
def _store(
    to_keys, to_values, key_grad, value_grad, plane, key, here,
    stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs, groups,
    WIDTH: tl.constexpr, WIDTH_P: tl.constexpr,
):  # fmt: skip
    batch, group = plane // groups, plane % groups
    channel = tl.arange(0, WIDTH_P)[None, :]
    mask = here[:, None] & (channel < WIDTH)
    far = key.to(tl.int64)[:, None]
    to_keys += (batch * stride_kb + group * stride_kg) + far * stride_ks + channel
    to_values += (batch * stride_vb + group * stride_vg) + far * stride_vs + channel
    tl.store(to_keys, key_grad.to(to_keys.dtype.element_ty), mask=mask)
    tl.store(to_values, value_grad.to(to_values.dtype.element_ty), mask=mask)


@triton.jit
def _own(
    item, part,
    queries, keys, values, grads, stats, grad_queries, grad_keys, grad_values, sums,
    lists, offsets, owners, firsts, partials, starts,
    stride_qb, stride_qh, stride_kb, stride_kg, stride_ks,
    stride_vb, stride_vg, stride_vs, stride_gb, stride_gh, stride_db, stride_dh,
    stride_ckb, stride_ckg, stride_cks, stride_cvb, stride_cvg, stride_cvs, stride_starts_b,
    groups, repeats, pieces, num_queries, num_keys, num_slots, edges, chunk, query_offset, scale,
    stride_qt: tl.constexpr, stride_gt: tl.constexpr, stride_dt: tl.constexpr, heads: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    SLOT_KEYS: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, DOCUMENTS: tl.constexpr,
    STAGES: tl.constexpr, ATOMIC: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """KEYS keys of the block of chunk `item`, and the queries of that chunk."""
    _, plane, slot, begin, size, _, _ = find_chunk(
        owners, firsts, offsets, item, num_slots, edges, chunk, False
    )
    batch, group = plane // groups, plane % groups
    within = part * KEYS + tl.arange(0, KEYS)
    channel = tl.arange(0, WIDTH_P)[None, :]
    key = slot * SLOT_KEYS + within
    mask = (key < num_keys)[:, None] & (channel < WIDTH)
    far = key.to(tl.int64)[:, None]
    k_tile = keys + (batch * stride_kb + group * stride_kg) + far * stride_ks + channel
    v_tile = values + (batch * stride_vb + group * stride_vg) + far * stride_vs + channel
    # Queries of the block itself come first in its list, and are as many as it has keys at most.
    early = tl.arange(0, BLOCK)
    early = tl.load(lists + begin + early, mask=early < size, other=2147483647)
    masked = tl.sum((early < slot * SLOT_KEYS + BLOCK - query_offset).to(tl.int32))
    head = group * repeats
    key_grad, value_grad = _walk(
        tl.zeros([KEYS, WIDTH_P], tl.float32), tl.zeros([KEYS, WIDTH_P], tl.float32),
        tl.load(k_tile, mask=mask, other=0.0), tl.load(v_tile, mask=mask, other=0.0), key,
        queries + batch * stride_qb + head * stride_qh, grads + batch * stride_gb + head * stride_gh,
        stats + 2 * (batch * num_queries * heads + head),
        grad_queries + batch * stride_db + head * stride_dh, lists + begin, size, masked,
        stride_qh, stride_gh, stride_dh, pieces, query_offset, scale,
        stride_qt, stride_gt, stride_dt, heads, WIDTH, WIDTH_P, ROWS, HEADS, STAGES, ATOMIC, TURNED,
    )  # fmt: skip
    key_grad *= scale
    # Looked up once more: carried through the loop it would take registers.
    owner, plane, slot, _, _, which, num_chunks = find_chunk(
        owners, firsts, offsets, item, num_slots, edges, chunk, True
    )
    if num_chunks == 1:
        key, here = _place(
            plane, slot, within, starts, stride_starts_b, groups, num_keys, SLOT_KEYS, DOCUMENTS
        )
        _store(
            grad_keys, grad_values, key_grad, value_grad, plane, key, here,
            stride_ckb, stride_ckg, stride_cks, stride_cvb, stride_cvg, stride_cvs, groups,
            WIDTH, WIDTH_P,
        )  # fmt: skip
    else:
        # (M, 2, BLOCK, D): first of keys, then of values.
        number = (tl.load(partials + owner) + which).to(tl.int64)
        to = sums + number * (2 * BLOCK * WIDTH) + within[:, None] * WIDTH + channel
        tl.store(to, key_grad, mask=channel < WIDTH)
        tl.store(to + BLOCK * WIDTH, value_grad, mask=channel < WIDTH)


@triton.jit(do_not_specialize=CHANGING)
def _key_gradients(
    queries, keys, values, grads, stats, grad_queries, grad_keys, grad_values, sums,
    lists, offsets, owners, firsts, partials, starts, count,
    stride_qb, stride_qh, stride_kb, stride_kg, stride_ks,
    stride_vb, stride_vg, stride_vs, stride_gb, stride_gh, stride_db, stride_dh,
    stride_ckb, stride_ckg, stride_cks, stride_cvb, stride_cvg, stride_cvs, stride_starts_b,
    groups, repeats, pieces, num_queries, num_keys, num_slots, edges, chunk, query_offset, scale, done,
    programs,
    stride_qt: tl.constexpr, stride_gt: tl.constexpr, stride_dt: tl.constexpr, heads: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    SLOT_KEYS: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, DOCUMENTS: tl.constexpr,
    STAGES: tl.constexpr, ATOMIC: tl.constexpr, TURNED: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """One chunk a program; with SHARE the chunks from `done` on, every programs-th."""
    PARTS: tl.constexpr = BLOCK // KEYS
    # Neighbouring programs hold the parts of one block, so that the second finds the queries in the cache.
    part = tl.program_id(0) % PARTS
    item = tl.program_id(0) // PARTS
    if SHARE:
        for other in range(done + item, tl.load(count), programs):
            _own(
                other, part, queries, keys, values, grads, stats, grad_queries,
                grad_keys, grad_values, sums, lists, offsets, owners, firsts, partials, starts,
                stride_qb, stride_qh, stride_kb, stride_kg, stride_ks,
                stride_vb, stride_vg, stride_vs, stride_gb, stride_gh,
                stride_db, stride_dh, stride_ckb, stride_ckg, stride_cks,
                stride_cvb, stride_cvg, stride_cvs, stride_starts_b,
                groups, repeats, pieces, num_queries, num_keys, num_slots, edges, chunk,
                query_offset, scale, stride_qt, stride_gt, stride_dt, heads,
                WIDTH, WIDTH_P, BLOCK, KEYS, SLOT_KEYS, ROWS, HEADS, DOCUMENTS, STAGES, ATOMIC, TURNED,
            )  # fmt: skip
    else:
        if item < tl.load(count):
            _own(
                item, part, queries, keys, values, grads, stats, grad_queries,
                grad_keys, grad_values, sums, lists, offsets, owners, firsts, partials, starts,
                stride_qb, stride_qh, stride_kb, stride_kg, stride_ks,
                stride_vb, stride_vg, stride_vs, stride_gb, stride_gh,
                stride_db, stride_dh, stride_ckb, stride_ckg, stride_cks,
                stride_cvb, stride_cvg, stride_cvs, stride_starts_b,
                groups, repeats, pieces, num_queries, num_keys, num_slots, edges, chunk,
                query_offset, scale, stride_qt, stride_gt, stride_dt, heads,
                WIDTH, WIDTH_P, BLOCK, KEYS, SLOT_KEYS, ROWS, HEADS, DOCUMENTS, STAGES, ATOMIC, TURNED,
            )  # fmt: skip


@triton.jit(do_not_specialize=["num_keys", "num_slots", "planes", "chunk"])
def _add_partials(
    grad_keys, grad_values, sums, offsets, split_owners, partials, starts,
    stride_ckb, stride_ckg, stride_cks, stride_cvb, stride_cvg, stride_cvs, stride_starts_b,
    groups, num_keys, num_slots, planes, chunk,
    WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    SLOT_KEYS: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Add the partial sums of one list in the order of its chunks, KEYS keys a program."""
    PARTS: tl.constexpr = BLOCK // KEYS
    owner = tl.load(split_owners + tl.program_id(0) // PARTS)
    if owner < planes * num_slots:
        plane = (owner // num_slots).to(tl.int64)
        slot = owner % num_slots
        row = offsets + plane * (num_slots + 1) + slot
        num_chunks = tl.cdiv(tl.load(row + 1) - tl.load(row), chunk)
        within = (tl.program_id(0) % PARTS) * KEYS + tl.arange(0, KEYS)
        channel = tl.arange(0, WIDTH_P)[None, :]
        first = tl.load(partials + owner).to(tl.int64) * (2 * BLOCK * WIDTH)
        at = sums + first + within[:, None] * WIDTH + channel
        key_grad = tl.zeros([KEYS, WIDTH_P], tl.float32)
        value_grad = tl.zeros([KEYS, WIDTH_P], tl.float32)
        for _ in range(num_chunks):
            key_grad += tl.load(at, mask=channel < WIDTH, other=0.0)
            value_grad += tl.load(at + BLOCK * WIDTH, mask=channel < WIDTH, other=0.0)
            at += 2 * BLOCK * WIDTH
        key, here = _place(
            plane, slot, within, starts, stride_starts_b, groups, num_keys, SLOT_KEYS, DOCUMENTS
        )
        _store(
            grad_keys, grad_values, key_grad, value_grad, plane, key, here,
            stride_ckb, stride_ckg, stride_cks, stride_cvb, stride_cvg, stride_cvs, groups,
            WIDTH, WIDTH_P,
        )  # fmt: skip


def key_value_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    stats: Tensor,
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
        stats: (B, T, H, 2) float32, contiguous: see triton_attend_dq.row_stats.
        launch: `rows` (queries times neighbouring heads) a step, `keys` of a block a program.
        grad_q: (B, H, T, D) float32, to which dq / scale is added by atomics, or None.
    """
    batch, heads, num_queries, width = q.shape
    groups, num_keys = k.shape[1], k.shape[2]
    keys = min(launch.keys, block_size)
    parts = block_size // keys
    grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
    into = q if grad_q is None else grad_q
    sums = torch.empty(
        lists.max_partials, 2, block_size, width, dtype=torch.float32, device=k.device
    )
    stride_starts = 0 if starts is None else starts.stride(0)
    shape = dict(
        WIDTH=width, WIDTH_P=padded_width(width), BLOCK=block_size, SLOT_KEYS=lists.slot_keys
    )
    shape["DOCUMENTS"] = starts is not None

    # Products of Hopper and later take 64 rows: [D, queries] has them, [queries, D] has not.
    turned = target_arch() >= 90 and keys >= 64
    repeats = heads // groups

    def walk(programs: int, done: int, rows: int, stages: int) -> None:
        # Heads that fill a power of two; the rest of the group is walked one such piece after another.
        shared = min(repeats & -repeats, rows)
        _key_gradients[(programs * parts,)](
            q, k, v, grad_out, stats, into, grad_k, grad_v, sums,
            lists.queries, lists.offsets, lists.owners, lists.firsts, lists.partials, starts, lists.count,
            *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:2],
            *into.stride()[:2], *grad_k.stride()[:3], *grad_v.stride()[:3], stride_starts,
            groups, repeats, repeats // shared, num_queries, num_keys, lists.num_slots,
            lists.queries.shape[1], lists.chunk, query_offset, scale, done, programs,
            stride_qt=q.stride(2), stride_gt=grad_out.stride(2), stride_dt=into.stride(2), heads=heads,
            **shape, KEYS=keys, ROWS=rows, HEADS=shared, STAGES=stages, ATOMIC=grad_q is not None,
            TURNED=turned and not done, SHARE=done > 0,
            num_warps=8 if done else launch.num_warps,
        )  # fmt: skip

    walk(lists.programs, 0, launch.rows, launch.num_stages)
    if lists.owners.shape[0] > lists.programs:
        # The loop over chunks takes registers, so this kernel has smaller steps and eight warps.
        walk(TAIL_PROGRAMS, lists.programs, min(launch.rows, 32), 2)
    if lists.split_owners.shape[0]:
        _add_partials[(lists.split_owners.shape[0] * (block_size // MERGED_KEYS),)](
            grad_k, grad_v, sums, lists.offsets, lists.split_owners, lists.partials, starts,
            *grad_k.stride()[:3], *grad_v.stride()[:3], stride_starts,
            groups, num_keys, lists.num_slots, batch * groups, lists.chunk,
            **shape, KEYS=MERGED_KEYS, num_warps=4,
        )  # fmt: skip
    return grad_k, grad_v
