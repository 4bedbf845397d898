"""Ranks of `predict` that are killed at any moment and run again predict what an undisturbed run does.

Real processes, real SIGKILL, two arms, with and without a second rank; prompts are longest first.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MOMENTS = 10
PROMPTS = 12
ARMS = ("converted_dense", "converted_sparse-k4")


@pytest.fixture(scope="module")
def answering():
    spec = importlib.util.spec_from_file_location("answering_for_kills", HERE / "answering.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def home(tmp_path_factory, answering, tokenizer, ruler_like_words):
    home = answering.build_home(
        tmp_path_factory.mktemp("kill"), answering.lively_model(), tokenizer
    )
    samples = answering.prompts(tokenizer, ruler_like_words.nouns, PROMPTS)
    answering.write_samples(home / "samples.json", samples)
    return home


class Ranks:
    """Starts ranks, lets them end or kills them."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.number = 0
        self.log = open(home / "ranks.log", "w")  # noqa: SIM115 (closed by close)
        self.worker = subprocess.Popen(
            [sys.executable, str(HERE / "worker_predict.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self.worker.stdout.readline() == "ready\n"

    def run(self, run_dir: Path, world_size: int, kill: tuple[int, float] | None = None):
        """Exit codes; `kill`: (lines in the journals, seconds after that) until all ranks are killed."""
        self.number += 1
        order = {
            "home": str(self.home),
            "run_dir": str(run_dir),
            "samples": str(self.home / "samples.json"),
            "meeting": str(self.home / f"meeting-{self.number}"),
            "world_size": world_size,
            "kill": kill,
        }
        self.worker.stdin.write(json.dumps(order) + "\n")
        self.worker.stdin.flush()
        return json.loads(self.worker.stdout.readline())

    def close(self) -> None:
        self.worker.stdin.close()
        self.worker.wait(timeout=60)
        self.log.close()


@pytest.fixture(scope="module")
def ranks(home):
    started = Ranks(home)
    yield started
    started.close()


@pytest.fixture(scope="module")
def undisturbed(ranks, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed")
    assert ranks.run(run_dir, 1) == [0]
    return predictions(run_dir)


def predictions(run_dir: Path) -> dict[str, bytes]:
    """The merged file of each arm."""
    found = {}
    for path in run_dir.glob("eval/ruler/stage-0/*/predictions.jsonl"):
        found[path.parent.name] = path.read_bytes()
    return found


def answered(run_dir: Path) -> int:
    """Whole lines in all journals."""
    return sum(path.read_bytes().count(b"\n") for path in run_dir.rglob("rank-*.jsonl"))


@pytest.mark.parametrize("world_size", [1, 2])
def test_killed_at_ten_random_moments_the_predictions_are_the_same(
    ranks, undisturbed, tmp_path, world_size
):
    assert sorted(undisturbed) == sorted(ARMS)
    rng = random.Random(world_size)
    every = len(ARMS) * PROMPTS
    cut_short = 0
    for moment in range(MOMENTS):
        run_dir = tmp_path / str(moment)
        # The first one while it still starts, the others when some lines are there and a little later.
        lines, seconds = (rng.randrange(1, every), 0.03) if moment else (0, 0.3)
        codes = ranks.run(run_dir, world_size, kill=(lines, rng.uniform(0, seconds)))
        # A rank may be through before the kill reaches it; such a moment does not count as cut short.
        assert {*codes} <= {-signal.SIGKILL, 0}
        cut_short += lines <= answered(run_dir) < every and not predictions(run_dir)
        assert ranks.run(run_dir, world_size) == [0] * world_size
        assert predictions(run_dir) == undisturbed
        assert answered(run_dir) == every, "a prompt was answered twice"
    assert cut_short >= MOMENTS // 2, "most kills came too late to show anything"


def test_more_ranks_may_take_up_what_one_left(ranks, undisturbed, tmp_path):
    ranks.run(tmp_path, 1, kill=(PROMPTS // 2, 0.0))
    ranks.run(tmp_path, 2, kill=(PROMPTS + 2, 0.0))
    assert ranks.run(tmp_path, 1) == [0]
    assert predictions(tmp_path) == undisturbed
