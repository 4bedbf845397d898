"""Runs the table of bench_operations.py over shapes and data: checks first, then times what is right."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from bench_baselines import Skip
from bench_checks import poisoned
from bench_data import (
    Inputs,
    Shape,
    measured_factor,
    model_like_ids,
    random_inputs,
    stored_inputs,
    union_factors,
)
from bench_guard import UNFINISHED, at_most, device_works
from bench_operations import OPERATIONS
from bench_table import Implementation, Operation
from bench_timing import CACHE_BYTES, Bench, Ceilings, Timing
from torch import Tensor

from dense2sparse.kernels.triton_select import select

LEAST_COPIES, MOST_COPIES = 8, 64
"""Copies of the inputs that a decoding graph goes through, as it would through layers: its own launch does
then not count as a step."""
CASE_S = 60.0
"""A measurement that takes longer, compilation included, hangs; others' compilers get three times that."""
SHAPE = (
    "length",
    "heads",
    "groups",
    "width",
    "block_size",
    "top_k",
    "index_width",
    "batch",
)
"""Fields of Shape that a record has."""
Record = dict[str, Any]


@dataclass
class Plan:
    """What to run."""

    shapes: Sequence[Shape]
    data: Sequence[str]
    """Of "random", "model" and "stored"."""
    only: Sequence[str] = ()
    """Operations; empty: all."""
    without: Sequence[str] = ()
    """Implementations to leave out."""
    ours_only: bool = False
    """Leave out what others compute the same with."""
    selection: Path | None = None
    speed: bool = True
    """False: check only."""
    seed: int = 0
    compiled_at: int | None = None
    """The only length for what compiles long; None: all."""
    train_up_to: int | None = None
    """Longest length for what has gradients; None: all."""
    ends_at: float = float("inf")
    """time.time() after which no new measurement begins."""


@dataclass
class Runner:
    """Collects one record for each implementation, shape and kind of data."""

    plan: Plan
    bench: Bench
    ceilings: Ceilings | None
    dtype: torch.dtype
    say: Callable[[str], None]
    saved: Callable[[list[Record]], None] = lambda records: None
    """Called before and after each measurement."""
    lost: Callable[[], None] = lambda: None
    """Called when the device does not answer any more."""
    records: list[Record] = field(default_factory=list)
    """What an earlier process measured is not measured again."""
    _best: dict[tuple[str, Shape], float] = field(default_factory=dict)
    """Seconds of the best of an operation."""
    _favourite: dict[tuple[str, str], str] = field(default_factory=dict)
    """Its name, by operation and head layout."""

    def __post_init__(self) -> None:
        self._known = {_key(record) for record in self.records}
        for record in self.records:
            if "ms" in record:
                shape = Shape(**{name: record[name] for name in SHAPE})
                self._note(record["operation"], record["implementation"], shape, record["ms"] / 1e3)

    def run(self) -> bool:
        """Whether every check of ours passed."""
        for shape in self.plan.shapes:
            for inputs, operations in self._cases(shape):
                for operation, one in self._wanted(operations, shape):
                    if time.time() > self.plan.ends_at:
                        self.say("the time is over: what follows is left out")
                        return self._fine()
                    record = self._record(operation, one, inputs[0])
                    if _key(record) in self._known:
                        continue
                    self.saved([*self.records, {**record, "check": UNFINISHED, "failed": True}])
                    limit = CASE_S * (3 if one.compiled else 1)
                    with at_most(limit if self.bench.cuda else None):
                        self._measure(record, operation, one, inputs)
                        working = device_works(self.bench.device.type)
                    self.records.append(record)
                    self.say(line(record))
                    self.saved(self.records)
                    if not working:
                        self.lost()
                        self.say("the device does not answer any more: what follows is left out")
                        return False
                del inputs  # before the next are made
        return self._fine()

    def _wanted(
        self, operations: Sequence[Operation], shape: Shape
    ) -> Iterator[tuple[Operation, Implementation]]:
        for operation in operations:
            favourite = self._favourite.get((operation.name, shape.name))
            # What was fastest at another length goes first: where time is short, the others are left out.
            for one in sorted(operation.implementations, key=lambda one: one.name != favourite):
                elsewhere = self.plan.compiled_at not in (None, shape.length)
                foreign = self.plan.ours_only and not one.ours
                unwanted = foreign or one.name in self.plan.without
                if not unwanted and not (one.compiled and elsewhere):
                    yield operation, one

    def _fine(self) -> bool:
        return not any(record["ours"] and record["failed"] for record in self.records)

    def _cases(self, shape: Shape) -> Iterator[tuple[list[Inputs], list[Operation]]]:
        """Inputs and what to run on them; made when asked for, so that one set exists at a time."""
        wanted = [o for o in OPERATIONS if not self.plan.only or o.name in self.plan.only]
        if self.plan.train_up_to is not None and shape.length > self.plan.train_up_to:
            wanted = [o for o in wanted if not o.training]
        for number, data in enumerate(self.plan.data):
            prefill = [o for o in wanted if not o.decode and (o.by_selection or number == 0)]
            if prefill and (inputs := self._inputs(shape, data, self.make)) is not None:
                yield [inputs], prefill
                del inputs
        decoding = [o for o in wanted if o.decode]
        if decoding and (copies := self._inputs(shape, "random", self.decode_inputs)) is not None:
            yield copies, decoding

    def _inputs(self, shape: Shape, data: str, make: Callable[..., Any]) -> Any:
        try:
            return make(shape, data)
        except torch.OutOfMemoryError:
            self.say(f"{shape.name} {shape.length}: the inputs do not fit into memory")
        except ValueError as error:
            self.say(f"{shape.name} {shape.length}, {data}: {error}")
        device_works(self.bench.device.type)
        return None

    def make(self, shape: Shape, data: str) -> Inputs:
        common: dict[str, Any] = {"dtype": self.dtype, "device": self.bench.device}
        if data == "stored":
            if self.plan.selection is None:
                raise ValueError("data 'stored' needs --selection FILE")
            inputs = stored_inputs(self.plan.selection, shape, **common)
        else:
            inputs = random_inputs(shape, **common, seed=self.plan.seed)
        if data == "model" and shape.num_blocks > shape.top_k:
            factor, _ = measured_factor(shape.num_blocks, shape.top_k)
            inputs.block_ids = model_like_ids(
                shape, factor=factor, device=self.bench.device, seed=self.plan.seed
            )
            inputs.data = "model-like"
        return inputs

    def decode_inputs(self, shape: Shape, data: str = "random") -> list[Inputs]:
        """Copies that together do not fit into the cache."""
        each = shape.batch * shape.length * (2 * shape.groups * shape.width + shape.index_width) * 2
        count = max(LEAST_COPIES, min(MOST_COPIES, -(-CACHE_BYTES // each)))
        count = count if self.bench.cuda else 2
        common: dict[str, Any] = {"dtype": self.dtype, "device": self.bench.device, "queries": 1}
        return [random_inputs(shape, **common, seed=self.plan.seed + n) for n in range(count)]

    def _record(self, operation: Operation, one: Implementation, inputs: Inputs) -> Record:
        return {
            "operation": operation.name,
            "implementation": one.name,
            "ours": one.ours,
            **{name: getattr(inputs.shape, name) for name in SHAPE},
            "data": inputs.data if operation.by_selection else "random",
            "failed": False,
            "check": "",
        }

    def _measure(
        self, record: Record, operation: Operation, one: Implementation, copies: list[Inputs]
    ) -> None:
        """Check, then time, into `record`; what cannot run is recorded, not raised."""
        shape = copies[0].shape
        try:
            copies, parts = self._affordable(operation, one, copies)
            if operation.by_selection:
                copies = [with_ids(inputs) for inputs in copies]
                ids = copies[0].block_ids
                assert ids is not None
                record["union_factor"] = union_factors(ids, shape.block_size)
            calls = [one.make(inputs, None) for inputs in copies]
            # Compilers of others trace torch.empty.
            with poisoned() if one.ours else contextlib.nullcontext():
                result = calls[0]()
            verdict = one.check(copies[0], result)
            del result
            record["check"], record["failed"] = str(verdict), not verdict.fine
            if self.plan.speed and verdict.fine:
                timing = self._time(operation, calls)
                self._figures(record, operation, one, shape, timing, parts)
        except Skip as reason:
            record["check"] = f"left out: {reason}"
        except torch.OutOfMemoryError:
            record["check"] = "left out: out of memory"
        except Exception as error:  # a library may refuse in its own way; the others go on
            said = (str(error).strip() or "no message").splitlines()[0][:200]
            record["check"], record["failed"] = f"{type(error).__name__}: {said}", True

    def _affordable(
        self, operation: Operation, one: Implementation, copies: list[Inputs]
    ) -> tuple[list[Inputs], float]:
        """The inputs, or some heads of one group where dense attention of all takes longer than the budget.

        Dense attention is the same work for every head, so the time of some stands for all. The library
        that was fastest at other lengths is then timed alone, and the next one if it fails.
        """
        shape = copies[0].shape
        if not operation.by_group or self.ceilings is None:
            return copies, 1
        seconds = operation.flops(shape) / (0.7 * self.ceilings.flops)
        if seconds <= self.bench.budget_s:
            return copies, 1
        if (operation.name, shape) in self._best:
            best = self._favourite[operation.name, shape.name]
            raise Skip(f"too long at this length, and {best} stands for dense attention")
        repeats = shape.heads // shape.groups
        heads = max(1, min(repeats, int(shape.heads * self.bench.budget_s / seconds)))
        return [some_heads(inputs, heads) for inputs in copies], shape.heads / heads

    def _time(self, operation: Operation, calls: list[Any]) -> Timing:
        if not operation.decode:
            return self.bench.time(calls[0], warm=True)
        timing = self.bench.time(self.bench.graphed(calls))
        number = len(calls)
        return replace(
            timing, median_s=timing.median_s / number, fastest_s=timing.fastest_s / number
        )

    def _figures(
        self,
        record: Record,
        operation: Operation,
        one: Implementation,
        shape: Shape,
        timing: Timing,
        parts: float,
    ) -> None:
        seconds = timing.median_s * parts
        flops, moved = (one.flops or operation.flops)(shape), operation.moved(shape)
        record |= {
            "ms": seconds * 1e3,
            "fastest_ms": timing.fastest_s * parts * 1e3,
            "calls": timing.calls,
            "tflops": flops / seconds / 1e12,
            "gb_per_s": moved / seconds / 1e9,
            "peak_gib": timing.peak_gib if parts == 1 else None,
            "timed_heads": round(shape.heads / parts),
        }
        if self.ceilings is not None:
            narrow = operation.fp8_flops(shape) if one.fp8 else 0.0
            record["floor_ms"] = self.ceilings.floor_s(flops, moved, narrow) * 1e3
            record["floor_share"] = record["floor_ms"] / record["ms"]
        self._note(operation.name, one.name, shape, seconds)
        if operation.dense and (operation.dense, shape) in self._best:
            record["dense_ratio"] = self._best[operation.dense, shape] / seconds

    def _note(self, operation: str, name: str, shape: Shape, seconds: float) -> None:
        if seconds < self._best.get((operation, shape), float("inf")):
            self._best[operation, shape] = seconds
            self._favourite[operation, shape.name] = name


def _key(record: Record) -> tuple[Any, ...]:
    """Tells measurements of one run apart."""
    names = ("operation", "implementation", "data", *SHAPE)
    return tuple(record[name] for name in names)


def with_ids(inputs: Inputs) -> Inputs:
    """The same with the ids that selection finds, where the data brings none."""
    if inputs.block_ids is not None:
        return inputs
    ids = select(inputs.index_q, inputs.index_k, None, **inputs.budget)
    return replace(inputs, block_ids=ids)


def some_heads(inputs: Inputs, heads: int) -> Inputs:
    """The first group with its first query heads, as tensors of their own.

    Copied: a view of a long row keeps the strides of all heads, which some libraries count in 32 bits.
    """

    def part(x: Tensor, count: int) -> Tensor:
        return x[:, :count].transpose(1, 2).contiguous().transpose(1, 2)

    return replace(
        inputs,
        shape=replace(inputs.shape, heads=heads, groups=1),
        q=part(inputs.q, heads),
        k=part(inputs.k, 1),
        v=part(inputs.v, 1),
        index_q=part(inputs.index_q, 1),
        block_ids=None if inputs.block_ids is None else inputs.block_ids[:, :1],
    )


def line(record: Record) -> str:
    """A record for reading."""
    where = f"{record['heads']}/{record['groups']} d{record['width']} {record['length']:>8}"
    head = f"{record['operation']:15} {record['implementation']:24} {where} {record['data']:11}"
    if "ms" not in record:
        return f"{head} {'FAILED ' if record['failed'] else ''}{record['check']}"
    shown = (
        f"{record['ms']:10.3f} ms {record['tflops']:7.1f} TFLOP/s {record['gb_per_s']:7.0f} GB/s"
    )
    if "floor_share" in record:
        shown += f" {100 * record['floor_share']:5.1f} % of floor"
    if "dense_ratio" in record:
        shown += f" {record['dense_ratio']:6.2f}x dense"
    if record.get("union_factor"):
        shown += " union factor " + ", ".join(
            f"{n}: {u}" for n, u in record["union_factor"].items()
        )
    return f"{head} {shown}"
