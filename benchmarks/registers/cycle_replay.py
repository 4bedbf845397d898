"""Replay of a loop: how long the warps of one program take for a pass when nothing else runs beside them.

One scheduler is followed, instruction by instruction in program order, with its share of the warps in step.
An instruction is issued once for each warp, and waits

  - as many cycles as the instruction before it asks for, and until the pipe that it needs is free;
  - for the scoreboards that it names: results of memory, shuffles and special functions;
  - at DEPBAR for asynchronous copies, at WARPGROUP.DEPBAR for products, at BAR for the other warps.

Products run one after another in a queue of the tensor cores; what stands between a product's start and the
wait for it runs beside it. Copies are finished COPY_CYCLES after they were asked for. Scoreboards and stall
counts are in the control bits of SASS (arXiv 1804.06826). Called by cycle_rules.py.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from cycle_sass import BULK, GLOBAL, SPECIAL, Instruction, Work, work_of

COPY_CYCLES = 500.0
"""From a read of global memory to its data: on an idle device about 260 from the second-level cache and 480
from memory (arXiv 2402.13499)."""
SHARED_CYCLES = 30.0
"""Of shared memory and shuffles (the same source)."""
SPECIAL_CYCLES = 20.0
PRODUCT_CYCLES = 60.0
"""Assumed: from the end of a product in the queue to its result in registers."""
BARRIER_CYCLES = 30.0
"""Assumed."""


@dataclass
class _Scheduler:
    """Where one replay stands, in cycles."""

    warps: float
    """Of this scheduler."""
    now: float = 0.0
    pipes: dict[str, float] = field(default_factory=dict)
    """When each pipe is free."""
    boards: list[float] = field(default_factory=lambda: [0.0] * 6)
    """When what a scoreboard stands for is done."""
    asked: float = 0.0
    """When the last copy will be there."""
    copies: list[float] = field(default_factory=list)
    tensor_free: float = 0.0
    products: list[float] = field(default_factory=list)
    open_product: bool = False

    def run(self, one: Instruction, cost: Work, share: float) -> None:
        """One instruction, that runs in `share` of the passes."""
        for board in range(6):
            if one.waits_for >> board & 1:
                self.now = max(self.now, self.boards[board])
        busy = {"alu": cost.alu, "fma": cost.fma, "special": cost.special}
        pipe = max(busy, key=busy.__getitem__)
        if busy[pipe]:
            begin = max(self.now, self.pipes.get(pipe, 0.0))
            self.pipes[pipe] = begin + busy[pipe] * self.warps * share
            self.now += (begin - self.now) * share
        self._wait(one)
        done = self.now + _latency(one)
        if one.base == "LDGSTS" or one.base in BULK:
            self.asked = self.now + COPY_CYCLES
        elif one.base == "LDGDEPBAR":
            self.copies.append(self.asked)
        if one.is_tensor and one.base != "HMMA":
            self._multiply(one, cost)
        for board, until in ((one.written, done), (one.read, self.now + SPECIAL_CYCLES)):
            if board < 6:
                self.boards[board] = max(self.boards[board], until)
        self.now += max(float(one.stall), self.warps) * share

    def _wait(self, one: Instruction) -> None:
        if one.name.startswith("WARPGROUP.DEPBAR"):
            left = int(one.operands.split("0x")[-1], 16)
            if len(self.products) > left:
                self.now = max(self.now, self.products[-1 - left] + PRODUCT_CYCLES)
        elif one.base == "DEPBAR" and "SB0" in one.operands:
            left = int(one.operands.split("0x")[-1], 16)
            if len(self.copies) > left:
                self.now = max(self.now, self.copies[-1 - left])
        elif one.base == "BAR":
            self.now += BARRIER_CYCLES

    def _multiply(self, one: Instruction, cost: Work) -> None:
        if not self.open_product:
            self.tensor_free = max(self.tensor_free, self.now)
            self.open_product = True
        # The work is one warp's; all warps' products share the tensor cores.
        self.tensor_free += cost.product * 4 * self.warps
        if "gsb" in one.operands:
            self.products.append(self.tensor_free)
            self.open_product = False


def _latency(one: Instruction) -> float:
    if one.base in SPECIAL:
        return SPECIAL_CYCLES
    return COPY_CYCLES if one.base in GLOBAL else SHARED_CYCLES


def replay(
    instructions: Sequence[Instruction],
    num_warps: int,
    repeated: bool,
    rare: Collection[int] = (),
    share: float = 1.0,
) -> float:
    """Cycles of one pass of `num_warps` warps in step.

    Args:
        repeated: a loop, in the state that it comes to; else from a standing start.
        rare: numbers of instructions that run in `share` of the passes.
    """
    scheduler = _Scheduler(num_warps / 4)
    costs = [work_of(one) for one in instructions]
    begun = 0.0
    passes = 8 if repeated else 1
    for number in range(passes):
        # Whole loops repeat after a few passes; the last half counts.
        begun = scheduler.now if number == passes // 2 else begun
        for i, one in enumerate(instructions):
            scheduler.run(one, costs[i], share if i in rare else 1.0)
    return (scheduler.now - begun) / (passes - passes // 2)
