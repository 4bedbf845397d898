"""SASS of one kernel: its instructions, its loops, and what one pass through a loop costs a warp.

Reads what `cuobjdump --dump-sass` prints for sm_90. Nothing here knows a kernel: a loop is a backward
branch, the main loop the innermost one with tensor instructions. Called by model.py and its parts.

Costs are cycles of one scheduler (a quarter of a multiprocessor) unless they say otherwise. Sources:
  - lanes a cycle: "Throughput of Native Arithmetic Instructions" in the CUDA C++ Programming Guide, 9.0:
    float32 add, multiply and fma 128 a multiprocessor; integer, logic, compare, minimum, select and
    conversions 64; exp2 and other special functions 16; shuffles 32.
  - which instruction takes which pipe: "Pipelines" in the Nsight Compute documentation (IMAD shares the FMA
    pipe, the other integer instructions and float minima the ALU pipe). Pipes run side by side, one
    instruction is issued a cycle.
  - tensor cores: 989 TFLOP/s of dense bf16 at 1.83 GHz on 132 multiprocessors (data sheet of the H100) are
    4096 FLOPs a cycle and multiprocessor. A product m64nNk16 is 2048 N FLOPs: N / 2 cycles. One of
    fp8 (k32) has twice the FLOPs in the same time.
  - shared memory: 128 bytes a cycle and multiprocessor.
  - stall counts and scoreboards: bits 105 to 121 of an instruction (arXiv 1804.06826).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

FMA = {"FADD", "FMUL", "FFMA", "HFMA2", "HADD2", "HMUL2", "FADD2", "FFMA2", "FMUL2"}
"""One cycle: 32 lanes a quarter."""
INTEGER_FMA = {"IMAD", "IMUL", "IDP"}
"""Two cycles of the same pipe."""
SPECIAL = {"MUFU", "I2F", "F2I", "F2F", "POPC", "FLO", "BREV"}
"""Eight cycles: 4 lanes a quarter."""
CONTROL = {
    "BRA", "EXIT", "NOP", "BSSY", "BSYNC", "BREAK", "WARPSYNC", "BAR", "DEPBAR", "LDGDEPBAR", "MEMBAR",
    "FENCE", "WARPGROUP", "CALL", "RET", "YIELD", "SYNCS", "ARRIVES", "ERRBAR", "ENDCOLLECTIVE", "CCTL",
    "S2R", "LDC", "ULDC", "LDCU",
}  # fmt: skip
"""Take a place in the queue of instructions and no pipe that fills up."""
SHARED = {"LDS", "STS", "LDSM", "STSM", "ATOMS", "LDGSTS"}
GLOBAL = {"LDG", "STG", "LDGSTS", "LD", "ST"}
ATOMIC = {"RED", "REDG", "ATOM", "ATOMG"}
SPILL = {"LDL", "STL"}
BULK = {"UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP", "UBLKRED"}
"""Copies by the tensor memory accelerator: SASS does not say how many bytes."""
MMA_SYNC_SHARE = 0.62
"""Of the tensor cores' rate that mma.sync reaches on Hopper (arXiv 2402.13499)."""

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x[0-9a-f]+ \*/")
_CONTROL = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
_PRODUCT = re.compile(r"\.64x(\d+)x(\d+)\.")


@dataclass(frozen=True)
class Instruction:
    """One line of a listing."""

    address: int
    predicate: str
    """Such as `@!P0`, or empty."""
    name: str
    """With its suffixes: `LDS.128`."""
    operands: str
    stall: int
    """Cycles until the same warp may issue its next instruction."""
    written: int = 7
    """Scoreboard that is free when the result is there; 7: none."""
    read: int = 7
    """Scoreboard that is free when the operands were read; 7: none."""
    waits_for: int = 0
    """A bit for each of the six scoreboards."""

    @property
    def base(self) -> str:
        return self.name.split(".")[0]

    @property
    def is_tensor(self) -> bool:
        return self.base.endswith("GMMA") or self.base in ("HMMA", "IMMA", "QMMA")

    @property
    def target(self) -> int | None:
        """Address that a branch goes to."""
        found = re.search(r"0x([0-9a-f]+)$", self.operands) if self.base == "BRA" else None
        return int(found[1], 16) if found else None

    @property
    def width(self) -> int:
        """Bytes that one lane moves, of a memory instruction."""
        parts = self.name.split(".")
        if "M88" in parts or "MT88" in parts:
            return 4 * int(parts[-1]) if parts[-1].isdigit() else 4
        for part, size in (("128", 16), ("F32x4", 16), ("64", 8), ("F32x2", 8)):
            if part in parts:
                return size
        narrow = {"U8": 1, "S8": 1, "U16": 2, "S16": 2}
        return next((narrow[part] for part in parts if part in narrow), 4)


def parse(listing: str) -> list[Instruction]:
    """Instructions of the one kernel in a listing, in the order of their addresses."""
    found: list[Instruction] = []
    lines = listing.splitlines()
    for number, line in enumerate(lines):
        match = _LINE.match(line)
        if match is None:
            continue
        words = match[2].split(None, 1)
        predicate = words[0] if words[0].startswith("@") else ""
        name, _, operands = match[2].removeprefix(predicate).strip().partition(" ")
        behind = _CONTROL.match(lines[number + 1]) if number + 1 < len(lines) else None
        bits = int(behind[1], 16) >> 41 if behind else 1 | 7 << 5 | 7 << 8
        found.append(
            Instruction(
                int(match[1], 16), predicate, name, operands.strip(), stall=max(1, bits & 15),
                written=bits >> 5 & 7, read=bits >> 8 & 7, waits_for=bits >> 11 & 63,
            )
        )  # fmt: skip
    return found


@dataclass(frozen=True)
class Loop:
    """Instructions first .. last of a listing, by their numbers."""

    first: int
    last: int

    def holds(self, other: Loop) -> bool:
        return self != other and self.first <= other.first and other.last <= self.last


def find_loops(instructions: Sequence[Instruction]) -> list[Loop]:
    """Loops in the order of their ends; several branches to one head are one loop.

    Code that was moved behind the end of the kernel also jumps back: there the kernel's end lies between.
    """
    number = {one.address: i for i, one in enumerate(instructions)}
    ends: dict[int, int] = {}
    for last, one in enumerate(instructions):
        first = number.get(one.target) if one.target is not None else None
        if first is None or first >= last:
            continue
        body = instructions[first:last]
        if not any(inner.base == "EXIT" and not inner.predicate for inner in body):
            ends[first] = max(last, ends.get(first, 0))
    return sorted((Loop(first, last) for first, last in ends.items()), key=lambda loop: loop.last)


def main_loops(instructions: Sequence[Instruction]) -> list[Loop]:
    """Innermost loops with tensor instructions; without any such, innermost loops that read memory."""
    loops = find_loops(instructions)
    for counts in (
        lambda one: one.is_tensor,
        lambda one: one.base in ("LDG", "LDGSTS", *BULK),
    ):
        found = [one for one in loops if any(map(counts, instructions[one.first : one.last + 1]))]
        if found:
            return [one for one in found if not any(one.holds(other) for other in found)]
    return []


@dataclass(frozen=True)
class Work:
    """What a warp does in one pass through some instructions."""

    instructions: float = 0.0
    alu: float = 0.0
    fma: float = 0.0
    special: float = 0.0
    stalls: float = 0.0
    """Sum of the stall counts: what one warp takes at least, alone."""
    tensor: float = 0.0
    """Cycles of the whole multiprocessor, this warp's share: a quarter of a warpgroup's product."""
    product: float = 0.0
    """The same where operands in shared memory count: 128 bytes of them a cycle."""
    flops: float = 0.0
    shared_bytes: float = 0.0
    global_bytes: float = 0.0
    """Of accesses of 16 bytes a lane: rows of tensors, of which each lane has its own part."""
    table_bytes: float = 0.0
    """Of narrower ones: tables, which the warps of a program share."""
    atomic_bytes: float = 0.0
    spill_bytes: float = 0.0
    bulk_copies: float = 0.0
    barriers: float = 0.0
    waits: float = 0.0
    """For products."""

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, x.name) + getattr(other, x.name) for x in fields(self)))

    def scaled(self, factor: float) -> Work:
        return Work(*(getattr(self, x.name) * factor for x in fields(self)))


def work_of(one: Instruction) -> Work:
    """Of one instruction."""
    base = one.base
    about: dict[str, float] = {"instructions": 1.0, "stalls": float(one.stall)}
    lanes = 32.0 * one.width
    if base in SHARED:
        about["shared_bytes"] = lanes
    if base in GLOBAL:
        about["global_bytes" if one.width == 16 else "table_bytes"] = lanes
    if base in ATOMIC:
        about["atomic_bytes"] = lanes
    if base in SPILL:
        about["spill_bytes"] = lanes
    if base == "SHFL":
        about["shared_bytes"] = 128.0
    if one.is_tensor:
        about |= _tensor(one)
    elif base in FMA:
        about["fma"] = 1.0
    elif base in INTEGER_FMA:
        about["fma"] = 2.0
    elif base in SPECIAL:
        about["special"] = 8.0
    elif base in BULK:
        about["bulk_copies"] = 1.0
    elif base == "BAR":
        about["barriers"] = 1.0
    elif one.name.startswith("WARPGROUP.DEPBAR"):
        about["waits"] = 1.0
    elif not (base in CONTROL | SHARED | GLOBAL | ATOMIC | SPILL or _is_uniform(base)):
        about["alu"] = 2.0
    return Work(**about)


def _is_uniform(base: str) -> bool:
    """Runs once a warp in a pipe of its own."""
    return base in ("R2UR", "S2UR", "SHFL") or (base.startswith("U") and base != "UNKNOWN")


def _tensor(one: Instruction) -> dict[str, float]:
    shape = _PRODUCT.search(one.name + ".")
    if shape is None:
        # mma.sync m16n8k16 of one warp.
        flops = 2.0 * 16 * 8 * 16
        cycles = flops / 4096 / MMA_SYNC_SHARE
        return {"tensor": cycles, "product": cycles, "flops": flops}
    columns, depth = int(shape[1]), int(shape[2])
    cycles = columns / 2
    # 32 bytes a row and column at any width of a number; the left operand may come from registers.
    operands = one.operands.split(",")
    in_registers = len(operands) > 1 and re.match(r"\s*R\d", operands[1]) is not None
    moved = 32.0 * (columns + (0 if in_registers else 64))
    return {
        "tensor": cycles / 4,
        "product": max(cycles, moved / 128) / 4,
        "flops": 2.0 * 64 * columns * depth / 4,
        "shared_bytes": moved / 4,
    }


def total(instructions: Iterable[Instruction]) -> Work:
    """Sum over instructions."""
    result = Work()
    for one in instructions:
        result += work_of(one)
    return result
