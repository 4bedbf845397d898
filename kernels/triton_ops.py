"""The Triton backend: the operations of reference.py as kernels, with the same signatures.

Loaded by ops.py when a call first asks for it. What no kernel is for: full attention is a library's
(library_dense.py), the oracle selection is a measurement and stays in torch tiles.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from . import library_dense, tiled, triton_decode, triton_kl
from .documents import DocumentIds, ids_of, key_starts
from .fp8 import quantize_index
from .triton_attend import attend
from .triton_attend_backward import attend_backward
from .triton_select import select
from .triton_support import (
    check_block_size,
    check_tensors,
    check_top_k,
    check_version,
    check_width,
    interpreting,
    target_arch,
)

select_by_mass = tiled.select_by_mass


def select_blocks(
    index_q: Tensor,
    index_k: Tensor,
    *,
    block_size: int,
    top_k: int,
    local_blocks: int = 1,
    init_blocks: int = 0,
    document_ids: DocumentIds = None,
    query_offset: int = 0,
    precision: Literal["input", "fp8"] = "input",
) -> Tensor:
    """See reference.select_blocks; `precision="fp8"` ranks by e4m3 scores (fp8.py).

    Raises:
        ValueError: what no kernel serves, or fp8 on a device without it.
    """
    _check(index_q=index_q, index_k=index_k, document_ids=ids_of(document_ids))
    check_width("index_q", index_q.shape[-1])
    check_block_size(block_size)
    check_top_k(top_k)
    factors = None
    if precision == "fp8":
        if target_arch() < 89:
            raise ValueError(
                f"index_precision='fp8' needs compute capability 8.9, this device has "
                f"{target_arch() / 10}: use 'input'"
            )
        index_q, index_k, factors = quantize_index(
            index_q, index_k, block_size=block_size, document_ids=document_ids
        )
    return select(
        index_q,
        index_k,
        key_starts(document_ids),
        block_size=block_size,
        top_k=top_k,
        local_blocks=local_blocks,
        init_blocks=init_blocks,
        query_offset=query_offset,
        key_scales=factors,
    )


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    document_ids: DocumentIds = None,
    query_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """See reference.dense_attention; a library's kernel on a GPU, torch's own on CPU."""
    _check(q=q, k=k, v=v, document_ids=ids_of(document_ids))
    library = library_dense if q.is_cuda else tiled
    return library.dense_attention(
        q, k, v, scale=scale, document_ids=document_ids, query_offset=query_offset
    )


class _SparseAttention(torch.autograd.Function):
    """Attention over the selected blocks; keeps inputs, ids, output and log-sum-exp for the backward."""

    @staticmethod
    def forward(ctx, q, k, v, block_ids, starts, options):
        out, lse, _ = attend(q, k, v, block_ids, starts, **options)
        ctx.save_for_backward(q, k, v, block_ids, starts, out, lse)
        ctx.options = options
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, _grad_lse):
        q, k, v, block_ids, starts, out, lse = ctx.saved_tensors
        grads = attend_backward(
            q,
            k,
            v,
            block_ids,
            starts,
            out,
            lse,
            grad_out,
            **ctx.options,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return *grads, None, None, None


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_ids: Tensor,
    *,
    block_size: int,
    scale: float | None = None,
    document_ids: DocumentIds = None,
    query_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """See reference.sparse_attention; differentiable in q, k and v (not through the log-sum-exp).

    The backward pass repeats to the bit under `torch.use_deterministic_algorithms(True)`.
    """
    _check(q=q, k=k, v=v, block_ids=block_ids, document_ids=ids_of(document_ids))
    check_width("q", q.shape[-1])
    check_block_size(block_size)
    check_top_k(block_ids.shape[-1])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if scale <= 0:
        # The backward pass folds its mask into scores that the scale must not turn round.
        raise ValueError(
            f"scale={scale}: the Triton kernels take positive scales; set backend='torch'"
        )
    options: dict[str, Any] = {
        "block_size": block_size,
        "scale": scale,
        "query_offset": query_offset,
    }
    return _SparseAttention.apply(q, k, v, block_ids, key_starts(document_ids), options)


def sparse_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    *,
    block_size: int,
    top_k: int,
    document_ids: DocumentIds = None,
    lengths: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """See reference.sparse_decode."""
    ids = ids_of(document_ids)
    _check(q=q, k=k, v=v, index_q=index_q, index_k=index_k, document_ids=ids, lengths=lengths)
    check_width("q", q.shape[-1])
    check_width("index_q", index_q.shape[-1])
    check_block_size(block_size)
    check_top_k(top_k)
    return triton_decode.sparse_decode(
        q,
        k,
        v,
        index_q,
        index_k,
        block_size=block_size,
        top_k=top_k,
        document_ids=ids,
        lengths=lengths,
        **options,
    )


def index_kl(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    *,
    block_ids: Tensor | None = None,
    block_size: int | None = None,
    document_ids: DocumentIds = None,
    **options: Any,
) -> Tensor:
    """See reference.index_kl."""
    ids = ids_of(document_ids)
    _check(q=q, k=k, index_q=index_q, index_k=index_k, block_ids=block_ids, document_ids=ids)
    check_width("q", q.shape[-1])
    check_width("index_q", index_q.shape[-1])
    if block_size is not None:
        check_block_size(block_size)
    return triton_kl.index_kl(
        q,
        k,
        lse,
        index_q,
        index_k,
        block_ids=block_ids,
        block_size=block_size,
        document_ids=document_ids,
        **options,
    )


def _check(**tensors: Tensor | None) -> None:
    check_version()
    check_tensors(**tensors)
    assert not interpreting() or all(t is None or t.device.type == "cpu" for t in tensors.values())
