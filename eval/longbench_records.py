"""LongBench's records: from a local folder, or from the hub data set into the cache, every field checked.

A folder holds what the reference publishes, unpacked or not:

    <task>.jsonl, data/<task>.jsonl, or data.zip with either      version 1 and E (`qasper_e.jsonl`)
    data.json or longbench_v2.jsonl                               version 2

A task whose file is absent is `RecordsMissing`, with the command that gets it; a file that is there and
damaged, lacks a field or holds another task's records is a ValueError.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .longbench_tasks import DIFFICULTIES, TASKS, V2, V2_LENGTHS, base

HUB = {"v1": ("THUDM/LongBench", "data.zip"), "v2": ("THUDM/LongBench-v2", "data.json")}
"""Data set and file that hold each version; LongBench-E lies in version 1's."""
_TIMEOUT_S = 10.0
_V2_FILES = ("data.json", "longbench_v2.jsonl")
_TEXT, _LIST, _NUMBER = "a text", "a list of texts", "a whole number"
_FIELDS = {
    "input": _TEXT,
    "context": _TEXT,
    "answers": _LIST,
    "length": _NUMBER,
    "dataset": _TEXT,
    "language": _TEXT,
    "all_classes": "a list of texts or null",
    "_id": _TEXT,
}
_V2_FIELDS: dict[str, str | tuple[str, ...]] = {
    "_id": _TEXT,
    "domain": _TEXT,
    "sub_domain": _TEXT,
    "difficulty": DIFFICULTIES,
    "length": V2_LENGTHS,
    "question": _TEXT,
    **{f"choice_{letter}": _TEXT for letter in "ABCD"},
    "answer": ("A", "B", "C", "D"),
    "context": _TEXT,
}


class RecordsMissing(ValueError):
    """A task's records are not to be had; the message is the reason and the command."""


@dataclass(frozen=True)
class Records:
    """One task's records in the order of their file, where they lay, and the file's sha256."""

    task: str
    path: str
    sha256: str
    records: list[dict[str, Any]]


def read(task: str, folder: Path) -> Records:
    """The records of a task (full name) in a folder.

    Raises:
        RecordsMissing: the folder does not hold the task.
        ValueError: a damaged file, a record without a field, of another task, or with the _id of another
            record; names file, record and field.
    """
    where, content = _content(task, folder)
    rows = _rows(task, where, content)
    if not rows:
        raise ValueError(f"{where} holds no record: get it again, {command(task)}")
    known: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        _check(task, row, f"{where}, record {number},")
        before = known.setdefault(row["_id"], number)
        if before != number:
            raise ValueError(
                f"{where}, record {number}, has the _id of record {before} ({_short(row['_id'])}) and "
                f"would count twice: delete one of them, or get the file again, {command(task)}"
            )
    return Records(task, where, hashlib.sha256(content).hexdigest(), rows)


def fetch(task: str, cache_dir: str | Path, say: Callable[[str], None] = lambda line: None) -> Path:
    """The folder in the cache that holds a task's records, fetched from the hub where it is not there.

    Raises:
        RecordsMissing: the hub cannot be reached.
    """
    version = "v2" if task == V2 else "v1"
    repository, name = HUB[version]
    folder = Path(cache_dir) / "longbench" / version
    if (folder / name).is_file():
        return folder
    from huggingface_hub import HfApi, hf_hub_download

    try:
        # Asked first because it gives up at once where the download would try for half a minute.
        revision = HfApi().dataset_info(repository, timeout=_TIMEOUT_S).sha
        say(f"longbench: fetching {name} of {repository} at {revision}")
        hf_hub_download(repository, name, repo_type="dataset", revision=revision, local_dir=folder)
    except Exception as error:  # each version of the hub client has its own network errors
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RecordsMissing(
            f"the hub cannot be reached ({said[:160]}): {command(task)}"
        ) from error
    return folder


def command(task: str, folder: str | Path = "FOLDER") -> str:
    """The command that gets a task's records, and how the recipe names them."""
    repository, name = HUB["v2" if task == V2 else "v1"]
    return (
        f"`hf download {repository} {name} --repo-type dataset --local-dir {folder}` and set "
        f"longbench.folder={folder}"
    )


def _content(task: str, folder: Path) -> tuple[str, bytes]:
    """Where a task's records lie in a folder, and their bytes."""
    names = _V2_FILES if task == V2 else (f"{task}.jsonl", f"data/{task}.jsonl")
    for name in names:
        if (folder / name).is_file():
            return str(folder / name), (folder / name).read_bytes()
    archive = folder / "data.zip"
    if task != V2 and archive.is_file():
        try:
            with zipfile.ZipFile(archive) as opened:
                for name in names:
                    if name in opened.namelist():
                        return f"{archive}:{name}", opened.read(name)
        except zipfile.BadZipFile as error:
            raise ValueError(
                f"{archive} is damaged ({error}): get it again, {command(task, folder)}"
            ) from error
    # The same words for every task, so that those that are absent can be told together.
    file = names[0] if task == V2 else "TASK.jsonl"
    raise RecordsMissing(f"{folder} holds no {file} for it: {command(task, folder)}")


def _rows(task: str, where: str, content: bytes) -> list[Any]:
    """The records in a file's bytes, unchecked."""
    rows: list[Any] = []
    place = where
    try:
        text = content.decode("utf-8")
        if text.lstrip().startswith("["):
            return json.loads(text)
        for number, line in enumerate(_lines(text), start=1):
            place = f"{where}, record {number},"
            rows.append(json.loads(line))
    except ValueError as error:
        said = str(error).replace("line 1 ", "")  # of the record's own line, not of the file
        raise ValueError(f"{place} is damaged ({said}): get it again, {command(task)}") from error
    return rows


def _lines(text: str) -> list[str]:
    """Lines by newline alone: `splitlines` would also part at characters that stand inside JSON texts."""
    return [line for line in text.split("\n") if line.strip()]


def _check(task: str, row: Any, where: str) -> None:
    """Refuse a record with a missing field or one of the wrong kind."""
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not a JSON object: get it again, {command(task)}")
    fields: dict[str, Any] = dict(_V2_FIELDS if task == V2 else _FIELDS)
    if task != V2 and TASKS[base(task)].metric == "classification":
        fields["all_classes"] = _LIST
    missing = [name for name in fields if name not in row]
    if missing:
        raise ValueError(
            f"{where} has no field {', '.join(missing)}; a LongBench record of {task} needs "
            f"{', '.join(fields)}: get it again, {command(task)}"
        )
    for name, kind in fields.items():
        if not _is(row[name], kind):
            allowed = kind if isinstance(kind, str) else f"one of {', '.join(kind)}"
            raise ValueError(
                f"{where} has {name}={_short(row[name])}, expected {allowed}: "
                f"get it again, {command(task)}"
            )
    # Records of LongBench-E may name themselves with or without the ending.
    if task != V2 and base(row["dataset"]) != base(task):
        raise ValueError(
            f"{where} has dataset={_short(row['dataset'])}, expected {_short(base(task))}: the file holds "
            f"records of another task, get it again, {command(task)}"
        )


def _is(value: Any, kind: str | tuple[str, ...]) -> bool:
    if isinstance(kind, tuple):
        return value in kind
    if kind == _TEXT:
        return isinstance(value, str)
    if kind == _NUMBER:
        return isinstance(value, int) and not isinstance(value, bool)
    # Numbers are texts in the data set's own schema, so a count may stand there as one.
    texts = isinstance(value, list) and bool(value) and all(isinstance(v, str | int) for v in value)
    return texts or (kind != _LIST and (value is None or value == []))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:40] + "…"
