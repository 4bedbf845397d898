"""The run as a user meets it: exit codes, one-sentence errors and the real launcher."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dense2sparse.train import run as training

pytestmark = pytest.mark.slow


def start(arguments: list[str], environment: dict[str, str], **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )


def test_a_mistake_in_the_recipe_is_one_sentence_before_torch_is_imported(
    make_recipe, tmp_path, test_environment
):
    recipe = make_recipe(tmp_path)
    code = (
        "import sys, os\n"
        "from dense2sparse.train import run\n"
        "def leave(code):\n"
        "    print('torch' in sys.modules, 'deepspeed' in sys.modules, code)\n"
        "    sys.exit(code)\n"
        "run._exit = leave\n"
        f"run.main([{str(recipe)!r}, 'train.seeds=3', '--local_rank=0'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=test_environment, text=True, capture_output=True
    )
    assert done.returncode == 2
    assert done.stdout == "False False 2\n"
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ") and "train.seeds" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.path=/nowhere/at/all", "/nowhere/at/all"),
        ("data.sources.0.path=/nowhere/text.txt", "/nowhere/text.txt"),
        ("sparsity.dense_layers=[0, 9]", "sparsity.dense_layers names layer 9"),
        ("stages.1.micro_batch_size=4000", "tokens"),
        ("data.row_len=1024", "data.row_len=1024 is above the checkpoint's window of 512"),
        (
            "stages=[{kind: warmup, steps: 1}, {kind: ruler, lengths: [1024]}]",
            "stages.1 (ruler): ruler length 1024 is above",
        ),
    ],
)
def test_mistakes_that_need_the_checkpoint_or_the_data_are_one_sentence(
    nursery, make_recipe, tmp_path, override, sentence
):
    recipe, output = make_recipe(tmp_path), tmp_path / "output.txt"
    codes = nursery.wait(nursery.start(recipe, [override], output=output))
    text = output.read_text()
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert codes == [2] and len(errors) == 1 and "Traceback" not in text, text
    assert sentence in errors[0]


def test_a_bug_shows_its_traceback(capsys):
    try:
        json.loads("{")  # a ValueError of a library, not a sentence of ours
    except ValueError as error:
        assert training._explain(error, rank=0) == 1
    assert "Traceback" in capsys.readouterr().err


def test_our_own_value_error_is_one_sentence(capsys, tiny):
    from dense2sparse.train.metrics import check_names

    try:
        check_names({"loss": 1.0})
    except ValueError as error:
        assert training._explain(error, rank=0) == 2
    text = capsys.readouterr().err
    assert text == "error: metric 'loss' is not declared in train/metrics.py\n"


def group_is_empty(group: int) -> bool:
    """Whether no process of a process group is left (zombies do not count)."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, pgrp = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(pgrp) == group and state != "Z":
            return False
    return True


def ranks_of(recipe: Path) -> list[int]:
    """Processes that train this recipe."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(recipe) in line and "dense2sparse.train.run" in line:
            found.append(int(entry.name))
    return found


def reached(process, patience, condition) -> None:
    """Wait until `condition` holds while the process runs."""
    patience([process]).until(lambda: condition() or process.poll() is not None)
    assert process.poll() is None, process.communicate()[0]


@pytest.mark.e2e
def test_sigterm_to_the_launched_run_saves_leaves_no_orphans_and_resumes(
    make_recipe, tmp_path, test_environment, patience
):
    recipe = make_recipe(tmp_path)
    folder = tmp_path / "runs" / "tiny"
    command = ["dense2sparse.launch.cli", "run", "--ranks", "2", str(recipe)]
    long = ["stages.1.steps=400", "train.checkpoint_every=1000", "train.measure_every=1000"]
    process = start([*command, *long], test_environment, start_new_session=True)
    records = folder / "metrics.jsonl"
    reached(process, patience, lambda: records.exists() and '"step": 8,' in records.read_text())
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 75, output
    assert "asked to stop: saved at step" in output and "Traceback" not in output
    assert not ranks_of(recipe) and group_is_empty(process.pid)
    (saved,) = folder.glob("checkpoints/step-*/state.json")
    state = json.loads(saved.read_text())
    assert state["stage_index"] == 1 and state["world_size"] == 2
    last = json.loads(records.read_text().splitlines()[-1])["step"]
    assert state["step"] == last
    (folder / "STOP").touch()  # asked of the start before: the next one must not obey it
    process = start([*command, *long, "train.log_every=50"], test_environment)
    later = f'"step": {50 * (last // 50 + 1) + 5},'
    reached(process, patience, lambda: later in records.read_text())
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 75, output
    assert f"1-sparse continues at step {state['stage_step']}" in output
