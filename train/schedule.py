"""Learning rates as a pure function of the step number, so that a resumed run needs no state for
them."""

from __future__ import annotations

import math
from typing import Protocol


class ScheduleFields(Protocol):
    """The recipe's `index_schedule` or `backbone_schedule`."""

    shape: str
    ramp: float
    final: float


def lr_factor(schedule: ScheduleFields, *, step: int, total_steps: int) -> float:
    """Share of the peak learning rate in one step.

    The first `ceil(ramp * total_steps)` steps ramp up linearly and end at the peak; the rest decay
    from it, so that the last step of the stage runs at `final` (`constant` stays at the peak).

    Args:
        step: 0 for the stage's first step; steps past the end keep the last value.
        total_steps: steps of the stage.
    """
    ramp_steps = math.ceil(schedule.ramp * total_steps)
    if step < ramp_steps:
        return (step + 1) / ramp_steps
    if schedule.shape == "constant":
        return 1.0
    done = min(1.0, (step - ramp_steps + 1) / max(1, total_steps - ramp_steps))
    remaining = 1.0 - done if schedule.shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return schedule.final + (1.0 - schedule.final) * remaining
