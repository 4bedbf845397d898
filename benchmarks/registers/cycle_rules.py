"""From the work of a loop to cycles of a multiprocessor: a few simple rules, and the devices they are for.

A step is one pass of a program's warps through its main loop.

  1. A multiprocessor cannot be faster than its busiest part: tensor cores, instructions issued, ALU or FMA
     pipe, exp2, shared memory, or its share of what the second-level cache delivers.
  2. A program alone waits for its products: they run one after another, beside the instructions that stand
     between a product's start and the wait for it. Instructions take the sum of their pipes, because the
     two warps of a scheduler run the same code at the same time. Each wait costs WAIT_CYCLES more.
  3. A step takes the larger of 1 and 2. Of several programs on a multiprocessor one computes while another
     waits, so 2 is divided by their number. So it is for the warpgroups of one program where no barrier
     in the loop keeps them in step.

What the rules leave out: the first and last steps of a program, unequal programs, misses of the caches,
bank conflicts, branches in the loop that are not taken. Called by model.py and its parts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from cycle_sass import Instruction, Work, total, work_of

WAIT_CYCLES = 60.0
"""Assumed: a product's result is late by its pipeline's depth, and a barrier takes some too."""
REGISTERS, SHARED_BYTES, WARPS, PROGRAMS = 65536, 228 << 10, 64, 32
"""Of a multiprocessor of compute capability 9.0 (technical specifications, CUDA C++ Programming Guide)."""


@dataclass(frozen=True)
class Device:
    """One GPU; clock and bandwidths are assumptions about a busy one, to be replaced by measured ones."""

    name: str
    bytes_per_s: float
    """Of its memory, as a large copy reaches it."""
    multiprocessors: int = 132
    clock_hz: float = 1.7e9
    """Under load; 1.83e9 at most."""
    cache_bytes_per_s: float = 5.5e12
    """Of the second-level cache, all multiprocessors together."""
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
class Event:
    """A product that starts, or a wait for products, and what a warp does before it."""

    before: Work
    product: Work | None
    """The instructions of one group; None: a wait."""
    left: int = 0
    """Groups that a wait leaves under way."""


@dataclass(frozen=True)
class Section:
    """Instructions that a warp runs through once."""

    whole: Work
    events: tuple[Event, ...]
    after: Work
    """Behind the last event."""


def section(
    instructions: Sequence[Instruction], rare: Collection[int] = (), share: float = 1.0
) -> Section:
    """Divide them at products and waits; instructions numbered in `rare` run in `share` of the passes."""
    events: list[Event] = []
    whole, before, group = Work(), Work(), Work()
    for number, one in enumerate(instructions):
        cost = work_of(one)
        if number in rare:
            cost = cost.scaled(share)
        whole += cost
        if one.name.startswith("WARPGROUP.DEPBAR"):
            events.append(Event(before, None, int(one.operands.split("0x")[-1], 16)))
            before = cost
        elif one.is_tensor and one.base != "HMMA":
            if not group.tensor:
                events.append(Event(before, Work()))
                before = Work()
            group += cost
            before += replace(cost, tensor=0.0, product=0.0)
            events[_last_start(events)] = replace(events[_last_start(events)], product=group)
            group = Work() if "gsb" in one.operands else group
        else:
            before += cost
    return Section(whole, tuple(events), before)


def _last_start(events: Sequence[Event]) -> int:
    return max(i for i, event in enumerate(events) if event.product is not None)


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


def _alone(part: Work, num_warps: int, device: Device) -> float:
    """Cycles of instructions beside which nothing else runs, but the warps' own other instructions."""
    own = cycles(part, num_warps, device)
    return max(own.issue, own.alu + own.fma, own.special, part.stalls)


def waiting(part: Section, num_warps: int, device: Device, repeated: bool) -> float:
    """Cycles of these warps alone on a multiprocessor: products in a queue, and the warps in theirs.

    Args:
        repeated: a loop, in the state that it comes to.
    """
    now = tensor_free = ended = begun = 0.0
    done: list[float] = []
    for _ in range(3 if repeated else 1):
        begun = ended
        for event in part.events:
            now += _alone(event.before, num_warps, device)
            if event.product is not None:
                tensor_free = max(now, tensor_free)
                tensor_free += cycles(event.product, num_warps, device).product
                done.append(tensor_free)
            elif len(done) > event.left:
                now = max(now, done[-1 - event.left]) + WAIT_CYCLES
        now += _alone(part.after, num_warps, device)
        ended = now
    return ended - begun


def step(part: Section, resources: Resources, device: Device, repeated: bool = True) -> Step:
    """The three rules."""
    whole = part.whole
    parts = cycles(whole, resources.num_warps, device)
    limit, least = parts.busiest
    in_step = whole.barriers > 0 or resources.num_warps <= 4
    alone = waiting(part, resources.num_warps if in_step else 4, device, repeated)
    alone /= resources.programs
    return Step(max(alone, least), "wait" if alone > least else limit, whole, parts)


def main_loop(instructions: Sequence[Instruction], spans: Sequence[tuple[int, int]]) -> int:
    """Which of several copies of a loop counts: the one with the fewest instructions for its products.

    Copies with causal or bounds masks have more, and run once or twice a program.
    """

    def price(span: tuple[int, int]) -> float:
        work = total(instructions[span[0] : span[1] + 1])
        return work.instructions / max(work.flops, 1.0)

    return min(range(len(spans)), key=lambda i: price(spans[i]))
