"""From scored predictions to tables: cells, paired comparisons, needle-block recall, depth, flips.

Works on records alone (dictionaries with `score`, made by `eval/score.py`), so no model, no torch and no
prompts are needed. Differences are "points lost": first arm minus second, so a positive number is a loss.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..recipes.stages import RULER_TASKS
from .longbench_tasks import SUITES, TASKS, V2, base, suite_of
from .statistics import (
    changed_p,
    holm,
    paired_bootstrap,
    unseen_share,
    verdict,
    wilson,
)

Predictions = dict[str, dict[str, Any]]
LOWEST, HIGHEST = 10, 99
"""Outside of these a cell is uninformative: it is at the floor, or at the ceiling."""
EFFECTIVE = 85.6
"""Mean that a length must reach to be effective: Llama2-7B's at 4K (RULER, arXiv 2404.06654)."""
RECALL_BINS = (0.0, 0.25, 0.5, 0.75, 1.0)
_DEPTHS = 10
_FLIPS = 5
_SHOWN = 240


def cells(records: Predictions) -> dict[str, dict[str, dict[str, Any]]]:
    """length -> task -> mean score, and what is worth knowing of its answers."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for (length, task), many in _grouped(records).items():
        scores = [record["score"] for record in many]
        mean = sum(scores) / len(scores)
        table.setdefault(str(length), {})[task] = {
            "score": mean,
            "samples": len(scores),
            "all_right": wilson(sum(score == 100.0 for score in scores), len(scores)).record(),
            "uninformative": not LOWEST <= mean <= HIGHEST,
            "stopped": dict(Counter(record.get("stopped", "not said") for record in many)),
            "empty": sum(not record["prediction"].strip() for record in many),
            "at_limit": sum(record.get("stopped") == "budget" for record in many),
            "truncated": sum(bool(record.get("cut_tokens")) for record in many),
        }
    return table


def by_suite(tasks: Iterable[str]) -> dict[str, list[str]]:
    """`ruler`, `v1`, `e`, `v2` -> its tasks, in this order; what is not LongBench's counts as RULER's.

    LongBench's suites share records and differ in size, so no mean is taken over two of them.
    """
    found: dict[str, list[str]] = {name: [] for name in ("ruler", *SUITES)}
    for task in tasks:
        known = task == V2 or base(task) in TASKS
        found[suite_of(task) if known else "ruler"].append(task)
    return {name: many for name, many in found.items() if many}


def means(table: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """length -> plain mean over its tasks, of LongBench those of the first suite there."""
    first = {length: next(iter(by_suite(tasks).values())) for length, tasks in table.items()}
    return {
        length: _mean(table[length][task]["score"] for task in tasks)
        for length, tasks in first.items()
    }


def ruler_summary(table: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """RULER's own figures of one arm over the lengths that were measured, from its `cells`.

    Returns:
        `effective_length`: tokens of the longest length whose mean, and that of every shorter one, is at
        least `EFFECTIVE`; None where the shortest is below. `wavg_inc`, `wavg_dec`: means with weights 1
        to n and n to 1, shortest length first (arXiv 2404.06654). All three are None for one
        length. `all_tasks`: every length has the 13 tasks, without which no published figure compares.
    """
    lengths = sorted(table, key=int)
    found_means = means(table)
    by_length = [found_means[length] for length in lengths]
    found: dict[str, Any] = dict.fromkeys(("effective_length", "wavg_inc", "wavg_dec"))
    if len(lengths) > 1:
        rising = np.arange(1, len(lengths) + 1)
        held = sum(1 for _ in itertools.takewhile(lambda mean: mean >= EFFECTIVE, by_length))
        found["effective_length"] = int(lengths[held - 1]) if held else None
        found["wavg_inc"] = float(np.average(by_length, weights=rising))
        found["wavg_dec"] = float(np.average(by_length, weights=rising[::-1]))
    every = all(set(RULER_TASKS) <= set(tasks) for tasks in table.values())
    return {**found, "all_tasks": every}


def compare(first: Predictions, second: Predictions, *, margin: float) -> dict[str, Any]:
    """Paired comparison of two arms on the same prompts.

    Holm's correction is over all (length, task) cells of the comparison.

    Args:
        margin: points that may be lost; an interval wholly below it is "non-inferior".

    Returns:
        `lengths`: by length the points lost (tasks are strata of equal weight), the same without
        uninformative tasks, and each task. `overall`: the same over all cells of all lengths.
    """
    pairs = {
        place: [(record["score"], second[record["id"]]["score"]) for record in many]
        for place, many in _grouped(first).items()
    }
    tasks = {place: _task(place[1], many) for place, many in pairs.items()}
    adjusted = holm([task["p"] for task in tasks.values()])
    for task, p_holm in zip(tasks.values(), adjusted, strict=True):
        task["p_holm"] = p_holm
    lengths = []
    for length in sorted({length for length, _ in tasks}):
        here = {place: many for place, many in pairs.items() if place[0] == length}
        entry = {"length": length, **_lost(here, tasks, margin)}
        lengths.append({**entry, "tasks": [tasks[place] for place in here]})
    return {"lengths": lengths, "overall": _lost(pairs, tasks, margin)}


def compare_suites(first: Predictions, second: Predictions, *, margin: float) -> dict[str, Any]:
    """`compare` for each suite alone.

    Returns:
        What `compare` does of the first one (RULER, LongBench v1, E, v2), its name as `suite`, and the
        others' under `suites` by name.
    """
    found = {
        suite: compare(_of(first, tasks), _of(second, tasks), margin=margin)
        for suite, tasks in by_suite({record["task"] for record in first.values()}).items()
    }
    leading = next(iter(found))
    return {"suite": leading, **found.pop(leading), "suites": found}


def costs(records: Predictions) -> dict[str, dict[str, Any]]:
    """length -> mean prompt, seconds of all and means of reading and answering one, peak memory."""
    table: dict[str, dict[str, Any]] = {}
    for length in sorted({record["length"] for record in records.values()}):
        many = [record for record in records.values() if record["length"] == length]
        reading, answering = ([one[key] for one in many] for key in ("prefill_s", "decode_s"))
        table[str(length)] = {
            "samples": len(many),
            "prompt_tokens": _mean(one["prompt_tokens"] for one in many),
            "seconds": round(sum(reading) + sum(answering), 3),
            "prefill_s": _mean(reading),
            "decode_s": _mean(answering),
            "s_per_new_token": sum(answering) / sum(one["new_tokens"] for one in many),
            "peak_gib": max(one["peak_gib"] for one in many),
        }
    return table


def needles(records: Predictions) -> dict[str, Any] | None:
    """Needle-block recall of one arm, and how it goes with being right; None where none was recorded.

    `by_recall`: mean score of the samples in each bin of `any` recall (bins reach up to and without their
    upper end, the last one with it). `correlation`: of `any` recall with the score, None if either is
    constant.
    """
    found = [record for record in records.values() if record.get("needle")]
    if not found:
        return None
    table: dict[str, dict[str, Any]] = {}
    for (length, task), many in _grouped({one["id"]: one for one in found}).items():
        cell = {
            name: _mean(record["needle"][name] for record in many)
            for name in ("share", "first", "any", "kept")
        }
        table.setdefault(str(length), {})[task] = {**cell, "samples": len(many)}
    layers = sorted({layer for record in found for layer in record["needle"]["by_layer"]}, key=int)
    recall = np.array([record["needle"]["any"] for record in found])
    scores = np.array([record["score"] for record in found])
    varies = bool(np.ptp(recall) > 0 and np.ptp(scores) > 0)
    return {
        "lengths": table,
        "layers": {
            layer: _mean(record["needle"]["by_layer"][layer] for record in found)
            for layer in layers
        },
        "by_recall": _binned(recall, scores),
        "correlation": float(np.corrcoef(recall, scores)[0, 1]) if varies else None,
    }


def depths(records: Predictions) -> dict[str, list[dict[str, Any]]]:
    """length -> score by tenth of the prompt in which the needle lies, over samples with one needle."""
    table: dict[str, dict[int, list[float]]] = {}
    for record in records.values():
        spans = record.get("spans") or []
        if len(spans) == 1 and record.get("prompt_tokens"):
            tenth = min(_DEPTHS - 1, _DEPTHS * spans[0][0] // record["prompt_tokens"])
            by_depth = table.setdefault(str(record["length"]), {})
            by_depth.setdefault(tenth, []).append(record["score"])
    return {
        length: [
            {"depth": tenth / _DEPTHS, "score": _mean(scores), "samples": len(scores)}
            for tenth, scores in sorted(by_depth.items())
        ]
        for length, by_depth in sorted(table.items(), key=lambda item: int(item[0]))
    }


def flips(first: Predictions, second: Predictions) -> list[dict[str, Any]]:
    """A few samples whose score differs most, the largest losses first, of many tasks if it can be."""
    changed = sorted(
        (second[name]["score"] - one["score"], name)
        for name, one in first.items()
        if one["score"] != second[name]["score"]
    )
    before: Counter[str] = Counter()
    order = []
    for gain, name in changed:
        order.append((gain, before[first[name]["task"]], name))
        before[first[name]["task"]] += 1
    shown = []
    for _, _, name in sorted(order)[:_FLIPS]:
        one, other = first[name], second[name]
        shown.append(
            {
                "id": name,
                "references": one["references"],
                "first": one["prediction"][:_SHOWN],
                "second": other["prediction"][:_SHOWN],
                "scores": [one["score"], other["score"]],
                "recall": [(record.get("needle") or {}).get("any") for record in (one, other)],
            }
        )
    return shown


def _of(records: Predictions, tasks: Sequence[str]) -> Predictions:
    return {name: record for name, record in records.items() if record["task"] in tasks}


def _grouped(records: Predictions) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """(length, task) -> records, all in order."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for _, record in sorted(records.items()):
        groups.setdefault((record["length"], record["task"]), []).append(record)
    return dict(sorted(groups.items()))


def _task(name: str, pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    before, after = ([pair[place] for pair in pairs] for place in (0, 1))
    gaps = [one - two for one, two in pairs]
    ends = [sum(scores) / len(scores) for scores in (before, after)]
    return {
        "task": name,
        "lost": paired_bootstrap({name: gaps}).record(),
        "worse": sum(gap > 0 for gap in gaps),
        "better": sum(gap < 0 for gap in gaps),
        "p": changed_p(gaps),
        # Both at the same end: a loss from 100 to 60 is all the information there is.
        "uninformative": max(ends) < LOWEST or min(ends) > HIGHEST,
    }


def _lost(
    pairs: dict[tuple[int, str], list[tuple[float, float]]],
    tasks: dict[tuple[int, str], dict[str, Any]],
    margin: float,
) -> dict[str, Any]:
    """Points lost over some cells, as cells of equal weight, with the verdict."""
    gaps = {f"{place}": [one - two for one, two in many] for place, many in pairs.items()}
    informative = {
        f"{place}": gaps[f"{place}"] for place in pairs if not tasks[place]["uninformative"]
    }
    lost = paired_bootstrap(gaps)
    changed = any(any(many) for many in gaps.values())
    pairs_like = len(gaps) * min(map(len, gaps.values()))
    return {
        "lost": lost.record(),
        "lost_informative": paired_bootstrap(informative).record() if informative else None,
        "uninformative": len(gaps) - len(informative),
        "unseen_share": None if changed else unseen_share(pairs_like),
        "verdict": verdict(lost, margin, pairs=pairs_like),
    }


def _binned(recall: np.ndarray, scores: np.ndarray) -> list[dict[str, Any]]:
    places = np.digitize(recall, RECALL_BINS[1:-1])
    return [
        {
            "low": RECALL_BINS[place],
            "high": RECALL_BINS[place + 1],
            "samples": int((places == place).sum()),
            "score": float(scores[places == place].mean()) if (places == place).any() else None,
        }
        for place in range(len(RECALL_BINS) - 1)
    ]


def _mean(values: Iterable[float]) -> float:
    many = list(values)
    return sum(many) / len(many)
