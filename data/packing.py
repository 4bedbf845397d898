"""Pieces of documents to rows of fixed length with document bounds: pure functions, no state.

A row is filled to the last token; a document that does not fit is cut there and goes on, as a document
of its own, in a later row. Attention, positions and targets never cross a bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

IGNORED = -100
"""Target of a token that has no next token in its document."""


@dataclass(frozen=True)
class Row:
    """One packed row of N tokens."""

    tokens: np.ndarray
    """(N,) int32."""
    document_ids: np.ndarray
    """(N,) int32: 0, 1, 2, ... from left to right."""


def pack_row(draw: Callable[[int], np.ndarray], row_len: int) -> Row:
    """Fill one row with pieces from `draw(room)`, which returns 1 to `room` tokens.

    Nothing is left over at the end of a row, so that the stream's position is the whole state.
    """
    pieces: list[np.ndarray] = []
    room = row_len
    while room:
        piece = draw(room)
        assert 0 < len(piece) <= room, (len(piece), room)
        pieces.append(piece)
        room -= len(piece)
    lengths = [len(piece) for piece in pieces]
    document_ids = np.repeat(np.arange(len(pieces), dtype=np.int32), lengths)
    return Row(np.concatenate(pieces).astype(np.int32, copy=False), document_ids)


def positions(document_ids: np.ndarray) -> np.ndarray:
    """Place of each token in its document: (N,) ids -> (N,) int64, from 0 at each bound."""
    index = np.arange(len(document_ids), dtype=np.int64)
    begins = np.flatnonzero(np.diff(document_ids, prepend=-1))
    return index - np.repeat(begins, np.diff(begins, append=len(document_ids)))


def targets(tokens: np.ndarray, document_ids: np.ndarray) -> np.ndarray:
    """Next token of the same document, else `IGNORED`: (N,), (N,) -> (N,) int64."""
    following = np.full(len(tokens), IGNORED, dtype=np.int64)
    same = document_ids[1:] == document_ids[:-1]
    following[:-1][same] = tokens[1:][same]
    return following
