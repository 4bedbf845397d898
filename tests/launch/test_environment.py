"""The set-up part of the scripts, with stand-ins for Python, df and pip: what a newcomer may meet."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from toy_cluster import ROOT

PREPARE = (
    "source launch/_environment.sh; set -euo pipefail; prepare_environment launch/requirements.txt"
)


class Clone:
    """A bare copy of what the scripts read, and a folder of stand-in programs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs = folder / "programs"
        for made in (self.programs, folder / "launch"):
            made.mkdir()
        for name in ("_environment.sh", "requirements.txt"):
            (folder / "launch" / name).write_text((ROOT / "launch" / name).read_text())
        (folder / "pyproject.toml").write_text("# as of a clone\n")

    def program(self, name: str, script: str) -> None:
        file = self.programs / name
        file.write_text(f"#!/bin/bash\n{script}\n")
        file.chmod(0o755)

    def prepare(self, **more: str) -> tuple[int, str]:
        environ = {"PATH": f"{self.programs}:/usr/bin:/bin", "HOME": os.environ["HOME"], **more}
        done = subprocess.run(
            ["bash", "-c", PREPARE],
            cwd=self.folder,
            env=environ,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return done.returncode, done.stdout

    def pip_calls(self) -> list[str]:
        log = self.folder / "pip.log"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    """A clone in which python makes an environment whose pip notes its arguments and succeeds."""
    clone = Clone(tmp_path)
    clone.program("nvidia-smi", "exit 9")
    for name in ("python3.13", "python3.12", "python3.11", "python"):
        clone.program(name, "exit 1")
    inner = (
        'if [[ "$2" == pip ]]; then echo "$*" >>pip.log; '
        'if [[ -x programs/pip-answer ]]; then programs/pip-answer "$@"; fi; fi'
    )
    clone.program("inner-python", inner)
    clone.program(
        "python3",
        'if [[ "$1 $2" == "-m venv" ]]; then mkdir -p "$4/bin"; '
        'cp programs/inner-python "$4/bin/python"; fi; '
        'if [[ "$1" == --version ]]; then echo Python 3.12.0; fi',
    )
    return clone


def test_second_preparation_installs_nothing(clone: Clone) -> None:
    code, output = clone.prepare()
    assert code == 0, output
    assert [line.split("]")[0] for line in output.splitlines()] == ["[1/4", "[2/4", "[3/4", "[4/4"]
    calls = clone.pip_calls()
    assert "torch==" in calls[0] and "+cpu" in calls[0]
    assert "-r launch/requirements.txt" in calls[1]
    assert calls[2].endswith("--no-deps -e .")
    assert clone.prepare() == (0, "")
    assert clone.pip_calls() == calls


def test_changed_pins_are_installed(clone: Clone) -> None:
    clone.prepare()
    (clone.folder / "launch" / "requirements.txt").write_text("wandb==0.0\n")
    before = len(clone.pip_calls())
    assert clone.prepare()[0] == 0
    assert len(clone.pip_calls()) == 2 * before


def test_interrupted_installation_is_repeated(clone: Clone) -> None:
    clone.program("pip-answer", '[[ "$*" == *requirements* ]] && exit 1; exit 0')
    code, output = clone.prepare()
    assert (code, "Installing the dependencies failed" in output) == (1, True)
    clone.program("pip-answer", "exit 0")
    assert clone.prepare()[0] == 0
    assert clone.prepare() == (0, "")


def test_with_a_gpu_the_cpu_build_is_replaced(clone: Clone) -> None:
    clone.program("nvidia-smi", "exit 0")
    answer = '[[ "$*" == *freeze* ]] && echo "torch==$TORCH_VERSION+cpu"; exit 0'
    clone.program("pip-answer", f"source launch/_environment.sh; {answer}")
    code, output = clone.prepare()
    assert (code, "for the GPU" in output) == (0, True)
    _, uninstall, install = clone.pip_calls()[:3]
    assert uninstall.endswith("uninstall --yes torch")
    assert "+cpu" not in install and "torch==" in install


def test_missing_cpu_build_falls_back_aloud(clone: Clone) -> None:
    clone.program("pip-answer", '[[ "$*" == *+cpu* || "$*" == *whl/cpu* ]] && exit 1; exit 0')
    code, output = clone.prepare()
    assert (code, "no CPU build found" in output) == (0, True)
    assert len([call for call in clone.pip_calls() if "torch==" in call]) == 3


def test_unreachable_index_is_said_in_one_sentence(clone: Clone) -> None:
    clone.program("pip-answer", "echo 'ERROR: NameResolutionError(...)' >&2; exit 1")
    code, output = clone.prepare()
    assert code == 1
    last = output.splitlines()[-1]
    assert "failed because the package index cannot be reached" in last and "PIP_INDEX_URL" in last


def test_old_python_is_refused(clone: Clone) -> None:
    clone.program("python3", '[[ "$1" == --version ]] && { echo Python 3.9.2; exit 0; }; exit 1')
    code, output = clone.prepare()
    assert code == 1
    assert "Python 3.11 or newer is needed, and python3 here is Python 3.9.2" in output
    assert not (clone.folder / ".venv").exists()


def test_small_disk_is_refused_before_anything_is_made(clone: Clone) -> None:
    clone.program("df", "printf 'head\\n/dev/x 9 9 2000000 9%% /\\n'")
    code, output = clone.prepare()
    assert (code, "has 1 GiB of free disk, but the installation needs 4 GiB" in output) == (1, True)
    assert not (clone.folder / ".venv").exists()


def test_an_older_stack_has_pins_and_a_folder_of_its_own(clone: Clone) -> None:
    name = "requirements-torch-2.11.txt"
    (clone.folder / "launch" / name).write_text((ROOT / "launch" / name).read_text())
    code, output = clone.prepare(STACK="torch-2.11")
    assert code == 0, output
    made = clone.folder / ".venv-torch-2.11"
    pins = (made / "requirements.txt").read_text().splitlines()
    assert not (clone.folder / ".venv").exists()
    assert "transformers==5.17.0" in pins and not any(
        pin.startswith("transformers==5.2") for pin in pins
    )
    usual = (ROOT / "launch" / "requirements.txt").read_text().splitlines()
    assert len(pins) == len(usual), "nothing is left out"
    assert any("torch==2.11.0" in call for call in clone.pip_calls())
    assert clone.prepare(STACK="torch-2.11") == (0, "")


def test_a_stack_that_is_not_known_is_one_sentence(clone: Clone) -> None:
    code, output = clone.prepare(STACK="torch-1.0")
    assert code == 2 and "STACK=torch-1.0 is not known" in output
