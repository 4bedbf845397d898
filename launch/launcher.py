"""What is started, and where: the `deepspeed` command line, the environment of its ranks, the hostfile.

Used by `launch.run`, which owns what becomes of the ranks.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from .devices import num_cores, visible_gpus
from .forward_env import private_env_file
from .processes import Ending, run_group


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


@dataclass(frozen=True)
class Launch:
    """What is about to be started."""

    command: list[str]
    environ: dict[str, str]
    module: str
    over_ssh: bool


def prepared(cluster: Cluster, module: str, recipe_file: str, arguments: list[str]) -> Launch:
    """The launcher's command and environment.

    Raises:
        LaunchError: the cluster cannot be as asked.
    """
    over_ssh = cluster.hostfile is not None and not cluster.no_ssh
    gpus = None if over_ssh else own_gpus()
    command = launcher_command(cluster, gpus or [], module, recipe_file, arguments)
    environ = child_environment(os.environ, gpus, ranks=cluster.ranks)
    if gpus and not cluster.hostfile:
        environ.pop("CUDA_VISIBLE_DEVICES", None)  # said by number on the command line instead
    return Launch(command, environ, module, over_ssh)


def started(
    launch: Launch,
    *,
    on_start: Callable[[int], object] | None = None,
    on_stop: Callable[[], object] | None = None,
    stopping: str = "the run saves and ends at its next step",
) -> Ending:
    """Start the launcher and stay until none of its processes is left; arguments as of `run_group`."""
    environ = dict(launch.environ)
    files = private_env_file(environ, _bin_folder()) if launch.over_ssh else nullcontext()
    with files as env_file:
        if env_file:
            environ["DS_ENV_FILE"] = str(env_file)
        return run_group(
            launch.command,
            environ,
            worker_module=launch.module,
            on_start=on_start,
            on_stop=on_stop,
            stopping=stopping,
        )


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


def check_one_node(cluster: Cluster) -> None:
    """Refuse options that mean nothing on one machine (LaunchError)."""
    if cluster.no_ssh or cluster.node_rank is not None or cluster.master_addr:
        raise LaunchError("--no_ssh, --node_rank and --master_addr need --hostfile")


def _one_node_options(cluster: Cluster, gpus: list[int]) -> list[str]:
    check_one_node(cluster)
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
