"""Report section of the budget: one converted checkpoint at several k, quality beside cost."""

from __future__ import annotations

from typing import Any

from .charts import Series, line_chart, padded
from .report_arithmetic import dense_per_token, operations, shape_of, sparse_per_token
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
    scored_results,
    signed,
    span,
    suite_name,
    suite_pairs,
)
from .tables import by_suite

_C = "converted_sparse"
_ARMS = {_C: "C index branch", "converted_oracle": "D oracle"}


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
    for kind, result in scored_results(run):
        if len(budgets(result)) > 1:
            section.blocks.extend(_scores(kind, result))
    return section


def _perplexity(result: dict[str, Any]) -> list[Block]:
    values = {label: arm["perplexity"] for label, arm in result["arms"].items()}
    shape = shape_of(result)
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


def _scores(kind: str, result: dict[str, Any]) -> list[Block]:
    """A chart for each length, all on one scale, and one table."""
    top_ks, shape = budgets(result), shape_of(result)
    every = [mean for arm in result["arms"].values() for mean in arm["means"].values()]
    charts: list[Block] = []
    rows: list[list[Cell | str]] = []
    for length in measured_lengths(result):
        means = {label: arm["means"].get(length) for label, arm in result["arms"].items()}
        values = {label: mean for label, mean in means.items() if mean is not None}
        tokens, size = _row_len(kind, result, length), length_name(length)
        tasks = next(iter(by_suite(measured_tasks(result, length)).items()))
        name = ruler_name(tasks[1]) if kind == "ruler" else suite_name({"suite": tasks[0]})
        chart = _chart(values, top_ks, "score", y_range=padded(min(every), max(every)))
        charts.append(Chart(chart, f"{name} against budget, {size} tokens", half=True))
        made = [_dense_row(values, shape, tokens, 1)]
        made += [[*_row(values, top_k, 1), _lost(result, length, top_k)] for top_k in top_ks]
        for row, top_k in zip(made[1:], top_ks, strict=True):
            row += _arithmetic(shape, tokens, top_k)
        for row, arm in zip(
            made, ["converted_dense", *(f"{_C}-k{k}" for k in top_ks)], strict=True
        ):
            rows.append([f"{size}, {row[0]}", *row[1:], _seconds(result, arm, length)])
    name = ruler_name(measured_tasks(result)) if kind == "ruler" else "LongBench"
    columns = ["tokens, budget", "B dense", *_ARMS.values(), "points lost from B to C"]
    columns += [*_ARITHMETIC, "B or C: seconds a prompt, a token"]
    caption = f"{name}; seconds to read a prompt and for each token of the answer, on this machine"
    if kind == "longbench":
        caption += "; prompts are of up to so many tokens, operations those of their mean length"
    return [*charts, Table(columns, rows, caption)]


def _row_len(kind: str, result: dict[str, Any], length: str) -> int | None:
    """Tokens that operations are counted for: RULER's prompts fill their length, LongBench's do not."""
    if kind == "ruler":
        return int(length)
    costs = next(iter(result["arms"].values())).get("costs") or {}
    return (
        round(costs[length]["prompt_tokens"]) if "prompt_tokens" in costs.get(length, {}) else None
    )


def _lost(result: dict[str, Any], length: str, top_k: int) -> Cell | str:
    pair = find_pair(result, "cost of sparsity", top_k)
    entries = [entry for one in suite_pairs(pair) for entry in one["lengths"]] if pair else []
    for entry in entries:
        if str(entry["length"]) == length:
            return Cell(signed(entry["lost"]["estimate"], 1), small=span(entry["lost"], 1))
    return ""


_ARITHMETIC = ("operations a token (arithmetic)", "of dense attention's")


def _arithmetic(shape: dict[str, int] | None, length: int | None, top_k: int) -> list[Cell | str]:
    if shape is None or length is None:
        return ["", ""]
    count = sparse_per_token(shape, length, top_k)
    return [operations(count), f"{100 * count / dense_per_token(shape, length):.0f} %"]


def _dense_row(
    values: dict[str, float], shape: dict[str, int] | None, length: int | None, digits: int
) -> list[Cell | str]:
    dense = values.get("converted_dense")
    shown = "" if dense is None else f"{dense:.{digits}f}"
    count = "" if shape is None or length is None else operations(dense_per_token(shape, length))
    return ["all blocks", shown, "", "", "", count, "100 %" if count else ""]


def _row(values: dict[str, float], top_k: int, digits: int) -> list[Cell | str]:
    found = [values.get(f"{arm}-k{top_k}") for arm in _ARMS]
    return [f"k = {top_k}", "", *("" if one is None else f"{one:.{digits}f}" for one in found)]


def _chart(
    values: dict[str, float],
    top_ks: list[int],
    unit: str,
    y_range: tuple[float, float] | None = None,
) -> str:
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
    return line_chart(shown, x_label="budget, blocks", y_label=unit, doubling=True, y_range=y_range)


def _seconds(result: dict[str, Any], label: str, length: str) -> str:
    cost = (result["arms"].get(label, {}).get("costs") or {}).get(length)
    if not cost:
        return ""
    return f"{cost['prefill_s']:.3g}, {cost['s_per_new_token']:.3g}"
