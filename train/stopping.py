"""Being asked to stop: SIGTERM, SIGUSR1, SIGINT or a file named STOP in the run's folder.

Inside the training loop a request only sets a flag; all ranks agree on it at the next step
boundary, save and leave with the exit code 75 ("requeue"). Everywhere else (fetching, converting,
evaluating) nothing is lost by leaving at once, because those parts write atomically or line by line
and pick up where they stood.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

REQUEUE = 75
"""Exit code of a run that was asked to stop and can be continued by the same command."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(SystemExit):
    """Raised to leave the run with REQUEUE."""

    def __init__(self) -> None:
        super().__init__(REQUEUE)


class StopRequests:
    """Collects requests to stop; one per process, built in the main thread."""

    def __init__(self, stop_file: Path) -> None:
        self._file = stop_file
        self._asked = False
        self._graceful = False

    def install(self) -> None:
        """Take over the signals."""
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if not self._graceful:
            raise Stopped()

    @contextmanager
    def at_step_boundaries(self) -> Iterator[None]:
        """Within: requests wait for `agreed`. One that came at the very end is honoured on leaving."""
        self._graceful = True
        try:
            yield
        finally:
            self._graceful = False
        if self._asked:
            raise Stopped()

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop; every rank calls this at a step boundary."""
        asked = self._asked or self._file.exists()
        if dist.is_initialized() and dist.get_world_size() > 1:
            flag = torch.tensor(int(asked), dtype=torch.int32, device=device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            asked = bool(flag.item())
        return asked

    def consume_file(self) -> bool:
        """Remove the stop file, so that the next start goes on; whether there was one. Rank 0 only."""
        there = self._file.exists()
        self._file.unlink(missing_ok=True)
        return there
