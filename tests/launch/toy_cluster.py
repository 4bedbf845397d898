"""What the launch tests share: a tiny recipe, the command with the toy module, stand-in programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """\
name: toy
model: {path: nowhere}
data:
  sources: [{name: made, kind: recall}]
stages:
  - {kind: warmup, steps: 3}
"""
DEADLINE_S = 600.0
COMMAND = (
    "import sys; from dense2sparse.launch.cli import main; "
    "sys.exit(main(sys.argv[1:], module='toy_run'))"
)


class ToyCluster:
    """A working folder with a recipe, in which `dense2sparse` starts tests/launch/toy_run.py."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_folder = folder / "runs" / "toy"
        self.programs = folder / "programs"
        self.programs.mkdir()
        (folder / "toy.yaml").write_text(RECIPE)
        self.environ = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parent),
            "PATH": f"{self.programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(folder),
            "DS_ACCELERATOR": "cpu",
            "WANDB_NAME": "",
        }
        self.add_program("dense2sparse", f'exec {sys.executable} -c "{COMMAND}" "$@"')

    def add_program(self, name: str, script: str) -> None:
        """Put a bash script on the PATH."""
        file = self.programs / name
        file.write_text(f"#!/usr/bin/env bash\n{script}\n")
        file.chmod(0o755)

    def start(self, *command: str, **environ: str) -> subprocess.Popen[str]:
        """Start a command in the folder, both outputs in one pipe."""
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env={**self.environ, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str) -> tuple[int, str]:
        """`dense2sparse run toy.yaml ...` to its end."""
        return self.finish(self.start("dense2sparse", "run", "toy.yaml", *arguments))

    def finish(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """Exit code and output of a process, which must end within the deadline."""
        try:
            output, _ = process.communicate(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return process.returncode, output

    def started(self, num_ranks: int) -> list[dict[str, Any]]:
        """What every rank saw, once all have started."""
        files = [self.run_folder / f"started-{rank}.json" for rank in range(num_ranks)]
        self.wait_for(*files)
        return [json.loads(file.read_text()) for file in files]

    def wait_for(self, *files: Path) -> None:
        """Until all files are there."""
        until = time.monotonic() + DEADLINE_S
        while not all(file.exists() for file in files):
            assert time.monotonic() < until, [str(f) for f in files if not f.exists()]
            time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def parent(pid: int) -> int:
    """Process id of a process's parent."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
