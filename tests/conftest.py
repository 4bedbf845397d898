"""Triton's interpreter for the whole suite, and waiting that a busy machine does not break."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from subprocess import Popen

import psutil
import pytest

# Triton reads the variable when it is first imported.
os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes first, so that no process is left with one of them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


class Patience:
    """Waits as long as there is progress: processes that still use the processor are not stuck.

    A fixed number of seconds is too short on a busy machine and too long where a process waits for ever.
    """

    IDLE_S = 120.0
    """Without a second of processor time for so long, a process waits for something that does not come."""

    def __init__(self, processes: Iterable[Popen]) -> None:
        self._processes = list(processes)
        self._used, self._since = 0.0, time.monotonic()

    def until(self, condition: Callable[[], bool], said: Callable[[], str] = str) -> None:
        """Poll until `condition` holds; `said` is shown where it never does."""
        while not condition():
            used = self._processor_s()
            if used > self._used + 1.0:
                self._used, self._since = used, time.monotonic()
            if time.monotonic() > self._since + self.IDLE_S:
                self.kill()
                raise AssertionError(f"nothing moved for {self.IDLE_S:.0f} s: {said()[-3000:]}")
            time.sleep(0.002)

    def ended(self, said: Callable[[], str] = str) -> list[int]:
        """Exit codes of the processes, once all have ended."""
        self.until(lambda: all(one.poll() is not None for one in self._processes), said)
        return [one.returncode for one in self._processes]

    def kill(self) -> None:
        """End the processes and their children."""
        for one in self._trees():
            try:
                one.kill()
            except psutil.NoSuchProcess:
                continue

    def _processor_s(self) -> float:
        """Seconds that the living processes and their children have used."""
        total = 0.0
        for one in self._trees():
            try:
                times = one.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system
        return total

    def _trees(self) -> list[psutil.Process]:
        found = []
        for one in self._processes:
            try:
                top = psutil.Process(one.pid)
                found += [top, *top.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
        return found


@pytest.fixture(scope="session")
def patience() -> type[Patience]:
    """`patience(processes).ended()`"""
    return Patience
