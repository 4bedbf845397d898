"""One run through the `deepspeed` launcher, on one machine or several.

Called by `launch.cli`. The launcher's exit code does not say whether a run succeeded (it can be 0 after
its workers were lost), so success is the run's own mark, `finished.json`, with this recipe's fingerprint.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from ..recipes.load import fingerprint
from ..recipes.schema import Recipe
from .devices import num_cores, visible_gpus
from .forward_env import private_env_file
from .processes import Ending, group_workers, run_group

EXIT_DONE, EXIT_FAILED, EXIT_BAD_RECIPE, EXIT_STOPPED = 0, 1, 2, 75
# What the launcher returns when a rank died of SIGTERM before it could listen: nothing was lost.
TERMINATED = (-15, 143, 241)
MARK_WAIT_S = 15.0


class LaunchError(ValueError):
    """A run that cannot be started as asked; the text is one sentence for the user."""


@dataclass(frozen=True)
class Cluster:
    """Where the ranks run; all None is this machine with every device."""

    ranks: int | None = None
    hostfile: str | None = None
    no_ssh: bool = False
    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int | None = None


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
    over_ssh = cluster.hostfile is not None and not cluster.no_ssh
    gpus = None if over_ssh else own_gpus()
    command = launcher_command(cluster, gpus or [], module, recipe_file, overrides)
    environ = child_environment(os.environ, gpus, ranks=cluster.ranks)
    if gpus and not cluster.hostfile:
        environ.pop("CUDA_VISIBLE_DEVICES", None)  # said by number on the command line instead
    with _lock(folder, cluster.node_rank or 0, module) as note_group:
        (folder / "STOP").unlink(missing_ok=True)  # asked of an earlier start
        files = private_env_file(environ, _bin_folder()) if over_ssh else nullcontext()
        with files as env_file:
            if env_file:
                environ["DS_ENV_FILE"] = str(env_file)
            # Ranks on other machines are out of reach of signals; they look for this file.
            on_stop = (lambda: ask_to_stop(recipe)) if over_ssh else None
            ending = run_group(
                command, environ, worker_module=module, on_start=note_group, on_stop=on_stop
            )
    return verdict(folder, wanted, ending, wait_s=MARK_WAIT_S if cluster.hostfile else 0)


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


def launcher_command(
    cluster: Cluster,
    gpus: list[int],
    module: str,
    recipe_file: str,
    overrides: list[str],
) -> list[str]:
    """The `deepspeed` command line.

    Args:
        cluster: which nodes and how many ranks.
        gpus: this machine's usable GPUs; empty is CPU; a hostfile decides instead.
        module: started on every rank.
        recipe_file: first argument of the module.
        overrides: its other arguments.

    Raises:
        LaunchError: the cluster cannot be as asked.
    """
    program = shutil.which("deepspeed", path=f"{_bin_folder()}:{os.environ.get('PATH', '')}")
    if program is None:
        raise LaunchError(
            "the `deepspeed` command is not installed; ./launch/quickstart.sh installs it"
        )
    # Always a hostfile, so that a /job/hostfile on the machine is never picked up by accident.
    # What the launcher would log is said in `verdict`; 75 is not an error.
    command = [program, "--log_level", "critical", "--hostfile", cluster.hostfile or os.devnull]
    arguments = [recipe_file, *overrides]
    if cluster.hostfile is None:
        command += _one_node_options(cluster, gpus)
    else:
        command += _many_nodes_options(cluster)
        if not cluster.no_ssh:
            arguments = [_for_remote_shell(argument) for argument in arguments]
    return [*command, "--no_local_rank", "--module", module, *arguments]


def child_environment(
    environ: Mapping[str, str], gpus: list[int] | None, *, ranks: int | None = None
) -> dict[str, str]:
    """Environment of the launcher and its ranks.

    Args:
        environ: the user's.
        gpus: this machine's usable GPUs; empty is CPU; None where the ranks run elsewhere.
        ranks: CPU ranks that share this machine's cores.
    """
    # ninja and g++ are looked up on PATH at run time; calling python by its path does not put them there.
    child = {**environ, "PATH": f"{_bin_folder()}:{environ.get('PATH', os.defpath)}"}
    if gpus == []:
        child.setdefault("DS_ACCELERATOR", "cpu")
        child.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // (ranks or 1))))
        # Threads that wait for each other spin by default. Where other programs want the cores too, they
        # take them from the very threads they wait for.
        child.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return child


def _one_node_options(cluster: Cluster, gpus: list[int]) -> list[str]:
    if cluster.no_ssh or cluster.node_rank is not None or cluster.master_addr:
        raise LaunchError("--no_ssh, --node_rank and --master_addr need --hostfile")
    port = ["--master_port", str(cluster.master_port or _free_port())]
    if not gpus:
        return [*port, "--num_gpus", str(cluster.ranks or 1)]
    ranks = cluster.ranks or len(gpus)
    if ranks > len(gpus):
        raise LaunchError(
            f"--ranks {ranks}: this machine has {len(gpus)} usable GPUs; use at most that"
        )
    return [*port, "--include", "localhost:" + ",".join(str(gpu) for gpu in gpus[:ranks])]


def _many_nodes_options(cluster: Cluster) -> list[str]:
    assert cluster.hostfile is not None
    hosts = read_hostfile(cluster.hostfile)
    if cluster.ranks is not None:
        raise LaunchError("--ranks and --hostfile exclude each other: the hostfile's slots decide")
    options = ["--master_port", str(cluster.master_port or 29500)]
    if cluster.no_ssh:
        if cluster.node_rank is None or not 0 <= cluster.node_rank < len(hosts):
            raise LaunchError(
                f"--node_rank {cluster.node_rank}: with --no_ssh give this node's place in "
                f"{cluster.hostfile}, 0 to {len(hosts) - 1}"
            )
        # Without an address the launcher would still ask the first node over ssh.
        options += ["--master_addr", cluster.master_addr or hosts[0]]
        return [*options, "--no_ssh", "--node_rank", str(cluster.node_rank)]
    if shutil.which("pdsh") is None:
        raise LaunchError(
            "pdsh is not installed; install it (apt install pdsh), or start every node by itself with "
            "--no_ssh --node_rank N"
        )
    if cluster.master_addr:
        options += ["--master_addr", cluster.master_addr, "--no_ssh_check"]
    return [*options, "--force_multi", "--launcher", "pdsh"]


def read_hostfile(path: str) -> list[str]:
    """Names of the nodes, in order.

    Raises:
        LaunchError: the file is missing or a line is not `name slots=N`.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"--hostfile {path}: cannot be read: {error}") from None
    hosts: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", line.strip())
        if not match:
            raise LaunchError(f"{path}, line {number}: {line.strip()!r} is not `name slots=N`")
        if match[1] in hosts:
            raise LaunchError(f"{path}, line {number}: the node {match[1]!r} stands twice")
        hosts.append(match[1])
    if not hosts:
        raise LaunchError(f"--hostfile {path}: it names no node; write `name slots=N` lines")
    return hosts


def _for_remote_shell(argument: str) -> str:
    """Quote an argument that pdsh gives to another machine's shell.

    DeepSpeed itself puts an argument with a space between double quotes, where `$` and the like still act.
    """
    if not re.search(r"\s", argument):
        return shlex.quote(argument)
    if re.search(r"[$`\\\"!\r\n]", argument):
        raise LaunchError(f"{argument!r} cannot pass through pdsh's shells; put it into the recipe")
    return argument


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


def own_gpus() -> list[int]:
    """This machine's usable GPUs, with the launcher's kind of error."""
    try:
        return visible_gpus(os.environ)
    except ValueError as error:
        raise LaunchError(str(error)) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _bin_folder() -> Path:
    # Not resolved: in a virtual environment python itself is a link to elsewhere.
    return Path(sys.executable).parent
