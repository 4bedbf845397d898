"""Launches of the sparse attention's backward kernels for codegen.py, on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from dense2sparse.kernels import triton_attend_backward


def _backward(
    length: int,
    heads: int,
    groups: int,
    width: int,
    block_size: int,
    dtype: torch.dtype,
    deterministic: bool,
    documents: bool,
) -> None:
    q, k = (
        torch.empty(1, length, number, width, dtype=dtype, device="meta").transpose(1, 2)
        for number in (heads, groups)
    )
    triton_attend_backward.attend_backward(
        q,
        k,
        k,
        torch.empty(1, groups, length, 16, dtype=torch.int32, device="meta"),
        torch.empty(1, length, dtype=torch.int32, device="meta") if documents else None,
        q,
        torch.empty(1, heads, length, device="meta"),
        q,
        block_size=block_size,
        scale=width**-0.5,
        deterministic=deterministic,
    )


CASES: dict[str, Callable[[], None]] = {
    f"backward-{heads}/{groups}-d{width}-b{block}-{length >> 10}K"
    + ("-deterministic" if deterministic else "-fast")
    + ("-packed" if documents else ""): partial(
        _backward, length, heads, groups, width, block, torch.bfloat16, deterministic, documents
    )
    for length, heads, groups, width, block, documents in (
        (1 << 20, 64, 4, 128, 128, False),
        (1 << 17, 32, 8, 128, 128, True),
        (1 << 17, 32, 8, 128, 128, False),
        (1 << 17, 28, 4, 128, 64, False),
        (1 << 15, 16, 8, 128, 32, False),
        (1 << 15, 24, 8, 64, 128, True),
        (1 << 15, 24, 8, 64, 64, False),
        (1 << 13, 9, 3, 64, 32, True),
        (1 << 17, 8, 8, 80, 128, False),
        (1 << 17, 10, 2, 192, 64, False),
        (1 << 17, 8, 4, 256, 128, False),
    )
    for deterministic in (False, True)
}
