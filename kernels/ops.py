"""The only door to the operations: picks a backend, checks what the caller passed.

Backends: `reference` materialises everything (definitions, tests), `torch` works in tiles on any device,
`auto` is the fastest one that this version has for the tensors' device. A backend is a module with the
functions named below; further ones (Triton) register in `_BACKENDS`.

Layouts: q (B, H, T, D), k and v (B, G, S, D), index q (B, G, T, D_idx), index k (B, 1, S, D_idx), block
ids (B, G, T, K) int32 ascending and -1 padded, lse (B, H, T). `document_ids` is (B, S) int32 over the
keys, or None for one document a row; block ids count from the document's own first block. Equations and
meaning of each operation: reference.py.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor

from . import reference, tiled, tiled_kl

_BACKENDS: dict[str, ModuleType | SimpleNamespace] = {
    "reference": reference,
    "torch": SimpleNamespace(
        select_blocks=tiled.select_blocks,
        select_by_mass=tiled.select_by_mass,
        dense_attention=tiled.dense_attention,
        sparse_attention=tiled.sparse_attention,
        sparse_decode=tiled.sparse_decode,
        index_kl=tiled_kl.index_kl,
    ),
}


def backends() -> list[str]:
    """Names that `backend=` takes here."""
    return ["auto", *_BACKENDS]


def _operation(name: str, backend: str) -> Any:
    chosen = "torch" if backend == "auto" else backend
    if chosen not in _BACKENDS:
        raise ValueError(f"backend={backend!r} is not available here: use one of {backends()}")
    return getattr(_BACKENDS[chosen], name)


def select_blocks(
    index_q: Tensor,
    index_k: Tensor,
    *,
    block_size: int,
    top_k: int,
    local_blocks: int = 1,
    init_blocks: int = 0,
    document_ids: Tensor | None = None,
    query_offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Block ids (B, G, T, top_k) int32 of the best blocks by index score; no gradient."""
    _check_index(index_q, index_k)
    _check_offset(index_q, index_k, query_offset)
    _check_documents(document_ids, index_k)
    _check_budget(block_size, top_k, local_blocks, init_blocks)
    return _operation("select_blocks", backend)(
        index_q,
        index_k,
        block_size=block_size,
        top_k=top_k,
        local_blocks=local_blocks,
        init_blocks=init_blocks,
        document_ids=document_ids,
        query_offset=query_offset,
    )


def select_by_mass(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int,
    top_k: int,
    scale: float | None = None,
    local_blocks: int = 1,
    init_blocks: int = 0,
    document_ids: Tensor | None = None,
    query_offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Block ids (B, G, T, top_k) int32 of the blocks with the largest true attention mass (oracle)."""
    _check_main(q, k, k)
    _check_offset(q, k, query_offset)
    _check_documents(document_ids, k)
    _check_budget(block_size, top_k, local_blocks, init_blocks)
    return _operation("select_by_mass", backend)(
        q,
        k,
        block_size=block_size,
        top_k=top_k,
        scale=scale,
        local_blocks=local_blocks,
        init_blocks=init_blocks,
        document_ids=document_ids,
        query_offset=query_offset,
    )


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    document_ids: Tensor | None = None,
    query_offset: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal attention: out (B, H, T, D) and lse (B, H, T); differentiable in q, k, v through `out`."""
    _check_main(q, k, v)
    _check_offset(q, k, query_offset)
    _check_documents(document_ids, k)
    return _operation("dense_attention", backend)(
        q, k, v, scale=scale, document_ids=document_ids, query_offset=query_offset
    )


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_ids: Tensor,
    *,
    block_size: int,
    scale: float | None = None,
    document_ids: Tensor | None = None,
    query_offset: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention over the selected blocks: out and lse; differentiable in q, k, v through `out`."""
    _check_main(q, k, v)
    _check_offset(q, k, query_offset)
    _check_documents(document_ids, k)
    _check_block_ids(block_ids, q, k)
    return _operation("sparse_attention", backend)(
        q,
        k,
        v,
        block_ids,
        block_size=block_size,
        scale=scale,
        document_ids=document_ids,
        query_offset=query_offset,
    )


def index_kl(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    *,
    scale: float | None = None,
    index_scale: float | None = None,
    block_ids: Tensor | None = None,
    block_size: int | None = None,
    document_ids: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Scalar KL(teacher || student), mean over rows and index heads; differentiable in index q and k only.

    `block_ids=None` takes every visible token (warm-up) and the dense lse; with block ids, `lse` is that
    of sparse_attention over the same ids.
    """
    _check_main(q, k, k)
    _check_index(index_q, index_k, k)
    _check_documents(document_ids, k)
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"{q.shape[2]} queries and {k.shape[2]} keys: the KL is of whole rows, run without a cache"
        )
    if block_ids is not None:
        _check_block_ids(block_ids, q, k)
        if block_size is None:
            raise ValueError("block_ids need block_size")
    return _operation("index_kl", backend)(
        q,
        k,
        lse,
        index_q,
        index_k,
        scale=scale,
        index_scale=index_scale,
        block_ids=block_ids,
        block_size=block_size,
        document_ids=document_ids,
    )


def sparse_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    *,
    block_size: int,
    top_k: int,
    local_blocks: int = 1,
    init_blocks: int = 0,
    scale: float | None = None,
    document_ids: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Selection and attention for one new token, the last of the S cached ones: out (B, H, 1, D)."""
    _check_main(q, k, v)
    _check_index(index_q, index_k, k)
    _check_documents(document_ids, k)
    _check_budget(block_size, top_k, local_blocks, init_blocks)
    if q.shape[2] != 1 or index_q.shape[2] != 1:
        raise ValueError(
            f"sparse_decode takes one new token, got {q.shape[2]}: use sparse_attention"
        )
    return _operation("sparse_decode", backend)(
        q,
        k,
        v,
        index_q,
        index_k,
        block_size=block_size,
        top_k=top_k,
        local_blocks=local_blocks,
        init_blocks=init_blocks,
        scale=scale,
        document_ids=document_ids,
    )


def _check_main(q: Tensor, k: Tensor, v: Tensor) -> None:
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"{shapes}: expected (B, H, T, D), (B, G, S, D), (B, G, S, D)")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly")


def _check_offset(queries: Tensor, keys: Tensor, query_offset: int) -> None:
    if query_offset < 0 or query_offset + queries.shape[2] > keys.shape[2]:
        raise ValueError(
            f"query_offset={query_offset}: {queries.shape[2]} queries from there on are more than the "
            f"{keys.shape[2]} keys"
        )


def _check_index(index_q: Tensor, index_k: Tensor, k: Tensor | None = None) -> None:
    if k is not None and index_q.shape[1] != k.shape[1]:
        raise ValueError(
            f"index_q has {index_q.shape[1]} heads and k has {k.shape[1]}: one index head a KV group"
        )
    if index_k.shape[1] != 1 or index_q.shape[-1] != index_k.shape[-1]:
        shapes = f"index_q {tuple(index_q.shape)}, index_k {tuple(index_k.shape)}"
        raise ValueError(f"{shapes}: expected (B, G, T, D_idx) and (B, 1, S, D_idx)")


def _check_documents(document_ids: Tensor | None, k: Tensor) -> None:
    expected = (k.shape[0], k.shape[2])
    if document_ids is not None and tuple(document_ids.shape) != expected:
        raise ValueError(f"document_ids has shape {tuple(document_ids.shape)}, the keys {expected}")


def _check_block_ids(block_ids: Tensor, q: Tensor, k: Tensor) -> None:
    expected = (q.shape[0], k.shape[1], q.shape[2])
    if tuple(block_ids.shape[:3]) != expected:
        raise ValueError(
            f"block_ids has shape {tuple(block_ids.shape)}, expected {(*expected, 'K')}"
        )


def _check_budget(block_size: int, top_k: int, local_blocks: int, init_blocks: int) -> None:
    if block_size < 1 or local_blocks < 1 or init_blocks < 0:
        raise ValueError(
            f"block_size={block_size}, local_blocks={local_blocks}, init_blocks={init_blocks}: "
            "blocks hold at least one token and the query's own block is always local"
        )
    if top_k < local_blocks + init_blocks:
        raise ValueError(
            f"top_k={top_k} cannot hold {local_blocks} local and {init_blocks} first blocks"
        )
