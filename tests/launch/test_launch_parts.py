"""Parts of the launch that need no launcher: devices, command lines, forwarding, process groups."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from toy_cluster import is_alive

from dense2sparse.launch.devices import visible_gpus
from dense2sparse.launch.forward_env import env_lines, private_env_file
from dense2sparse.launch.launcher import Cluster, LaunchError, child_environment, launcher_command
from dense2sparse.launch.processes import group_members, run_group

LISTING = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa-1)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-aabb-2)
"""


@pytest.fixture
def two_gpus(tmp_path: Path) -> dict[str, str]:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{LISTING}END\n")
    program.chmod(0o755)
    return {"PATH": f"{tmp_path}:/usr/bin:/bin"}


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, [0, 1]), ("1", [1]), ("1,0", [1, 0]), ("GPU-aabb", [1]), ("", []), ("-1", [])],
)
def test_visible_gpus(two_gpus: dict[str, str], visible: str | None, expected: list[int]) -> None:
    environ = two_gpus if visible is None else {**two_gpus, "CUDA_VISIBLE_DEVICES": visible}
    assert visible_gpus(environ) == expected


@pytest.mark.parametrize("visible", ["2", "GPU-aa", "MIG-1", "x"])
def test_device_that_is_not_here_is_refused(two_gpus: dict[str, str], visible: str) -> None:
    with pytest.raises(ValueError, match="none of this machine's 2 GPUs"):
        visible_gpus({**two_gpus, "CUDA_VISIBLE_DEVICES": visible})


def test_machine_without_nvidia_smi_has_no_gpus(tmp_path: Path) -> None:
    assert visible_gpus({"PATH": str(tmp_path)}) == []


def test_cpu_can_be_forced(two_gpus: dict[str, str]) -> None:
    assert visible_gpus({**two_gpus, "DS_ACCELERATOR": "cpu"}) == []


def test_gpu_ranks_are_named_by_number() -> None:
    command = launcher_command(Cluster(), [1, 3], "m", "r.yaml", ["a=b"])
    assert command[command.index("--include") + 1] == "localhost:1,3"
    assert command[-5:] == ["--no_local_rank", "--module", "m", "r.yaml", "a=b"]
    fewer = launcher_command(Cluster(ranks=1), [1, 3], "m", "r.yaml", [])
    assert "localhost:1" in fewer
    with pytest.raises(LaunchError, match="has 2 usable GPUs"):
        launcher_command(Cluster(ranks=3), [1, 3], "m", "r.yaml", [])


def test_cpu_ranks_share_the_cores_and_say_cpu() -> None:
    child = child_environment({"PATH": "/usr/bin"}, [], ranks=2)
    assert child["DS_ACCELERATOR"] == "cpu"
    assert int(child["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)
    assert child["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    assert "DS_ACCELERATOR" not in child_environment({"PATH": ""}, [0])
    assert "DS_ACCELERATOR" not in child_environment({"PATH": ""}, None)
    assert child_environment({"OMP_NUM_THREADS": "7"}, [])["OMP_NUM_THREADS"] == "7"


def test_cpu_threads_wait_without_spinning_unless_asked_to() -> None:
    assert child_environment({}, [])["OMP_WAIT_POLICY"] == "PASSIVE"
    assert child_environment({"OMP_WAIT_POLICY": "ACTIVE"}, [])["OMP_WAIT_POLICY"] == "ACTIVE"
    assert "OMP_WAIT_POLICY" not in child_environment({}, [0])


def test_forwarded_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".deepspeed_env").write_text("# comment\n\nNCCL_DEBUG=INFO\nbroken\n")
    environ = {
        "WANDB_MODE": "offline",
        "WANDB_NOTES": 'a "b" $c `d` \\e',
        "HF_TOKEN": "secret\nsecond",
        "HF_NAME": "run-%h",
        "HF_EMPTY": " ",
        "DS_ACCELERATOR": "cpu",
        "HOME_OF_OTHERS": "x",
    }
    assert env_lines(environ, Path("/v/bin")) == [
        "NCCL_DEBUG=INFO",
        "DS_ACCELERATOR=cpu",
        "WANDB_MODE=offline",
        'WANDB_NOTES=a \\"b\\" \\$c \\`d\\` \\\\e',
        "PATH=/v/bin:$PATH",
    ]
    said = capsys.readouterr().err
    assert "HF_TOKEN is not passed" in said and "HF_NAME is not passed" in said
    assert "secret" not in said


def test_env_file_is_removed_also_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), private_env_file({}, tmp_path) as file:
        assert file.stat().st_mode & 0o777 == 0o600
        raise RuntimeError("as if the launcher could not be started")
    assert not file.exists()


def python(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def kill_after_start(marker: Path, *numbers: int) -> threading.Thread:
    """Send signals to this process, the first once the marker file exists, the others 0.6 s apart."""

    def send() -> None:
        while not marker.exists():
            time.sleep(0.02)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.6)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_group_is_waited_for_after_its_leader_has_gone(tmp_path: Path) -> None:
    child = f"import time; time.sleep(1); open({str(tmp_path / 'late')!r}, 'w')"
    leader = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])"
    ending = run_group(python(leader), os.environ, worker_module="none")
    assert (ending.code, ending.killed) == (0, False)
    assert (tmp_path / "late").exists()


def test_third_request_kills_what_ignores_the_others(tmp_path: Path) -> None:
    marker = tmp_path / "ready"
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"open({str(marker)!r}, 'w'); time.sleep(60)"
    )
    thread = kill_after_start(marker, signal.SIGTERM, signal.SIGINT, signal.SIGTERM)
    ending = run_group(python(stubborn), os.environ, worker_module="none")
    thread.join()
    assert (ending.code, ending.stop_requests, ending.killed) == (-9, 3, True)


def test_orphans_that_do_not_leave_are_killed_after_their_grace(tmp_path: Path) -> None:
    child = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    leader = (
        "import subprocess, sys; "
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}]); open({str(tmp_path / 'pid')!r}, "
        "'w').write(str(p.pid))"
    )
    ending = run_group(python(leader), os.environ, worker_module="none", orphan_grace_s=0.5)
    assert ending.killed
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_signal_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    run_group(python("pass"), os.environ, worker_module="none")
    assert signal.getsignal(signal.SIGTERM) is before


def test_zombies_are_no_members() -> None:
    child = subprocess.Popen(["true"], start_new_session=True)
    while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    assert group_members(child.pid) == []
    child.wait()
