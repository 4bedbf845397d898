"""LongBench scores and tables from prediction records alone: no model, no prompt, no torch.

A record has `task` (full name), `prediction`, `references` and `facts` (see longbench.LongbenchSample);
`score(record)` gives 0 to 100. `tables(records)` gives what the report shows: per task, the six categories
with their average in English and Chinese, LongBench-E by length, version 2 by difficulty and length.
`from_reference` turns a line that the reference's own pred.py wrote into a record.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from . import metrics
from .longbench_tasks import (
    BUCKETS,
    CATEGORIES,
    DIFFICULTIES,
    TASKS,
    V2,
    V2_LENGTHS,
    V2_RECORDS,
    base,
    bucket,
    suite_of,
)
from .metrics_rouge import rouge_l

Record = Mapping[str, Any]
LANGUAGES = ("en", "zh")
_METRICS: dict[str, metrics.Metric] = {
    "qa_f1": metrics.qa_f1,
    "qa_f1_zh": metrics.qa_f1_zh,
    "rouge": rouge_l,
    "rouge_zh": metrics.rouge_zh,
    "count": metrics.count,
    "retrieval": metrics.retrieval,
    "retrieval_zh": metrics.retrieval_zh,
    "code": metrics.code_similarity,
}


def score(record: Record) -> float:
    """One answer's score, 0 to 100: the task's metric, the best over its references.

    Raises:
        NotScorable: a task over Chinese words where jieba is not installed.
        ValueError: a task that is not LongBench's, or a record without what its metric needs.
    """
    task, prediction = record["task"], record["prediction"]
    if task == V2:
        return 100.0 * metrics.best(metrics.multiple_choice, prediction, record["references"])
    if base(task) not in TASKS:
        raise ValueError(f"{task!r} is not a LongBench task: known are {', '.join(TASKS)} and {V2}")
    known = TASKS[base(task)]
    if known.first_line:
        prediction = metrics.first_line(prediction)
    metric = _METRICS.get(known.metric)
    if metric is None:
        classes = record.get("facts", {}).get("classes")
        if not classes:
            raise ValueError(f"a record of {task} names no classes: facts.classes must list them")
        metric = partial(metrics.classification, classes=classes)
    return 100.0 * metrics.best(metric, prediction, record["references"])


def not_scorable(tasks: Iterable[str]) -> list[dict[str, str]]:
    """[{"task", "reason"}] of the tasks whose metric lacks something here; told before they are run."""
    if metrics.chinese_is_scorable():
        return []
    reason = f"not measured: scored over Chinese words, `pip install {metrics.JIEBA}`"
    return [{"task": task, "reason": reason} for task in tasks if needs_jieba(task)]


def needs_jieba(task: str) -> bool:
    """Whether a task (full name) is scored over jieba's words."""
    return task != V2 and TASKS[base(task)].metric in ("qa_f1_zh", "rouge_zh")


def tables(records: Sequence[Record], scores: Mapping[str, float] | None = None) -> dict[str, Any]:
    """All of LongBench's tables for one arm's records.

    Args:
        scores: by record id; default `score` of each. Records without one are left out and counted.

    Returns:
        `tasks`: per full name score, samples, published number of records, counts of empty, unreadable,
        at-limit and truncated; `v1`, `e`, `v2`: the suites that there are, see `v1_table` and its
        neighbours; `not_scored`: task -> reason.
    """
    skipped = {} if scores is not None else _unscorable(records)
    kept = [one for one in records if one["task"] not in skipped]
    known = {one["id"]: score(one) for one in kept} if scores is None else scores
    by_task: dict[str, list[Record]] = {}
    for one in kept:
        if one["id"] in known:
            by_task.setdefault(one["task"], []).append(one)
    result: dict[str, Any] = {
        "tasks": {name: _task(name, many, known) for name, many in sorted(by_task.items())},
        "not_scored": skipped,
    }
    means = {name: cell["score"] for name, cell in result["tasks"].items()}
    of = {suite: [n for n in by_task if suite_of(n) == suite] for suite in ("v1", "e", "v2")}
    if of["v1"]:
        result["v1"] = v1_table({name: means[name] for name in of["v1"]})
    if of["e"]:
        result["e"] = e_table([one for name in of["e"] for one in by_task[name]], known)
    if of["v2"]:
        result["v2"] = v2_table(by_task[V2], known)
    return result


def v1_table(means: Mapping[str, float]) -> dict[str, Any]:
    """Categories and headline from task means.

    Returns:
        Per language `categories` (name -> mean over its tasks that are there), `average` (mean of the six
        categories, None unless every task of the language is there) and `missing` (the others).
    """
    table = {}
    for language in LANGUAGES:
        members = [name for name, task in TASKS.items() if task.language in (language, "code")]
        categories = _categories({name: means[name] for name in members if name in means})
        missing = [name for name in members if name not in means]
        average = None if missing else _mean(list(categories.values()))
        table[language] = {"categories": categories, "average": average, "missing": missing}
    return table


def e_table(records: Sequence[Record], scores: Mapping[str, float]) -> dict[str, Any]:
    """LongBench-E: task means by length bucket, and per bucket the mean of its categories.

    Returns:
        `tasks` (base name -> bucket -> mean, None where the bucket is empty), `samples` (the same,
        counted), `buckets` (bucket -> `categories` and `average`, None unless all 13 tasks have samples).
    """
    cells: dict[str, dict[str, list[float]]] = {}
    for one in records:
        row = cells.setdefault(base(one["task"]), {name: [] for name in BUCKETS})
        row[one["facts"]["bucket"]].append(scores[one["id"]])
    means = {
        task: {name: _mean(many) if many else None for name, many in row.items()}
        for task, row in cells.items()
    }
    members = [name for name, task in TASKS.items() if task.in_e]
    buckets = {}
    for name in BUCKETS:
        there = {task: row[name] for task, row in means.items() if row[name] is not None}
        categories = _categories(there)  # type: ignore[arg-type]
        whole = all(task in there for task in members)
        average = _mean(list(categories.values())) if whole else None
        buckets[name] = {"categories": categories, "average": average}
    samples = {task: {name: len(many) for name, many in row.items()} for task, row in cells.items()}
    return {"tasks": means, "samples": samples, "buckets": buckets}


def v2_table(records: Sequence[Record], scores: Mapping[str, float]) -> dict[str, Any]:
    """Version 2: share of right answers overall, by difficulty and by length, and unreadable answers.

    Returns:
        `overall`, `easy`, `hard`, `short`, `medium`, `long`: {score or None, samples}; `unreadable`.
    """

    def cell(many: list[Record]) -> dict[str, Any]:
        found = [scores[one["id"]] for one in many]
        return {"score": _mean(found) if found else None, "samples": len(found)}

    table = {"overall": cell(list(records))}
    for key, values in (("difficulty", DIFFICULTIES), ("size", V2_LENGTHS)):
        for value in values:
            table[value] = cell([one for one in records if one["facts"][key] == value])
    unreadable = sum(metrics.choice(one["prediction"]) is None for one in records)
    return {**table, "unreadable": unreadable}


def from_reference(task: str, number: int, line: Record) -> dict[str, Any]:
    """A record from a line of the reference's `pred/<model>/<task>.jsonl` or `pred_e`.

    Args:
        task: full name, `_e` for files of pred_e.
        line: `pred`, `answers`, `all_classes`, `length`.

    Raises:
        ValueError: a field is missing.
    """
    absent = [name for name in ("pred", "answers", "all_classes", "length") if name not in line]
    if absent:
        raise ValueError(f"line {number + 1} of {task} has no {', '.join(absent)}")
    known: dict[str, Any] = {}
    if line["all_classes"]:
        known["classes"] = line["all_classes"]
    if suite_of(task) == "e":
        known["bucket"] = bucket(line["length"])
    head = {"id": f"{task}/{number:05d}", "task": task, "facts": known}
    return {**head, "prediction": line["pred"], "references": line["answers"]}


def _unscorable(records: Sequence[Record]) -> dict[str, str]:
    names = sorted({one["task"] for one in records})
    return {entry["task"]: entry["reason"] for entry in not_scorable(names)}


def _task(name: str, records: Sequence[Record], scores: Mapping[str, float]) -> dict[str, Any]:
    published = V2_RECORDS if name == V2 else TASKS[name].records if name in TASKS else None
    return {
        "score": _mean([scores[one["id"]] for one in records]),
        "samples": len(records),
        "published": published,
        "empty": sum(not one["prediction"].strip() for one in records),
        "at_limit": sum(one.get("stopped") == "budget" for one in records),
        "truncated": sum(bool(one.get("cut_tokens")) for one in records),
        "cut_tokens": sum(one.get("cut_tokens", 0) for one in records),
    }


def _categories(means: Mapping[str, float]) -> dict[str, float]:
    """Category -> mean over its tasks, in the reference's order, only those that have a task."""
    table = {}
    for category in CATEGORIES:
        found = [mean for name, mean in means.items() if TASKS[name].category == category]
        if found:
            table[category] = _mean(found)
    return table


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
