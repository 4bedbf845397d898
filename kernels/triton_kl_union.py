"""KL over the selected blocks, the kernels that hold a tile of queries: see triton_sparse_kl.py.

A program meets each block of the union of its tile's selections once (triton_unions.py); rows are tokens,
and the heads of the group are a loop outside the tile, so any number of heads fits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kl_tile import (
    divergence_and_difference,
    load_keys,
    load_rows,
    student_lse,
    student_step,
    teacher_tile,
)


@triton.jit
def _union_step(
    first_keys, members, step, slot, query, valid, BLOCK: tl.constexpr, KEYS: tl.constexpr
):
    """First key of step `step` of a union, and which pairs of it count, [ROWS, KEYS]."""
    PARTS: tl.constexpr = BLOCK // KEYS
    first = tl.load(first_keys + step // PARTS) + (step % PARTS) * KEYS
    mask = tl.load(members + step // PARTS)
    chosen = (((mask >> slot.to(tl.int64)) & 1) != 0) & valid
    return first, chosen[:, None] & ((first + tl.arange(0, KEYS))[None, :] <= query[:, None])


@triton.jit(do_not_specialize=["num_tokens", "union_len"])
def student_kernel(
    index_queries, index_keys, index_lse, first_keys, members, counts,
    stride_iqb, stride_iqg, stride_iqt, stride_ikb, stride_ik,
    groups, num_tokens, union_len, scale,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    INDEX: tl.constexpr, INDEX_P: tl.constexpr,
):  # fmt: skip
    first_query = tl.program_id(0) * ROWS
    plane = tl.program_id(1).to(tl.int64)
    batch, group = plane // groups, plane % groups
    slot = tl.arange(0, ROWS)
    # Rows past the end are read as the last row, and never stored.
    row = tl.minimum(slot, num_tokens - 1 - first_query)
    valid = first_query + slot < num_tokens
    index_queries += batch * stride_iqb + group * stride_iqg + first_query.to(tl.int64) * stride_iqt
    index_q = load_rows(index_queries, row, stride_iqt, INDEX, INDEX_P)
    index_keys += batch * stride_ikb
    entry = plane * tl.num_programs(0) + tl.program_id(0)
    first_keys += entry * union_len
    members += entry * union_len
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    for step in range(0, tl.load(counts + entry) * (BLOCK // KEYS)):
        first, support = _union_step(
            first_keys, members, step, slot, first_query + row, valid, BLOCK, KEYS
        )
        index_k = load_keys(index_keys, first, stride_ik, num_tokens, KEYS, INDEX, INDEX_P)
        row_max, row_sum = student_step(row_max, row_sum, index_q, index_k, support, scale)
    to = index_lse + plane * num_tokens + first_query + slot
    tl.store(to, student_lse(row_max, row_sum), mask=valid)


@triton.jit(do_not_specialize=["num_tokens", "union_len"])
def query_kernel(
    queries, keys, lse, index_queries, index_keys, index_lse, first_keys, members, counts, grad_q,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_k,
    stride_iqb, stride_iqg, stride_iqt, stride_ikb, stride_ik,
    groups, num_tokens, union_len, repeats, scale, index_scale,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, INDEX: tl.constexpr, INDEX_P: tl.constexpr,
):  # fmt: skip
    first_query = tl.program_id(0) * ROWS
    plane = tl.program_id(1).to(tl.int64)
    batch, group = plane // groups, plane % groups
    slot = tl.arange(0, ROWS)
    row = tl.minimum(slot, num_tokens - 1 - first_query)
    valid = first_query + slot < num_tokens
    base = first_query.to(tl.int64)
    queries += batch * stride_qb + base * stride_qt
    keys += batch * stride_kb + group * stride_kg
    lse += batch * groups * repeats * num_tokens + base
    index_queries += batch * stride_iqb + group * stride_iqg + base * stride_iqt
    index_q = load_rows(index_queries, row, stride_iqt, INDEX, INDEX_P)
    index_keys += batch * stride_ikb
    student = tl.load(index_lse + plane * num_tokens + base + row)
    entry = plane * tl.num_programs(0) + tl.program_id(0)
    first_keys += entry * union_len
    members += entry * union_len
    acc = tl.zeros([ROWS, INDEX_P], tl.float32)
    for step in range(0, tl.load(counts + entry) * (BLOCK // KEYS)):
        first, support = _union_step(
            first_keys, members, step, slot, first_query + row, valid, BLOCK, KEYS
        )
        k = tl.trans(load_keys(keys, first, stride_k, num_tokens, KEYS, WIDTH, WIDTH_P))
        teacher = teacher_tile(
            k, queries, lse, row, group * repeats, repeats, stride_qh, stride_qt, num_tokens, scale,
            WIDTH, WIDTH_P,
        )  # fmt: skip
        index_k = load_keys(index_keys, first, stride_ik, num_tokens, KEYS, INDEX, INDEX_P)
        log_student = tl.dot(index_q, tl.trans(index_k), input_precision="ieee") * index_scale
        _, difference = divergence_and_difference(teacher, log_student - student[:, None], support)
        acc = tl.dot(difference.to(index_k.dtype), index_k, acc, input_precision="ieee")
    channel = tl.arange(0, INDEX_P)
    at = grad_q + (plane * num_tokens + base) * INDEX + (slot[:, None] * INDEX + channel[None, :])
    tl.store(at, acc, mask=valid[:, None] & (channel < INDEX)[None, :])
