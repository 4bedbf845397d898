"""Report section of perplexity: every arm and budget, what it changed by, and where in the document."""

from __future__ import annotations

from typing import Any

from .charts import Series, line_chart
from .report_blocks import Block, Cell, Chart, Section, Table
from .report_costs import Cost, costs
from .report_data import RunFiles
from .report_words import (
    LETTERS,
    arm_name,
    budget_of,
    colour_of,
    few,
    find_pair,
    main_budget,
    measured_in,
    position_name,
    short_name,
    shown_arms,
    signed,
    span,
    when,
)


def perplexity_section(run: RunFiles) -> Section:
    """Perplexity of every arm, what it changed by, and by position in the document."""
    section = Section("Perplexity on held-out text")
    final = run.final("perplexity")
    for result in run.results["perplexity"]:
        arms = result["arms"]
        base = "original_dense" if "original_dense" in arms else next(iter(arms))
        caption = (
            f"{when(run, result)}; {result['rows']} held-out rows of {result['row_len']} tokens "
            f"({result['blocks']} blocks each), the same rows in every arm{measured_in(result)}; "
            f"below each the change against {LETTERS[base][0]}"
        )
        section.blocks.append(_table(arms, base, caption))
        found = [
            Cost(pair["meaning"], budget_of(pair["second"]), pair["change_pct"])
            for pair in result["comparisons"]
        ]
        caption = (
            f"{when(run, result)}; per cent of perplexity, with 95 % intervals from {result['rows']} "
            f"paired rows{few(result['rows'])}; positive is worse"
        )
        section.blocks.extend(costs(found, caption, "perplexity that is added, per cent", digits=2))
        if result in final:
            section.blocks.extend(_by_position(run, result))
    return section


def _by_position(run: RunFiles, result: dict[str, Any]) -> list[Block]:
    """Perplexity of each arm by bucket, and what sparsity, budget and indexer added there."""
    labels = [label for label in shown_arms(run, result) if result["arms"][label].get("positions")]
    if not labels:
        return []
    top_k = main_budget(run, result)
    pairs = {
        meaning: pair["change_pct"]["by_position"]
        for meaning in ("cost of sparsity", "budget cost", "indexer error", "training drift")
        if (pair := find_pair(result, meaning, top_k)) and pair["change_pct"].get("by_position")
    }
    several = len(result["arms"][labels[0]]["positions"]) > 1
    blocks: list[Block] = _position_charts(result, labels, pairs) if several else []
    table = {
        label: {entry["first"]: entry for entry in result["arms"][label]["positions"]}
        for label in labels
    }
    changes = {
        name: {entry["first"]: entry for entry in entries} for name, entries in pairs.items()
    }
    rows: list[list[Cell | str]] = []
    for first, entry in table[labels[0]].items():
        row: list[Cell | str] = [position_name(first, entry["last"]), f"{entry['tokens']:,}"]
        row += [f"{table[label][first]['perplexity']:.3f}" for label in labels]
        for found in changes.values():
            change = found.get(first)
            row.append(
                Cell(f"{signed(change['estimate'])} %", small=span(change)) if change else ""
            )
        rows.append(row)
    columns = ["position", "targets", *map(short_name, labels), *changes]
    caption = (
        f"Perplexity by position in the document, k = {top_k}, and what each cause adds there, with 95 % "
        f"intervals over rows{few(result['rows'])}; a mean over positions hides late ones"
    )
    return [*blocks, Table(columns, rows, caption)]


def _position_charts(
    result: dict[str, Any], labels: list[str], pairs: dict[str, list[dict[str, Any]]]
) -> list[Block]:
    lines = [
        Series(
            arm_name(label),
            [
                (float(entry["last"]), entry["perplexity"])
                for entry in result["arms"][label]["positions"]
            ],
            colour_of(label),
        )
        for label in labels
    ]
    axis = "position in the document, up to"
    chart = line_chart(lines, x_label=axis, y_label="perplexity", doubling=True)
    blocks: list[Block] = [Chart(chart, "Perplexity by position", half=True)]
    colours = {"cost of sparsity": 3, "budget cost": 2, "indexer error": 1}
    shown = [
        Series(
            name,
            [(float(entry["last"]), entry["estimate"]) for entry in pairs[name]],
            colour,
            # One band: three on top of each other say nothing.
            band=[(entry["low"], entry["high"]) for entry in pairs[name]]
            if name == "cost of sparsity"
            else (),
        )
        for name, colour in colours.items()
        if name in pairs
    ]
    chart = line_chart(shown, x_label=axis, y_label="per cent added", doubling=True, zero=True)
    blocks.append(Chart(chart, "What sparsity adds by position, with its 95 % band", half=True))
    return blocks


def _table(arms: dict[str, Any], base: str, caption: str) -> Table:
    """Arm by budget."""
    budgets = list(dict.fromkeys(budget_of(label) for label in arms))
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
