"""Cases of codegen.py: selection and sparse attention, launched on tensors without memory.

A name begins with the operation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from dense2sparse.kernels import triton_attend, triton_select


def _attend(
    length: int,
    heads: int,
    groups: int,
    width: int,
    block_size: int,
    top_k: int,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    q, k = (
        torch.empty(1, length, number, width, dtype=dtype, device="meta").transpose(1, 2)
        for number in (heads, groups)
    )
    ids = torch.empty(1, groups, length, top_k, dtype=torch.int32, device="meta")
    triton_attend.attend(q, k, k, ids, None, block_size=block_size, scale=width**-0.5)


def _select(
    length: int, heads: int, width: int, top_k: int, dtype: torch.dtype, packed: bool = False
) -> None:
    index_q, index_k = (
        torch.empty(1, length, number, width, dtype=dtype, device="meta").transpose(1, 2)
        for number in (heads, 1)
    )
    starts = torch.empty(1, length, dtype=torch.int32, device="meta") if packed else None
    scales = None
    if dtype == torch.float8_e4m3fn:
        scales = torch.empty(1, length, device="meta")
    triton_select.select(index_q, index_k, starts, block_size=128, top_k=top_k, key_scales=scales)


CASES: dict[str, Callable[[], None]] = {
    f"attend-{heads}/{groups}-d{width}-b{block}-{length >> 10}K": partial(
        _attend, length, heads, groups, width, block, 16
    )
    for length, heads, groups, width, block in (
        (1 << 20, 64, 4, 128, 128),
        (1 << 17, 32, 8, 128, 128),
        (1 << 17, 28, 4, 128, 64),
        (1 << 13, 9, 3, 64, 32),
        (1 << 17, 8, 8, 80, 128),
        (1 << 17, 12, 2, 96, 128),
        (1 << 17, 10, 2, 192, 64),
        (1 << 17, 8, 4, 256, 128),
    )
}
CASES |= {
    f"select-{heads}-d{width}-k{top_k}-{str(dtype)[6:]}{'-packed' * packed}": partial(
        _select, 1 << 17, heads, width, top_k, dtype, packed
    )
    for heads, width, top_k, dtype, packed in (
        (4, 128, 16, torch.bfloat16, False),
        (8, 128, 16, torch.bfloat16, True),
        (3, 64, 16, torch.bfloat16, False),
        (4, 128, 64, torch.bfloat16, False),
        (2, 256, 16, torch.bfloat16, False),
        (4, 96, 16, torch.bfloat16, True),
        (4, 128, 16, torch.float16, True),
        (4, 128, 16, torch.float8_e4m3fn, False),
        (4, 128, 16, torch.float8_e4m3fn, True),
        (4, 128, 16, torch.float32, True),
    )
}
CASES |= {
    f"attend-32/8-d128-b128-32K-{str(dtype)[6:]}": partial(
        _attend, 1 << 15, 32, 8, 128, 128, 16, dtype
    )
    for dtype in (torch.float16, torch.float32)
}
