"""Dense causal attention by the fastest library at hand, with its log-sum-exp, forward and backward.

Used on CUDA devices for warm-up, dense layers and rows that fit the budget; the definition is
reference.dense_attention. `candidates` names the libraries in the order in which they are tried:

    fa4     flash-attention 4 (`flash_attn.cute`), written for Blackwell: only there
    fa3     flash-attention 3 (`flash_attn_interface`), written for Hopper: only there
    cudnn   torch's cuDNN operator, Hopper and newer; whole rows and long chunks only, see MIN_CHUNK
    flash   torch's own flash-attention 2 operator, Ampere and newer; any shape

The order is what the authors of these kernels publish about them; benchmarks/kernels.py compares the last
two on the device at hand. All four share keys between the heads of a group, so keys are never repeated.
Packed documents go to the variable-length form of fa4, fa3 or flash (cuDNN's takes no groups in torch);
documents of one length become rows of a batch, and any library serves them.
A chunk of queries after cached keys (S > T) is one call where the causal mask is aligned at the last key
(fa4, fa3, flash); for cuDNN, whose mask is aligned at the first, see library_merge.py.

What no library serves (float32, float64, a width that is no multiple of 8 or above 256) runs in the tiles
of tiled.py; a debug line says so once.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import tiled
from .documents import DocumentIds, Documents, Packed
from .library_merge import CUDNN, piecewise_attention

logger = logging.getLogger(__name__)

MIN_CHUNK = 1024
"""Shortest chunk of queries after cached keys that goes to cuDNN: it plans for every new shape, and in
decoding every step has a new one. Not measured."""

_MODULES = {"fa4": "flash_attn.cute", "fa3": "flash_attn_interface"}


@dataclass(frozen=True)
class Library:
    """One library. `causal` takes q (B, H, T, D) and k, v (B, G, S, D), S >= T, mask aligned at the last
    key; `packed` takes tokens in a row, q (N, H, D) and k, v (M, G, D), the bounds of the documents in both
    ((documents + 1,) int32) and the longest lengths. Both return out and a log-sum-exp, (B, H, T) and
    (H, N), and are differentiable in q, k, v through out."""

    name: str
    causal: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    packed: Callable[..., tuple[Tensor, Tensor]] | None


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    document_ids: DocumentIds = None,
    query_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """See reference.dense_attention; differentiable in q, k and v through `out`.

    Returns:
        out (B, H, T, D) in q's dtype, lse (B, H, T) float32, natural logarithm, without a gradient.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    names = _candidates_for(q)
    if not names:
        _say_once(f"no library serves {q.dtype} of width {q.shape[-1]} on {q.device.type}: tiles")
        return tiled.dense_attention(
            q, k, v, scale=scale, document_ids=document_ids, query_offset=query_offset
        )
    packed = packed_documents(q, document_ids, query_offset)
    plain = packed is None or packed.equal
    long = query_offset == 0 or q.shape[2] >= MIN_CHUNK
    fits = [name for name in names if name != "cudnn" or (plain and long)]
    library = LIBRARIES[fits[0]]
    _say_once(f"{library.name} serves {q.dtype} of width {q.shape[-1]}")
    return attend_with(library, q, k, v, scale, packed, query_offset)


def candidates(
    capability: tuple[int, int], dtype: torch.dtype, width: int, installed: Iterable[str]
) -> tuple[str, ...]:
    """Names of the libraries that serve such heads, best first.

    Args:
        capability: compute capability of the device, (9, 0) for Hopper.
        width: head width D of q, k and v.
        installed: what is there, of "fa4", "fa3", "cudnn", "flash".
    """
    major = capability[0]
    if dtype not in (torch.bfloat16, torch.float16) or width % 8 or width > 256:
        return ()
    # cuDNN's limit on wide heads is torch's own (sdp_utils.cpp): 256 on Hopper, else 128.
    widest_cudnn = 256 if capability == (9, 0) else 128
    serves = {
        "fa4": major == 10 and width in (64, 96, 128),
        "fa3": major == 9,
        "cudnn": major >= 9 and width <= widest_cudnn,
        "flash": major >= 8,
    }
    there = set(installed)
    return tuple(name for name, fine in serves.items() if fine and name in there)


@functools.cache
def installed() -> frozenset[str]:
    """Names of the libraries that can be imported here; nothing is imported but parent packages."""
    found = {name for name, module in _MODULES.items() if _importable(module)}
    if torch.backends.cudnn.is_available() and torch.backends.cudnn.version() >= 91000:
        found.add("cudnn")
    if torch.backends.cuda.is_flash_attention_available():
        found.add("flash")
    return frozenset(found)


def packed_documents(q: Tensor, document_ids: DocumentIds, query_offset: int) -> Packed | None:
    """The documents that hold a query, or None where each row is one document from its first key on.

    Training always passes ids, and unpacked rows are for the faster kernels. Waits for the device once
    where the ids are a plain tensor, see `Documents`.
    """
    if document_ids is None:
        return None
    made = document_ids if isinstance(document_ids, Documents) else Documents.of(document_ids)
    return made.packed(q.shape[2], query_offset)


def attend_with(
    library: Library,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    packed: Packed | None,
    query_offset: int,
) -> tuple[Tensor, Tensor]:
    """Dense attention of one library, documents (from `packed_documents`) and offset included."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if packed is not None and packed.equal:
        return _equal_documents(library, q, k, v, scale, packed.max_queries)
    if packed is not None:
        return _documents(library, q, k, v, scale, packed, query_offset)
    num_keys = query_offset + q.shape[2]
    out, lse = library.causal(q, k[:, :, :num_keys], v[:, :, :num_keys], scale)
    return out, lse.detach()


def _equal_documents(
    library: Library, q: Tensor, k: Tensor, v: Tensor, scale: float, length: int
) -> tuple[Tensor, Tensor]:
    """Documents of one length as rows of a batch, which every library serves."""
    batch, _, num_queries, _ = q.shape

    def apart(x: Tensor) -> Tensor:
        return x[:, :, :num_queries].unflatten(2, (-1, length)).transpose(1, 2).flatten(0, 1)

    out, lse = library.causal(apart(q), apart(k), apart(v), scale)
    out, lse = (x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3) for x in (out, lse))
    return out, lse.detach()


def _documents(
    library: Library,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    packed: Packed,
    query_offset: int,
) -> tuple[Tensor, Tensor]:
    """Every document of every row in one call."""
    assert library.packed is not None
    batch, _, num_queries, _ = q.shape
    last = query_offset + num_queries
    # Documents that end before the first query are left out, so rows may hold unequal numbers of keys.
    parts = packed.pieces
    first = [min(p.keys.start for p in parts if p.rows.start == row) for row in range(batch)]
    queries = q.transpose(1, 2).flatten(0, 1)
    keys, values = (
        torch.cat([x[row, :, start:last].transpose(0, 1) for row, start in enumerate(first)])
        if any(first)
        else x[:, :, :last].transpose(1, 2).flatten(0, 1)
        for x in (k, v)
    )
    bounds = packed.query_bounds, packed.key_bounds
    longest = packed.max_queries, packed.max_keys
    out, lse = library.packed(queries, keys, values, *bounds, *longest, scale)
    out = out.unflatten(0, (batch, num_queries)).transpose(1, 2)
    return out, lse.detach().unflatten(1, (batch, num_queries)).transpose(0, 1)


def _candidates_for(q: Tensor) -> tuple[str, ...]:
    if q.device.type != "cuda":
        return ()
    capability = torch.cuda.get_device_capability(q.device)
    return candidates(capability, q.dtype, q.shape[-1], installed())


@functools.cache
def _say_once(line: str) -> None:
    logger.debug("dense attention: %s", line)


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def _cudnn_causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return piecewise_attention(q, k, v, scale, CUDNN)


def _flash_causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    found = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, True, False, scale=scale
    )
    return found[0], found[1]


def _flash_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_bounds: Tensor,
    key_bounds: Tensor,
    max_queries: int,
    max_keys: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    found = torch.ops.aten._flash_attention_forward(
        q, k, v, query_bounds, key_bounds, max_queries, max_keys, 0.0, True, False, scale=scale
    )
    return found[0], found[1]


def _outside(name: str) -> Library:
    """flash-attention 3 or 4 by its public functions, which take (B, T, H, D)."""

    def causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        function = importlib.import_module(_MODULES[name]).flash_attn_func
        swapped = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = function(*swapped, softmax_scale=scale, causal=True, **asking_for_lse(function))
        return out.transpose(1, 2), lse

    def packed(q, k, v, query_bounds, key_bounds, max_queries, max_keys, scale):
        function = importlib.import_module(_MODULES[name]).flash_attn_varlen_func
        return function(
            q,
            k,
            v,
            cu_seqlens_q=query_bounds,
            cu_seqlens_k=key_bounds,
            max_seqlen_q=max_queries,
            max_seqlen_k=max_keys,
            softmax_scale=scale,
            causal=True,
            **asking_for_lse(function),
        )

    return Library(name, causal, packed)


def asking_for_lse(function: Callable[..., Any]) -> dict[str, bool]:
    """The keyword that makes a flash-attention function return (out, lse); old ones always do."""
    known = inspect.signature(function).parameters
    return {name: True for name in ("return_lse", "return_attn_probs") if name in known}


LIBRARIES = {
    "fa4": _outside("fa4"),
    "fa3": _outside("fa3"),
    "cudnn": Library("cudnn", _cudnn_causal, None),
    "flash": Library("flash", _flash_causal, _flash_packed),
}
