"""Ownership of everything that the DeepSpeed launcher starts.

A SIGTERM to the `deepspeed` command kills only that command and leaves its workers behind; a worker that
dies can leave exit code 0; and its inner launcher kills workers 30 s after a SIGTERM, saved or not. So
the launcher is started in a session of its own, a request to stop goes to the workers alone (they save
and leave at a step boundary, however long that takes), and the call returns when the whole process group
is empty. Linux only: processes are found in /proc.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NamedTuple

POLL_S = 0.2
ORPHAN_GRACE_S = 300.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True)
class Ending:
    """How a process group ended."""

    code: int
    """Exit code of the launcher; negative for a signal."""
    stop_requests: int
    """How often we were asked to stop."""
    killed: bool
    """Whether processes had to be killed, so that nothing was saved at the end."""


class Process(NamedTuple):
    """One live process of the group."""

    pid: int
    arguments: list[str]


def run_group(
    command: Sequence[str],
    environ: Mapping[str, str],
    *,
    worker_module: str,
    on_start: Callable[[int], object] | None = None,
    on_stop: Callable[[], object] | None = None,
    stopping: str = "the run saves and ends at its next step",
    orphan_grace_s: float = ORPHAN_GRACE_S,
) -> Ending:
    """Start a command in its own session and stay until none of its processes is left.

    SIGTERM, SIGINT, SIGHUP or SIGUSR1 to this process are requests to stop: the first asks the workers
    to save and leave, the second sends SIGTERM to every process of the group, the third SIGKILL.

    Args:
        command: the launcher and its arguments.
        environ: its whole environment.
        worker_module: workers are the processes started with `-m` and this name.
        on_start: told the number of the process group.
        on_stop: used for the first request instead of signals, where workers are on other machines.
        stopping: what the first request leads to, in words for the user.
        orphan_grace_s: how long workers may go on saving after their launcher has died.

    Returns:
        The ending; the caller judges success by what the run left on disk.
    """
    requests: list[int] = []

    def note_request(number: int, _frame: FrameType | None) -> None:
        requests.append(number)

    before = {number: signal.signal(number, note_request) for number in STOP_SIGNALS}
    try:
        launcher = subprocess.Popen(command, env=dict(environ), start_new_session=True)
        if on_start is not None:
            on_start(launcher.pid)
        asked = partial(_first_request, worker_module, on_stop, stopping)
        return _watch(launcher, requests, worker_module, asked, orphan_grace_s)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def group_members(group: int) -> list[Process]:
    """Processes of a process group that are alive (zombies are not)."""
    members = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            # The name in field 2 may hold spaces and brackets: count fields after its last bracket.
            state, _, pgrp = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) != group or state in "ZX":
                continue
            arguments = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        members.append(Process(int(folder.name), arguments))
    return members


def group_workers(group: int, module: str) -> list[int]:
    """Process ids of a group's workers: what python was started with `-m module` for."""
    return [member.pid for member in group_members(group) if _runs_module(member.arguments, module)]


def _watch(
    launcher: subprocess.Popen[bytes],
    requests: list[int],
    worker_module: str,
    asked: Callable[[list[Process]], bool],
    orphan_grace_s: float,
) -> Ending:
    group = launcher.pid
    handled = 0
    killed = False
    orphans_since: float | None = None
    while True:
        code = launcher.poll()
        members = group_members(group)
        if code is not None and not members:
            return Ending(code, len(requests), killed)
        if len(requests) > handled:
            handled += 1
            killed |= _pass_on(handled, group, members, asked)
        if code is not None:
            now = time.monotonic()
            if orphans_since is None:
                orphans_since = now
                _signal_workers(members, worker_module, signal.SIGTERM)
            elif now - orphans_since > orphan_grace_s:
                _signal_group(group, signal.SIGKILL)
                killed = True
        time.sleep(POLL_S)


def _pass_on(
    request: int,
    group: int,
    members: list[Process],
    asked: Callable[[list[Process]], bool],
) -> bool:
    """Act on one request to stop; True if processes were killed."""
    if request == 1 and asked(members):
        return False
    if request <= 2:
        _signal_group(group, signal.SIGTERM)
        return False
    _signal_group(group, signal.SIGKILL)
    return True


def _first_request(
    module: str, on_stop: Callable[[], object] | None, stopping: str, members: list[Process]
) -> bool:
    """Ask the workers to end; False if there are none yet."""
    if on_stop is not None:
        on_stop()
    elif not _signal_workers(members, module, signal.SIGTERM):
        return False
    print(f"dense2sparse: asked to stop; {stopping}", flush=True)
    return True


def _signal_workers(members: list[Process], module: str, number: signal.Signals) -> int:
    """Signal the group's workers; returns how many there are."""
    workers = [member.pid for member in members if _runs_module(member.arguments, module)]
    for pid in workers:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
    return len(workers)


def _runs_module(arguments: list[str], module: str) -> bool:
    """Whether python was started with `-m module`; the launchers only pass that name on."""
    if "-m" not in arguments:
        return False
    return arguments[arguments.index("-m") + 1 :][:1] == [module]


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return  # it emptied itself meanwhile
