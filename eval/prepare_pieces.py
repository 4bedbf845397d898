"""The pieces that prompts are made in, alone or by several processes; `prepare.py` puts them together.

A piece is some samples of one task and length in a file that appears whole, with the reason in it where the
task does not fit. In `parity: nvidia` the samples of a task are drawn one after another, so a cell is one
piece.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import pickle
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .records import write_json
from .ruler import DoesNotFit, Generator
from .ruler_corpus import Corpus

_PIECE_TOKENS = 1_000_000
_PIECE_SAMPLES = 16
"""A piece begins with a trial sample that tells how much filling fits; it should serve some others."""
_WORTH_TOKENS = 4_000_000
"""Below, starting processes (they load transformers) takes longer than the work."""


@dataclass(frozen=True)
class Piece:
    """Samples first to last - 1 of a task and length."""

    task: str
    length: int
    seed: int
    first: int
    last: int

    @property
    def tokens(self) -> int:
        """Tokens it has at most."""
        return self.length * (self.last - self.first)


def pieces_of(task: str, length: int, seed: int, samples: int, *, whole: bool) -> list[Piece]:
    """A cell in pieces of about a million tokens, or `whole`."""
    size = samples if whole else max(_PIECE_SAMPLES, _PIECE_TOKENS // length)
    return [
        Piece(task, length, seed, first, min(first + size, samples))
        for first in range(0, samples, size)
    ]


def cell_paths(cells: Path, task: str, length: int) -> tuple[Path, Path]:
    """Where a cell's samples lie, and what is said about them."""
    folder = cells / str(length)
    return folder / f"{task}.jsonl", folder / f"{task}.json"


def piece_path(cells: Path, piece: Piece) -> Path:
    """Where a piece waits for the others."""
    name = f"{piece.task}.{piece.first:05d}-{piece.last:05d}.json"
    return cells / str(piece.length) / "pieces" / name


def make_all(
    cells: Path,
    pieces: Sequence[Piece],
    corpus: Corpus,
    tokenizer: Any,
    options: dict[str, Any],
    workers: int | None,
) -> Iterator[Piece]:
    """Make the pieces that are not there, the longest first, and give each when its file is.

    Args:
        options: `mode`, `parity` and `reasoning_tokens` of the `Generator`.
        workers: processes; None decides by the work and the cores.
    """
    there = [piece for piece in pieces if piece_path(cells, piece).is_file()]
    yield from there
    left = sorted(set(pieces).difference(there), key=lambda piece: (-piece.tokens, str(piece)))
    if workers is None:
        worth = sum(piece.tokens for piece in left) >= _WORTH_TOKENS
        workers = len(os.sched_getaffinity(0)) if worth else 1
    workers = min(workers, len(left))
    if workers <= 1:
        generator = Generator(corpus, tokenizer, **options) if left else None
        for piece in left:
            assert generator is not None
            make_one(cells, piece, generator)
            yield piece
        return
    with tempfile.TemporaryDirectory() as scratch:
        material = Path(scratch) / "material"
        material.write_bytes(pickle.dumps((corpus, tokenizer, options)))
        # Forked children of a process that holds a GPU or threads may hang: start afresh.
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as executor:
            try:
                running = {executor.submit(_work, cells, one, material): one for one in left}
                for done in concurrent.futures.as_completed(running):
                    done.result()
                    yield running[done]
            finally:
                executor.shutdown(wait=True, cancel_futures=True)


def make_one(cells: Path, piece: Piece, generator: Generator) -> None:
    """Write a piece's file: its samples, or why there are none."""
    try:
        made = generator.samples(piece.task, piece.length, piece.seed, piece.last, piece.first)
        content: dict[str, Any] = {"samples": [sample.record() for sample in made]}
    except DoesNotFit as error:
        content = {"reason": str(error)}
    write_json(piece_path(cells, piece), content)


def _work(cells: Path, piece: Piece, material: Path) -> None:
    make_one(cells, piece, _generator(material))


@cache
def _generator(material: Path) -> Generator:
    """A process's generator, made once of what the first process left in a file."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    corpus, tokenizer, options = pickle.loads(material.read_bytes())
    return Generator(corpus, tokenizer, **options)
