"""RULER's prompts, made once and stored: every arm and every rank reads the same bytes.

    <folder>/cells-<key>/<length>/<task>.jsonl    samples 0, 1, ... of one task and length
    <folder>/cells-<key>/<length>/<task>.json     how many, sha256, or why there are none; written last
    <folder>/prompts-<digest>/manifest.json       which cells one prompt set takes, and how many samples

The key stands for all that decides a sample: tokenizer, corpus, seed, mode, parity, the generator's code. A
set of 5 samples is the beginning of one of 500, so they share cells, and predictions too: a sample's name
and `Prompts.digest`, which is the key, say what its prompt was. Processes share the work in pieces; a run
that was killed goes on with the pieces it had not written. Reading checks the checksums.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .prepare_pieces import Piece, cell_paths, make_all, piece_path, pieces_of
from .records import read_lines, to_lines, write_json, write_text
from .ruler import Sample, label_of, tokenizer_fingerprint
from .ruler_corpus import Corpus
from .ruler_prompt import resolve_mode

_MADE_BY = (
    "ruler.py",
    "ruler_corpus.py",
    "ruler_lists.py",
    "ruler_material.py",
    "ruler_prompt.py",
    "ruler_punkt.py",
    "ruler_questions.py",
    "ruler_sizing.py",
    "ruler_tasks.py",
)
"""Sources that decide what a prompt says and how it is sized."""


@dataclass(frozen=True)
class Prompts:
    """A stored prompt set. `skipped`: task and length that do not go together, and why."""

    folder: Path
    digest: str
    label: str
    samples: list[Sample]
    skipped: list[dict[str, Any]]


def prepare(
    folder: Path,
    *,
    tokenizer: Any,
    corpus: Corpus,
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    seed: int,
    mode: str = "auto",
    parity: str = "native",
    reasoning_tokens: int | None = None,
    workers: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Prompts:
    """Make what is missing of a prompt set under `folder`, then load it.

    Args:
        corpus: from `ruler_corpus.read_corpus`.
        mode, parity, reasoning_tokens: see `ruler.Generator`.
        workers: processes; None takes the cores of this machine where the work is worth it.

    Raises:
        ValueError: a stored prompt file was changed, the tokenizer cannot be used, or the disk is full.
    """
    identity = {
        "code": code_digest(Path(__file__).parent),
        "label": label_of(corpus.name, parity),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "corpus": corpus.digest,
        "works": sorted(corpus.works),
        "seed": seed,
        "mode": resolve_mode(tokenizer, mode),
        "parity": parity,
        "reasoning_tokens": reasoning_tokens,
    }
    key = _digest(identity)
    cells = folder / f"cells-{key[:12]}"
    wanted = {"tasks": sorted(tasks), "lengths": sorted(lengths), "samples": samples}
    home = folder / f"prompts-{_digest([identity, wanted])[:12]}"
    pieces = [
        piece
        for length in sorted(lengths)
        for task in tasks
        if not _has(cells, task, length, samples)
        for piece in pieces_of(task, length, seed, samples, whole=parity != "native")
    ]
    if pieces:
        options = {"mode": mode, "parity": parity, "reasoning_tokens": reasoning_tokens}
        _make(cells, pieces, corpus, tokenizer, options, workers, progress)
    write_json(home / "manifest.json", {**identity, **wanted, "digest": key, "cells": cells.name})
    return load(home, tokenizer)


def load(home: Path, tokenizer: Any) -> Prompts:
    """Read a prompt set after checking it.

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
    cells = home.parent / manifest["cells"]
    samples: list[Sample] = []
    skipped = []
    for length in manifest["lengths"]:
        for task in manifest["tasks"]:
            data, record = cell_paths(cells, task, length)
            said = _said(record)
            if said is None:
                raise ValueError(f"{record} is missing or damaged: delete {home} and prepare again")
            if "reason" in said:
                skipped.append({"task": task, "length": length, "reason": said["reason"]})
                continue
            if not data.is_file() or checksum(data) != said["sha256"]:
                raise ValueError(
                    f"{data} is not the file that was prepared (sha256 differs): delete it and {record}, "
                    "and run again"
                )
            found = read_lines(data)[: manifest["samples"]]
            if len(found) < manifest["samples"]:
                raise ValueError(f"{data} holds too few samples: delete {home} and prepare again")
            samples += map(Sample.from_record, found)
    samples.sort(key=lambda one: one.id)
    return Prompts(home, manifest["digest"], manifest["label"], samples, skipped)


def code_digest(folder: Path) -> str:
    """sha256 over the prompts' sources in `folder`, so that changed code never meets old prompts."""
    digest = hashlib.sha256()
    for name in _MADE_BY:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def checksum(path: Path) -> str:
    """sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _make(
    cells: Path,
    pieces: list[Piece],
    corpus: Corpus,
    tokenizer: Any,
    options: dict[str, Any],
    workers: int | None,
    progress: Callable[[str], None],
) -> None:
    """Make the pieces, and every cell as soon as its last piece is there."""
    left = {(piece.task, piece.length): 0 for piece in pieces}
    for piece in pieces:
        left[piece.task, piece.length] += 1
    bar = _Bar(pieces, progress)
    try:
        for piece in make_all(cells, pieces, corpus, tokenizer, options, workers):
            cell = (piece.task, piece.length)
            left[cell] -= 1
            if not left[cell]:
                _join(cells, [one for one in pieces if (one.task, one.length) == cell])
            bar.tick(piece)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"there is no room for the prompts in {cells} ({os.strerror(error.errno)}): make some, or set "
            f"another output_dir. All that were missing have up to {bar.tokens:,} tokens; the same command "
            "goes on where it stopped"
        ) from error


def _join(cells: Path, pieces: list[Piece]) -> None:
    """A cell out of its pieces, which go away; one piece that does not fit leaves the cell empty."""
    data, record = cell_paths(cells, pieces[0].task, pieces[0].length)
    made = [json.loads(piece_path(cells, piece).read_text(encoding="utf-8")) for piece in pieces]
    reasons = [part["reason"] for part in made if "reason" in part]
    if reasons:
        write_json(record, {"reason": reasons[0]})
    else:
        samples = [sample for part in made for sample in part["samples"]]
        write_text(data, to_lines(samples))
        write_json(record, {"samples": len(samples), "sha256": checksum(data)})
    for piece in pieces:
        piece_path(cells, piece).unlink()


def _has(cells: Path, task: str, length: int, samples: int) -> bool:
    """Whether a cell is there with enough samples; `load` finds out whether it is whole."""
    said = _said(cell_paths(cells, task, length)[1])
    return said is not None and ("reason" in said or said["samples"] >= samples)


def _said(record: Path) -> dict[str, Any] | None:
    """A cell's record; None if there is none."""
    try:
        said = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(said, dict) and ("reason" in said or {"samples", "sha256"} <= said.keys())
    return said if whole else None


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class _Bar:
    """A line now and then: how far, and how long it still takes by the tokens that are left."""

    _WIDTH = 20

    def __init__(
        self, pieces: Sequence[Piece], progress: Callable[[str], None], every_s: float = 5.0
    ) -> None:
        self.tokens = sum(piece.tokens for piece in pieces)
        self._samples = sum(piece.last - piece.first for piece in pieces)
        self._done = self._made = 0
        self._progress, self._every_s = progress, every_s
        self._begun = self._said = time.perf_counter()
        progress(f"prompts: {self._samples} to make, {self.tokens:,} tokens at most")

    def tick(self, piece: Piece) -> None:
        self._done += piece.tokens
        self._made += piece.last - piece.first
        now = time.perf_counter()
        if now - self._said < self._every_s and self._done < self.tokens:
            return
        self._said = now
        share = self._done / self.tokens
        filled = round(share * self._WIDTH)
        left_s = (now - self._begun) * (1 - share) / share
        self._progress(
            f"prompts: [{'#' * filled}{'.' * (self._WIDTH - filled)}] {self._made}/{self._samples}, "
            f"{left_s:.0f} s left"
        )
