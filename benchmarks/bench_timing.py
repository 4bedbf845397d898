"""Time, memory and what the machine can do at best, all in one run.

Times are CUDA events around single calls, the cache overwritten before each, median of many; on a CPU (dry
runs) the clock, for the code's sake only.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

CACHE_BYTES = 256 << 20
"""Overwritten between calls; larger than any second-level cache."""
MOST_CALLS = 50
LAUNCH_CYCLES = 6_000_000
"""Cycles that the device sleeps before a call, about 3 ms: a training layer has many launches."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median_s: float
    fastest_s: float
    calls: int
    peak_gib: float
    """Allocated at the most during the calls, inputs included."""


class Bench:
    """Times calls on one device."""

    def __init__(self, device: torch.device, budget_s: float) -> None:
        self.device, self.budget_s = device, budget_s
        self.cuda = device.type == "cuda"
        size = CACHE_BYTES if self.cuda else 1
        self._cache = torch.empty(size, dtype=torch.int8, device=device)

    def time(self, call: Callable[[], Any], warm: bool = False) -> Timing:
        """Median of as many calls as the budget allows; a call that takes the whole budget is timed once.

        Args:
            warm: it was called before, so that nothing is left to compile.
        """
        self.synchronize()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        if not warm:
            call()
        first = self.once(call)
        calls = max(1, min(MOST_CALLS, int(self.budget_s / max(first, 1e-6)) - 1))
        times = [first] if calls == 1 else [self.once(call) for _ in range(calls)]
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.cuda else 0.0
        return Timing(statistics.median(times), min(times), len(times), peak)

    def once(self, call: Callable[[], Any]) -> float:
        """Seconds of one call with a cold cache."""
        self._cache.zero_()
        if not self.cuda:
            begun = time.perf_counter()
            call()
            return time.perf_counter() - begun
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The device waits while the call is being launched, so that only its own time counts.
        torch.cuda._sleep(LAUNCH_CYCLES)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3

    def graphed(self, calls: list[Callable[[], Any]]) -> Callable[[], Any]:
        """All calls, one after the other, as one CUDA graph; plainly on a CPU."""

        def all_of_them() -> None:
            for call in calls:
                call()

        if not self.cuda:
            return all_of_them
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            all_of_them()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_of_them()
        return graph.replay

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached in this run."""

    flops: float
    """FLOP/s of a large bf16 matrix product."""
    fp8_flops: float
    """The same in e4m3; that of bf16 where torch has no such product here."""
    bytes_per_s: float
    """Read and written by a large copy."""

    def floor_s(self, flops: float, moved_bytes: float, fp8_flops: float = 0.0) -> float:
        """Least seconds for so much arithmetic, of which `fp8_flops` in fp8, and so much traffic."""
        arithmetic = (flops - fp8_flops) / self.flops + fp8_flops / self.fp8_flops
        return max(arithmetic, moved_bytes / self.bytes_per_s)


def ceilings(bench: Bench) -> Ceilings:
    """Measure them; tiny and meaningless on a CPU."""
    size = 8192 if bench.cuda else 64
    dtype = torch.bfloat16 if bench.cuda else torch.float32
    a, b = (torch.randn(size, size, dtype=dtype, device=bench.device) for _ in range(2))
    product = 2 * size**3 / bench.time(lambda: a @ b).fastest_s
    fp8 = product
    try:
        narrow, other = a.to(torch.float8_e4m3fn), b.t().contiguous().to(torch.float8_e4m3fn).t()
        one = torch.ones((), device=bench.device)

        def scaled() -> Any:
            return torch._scaled_mm(
                narrow, other, one, one, out_dtype=torch.bfloat16, use_fast_accum=True
            )

        fp8 = 2 * size**3 / bench.time(scaled).fastest_s if bench.cuda else product
    except (RuntimeError, TypeError, ValueError):
        pass  # the device or this torch lacks it
    source = torch.empty(2 << 30 if bench.cuda else 1 << 10, dtype=torch.int8, device=bench.device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / bench.time(lambda: target.copy_(source)).fastest_s
    return Ceilings(product, fp8, copied)
