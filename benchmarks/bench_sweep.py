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
            candidates = list(operation.candidates(inputs[0]))[:first]
            entries = []
            for launch in [None, *candidates] if candidates else []:
                entries.append(
                    {
                        "operation": operation.name,
                        "heads": shape.heads,
                        "groups": shape.groups,
                        "length": shape.length,
                        "data": inputs[0].data,
                        "launch": "default" if launch is None else asdict(launch),
                        **_one(
                            operation.implementations[0], inputs, launch, bench, operation.decode
                        ),
                    }
                )
            entries.sort(key=lambda entry: entry["ms"] or float("inf"))
            for entry in entries:
                shown = f"{entry['ms']:10.3f} ms" if entry["ms"] else entry["said"]
                if not bench.cuda:
                    entry["ms"], shown = None, entry["said"] or "runs"
                where = f"{entry['operation']} {shape.name} {shape.length}"
                print(f"{where}: {entry['launch']} {shown}", flush=True)
            found += entries
    return found


def _one(one: Any, inputs: list[Any], launch: Any, bench: Bench, graph: bool) -> dict[str, Any]:
    try:
        calls = [one.make(each, launch) for each in inputs]
        verdict = one.check(inputs[0], calls[0]())
        if not verdict.fine:
            return {"ms": None, "said": str(verdict)}
        timing = bench.time(bench.graphed(calls) if graph else calls[0])
        return {"ms": timing.median_s * 1e3 / (len(calls) if graph else 1), "said": ""}
    except Exception as error:  # too many registers or too much shared memory: the next one
        return {"ms": None, "said": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
