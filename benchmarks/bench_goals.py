"""The speeds that are aimed at on one H100 or H200, and what a run reached of them.

Times faster than the best dense attention of the same run: the layer than its forward pass, the training
layer than its forward and backward pass, a decoding step than dense decoding. A warm-up stage's time is
over dense forward and backward: there less is better. The floor is what the operation's useful FLOPs and
bytes allow beside that dense attention, predictions are those of the cycle model (README.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
            ("layer", "64/4", {32768: 4.0, 131072: 12.0, 1048576: 22.0}),
            ("layer", "32/8", {32768: 2.5, 131072: 5.5, 1048576: 7.5}),
            ("decode", "64/4", {32768: 1.5, 131072: 6.0, 1048576: 7.4}),
            ("decode", "32/8", {32768: 1.5, 131072: 9.0, 1048576: 13.0}),
            ("training layer", "64/4", {32768: 2.5, 131072: 10.0}),
            ("training layer", "32/8", {32768: 2.0, 131072: 7.5}),
        )
        for length, aim in aims.items()
    ),
    *(
        Goal(operation, heads, length, aim, cost=True)
        for operation, heads, aim in (
            ("warmup trained", "64/4", 1.20),
            ("warmup trained", "32/8", 1.35),
            ("warmup frozen", "64/4", 0.75),
            ("warmup frozen", "32/8", 0.75),
        )
        for length in (32768, 131072)
    ),
)
Predictions = Mapping[tuple[str, str, int], float]
"""Ratios by operation, heads and length, as a goal states them."""


def goals(records: Sequence[dict[str, Any]], predicted: Predictions | None = None) -> list[str]:
    """A line for each goal whose operation was compared with dense; of several kinds of data the first."""
    lines = []
    for goal in GOALS:
        record = _record(records, goal)
        if record is None:
            continue
        reached = _as_stated(goal, record["dense_ratio"])
        met = reached <= goal.aim if goal.cost else reached >= goal.aim
        bound = "at most" if goal.cost else "at least"
        unit = "times the time of" if goal.cost else "times faster than"
        more = []
        expected = (predicted or {}).get((goal.operation, goal.heads, goal.length))
        if expected is not None:
            more.append(f"predicted {expected:.2f}")
        if "floor_share" in record:
            best = _as_stated(goal, record["dense_ratio"] / record["floor_share"])
            more.append(f"floor {best:.2f}")
        lines.append(
            f"{'reached' if met else 'MISSED '} {goal.operation:15} {goal.heads} {goal.length:>8}: "
            f"{reached:6.2f} {unit} dense ({', '.join([f'aim: {bound} {goal.aim:g}', *more])})"
        )
    return lines


def _as_stated(goal: Goal, ratio: float) -> float:
    return 1 / ratio if goal.cost else ratio


def _record(records: Sequence[dict[str, Any]], goal: Goal) -> dict[str, Any] | None:
    for record in records:
        same = (record["operation"], record["implementation"]) == (goal.operation, "triton")
        layout = f"{record['heads']}/{record['groups']}"
        same = same and (layout, record["length"]) == (goal.heads, goal.length)
        if same and record["batch"] == 1 and "dense_ratio" in record:
            return record
    return None
