"""From which length on sparse attention is faster than dense attention, as measured on a device.

Read by model/execution.py for mode "auto". `MEASURED` holds what was measured and committed. A file of
one's own, as benchmarks/kernels.py writes it, is read by `read`.

A layout is told by its heads per group, heads / groups: dense work goes with the query heads and selection
with the groups (arXiv 2606.13392, section 2), so layouts of one ratio break even at about one length. The
measured layout of the nearest ratio counts, within a factor of two.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Phase = Literal["prefill", "decode"]
"""Whole rows and chunks of them, or one new token."""


@dataclass(frozen=True)
class Measured:
    """One layout on one device."""

    device: str
    """As torch.cuda.get_device_name says it."""
    heads: int
    groups: int
    phase: Phase
    tokens: int
    """Shortest measured length from which on the sparse layer was faster."""


_H100 = "NVIDIA H100 80GB HBM3"
MEASURED: tuple[Measured, ...] = (
    # benchmarks/results/h100-kernels-5808e4d.json; 32K is the shortest length that was measured.
    Measured(_H100, 64, 4, "prefill", 32768),
    Measured(_H100, 64, 4, "decode", 32768),
    Measured(_H100, 32, 8, "prefill", 32768),
    Measured(_H100, 32, 8, "decode", 32768),
)


def break_even(
    device: str,
    heads: int,
    groups: int,
    phase: Phase = "prefill",
    measured: Iterable[Measured] = MEASURED,
) -> int | None:
    """Length from which on sparse attention is faster, in tokens; None where nothing near was measured."""
    ratio = math.log2(heads / groups)
    near = [
        (abs(math.log2(one.heads / one.groups) - ratio), one.tokens)
        for one in measured
        if one.device == device and one.phase == phase
    ]
    # Of two equally near layouts the later break-even: dense attention is never wrong.
    best = min(near, key=lambda found: (found[0], -found[1]), default=None)
    return best[1] if best is not None and best[0] <= 1 else None


def read(path: str | Path) -> tuple[Measured, ...]:
    """The entries of a benchmark's JSON: its `gpu.name` and its list `break_even` of objects with `heads`,
    `groups`, `phase` ("prefill" or "decode") and `tokens` (null where sparse was never faster: left out).

    Raises:
        ValueError: another kind of file.
    """
    record = json.loads(Path(path).read_text())
    try:
        device = record["gpu"]["name"]
        entries = [entry for entry in record["break_even"] if entry["tokens"] is not None]
        found = tuple(
            Measured(device, int(e["heads"]), int(e["groups"]), e["phase"], int(e["tokens"]))
            for e in entries
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no break-even lengths ({error!r}): give a file that benchmarks/kernels.py wrote "
            "on a GPU"
        ) from error
    for one in found:
        if one.phase not in ("prefill", "decode") or min(one.heads, one.groups, one.tokens) < 1:
            raise ValueError(f"{path} holds a break-even entry that cannot be: {one}")
    return found
