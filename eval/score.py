"""From prediction journals to tables, intervals and tests. Reads nothing but the records it is given.

Differences are "points lost": first arm minus second, so a positive number is a loss.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from .arms import ArmRun
from .ruler import Sample
from .statistics import holm, mcnemar, paired_bootstrap, unseen_share, wilson

Predictions = dict[str, dict[str, Any]]
_FLIPS = 5
_SHOWN = 240


def comparisons(runs: Sequence[ArmRun]) -> list[tuple[str, ArmRun, ArmRun]]:
    """(meaning, first, second) of every pair among the runs that says something."""
    have = {run.label: run for run in runs}
    dense, before = have.get("converted_dense"), have.get("original_dense")
    pairs: list[tuple[str, ArmRun | None, ArmRun | None]] = [("training drift", before, dense)]
    for top_k in sorted({run.top_k for run in runs if run.top_k is not None}):
        sparse = have.get(ArmRun("converted_sparse", top_k).label)
        oracle = have.get(ArmRun("converted_oracle", top_k).label)
        pairs += [
            ("budget cost", dense, oracle),
            ("indexer error", oracle, sparse),
            ("cost of sparsity", dense, sparse),
            ("whole conversion", before, sparse),
        ]
    return [(name, one, two) for name, one, two in pairs if one and two]


def cells(samples: Sequence[Sample], predictions: Predictions) -> dict[str, dict[str, Any]]:
    """length -> task -> score with its share of fully right answers; and the mean over tasks.

    Raises:
        ValueError: a sample has no prediction.
    """
    missing = [sample.id for sample in samples if sample.id not in predictions]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(samples)} prompts have no prediction ({missing[0]} first): "
            "run the stage again, it goes on where it stopped"
        )
    table: dict[str, dict[str, Any]] = {}
    for length, task in sorted({(sample.length, sample.task) for sample in samples}):
        records = [
            predictions[one.id] for one in samples if (one.length, one.task) == (length, task)
        ]
        scores = [record["score"] for record in records]
        right = sum(score == 100.0 for score in scores)
        mean = sum(scores) / len(scores)
        table.setdefault(str(length), {})[task] = {
            "score": mean,
            "samples": len(scores),
            "all_right": wilson(right, len(scores)).record(),
            "uninformative": not 10 <= mean <= 99,
            "stopped": dict(Counter(record["stopped"] for record in records)),
            "empty": sum(not record["prediction"].strip() for record in records),
        }
    return table


def means(table: dict[str, dict[str, Any]]) -> dict[str, float]:
    """length -> plain mean over its tasks."""
    return {
        length: sum(cell["score"] for cell in tasks.values()) / len(tasks)
        for length, tasks in table.items()
    }


def compare(
    samples: Sequence[Sample], first: Predictions, second: Predictions
) -> list[dict[str, Any]]:
    """By length: points lost with a stratified interval, and each task with McNemar's test and Holm."""
    results = []
    for length in sorted({sample.length for sample in samples}):
        by_task: dict[str, list[Sample]] = {}
        for sample in samples:
            if sample.length == length:
                by_task.setdefault(sample.task, []).append(sample)
        tasks = [_task(name, many, first, second) for name, many in sorted(by_task.items())]
        for task, adjusted in zip(tasks, holm([task["p"] for task in tasks]), strict=True):
            task["p_holm"] = adjusted
        differences = {task["task"]: task.pop("differences") for task in tasks}
        total = sum(len(many) for many in differences.values())
        changed = any(any(many) for many in differences.values())
        results.append(
            {
                "length": length,
                "lost": paired_bootstrap(differences).record(),
                "unseen_share": None if changed else unseen_share(total),
                "tasks": tasks,
            }
        )
    return results


def flips(
    samples: Sequence[Sample], first: Predictions, second: Predictions
) -> list[dict[str, Any]]:
    """A few samples whose score differs most, side by side."""
    changed = [one for one in samples if first[one.id]["score"] != second[one.id]["score"]]
    changed.sort(key=lambda one: (first[one.id]["score"] - second[one.id]["score"], one.id))
    picked = changed[-_FLIPS:][::-1]
    return [
        {
            "id": one.id,
            "references": one.references,
            "first": first[one.id]["prediction"][:_SHOWN],
            "second": second[one.id]["prediction"][:_SHOWN],
            "scores": [first[one.id]["score"], second[one.id]["score"]],
        }
        for one in picked
    ]


def _task(
    name: str, samples: Sequence[Sample], first: Predictions, second: Predictions
) -> dict[str, Any]:
    before = [first[one.id]["score"] for one in samples]
    after = [second[one.id]["score"] for one in samples]
    differences = [one - two for one, two in zip(before, after, strict=True)]
    right = [score == 100.0 for score in before], [score == 100.0 for score in after]
    return {
        "task": name,
        "lost": paired_bootstrap({name: differences}).record(),
        "worse": sum(a and not b for a, b in zip(*right, strict=True)),
        "better": sum(b and not a for a, b in zip(*right, strict=True)),
        "p": mcnemar(*right),
        "differences": differences,
    }
