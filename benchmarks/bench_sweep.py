"""Compares launch values of an operation: what kernels.py --sweep does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from bench_data import Shape
from bench_operations import OPERATIONS
from bench_run import Plan, Runner, with_ids
from bench_timing import Bench


def sweep(
    shapes: Sequence[Shape],
    data: str,
    only: Sequence[str],
    bench: Bench,
    dtype: torch.dtype,
    first: int | None = None,
) -> list[dict[str, Any]]:
    """Every candidate of every operation that has some, the fastest printed first.

    Args:
        first: try only so many candidates (dry runs).

    Returns:
        one entry a candidate; `ms` is None where it is wrong or does not run.
    """
    found = []
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
                entries = []
                for launch in [None, *launches] if launches else []:
                    where = {
                        "operation": operation.name,
                        "implementation": one.name,
                        "heads": shape.heads,
                        "groups": shape.groups,
                        "length": shape.length,
                        "data": inputs[0].data,
                        "launch": "default" if launch is None else asdict(launch),
                    }
                    found_here = _one(one, inputs, launch, bench, operation.decode)
                    entries.append({**where, **found_here})
                _show(entries, shape, bench.cuda)
                found += entries
    return found


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
