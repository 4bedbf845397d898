"""The numbers of the report as CSV: one line each, nothing that the result files do not hold."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from typing import Any

from .report_data import RunFiles
from .report_lm_eval import lm_eval_rows
from .report_words import suite_name, suite_pairs
from .tables import by_suite

COLUMNS = ("kind", "stage", "length", "task", "arm", "measure", "value", "low", "high", "samples")
TESTS = ("worse", "better", "p", "p_holm", "verdict", "margin", "unseen_share")
"""Of a comparison; the first four of a task, the others of a mean."""


def to_csv(run: RunFiles) -> str:
    """Every number of the evaluation stages."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS + TESTS, restval="", lineterminator="\n")
    writer.writeheader()
    for kind, rows in (
        ("perplexity", _perplexity_rows),
        ("ruler", _score_rows),
        ("longbench", _score_rows),
        ("longbench", _longbench_rows),
        ("probe", _probe_rows),
    ):
        for result in run.results[kind]:
            for row in rows(result):
                writer.writerow({"kind": kind, "stage": result["stage"], **row})
    for row in lm_eval_rows(run):
        writer.writerow({"kind": "lm-eval", **row})
    return text.getvalue()


def _perplexity_rows(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for label, arm in result["arms"].items():
        shared = {"length": result["row_len"], "arm": label}
        yield {
            **shared,
            "measure": "perplexity",
            "value": arm["perplexity"],
            "samples": result["rows"],
        }
        for entry in arm.get("positions", []):
            measure = f"perplexity {_at(entry)}"
            yield {
                **shared,
                "measure": measure,
                "value": entry["perplexity"],
                "samples": entry["rows"],
            }
    for pair in result["comparisons"]:
        change, measure = pair["change_pct"], f"{pair['meaning']} (%)"
        yield {"length": result["row_len"], **_gap(pair, measure, change)}
        for entry in change.get("by_position", []):
            yield {"length": result["row_len"], **_gap(pair, f"{measure} {_at(entry)}", entry)}


def _at(entry: dict[str, Any]) -> str:
    return f"at positions {entry['first']} to {entry['last']}"


def _score_rows(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of RULER and of LongBench; `points lost` are first arm minus second."""
    for label, arm in result.get("arms", {}).items():
        for length, tasks in arm["scores"].items():
            for task, cell in tasks.items():
                shared = {"length": length, "task": task, "arm": label, "samples": cell["samples"]}
                yield {**shared, "measure": "score", "value": cell["score"]}
                for count in ("truncated", "empty", "at_limit"):
                    if count in cell:
                        yield {**shared, "measure": count, "value": cell[count]}
            suite = next(iter(by_suite(tasks).values()))
            shared = {"length": length, "task": _mean_of(suite), "arm": label}
            yield {**shared, "measure": "score", "value": arm["means"][length]}
        for name, value in (arm.get("ruler") or {}).items():
            if name != "all_tasks" and value is not None:
                yield {"length": "all", "arm": label, "measure": name, "value": value}
        if "seconds" in arm:
            yield {"length": "all", "arm": label, "measure": "seconds", "value": arm["seconds"]}
        yield from _needle_rows(label, arm)
    for pair in result.get("comparisons", []):
        for one in suite_pairs(pair):
            yield from _pair_rows(one, result.get("margin"))


def _pair_rows(pair: dict[str, Any], margin: float | None) -> Iterator[dict[str, Any]]:
    """Of one suite: each task and the mean at each length, and the mean of all."""
    measure = f"{pair['meaning']} (points lost)"
    for entry in pair["lengths"]:
        shared = {
            "length": entry["length"],
            "task": _mean_of(one["task"] for one in entry["tasks"]),
        }
        yield {**shared, "margin": margin, **_tests(entry), **_gap(pair, measure, entry["lost"])}
        for task in entry["tasks"]:
            shared = {"length": entry["length"], "task": task["task"]}
            yield {**shared, **_tests(task), **_gap(pair, measure, task["lost"])}
    if "overall" in pair:
        entry = pair["overall"]
        shared = {
            "length": "all",
            "task": "" if pair.get("suite", "ruler") == "ruler" else suite_name(pair),
        }
        yield {**shared, "margin": margin, **_tests(entry), **_gap(pair, measure, entry["lost"])}


def _tests(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in TESTS if name in entry}


def _mean_of(tasks: Iterable[str]) -> str:
    """A single task's mean is named as one too, so that no two lines have one name."""
    return f"mean of {' + '.join(sorted(tasks))}"


def _needle_rows(label: str, arm: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for length, entries in (arm.get("depths") or {}).items():
        for entry in entries:
            measure = f"score at depth {entry['depth']:.1f}"
            shared = {"length": length, "arm": label, "samples": entry["samples"]}
            yield {**shared, "measure": measure, "value": entry["score"]}
    for length, tasks in ((arm.get("needles") or {}).get("lengths") or {}).items():
        for task, cell in tasks.items():
            shared = {"length": length, "task": task, "arm": label, "samples": cell["samples"]}
            for name in ("share", "first", "any", "kept"):
                yield {**shared, "measure": f"needle block recall ({name})", "value": cell[name]}


def _longbench_rows(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for label, arm in result.get("arms", {}).items():
        found = arm.get("longbench", {})
        for language, table in found.get("v1", {}).items():
            for name, score in table["categories"].items():
                yield {"arm": label, "measure": f"{language}: {name}", "value": score}
            if table["average"] is not None:
                yield {"arm": label, "measure": f"{language}: average", "value": table["average"]}
        for task, buckets in found.get("e", {}).get("tasks", {}).items():
            for bucket, score in buckets.items():
                if score is not None:
                    yield {"task": task, "arm": label, "measure": f"E: {bucket}", "value": score}
        for name, cell in found.get("v2", {}).items():
            if isinstance(cell, dict) and cell["score"] is not None:
                shared = {"arm": label, "samples": cell["samples"]}
                yield {**shared, "measure": f"v2: {name}", "value": cell["score"]}


def _probe_rows(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for entry in result["budgets"]:
        shared = {"length": result["row_len"], "arm": f"converted_oracle-k{entry['top_k']}"}
        for which in ("mean", "worst"):
            for name, value in entry[which].items():
                yield {**shared, "measure": f"{name} ({which} layer)", "value": value}
        yield {**shared, "measure": "loss added (nats)"} | _interval(entry["loss_gap"])


def _gap(pair: dict[str, Any], measure: str, interval: dict[str, Any]) -> dict[str, Any]:
    return {"arm": f"{pair['first']} > {pair['second']}", "measure": measure, **_interval(interval)}


def _interval(interval: dict[str, Any]) -> dict[str, Any]:
    named = {name: interval[name] for name in ("low", "high", "samples")}
    return {"value": interval["estimate"], **named}
