"""Batches of packed rows for training, and held-out rows for measuring.

One global order of rows depends on the sources and the seed only; rank r of w gets its rows r, r + w, ...
Every rank makes all rows and keeps its own, so that one small state, equal on all ranks, continues the
data to the token, also with another number of ranks or another row length. Called by `train.loop`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .documents import Documents, SourceLike, open_documents
from .mixture import Mixture
from .packing import Row, pack_row, positions, targets
from .recall import SHORTEST_ROW, RecallStream
from .stream import OpenDocument, Stream, Tokenizer, TokenStream

HELDOUT_SEED = 20_260_613
"""Made held-out documents differ from those of every training seed in use."""
CHARS_PER_TOKEN = 12
"""Text with more characters per token than this does not occur; saves counting tokens exactly."""
LOOK_FACTOR = 64
"""Times the wanted tokens that a held-out source is searched for documents that fill a row."""


@dataclass
class Batch:
    """B rows of N tokens."""

    input_ids: torch.Tensor
    """(B, N) int64."""
    position_ids: torch.Tensor
    """(B, N) int64, from 0 in each document."""
    document_ids: torch.Tensor
    """(B, N) int32, 0, 1, 2, ... in each row."""
    targets: torch.Tensor
    """(B, N) int64, the next token of the same document, else -100."""

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Batch:
        """Stack rows and derive positions and targets."""
        ids = [row.document_ids for row in rows]
        return cls(
            input_ids=torch.from_numpy(np.stack([row.tokens for row in rows]).astype(np.int64)),
            position_ids=torch.from_numpy(np.stack([positions(i) for i in ids])),
            document_ids=torch.from_numpy(np.stack(ids)),
            targets=torch.from_numpy(
                np.stack([targets(row.tokens, row.document_ids) for row in rows])
            ),
        )


class RowLoader:
    """Endless iterator over one rank's batches."""

    def __init__(
        self,
        sources: Sequence[SourceLike],
        tokenizer: Any,
        *,
        row_len: int,
        micro_batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        cache_dir: str | Path,
        min_rows: int = 1,
    ) -> None:
        """Open the sources and check that they hold a batch.

        Args:
            sources: see `recipes.schema.Source`.
            tokenizer: a transformers tokenizer.
            min_rows: refuse a corpus of fewer rows; at least one batch of all ranks is always needed.

        Raises:
            ValueError: empty or too small a corpus, a row too short, or what `open_documents` refuses.
        """
        self._row_len, self._micro_batch_size = row_len, micro_batch_size
        self._rank, self._world_size = rank, world_size
        wrapped = Tokenizer(tokenizer)
        streams = _open_streams(sources, wrapped, row_len, seed, cache_dir)
        rows = max(min_rows, micro_batch_size * world_size)
        _check_size(streams, [source.weight for source in sources], wrapped, rows, row_len)
        self._mixture = Mixture(
            [entry.stream for entry in streams], [source.weight for source in sources], row_len
        )
        self._rows = 0
        self._state = self._position()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="row-loader")
        self._ahead: Future[tuple[Batch, dict[str, Any]]] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next micro batch of this rank; the one after it is made meanwhile."""
        ready = self._ahead or self._worker.submit(self._make)
        self._ahead = None  # an error is raised once, here, and not again by `close`
        batch, self._state = ready.result()
        self._ahead = self._worker.submit(self._make)
        return batch

    @property
    def tokens_drawn(self) -> dict[str, int]:
        """Tokens taken from each source so far, over all ranks."""
        return dict(self._state["mixture"]["drawn"])

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch handed out, as plain JSON values; equal on all ranks."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last batch before `state_dict`.

        Raises:
            ValueError: the state is of other sources, or files changed since.
        """
        self._drop_ahead()
        self._rows = state["rows"]
        self._mixture.load_state_dict(state["mixture"])
        self._state = self._position()

    def close(self) -> None:
        """End the thread; the loader cannot be used afterwards."""
        self._drop_ahead()
        self._worker.shutdown(wait=True)

    def _make(self) -> tuple[Batch, dict[str, Any]]:
        """One micro batch and the position after it."""
        mine = []
        for number in range(self._micro_batch_size * self._world_size):
            row = pack_row(self._mixture.draw, self._row_len)
            if number % self._world_size == self._rank:
                mine.append(row)
        self._rows += self._micro_batch_size * self._world_size
        return Batch.of(mine), self._position()

    def _position(self) -> dict[str, Any]:
        return {"rows": self._rows, "mixture": self._mixture.state_dict()}

    def _drop_ahead(self) -> None:
        """Wait for the batch that is being made, if any, and forget it."""
        if self._ahead is not None and not self._ahead.cancel():
            wait([self._ahead])
        self._ahead = None


def heldout_rows(
    sources: Sequence[SourceLike],
    tokenizer: Any,
    *,
    row_len: int,
    count: int,
    cache_dir: str | Path,
) -> list[Batch]:
    """The first `count` held-out rows, each a Batch with B = 1; always the same ones.

    Rows of prose are one document each, taken from several documents in turn; where too few documents
    are long enough, or they are too far behind in their source, rows are packed. Sources of kind recall
    get their share of the rows by weight.

    Raises:
        ValueError: the held-out sources hold too few tokens, or what `open_documents` refuses.
    """
    wrapped = Tokenizer(tokenizer)
    entries = _open_streams(sources, wrapped, row_len, HELDOUT_SEED, cache_dir)
    made = [entry.stream for entry in entries if entry.documents is None]
    weights = [source.weight for source in sources]
    made_weight = sum(w for w, entry in zip(weights, entries, strict=True) if not entry.documents)
    num_made = min(count - 1, round(count * made_weight / sum(weights))) if made else 0
    documents = [entry.documents for entry in entries if entry.documents is not None]
    prose = _one_document_rows(documents, wrapped, row_len, count - num_made)
    if len(prose) < count - num_made:
        prose = _packed_rows(documents, wrapped, row_len, count - num_made)
    filler = next(entry.stream for entry in entries if entry.documents is not None)
    rows = [
        pack_row(_first_then(made[number % len(made)], filler, row_len), row_len)
        for number in range(num_made)
    ]
    return [Batch.of([row]) for row in (*prose, *rows)]


@dataclass
class _Entry:
    """One opened source; `documents` is None for made ones."""

    stream: Stream
    documents: Documents | None


def _open_streams(
    sources: Sequence[SourceLike],
    tokenizer: Tokenizer,
    row_len: int,
    seed: int,
    cache_dir: str | Path,
) -> list[_Entry]:
    if row_len < 2:
        raise ValueError(f"row_len={row_len} leaves no token to predict: use at least 2")
    opened = {s.name: open_documents(s, cache_dir) for s in sources if s.kind != "recall"}
    for name, documents in opened.items():
        if next(documents.read(0, None), None) is None:
            raise ValueError(f"source {name!r} holds no text: the corpus is empty")
    entries = []
    for source in sources:
        if source.kind != "recall":
            documents = opened[source.name]
            entries.append(_Entry(TokenStream(documents, tokenizer, seed), documents))
        elif not opened:
            raise ValueError(
                f"source {source.name!r}: kind=recall takes its filler from the other sources of its "
                "list, and there is none: add a text, jsonl, parquet, hub or corpus source"
            )
        elif row_len < SHORTEST_ROW:
            raise ValueError(
                f"row_len={row_len} is too short for source {source.name!r}: kind=recall needs rows "
                f"of at least {SHORTEST_ROW} tokens"
            )
        else:
            prose = list(opened.values())
            entries.append(_Entry(RecallStream(source.name, prose, tokenizer, row_len, seed), None))
    return entries


def _check_size(
    entries: Sequence[_Entry],
    weights: Sequence[float],
    tokenizer: Tokenizer,
    rows: int,
    row_len: int,
) -> None:
    """Refuse prose that does not fill its share of one batch."""
    share = sum(w for w, e in zip(weights, entries, strict=True) if e.documents) / sum(weights)
    needed = int(rows * row_len * share)
    held, chars = 0, 0
    for entry in entries:
        if entry.documents is None:
            continue
        for _, text in entry.documents.read(0, None):
            chars += len(text)
            for part in tokenizer.document(text):
                held += len(part)
                if held >= needed or chars >= CHARS_PER_TOKEN * needed:
                    return
    raise ValueError(
        f"the corpus is smaller than one batch: data.sources hold {held} tokens, and {rows} rows of "
        f"{row_len} tokens need {needed}; add documents, or use a shorter row or a smaller batch"
    )


def _in_stored_order(
    documents: Sequence[Documents], tokenizer: Tokenizer
) -> Iterator[OpenDocument]:
    for source in documents:
        for position, text in source.read(0, None):
            yield OpenDocument(tokenizer, text, 0, position)


def _one_document_rows(
    documents: Sequence[Documents], tokenizer: Tokenizer, row_len: int, count: int
) -> list[Row]:
    """Up to `count` rows that are one document each, from up to 8 open documents in turn.

    A source of short documents only may be endless, as on the hub: each is left after `LOOK_FACTOR` times
    the tokens that are wanted.
    """
    looked_at = [0] * len(documents)

    def within_reach() -> Iterator[tuple[int, OpenDocument]]:
        for place, source in enumerate(documents):
            for position, text in source.read(0, None):
                if looked_at[place] >= LOOK_FACTOR * count * row_len:
                    break
                yield place, OpenDocument(tokenizer, text, 0, position)

    waiting = within_reach()
    opened: list[tuple[int, OpenDocument]] = []
    rows: list[Row] = []
    while len(rows) < count:
        if len(opened) < 8 and (found := next(waiting, None)) is not None:
            opened.append(found)
        elif not opened:
            break
        place, document = opened.pop(0)
        piece = document.take(row_len)
        looked_at[place] += len(piece)
        if len(piece) == row_len:
            rows.append(Row(piece, np.zeros(row_len, dtype=np.int32)))
            if not document.done:
                opened.append((place, document))
    return rows


def _packed_rows(
    documents: Sequence[Documents], tokenizer: Tokenizer, row_len: int, count: int
) -> list[Row]:
    """`count` rows packed from all documents in stored order."""
    waiting = _in_stored_order(documents, tokenizer)
    current: list[OpenDocument] = []
    drawn = 0

    def draw(room: int) -> np.ndarray:
        nonlocal drawn
        if not current or current[0].done:
            current[:] = [next(waiting, None) or _too_few(drawn, count, row_len)]
        piece = current[0].take(room)
        drawn += len(piece)
        return piece

    return [pack_row(draw, row_len) for _ in range(count)]


def _too_few(drawn: int, count: int, row_len: int) -> OpenDocument:
    raise ValueError(
        f"data.heldout holds {drawn} tokens, and {count} rows of {row_len} need {count * row_len}: "
        "add documents, or measure on fewer rows"
    )


def _first_then(first: Stream, filler: Stream, row_len: int) -> Any:
    """Draw function of a row that starts with a whole document of `first`."""
    return lambda room: (first if room == row_len else filler).take(room)
