"""Files of the evaluation: whole files written atomically, and append-only journals of JSON lines.

A journal survives kill -9: each record is one `write` of one line, and a torn last line is dropped when the
writer comes back. A damaged line before the last is refused, because something other than a kill did it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..data.fetch import write_atomically

PREDICTIONS = "predictions.jsonl"
"""All predictions of an arm, sorted by id."""
JOURNALS = "rank-*-of-*.jsonl"
"""Journals of the ranks that made them."""


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON so that `path` holds either the old content or all of the new."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """As `write_json`, for text."""
    write_atomically(path, text.encode())


def to_lines(records: Iterable[dict[str, Any]]) -> str:
    """JSON lines, one record each."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a journal; a torn last line is left out.

    Raises:
        ValueError: a line before the last is not a JSON object.
    """
    return _parse(path, path.read_bytes())[0]


class Journal:
    """Append-only JSON lines with an `id` in every record; one writer a file."""

    def __init__(self, path: Path) -> None:
        """Open for appending, after dropping a torn last line that a kill left behind.

        Raises:
            ValueError: a damaged line, or another process is writing to the file.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab+", buffering=0)  # noqa: SIM115 (closed by close)
        self._claim()
        self._file.seek(0)
        content = self._file.read()
        self.records, whole = _parse(path, content)
        if whole < len(content):
            os.truncate(path, whole)

    def _claim(self) -> None:
        """Keep other processes out until this one closes the file or ends."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(
                f"another evaluation is writing to {self.path}: wait for its end, or name another folder "
                "with --output"
            ) from None
        except OSError:
            return  # a file system without locks

    def append(self, record: dict[str, Any]) -> None:
        """Write one record; it is in the kernel's hands when this returns."""
        self._file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
        self.records.append(record)

    def close(self) -> None:
        """Flush to disk and close."""
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def journal_path(folder: Path, rank: int, world_size: int) -> Path:
    """Where a rank of a run with `world_size` ranks appends."""
    return folder / f"rank-{rank}-of-{world_size}.jsonl"


def read_journals(folder: Path) -> dict[str, dict[str, Any]]:
    """All ranks' records by id, whatever the number of ranks was when they were written.

    Raises:
        ValueError: a damaged line.
    """
    records: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob(JOURNALS)):
        for record in read_lines(path):
            records.setdefault(record["id"], record)
    return dict(sorted(records.items()))


def read_predictions(folder: Path) -> dict[str, dict[str, Any]]:
    """Records by id of `predictions.jsonl`, or where there is none of every `*.jsonl` in a folder.

    Files made elsewhere may lack the line end after the last record.

    Raises:
        ValueError: a damaged line, or an id with two different predictions.
    """
    whole = folder / PREDICTIONS
    records: dict[str, dict[str, Any]] = {}
    for path in [whole] if whole.is_file() else sorted(folder.glob("*.jsonl")):
        content = path.read_bytes()
        ours = path.match(JOURNALS)
        if content and not ours and not content.endswith(b"\n"):
            content += b"\n"
        found, size = _parse(path, content)
        if size < len(content) and not ours:
            raise ValueError(f"{path} ends in a damaged line (not a JSON record): copy it again")
        for record in found:
            other = records.setdefault(record["id"], record)
            if other.get("prediction") != record.get("prediction"):
                raise ValueError(
                    f"{path} predicts {record['id']} a second time, otherwise: keep one of them"
                )
    return dict(sorted(records.items()))


def _parse(path: Path, content: bytes) -> tuple[list[dict[str, Any]], int]:
    """Records and the number of bytes they fill."""
    records: list[dict[str, Any]] = []
    whole = 0
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is None:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}, line {number}, is damaged (not a JSON record): "
                f"delete that line to have its sample predicted again"
            )
        records.append(record)
        whole += len(line)
    return records, whole


def _record(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("id"), str) else None
