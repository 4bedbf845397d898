"""KL over the selected blocks, the kernels that hold a tile of query tokens: see triton_sparse_kl.py.

A program meets each block of the union of its tile's selections once (triton_unions.py).

    student_kernel     index scores only, rows are tokens: the student's log-sum-exp
    difference_kernel  the heads of the group too: teacher, KL, dq_idx, and ds = p - t for the keys' gradient

The second makes its scores transposed, [keys, heads * tokens], heads outside: in the layout of a product's
result all heads of a token and key then lie in one thread, so that the mean over the heads is additions in
registers, and what is left has the layout of the student's scores. Products of 64 keys and all rows of the
tile are whole instructions of Hopper's tensor cores, with heads in any number (padded to a power of two).

Shapes: R heads a group, padded to a power of two R_P; rows = R_P * TOKENS; K selected blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kl_tile import load_keys, load_rows, student_lse, student_step


@triton.jit
def student_kernel(
    index_queries, index_keys, index_lse, first_keys, members, counts,
    stride_iqb, stride_iqg, stride_iqt, stride_ikb, stride_ik,
    groups, num_tokens, union_len, scale,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    INDEX: tl.constexpr, INDEX_P: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = BLOCK // KEYS
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
    for step in range(0, tl.load(counts + entry) * PARTS):
        first = tl.load(first_keys + step // PARTS) + (step % PARTS) * KEYS
        mask = tl.load(members + step // PARTS)
        chosen = (((mask >> slot.to(tl.int64)) & 1) != 0) & valid
        seen = (first + tl.arange(0, KEYS))[None, :] <= (first_query + row)[:, None]
        index_k = load_keys(index_keys, first, stride_ik, num_tokens, KEYS, INDEX, INDEX_P)
        row_max, row_sum = student_step(
            row_max, row_sum, index_q, index_k, chosen[:, None] & seen, scale
        )
    to = index_lse + plane * num_tokens + first_query + slot
    tl.store(to, student_lse(row_max, row_sum), mask=valid)


@triton.jit
def _keys(
    base, first, stride, num_tokens,
    KEYS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """[KEYS, WIDTH_P] from key `first` on. Blocks of the past lie inside the row."""
    key, channel = tl.arange(0, KEYS), tl.arange(0, WIDTH_P)
    at = base + first.to(tl.int64) * stride + (key[:, None] * stride + channel[None, :])
    wide = channel < WIDTH
    if CAUSAL:
        mask = (first + key < num_tokens)[:, None] & wide[None, :]
        return tl.load(at, mask=mask, other=0.0)
    elif WIDTH == WIDTH_P:
        return tl.load(at)
    else:
        return tl.load(at, mask=wide[None, :], other=0.0)


@triton.jit
def _steps(
    grad, total, slot, q, lse, index_q, index_lse,
    keys, index_keys, differences, stride_k, stride_ik,
    first_keys, members, begin, end, query, num_tokens, top_k, scale, index_scale,
    REPEATS: tl.constexpr, REPEATS_P: tl.constexpr, TOKENS: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, INDEX: tl.constexpr, INDEX_P: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    CAUSAL: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    """Entries begin .. end - 1 of the union, KEYS keys a step. Without CAUSAL all lie in the past.

    Args:
        grad: [INDEX_P, TOKENS], of the index queries; total: [KEYS, TOKENS] the KL's terms in log2 units.
        slot: [TOKENS], how many blocks of its own each token has met.
    """
    PARTS: tl.constexpr = BLOCK // KEYS
    key, token = tl.arange(0, KEYS), tl.arange(0, TOKENS)
    # One or two blocks a tile are causal: nothing to overlap, and pipelining them costs registers.
    DEPTH: tl.constexpr = 1 if CAUSAL else STAGES
    for step in tl.range(begin * PARTS, end * PARTS, num_stages=DEPTH):
        part = step % PARTS
        first = tl.load(first_keys + step // PARTS) + part * KEYS
        mask = tl.load(members + step // PARTS)
        k = _keys(keys, first, stride_k, num_tokens, KEYS, WIDTH, WIDTH_P, CAUSAL)
        index_k = _keys(index_keys, first, stride_ik, num_tokens, KEYS, INDEX, INDEX_P, CAUSAL)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")  # [KEYS, REPEATS_P * TOKENS]
        log_student = tl.dot(index_k, tl.trans(index_q), input_precision="ieee")  # [KEYS, TOKENS]
        teacher = tl.math.exp2(scores * scale - lse[None, :])
        teacher = tl.sum(tl.reshape(teacher, [KEYS, REPEATS_P, TOKENS]), axis=1) * (1.0 / REPEATS)
        log_student = log_student * index_scale - index_lse[None, :]
        member = ((mask >> token.to(tl.int64)) & 1) != 0
        support = member[None, :]
        if CAUSAL:
            support = support & ((first + key)[:, None] <= query[None, :])
        # Outside the support the teacher may be infinite and the student's exponential too.
        teacher = tl.where(support, teacher, 0.0)
        log_teacher = tl.math.log2(tl.where(teacher > 0.0, teacher, 1.0))  # t log t is 0 at t = 0
        total += teacher * (log_teacher - log_student)
        if GRAD:
            difference = tl.where(support, tl.math.exp2(log_student), 0.0) - teacher
            difference = difference.to(index_k.dtype)
            grad = tl.dot(tl.trans(index_k), difference, grad, input_precision="ieee")
            at = differences + (token * top_k + slot)[None, :] * BLOCK + (part * KEYS + key)[:, None]
            tl.store(at, difference, mask=member[None, :])
            slot += (member & (part == PARTS - 1)).to(tl.int32)
    return grad, total, slot


@triton.jit
def difference_kernel(
    queries, keys, lse, index_queries, index_keys, index_lse,
    first_keys, members, counts, past_counts, divergences, grad_q, differences,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_k,
    stride_iqb, stride_iqg, stride_iqt, stride_ikb, stride_ik,
    groups, num_tokens, num_tiles, union_len, first_tile, window, top_k, scale, index_scale, factor,
    REPEATS: tl.constexpr, REPEATS_P: tl.constexpr, TOKENS: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, INDEX: tl.constexpr, INDEX_P: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    """One tile of the window that begins with tile `first_tile` and has `window` tokens in the scratch.

    differences: (B * G, window, K, BLOCK), of each token and block it selected; others are not written.
    grad_q: (B, G, T, INDEX) float32, times `factor`.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    tile = first_tile + tl.program_id(0)
    plane = tl.program_id(1).to(tl.int64)
    batch, group = plane // groups, plane % groups
    # 64 bits, once a tile.
    first_query = (tile * TOKENS).to(tl.int64)
    row = tl.arange(0, REPEATS_P * TOKENS)
    inside = (row // TOKENS < REPEATS) & (first_query + row % TOKENS < num_tokens)
    head = group * REPEATS + row // TOKENS
    channel = tl.arange(0, WIDTH_P)
    at = batch * stride_qb + head * stride_qh + (first_query + row % TOKENS) * stride_qt
    mask = inside[:, None] & (channel < WIDTH)[None, :]
    q = tl.load(queries + at[:, None] + channel[None, :], mask=mask, other=0.0)
    at = (batch * groups * REPEATS + head) * num_tokens + first_query + row % TOKENS
    # exp2(0 - inf): an absent row adds nothing to its token.
    row_lse = tl.load(lse + at, mask=inside, other=float("inf")) * LOG2E
    token = tl.arange(0, TOKENS)
    query = tile * TOKENS + token
    present = query < num_tokens
    channel = tl.arange(0, INDEX_P)
    at = batch * stride_iqb + group * stride_iqg + (first_query + token) * stride_iqt
    mask = present[:, None] & (channel < INDEX)[None, :]
    index_q = tl.load(index_queries + at[:, None] + channel[None, :], mask=mask, other=0.0)
    student = tl.load(index_lse + plane * num_tokens + query, mask=present, other=0.0)
    entry = plane * num_tiles + tile
    first_keys += entry * union_len
    members += entry * union_len
    end, past = tl.load(counts + entry), tl.load(past_counts + entry)
    keys += batch * stride_kb + group * stride_kg
    index_keys += batch * stride_ikb
    to = plane * window + tl.program_id(0) * TOKENS
    grad, total, slot = _steps(
        tl.zeros([INDEX_P, TOKENS], tl.float32), tl.zeros([KEYS, TOKENS], tl.float32),
        tl.zeros([TOKENS], tl.int32), q, row_lse, index_q, student,
        keys, index_keys, differences + to * top_k * BLOCK, stride_k, stride_ik,
        first_keys, members, 0, past, query, num_tokens, top_k, scale, index_scale,
        REPEATS, REPEATS_P, TOKENS, WIDTH, WIDTH_P, INDEX, INDEX_P, BLOCK, KEYS, STAGES, False, GRAD,
    )  # fmt: skip
    grad, total, slot = _steps(
        grad, total, slot, q, row_lse, index_q, student,
        keys, index_keys, differences + to * top_k * BLOCK, stride_k, stride_ik,
        first_keys, members, past, end, query, num_tokens, top_k, scale, index_scale,
        REPEATS, REPEATS_P, TOKENS, WIDTH, WIDTH_P, INDEX, INDEX_P, BLOCK, KEYS, STAGES, True, GRAD,
    )  # fmt: skip
    tl.store(divergences + entry, tl.sum(tl.sum(total, axis=1), axis=0))
    if GRAD:
        at = grad_q + (plane * num_tokens + first_query) * INDEX
        at += token[None, :] * INDEX + channel[:, None]
        tl.store(at, grad * factor, mask=(channel < INDEX)[:, None] & present[None, :])
