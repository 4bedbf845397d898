"""Answers of one arm to stored prompts: shared between ranks, one JSON line a sample, resumable.

    <arm's folder>/arm.json                   which arm, checkpoint, precision, prompts; checked on return
    <arm's folder>/rank-<r>-of-<n>.jsonl      one line a prompt, appended by one rank, never rewritten
    <stage's folder>/<arm>/predictions.jsonl  all of one stage sorted by id, without times; and arm.json

What is left is put longest first, and rank r takes every n-th of it. Every rank must therefore see the same
journals before any rank writes: `answered` is read before a barrier, `predict` runs after it. A killed run
goes on with what has no line yet, with any number of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from .arms import ArmRun
from .generate import MEASURED, Prompt, answer
from .progress import Clock, quadratic_share
from .records import (
    PREDICTIONS,
    Journal,
    journal_path,
    read_journals,
    to_lines,
    write_json,
    write_text,
)

IDENTITY = "arm.json"


def claim(folder: Path, identity: Mapping[str, Any], *, write: bool = True) -> None:
    """Make a folder the place of one arm's predictions, or check that it is.

    Args:
        identity: what decides a prediction beside the prompt: arm, top_k, checkpoint, precision, prompts.
        write: write the note where there is none (one rank of all does).

    Raises:
        ValueError: the folder holds predictions of something else, or does not say of what.
    """
    note = folder / IDENTITY
    if not note.is_file():
        if any(folder.glob("*.jsonl")):
            raise ValueError(
                f"{folder} holds predictions but no {IDENTITY} that says of which checkpoint: delete it or "
                "move it away"
            )
        if write:
            write_json(note, dict(identity))
        return
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{note} is damaged ({error}): delete {folder}") from error
    for key, value in identity.items():
        if known.get(key) != value:
            raise ValueError(
                f"the predictions in {folder} are of another {key} ({_short(known.get(key))}, now "
                f"{_short(value)}): delete that folder, or write to another"
            )


def predict(
    model: Any,
    tokenizer: Any,
    samples: Sequence[Prompt],
    folder: Path,
    *,
    run: ArmRun | None = None,
    answered: Collection[str] | None = None,
    prefill_chunk: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[str], None] = lambda line: None,
    every_s: float = 15.0,
) -> int:
    """Answer this rank's share of the samples that have no answer yet; returns how many were made.

    Args:
        model: a causal model in the attention mode that the caller has set.
        run: the arm it attends as; see `generate.answer`.
        answered: ids that had an answer when the ranks last met; None reads the folder, which is right
            for one rank alone.
        prefill_chunk: prompts are read that many tokens at a time.

    Raises:
        ValueError: a damaged line in `folder`, or a prompt that this tokenizer splits otherwise.
    """
    done = read_journals(folder).keys() if answered is None else answered
    mine = share([one for one in samples if one.id not in done], rank, world_size)
    clock = Clock(mine, progress, every_s, quadratic_share(model))
    with Journal(journal_path(folder, rank, world_size)) as journal:
        for sample in mine:
            journal.append(answer(model, tokenizer, sample, run=run, prefill_chunk=prefill_chunk))
            clock.tick(sample)
    return len(mine)


def share(samples: Sequence[Prompt], rank: int, world_size: int) -> list[Prompt]:
    """A rank's part, longest first over all ranks: no rank is left with a long prompt at the end."""
    ordered = sorted(samples, key=lambda one: (-one.num_tokens, one.id))
    return ordered[rank::world_size]


def merge(folder: Path, samples: Sequence[Prompt], target: Path) -> dict[str, dict[str, Any]]:
    """Write a stage's `predictions.jsonl` from an arm's journals; returns its records by id.

    The same bytes for the same model and prompts, whatever was killed and however many ranks there were.

    Args:
        folder: the arm's, perhaps with answers to other stages' prompts too.
        target: folder to write to, of one arm of one stage; what eval/score.py reads.

    Raises:
        ValueError: a damaged line, or a sample without an answer.
    """
    found = read_journals(folder)
    missing = [one.id for one in samples if one.id not in found]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(samples)} prompts have no prediction ({missing[0]} first): "
            "run the stage again, it goes on where it stopped"
        )
    wanted = {one.id for one in samples}
    records = {
        name: {key: value for key, value in record.items() if key not in MEASURED}
        for name, record in sorted(found.items())
        if name in wanted
    }
    if (folder / IDENTITY).is_file():
        write_text(target / IDENTITY, (folder / IDENTITY).read_text(encoding="utf-8"))
    write_text(target / PREDICTIONS, to_lines(records.values()))
    return records


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 16 else f"{text[:12]}\N{HORIZONTAL ELLIPSIS}"
