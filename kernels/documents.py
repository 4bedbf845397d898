"""Packed rows as a list of plain causal pieces.

The tiled torch path knows only one document at a time: attention, selection and KL of a packed row are
those of each document alone (arXiv 2606.13392 says nothing of packing; blocks start at the document's
first token, so a packed row gives the same result as each document by itself).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Queries and keys of one document in one or more batch rows."""

    rows: slice
    """Batch rows."""
    queries: slice
    """Query range, counted from the first query."""
    keys: slice
    """Key range: the whole document up to the last key at hand."""
    offset: int
    """Position of the first query within the document."""


def pieces(
    num_queries: int, num_keys: int, document_ids: Tensor | None, query_offset: int
) -> Iterator[Piece]:
    """Documents that hold at least one query; one piece for all rows where `document_ids` is None.

    Args:
        document_ids: (B, S) over the keys, equal ids adjacent; queries are the keys
            `query_offset .. query_offset + num_queries - 1`.
    """
    if document_ids is None:
        yield Piece(slice(None), slice(0, num_queries), slice(0, num_keys), query_offset)
        return
    last = query_offset + num_queries
    changes = (document_ids[:, 1:] != document_ids[:, :-1]).nonzero().tolist()
    for row in range(document_ids.shape[0]):
        bounds = [0, *(place + 1 for where, place in changes if where == row), num_keys]
        for start, end in pairwise(bounds):
            first, stop = max(start, query_offset), min(end, last)
            if first < stop:
                yield Piece(
                    slice(row, row + 1),
                    slice(first - query_offset, stop - query_offset),
                    slice(start, stop),
                    first - start,
                )
