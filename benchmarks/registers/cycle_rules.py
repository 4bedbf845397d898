"""From the work of a loop to cycles of a multiprocessor: a few simple rules, and the devices they are for.

A step is one pass of a program's warps through its main loop.

  1. A multiprocessor cannot be faster than its busiest part: tensor cores, instructions issued, ALU or FMA
     pipe, exp2, shared memory, or its share of what the second-level cache delivers.
  2. A program alone takes what a replay of its loop takes (cycle_replay.py): it waits for products, copies
     and barriers. Its warpgroups count as programs of their own where no barrier keeps them in step.
  3. A step takes the larger of 1 and, divided by the programs on a multiprocessor, 2: while one program
     waits another one computes.

What the rules leave out: the first and last steps of a program, unequal programs, misses of the caches,
bank conflicts, branches in the loop that are not taken. Called by model.py and its parts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cycle_replay import replay
from cycle_sass import Instruction, Work, total, work_of

REGISTERS, SHARED_BYTES, WARPS, PROGRAMS = 65536, 228 << 10, 64, 32
"""Of a multiprocessor of compute capability 9.0 (technical specifications, CUDA C++ Programming Guide)."""


@dataclass(frozen=True)
class Device:
    """One GPU; clock and bandwidths are assumptions about a busy one, to be replaced by measured ones."""

    name: str
    bytes_per_s: float
    """Of its memory, as a large copy reaches it."""
    multiprocessors: int = 132
    clock_hz: float = 1.8e9
    """Under load: tensor cycles that a profiler counted, against the FLOP/s of the same kernel."""
    cache_bytes_per_s: float = 8.0e12
    """Of the second-level cache, all multiprocessors together: the most that a kernel was seen to draw."""
    cache_bytes: float = 50e6
    floor_flops: float = 790e12
    """What the best matrix products reach."""
    launch_s: float = 3.2e-6
    """From one small kernel's begin to the next one's, where it needs the result, in a CUDA graph."""

    @property
    def cache_bytes_a_cycle(self) -> float:
        """Share of one multiprocessor."""
        return self.cache_bytes_per_s / self.multiprocessors / self.clock_hz


DEVICES = {
    one.name: one
    for one in (Device("H100", bytes_per_s=3.0e12), Device("H200", bytes_per_s=4.3e12))
}


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel holds."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    num_warps: int

    @property
    def programs(self) -> int:
        """That fit on one multiprocessor: a thread has eights of registers, the system 1 KiB a program."""
        registers = -(-self.registers // 8) * 8 * 32 * self.num_warps
        limits = (
            REGISTERS // max(1, registers),
            SHARED_BYTES // (self.shared_bytes + 1024),
            WARPS // self.num_warps,
            PROGRAMS,
        )
        return max(1, min(limits))


@dataclass(frozen=True)
class Section:
    """Instructions that a warp runs through once."""

    whole: Work
    alone: float
    """Cycles of the warps that run in step, by themselves (rule 2)."""


def section(
    instructions: Sequence[Instruction],
    num_warps: int,
    repeated: bool,
    rare: Collection[int] = (),
    share: float = 1.0,
) -> Section:
    """Of a program of `num_warps` warps; the rest as in cycle_replay.replay."""
    whole = Work()
    for number, one in enumerate(instructions):
        whole += work_of(one).scaled(share if number in rare else 1.0)
    in_step = num_warps if whole.barriers else min(num_warps, 4)
    return Section(whole, replay(instructions, in_step, repeated, rare, share))


@dataclass(frozen=True)
class Cycles:
    """Of one multiprocessor and one step of one program, each part by itself; the table's columns."""

    tensor: float
    product: float
    """Tensor cores, and the operands that they read from shared memory."""
    issue: float
    alu: float
    fma: float
    special: float
    shared: float
    cache: float

    @property
    def pipes(self) -> float:
        """Of all but the tensor cores and memory, as far as they overlap."""
        return max(self.issue, self.alu, self.fma)

    @property
    def busiest(self) -> tuple[str, float]:
        """Rule 1."""
        parts = {
            "tensor": self.product,
            "ALU": self.pipes,
            "exp": self.special,
            "shared": self.shared,
            "L2": self.cache,
        }
        name = max(parts, key=parts.__getitem__)
        return name, parts[name]


def bytes_moved(work: Work, num_warps: int) -> float:
    """From or to the second-level cache, by all warps of a program."""
    # An atomic addition reads and writes there, so its bytes count twice.
    each = work.global_bytes + 2 * work.atomic_bytes + work.spill_bytes
    return each * num_warps + work.table_bytes


def cycles(work: Work, num_warps: int, device: Device) -> Cycles:
    """All warps of a program; a scheduler has a quarter of them."""
    each = num_warps / 4
    moved = bytes_moved(work, num_warps)
    return Cycles(
        tensor=work.tensor * num_warps,
        product=work.product * num_warps,
        issue=work.instructions * each,
        alu=work.alu * each,
        fma=work.fma * each,
        special=work.special * each,
        shared=work.shared_bytes * num_warps / 128,
        cache=moved / device.cache_bytes_a_cycle,
    )


@dataclass(frozen=True)
class Step:
    """Prediction for one pass of one program, when the multiprocessor is full of such programs."""

    cycles: float
    limit: str
    """What the time is made of: the busiest part, or `wait`."""
    work: Work
    parts: Cycles


def step(part: Section, resources: Resources, device: Device) -> Step:
    """The three rules."""
    parts = cycles(part.whole, resources.num_warps, device)
    limit, least = parts.busiest
    alone = part.alone / resources.programs
    return Step(max(alone, least), "wait" if alone > least else limit, part.whole, parts)


def main_loop(instructions: Sequence[Instruction], spans: Sequence[tuple[int, int]]) -> int:
    """Which of several copies of a loop counts: the one with the fewest instructions for its products.

    Copies with causal or bounds masks have more, and run once or twice a program.
    """

    def price(span: tuple[int, int]) -> float:
        work = total(instructions[span[0] : span[1] + 1])
        return work.instructions / max(work.flops, 1.0)

    return min(range(len(spans)), key=lambda i: price(spans[i]))
