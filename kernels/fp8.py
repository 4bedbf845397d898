"""Index queries and keys in fp8 (e4m3), for ranking blocks with half the bytes and twice the arithmetic.

Each query row and each key block is divided by a power of two that brings it into e4m3's range. A row's
factor cannot change its ranking and is dropped; a block's factor is positive, so it may be applied after
the block maximum. Powers of two make both exact: all that is lost is the rounding to 3 bits of mantissa.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .documents import DocumentIds, key_starts

LARGEST = 448.0
"""Largest finite e4m3 value."""


def _power_of_two(largest: Tensor) -> Tensor:
    """Smallest power of two that divides `largest` (float32, not negative) into the range."""
    _, exponent = torch.frexp(largest / LARGEST)
    return torch.ldexp(torch.ones_like(largest), exponent)


def _first_keys(num_keys: int, block_size: int, starts: Tensor | None, device) -> Tensor:
    """(B or 1, S) int64: the first key of each key's block."""
    position = torch.arange(num_keys, device=device)[None]
    start = torch.zeros_like(position) if starts is None else starts.long()
    return start + (position - start) // block_size * block_size


@torch.no_grad()
def quantize_index(
    index_q: Tensor, index_k: Tensor, *, block_size: int, document_ids: DocumentIds = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Round to float8_e4m3fn.

    Args:
        index_q: (B, G, T, D); index_k: (B, 1, S, D).

    Returns:
        index q and index k in float8_e4m3fn, and the factor of each key's block, (B, S) float32:
        the index score is q8 . (k8 * factor), up to a positive factor of the row.
    """
    batch, _, num_keys, _ = index_k.shape
    wide_q, wide_k = index_q.float(), index_k.float()
    q8 = (wide_q / _power_of_two(wide_q.abs().amax(-1, keepdim=True))).to(torch.float8_e4m3fn)
    first = _first_keys(num_keys, block_size, key_starts(document_ids), index_k.device)
    first = first.expand(batch, num_keys)
    largest = wide_k[:, 0].abs().amax(-1)
    by_block = torch.zeros_like(largest).scatter_reduce_(1, first, largest, "amax")
    factors = _power_of_two(by_block.gather(1, first))
    k8 = (wide_k / factors[:, None, :, None]).to(torch.float8_e4m3fn)
    return q8, k8, factors


def round_index(
    index_q: Tensor, index_k: Tensor, *, block_size: int, document_ids: DocumentIds = None
) -> tuple[Tensor, Tensor]:
    """The values that fp8 ranks by, in float32: what `quantize_index` keeps, for backends without fp8."""
    q8, k8, factors = quantize_index(
        index_q, index_k, block_size=block_size, document_ids=document_ids
    )
    return q8.float(), k8.float() * factors[:, None, :, None]
