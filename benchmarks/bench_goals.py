"""The speeds that were aimed at on one H200, and what a run reached of them.

Times faster than the best dense attention of the same run: the layer than its forward pass, the training
layer than its forward and backward pass, a decoding step than dense decoding. A warm-up stage's time is
over dense forward and backward: there less is better. Floors of the arithmetic: kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Goal:
    """`aim`: at least so many times faster; for a `cost`, at most so many times the time."""

    operation: str
    heads: str
    length: int
    aim: float
    cost: bool = False


GOALS: tuple[Goal, ...] = (
    *(
        Goal(operation, heads, length, aim)
        for operation, heads, aims in (
            ("layer", "64/4", {32768: 4.0, 131072: 11.0, 1048576: 18.0}),
            ("layer", "32/8", {32768: 2.5, 131072: 4.5, 1048576: 6.0}),
            ("decode", "64/4", {32768: 1.5, 131072: 6.0, 1048576: 7.6}),
            ("decode", "32/8", {32768: 1.5, 131072: 9.0, 1048576: 13.0}),
            ("training layer", "64/4", {32768: 2.5, 131072: 9.0}),
            ("training layer", "32/8", {32768: 2.0, 131072: 6.5}),
        )
        for length, aim in aims.items()
    ),
    *(
        Goal(operation, heads, length, aim, cost=True)
        for operation, aim in (("warmup trained", 1.35), ("warmup frozen", 0.75))
        for heads in ("64/4", "32/8")
        for length in (32768, 131072)
    ),
)


def goals(records: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each goal whose operation was compared with dense; of several kinds of data the first."""
    lines = []
    for goal in GOALS:
        ratio = _ratio(records, goal)
        if ratio is None:
            continue
        reached = 1 / ratio if goal.cost else ratio
        met = reached <= goal.aim if goal.cost else reached >= goal.aim
        bound = "at most" if goal.cost else "at least"
        unit = "times the time of" if goal.cost else "times faster than"
        lines.append(
            f"{'reached' if met else 'MISSED '} {goal.operation:15} {goal.heads} {goal.length:>8}: "
            f"{reached:6.2f} {unit} dense (aim: {bound} {goal.aim:g})"
        )
    return lines


def _ratio(records: Sequence[dict[str, Any]], goal: Goal) -> float | None:
    for record in records:
        same = (record["operation"], record["implementation"]) == (goal.operation, "triton")
        layout = f"{record['heads']}/{record['groups']}"
        same = same and (layout, record["length"]) == (goal.heads, goal.length)
        if same and record["batch"] == 1 and "dense_ratio" in record:
            return record["dense_ratio"]
    return None
