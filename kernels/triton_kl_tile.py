"""What one tile of query tokens and keys adds to the KL: device functions of both KL kernels.

triton_kl_full.py (full rows) and triton_sparse_kl.py (selected blocks) differ in the pairs that count
(`support`) and in where the gradients go; the rest stands here. With s the index scores in log2 units and
t the mean over the R heads of a group of exp2(q_h . k - lse_h):

    p = exp2(s - index_lse)        KL += sum t (log t - log p)        ds = p - t
    dq_idx += ds k_idx             dk_idx += ds^T q_idx               all times 1 / n at the end

Shapes: ROWS query tokens, KEYS keys; head widths are padded to powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_support import interpreting

INTERPRETED = tl.constexpr(interpreting())
LEAST = tl.constexpr(2.0**-126)
"""The least normal number: one instruction for a logarithm takes it, and less counts as 0."""


@triton.jit
def fast_log2(x):
    """log2 of normal numbers in one instruction, to 2e-7 or so; tl.math.log2 takes about thirty."""
    if INTERPRETED:
        return tl.math.log2(x)
    return tl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def load_rows(base, row, stride, WIDTH: tl.constexpr, WIDTH_P: tl.constexpr):
    """[rows, WIDTH_P] from `base` + row * stride; channels past WIDTH are zero. All rows must exist."""
    channel = tl.arange(0, WIDTH_P)
    at = base + (row[:, None] * stride + channel[None, :])
    if WIDTH == WIDTH_P:
        return tl.load(at)
    return tl.load(at, mask=(channel < WIDTH)[None, :], other=0.0)


@triton.jit
def load_keys(
    base, first, stride, num_keys, KEYS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_P: tl.constexpr
):
    """[KEYS, WIDTH_P] from key `first` on; past the end the last key again, which no support has."""
    key = tl.minimum(tl.arange(0, KEYS), num_keys - 1 - first)
    return load_rows(base + first.to(tl.int64) * stride, key, stride, WIDTH, WIDTH_P)


@triton.jit
def student_step(row_max, row_sum, index_q, index_k, support, scale):
    """Running maximum and sum of the student's softmax, in log2 units, [ROWS] each."""
    scores = tl.dot(index_q, tl.trans(index_k), input_precision="ieee") * scale  # [ROWS, KEYS]
    scores = tl.where(support, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    # A row that has met no key of its own keeps -inf, and -inf - -inf is no number.
    base = tl.where(new_max == float("-inf"), 0.0, new_max)
    row_sum = row_sum * tl.math.exp2(row_max - base)
    return new_max, row_sum + tl.sum(tl.math.exp2(scores - base[:, None]), axis=1)


@triton.jit
def student_lse(row_max, row_sum):
    """Log-sum-exp [ROWS] in log2 units; 0 for a row without a key, whose support is empty anyway."""
    empty = row_max == float("-inf")
    return tl.where(empty, 0.0, row_max) + tl.math.log2(tl.where(empty, 1.0, row_sum))


@triton.jit
def teacher_tile(
    k, queries, lse, row, head, repeats, stride_h, stride_t, stride_lh, scale,
    WIDTH: tl.constexpr, WIDTH_P: tl.constexpr,
):  # fmt: skip
    """Mean over the group's heads of their probabilities, [ROWS, KEYS]; anything outside the support.

    Args:
        k: [WIDTH_P, KEYS]. Transposed by the caller: transposed here, in the loop over heads, the compiler
            would write it to shared memory once a head.
        queries, lse: pointers to what row 0 means, of head 0; `head` is the group's first, int64.
    """
    teacher = tl.zeros([row.shape[0], k.shape[1]], tl.float32)
    # The mean is taken by the exponent.
    log_repeats = tl.math.log2(repeats.to(tl.float32))
    upcoming = tl.load(lse + head * stride_lh + row)
    for repeat in range(repeats):
        q = load_rows(queries + (head + repeat) * stride_h, row, stride_t, WIDTH, WIDTH_P)
        base = upcoming * 1.4426950408889634 + log_repeats
        # One head ahead: the compiler pipelines q, but not loads as small as this one.
        upcoming = tl.load(lse + (head + tl.minimum(repeat + 1, repeats - 1)) * stride_lh + row)
        scores = tl.dot(q, k, input_precision="ieee")
        teacher += tl.math.exp2(scores * scale - base[:, None])
    return teacher
