"""Launches of the decode kernels for codegen.py: lengths, head layouts and budgets that people have."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from dense2sparse.kernels import triton_decode


def _decode(
    length: int,
    batch: int,
    heads: int,
    groups: int,
    width: int,
    block_size: int,
    top_k: int,
    dtype: torch.dtype,
    ragged: bool,
) -> None:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    triton_decode.sparse_decode(
        empty(batch, heads, 1, width),
        empty(batch, groups, length, width),
        empty(batch, groups, length, width),
        empty(batch, groups, 1, width),
        empty(batch, 1, length, width),
        block_size=block_size,
        top_k=top_k,
        document_ids=empty(batch, length, dtype=torch.int32) if ragged else None,
        lengths=empty(batch, dtype=torch.int32) if ragged else None,
    )


_BF16, _F32 = torch.bfloat16, torch.float32

CASES: dict[str, Callable[[], None]] = {
    f"decode-{heads}/{groups}-d{width}-b{block}-k{top_k}-{length >> 10}K-batch{batch}"
    f"{'-f32' if dtype == _F32 else ''}": partial(
        _decode, length, batch, heads, groups, width, block, top_k, dtype, batch > 1
    )
    for length, batch, heads, groups, width, block, top_k, dtype in (
        (1 << 20, 1, 64, 4, 128, 128, 16, _BF16),
        (1 << 20, 8, 64, 4, 128, 128, 64, _BF16),
        (1 << 17, 1, 64, 4, 128, 128, 64, _BF16),
        (1 << 17, 8, 64, 4, 128, 128, 16, _BF16),
        (1 << 20, 8, 32, 8, 128, 128, 16, _BF16),
        (1 << 20, 1, 32, 8, 128, 128, 64, _BF16),
        (1 << 17, 1, 32, 8, 128, 128, 16, _BF16),
        (1 << 22, 1, 28, 4, 128, 32, 64, _BF16),
        (1 << 13, 1, 9, 3, 64, 32, 16, _BF16),
        (1 << 17, 1, 8, 8, 80, 128, 16, _BF16),
        (1 << 17, 1, 12, 2, 96, 64, 16, _BF16),
        (1 << 17, 2, 10, 2, 192, 256, 16, _BF16),
        (1 << 17, 1, 64, 1, 256, 128, 16, _BF16),
        (1 << 17, 1, 64, 4, 128, 128, 16, _F32),
        (1 << 17, 1, 8, 4, 256, 16, 16, _F32),
    )
}
