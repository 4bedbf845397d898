"""What codegen.py compiles: launches of every kernel on tensors without memory, by name.

Each case is a length and head layout that people have; a name begins with its operation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from dense2sparse.kernels import triton_attend


def _attend(
    length: int, heads: int, groups: int, width: int, block_size: int, top_k: int, dtype: torch.dtype
) -> None:
    q, k = (
        torch.empty(1, length, number, width, dtype=dtype, device="meta").transpose(1, 2)
        for number in (heads, groups)
    )
    ids = torch.empty(1, groups, length, top_k, dtype=torch.int32, device="meta")
    triton_attend.attend(q, k, k, ids, None, block_size=block_size, scale=width**-0.5)


CASES: dict[str, Callable[[], None]] = {
    f"attend-{heads}/{groups}-d{width}-b{block}-{length >> 10}K": partial(
        _attend, length, heads, groups, width, block, 16, torch.bfloat16
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
