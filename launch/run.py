"""One run through the `deepspeed` launcher, on one machine or several.

Called by `launch.cli`. The launcher's exit code does not say whether a run succeeded (it can be 0 after
its workers were lost), so success is the run's own mark, `finished.json`, with this recipe's fingerprint.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ..recipes.load import fingerprint
from ..recipes.schema import Recipe
from .launcher import Cluster, LaunchError, prepared, started
from .processes import Ending, group_workers

EXIT_DONE, EXIT_FAILED, EXIT_BAD_RECIPE, EXIT_STOPPED = 0, 1, 2, 75
# What the launcher returns when a rank died of SIGTERM before it could listen: nothing was lost.
TERMINATED = (-15, 143, 241)
MARK_WAIT_S = 15.0


def run(
    recipe: Recipe,
    recipe_file: str,
    overrides: list[str],
    cluster: Cluster,
    *,
    module: str,
) -> int:
    """Start or continue a run and stay until none of its processes is left.

    Args:
        recipe: the loaded recipe, to know its folder and fingerprint.
        recipe_file: its path, passed on with `overrides` to every rank.
        overrides: `a.b=c`.
        cluster: which nodes and how many ranks.
        module: started with `-m` on every rank.

    Returns:
        The exit code.

    Raises:
        LaunchError: nothing was started.
    """
    folder = run_folder(recipe)
    wanted = fingerprint(recipe)
    if is_finished(folder, wanted):
        print(f"dense2sparse: all is done; the report is at {folder / 'report.html'}")
        return EXIT_DONE
    launch = prepared(cluster, module, recipe_file, overrides)
    with _lock(folder, cluster.node_rank or 0, module) as note_group:
        (folder / "STOP").unlink(missing_ok=True)  # asked of an earlier start
        # Ranks on other machines are out of reach of signals; they look for this file.
        on_stop = (lambda: ask_to_stop(recipe)) if launch.over_ssh else None
        ending = started(launch, on_start=note_group, on_stop=on_stop)
    return verdict(folder, wanted, ending, wait_s=MARK_WAIT_S if cluster.hostfile else 0)


def evaluate(
    recipe: Recipe,
    recipe_file: str,
    overrides: list[str],
    cluster: Cluster,
    *,
    options: Mapping[str, str],
    module: str,
) -> int:
    """Run an evaluation's ranks and stay until none is left; returns the exit code.

    Args:
        recipe: the loaded recipe.
        recipe_file: passed on with `overrides` to every rank.
        options: of the module, `checkpoint` and `output` where they were given.
        module: started with `-m` on every rank.

    Raises:
        LaunchError: nothing was started.
    """
    mark = Path(options.get("output", recipe.output_dir)).resolve() / f".evaluated-{os.getpid()}"
    words = option_words({**options, "mark": str(mark)})
    launch = prepared(cluster, module, recipe_file, [*overrides, *words])
    try:
        ending = started(launch, stopping="what was answered is kept")
        done = ending.code == 0 and _appears(mark, MARK_WAIT_S if cluster.hostfile else 0)
    finally:
        mark.unlink(missing_ok=True)
    if done:
        return EXIT_DONE
    if ending.code == EXIT_BAD_RECIPE:
        return EXIT_BAD_RECIPE  # a rank has said why
    if ending.stop_requests:
        print("dense2sparse: stopped; the same command goes on with what has no answer yet")
        return EXIT_STOPPED
    print(
        f"error: the evaluation did not finish ({_how(ending.code)}); the messages above say why, and the "
        "same command goes on with what has no answer yet",
        file=sys.stderr,
    )
    return EXIT_FAILED


def option_words(options: Mapping[str, str]) -> list[str]:
    """Options by name as words of a command line."""
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def _appears(mark: Path, wait_s: float) -> bool:
    """Whether a file is there, or becomes visible on a shared file system."""
    until = time.monotonic() + wait_s
    while not mark.is_file():
        if time.monotonic() >= until:
            return False
        time.sleep(0.5)
    return True


def run_folder(recipe: Recipe) -> Path:
    """Folder of everything that the run makes."""
    return Path(recipe.output_dir) / recipe.name


def stop(recipe: Recipe) -> str:
    """Ask a run to stop; returns what was done, for the user.

    Raises:
        LaunchError: there is no such run.
    """
    folder = run_folder(recipe)
    if is_finished(folder, fingerprint(recipe)):
        (folder / "STOP").unlink(missing_ok=True)  # asked of it as it ended
        return f"the run in {folder} is finished: there is nothing to stop"
    return f"asked to stop by the file {ask_to_stop(recipe)}"


def ask_to_stop(recipe: Recipe) -> Path:
    """Leave the file that every rank looks for at each step; returns its path.

    Raises:
        LaunchError: there is no such run.
    """
    folder = run_folder(recipe)
    if not folder.is_dir():
        raise LaunchError(f"there is no run in {folder}; is this the right recipe and folder?")
    (folder / "STOP").touch()
    return folder / "STOP"


def is_finished(folder: Path, wanted: str) -> bool:
    """Whether the run's own mark is there and is of this very recipe."""
    try:
        mark = json.loads((folder / "finished.json").read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False
    return isinstance(mark, dict) and mark.get("fingerprint") == wanted


def verdict(folder: Path, wanted: str, ending: Ending, wait_s: float) -> int:
    """Exit code of a run that has ended, with one line that says what happened.

    Args:
        folder: the run's folder.
        wanted: fingerprint that the mark must have.
        ending: of the launcher's process group.
        wait_s: how long the mark may take to become visible, on a shared file system.
    """
    until = time.monotonic() + (wait_s if ending.code == 0 else 0)
    finished = is_finished(folder, wanted)
    while not finished and time.monotonic() < until:
        time.sleep(0.5)
        finished = is_finished(folder, wanted)
    if finished:
        print(f"dense2sparse: all is done; the report is at {folder / 'report.html'}")
        return EXIT_DONE
    stopped = ending.code == EXIT_STOPPED or (ending.stop_requests and ending.code in TERMINATED)
    if stopped and not ending.killed:
        print("dense2sparse: stopped; the same command continues where the run stands")
        return EXIT_STOPPED
    if ending.code == EXIT_BAD_RECIPE:
        return EXIT_BAD_RECIPE  # the rank has said why
    print(
        f"error: the run did not finish ({_how(ending.code)}, no finished.json of this "
        f"recipe in {folder}); the messages above say why, and the same command continues from the "
        "last checkpoint",
        file=sys.stderr,
    )
    return EXIT_FAILED


def _how(code: int) -> str:
    """An exit code in words; the launcher passes on a rank's signal n as 256 - n."""
    if code < 0:
        return f"the launcher was ended by signal {-code}"
    if code > 256 - signal.NSIG:
        hint = ", as when memory runs out" if code == 256 - signal.SIGKILL else ""
        return f"a rank was ended by signal {256 - code}{hint}"
    return f"exit code {code}"


@contextmanager
def _lock(folder: Path, node_rank: int, module: str) -> Iterator[Callable[[int], None]]:
    """Keep a second launch of the same run out; the lock ends with this process.

    Its file holds the process group, since after a kill -9 of this process the ranks live on.

    Yields:
        A function that notes the process group.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / f".launch-{node_rank}.lock").open("a+")
    except OSError as error:
        raise LaunchError(f"output_dir: cannot write to {folder}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LaunchError(
                f"{folder}: this run is already going on; wait, or change `name`"
            ) from None
        file.seek(0)
        host, _, group = file.read().partition(" ")
        left = group_workers(int(group), module) if group and host == socket.gethostname() else []
        if left:
            pids = " ".join(str(pid) for pid in left)
            raise LaunchError(
                f"{folder}: ranks of an earlier start are still at work; `kill {pids}` lets them save "
                "and end"
            )

        def note_group(number: int) -> None:
            file.truncate(0)
            file.write(f"{socket.gethostname()} {number}")
            file.flush()

        yield note_group
