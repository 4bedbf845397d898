"""Report sections of what was measured: perplexity, RULER, probe. No number is made here.

Every interval is 95 % and paired. Positive costs are losses: perplexity that rose, points that were lost.
"""

from __future__ import annotations

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
    "training drift": "A - B: what training did to the weights, both with full attention",
    "budget cost": "B - D: what is lost with the best blocks that fit the budget",
    "indexer error": "D - C: what is lost because the index branch chose other blocks",
    "cost of sparsity": "B - C: the last two together",
    "whole conversion": "A - C: everything together, against the checkpoint as it was",
}


def arm_name(label: str) -> str:
    """`converted_sparse-k16` -> `C converted, sparse, k = 16`."""
    arm, _, budget = label.partition("-k")
    letter, words = LETTERS[arm]
    return f"{letter} {words}" + (f", k = {budget}" if budget else "")


def signed(value: float, digits: int = 2) -> str:
    """A difference with its sign; what rounds to zero has none."""
    text = f"{value:+.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text


def span(interval: dict[str, Any], digits: int = 2) -> str:
    """`low to high` of a stored interval."""
    return f"{signed(interval['low'], digits)} to {signed(interval['high'], digits)}"


def when(result: dict[str, Any]) -> str:
    """Which training stages had been run before a measurement."""
    trained = result.get("after") or []
    return "after " + ", ".join(trained) if trained else "before training"


def perplexity_section(run: RunFiles) -> Section:
    """Perplexity of every arm and what it changed by."""
    section = Section("Perplexity on held-out text")
    for result in run.results["perplexity"]:
        arms = result["arms"]
        base = "original_dense" if "original_dense" in arms else next(iter(arms))
        rows: list[list[Cell | str]] = []
        for label, arm in arms.items():
            ratio = 100 * (arm["perplexity"] / arms[base]["perplexity"] - 1)
            rows.append(
                [
                    arm_name(label),
                    f"{arm['perplexity']:.3f}",
                    "reference" if label == base else f"{signed(ratio)} %",
                    f"{arm['loss']:.4f}",
                    f"{arm['seconds']:.0f} s",
                ]
            )
        caption = (
            f"{when(result)}; {result['rows']} held-out rows of {result['row_len']} tokens "
            f"({result['blocks']} blocks each), the same rows in every arm"
        )
        columns = ["arm", "perplexity", f"against {LETTERS[base][0]}", "loss, nats", "time"]
        section.blocks.append(Table(columns, rows, caption))
        section.blocks.extend(
            _costs(
                [(pair, pair["change_pct"]) for pair in result["comparisons"]],
                "%",
                "Perplexity that the second arm adds, per cent",
            )
        )
    return section


def ruler_section(run: RunFiles) -> Section:
    """Task by arm, means, costs, examples that flipped."""
    section = Section("RULER tasks")
    for result in run.results["ruler"]:
        section.blocks.append(Text(f"Corpus {result['label']}.", "warn"))
        for length in map(str, result["lengths"]):
            table = _ruler_table(result, length)
            if table is not None:
                section.blocks.append(table)
        pairs = [
            (pair | {"length": entry["length"], "entry": entry}, entry["lost"])
            for pair in result["comparisons"]
            for entry in pair["lengths"]
        ]
        section.blocks.extend(
            _costs(pairs, "points", "Points that the second arm loses, mean over tasks")
        )
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
                    f"{signed(gap['estimate'], 4)} ({span(gap, 4)})",
                    _share(mean, "learned_coverage"),
                    _share(worst, "learned_coverage"),
                    ", ".join(f"{value:.0f}" for value in needle.values()) or "not measured",
                ]
            )
        columns = ["budget", "oracle coverage, mean", "worst layer", "loss added by the oracle"]
        columns += ["index branch: learned coverage, mean", "worst layer", "needle score"]
        caption = (
            f"{when(result)}; {result['rows']} rows of {result['row_len']} tokens, blocks of "
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


def _costs(
    pairs: list[tuple[dict[str, Any], dict[str, Any]]], unit: str, label: str
) -> list[Block]:
    """Table and interval chart of paired comparisons."""
    if not pairs:
        return []
    rows: list[list[Cell | str]] = []
    bars: list[Bar] = []
    for pair, interval in pairs:
        budget = pair["second"].partition("-k")[2]
        name = pair["meaning"] + (f", k = {budget}" if budget else "")
        if len({entry.get("length") for entry, _ in pairs}) > 1:
            name += f", {pair['length']} tokens"
        note = "0 is inside" if interval["low"] <= 0 <= interval["high"] else "0 is outside"
        unseen = (pair.get("entry") or {}).get("unseen_share")
        if unseen is not None:
            note = f"no answer changed; up to {100 * unseen:.0f} % changed cannot be excluded"
        value = f"{signed(interval['estimate'])} {unit}"
        rows.append([name, value, span(interval), f"{interval['samples']}", note])
        bars.append(
            Bar(
                name,
                interval["estimate"],
                interval["low"],
                interval["high"],
                _COLOURS[pair["meaning"]],
            )
        )
    columns = ["cost", "estimate", "95 % interval", "pairs", "zero"]
    legend = "; ".join(f"{name}: {words}" for name, words in MEANINGS.items())
    return [Table(columns, rows), Chart(interval_chart(bars, x_label=label), legend)]


def _ruler_table(result: dict[str, Any], length: str) -> Table | None:
    arms = {label: arm for label, arm in result["arms"].items() if length in arm["scores"]}
    if not arms:
        return None
    tasks = sorted({task for arm in arms.values() for task in arm["scores"][length]})
    rows: list[list[Cell | str]] = []
    for task in tasks:
        row: list[Cell | str] = [task]
        for arm in arms.values():
            cell = arm["scores"][length][task]
            note = f"{cell['samples']} prompts; stopped: {cell['stopped']}; empty: {cell['empty']}"
            mark = "*" if cell["uninformative"] else ""
            row.append(Cell(f"{cell['score']:.1f}{mark}", cell["score"], note))
        rows.append(row)
    average = [Cell(f"{arm['means'][length]:.1f}", arm["means"][length]) for arm in arms.values()]
    rows.append(["mean over tasks", *average])
    rows.append(["seconds", *(f"{arm['seconds']:.0f}" for arm in arms.values())])
    caption = (
        f"{when(result)}; {length} tokens, {result['samples']} prompts a task, the same in every arm. "
        "* below 10 or above 99: says little about a difference"
    )
    return Table(["task", *map(arm_name, arms)], rows, caption)


def _ruler_notes(result: dict[str, Any]) -> list[Block]:
    blocks: list[Block] = []
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
            Text("Cells that differ by McNemar's exact test: " + "; ".join(changed) + ".")
        )
    else:
        blocks.append(
            Text("No single cell differs by McNemar's exact test after Holm's correction.")
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
        blocks.append(Details(f"Answers lost with sparse attention at k = {budget}", text))
    return blocks


def _share(values: dict[str, float], name: str) -> str:
    return f"{values[name]:.3f}" if name in values else "not measured"
