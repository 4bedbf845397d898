"""Keeps a benchmark going when a kernel hangs or breaks the device: its process ends, another continues.

A wild memory access makes a CUDA device useless to the process that did it, and a kernel that never ends
holds its process for ever. So the measuring process writes down what it begins; when it is lost it leaves
with the exit code LOST, and `supervise` starts it again with `--continue`, which skips what is written.
Called by kernels.py, check_run.py and step.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOST = 75
"""Exit code of a process that lost the device."""
WORKER = "DENSE2SPARSE_BENCH_BEGUN"
"""Environment variable of the measuring process: the time at which the first one began."""
MOST_STARTS = 20
UNFINISHED = "the process ended while this ran: it hung, broke the device or was stopped"


def supervise() -> int | None:
    """Run this command in a process of its own as often as it takes: its exit code.

    None in that process itself, which should then measure.
    """
    if WORKER in os.environ:
        return None
    environment = {**os.environ, WORKER: str(time.time())}
    command, code = [sys.executable, *sys.orig_argv[1:]], LOST
    for _ in range(MOST_STARTS):
        code = subprocess.run(command, env=environment, check=False).returncode
        # A compiler may crash too; a signal from outside ends everything.
        if code != LOST and code not in (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS):
            break
        print("the measuring process is lost: another one continues", flush=True)
        if "--continue" not in command:
            command.append("--continue")
    return code


def earlier(file: Path | None, go_on: bool, key: str = "results") -> list[dict[str, Any]]:
    """What the process before this one wrote; nothing where this one does not go on behind another."""
    if not go_on or file is None or not file.is_file():
        return []
    return json.loads(file.read_text())[key]


def device_works(device_type: str) -> bool:
    """Give memory back; whether the device still works (a wild access ends it for the process)."""
    import torch

    if device_type == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
    return True


def begun() -> float:
    """time.time() at the first start of this command."""
    return float(os.environ.get(WORKER, time.time()))


def leave() -> None:
    """End the process at once, from any thread; what was to be kept must be written."""
    print("the device does not answer any more", flush=True)
    sys.stdout.flush()
    os._exit(LOST)


@contextlib.contextmanager
def at_most(seconds: float | None) -> Iterator[None]:
    """Leave if what is inside takes longer; None: no limit."""
    if seconds is None:
        yield
        return
    timer = threading.Timer(seconds, leave)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
