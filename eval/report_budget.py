"""Report section of the budget: one converted checkpoint at several k, quality beside cost."""

from __future__ import annotations

from typing import Any

from .charts import Series, line_chart
from .report_arithmetic import dense_per_token, operations, sparse_per_token
from .report_blocks import Block, Cell, Chart, Section, Table
from .report_data import RunFiles
from .report_words import (
    budgets,
    colour_of,
    find_pair,
    length_name,
    measured_lengths,
    measured_tasks,
    ruler_name,
    signed,
    span,
)

_ARMS = {"converted_sparse": "C index branch", "converted_oracle": "D oracle"}


def budget_section(run: RunFiles) -> Section:
    """Every result of the newest weights that measured two budgets or more."""
    intro = (
        "The same checkpoint reads fewer or more blocks. Operations are arithmetic: attention only, per "
        "token, averaged over a row of that length (eval/report_arithmetic.py), and say nothing of time."
    )
    section = Section("Quality against budget", intro=intro)
    for result in run.final("perplexity"):
        if len(budgets(result)) > 1:
            section.blocks.extend(_perplexity(result))
    for result in run.final("ruler"):
        if len(budgets(result)) > 1:
            charts: list[Block] = []
            tables: list[Block] = []
            for length in measured_lengths(result):
                chart, table = _ruler(result, length)
                charts.append(chart)
                tables.append(table)
            section.blocks.extend([*charts, *tables])
    return section


def _perplexity(result: dict[str, Any]) -> list[Block]:
    values = {label: arm["perplexity"] for label, arm in result["arms"].items()}
    shape = _shape(result)
    rows: list[list[Cell | str]] = [_dense_row(values, shape, result["row_len"], 3)]
    for top_k in budgets(result):
        row = _row(values, top_k, 3)
        pair = find_pair(result, "cost of sparsity", top_k)
        row.append(
            Cell(f"{signed(pair['change_pct']['estimate'])} %", small=span(pair["change_pct"]))
            if pair
            else ""
        )
        rows.append([*row, *_arithmetic(shape, result["row_len"], top_k)])
    columns = ["budget", "B dense", *_ARMS.values(), "added from B to C", *_ARITHMETIC]
    length = length_name(result["row_len"])
    caption = f"Perplexity on rows of {length} tokens ({result['blocks']} blocks)"
    chart = _chart(values, budgets(result), "perplexity")
    return [
        Table(columns, rows, caption),
        Chart(chart, f"Perplexity against budget, {length} tokens"),
    ]


def _ruler(result: dict[str, Any], length: str) -> tuple[Chart, Table]:
    shape = _shape(result)
    values = {
        label: arm["means"][length]
        for label, arm in result["arms"].items()
        if length in arm["means"]
    }
    rows: list[list[Cell | str]] = [_dense_row(values, shape, int(length), 1)]
    rows[0].append(_seconds(result, "converted_dense", length))
    for top_k in budgets(result):
        row = _row(values, top_k, 1)
        pair = find_pair(result, "cost of sparsity", top_k)
        entries = pair["lengths"] if pair else []
        lost = next((entry["lost"] for entry in entries if str(entry["length"]) == length), None)
        row.append("" if lost is None else Cell(signed(lost["estimate"]), small=span(lost)))
        row += _arithmetic(shape, int(length), top_k)
        rows.append([*row, _seconds(result, f"converted_sparse-k{top_k}", length)])
    name = ruler_name(measured_tasks(result, length))
    columns = ["budget", "B dense", *_ARMS.values(), "points lost from B to C", *_ARITHMETIC]
    columns.append("C: seconds a prompt, a token")
    caption = f"{name} at {length_name(length)} tokens; seconds are those of this machine"
    chart = _chart(values, budgets(result), "score")
    where = f"{name} against budget, {length_name(length)} tokens"
    return Chart(chart, where, half=True), Table(columns, rows, caption)


_ARITHMETIC = ("operations a token (arithmetic)", "of dense attention's")


def _arithmetic(shape: dict[str, int] | None, length: int, top_k: int) -> list[Cell | str]:
    if shape is None:
        return ["", ""]
    count = sparse_per_token(shape, length, top_k)
    return [operations(count), f"{100 * count / dense_per_token(shape, length):.0f} %"]


def _dense_row(
    values: dict[str, float], shape: dict[str, int] | None, length: int, digits: int
) -> list[Cell | str]:
    dense = values.get("converted_dense")
    shown = "" if dense is None else f"{dense:.{digits}f}"
    count = "" if shape is None else operations(dense_per_token(shape, length))
    return ["all blocks", shown, "", "", "", count, "100 %" if count else ""]


def _row(values: dict[str, float], top_k: int, digits: int) -> list[Cell | str]:
    found = [values.get(f"{arm}-k{top_k}") for arm in _ARMS]
    return [f"k = {top_k}", "", *("" if one is None else f"{one:.{digits}f}" for one in found)]


def _chart(values: dict[str, float], top_ks: list[int], unit: str) -> str:
    """C and D against k, with B as a level."""
    series = [
        Series(
            words,
            [(float(k), values[f"{arm}-k{k}"]) for k in top_ks if f"{arm}-k{k}" in values],
            colour_of(arm),
        )
        for arm, words in _ARMS.items()
    ]
    dense = values.get("converted_dense")
    if dense is not None:
        ends = [(float(top_ks[0]), dense), (float(top_ks[-1]), dense)]
        series.append(Series("B all blocks", ends, colour_of("converted_dense"), dashed=True))
    shown = [one for one in series if one.points]
    return line_chart(shown, x_label="budget, blocks", y_label=unit, doubling=True)


def _seconds(result: dict[str, Any], label: str, length: str) -> str:
    cost = (result["arms"].get(label, {}).get("costs") or {}).get(length)
    if not cost:
        return ""
    return f"{cost['prefill_s']:.3g}, {cost['s_per_new_token']:.3g}"


def _shape(result: dict[str, Any]) -> dict[str, int] | None:
    """Of the converted model; None in results of an earlier version."""
    shapes = [arm.get("shape") or {} for arm in result["arms"].values()]
    return next((shape for shape in shapes if "block_size" in shape), None)
