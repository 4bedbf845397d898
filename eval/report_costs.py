"""What each cause cost, as a table by budget and a chart of intervals; for perplexity and for scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .charts import Bar, interval_chart
from .report_blocks import Block, Cell, Chart, Table
from .report_words import COLOURS, MEANINGS, signed, span, upper


@dataclass(frozen=True)
class Cost:
    """One paired comparison: what it means, the budget of its second arm ("" if dense), its interval."""

    meaning: str
    budget: str
    interval: dict[str, Any]
    unseen_share: float | None = None


def costs(found: list[Cost], caption: str, axis: str, *, digits: int = 1) -> list[Block]:
    """Meaning by budget as a table, and the same intervals as a chart; positive is worse."""
    found = [cost for cost in found if cost.meaning in MEANINGS]
    if not found:
        return []
    budgets = list(dict.fromkeys(cost.budget for cost in found))
    shown = {(cost.meaning, cost.budget): cost_cell(cost, digits) for cost in found}
    rows: list[list[Cell | str]] = [
        [Cell(meaning, small=words), *(shown.get((meaning, budget), "") for budget in budgets)]
        for meaning, words in MEANINGS.items()
        if any(cost.meaning == meaning for cost in found)
    ]
    bars = [
        Bar(
            cost.meaning + (f", k = {cost.budget}" if cost.budget else ""),
            cost.interval["estimate"],
            cost.interval["low"],
            cost.interval["high"],
            COLOURS[cost.meaning],
        )
        for cost in found
    ]
    columns = ["cost", *(f"k = {budget}" if budget else "all blocks" for budget in budgets)]
    legend = "Estimates and 95 % intervals; an interval that holds zero leaves the sign open."
    return [Table(columns, rows, caption), Chart(interval_chart(bars, x_label=axis), legend)]


def cost_cell(cost: Cost, digits: int = 1) -> Cell:
    """An estimate with its interval, or that nothing changed and what that cannot exclude."""
    if cost.unseen_share is not None:
        note = "share of changed scores that so few pairs cannot exclude, 95 %"
        return Cell("no score changed", None, note, f"up to {upper(cost.unseen_share)} could")
    return Cell(signed(cost.interval["estimate"], digits), small=span(cost.interval, digits))
