"""Sparse attention, backward: gradients of queries, keys and values from what the forward pass left.

    delta = sum over channels of dout * out          p = exp(q k^T * scale - lse)
    dv = p^T dout      ds = p * (dout v^T - delta)      dq = scale * ds k      dk = scale * ds^T q

over the visible tokens of the selected blocks (derivative of reference.sparse_attention). Keys and values
come from triton_attend_dkv.py, which walks the queries of each block. The queries' gradient is either
added there by atomics (five matrix products a pair in all, sums in no fixed order) or made by a second pass
over the forward's unions (triton_attend_dq.py; seven products, three of them over the union; two runs give
the same bits).

Shapes: B batch, H query heads, G groups, R = H / G, T queries, S keys, D head width, K selected blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from .triton_attend import tile_tokens
from .triton_attend_dkv import key_value_gradients
from .triton_attend_dq import query_gradients, row_stats
from .triton_lists import query_lists
from .triton_support import Launch, float32_launch, padded_width, target_arch
from .triton_unions import Unions, tile_unions

HEADS_FOR_UNIONS = 8
"""Heads a group from which on the pass over the unions is faster than atomics: on an H100 it takes 0.84
times as long with 16 and 1.07 times with 4 (128K tokens, benchmarks/results/h100-kernels-5808e4d.json)."""
SUMS_BYTES = 8 << 30
"""Largest float32 buffer that atomics may add dq in; what needs more takes the pass over the unions."""


@dataclass(frozen=True)
class BackwardLaunch:
    """How the backward pass is cut; the numbers never change a result beyond rounding."""

    by_key: Launch
    """Gradients of keys and values: rows (queries times heads) a step, keys a program."""
    by_query: Launch
    """Gradient of queries: rows (tokens times heads) of a tile, keys a step."""
    chunk: int | None = None
    """Queries of a block that one program walks at most; triton_lists.default_chunk where None."""


def default_launch(
    width: int, repeats: int, block_size: int, dtype: torch.dtype, deterministic: bool
) -> BackwardLaunch:
    """Tile sizes that compile without spills for sm_90 (benchmarks/codegen.py)."""
    if dtype == torch.float32:
        by_key = by_query = float32_launch()
    else:
        # Rows of one head after another, and padded channels, take registers of their own.
        plain = repeats & (repeats - 1) == 0 and width == padded_width(width)
        keys = min(block_size, 128)
        by_key, by_query = _tiles(padded_width(width), keys, deterministic, plain)
    rows = max(by_query.rows, triton.next_power_of_2(repeats))
    return BackwardLaunch(by_key=by_key, by_query=replace(by_query, rows=rows))


def _tiles(wide: int, keys: int, deterministic: bool, plain: bool) -> tuple[Launch, Launch]:
    """By key and by query, for 16 bits. A product of Hopper takes 64 rows from each four warps."""
    before_hopper = target_arch() < 90
    if wide > 128:
        return Launch(32, min(keys, 32), 8, 2), Launch(32 if before_hopper else 64, 32, 8, 2)
    if wide < 128:
        return Launch(64, keys, 8 if keys == 128 else 4, 3), Launch(64, 64, 4, 2)
    if before_hopper:
        return Launch(64, min(keys, 64), 8, 2), Launch(64, 64, 8, 2)  # never atomics
    by_query = Launch(64, 64, 4, 2)
    if keys < 64:
        return Launch(32 if deterministic else 16, keys, 4, 3), by_query
    # Two programs on a multiprocessor, out of step. Atomics add a row of dq for every program that meets
    # it, so there a program holds the whole block.
    if deterministic or keys < 128:
        return Launch(32, 64, 4, 3), by_query
    return Launch(64 if plain else 32, keys, 8, 3), by_query


def attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_ids: Tensor,
    starts: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    *,
    block_size: int,
    scale: float,
    query_offset: int = 0,
    unions: Unions | None = None,
    deterministic: bool = False,
    launch: BackwardLaunch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `out` in q, k and v (not through lse).

    Args:
        q, out, grad_out: (B, H, T, D); k, v: (B, G, S, D), any strides.
        block_ids: (B, G, T, K) int32 ascending, -1 padded, those of the forward pass.
        starts: (B, S) int32, first position of each key's document, or None.
        lse: (B, H, T) float32, natural logarithm.
        scale: positive; of the scores.
        unions: what the forward pass returned; made again where they do not fit, or are None.
        deterministic: repeat bitwise; dq then takes a pass of its own instead of atomics, as it does
            where their buffer would exceed SUMS_BYTES.

    Returns:
        dq, dk, dv in the dtypes of q, k and v; exactly zero in keys that nobody selected.
    """
    q, k, v, out, grad_out = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, out, grad_out)
    )
    lse = lse.contiguous()
    repeats = q.shape[1] // k.shape[1]
    # Before Hopper a program with atomics does not fit its registers.
    few_heads = repeats < HEADS_FOR_UNIONS and target_arch() >= 90
    by_atomics = not deterministic and few_heads and 4 * q.numel() <= SUMS_BYTES
    launch = launch or default_launch(q.shape[-1], repeats, block_size, q.dtype, not by_atomics)
    stats = row_stats(out, grad_out, lse)
    lists = query_lists(
        block_ids, starts, num_keys=k.shape[2], block_size=block_size, query_offset=query_offset,
        chunk=launch.chunk,
    )  # fmt: skip
    sums = torch.zeros_like(q, dtype=torch.float32) if by_atomics else None
    grad_k, grad_v = key_value_gradients(
        q, k, v, grad_out, stats, lists, starts, block_size=block_size, scale=scale,
        query_offset=query_offset, launch=launch.by_key, grad_q=sums,
    )  # fmt: skip
    if sums is not None:
        # One pass over dq both scales and rounds.
        grad_q = torch.empty_like(q)
        return torch.mul(sums, scale, out=grad_q), grad_k, grad_v
    tokens = tile_tokens(launch.by_query, repeats)
    if unions is None or unions.tokens != tokens:
        unions = tile_unions(
            block_ids, starts, num_keys=k.shape[2], block_size=block_size, tokens=tokens,
            query_offset=query_offset,
        )  # fmt: skip
    grad_q = query_gradients(
        q, k, v, grad_out, stats, unions, block_size=block_size, scale=scale,
        query_offset=query_offset, launch=launch.by_query,
    )  # fmt: skip
    return grad_q, grad_k, grad_v
