"""Profiles of operations of a benchmark file: what kernels.py --profile does."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench_data import Shape
from bench_operations import OPERATIONS
from bench_report import slowest
from bench_run import SHAPE, Plan, Runner, with_ids
from bench_timing import Bench
from torch.profiler import ProfilerActivity, profile

CALLS = 3
DATA = {"model-like": "model", "random": "random"}


def profile_timed(results: Path, only: Sequence[str], out: Path) -> int:
    """Profile the named operations at the longest length that was timed; exit code.

    Args:
        only: operations; empty: the one with the smallest share of its floor.
    """
    if not results.is_file():
        print(
            f"{results} is not there: run the benchmark with --json {results} first",
            file=sys.stderr,
        )
        return 2
    records = json.loads(results.read_text())["results"]
    chosen = _chosen(records, only)
    if not chosen:
        print(f"{results} holds no timed operation {' '.join(only)}", file=sys.stderr)
        return 2
    tables = []
    for record in chosen:
        shape = Shape(**{name: record[name] for name in SHAPE})
        data = DATA.get(record["data"], "model")
        tables.append(_profile(record, shape, data, torch.device("cuda")))
        out.write_text("\n".join(tables))
    return 0


def _chosen(records: Sequence[dict[str, Any]], only: Sequence[str]) -> list[dict[str, Any]]:
    if not only:
        record = slowest(records)
        return [] if record is None else [record]
    timed = [r for r in records if r["operation"] in only and r["implementation"] == "triton"]
    timed = [r for r in timed if "ms" in r]
    longest = max((r["length"] for r in timed), default=0)
    return [r for r in timed if r["length"] == longest]


def profile_dry(out: Path) -> None:
    """The same on a CPU, for the code's sake."""
    record = {"operation": "layer", "implementation": "triton"}
    shape = Shape(48, 2, 1, 16, block_size=16, top_k=2, index_width=16)
    out.write_text(_profile(record, shape, "model", torch.device("cpu")))


def _profile(record: dict[str, Any], shape: Shape, data: str, device: torch.device) -> str:
    """Table of the kernels of some calls, the longest first."""
    cuda = device.type == "cuda"
    operation = next(o for o in OPERATIONS if o.name == record["operation"])
    one = next(i for i in operation.implementations if i.name == record["implementation"])
    dtype = torch.bfloat16 if cuda else torch.float16
    runner = Runner(Plan([shape], [data]), Bench(device, 1.0), None, dtype, print)
    inputs = runner.decode_inputs(shape)[0] if operation.decode else runner.make(shape, data)
    if operation.by_selection:
        inputs = with_ids(inputs)
    call = one.make(inputs, None)
    call()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, record_shapes=False, profile_memory=False) as found:
        for _ in range(CALLS if cuda else 1):
            call()
        if cuda:
            torch.cuda.synchronize()
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    table = found.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=80)
    head = f"{operation.name}, {one.name}, {shape.name}, {shape.length} tokens, {inputs.data} data"
    share = record.get("floor_share")
    if share is not None:
        head += f", {record['ms']:.3f} ms, {100 * share:.0f} % of the floor"
    print(f"profiled {head}", flush=True)
    return f"{head}; {CALLS if cuda else 1} calls\n{table}\n"
