"""A profile of the slowest operation of a benchmark file: what kernels.py --profile does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from bench_data import Shape
from bench_operations import OPERATIONS
from bench_report import slowest
from bench_run import SHAPE, Plan, Runner, with_ids
from bench_timing import Bench
from torch.profiler import ProfilerActivity, profile

CALLS = 5
DATA = {"model-like": "model", "random": "random"}


def profile_slowest(results: Path, out: Path) -> int:
    """Profile what has the smallest share of its floor at the longest length; exit code."""
    if not results.is_file():
        print(
            f"{results} is not there: run the benchmark with --json {results} first",
            file=sys.stderr,
        )
        return 2
    record = slowest(json.loads(results.read_text())["results"])
    if record is None:
        print(f"{results} holds no timed operation", file=sys.stderr)
        return 2
    shape = Shape(**{name: record[name] for name in SHAPE})
    _profile(record, shape, DATA.get(record["data"], "model"), torch.device("cuda"), out)
    return 0


def profile_dry(out: Path) -> None:
    """The same on a CPU, for the code's sake."""
    record = {"operation": "layer", "implementation": "triton"}
    shape = Shape(48, 2, 1, 16, block_size=16, top_k=2, index_width=16)
    _profile(record, shape, "model", torch.device("cpu"), out)


def _profile(
    record: dict[str, Any], shape: Shape, data: str, device: torch.device, out: Path
) -> None:
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
    with profile(activities=activities, record_shapes=False, profile_memory=True) as found:
        for _ in range(CALLS if cuda else 1):
            call()
        if cuda:
            torch.cuda.synchronize()
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    table = found.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=80)
    head = f"{operation.name}, {one.name}, {shape.name}, {shape.length} tokens, {inputs.data} data"
    share = record.get("floor_share")
    if share is not None:
        head += f", {record['ms']:.3f} ms, {100 * share:.0f} % of the floor"
    out.write_text(f"{head}; {CALLS if cuda else 1} calls\n{table}\n")
    print(f"profiled {head}: {out}")
