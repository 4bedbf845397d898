"""Launches of the KL kernels for codegen.py: full rows, and selected blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from dense2sparse.kernels import triton_kl, triton_sparse_kl


def _kl(
    length: int,
    heads: int,
    groups: int,
    width: int,
    index_width: int,
    block_size: int,
    dtype: torch.dtype,
) -> None:
    """Full rows where `block_size` is 0. Layouts are those that transformers passes."""
    q, k, index_q, index_k = (
        torch.empty(1, length, number, wide, dtype=dtype, device="meta").transpose(1, 2)
        for number, wide in (
            (heads, width),
            (groups, width),
            (groups, index_width),
            (1, index_width),
        )
    )
    lse = torch.empty(1, heads, length, dtype=torch.float32, device="meta")
    options = {
        "scale": width**-0.5,
        "index_scale": index_width**-0.5,
        "need_grad": True,
    }
    if not block_size:
        triton_kl.full_kl(q, k, lse, index_q, index_k, None, **options)
        return
    ids = torch.empty(1, groups, length, 16, dtype=torch.int32, device="meta")
    triton_sparse_kl.sparse_kl(
        q, k, lse, index_q, index_k, ids, None,
        block_size=block_size, **options,
    )  # fmt: skip


CASES: dict[str, Callable[[], None]] = {
    f"{kind}-{heads}/{groups}-d{width}-i{index_width}-{str(dtype)[6:]}": partial(
        _kl,
        length,
        heads,
        groups,
        width,
        index_width,
        0 if kind == "kl" else block,
        dtype,
    )
    # Heads a group are a number at run time: few layouts stand for all.
    for length, heads, groups, width, index_width, block, dtype in (
        (1 << 17, 64, 4, 128, 128, 128, torch.bfloat16),
        (1 << 17, 32, 8, 128, 128, 128, torch.bfloat16),
        (1 << 15, 28, 4, 128, 128, 64, torch.bfloat16),
        (1 << 15, 9, 3, 64, 64, 32, torch.bfloat16),
        (1 << 15, 9, 3, 64, 128, 32, torch.bfloat16),
        (1 << 15, 12, 2, 96, 96, 128, torch.bfloat16),
        (1 << 15, 8, 4, 256, 128, 128, torch.bfloat16),
        (1 << 13, 32, 8, 128, 128, 128, torch.float32),
    )
    for kind in ("kl", "sparse-kl")
}
