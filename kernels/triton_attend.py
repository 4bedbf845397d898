"""Sparse attention, forward: a program holds a tile of queries and reads the union of their blocks.

    out[i] = softmax over j in support(i) of (q_i . k_j * scale) . v_j         (arXiv 2606.13392, eq. 7)

Rows of a tile are floor(rows / R) neighbouring tokens times the R query heads of one group, so any R
fills a tile. Each block of the union (triton_unions.py) is read once, its keys and values in one piece; a
bit a token says who selected it. No partial results, no atomics: two runs give the same bits.

Shapes: B batch, H query heads, G groups, R = H / G, T queries, S keys, D head width, K selected blocks.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_support import Launch, float32_launch, padded_width, target_arch
from .triton_unions import MAX_TOKENS, Unions, tile_unions


@triton.jit
def _steps(
    q, acc, row_max, row_sum,
    keys, values, stride_k, stride_v,
    first_keys, members, begin, end,
    token, position, num_keys, scale,
    WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr, CAUSAL: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Entries begin .. end - 1 of the union, KEYS keys a step. Without CAUSAL all lie in the past."""
    PARTS: tl.constexpr = BLOCK // KEYS
    key = tl.arange(0, KEYS)
    channel = tl.arange(0, WIDTH_P)
    wide = channel < WIDTH
    # One or two blocks a tile are causal: nothing to overlap, and pipelining them costs registers.
    DEPTH: tl.constexpr = 1 if CAUSAL else STAGES
    for step in tl.range(begin * PARTS, end * PARTS, num_stages=DEPTH):
        first = tl.load(first_keys + step // PARTS) + (step % PARTS) * KEYS
        mask = tl.load(members + step // PARTS)
        k_tile = keys + first.to(tl.int64) * stride_k + (key[None, :] * stride_k + channel[:, None])
        v_tile = (
            values + first.to(tl.int64) * stride_v + (key[:, None] * stride_v + channel[None, :])
        )
        here = first + key < num_keys
        # Blocks of the past lie inside the row, so only the causal part masks keys.
        if CAUSAL:
            k = tl.load(k_tile, mask=here[None, :] & wide[:, None], other=0.0)
        elif EVEN:
            k = tl.load(k_tile)
        else:
            k = tl.load(k_tile, mask=wide[:, None], other=0.0)
        products = tl.dot(q, k, input_precision="ieee")  # [ROWS, KEYS]
        member = ((mask >> token) & 1) != 0
        if CAUSAL:
            support = member[:, None] & ((first + key)[None, :] <= position[:, None])
            products = tl.where(support, products, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(products, axis=1) * scale)
            # A row that has met no key of its own keeps -inf, and -inf - -inf is no number.
            base = tl.where(new_max == float("-inf"), 0.0, new_max)
            shrink = tl.math.exp2(row_max - base)
        else:
            # Whole rows belong to the support or not: no select for each score, and the scale is part of
            # the exponent's multiplication and addition. exp2(-inf) = 0 leaves out the rows that do not.
            new_max = tl.maximum(row_max, tl.max(products, axis=1) * scale)
            shrink = tl.where(member, tl.math.exp2(row_max - new_max), 1.0)
            base = tl.where(member, new_max, float("inf"))
            new_max = tl.where(member, new_max, row_max)
        weights = tl.math.exp2(products * scale - base[:, None])
        row_sum = row_sum * shrink + tl.sum(weights, axis=1)
        row_max = new_max
        if CAUSAL:
            v = tl.load(v_tile, mask=here[:, None] & wide[None, :], other=0.0)
        elif EVEN:
            v = tl.load(v_tile)
        else:
            v = tl.load(v_tile, mask=wide[None, :], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_tiles", "query_offset"])
def _attend(
    queries, keys, values, out, lse,
    first_keys, members, counts, past_counts,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_ks,
    stride_vb, stride_vg, stride_vs, stride_ob, stride_oh, stride_ot,
    groups, num_queries, num_keys, num_tiles, union_len, query_offset, scale,
    REPEATS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    plane = tl.program_id(1).to(tl.int64)
    batch, group = plane // groups, plane % groups
    row = tl.arange(0, ROWS)
    token, head = row // REPEATS, row % REPEATS
    query = tile * TOKENS + token
    valid = (token < TOKENS) & (query < num_queries)
    channel = tl.arange(0, WIDTH_P)
    wide = channel < WIDTH
    # 64 bits a row, once a tile: a head-major row of heads passes 2^31 elements long before 4M tokens.
    head = (group * REPEATS + head).to(tl.int64)
    rows_q = batch * stride_qb + head * stride_qh + query.to(tl.int64) * stride_qt
    q = tl.load(
        queries + rows_q[:, None] + channel[None, :], mask=valid[:, None] & wide[None, :], other=0.0
    )
    entry = plane * num_tiles + tile
    first_keys += entry * union_len
    members += entry * union_len
    end, past = tl.load(counts + entry), tl.load(past_counts + entry)
    keys += batch * stride_kb + group * stride_kg
    values += batch * stride_vb + group * stride_vg
    acc = tl.zeros([ROWS, WIDTH_P], tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    bit = token.to(tl.int64)
    # Masks cost registers: shorter steps where keys are masked one by one.
    SHORT: tl.constexpr = 64 if KEYS > 64 else KEYS
    position = query_offset + query
    acc, row_max, row_sum = _steps(
        q, acc, row_max, row_sum, keys, values, stride_ks, stride_vs, first_keys, members, 0, past,
        bit, position, num_keys, scale,
        WIDTH, WIDTH_P, BLOCK, KEYS, STAGES, False, WIDTH == WIDTH_P,
    )  # fmt: skip
    acc, row_max, row_sum = _steps(
        q, acc, row_max, row_sum, keys, values, stride_ks, stride_vs, first_keys, members, past, end,
        bit, position, num_keys, scale,
        WIDTH, WIDTH_P, BLOCK, SHORT, STAGES, True, WIDTH == WIDTH_P,
    )  # fmt: skip
    total = tl.where(valid, row_sum, 1.0)
    rows_o = batch * stride_ob + head * stride_oh + query.to(tl.int64) * stride_ot
    tl.store(
        out + rows_o[:, None] + channel[None, :],
        (acc / total[:, None]).to(out.dtype.element_ty),
        mask=valid[:, None] & wide[None, :],
    )
    natural = (row_max + tl.math.log2(total)) * 0.6931471805599453
    rows_l = (batch * groups * REPEATS + head) * num_queries + query
    tl.store(lse + rows_l, natural, mask=valid)


def default_launch(width: int, repeats: int, block_size: int, dtype: torch.dtype) -> Launch:
    """Tile sizes that compile without spills for the device at hand (benchmarks/codegen.py)."""
    if dtype == torch.float32:
        tile = float32_launch()
    elif padded_width(width) > 128:
        tile = Launch(32, 16, 8, 2) if target_arch() < 90 else Launch(64, 32, 8, 2)
    elif repeats == 1:
        tile = Launch(64, 32, 8, 2)
    elif target_arch() < 90:
        tile = Launch(128, 64, 8, 2)
    else:
        # Few rows have small unions, and two programs that are not in step use the tensor cores best: of
        # six shapes the fastest on an H100 (benchmarks/results/h100-sweep-5808e4d.json).
        tile = Launch(64, 64, 4, 3)
    rows = max(tile.rows, triton.next_power_of_2(repeats))
    return replace(tile, rows=rows, keys=min(tile.keys, block_size))


def tile_tokens(launch: Launch, repeats: int) -> int:
    """Neighbouring queries in one tile."""
    return min(MAX_TOKENS, max(1, launch.rows // repeats))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_ids: Tensor,
    starts: Tensor | None,
    *,
    block_size: int,
    scale: float,
    query_offset: int = 0,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Unions]:
    """Attention over the selected blocks.

    Args:
        q: (B, H, T, D); k, v: (B, G, S, D), any strides with contiguous channels.
        block_ids: (B, G, T, K) int32 ascending, -1 padded.
        starts: (B, S) int32, first position of each key's document, or None.
        scale: above 0, since maxima are taken before it is applied.

    Returns:
        out (B, H, T, D) in q's dtype and layout, lse (B, H, T) float32, and the unions that were read.
    """
    if not scale > 0:
        raise ValueError(
            f"scale={scale}: the Triton kernels take a scale above 0; set backend='torch'"
        )
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, num_queries, width = q.shape
    groups, num_keys = k.shape[1], k.shape[2]
    repeats = heads // groups
    launch = launch or default_launch(width, repeats, block_size, q.dtype)
    unions = tile_unions(
        block_ids, starts, num_keys=num_keys, block_size=block_size,
        tokens=tile_tokens(launch, repeats), query_offset=query_offset,
    )  # fmt: skip
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, num_queries, dtype=torch.float32, device=q.device)
    num_tiles = unions.counts.shape[2]
    _attend[(num_tiles, batch * groups)](
        q, k, v, out, lse,
        unions.first_keys, unions.members, unions.counts, unions.past_counts,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        groups, num_queries, num_keys, num_tiles, unions.first_keys.shape[3], query_offset,
        scale * math.log2(math.e),
        REPEATS=repeats, TOKENS=unions.tokens, ROWS=launch.rows,
        WIDTH=width, WIDTH_P=padded_width(width), BLOCK=block_size, KEYS=min(launch.keys, block_size),
        STAGES=launch.num_stages, **launch.options,
    )  # fmt: skip
    return out, lse, unions
