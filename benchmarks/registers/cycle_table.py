"""The two tables that model.py prints, one line a kernel and one an operation, and the kernels' JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from bench_data import Shape
from cycle_compile import COMPILED_LENGTH, Compiled, Kernel, program_step
from cycle_operations import Predicted
from cycle_rules import DEVICES, Device, bytes_moved

KERNEL_COLUMNS = (
    "kernel", "heads", "loop", "warps", "regs", "spill", "shared", "fit", "instr", "tensor", "product",
    "ALU", "sum", "exp", "smem", "L2 B", "bar", "wait", "alone", "step", "limit", "MFLOP", "rest",
    "TFLOP/s", "useful",
)  # fmt: skip
"""`det`: of a deterministic mode. `fit`: programs a multiprocessor. `product`: tensor cycles, operands from
shared memory with them. `ALU`: issue or the fuller pipe, `sum`: both pipes one after the other. `alone`:
the replay. `step`: predicted; `rest`: cycles around a loop over heads. `useful`: without what unions
repeat."""


def kernel_records(compiled: Iterable[Compiled]) -> list[dict[str, Any]]:
    """Everything about each kernel that has a role, for JSON."""
    records = []
    for kernel in (kernel for one in compiled for kernel in one.kernels if kernel.role):
        main, _, _ = program_step(kernel, DEVICES["H100"])
        records.append(
            {
                "operation": kernel.operation,
                "kernel": kernel.name,
                "heads": kernel.heads,
                "groups": kernel.groups,
                "loop": kernel.loop,
                "constants": kernel.constants,
                **asdict(kernel.resources),
                "programs": kernel.resources.programs,
                "a_warp": asdict(main.work),
                "cycles": asdict(main.parts),
                "alone_cycles": kernel.main.alone,
                "step_cycles": main.cycles,
                "limit": main.limit,
                "tflops": {name: tflops(kernel, device) for name, device in DEVICES.items()},
            }
        )
    return records


def tflops(kernel: Kernel, device: Device) -> float:
    """Executed, also where memory limits the kernel."""
    _, cycles, flops = program_step(kernel, device)
    seconds = cycles / device.multiprocessors / device.clock_hz
    shape = Shape(COMPILED_LENGTH, kernel.heads, kernel.groups, 128)
    assert kernel.role is not None
    moved = kernel.role.moved(shape) / max(kernel.role.flops(shape, kernel.constants), 1.0)
    return flops / max(seconds, moved * flops / device.bytes_per_s) / 1e12


def _useful(kernel: Kernel) -> float:
    """Share of the executed FLOPs that unions do not repeat."""
    assert kernel.role is not None
    shape = Shape(COMPILED_LENGTH, kernel.heads, kernel.groups, 128)
    return kernel.role.flops(shape, {"TOKENS": 1}) / kernel.role.flops(shape, kernel.constants)


def _cells(kernel: Kernel) -> list[str]:
    main, unit, _ = program_step(kernel, DEVICES["H100"])
    parts, work, held = main.parts, main.work, kernel.resources
    heads = kernel.heads // kernel.groups
    rest = unit - heads * main.cycles if kernel.around is not None else 0.0
    rates = [tflops(kernel, device) for device in DEVICES.values()]
    counts = [
        held.num_warps, held.registers, held.spill_bytes, held.shared_bytes, held.programs,
        work.instructions, parts.tensor, parts.product, parts.pipes, parts.alu + parts.fma, parts.special,
        parts.shared, bytes_moved(work, held.num_warps), work.barriers, work.waits,
        kernel.main.alone, main.cycles,
    ]  # fmt: skip
    mode = " det" if kernel.operation.endswith("deterministic") else ""
    # Copies by the tensor memory accelerator name no size in SASS: their bytes are missing here.
    loop = kernel.loop + (" TMA" if work.bulk_copies else "")
    return [
        kernel.name + mode,
        f"{kernel.heads}/{kernel.groups}",
        loop,
        *(f"{count:.0f}" for count in counts),
        main.limit,
        f"{work.flops * held.num_warps / 1e6:.2f}",
        f"{rest:.0f}",
        "/".join(f"{rate:.0f}" for rate in dict.fromkeys(round(rate) for rate in rates)),
        f"{rates[0] * _useful(kernel):.0f}",
    ]


def kernel_table(compiled: Iterable[Compiled]) -> list[str]:
    """A line for each kernel with a role; equal ones of two layouts or operations are one line."""
    lines: dict[tuple[str, ...], list[str]] = {}
    unknown = set()
    for kernel in (kernel for one in compiled for kernel in one.kernels):
        if kernel.role is None:
            if kernel.main.whole.tensor and kernel.operation != "decode":
                unknown.add(f"{kernel.name} of {kernel.operation}")
            continue
        cells = _cells(kernel)
        layouts = lines.setdefault((cells[0], *cells[2:]), [])
        if cells[1] not in layouts:
            layouts.append(cells[1])
    rows = [[key[0], "both" if len(at) > 1 else at[0], *key[1:]] for key, at in lines.items()]
    table = _aligned([list(KERNEL_COLUMNS), *rows])
    return table + [f"no FLOPs known of {name}: add it to ROLES" for name in sorted(unknown)]


def operation_table(rows: Sequence[Predicted]) -> list[str]:
    """A line for each operation and layout; ms, times its floor, times dense and the goal a length."""
    lengths = sorted({row.length for row in rows})
    head = ["operation", "heads"]
    for length in lengths:
        head += [f"{length >> 10}K ms", "floor", "dense", "goal", "measured"]
    lines: dict[tuple[str, str], dict[int, Predicted]] = {}
    for row in rows:
        lines.setdefault((row.operation, f"{row.heads}/{row.groups}"), {})[row.length] = row
    table = [head]
    for (operation, layout), at in lines.items():
        cells = [operation, layout]
        for length in lengths:
            cells += _predicted(at.get(length))
        table.append(cells)
    return _aligned(table)


def _predicted(row: Predicted | None) -> list[str]:
    if row is None:
        return ["", "", "", "", ""]
    measured = ""
    if row.measured_s is not None and row.error is not None:
        measured = f"{row.measured_s * 1e3:.4g} ({row.error:+.0%})"
    return [
        f"{row.seconds * 1e3:.4g}",
        f"{row.seconds / row.floor_s:.2f}",
        f"{row.ratio:.2f}",
        "" if row.goal is None else f"{row.goal:g}",
        measured,
    ]


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as they must be; those that are empty in every line are left out."""
    kept = [i for i in range(len(table[0])) if any(line[i] for line in table[1:])]
    widths = [max(len(line[i]) for line in table) for i in kept]
    lines = []
    for line in table:
        cells = [
            line[i].ljust(width) if place < 2 else line[i].rjust(width)
            for place, (i, width) in enumerate(zip(kept, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
