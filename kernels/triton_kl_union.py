"""KL over the selected blocks, the kernels that hold a tile of query tokens: see triton_sparse_kl.py.

A program meets each block of the union of its tile's selections once (triton_unions.py).

    student_kernel     index scores only, rows are tokens: the student's log-sum-exp
    difference_kernel  the heads of the group too: teacher, KL, dq_idx, and ds = p - t for dk_idx

The second makes its scores transposed, [keys, heads * tokens], heads outside: in the layout of a product's
result all heads of a token and key then lie in one thread, so that the mean over the heads is additions in
registers, and what is left has the layout of the student's scores. Products of 64 keys and all rows of the
tile are whole instructions of Hopper's tensor cores, with heads in any number (padded to a power of two).

Shapes: R heads a group, padded to a power of two R_P; rows = R_P * TOKENS; K selected blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kl_tile import LEAST, fast_log2, load_keys, load_rows, student_lse, student_step


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
    KEYS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """[KEYS, WIDTH_P] from key `first` on; with WHOLE no block reaches past the last key."""
    key, channel = tl.arange(0, KEYS), tl.arange(0, WIDTH_P)
    at = base + first.to(tl.int64) * stride + (key[:, None] * stride + channel[None, :])
    wide = channel < WIDTH
    if not WHOLE:
        mask = (first + key < num_tokens)[:, None] & wide[None, :]
        return tl.load(at, mask=mask, other=0.0)
    elif WIDTH == WIDTH_P:
        return tl.load(at)
    else:
        return tl.load(at, mask=wide[None, :], other=0.0)


@triton.jit
def _fold(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEWER: tl.constexpr):
    """[ROWS, FEWER] from [ROWS, COLUMNS], every FEWER-th column added."""
    if COLUMNS == FEWER:
        return tile
    else:
        return tl.sum(tl.reshape(tile, [ROWS, COLUMNS // FEWER, FEWER]), axis=1)


@triton.jit
def _few_columns(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of columns that one thread holds anyway, at most four: those live through a loop."""
    FEWER: tl.constexpr = min(COLUMNS, 8)
    tile = _fold(tile, ROWS, COLUMNS, FEWER)
    if FEWER == 1:
        return tile
    else:
        return tl.sum(tl.reshape(tile, [ROWS, FEWER // 2, 2]), axis=2)


@triton.jit
def _head_queries(
    queries, lse, head, first_query, stride_h, stride_t, num_tokens, log2_repeats,
    REPEATS: tl.constexpr, REPEATS_P: tl.constexpr, TOKENS: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_P: tl.constexpr,
):  # fmt: skip
    """Queries [WIDTH_P, REPEATS_P * TOKENS] of a group, heads outside, and their lse in log2 units."""
    row, channel = tl.arange(0, REPEATS_P * TOKENS), tl.arange(0, WIDTH_P)
    inside = (row // TOKENS < REPEATS) & (first_query + row % TOKENS < num_tokens)
    head += row // TOKENS
    at = head * stride_h + (first_query + row % TOKENS) * stride_t
    mask = inside[:, None] & (channel < WIDTH)[None, :]
    q = tl.trans(tl.load(queries + at[:, None] + channel[None, :], mask=mask, other=0.0))
    at = head * num_tokens + first_query + row % TOKENS
    # exp2(0 - inf): an absent row adds nothing to its token. With log2(R) the sum over heads is their mean.
    return q, tl.load(lse + at, mask=inside, other=float("inf")) * 1.4426950408889634 + log2_repeats


@triton.jit
def _index_columns(
    index_queries, index_lse, first_query, stride_t, num_tokens,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, INDEX: tl.constexpr, INDEX_P: tl.constexpr,
):  # fmt: skip
    """Index queries [INDEX_P, COLUMNS] of a tile, 0 from column TOKENS on; the student's lse [TOKENS]."""
    column, channel = tl.arange(0, COLUMNS), tl.arange(0, INDEX_P)
    at = (first_query + column) * stride_t
    mask = ((column < TOKENS) & (first_query + column < num_tokens))[:, None]
    mask = mask & (channel < INDEX)[None, :]
    index_q = tl.load(index_queries + at[:, None] + channel[None, :], mask=mask, other=0.0)
    query = first_query + tl.arange(0, TOKENS)
    return tl.trans(index_q), tl.load(index_lse + query, mask=query < num_tokens, other=0.0)


@triton.jit
def _store_columns(
    to, grad, first_query, num_tokens,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, INDEX: tl.constexpr, INDEX_P: tl.constexpr,
):  # fmt: skip
    """The first TOKENS columns of grad [INDEX_P, COLUMNS] to rows of (T, INDEX)."""
    column, channel = tl.arange(0, COLUMNS), tl.arange(0, INDEX_P)
    query = first_query + column
    mask = (channel < INDEX)[:, None] & ((column < TOKENS) & (query < num_tokens))[None, :]
    tl.store(to + query[None, :] * INDEX + channel[:, None], grad, mask=mask)


@triton.jit
def _repeated(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEWER: tl.constexpr):
    """[ROWS, COLUMNS] from [ROWS, FEWER], the columns over and over."""
    wide = tl.broadcast_to(tile[:, None, :], [ROWS, COLUMNS // FEWER, FEWER])
    return tl.reshape(wide, [ROWS, COLUMNS])


@triton.jit
def _compared(
    log_heads, log_student, student, support, index_scale,
    KEYS: tl.constexpr, REPEATS_P: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Terms of the KL in log2 units, and p - t, [KEYS, TOKENS], from the heads' and the index products."""
    teacher = _fold(tl.math.exp2(log_heads), KEYS, REPEATS_P * TOKENS, TOKENS)
    log_student = _fold(log_student, KEYS, COLUMNS, TOKENS)  # absent columns are 0
    log_student = log_student * index_scale - student[None, :]
    # Outside the support the teacher may be infinite and the student's exponential too.
    teacher = tl.where(support, teacher, 0.0)
    divergence = teacher * (fast_log2(tl.maximum(teacher, LEAST)) - log_student)  # 0 at t = 0
    return divergence, tl.where(support, tl.math.exp2(log_student), 0.0) - teacher


@triton.jit
def difference_kernel(
    queries, keys, lse, index_queries, index_keys, index_lse,
    first_keys, members, counts, divergences, grad_q, differences,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_k,
    stride_iqb, stride_iqg, stride_iqt, stride_ikb, stride_ik,
    groups, num_tokens, num_tiles, union_len, first_tile, window, scale, index_scale, log2_repeats, factor,
    REPEATS: tl.constexpr, REPEATS_P: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, INDEX: tl.constexpr, INDEX_P: tl.constexpr,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr,
    GRAD: tl.constexpr,
):  # fmt: skip
    """One tile of the window that begins with tile `first_tile` and has `window` tokens in the scratch.

    differences: (B * G, window, K, BLOCK), of each token and block it selected; others are not written.
    grad_q: (B, G, T, INDEX) float32, times `factor`.
    """
    PARTS: tl.constexpr = BLOCK // KEYS
    tile = first_tile + tl.program_id(0)
    plane = tl.program_id(1).to(tl.int64)
    batch, group = plane // groups, plane % groups
    first_query = (tile * TOKENS).to(tl.int64)  # 64 bits, once a tile
    q, row_lse = _head_queries(
        queries + batch * stride_qb, lse + batch * groups * REPEATS * num_tokens, group * REPEATS,
        first_query, stride_qh, stride_qt, num_tokens, log2_repeats,
        REPEATS, REPEATS_P, TOKENS, WIDTH, WIDTH_P,
    )  # fmt: skip
    index_q, student = _index_columns(
        index_queries + batch * stride_iqb + group * stride_iqg, index_lse + plane * num_tokens,
        first_query, stride_iqt, num_tokens, TOKENS, COLUMNS, INDEX, INDEX_P,
    )  # fmt: skip
    entry = plane * num_tiles + tile
    first_keys += entry * union_len
    members += entry * union_len
    keys += batch * stride_kb + group * stride_kg
    index_keys += batch * stride_ikb
    differences += (plane * window + tl.program_id(0) * TOKENS) * (TOP_K * BLOCK)
    grad = tl.zeros([INDEX_P, COLUMNS], tl.float32)  # from column TOKENS on the first ones again
    total = tl.zeros([KEYS, max(min(TOKENS, 8) // 2, 1)], tl.float32)
    slot = tl.zeros([TOKENS], tl.int32)  # blocks of its own that each token has met
    key, token = tl.arange(0, KEYS), tl.arange(0, TOKENS)
    WORD: tl.constexpr = tl.int32 if TOKENS <= 32 else tl.int64
    for step in tl.range(0, tl.load(counts + entry) * PARTS, num_stages=STAGES):
        part = step % PARTS
        first = tl.load(first_keys + step // PARTS) + part * KEYS
        bits = tl.load(members + step // PARTS)
        k = _keys(keys, first, stride_k, num_tokens, KEYS, WIDTH, WIDTH_P, WHOLE)
        index_k = _keys(index_keys, first, stride_ik, num_tokens, KEYS, INDEX, INDEX_P, WHOLE)
        scores = tl.dot(k, q, input_precision="ieee")  # [KEYS, REPEATS_P * TOKENS]
        log_student = tl.dot(index_k, index_q, input_precision="ieee")  # [KEYS, COLUMNS]
        member = ((bits.to(WORD) >> token.to(WORD)) & 1) != 0
        # The token and not the query, which would take registers of its own.
        support = member[None, :] & ((first - tile * TOKENS + key)[:, None] <= token[None, :])
        divergence, difference = _compared(
            scores * scale - row_lse[None, :], log_student, student, support, index_scale,
            KEYS, REPEATS_P, TOKENS, COLUMNS,
        )  # fmt: skip
        total += _few_columns(divergence, KEYS, TOKENS)
        if GRAD:
            difference = difference.to(index_k.dtype)
            columns = _repeated(difference, KEYS, COLUMNS, TOKENS)
            grad = tl.dot(tl.trans(index_k), columns, grad, input_precision="ieee")
            to = (
                differences + (token * TOP_K + slot)[None, :] * BLOCK + (part * KEYS + key)[:, None]
            )
            tl.store(to, difference, mask=member[None, :])
            slot += (member & (part == PARTS - 1)).to(tl.int32)
    # Places once more from an opaque 0: carried through the loop they would take registers.
    zero = tl.minimum(tl.load(counts, volatile=True), 0)
    tile = first_tile + tl.program_id(0) + zero
    plane = (tl.program_id(1) + zero).to(tl.int64)
    tl.store(divergences + plane * num_tiles + tile, tl.sum(tl.sum(total, axis=1), axis=0))
    if GRAD:
        grad_q += plane * num_tokens * INDEX
        grad *= factor
        _store_columns(grad_q, grad, tile * TOKENS, num_tokens, TOKENS, COLUMNS, INDEX, INDEX_P)
