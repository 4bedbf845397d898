"""Runs the table of bench_operations.py over shapes and data: checks first, then times what is right."""

from __future__ import annotations

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
from bench_operations import OPERATIONS, Implementation, Operation
from bench_timing import CACHE_BYTES, Bench, Ceilings, Timing

from dense2sparse.kernels.triton_select import select

MOST_COPIES = 64
"""Copies of the inputs that a decoding graph goes through."""
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
    selection: Path | None = None
    speed: bool = True
    """False: check only."""
    seed: int = 0
    compiled_at: int | None = None
    """The only length for what compiles long; None: all."""
    total_s: float = float("inf")
    """No new measurement begins after so many seconds."""


@dataclass
class Runner:
    """Collects one record for each implementation, shape and kind of data."""

    plan: Plan
    bench: Bench
    ceilings: Ceilings | None
    dtype: torch.dtype
    say: Callable[[str], None]
    saved: Callable[[list[Record]], None] = lambda records: None
    """Called after each shape."""
    records: list[Record] = field(default_factory=list)
    _begun: float = field(default_factory=time.perf_counter)
    _best: dict[tuple[str, Shape], float] = field(default_factory=dict)
    """Seconds of the best of an operation."""
    _favourite: dict[tuple[str, str], str] = field(default_factory=dict)
    """Its name, by operation and head layout."""

    def run(self) -> bool:
        """Whether every check of ours passed."""
        for shape in self.plan.shapes:
            for inputs, operations in self._cases(shape):
                for operation in operations:
                    for implementation in operation.implementations:
                        if self._unwanted(implementation, shape):
                            continue
                        if time.perf_counter() - self._begun > self.plan.total_s:
                            self.say("the time is over: what follows is left out")
                            return self._fine()
                        record = self._measure(operation, implementation, inputs)
                        self.records.append(record)
                        self.say(line(record))
                        if not self._forget():
                            self.say(
                                "the device does not answer any more: what follows is left out"
                            )
                            return False
            self.saved(self.records)
        return self._fine()

    def _unwanted(self, one: Implementation, shape: Shape) -> bool:
        elsewhere = self.plan.compiled_at not in (None, shape.length)
        return one.name in self.plan.without or (one.compiled and elsewhere)

    def _fine(self) -> bool:
        return not any(record["ours"] and record["failed"] for record in self.records)

    def _cases(self, shape: Shape) -> Iterator[tuple[list[Inputs], list[Operation]]]:
        """Inputs and what to run on them; made when asked for, so that one set exists at a time."""
        wanted = [o for o in OPERATIONS if not self.plan.only or o.name in self.plan.only]
        for number, data in enumerate(self.plan.data):
            prefill = [o for o in wanted if not o.decode and (o.by_selection or number == 0)]
            if prefill and (inputs := self._inputs(shape, data)) is not None:
                yield [inputs], prefill
                del inputs
        if decoding := [o for o in wanted if o.decode]:
            yield self.decode_inputs(shape), decoding

    def _inputs(self, shape: Shape, data: str) -> Inputs | None:
        try:
            return self.make(shape, data)
        except torch.OutOfMemoryError:
            self.say(f"{shape.name} {shape.length}: the inputs do not fit into memory")
        except ValueError as error:
            self.say(f"{shape.name} {shape.length}, {data}: {error}")
        self._forget()
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

    def decode_inputs(self, shape: Shape) -> list[Inputs]:
        """Copies that together do not fit into the cache."""
        each = shape.batch * shape.length * (2 * shape.groups * shape.width + shape.index_width) * 2
        count = min(MOST_COPIES, -(-CACHE_BYTES // each)) if self.bench.cuda else 2
        common: dict[str, Any] = {"dtype": self.dtype, "device": self.bench.device, "queries": 1}
        return [random_inputs(shape, **common, seed=self.plan.seed + n) for n in range(count)]

    def _measure(self, operation: Operation, one: Implementation, copies: list[Inputs]) -> Record:
        """Check, then time; what cannot run is recorded, not raised."""
        shape = copies[0].shape
        record: Record = {
            "operation": operation.name,
            "implementation": one.name,
            "ours": one.ours,
            "heads": shape.heads,
            "groups": shape.groups,
            "width": shape.width,
            "length": shape.length,
            "batch": shape.batch,
            "block_size": shape.block_size,
            "top_k": shape.top_k,
            "data": copies[0].data if operation.by_selection else "random",
            "failed": False,
            "check": "",
        }
        try:
            copies, parts = self._affordable(operation, one, copies)
            if operation.by_selection:
                copies = [with_ids(inputs) for inputs in copies]
                ids = copies[0].block_ids
                assert ids is not None
                record["union_factor"] = union_factors(ids, shape.block_size)
            calls = [one.make(inputs, None) for inputs in copies]
            with poisoned():
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
            record["check"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            record["failed"] = True
        return record

    def _affordable(
        self, operation: Operation, one: Implementation, copies: list[Inputs]
    ) -> tuple[list[Inputs], int]:
        """The inputs, or those of one group where dense attention of all takes longer than the budget.

        Dense attention is the same work for every group, so its time is that of one times their number.
        """
        shape = copies[0].shape
        if operation.name != "dense" or self.ceilings is None or shape.groups == 1:
            return copies, 1
        if operation.flops(shape) / (0.7 * self.ceilings.flops) <= self.bench.budget_s:
            return copies, 1
        favourite = self._favourite.get((operation.name, shape.name), one.name)
        if one.name != favourite:
            raise Skip(f"too long at this length, and {favourite} was faster before")
        return [one_group(inputs) for inputs in copies], shape.groups

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
        parts: int,
    ) -> None:
        seconds = timing.median_s * parts
        flops, moved = operation.flops(shape), operation.moved(shape)
        record |= {
            "ms": seconds * 1e3,
            "fastest_ms": timing.fastest_s * parts * 1e3,
            "calls": timing.calls,
            "tflops": flops / seconds / 1e12,
            "gb_per_s": moved / seconds / 1e9,
            "peak_gib": timing.peak_gib if parts == 1 else None,
            "timed_groups": shape.groups // parts,
        }
        if self.ceilings is not None:
            narrow = operation.fp8_flops(shape) if one.fp8 else 0.0
            record["floor_ms"] = self.ceilings.floor_s(flops, moved, narrow) * 1e3
            record["floor_share"] = record["floor_ms"] / record["ms"]
        if seconds < self._best.get((operation.name, shape), float("inf")):
            self._best[operation.name, shape] = seconds
            self._favourite[operation.name, shape.name] = one.name
        if operation.dense and (operation.dense, shape) in self._best:
            record["dense_ratio"] = self._best[operation.dense, shape] / seconds

    def _forget(self) -> bool:
        """Give memory back; whether the device still works (a wild access ends it for the process)."""
        if self.bench.cuda:
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:
                return False
        return True


def with_ids(inputs: Inputs) -> Inputs:
    """The same with the ids that selection finds, where the data brings none."""
    if inputs.block_ids is not None:
        return inputs
    ids = select(inputs.index_q, inputs.index_k, None, **inputs.budget)
    return replace(inputs, block_ids=ids)


def one_group(inputs: Inputs) -> Inputs:
    """The first group and its query heads."""
    shape = inputs.shape
    repeats = shape.heads // shape.groups
    return replace(
        inputs,
        shape=replace(shape, heads=repeats, groups=1),
        q=inputs.q[:, :repeats],
        k=inputs.k[:, :1],
        v=inputs.v[:, :1],
        index_q=inputs.index_q[:, :1],
        block_ids=None if inputs.block_ids is None else inputs.block_ids[:, :1],
    )


def line(record: Record) -> str:
    """A record for reading."""
    where = f"{record['heads']}/{record['groups']} d{record['width']} {record['length']:>8}"
    head = f"{record['operation']:13} {record['implementation']:24} {where} {record['data']:11}"
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
