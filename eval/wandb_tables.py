"""Tables and curves for wandb, from a stage's result and its merged predictions alone; no wandb here.

`eval/wandb_evaluation.py` sends the tables, `eval/stages.py` records the curves. A cell that does not apply
is None: a mean has no task, a total over all lengths no length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .score import score_of
from .wandb_run import Table

Result = Mapping[str, Any]
Predictions = Mapping[str, Mapping[str, Any]]
MOST_ANSWERS = 1000
"""Rows of the table of answers, shared evenly between the cells of task and length; at least one each."""
LONGEST_TEXT = 500
"""Characters of a text in it."""


def stage_tables(result: Result, predictions: Mapping[str, Predictions]) -> dict[str, Table]:
    """Tables of a stage by name.

    Args:
        result: content of the stage's `stage-<n>.json`.
        predictions: arm -> records by id, of the stages that answer prompts.
    """
    if result["kind"] == "perplexity":
        return {
            "arms": _losses(result),
            "positions": _positions(result),
            "comparisons": _changes(result),
        }
    if result["kind"] == "probe":
        tables = {"budgets": _budgets(result), "layers": _layers(result)}
        return tables | ({"needles": _needles(result)} if result["needles"] else {})
    if not result.get("arms"):
        return {}
    tables = {"scores": scores(result), "comparisons": comparisons(result)}
    tables["answers"] = answers(predictions)
    if result["kind"] == "longbench":
        tables["categories"] = categories(result)
    return tables


def curves(result: Result) -> dict[str, float]:
    """What a stage's result adds to the curves over the training, by metric name."""
    kind = result["kind"]
    if kind == "probe":
        return _probe_curves(result)
    found: dict[str, float] = {}
    for label, arm in result.get("arms", {}).items():
        if kind == "perplexity":
            found[f"eval/perplexity/{label}"] = arm["perplexity"]
            continue
        for length, tasks in arm["scores"].items():
            cells = {task: cell["score"] for task, cell in tasks.items()}
            if kind == "ruler":
                cells["mean"] = arm["means"][length]
            for task, score in cells.items():
                found[f"eval/{kind}/{_short(int(length))}/{task}/{label}"] = score
    for pair in result.get("comparisons", []):
        name = f"{pair['meaning'].replace(' ', '_')}/{pair['second']}"
        if kind == "perplexity":
            found[f"eval/perplexity/change_pct/{name}"] = pair["change_pct"]["estimate"]
        else:
            found[f"eval/{kind}/points_lost/{name}"] = pair["overall"]["lost"]["estimate"]
    return found


def _probe_curves(result: Result) -> dict[str, float]:
    found = {
        f"eval/probe/oracle_coverage/k{entry['top_k']}": entry["mean"]["oracle_coverage"]
        for entry in result["budgets"]
        if "oracle_coverage" in entry["mean"]
    }
    needles = result["needles"] or {"scores": {}}
    for label, means in needles["scores"].items():
        for length, score in means.items():
            found[f"eval/probe/{_short(int(length))}/{needles['task']}/{label}"] = score
    return found


def _short(length: int) -> str:
    """A length in names of metrics: `4k`, or the number where it is no multiple of 1024."""
    return f"{length // 1024}k" if length % 1024 == 0 and length else str(length)


def scores(result: Result) -> Table:
    """Each arm's cells; `all_right_pct` is the share of samples with a score of 100, with its interval."""
    interval = ("all_right_pct", "all_right_low", "all_right_high")
    counts = ("uninformative", "empty", "at_limit", "truncated")
    rows = []
    for label, arm in result["arms"].items():
        for length, tasks in arm["scores"].items():
            for task, cell in tasks.items():
                right = [100 * cell["all_right"][name] for name in ("estimate", "low", "high")]
                head = (label, task, int(length), cell["score"], cell["samples"])
                rows.append((*head, *right, *(cell[name] for name in counts)))
    return Table(("arm", "task", "length", "score", "samples", *interval, *counts), rows)


def comparisons(result: Result) -> Table:
    """Points lost from the first arm to the second, by suite: over all, by length, by length and task."""
    rows: list[tuple[Any, ...]] = []
    for pair in result["comparisons"]:
        arms = (pair["meaning"], pair["first"], pair["second"])
        suites = {pair.get("suite"): pair, **pair.get("suites", {})}
        for suite, found in suites.items():
            head = (*arms, suite)
            rows.append((*head, None, None, *_lost(found["overall"])))
            for entry in found["lengths"]:
                rows.append((*head, entry["length"], None, *_lost(entry)))
                for task in entry["tasks"]:
                    rows.append((*head, entry["length"], task["task"], *_lost(task)))
    outcome = ("points_lost", "low", "high", "samples", "p", "p_holm", "verdict", "uninformative")
    return Table(("meaning", "first", "second", "suite", "length", "task", *outcome), rows)


def answers(predictions: Mapping[str, Predictions]) -> Table:
    """Answers to the same prompt side by side, with scores and, where it was recorded, needle recall.

    The first prompts of each cell of task and length, as many as `MOST_ANSWERS` allows, texts up to
    `LONGEST_TEXT` characters; the artifact of the stage has all of them in full.
    """
    measures = {label: _measures(records) for label, records in predictions.items()}
    columns = ["id", "task", "length", "references"]
    columns += [f"{label} {name}" for label, names in measures.items() for name in names]
    rows = []
    first = next(iter(predictions.values()))
    for name in _chosen(first):
        asked = first[name]
        row = [name, asked["task"], asked["length"], _cut(" | ".join(asked["references"]))]
        for label, records in predictions.items():
            given = records[name]
            row += [_cut(given["prediction"]), score_of(given)]
            if "needle recall" in measures[label]:
                row.append((given.get("needle") or {}).get("any"))
        rows.append(tuple(row))
    return Table(tuple(columns), rows)


def categories(result: Result) -> Table:
    """LongBench's tables: v1 by language and category, E by length bucket and category, v2 by part."""
    rows: list[tuple[Any, ...]] = []
    for label, arm in result["arms"].items():
        found = arm["longbench"]
        parts = [("v1", part, table) for part, table in found.get("v1", {}).items()]
        parts += [
            ("e", part, table) for part, table in found.get("e", {"buckets": {}})["buckets"].items()
        ]
        for suite, part, table in parts:
            for name, score in table["categories"].items():
                rows.append((label, suite, part, name, score))
            if table["average"] is not None:
                rows.append((label, suite, part, "average", table["average"]))
        for part, cell in found.get("v2", {}).items():
            if isinstance(cell, dict) and cell["score"] is not None:
                rows.append((label, "v2", part, None, cell["score"]))
    return Table(("arm", "suite", "part", "category", "score"), rows)


def _measures(records: Predictions) -> list[str]:
    recalled = any(record.get("needle") for record in records.values())
    return ["prediction", "score", *(["needle recall"] if recalled else [])]


def _chosen(records: Predictions) -> list[str]:
    cells: dict[tuple[int, str], list[str]] = {}
    for name, record in sorted(records.items()):
        cells.setdefault((record["length"], record["task"]), []).append(name)
    many = max(1, MOST_ANSWERS // len(cells))
    return [name for _, names in sorted(cells.items()) for name in names[:many]]


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "\N{HORIZONTAL ELLIPSIS}"


def _lost(entry: Mapping[str, Any]) -> Iterator[Any]:
    yield from (entry["lost"][name] for name in ("estimate", "low", "high", "samples"))
    yield from (entry.get(name) for name in ("p", "p_holm", "verdict"))
    # A task is uninformative or not; of a mean it is told how many of its tasks are.
    yield int(entry["uninformative"])


def _losses(result: Result) -> Table:
    rows = [
        (label, arm["perplexity"], arm["loss"], result["rows"], result["row_len"])
        for label, arm in result["arms"].items()
    ]
    return Table(("arm", "perplexity", "loss", "rows", "row_len"), rows)


def _positions(result: Result) -> Table:
    columns = ("first", "last", "rows", "tokens", "perplexity", "loss")
    rows = [
        (label, *(entry[name] for name in columns))
        for label, arm in result["arms"].items()
        for entry in arm.get("positions", [])
    ]
    return Table(("arm", *columns), rows)


def _changes(result: Result) -> Table:
    """Change of perplexity from the first arm to the second, over all positions and by bucket."""
    columns = ("first_position", "last_position", "change_pct", "low", "high", "rows")
    keys = ("first", "last", "estimate", "low", "high", "samples")
    rows = [
        (pair["meaning"], pair["first"], pair["second"], *(entry.get(key) for key in keys))
        for pair in result["comparisons"]
        for entry in (pair["change_pct"], *pair["change_pct"]["by_position"])
    ]
    return Table(("meaning", "first", "second", *columns), rows)


def _budgets(result: Result) -> Table:
    rows = []
    for entry in result["budgets"]:
        gap = entry["loss_gap"]
        added = (gap["estimate"], gap["low"], gap["high"], gap["samples"])
        rows.append((entry["top_k"], entry["dense_loss"], entry["loss"], *added))
    columns = ("top_k", "dense_loss", "oracle_loss", "loss_added", "low", "high", "rows")
    return Table(columns, rows)


def _layers(result: Result) -> Table:
    measures = sorted({name for entry in result["budgets"] for name in entry["layers"]})
    rows = []
    for entry in result["budgets"]:
        for layer in sorted({int(n) for by in entry["layers"].values() for n in by}):
            values = (entry["layers"].get(name, {}).get(str(layer)) for name in measures)
            rows.append((entry["top_k"], layer, *values))
    return Table(("top_k", "layer", *measures), rows)


def _needles(result: Result) -> Table:
    rows = [
        (label, int(length), mean, result["needles"]["samples"])
        for label, means in result["needles"]["scores"].items()
        for length, mean in means.items()
    ]
    return Table(("arm", "length", "score", "samples"), rows)
