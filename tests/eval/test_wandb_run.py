"""The wandb run online: a network that is lost, an account that is not there. Each in its own process."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
WANDB_FILE = runpy.run_path(str(HERE.parent / "wandb_file.py"))
NO_ACCOUNT = """
from pathlib import Path
from types import SimpleNamespace
from dense2sparse.eval.wandb_run import start_wandb
where = SimpleNamespace(mode="online", project="tests", entity=None, group=None, tags=[])
try:
    start_wandb(where, name="t", run_id="x", run_dir=Path("."), config={})
except ValueError as error:
    print(error)
"""


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python process in `folder` that knows no wandb account."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    env = {**known, "NETRC": str(folder / "none"), "WANDB_DATA_DIR": str(folder / "staging")}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, check=True, timeout=120
    )


def test_a_lost_network_neither_stops_a_run_nor_holds_its_end_for_hours(tmp_path):
    done = python(tmp_path, str(HERE / "worker_wandb.py"), str(tmp_path))
    took = json.loads(done.stdout.splitlines()[-1])
    assert took["log_s"] < 0.5 and 0.9 < took["finish_s"] < 10
    assert "warning: wandb failed" not in done.stderr
    (file,) = tmp_path.glob("wandb/run-*-online12/run-online12.wandb")
    assert [point["train/loss_lm"] for point in WANDB_FILE["history"](file)] == [1.0]


def test_online_without_an_account_is_one_sentence(tmp_path):
    said = python(tmp_path, "-c", NO_ACCOUNT).stdout.strip()
    assert said.startswith("wandb.mode=online did not start (") and "\n" not in said
    assert said.endswith("or use wandb.mode=offline")
