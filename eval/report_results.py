"""Report sections of what was measured: perplexity, RULER, probe. No number is made here.

Every interval is 95 % and paired. Positive costs are losses: perplexity that rose, points that were lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .charts import Bar, Series, interval_chart, line_chart
from .report_blocks import Block, Cell, Chart, Details, Section, Table, Text
from .report_data import RunFiles

LETTERS = {
    "original_dense": ("A", "original, dense"),
    "converted_dense": ("B", "converted, dense"),
    "converted_sparse": ("C", "converted, sparse"),
    "converted_oracle": ("D", "converted, oracle"),
}
_COLOURS = {
    "training drift": 0,
    "budget cost": 2,
    "indexer error": 1,
    "cost of sparsity": 3,
    "whole conversion": 4,
}
MEANINGS = {
    "training drift": "A to B: training moved the weights",
    "budget cost": "B to D: only the best k blocks are read",
    "indexer error": "D to C: the index branch chose others",
    "cost of sparsity": "B to C: the last two",
    "whole conversion": "A to C: all of it",
}


def arm_name(label: str) -> str:
    """`converted_sparse-k16` -> `C converted, sparse, k = 16`."""
    arm, _, budget = label.partition("-k")
    letter, words = LETTERS[arm]
    return f"{letter} {words}" + (f", k = {budget}" if budget else "")


def signed(value: float, digits: int = 2) -> str:
    """A difference with its sign; what rounds to zero has none."""
    text = f"{value:+.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def span(interval: dict[str, Any], digits: int = 2) -> str:
    """`low to high` of a stored interval."""
    return f"{signed(interval['low'], digits)} to {signed(interval['high'], digits)}"


def when(run: RunFiles, result: dict[str, Any]) -> str:
    """Which training stages had been run before a measurement, or which checkpoint it was."""
    if result.get("state"):
        return str(result["state"])
    trained = result.get("after") or []
    return "after " + ", ".join(trained) if trained else f"before training: {start_name(run)}"


def start_name(run: RunFiles) -> str:
    """What the index branch is before it is trained."""
    made = run.recipe.get("sparsity", {}).get("init", "pca")
    return {"pca": "closed-form start"}.get(made, f"{made} start")


def measured_tasks(result: dict[str, Any], length: int | str | None = None) -> list[str]:
    """Tasks of a RULER stage that have scores, at one length or any."""
    scores = [arm["scores"] for arm in result["arms"].values()]
    return sorted(
        {
            task
            for by_length in scores
            for known, tasks in by_length.items()
            if length is None or known == str(length)
            for task in tasks
        }
    )


def ruler_name(tasks: Sequence[str]) -> str:
    """One task by its name, several as the mean that a figure is of."""
    return f"RULER {tasks[0]}" if len(tasks) == 1 else f"RULER mean of {listed(tasks)}"


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(part for part in (", ".join(words[:-1]), *words[-1:]) if part)


def perplexity_section(run: RunFiles) -> Section:
    """Perplexity of every arm and what it changed by."""
    section = Section("Perplexity on held-out text")
    for result in run.results["perplexity"]:
        arms = result["arms"]
        base = "original_dense" if "original_dense" in arms else next(iter(arms))
        caption = (
            f"{when(run, result)}; {result['rows']} held-out rows of {result['row_len']} tokens "
            f"({result['blocks']} blocks each), the same rows in every arm; "
            f"below each the change against {LETTERS[base][0]}"
        )
        section.blocks.append(_perplexity_table(arms, base, caption))
        costs = [
            _Cost(pair["meaning"], _budget(pair["second"]), pair["change_pct"])
            for pair in result["comparisons"]
        ]
        caption = (
            f"{when(run, result)}; per cent of perplexity, with 95 % intervals from {result['rows']} "
            f"paired rows{_few(result['rows'])}; positive is worse"
        )
        section.blocks.extend(_costs(costs, caption, "perplexity that is added, per cent"))
    return section


def ruler_section(run: RunFiles) -> Section:
    """Task by arm, means, costs, examples that flipped."""
    section = Section("RULER tasks")
    final = run.final("ruler")
    for result in run.results["ruler"]:
        section.blocks.append(Text(f"Corpus {result['label']}.", "warn"))
        for length in map(str, result["lengths"]):
            table = _ruler_table(result, length, when(run, result))
            if table is not None:
                section.blocks.append(table)
            if result in final:
                section.blocks.extend(_ruler_costs(result, int(length)))
        if result in final:
            section.blocks.extend(_ruler_notes(result))
            section.blocks.extend(_flips(result))
    return section


def probe_section(run: RunFiles) -> Section:
    """The ceiling at each budget, before training."""
    section = Section("Oracle probe: the ceiling at each budget")
    for result in run.results["probe"]:
        rows: list[list[Cell | str]] = []
        needles = (result.get("needles") or {}).get("scores", {})
        for entry in result["budgets"]:
            mean, worst = entry["mean"], entry["worst"]
            needle = needles.get(f"converted_oracle-k{entry['top_k']}", {})
            gap = entry["loss_gap"]
            rows.append(
                [
                    f"k = {entry['top_k']}",
                    _share(mean, "oracle_coverage"),
                    _share(worst, "oracle_coverage"),
                    Cell(signed(gap["estimate"], 4), small=span(gap, 4)),
                    _share(mean, "learned_coverage"),
                    _share(worst, "learned_coverage"),
                    ", ".join(f"{value:.0f}" for value in needle.values()) or "not measured",
                ]
            )
        columns = ["budget", "oracle coverage, mean", "worst layer", "loss added by the oracle"]
        columns += ["index branch: learned coverage, mean", "worst layer", "needle score"]
        caption = (
            f"{when(run, result)}; {result['rows']} rows of {result['row_len']} tokens, blocks of "
            f"{result['block_size']}; coverage is the share of attention mass in the kept blocks"
        )
        section.blocks.append(Table(columns, rows, caption))
        series = [
            Series(
                f"k = {entry['top_k']}",
                [
                    (float(layer), value)
                    for layer, value in entry["layers"]["oracle_coverage"].items()
                ],
                colour,
            )
            for colour, entry in enumerate(result["budgets"])
            if "oracle_coverage" in entry["layers"]
        ]
        chart = line_chart(series, x_label="layer", y_label="oracle coverage")
        section.blocks.append(Chart(chart, "Attention mass that the best k blocks hold, by layer"))
    return section


@dataclass(frozen=True)
class _Cost:
    """One paired comparison: what it means, the budget of its second arm ("" if dense), its interval."""

    meaning: str
    budget: str
    interval: dict[str, Any]
    unseen_share: float | None = None


def _costs(costs: list[_Cost], caption: str, axis: str) -> list[Block]:
    """Meaning by budget as a table, and the same intervals as a chart."""
    if not costs:
        return []
    budgets = list(dict.fromkeys(cost.budget for cost in costs))
    shown = {(cost.meaning, cost.budget): _cost_cell(cost) for cost in costs}
    rows: list[list[Cell | str]] = [
        [f"{meaning} ({words})", *(shown.get((meaning, budget), "") for budget in budgets)]
        for meaning, words in MEANINGS.items()
        if any(cost.meaning == meaning for cost in costs)
    ]
    bars = [
        Bar(
            cost.meaning + (f", k = {cost.budget}" if cost.budget else ""),
            cost.interval["estimate"],
            cost.interval["low"],
            cost.interval["high"],
            _COLOURS[cost.meaning],
        )
        for cost in costs
    ]
    columns = ["cost", *(f"k = {budget}" if budget else "all blocks" for budget in budgets)]
    legend = "Estimates and 95 % intervals; an interval that holds zero leaves the sign open."
    return [Table(columns, rows, caption), Chart(interval_chart(bars, x_label=axis), legend)]


def _cost_cell(cost: _Cost) -> Cell:
    if cost.unseen_share is not None:
        note = "share of changed answers that so few pairs cannot exclude, 95 %"
        return Cell("no answer changed", None, note, f"up to {100 * cost.unseen_share:.0f} % could")
    return Cell(signed(cost.interval["estimate"]), small=span(cost.interval))


def _few(pairs: int) -> str:
    return " (so few that they are narrower than they should be)" if pairs < 10 else ""


def _budget(label: str) -> str:
    return label.partition("-k")[2]


def _perplexity_table(arms: dict[str, Any], base: str, caption: str) -> Table:
    """Arm by budget."""
    budgets = list(dict.fromkeys(_budget(label) for label in arms))
    rows: list[list[Cell | str]] = []
    for arm, (letter, words) in LETTERS.items():
        row: list[Cell | str] = [f"{letter} {words}"]
        for budget in budgets:
            found = arms.get(f"{arm}-k{budget}" if budget else arm)
            if found is None:
                row.append("")
                continue
            change = 100 * (found["perplexity"] / arms[base]["perplexity"] - 1)
            against = "" if found is arms[base] else f"{signed(change)} %"
            note = f"loss {found['loss']:.4f} nats; {found['seconds']:.0f} s"
            row.append(Cell(f"{found['perplexity']:.3f}", None, note, against))
        if any(row[1:]):
            rows.append(row)
    columns = ["arm", *(f"k = {budget}" if budget else "all blocks" for budget in budgets)]
    return Table(columns, rows, caption)


def _ruler_costs(result: dict[str, Any], length: int) -> list[Block]:
    costs, pairs = [], 0
    for pair in result["comparisons"]:
        for entry in pair["lengths"]:
            if entry["length"] == length:
                pairs = entry["lost"]["samples"]
                budget = _budget(pair["second"])
                costs.append(_Cost(pair["meaning"], budget, entry["lost"], entry["unseen_share"]))
    name = ruler_name(measured_tasks(result, length))
    caption = (
        f"{name}: points lost at {length} tokens, with 95 % intervals from {pairs} paired "
        f"answers{_few(pairs)}; positive is worse"
    )
    return _costs(costs, caption, f"points that are lost, {name}")


def _ruler_table(result: dict[str, Any], length: str, state: str) -> Table | None:
    arms = {label: arm for label, arm in result["arms"].items() if length in arm["scores"]}
    if not arms:
        return None
    tasks = measured_tasks(result, length)
    rows: list[list[Cell | str]] = []
    for task in tasks:
        row: list[Cell | str] = [task]
        for arm in arms.values():
            cell = arm["scores"][length][task]
            note = f"{cell['samples']} prompts; stopped: {cell['stopped']}; empty: {cell['empty']}"
            mark = "*" if cell["uninformative"] else ""
            row.append(Cell(f"{cell['score']:.1f}{mark}", cell["score"], note))
        rows.append(row)
    if len(tasks) > 1:
        means = [arm["means"][length] for arm in arms.values()]
        average = [Cell(f"{mean:.1f}", mean) for mean in means]
        rows.append([f"mean of these {len(tasks)} tasks", *average])
    rows.append(["seconds, all lengths", *(f"{arm['seconds']:.0f}" for arm in arms.values())])
    caption = (
        f"{state}; {length} tokens, {result['samples']} prompts a task, the same in every arm. "
        "* below 10 or above 99: says little about a difference"
    )
    return Table(["task", *map(arm_name, arms)], rows, caption)


def _ruler_notes(result: dict[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    name = f"{', '.join(measured_tasks(result)) or 'RULER'} ({result['samples']} prompts a task)"
    for skipped in result["skipped"]:
        blocks.append(Text(f"Left out at {skipped['length']} tokens: {skipped['reason']}.", "warn"))
    changed = [
        f"{pair['meaning']} ({arm_name(pair['second'])}), {task['task']} at {entry['length']}: "
        f"{task['worse']} worse, {task['better']} better, Holm-adjusted p = {task['p_holm']:.3f}"
        for pair in result["comparisons"]
        for entry in pair["lengths"]
        for task in entry["tasks"]
        if task["p_holm"] < 0.05
    ]
    if changed:
        blocks.append(
            Text(f"{name}: cells that differ by McNemar's exact test: {'; '.join(changed)}.")
        )
    else:
        blocks.append(
            Text(f"{name}: no single cell differs by McNemar's exact test after Holm's correction.")
        )
    return blocks


def _flips(result: dict[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    for pair in result["comparisons"]:
        lost = [flip for flip in pair["flips"] if flip["scores"][0] > flip["scores"][1]]
        if pair["meaning"] != "cost of sparsity" or not lost:
            continue
        text = "\n\n".join(
            f"{flip['id']}   wanted: {', '.join(flip['references'])}\n"
            f"  {arm_name(pair['first'])} ({flip['scores'][0]:.0f}): {flip['first'].strip()}\n"
            f"  {arm_name(pair['second'])} ({flip['scores'][1]:.0f}): {flip['second'].strip()}"
            for flip in lost
        )
        budget = pair["second"].partition("-k")[2]
        tasks = listed(measured_tasks(result))
        summary = f"Answers lost with sparse attention at k = {budget}: {tasks}"
        blocks.append(Details(summary, text))
    return blocks


def _share(values: dict[str, float], name: str) -> str:
    return f"{values[name]:.3f}" if name in values else "not measured"
