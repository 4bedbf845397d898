"""Report section of LongBench: categories, tasks, buckets of LongBench-E, version 2; what is missing."""

from __future__ import annotations

from typing import Any

from .longbench_tasks import BUCKETS, CATEGORIES, DIFFICULTIES, V2_LENGTHS
from .report_blocks import Block, Cell, Section, Table, Text
from .report_costs import Cost, costs
from .report_data import RunFiles
from .report_ruler import flips
from .report_words import (
    arm_name,
    budget_of,
    counted,
    longbench_name,
    measured_in,
    shown_arms,
    suite_pairs,
    when,
)

_LANGUAGES = {"en": "English", "zh": "Chinese"}


def longbench_section(run: RunFiles) -> Section:
    """Every LongBench stage that measured something."""
    section = Section("LongBench")
    for result in run.results["longbench"]:
        if not result.get("measured"):
            continue
        labels = shown_arms(run, result)
        arms = {label: result["arms"][label]["longbench"] for label in labels}
        section.blocks.append(Text(when(run, result) + measured_in(result), "head"))
        section.blocks.extend(_causes(result))
        for name in _LANGUAGES:
            section.blocks.extend(_categories(arms, name))
        section.blocks.extend(_buckets(arms) + _version_2(arms))
        section.blocks.append(_tasks(arms))
        section.blocks.extend(flips(run, result))
    return section


def missing_tasks(result: dict[str, Any]) -> list[str]:
    """Sentences: why tasks were not measured, one a reason."""
    reasons: dict[str, list[str]] = {}
    for entry in result.get("missing") or []:
        reason = entry["reason"].removeprefix("not measured: ")
        reasons.setdefault(reason, []).append(entry["task"])
    return [f"{', '.join(tasks)} ({reason})" for reason, tasks in reasons.items()]


def _categories(arms: dict[str, Any], language: str) -> list[Block]:
    tables = {label: found["v1"][language] for label, found in arms.items() if "v1" in found}
    if not any(table["categories"] for table in tables.values()):
        return []
    rows: list[list[Cell | str]] = []
    for category in CATEGORIES:
        values = [table["categories"].get(category) for table in tables.values()]
        if any(value is not None for value in values):
            rows.append([category, *map(_score, values)])
    averages = [table["average"] for table in tables.values()]
    missing = next(iter(tables.values()))["missing"]
    caption = (
        f"LongBench, {_LANGUAGES[language]}: means of the categories' tasks that were measured"
    )
    if any(value is not None for value in averages):
        rows.append(["average of the six", *map(_score, averages)])
    else:
        caption += f"; no average, as published ones need {', '.join(missing)} too"
    return [Table(["category", *map(arm_name, tables)], rows, caption)]


def _buckets(arms: dict[str, Any]) -> list[Block]:
    tables = {label: found["e"] for label, found in arms.items() if "e" in found}
    if not tables:
        return []
    rows: list[list[Cell | str]] = []
    for bucket in BUCKETS:
        values = [table["buckets"][bucket]["average"] for table in tables.values()]
        if any(value is not None for value in values):
            rows.append([f"{bucket} words", *map(_score, values)])
    first = next(iter(tables.values()))
    for task in sorted(first["tasks"]):
        for bucket in BUCKETS:
            values = [table["tasks"][task][bucket] for table in tables.values()]
            if any(value is not None for value in values):
                count = f"{first['samples'][task][bucket]} records"
                rows.append([Cell(f"{task}, {bucket}", small=count), *map(_score, values)])
    caption = "LongBench-E by length of the record; averages only where all 13 tasks have records"
    return [Table(["bucket", *map(arm_name, tables)], rows, caption, fold="LongBench-E by length")]


def _version_2(arms: dict[str, Any]) -> list[Block]:
    tables = {label: found["v2"] for label, found in arms.items() if "v2" in found}
    if not tables:
        return []
    rows: list[list[Cell | str]] = []
    first = next(iter(tables.values()))
    for name in ("overall", *DIFFICULTIES, *V2_LENGTHS):
        head = Cell(name, small=f"{first[name]['samples']} questions")
        rows.append([head, *(_score(table[name]["score"]) for table in tables.values())])
    rows.append(["no readable choice", *(str(table["unreadable"]) for table in tables.values())])
    caption = "LongBench v2: per cent of right choices; chance is 25"
    return [Table(["part", *map(arm_name, tables)], rows, caption)]


def _tasks(arms: dict[str, Any]) -> Table:
    names = sorted({task for found in arms.values() for task in found["tasks"]})
    rows: list[list[Cell | str]] = []
    for name in names:
        cells = [found["tasks"].get(name) for found in arms.values()]
        known = next(cell for cell in cells if cell)
        of = f" of {known['published']}" if known["published"] else ""
        head = Cell(name, small=f"{known['samples']}{of} records")
        scores = [cell["score"] if cell else None for cell in cells]
        moot = max((s for s in scores if s is not None), default=0) < 10
        rows.append([head, *(_score(score, moot=moot) for score in scores)])
    caption = "LongBench by task, with the metric of each; * every arm below 10: says little"
    return Table(["task", *map(arm_name, arms)], rows, caption)


def _causes(result: dict[str, Any]) -> list[Block]:
    """A table and a chart for each suite."""
    found: dict[str, list[Cost]] = {}
    for pair in result["comparisons"]:
        for one in suite_pairs(pair):
            if "overall" in one:
                entry = one["overall"]
                cost = Cost(
                    one["meaning"], budget_of(one["second"]), entry["lost"], entry["unseen_share"]
                )
                found.setdefault(longbench_name(one), []).append(cost)
    blocks: list[Block] = []
    for name, many in found.items():
        answers = counted(int(many[0].interval["samples"]), "paired answer")
        caption = f"{name}: points lost, with 95 % intervals from {answers}; positive is worse"
        blocks += costs(many, caption, f"points that are lost, {name}")
    return blocks


def _score(value: float | None, *, moot: bool = False) -> Cell | str:
    return "" if value is None else Cell(f"{value:.1f}", value, moot=moot)
