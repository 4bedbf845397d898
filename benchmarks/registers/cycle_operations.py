"""Predicted times of whole operations, beside dense attention, floors, goals and measurements.

Called by model.py. Shapes: H query heads, G groups, N tokens, D head width, k selected blocks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_data import Shape
from bench_goals import GOALS
from bench_table import (
    backward_flops,
    dense_flops,
    full_kl_flops,
    index_bytes,
    kl_bytes,
    select_flops,
    sparse_flops,
    sparse_kl_flops,
    tensor_bytes,
    training_bytes,
    whole_bytes,
)
from cycle_compile import DECODE_LENGTHS, Compiled, Kernel, program_step
from cycle_kernels import UNION_FACTORS
from cycle_rules import Device

from dense2sparse.kernels.triton_attend_backward import HEADS_FOR_UNIONS

LENGTHS = DECODE_LENGTHS
TRAINED_LENGTHS = LENGTHS[:2]
LIST_BYTES = 160.0
"""An edge (query, selected block) of the lists by block: a radix sort, four passes, and tables. Assumed."""
DENSE_DECODE_LAUNCHES = 2
"""Splits of the keys, and their merge."""


@dataclass(frozen=True)
class Dense:
    """What dense attention reaches, in bf16: the libraries' figures, not ours."""

    forward_flops: float = 620e12
    training_flops: float = 520e12

    def forward_s(self, shape: Shape) -> float:
        return dense_flops(shape) / self.forward_flops

    def training_s(self, shape: Shape) -> float:
        return 3.5 * dense_flops(shape) / self.training_flops

    def decode_s(self, shape: Shape, device: Device) -> float:
        moved = tensor_bytes(shape, 1, shape.length)
        return moved / device.bytes_per_s + DENSE_DECODE_LAUNCHES * device.launch_s


@dataclass(frozen=True)
class Entry:
    """An operation of the table: whose kernels it consists of, and the size of its definition."""

    parts: tuple[str, ...]
    flops: Callable[[Shape], float]
    moved: Callable[[Shape], float]
    """Bytes that must be read or written once."""
    against: str
    """Dense attention's `forward`, `backward`, `training` or `decode`."""
    dense_part: str = ""
    """Dense attention that the operation contains."""
    cost: bool = False
    """The table gives its time over dense's, not dense's over its."""


def _kept(shape: Shape) -> int:
    return min(shape.length, shape.top_k * shape.block_size)


def _backward(shape: Shape) -> float:
    return backward_flops(sparse_flops(shape))


def _training(shape: Shape) -> float:
    return select_flops(shape) + sparse_flops(shape) + _backward(shape) + sparse_kl_flops(shape)


def _decode_bytes(shape: Shape) -> float:
    return tensor_bytes(shape, 1, _kept(shape)) + index_bytes(shape, 1)


def _all_index(shape: Shape) -> float:
    return index_bytes(shape, shape.length)


ENTRIES: dict[str, Entry] = {
    "select": Entry(("select",), select_flops, _all_index, "forward"),
    "sparse": Entry(("sparse",), sparse_flops, whole_bytes, "forward"),
    "layer": Entry(
        ("select", "sparse"),
        lambda shape: select_flops(shape) + sparse_flops(shape),
        lambda shape: whole_bytes(shape) + _all_index(shape),
        "forward",
    ),
    "sparse backward": Entry(("sparse backward",), _backward, training_bytes, "backward"),
    "sparse backward deterministic": Entry(
        ("sparse backward deterministic",), _backward, training_bytes, "backward"
    ),
    "sparse kl": Entry(("sparse kl",), sparse_kl_flops, kl_bytes, "training"),
    "training layer": Entry(
        ("select", "sparse", "sparse backward", "sparse kl"),
        _training,
        lambda shape: training_bytes(shape) + _all_index(shape),
        "training",
    ),
    "kl": Entry(("kl",), full_kl_flops, kl_bytes, "training", cost=True),
    "warmup trained": Entry(
        ("kl",),
        lambda shape: 3.5 * dense_flops(shape) + full_kl_flops(shape),
        training_bytes,
        "training",
        dense_part="training",
        cost=True,
    ),
    "warmup frozen": Entry(
        ("kl",),
        lambda shape: dense_flops(shape) + full_kl_flops(shape),
        whole_bytes,
        "training",
        dense_part="forward",
        cost=True,
    ),
    "decode": Entry(("decode",), lambda shape: 0.0, _decode_bytes, "decode"),
}
"""Every operation of kernels.py that is ours and runs in bf16 (decoding's arithmetic is nothing)."""


def side_bytes(part: str, shape: Shape) -> float:
    """Bytes that kernels without products move: list building, buffers of gradients, row sums."""
    main = float(shape.length * shape.heads * shape.width)
    edges = float(shape.length * shape.groups * shape.top_k)
    index = float(shape.length * shape.groups * shape.index_width)
    if part == "decode":
        return _decode_bytes(shape) - 2.0 * shape.index_width * shape.length
    if part.startswith("sparse backward"):
        # The row sums read out and its gradient; dq in float32 is zeroed, read and rounded.
        many = shape.heads // shape.groups >= HEADS_FOR_UNIONS
        buffer = 0.0 if many or part.endswith("deterministic") else 10 * main
        return LIST_BYTES * edges + 4 * main + buffer
    if part.startswith("sparse kl"):
        return LIST_BYTES * edges + 12 * index
    return 0.0


@dataclass(frozen=True)
class Measured:
    """What kernels.py measured on a device."""

    seconds: Mapping[tuple[str, int, int, int], float] = field(default_factory=dict)
    """By operation, heads, groups and length."""
    unions: Mapping[int, float] = field(default_factory=lambda: UNION_FACTORS)
    """Of the selections that were measured: union factor by tokens of a tile."""


def kernel_seconds(
    kernel: Kernel, shape: Shape, device: Device, unions: Mapping[int, float] = UNION_FACTORS
) -> float:
    """0 for kernels whose work no role states: they count as bytes or as launches."""
    if kernel.role is None:
        return 0.0
    _, cycles, flops = program_step(kernel, device)
    units = kernel.role.flops(shape, {**kernel.constants, "UNIONS": unions}) / max(flops, 1.0)
    busy = units * cycles / device.multiprocessors / device.clock_hz
    return max(busy, kernel.role.moved(shape) / device.bytes_per_s)


def part_seconds(
    compiled: Compiled, shape: Shape, device: Device, unions: Mapping[int, float] = UNION_FACTORS
) -> float:
    """One operation's own kernels."""
    seconds = sum(kernel_seconds(kernel, shape, device, unions) for kernel in compiled.kernels)
    seconds += side_bytes(compiled.operation, shape) / device.bytes_per_s
    # Elsewhere the queue hides launches.
    launches = compiled.launches[shape.length] if compiled.operation == "decode" else 0
    return seconds + launches * device.launch_s


@dataclass(frozen=True)
class Predicted:
    """One row of the table of operations."""

    operation: str
    heads: int
    groups: int
    length: int
    device: str
    seconds: float
    floor_s: float
    dense_s: float
    ratio: float
    """Dense over ours, or ours over dense for a cost."""
    goal: float | None
    measured_s: float | None

    @property
    def error(self) -> float | None:
        """Of the prediction, as a share of what was measured."""
        return None if self.measured_s is None else self.seconds / self.measured_s - 1


def predict(
    compiled: Sequence[Compiled],
    device: Device,
    dense: Dense,
    measured: Measured,
) -> list[Predicted]:
    """All operations whose kernels were compiled, at all lengths that they are for."""
    found = {(one.operation, one.heads, one.groups): one for one in compiled}
    layouts = sorted({(one.heads, one.groups) for one in compiled}, reverse=True)
    rows = []
    for name, entry in ENTRIES.items():
        for heads, groups in layouts:
            parts = [found.get((part, heads, groups)) for part in entry.parts]
            for length in LENGTHS if entry.against in ("forward", "decode") else TRAINED_LENGTHS:
                ready = [part for part in parts if part is not None]
                if len(ready) < len(parts):
                    continue
                shape = Shape(length, heads, groups, 128)
                rows.append(_row(name, entry, ready, shape, device, dense, measured))
    return rows


def _row(
    name: str,
    entry: Entry,
    parts: Sequence[Compiled],
    shape: Shape,
    device: Device,
    dense: Dense,
    measured: Measured,
) -> Predicted:
    forward, training = dense.forward_s(shape), dense.training_s(shape)
    rivals = {
        "forward": forward,
        "training": training,
        "backward": training - forward,
        "decode": dense.decode_s(shape, device),
    }
    seconds = sum(part_seconds(part, shape, device, measured.unions) for part in parts)
    seconds += rivals[entry.dense_part] if entry.dense_part else 0.0
    floor = max(entry.flops(shape) / device.floor_flops, entry.moved(shape) / device.bytes_per_s)
    rival = rivals[entry.against]
    layout = f"{shape.heads}/{shape.groups}"
    goal = next(
        (x.aim for x in GOALS if (x.operation, x.heads, x.length) == (name, layout, shape.length)),
        None,
    )
    return Predicted(
        name,
        shape.heads,
        shape.groups,
        shape.length,
        device.name,
        seconds,
        floor,
        rival,
        seconds / rival if entry.cost else rival / seconds,
        goal,
        measured.seconds.get((name, shape.heads, shape.groups, shape.length)),
    )


def measurements(folder: Path, device: str) -> Measured:
    """Times on `device` from files of kernels.py; of several kinds of data `model` counts, of
    several runs the latest.

    The unions of the longest rows of that data stand for all, where records have them.
    """
    unions: dict[int, float] = {1: 1.0}
    longest = 0
    found: dict[tuple[str, int, int, int], tuple[bool, float]] = {}
    runs = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    for run in sorted(runs, key=_date):
        gpu = run.get("gpu") if isinstance(run, dict) else None
        if not isinstance(gpu, dict) or device not in str(gpu.get("name")):
            continue
        for record in run.get("results", []):
            if "ms" not in record or not _is_default(record):
                continue
            suffix = record["implementation"].removeprefix("triton")
            key = (
                record["operation"] + suffix,
                record["heads"],
                record["groups"],
                record["length"],
            )
            as_model = "model" in str(record.get("data"))
            if key not in found or as_model >= found[key][0]:
                found[key] = as_model, record["ms"] / 1e3
            if as_model and record.get("union_factor") and record["length"] > longest:
                longest = record["length"]
                unions |= {int(n): factor for n, factor in record["union_factor"].items()}
    seconds = {key: seconds for key, (_, seconds) in found.items()}
    return Measured(seconds, unions if longest else UNION_FACTORS)


def _date(run: Any) -> str:
    about = run.get("environment") if isinstance(run, dict) else None
    return str(about.get("date", "")) if isinstance(about, dict) else ""


def _is_default(record: Mapping[str, Any]) -> bool:
    """A default run of ours, of the sizes that are predicted."""
    sizes = {"width": 128, "batch": 1, "block_size": 128, "top_k": 16, "index_width": 128}
    right = all(record.get(name) == value for name, value in sizes.items())
    return right and record.get("implementation") in ("triton", "triton deterministic")
