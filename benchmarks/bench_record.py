"""What every result file says about where it was measured: hardware, versions, commit, date, command."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from dense2sparse.train.environment import describe

ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, Any]:
    """Hardware, versions, commit (with a mark where the tree has changes), date and command."""
    found = describe(world_size=1, commit=commit())
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": about.name,
            "multiprocessors": about.multi_processor_count,
            "memory_gib": round(about.total_memory / 2**30, 1),
            "capability": f"{about.major}.{about.minor}",
        }
    return {"command": shlex.join(["python", *sys.argv]), **found}


def commit() -> str:
    """What the variable COMMIT says, for a tree that was carried elsewhere; else this checkout's commit, or
    "unknown" without git."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write(path: Path, record: dict[str, Any]) -> None:
    """The record as JSON; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w") as handle:
        handle.write(_narrow_lists(json.dumps(record, indent=1)) + "\n")
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(partial, path)


def _narrow_lists(text: str) -> str:
    """Lists of numbers on one line each."""
    return re.sub(r"\[[\s\d.,eE+-]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text)


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
