"""Compares launch values of an operation: what kernels.py --sweep does."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from bench_data import Shape
from bench_guard import UNFINISHED, at_most, device_works, leave
from bench_operations import OPERATIONS
from bench_run import CASE_S, Plan, Runner, with_ids
from bench_timing import Bench


def sweep(
    shapes: Sequence[Shape],
    data: str,
    only: Sequence[str],
    bench: Bench,
    dtype: torch.dtype,
    first: int | None = None,
    part: tuple[int, int] = (0, 1),
    ends_at: float = math.inf,
    saved: Callable[[list[dict[str, Any]]], None] = lambda entries: None,
    earlier: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Every candidate of every operation that has some, the fastest printed first.

    Args:
        first: try only so many candidates (dry runs).
        part: (i, n), every n-th candidate from the i-th on, so that n processes can compile them all.
        ends_at: time.time() after which no candidate is begun.
        saved: called with all entries before and after each.
        earlier: entries of a process that was lost; they are kept and not tried again.

    Returns:
        one entry a candidate; `ms` is None where it is wrong or does not run.
    """
    found = list(earlier)
    known = [_place(entry) for entry in earlier]
    for shape in shapes:
        runner = Runner(Plan([shape], [data]), bench, None, dtype, print)
        for operation in OPERATIONS:
            if only and operation.name not in only:
                continue
            inputs = runner.decode_inputs(shape) if operation.decode else [runner.make(shape, data)]
            if operation.by_selection:
                inputs = [with_ids(one) for one in inputs]
            for one in operation.implementations:
                launches = list(one.candidates(inputs[0]))[:first]
                launches = [None, *launches][part[0] :: part[1]] if launches else []
                entries = []
                for launch in launches:
                    if time.time() > ends_at:
                        break
                    where = {
                        "operation": operation.name,
                        "implementation": one.name,
                        "heads": shape.heads,
                        "groups": shape.groups,
                        "length": shape.length,
                        "data": inputs[0].data,
                        "launch": "default" if launch is None else asdict(launch),
                    }
                    if _place(where) in known:
                        continue
                    saved([*found, *entries, {**where, "ms": None, "said": UNFINISHED}])
                    with at_most(CASE_S if bench.cuda else None):
                        entries.append(
                            {**where, **_one(one, inputs, launch, bench, operation.decode)}
                        )
                    saved([*found, *entries])
                    if not device_works(bench.device.type):
                        leave()
                _show(entries, shape, bench.cuda)
                found += entries
    return found


def _place(entry: dict[str, Any]) -> dict[str, Any]:
    """What tells an entry apart."""
    return {name: value for name, value in entry.items() if name not in ("ms", "said")}


def _show(entries: list[dict[str, Any]], shape: Shape, cuda: bool) -> None:
    """Print them, the fastest first; a CPU gives no speed."""
    entries.sort(key=lambda entry: entry["ms"] or float("inf"))
    for entry in entries:
        shown = f"{entry['ms']:10.3f} ms" if entry["ms"] else entry["said"]
        if not cuda:
            entry["ms"], shown = None, entry["said"] or "runs"
        where = f"{entry['operation']} {entry['implementation']} {shape.name} {shape.length}"
        print(f"{where}: {_short(entry['launch'])} {shown}", flush=True)


def _short(launch: Any) -> str:
    """Launch values in a line: rows, keys, warps, stages."""
    if not isinstance(launch, dict):
        return str(launch)
    if "rows" in launch:
        return "/".join(str(value) for value in launch.values())
    return " ".join(f"{name} {_short(value)}" for name, value in launch.items())


def _one(one: Any, inputs: list[Any], launch: Any, bench: Bench, graph: bool) -> dict[str, Any]:
    try:
        calls = [one.make(each, launch) for each in inputs]
        verdict = one.check(inputs[0], calls[0]())
        if not verdict.fine:
            return {"ms": None, "said": str(verdict)}
        if not bench.cuda:
            return {"ms": None, "said": ""}
        timing = bench.time(bench.graphed(calls) if graph else calls[0])
        return {"ms": timing.median_s * 1e3 / (len(calls) if graph else 1), "said": ""}
    except Exception as error:  # too many registers or too much shared memory: the next one
        return {"ms": None, "said": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
