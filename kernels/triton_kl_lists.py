"""KL over the selected blocks, the kernels that hold a block of keys: see triton_sparse_kl.py.

    dk_idx = sum over the queries that selected the block of ds^T q_idx

ds = p - t comes from the scratch of difference_kernel (triton_kl_union.py), a row of BLOCK numbers for each
edge (query, selected block); the block's list of edges says which rows (triton_lists.py). Lists longer than
a chunk leave float32 sums that a second kernel adds in the order of the chunks, so that two runs give the
same bits. Both add to what earlier windows of queries left.

Shapes: G groups, T = S tokens, K selected blocks, M partial sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kl_tile import load_rows
from .triton_lists import find_chunk


@triton.jit
def _own_keys(starts, batch, block, key, num_tokens, DOCUMENTS: tl.constexpr):
    """Which of the keys belong to the block: a document's last block ends with it."""
    here = key < num_tokens
    if DOCUMENTS:
        document = tl.load(starts + batch * num_tokens + key, mask=here, other=num_tokens)
        here = here & (document <= block)
    return here


@triton.jit
def _add_to(grad_k, acc, plane, key, mask, num_tokens, INDEX: tl.constexpr, INDEX_P: tl.constexpr):
    """Add [keys, INDEX_P] to rows of grad_k, (P, T, INDEX)."""
    channel = tl.arange(0, INDEX_P)
    mask = mask[:, None] & (channel < INDEX)[None, :]
    at = grad_k + (plane * num_tokens + key)[:, None] * INDEX + channel[None, :]
    tl.store(at, tl.load(at, mask=mask, other=0.0) + acc, mask=mask)


@triton.jit
def key_kernel(
    differences, index_queries, grad_k, sums, starts,
    lists, offsets, owners, firsts, count, partials,
    stride_iqb, stride_iqg, stride_iqt,
    groups, num_tokens, window, num_slots, edges, chunk, programs,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    SLOT_KEYS: tl.constexpr, INDEX: tl.constexpr, INDEX_P: tl.constexpr,
    DOCUMENTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One chunk of one block's list at a time, KEYS keys of the block, ROWS edges a step.

    index_queries: those of the window; differences: (P, window, K, BLOCK).
    """
    PARTS: tl.constexpr = BLOCK // KEYS
    # Neighbouring programs hold the parts of one block, so that the second finds the queries in the cache.
    part = tl.program_id(0) % PARTS
    lane, row = tl.arange(0, KEYS), tl.arange(0, ROWS)
    channel = tl.arange(0, INDEX_P)
    for item in range(tl.program_id(0) // PARTS, tl.load(count), programs):
        owner, plane, slot, begin, size, which, num_chunks = find_chunk(
            owners, firsts, offsets, item, num_slots, edges, chunk
        )
        batch, group = plane // groups, plane % groups
        from_queries = index_queries + batch * stride_iqb + group * stride_iqg
        from_rows = differences + plane * window * (TOP_K * BLOCK) + part * KEYS
        acc = tl.zeros([KEYS, INDEX_P], tl.float32)
        # One step ahead: only then do the copies that follow from it run ahead of the products.
        edge = tl.load(lists + begin + tl.minimum(row, size - 1))
        for step in tl.range(0, size, ROWS, num_stages=STAGES):
            # Past the end of the list its last edge is met again, for nothing.
            difference = tl.load(
                from_rows + (edge[:, None] * BLOCK + lane[None, :]),
                mask=(step + row < size)[:, None],
                other=0.0,
            )
            # 64 bits a row: neighbours in a list may lie a whole window apart.
            far = (edge // TOP_K).to(tl.int64)
            index_q = load_rows(from_queries, far, stride_iqt, INDEX, INDEX_P)
            acc = tl.dot(tl.trans(difference), index_q, acc, input_precision="ieee")
            edge = tl.load(lists + begin + tl.minimum(step + ROWS + row, size - 1))
        if num_chunks == 1:
            key = slot * SLOT_KEYS + part * KEYS + lane
            here = _own_keys(starts, batch, slot * SLOT_KEYS, key, num_tokens, DOCUMENTS)
            _add_to(grad_k, acc, plane, key, here, num_tokens, INDEX, INDEX_P)
        else:
            at = (tl.load(partials + owner) + which).to(tl.int64) * BLOCK + part * KEYS
            at = sums + at * INDEX + (lane[:, None] * INDEX + channel[None, :])
            tl.store(at, acc, mask=(channel < INDEX)[None, :])


@triton.jit
def _add_partials(
    grad_k, sums, offsets, split_owners, partials, starts,
    groups, num_tokens, num_slots, planes, chunk,
    BLOCK: tl.constexpr, LANES: tl.constexpr, SLOT_KEYS: tl.constexpr,
    INDEX: tl.constexpr, INDEX_P: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Add the partial sums of one list, in order, LANES keys a program."""
    PARTS: tl.constexpr = BLOCK // LANES
    owner = tl.load(split_owners + tl.program_id(0) // PARTS)
    if owner < planes * num_slots:
        plane = (owner // num_slots).to(tl.int64)
        slot = owner % num_slots
        list_ = offsets + plane * (num_slots + 1) + slot
        num_chunks = tl.cdiv(tl.load(list_ + 1) - tl.load(list_), chunk)
        within = (tl.program_id(0) % PARTS) * LANES + tl.arange(0, LANES)
        channel = tl.arange(0, INDEX_P)
        key = slot * SLOT_KEYS + within
        here = _own_keys(starts, plane // groups, slot * SLOT_KEYS, key, num_tokens, DOCUMENTS)
        mask = here[:, None] & (channel < INDEX)[None, :]
        at = sums + tl.load(partials + owner).to(tl.int64) * (BLOCK * INDEX)
        at += within[:, None] * INDEX + channel[None, :]
        acc = tl.zeros([LANES, INDEX_P], tl.float32)
        for _ in range(num_chunks):
            acc += tl.load(at, mask=mask, other=0.0)
            at += BLOCK * INDEX
        _add_to(grad_k, acc, plane, key, here, num_tokens, INDEX, INDEX_P)
