"""Documents of one source, in a seeded order for each epoch, restartable at any document.

A source is a list of units that can be loaded on their own (a text file, a slice of a JSONL file, a row
group of a parquet file, a work of a corpus), so opening it is quick at any size and no index is kept.
A position is (unit in the epoch's order, document in the unit's order). `data.stream` reads these.
"""

from __future__ import annotations

import difflib
import glob
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from . import corpora

Position = tuple[int, int]
Unit = Callable[[], list[str]]

SLICE_BYTES = 4 << 20
LARGEST_TEXT_BYTES = 64 << 20
SHUFFLE_BUFFER = 1000
SUFFIXES = {"text": ".txt", "jsonl": ".jsonl", "parquet": ".parquet"}


class SourceLike(Protocol):
    """The fields of a recipe's source that are read here; see `recipes.schema.Source`."""

    name: str
    kind: str
    path: str | list[str] | None
    hub: str | None
    config: str | None
    split: str
    field: str
    corpus: str | None
    works: list[str] | None
    weight: float


class Documents(Protocol):
    """What `open_documents` returns."""

    name: str
    num_open: int
    """Documents that are worth reading side by side."""

    def read(
        self, seed: int, epoch: int | None, start: Position = (0, 0)
    ) -> Iterator[tuple[Position, str]]:
        """Yield (position, text) from `start` on, in the epoch's order; epoch=None: as stored."""
        ...


def open_documents(source: SourceLike, cache_dir: str | Path) -> Documents:
    """Open a source of any kind but `recall`.

    Raises:
        ValueError: a path that does not exist or holds no file, a missing field or column, a file
            that is not UTF-8, a corpus that cannot be fetched. Some are raised while reading.
    """
    if source.kind == "hub":
        return HubDocuments(source)
    if source.kind == "corpus":
        texts = corpora.read(str(source.corpus), source.works, cache_dir)
        return UnitDocuments(source.name, [partial(list, [text]) for text in texts.values()])
    make = {"text": _text_units, "jsonl": _jsonl_units, "parquet": _parquet_units}[source.kind]
    units: list[Unit] = []
    for file in _files(source):
        units += make(file, source)
    return UnitDocuments(source.name, units)


@dataclass
class UnitDocuments:
    """Documents in units; the order of the units and the order within each depend on the epoch."""

    name: str
    units: list[Unit]
    num_open: int = 4

    def read(
        self, seed: int, epoch: int | None, start: Position = (0, 0)
    ) -> Iterator[tuple[Position, str]]:
        """See `Documents.read`; documents without any text are passed over."""
        order = _order(len(self.units), epoch, seed)
        for place in range(start[0], len(order)):
            unit = int(order[place])
            texts = self.units[unit]()
            inner = _order(len(texts), epoch, seed, unit + 1)
            for number in range(start[1] if place == start[0] else 0, len(texts)):
                text = texts[inner[number]]
                if text.strip():
                    yield (place, number), text


class HubDocuments:
    """A data set of the hub, streamed; shuffled through a buffer, its shards too."""

    num_open = 1  # a restart reads the stream from its beginning, once for each open document

    def __init__(self, source: SourceLike) -> None:
        self.name = source.name
        self._source = source

    def read(
        self, seed: int, epoch: int | None, start: Position = (0, 0)
    ) -> Iterator[tuple[Position, str]]:
        """See `Documents.read`; everything is in unit 0."""
        source = self._source
        records = self._load()
        if epoch is not None:
            # Not by set_epoch: `skip` forgets it.
            records = records.shuffle(seed=seed + epoch, buffer_size=SHUFFLE_BUFFER)
        for number, record in enumerate(records.skip(start[1]), start[1]):
            text = _text_of(record, source.field, f"source {self.name!r}, hub={source.hub}")
            if text.strip():
                yield (0, number), text

    def _load(self) -> Any:
        from datasets import load_dataset

        source = self._source
        try:
            return load_dataset(source.hub, source.config, split=source.split, streaming=True)
        except Exception as error:  # the data set's own code and many clients may fail below
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"source {self.name!r}: the data set hub={source.hub!r} config={source.config!r} "
                f"split={source.split!r} cannot be opened ({reason[:200]}): check the id and the "
                "connection, or use local files"
            ) from None


def _order(count: int, epoch: int | None, *key: int) -> np.ndarray:
    """Permutation of range(count) for an epoch; the identity for epoch None."""
    if epoch is None:
        return np.arange(count)
    return np.random.default_rng([*key, epoch]).permutation(count)


def _files(source: SourceLike) -> list[Path]:
    """Files of a local source, sorted within each path given."""
    given = [source.path] if isinstance(source.path, str) else list(source.path or [])
    files: list[Path] = []
    for path in given:
        suffix = SUFFIXES[source.kind]
        if Path(path).is_dir():
            found = sorted(Path(path).rglob(f"*{suffix}"))
            if not found:
                raise ValueError(
                    f"source {source.name!r}: the folder {path!r} holds no {suffix} file"
                )
        elif Path(path).is_file():
            found = [Path(path)]
        else:
            found = sorted(
                Path(hit) for hit in glob.glob(path, recursive=True) if Path(hit).is_file()
            )
            if not found:
                raise ValueError(
                    f"source {source.name!r}: path={path!r} is no file, folder or pattern that "
                    "matches a file"
                )
        files += found
    return files


def _slices(file: Path, size: int) -> list[tuple[int, int]]:
    total = file.stat().st_size
    return [(begin, min(begin + size, total)) for begin in range(0, total, size)]


def _read_lines(file: Path, begin: int, end: int) -> bytes:
    """Whole lines that start within [begin, end)."""
    with open(file, "rb") as handle:
        if begin:
            handle.seek(begin - 1)
            handle.readline()  # the line that an earlier slice began
        at = handle.tell()
        if at >= end:
            return b""
        return handle.read(end - at) + (b"" if _ends_line(file, end) else handle.readline())


def _ends_line(file: Path, end: int) -> bool:
    with open(file, "rb") as handle:
        handle.seek(end - 1)
        return handle.read(1) == b"\n"


def _decode(content: bytes, file: Path, begin: int) -> str:
    try:
        return content.decode("utf-8-sig" if begin == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 (byte {begin + error.start}): convert it, for example with "
            "`iconv -t utf-8`"
        ) from None


def _text_units(file: Path, source: SourceLike) -> list[Unit]:
    """One document per file; a file too large to hold is cut at line ends."""

    def load(begin: int, end: int) -> list[str]:
        return [_decode(_read_lines(file, begin, end), file, begin)]

    return [partial(load, *piece) for piece in _slices(file, LARGEST_TEXT_BYTES)]


def _jsonl_units(file: Path, source: SourceLike) -> list[Unit]:
    def load(begin: int, end: int) -> list[str]:
        texts = []
        for line in _decode(_read_lines(file, begin, end), file, begin).split("\n"):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                raise ValueError(
                    f"{file} is not JSONL: the line {line[:60]!r} is no JSON"
                ) from None
            texts.append(_text_of(record, source.field, str(file)))
        return texts

    return [partial(load, *piece) for piece in _slices(file, SLICE_BYTES)]


def _parquet_units(file: Path, source: SourceLike) -> list[Unit]:
    import pyarrow
    import pyarrow.parquet

    try:
        opened = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file} is no parquet file ({str(error)[:120]})") from None
    names = opened.schema_arrow.names
    if source.field not in names:
        raise ValueError(_no_field(source.field, names, str(file)))

    def load(group: int) -> list[str]:
        table = pyarrow.parquet.ParquetFile(file).read_row_group(group, columns=[source.field])
        return [
            _text_of({source.field: value}, source.field, str(file))
            for value in table.column(0).to_pylist()
        ]

    return [partial(load, group) for group in range(opened.num_row_groups)]


def _text_of(record: Any, field: str, where: str) -> str:
    """The text of a record; None counts as empty."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a record is {type(record).__name__}, not an object with fields")
    if field not in record:
        raise ValueError(_no_field(field, list(record), where))
    value = record[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: field={field!r} holds {type(value).__name__}, not text; name another field"
        )
    return value


def _no_field(field: str, names: list[str], where: str) -> str:
    close = difflib.get_close_matches(field, names, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(map(repr, names[:8]))}"
    return f"{where} has no field {field!r}; {hint}"
