"""The only door to the operations: picks a backend, checks what the caller passed.

Backends: `reference` materialises everything (definitions, tests), `torch` works in tiles on any device,
`triton` runs kernels on CUDA devices (on CPU under Triton's interpreter, for tests), `auto` is `triton` for
tensors on a CUDA device and `torch` elsewhere. A backend is a module with the functions named below.

Layouts: q (B, H, T, D), k and v (B, G, S, D), index q (B, G, T, D_idx), index k (B, 1, S, D_idx), block
ids (B, G, T, K) int32 ascending and -1 padded, lse (B, H, T). `document_ids` is (B, S) int32 over the
keys, or None for one document a row, or `documents.Documents`, which is made of the ids once and serves all
layers of a pass; block ids count from the document's own first block. Equations and meaning: reference.py.
"""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from . import reference, tiled, tiled_kl
from .documents import DocumentIds, ids_of, key_starts
from .fp8 import round_index

BACKENDS = ("auto", "reference", "torch", "triton")
"""Names that `backend=` takes."""
Precision = Literal["input", "fp8"]
"""Of index scores: the tensors' own, or e4m3 with a factor a key block (fp8.py)."""

_TORCH = SimpleNamespace(
    select_blocks=tiled.select_blocks,
    select_by_mass=tiled.select_by_mass,
    dense_attention=tiled.dense_attention,
    sparse_attention=tiled.sparse_attention,
    sparse_decode=tiled.sparse_decode,
    index_kl=tiled_kl.index_kl,
)


def resolve(backend: str, device: torch.device) -> str:
    """Name of the backend that runs tensors of `device`; `auto` is looked up, a wrong name refused."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return "triton" if device.type == "cuda" else "torch"
    return backend


def _operation(name: str, backend: str, tensor: Tensor) -> Any:
    chosen = resolve(backend, tensor.device)
    if chosen == "triton":
        return getattr(_triton(), name)
    if chosen == "torch":
        return getattr(_TORCH, name)
    defined = getattr(reference, name)
    return lambda *tensors, document_ids=None, **options: defined(
        *tensors, document_ids=ids_of(document_ids), **options
    )


def _triton() -> ModuleType:
    """The Triton backend, imported when it is first asked for."""
    if find_spec("triton") is None:
        raise ValueError(
            "backend='triton' (the default on a CUDA device) needs Triton, which is not installed: "
            "pip install 'triton>=3.6,<3.10', or set backend='torch'"
        )
    from . import triton_ops

    return triton_ops


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
    precision: Precision = "input",
    backend: str = "auto",
) -> Tensor:
    """Block ids (B, G, T, top_k) int32 of the best blocks by index score; no gradient."""
    _check_index(index_q, index_k)
    _check_offset(index_q, index_k, query_offset)
    _check_documents(document_ids, index_k)
    _check_budget(block_size, top_k, local_blocks, init_blocks)
    operation = _operation("select_blocks", backend, index_q)
    options: dict[str, Any] = {}
    if precision not in ("input", "fp8"):
        raise ValueError(f"precision={precision!r} is neither 'input' nor 'fp8'")
    if precision == "fp8" and resolve(backend, index_q.device) == "triton":
        options["precision"] = precision
    elif precision == "fp8":
        index_q, index_k = round_index(
            index_q, index_k, block_size=block_size, document_ids=document_ids
        )
    return operation(
        index_q,
        index_k,
        **options,
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
    document_ids: DocumentIds = None,
    query_offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Block ids (B, G, T, top_k) int32 of the blocks with the largest true attention mass (oracle)."""
    _check_main(q, k, k)
    _check_offset(q, k, query_offset)
    _check_documents(document_ids, k)
    _check_budget(block_size, top_k, local_blocks, init_blocks)
    return _operation("select_by_mass", backend, q)(
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
    document_ids: DocumentIds = None,
    query_offset: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal attention: out (B, H, T, D) and lse (B, H, T); differentiable in q, k, v through `out`."""
    _check_main(q, k, v)
    _check_offset(q, k, query_offset)
    _check_documents(document_ids, k)
    return _operation("dense_attention", backend, q)(
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
    document_ids: DocumentIds = None,
    query_offset: int = 0,
    validate: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention over the selected blocks: out and lse; differentiable in q, k, v through `out`.

    `validate` looks at every block id (a synchronisation): ascending, padded on the right, none after the
    query's own block.
    """
    _check_main(q, k, v)
    _check_offset(q, k, query_offset)
    _check_documents(document_ids, k)
    _check_block_ids(block_ids, q, k)
    if validate:
        _check_id_values(block_ids, block_size, document_ids, query_offset)
    return _operation("sparse_attention", backend, q)(
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
    document_ids: DocumentIds = None,
    fraction: float = 1.0,
    seed: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Scalar KL(teacher || student), mean over rows and index heads; differentiable in index q and k only.

    `block_ids=None` takes every visible token (warm-up) and the dense lse; with block ids, `lse` is that
    of sparse_attention over the same ids. `fraction` below 1 (full rows only) computes that share of the
    query tiles, drawn from `seed`, and is an unbiased estimate of the value and of its gradients.
    """
    _check_main(q, k, k)
    _check_index(index_q, index_k, k)
    _check_documents(document_ids, k)
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"{q.shape[2]} queries and {k.shape[2]} keys: the KL is of whole rows, run without a cache"
        )
    if not 0 < fraction <= 1 or (fraction < 1 and block_ids is not None):
        raise ValueError(
            f"fraction={fraction}: a share of query tiles above 0 and up to 1, below 1 for full rows only"
        )
    options: dict[str, Any] = {}
    if fraction < 1:
        if resolve(backend, q.device) == "reference":
            raise ValueError(
                "backend='reference' defines the whole KL: set fraction=1 or another backend"
            )
        options = {"fraction": fraction, "seed": seed}
    if block_ids is not None:
        _check_block_ids(block_ids, q, k)
        if block_size is None:
            raise ValueError("block_ids need block_size")
    return _operation("index_kl", backend, q)(
        q,
        k,
        lse,
        index_q,
        index_k,
        **options,
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
    document_ids: DocumentIds = None,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Selection and attention for one new token, the last cached one: out (B, H, 1, D).

    The new token is the last of the S keys, or key `lengths[b] - 1` where `lengths` (B,) int32 says how
    many keys of each row are in use.
    """
    _check_main(q, k, v)
    _check_index(index_q, index_k, k)
    _check_documents(document_ids, k)
    _check_budget(block_size, top_k, local_blocks, init_blocks)
    if q.shape[2] != 1 or index_q.shape[2] != 1:
        raise ValueError(
            f"sparse_decode takes one new token, got {q.shape[2]}: use sparse_attention"
        )
    if lengths is not None and tuple(lengths.shape) != k.shape[:1]:
        raise ValueError(
            f"lengths has shape {tuple(lengths.shape)}: one number a row of the batch of {k.shape[0]}"
        )
    return _operation("sparse_decode", backend, q)(
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
        lengths=lengths,
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


def _check_documents(document_ids: DocumentIds, k: Tensor) -> None:
    ids, expected = ids_of(document_ids), (k.shape[0], k.shape[2])
    if ids is not None and tuple(ids.shape) != expected:
        raise ValueError(f"document_ids has shape {tuple(ids.shape)}, the keys {expected}")


def _check_block_ids(block_ids: Tensor, q: Tensor, k: Tensor) -> None:
    expected = (q.shape[0], k.shape[1], q.shape[2])
    if tuple(block_ids.shape[:3]) != expected:
        raise ValueError(
            f"block_ids has shape {tuple(block_ids.shape)}, expected {(*expected, 'K')}"
        )


def _check_id_values(
    block_ids: Tensor, block_size: int, document_ids: DocumentIds, query_offset: int
) -> None:
    num_queries = block_ids.shape[2]
    position = torch.arange(num_queries, device=block_ids.device) + query_offset
    starts = key_starts(document_ids)
    if starts is None:
        current = (position // block_size)[None]
    else:
        current = (position - starts[:, position]) // block_size
    before, after = block_ids[..., :-1], block_ids[..., 1:]
    problems = {
        "an id below -1": block_ids < -1,
        "ids out of order": (after >= 0) & ((before < 0) | (after <= before)),
        "an id after the query's own block": block_ids > current[:, None, :, None],
        "no id of the query's own block": (block_ids == current[:, None, :, None]).sum(-1, True)
        != 1,
    }
    for problem, found in problems.items():
        if found.any():
            row, group, query, _ = found.nonzero()[0].tolist()
            listed = block_ids[row, group, query].tolist()
            raise ValueError(
                f"block_ids[{row}, {group}, {query}] = {listed} has {problem}: ids ascend, -1 pads on the "
                f"right, and the last is the own block, {current[min(row, len(current) - 1), query]}"
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
