"""Packed rows: where their documents begin and end, and the rows as a list of plain causal pieces.

The tiled torch path knows only one document at a time: attention, selection and KL of a packed row are
those of each document alone (arXiv 2606.13392 says nothing of packing; blocks start at the document's
first token, so a packed row gives the same result as each document by itself).

Bounds are needed on the host (to cut rows, to tell a library the longest document) and on the device, and
to bring them to the host waits for the device. So a forward pass makes one `Documents` for all its layers
(model/attention.py); every operation takes it in place of the ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .reference import document_starts


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


@dataclass(frozen=True)
class Packed:
    """The documents that hold a query, as kernels for rows of variable lengths are told of them."""

    pieces: list[Piece]
    query_bounds: Tensor
    """(documents + 1,) int32, where each document's queries begin when all queries stand in a row."""
    key_bounds: Tensor
    """(documents + 1,) int32, the same of the keys that are read."""
    max_queries: int
    max_keys: int
    equal: bool
    """All documents are of one length and all their keys are queries too: they are rows of a batch."""


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of packed rows; the operations of `ops` take it as `document_ids`. Make it with `of`.

    The ids must not change afterwards.
    """

    ids: Tensor
    """(B, S) int32 over the keys, equal ids adjacent, on the device of the keys."""
    bounds: tuple[tuple[int, ...], ...]
    """Of each row: the first position of each document, and S."""
    _packed: dict[tuple[int, int], Packed | None] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, ids: Tensor, device: torch.device | None = None) -> Documents:
        """Read the bounds of ids (B, S), which then lie on `device`; None takes their own.

        Waits for the device once where the ids lie on one, and not at all where they come from the CPU.
        """
        num_keys = ids.shape[1]
        changed = (ids[:, 1:] != ids[:, :-1]).cpu()
        firsts: list[list[int]] = [[0] for _ in range(ids.shape[0])]
        for row, place in changed.nonzero().tolist():
            firsts[row].append(place + 1)
        # The driver copies pageable memory aside before this returns, so nobody has to wait.
        there = ids if device is None else ids.to(device, non_blocking=True)
        return cls(there, tuple((*row, num_keys) for row in firsts))

    @property
    def whole(self) -> bool:
        """Whether each row is one document."""
        return all(len(row) == 2 for row in self.bounds)

    @cached_property
    def starts(self) -> Tensor | None:
        """(B, S) int32, first position of each key's document; None where each row is one document."""
        return None if self.whole else document_starts(self.ids).to(torch.int32)

    def pieces(self, num_queries: int, query_offset: int) -> Iterator[Piece]:
        """Documents that hold at least one query; see the function `pieces`."""
        last = query_offset + num_queries
        for row, bounds in enumerate(self.bounds):
            for start, end in pairwise(bounds):
                first, stop = max(start, query_offset), min(end, last)
                if first < stop:
                    yield Piece(
                        slice(row, row + 1),
                        slice(first - query_offset, stop - query_offset),
                        slice(start, stop),
                        first - start,
                    )

    def packed(self, num_queries: int, query_offset: int) -> Packed | None:
        """The documents that hold a query; None where each row is one document from its first key on.

        Made once for these two numbers; its bounds lie on the device of the ids.
        """
        place = (num_queries, query_offset)
        if place not in self._packed:
            self._packed[place] = self._pack(list(self.pieces(*place)), query_offset)
        return self._packed[place]

    def _pack(self, parts: list[Piece], first_query: int) -> Packed | None:
        if len(parts) == len(self.bounds) and not any(part.keys.start for part in parts):
            return None
        query_lens = [part.queries.stop - part.queries.start for part in parts]
        key_lens = [part.keys.stop - part.keys.start for part in parts]
        query_bounds, key_bounds = (
            torch.tensor([0, *accumulate(lens)], dtype=torch.int32).to(
                self.ids.device, non_blocking=True
            )
            for lens in (query_lens, key_lens)
        )
        return Packed(
            parts,
            query_bounds,
            key_bounds,
            max(query_lens),
            max(key_lens),
            equal=first_query == 0 and len({*query_lens, *key_lens}) == 1,
        )


DocumentIds = Tensor | Documents | None
"""What the operations take: ids (B, S) int32, what was made of them, or None for one document a row."""


def ids_of(documents: DocumentIds) -> Tensor | None:
    """The ids (B, S) int32 alone."""
    return documents.ids if isinstance(documents, Documents) else documents


def key_starts(documents: DocumentIds) -> Tensor | None:
    """(B, S) int32, first position of each key's document; None where each row is known to be one.

    Never waits for the device: of plain ids it is not known.
    """
    if isinstance(documents, Documents):
        return documents.starts
    return None if documents is None else document_starts(documents).to(torch.int32)


def pieces(
    num_queries: int, num_keys: int, documents: DocumentIds, query_offset: int
) -> Iterator[Piece]:
    """Documents that hold at least one query; one piece for all rows where `documents` is None.

    Args:
        documents: over the keys; queries are the keys `query_offset .. query_offset + num_queries - 1`.
    """
    if documents is None:
        yield Piece(slice(None), slice(0, num_queries), slice(0, num_keys), query_offset)
        return
    made = documents if isinstance(documents, Documents) else Documents.of(documents)
    yield from made.pieces(num_queries, query_offset)
