"""What can be known of a recipe's evaluation stages before any model is loaded.

`dense2sparse preflight` prints it; `train/start.py` and `eval/run.py` ask before anything runs, so that a
length above the window or a missing source is not found out after a training, or after other stages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import benchmarks, longbench
from .ruler import check_lengths, check_tasks


def check_stages(recipe: Any, window: int | None, numbers: Iterable[int] | None = None) -> None:
    """Refuse stages whose prompts do not fit the model; reads nothing.

    Args:
        window: the model's positions; None checks tasks only.
        numbers: places of the stages; default all.

    Raises:
        ValueError: the first mistake, with its stage.
    """
    for number, stage in _chosen(recipe, numbers):
        with _named(number, stage):
            if stage.kind == "ruler":
                check_tasks(stage.tasks)
                check_lengths(stage.lengths, window)
            elif stage.kind == "probe" and stage.needles:
                check_lengths([recipe.data.row_len], window)
            elif stage.kind == "longbench":
                longbench.check_max_length(stage.max_length, window)


def read_sources(
    recipe: Any, tokenizer: Any, window: int | None, numbers: Iterable[int] | None = None
) -> list[str]:
    """Read what the prompts are made of, as the stages will; wheels are fetched. Arguments as above.

    Returns:
        A line for each finding: what was read, and what will not be measured and why.

    Raises:
        ValueError: a source that a stage cannot do without; the message names the command that gets it.
    """
    lines = []
    for number, stage in _chosen(recipe, numbers):
        said = []
        with _named(number, stage):
            if stage.kind == "ruler":
                said = [_ruler(recipe, stage)]
            elif stage.kind == "longbench":
                said = _longbench(recipe, stage, tokenizer, window)
        lines += [f"stage {number}: {one}" for one in said]
    return lines


def _chosen(recipe: Any, numbers: Iterable[int] | None) -> list[tuple[int, Any]]:
    every = list(enumerate(recipe.stages))
    return every if numbers is None else [every[number] for number in numbers]


def _ruler(recipe: Any, stage: Any) -> str:
    tasks = check_tasks(stage.tasks)
    wanted: dict[str, Any] = {"tasks": tasks, "lengths": stage.lengths, "parity": stage.parity}
    corpus = benchmarks.read_corpus(stage.corpus, recipe.data.cache_dir, **wanted)
    without = [task for task in tasks if corpus.lacks(task)]
    return f"corpus {corpus.name} read" + (f", without {', '.join(without)}" if without else "")


def _longbench(recipe: Any, stage: Any, tokenizer: Any, window: int | None) -> list[str]:
    """What of LongBench is there, and once for each reason the tasks that will not be measured.

    Raises:
        ValueError: bad records, or a folder that was named and holds nothing that can be measured.
    """
    cache_dir = recipe.data.cache_dir
    planned = longbench.plan(
        tokenizer=tokenizer,
        suites=stage.suites,
        tasks=stage.tasks,
        records=None if stage.folder is None else Path(stage.folder),
        cache_dir=cache_dir,
        max_length=stage.max_length,
        window=window,
        chat=stage.chat,
    )
    if stage.folder and not planned.found:
        reason = planned.missing[-1]["reason"]
        raise ValueError(f"nothing of it can be measured: {reason.removeprefix('not measured: ')}")
    longbench.templates_of(planned.found, cache_dir)
    by_reason: dict[str, list[str]] = {}
    for entry in planned.missing:
        by_reason.setdefault(entry["reason"], []).append(entry["task"])
    said = [f"{', '.join(tasks)} {reason}" for reason, tasks in by_reason.items()]
    if planned.found:
        count = sum(len(one.records) for one in planned.found)
        said.insert(0, f"{count} records of {len(planned.found)} LongBench tasks read")
    return said


@contextmanager
def _named(number: int, stage: Any) -> Iterator[None]:
    """A mistake inside is told with the stage that it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"stages.{number} ({stage.kind}): {error}") from error
