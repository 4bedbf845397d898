"""Ranks of `predict` that are killed at any moment and run again predict what an undisturbed run does.

Real processes and real SIGKILL: ten moments with ranks of our own, which start at once; one with the
`deepspeed` launcher, the evaluation's own command and all four arms. Prompts are longest first.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dense2sparse.data.fetch import FetchError
from dense2sparse.eval.ruler_corpus import PUBLIC_DOMAIN, read_corpus
from dense2sparse.eval.sources import SourceUnavailable

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".cache" / "dense2sparse"
MOMENTS = 10
PROMPTS = 12
ARMS = ("converted_dense", "converted_sparse-k4")


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


ALL_ARMS = 4
ASKED = 6
STAGE = f"  - {{kind: ruler, tasks: [niah_single_1], lengths: [1024], samples: {ASKED}}}"


@pytest.fixture(scope="module")
def published(tmp_path_factory, answering, tokenizer):
    """A converted model and a recipe that asks RULER's published words."""
    try:
        read_corpus(PUBLIC_DOMAIN, CACHE, tasks=["niah_single_1"], lengths=[1024])
    except (SourceUnavailable, FetchError) as error:
        pytest.skip(str(error))
    home = tmp_path_factory.mktemp("published")
    return answering.build_home(home, answering.lively_model(), tokenizer, stages=STAGE)


def evaluate(home: Path, run_dir: Path, ranks: int) -> subprocess.Popen:
    """`dense2sparse eval`, in one process or through the launcher."""
    command = [sys.executable, "-m", "dense2sparse.launch.cli", "eval", "--ranks", str(ranks)]
    command += [str(home / "recipe.yaml"), f"data.cache_dir={CACHE}"]
    command += ["--checkpoint", str(home / "converted"), "--output", str(run_dir)]
    with open(run_dir.with_suffix(".log"), "a") as log:
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )


def kill_all(run_dir: Path) -> None:
    """`kill -9` of the command, the launcher and its ranks: all that was told this folder."""
    told = str(run_dir).encode()
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdecimal() and told in (folder / "cmdline").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked


def without_times(run_dir: Path) -> dict:
    """The stage's result but for what differs from run to run."""
    result = json.loads((run_dir / "eval/ruler/stage-0.json").read_text(encoding="utf-8"))
    for arm in result["arms"].values():
        assert arm.pop("seconds") >= 0 and arm.pop("costs")
    return result


@pytest.mark.e2e
def test_launcher_killed_at_a_random_moment_goes_on_to_the_result_of_one_rank(
    published, patience, tmp_path
):
    once, again = tmp_path / "once", tmp_path / "again"
    log = once.with_suffix(".log")
    assert patience([evaluate(published, once, 1)]).ended(log.read_text) == [0], log.read_text()
    every = ALL_ARMS * ASKED
    lines = random.Random().randrange(1, every - ASKED // 2)
    launched = evaluate(published, again, 2)
    patience([launched]).until(lambda: answered(again) >= lines or launched.poll() is not None)
    assert launched.poll() is None, f"not killed at {lines}"
    kill_all(again)
    launched.wait()
    assert lines <= answered(again) and not (again / "report.html").exists()

    launched = evaluate(published, again, 2)
    log = again.with_suffix(".log")
    assert patience([launched]).ended(log.read_text) == [0], log.read_text()
    assert answered(again) == every, f"killed at {lines}: a prompt was answered twice or never"
    found = predictions(again)
    assert len(found) == ALL_ARMS and found == predictions(once), f"killed at {lines}"
    assert without_times(again) == without_times(once), f"killed at {lines}"
    journals = {path.name for path in again.rglob("rank-*.jsonl")}
    assert journals == {"rank-0-of-2.jsonl", "rank-1-of-2.jsonl"}
