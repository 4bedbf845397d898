"""Runs that are killed, stopped or refused: they end as if undisturbed, or say why not.

Every run is the real `train.run` in a process of its own (nursery.py); the sparse stage accumulates two
micro batches, recomputes activations and decays weights, so that all of that has to resume too.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from dense2sparse.data.loader import heldout_rows
from dense2sparse.model import convert
from dense2sparse.model.attention import AttentionCall

pytestmark = pytest.mark.slow

SOURCE = {"name": "heldout", "kind": "text", "weight": 1.0, "works": None}
NUM_STEPS = {0: [1, 2, 3, 4, 5], 1: [6, 7, 8, 9, 10, 11, 12]}


def folder_of(recipe: Path) -> Path:
    """The run's folder."""
    return recipe.parent / "runs" / "tiny"


def weights(folder: Path) -> bytes:
    """Bytes of what the run hands over at its end."""
    return (folder / "stages" / "1-sparse" / "hf" / "model.safetensors").read_bytes()


def curves(folder: Path) -> list[dict]:
    """Records without the numbers that depend on the clock or on the process."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith(("perf/", "memory/"))} for r in records]


def steps_recorded(folder: Path) -> dict[int, list[int]]:
    """Global steps of the optimizer that were recorded, by stage."""
    seen: dict[int, list[int]] = {0: [], 1: []}
    for record in curves(folder):
        if "train/loss_lm" in record:
            seen[record["stage_index"]].append(record["step"])
    return seen


def checkpoints(folder: Path) -> list[Path]:
    """Folders of checkpoints, whole or not."""
    return sorted((folder / "checkpoints").glob("step-*"))


def unfinished_save(folder: Path) -> bool:
    """Whether a checkpoint is being written at this moment."""
    return any(not (path / "state.json").exists() for path in checkpoints(folder))


@pytest.fixture(scope="module")
def undisturbed(nursery, make_recipe, tmp_path_factory) -> tuple[Path, float]:
    """Folder of a run that nobody disturbed, and the seconds it took."""
    recipe = make_recipe(tmp_path_factory.mktemp("undisturbed"))
    begun = time.monotonic()
    nursery.run(recipe, output=recipe.parent / "output.txt")
    return folder_of(recipe), time.monotonic() - begun


def test_an_undisturbed_run_records_every_step_once(undisturbed):
    folder, _ = undisturbed
    assert steps_recorded(folder) == NUM_STEPS
    assert json.loads((folder / "finished.json").read_text())["stages"] == ["0-warmup", "1-sparse"]
    assert not checkpoints(folder)


def test_exported_weights_are_those_that_were_measured_last(undisturbed, tiny_inputs):
    """The export's held-out loss is the last one the engine measured on its own weights."""
    folder, _ = undisturbed
    source = [SimpleNamespace(**SOURCE, path=str(tiny_inputs / "heldout.txt"))]
    for label, mode in (("0-warmup", "warmup"), ("1-sparse", "sparse")):
        place = folder / "stages" / label / "hf"
        tokenizer = AutoTokenizer.from_pretrained(place)
        (row,) = heldout_rows(
            source, tokenizer, row_len=128, count=1, cache_dir=tiny_inputs / "cache"
        )
        call = AttentionCall(mode, document_ids=row.document_ids)
        with torch.no_grad():
            logits = convert.load(place)(
                input_ids=row.input_ids, position_ids=row.position_ids, msa_call=call
            ).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), row.targets.flatten())
        recorded = [
            r["heldout/loss_lm"]
            for r in curves(folder)
            if r.get("stage") == label and "heldout/loss_lm" in r
        ]
        assert float(loss) == pytest.approx(recorded[-1], rel=1e-5)


def test_each_stage_starts_from_the_export_of_the_one_before(undisturbed):
    folder, _ = undisturbed
    start, warm, sparse = (
        load_file(folder / place / "hf" / "model.safetensors")
        for place in ("start", "stages/0-warmup", "stages/1-sparse")
    )
    for name, value in start.items():
        if convert.is_index_name(name):
            assert not torch.equal(value, warm[name])
        else:
            assert torch.equal(value, warm[name])
        assert not torch.equal(warm[name], sparse[name])
        assert sparse[name].dtype == torch.float32


def test_later_stages_may_change_and_finished_ones_are_not_repeated(
    nursery, make_recipe, undisturbed, tmp_path
):
    copy = tmp_path / "runs" / "tiny"
    shutil.copytree(undisturbed[0], copy)
    recipe, output = make_recipe(tmp_path), tmp_path / "output.txt"
    text = recipe.read_text()
    stage = f"  - {{kind: longbench, folder: {tmp_path}}}\n"  # no records: quickly done
    recipe.write_text(text.replace("train: {", f"{stage}train: {{"))
    times = {p: p.stat().st_mtime_ns for p in copy.glob("stages/*/hf/*")}
    nursery.run(recipe, output=output)
    assert {p: p.stat().st_mtime_ns for p in copy.glob("stages/*/hf/*")} == times
    stages = json.loads((copy / "finished.json").read_text())["stages"]
    assert stages == ["0-warmup", "1-sparse", "2-longbench"]
    assert json.loads((copy / "stages" / "2-longbench" / "done.json").read_text())["summary"]


def test_killed_ten_times_it_ends_in_the_same_weights(nursery, make_recipe, undisturbed, tmp_path):
    """Seven kills at random moments, three in the middle of a save."""
    expected, seconds = undisturbed
    recipe, rng = make_recipe(tmp_path), random.Random(20260613)
    folder, output = folder_of(recipe), tmp_path / "output.txt"
    moments = ["save", "save", "save", *(rng.uniform(0.1, 0.9) * seconds for _ in range(7))]
    rng.shuffle(moments)
    in_save = kills = 0
    while moments and kills < 30:
        if (folder / "finished.json").exists():
            folder.rename(tmp_path / f"ended-{kills}")
        pids, begun = nursery.start(recipe, output=output), time.monotonic()
        if moments[0] == "save":
            wait_for(lambda: unfinished_save(folder) or (folder / "finished.json").exists(), output)
            caught = unfinished_save(folder)
        else:
            time.sleep(max(0.0, begun + moments[0] - time.monotonic()))
            caught = True
        in_save += unfinished_save(folder)
        os.kill(pids[0], signal.SIGKILL)
        assert nursery.wait(pids) in ([-9], [0])
        kills += 1
        if caught:  # a run that ended before its next save is no kill in a save
            moments.pop(0)
    assert not moments and in_save >= 3
    if not (folder / "finished.json").exists():
        nursery.run(recipe, output=output)
    for ended in (folder, *tmp_path.glob("ended-*")):
        assert weights(ended) == weights(expected)
        assert curves(ended) == curves(expected)


@pytest.mark.parametrize(("zero", "precision"), [(2, "fp32"), (3, "fp32"), (1, "bf16")])
def test_two_ranks_asked_to_stop_save_and_resume_to_the_bit(
    nursery, make_recipe, tmp_path, zero, precision
):
    override = [f"deepspeed.zero_optimization.stage={zero}", f"train.precision={precision}"]
    if zero == 3:  # tiny weights would otherwise stay whole on every rank
        override.append("deepspeed.zero_optimization.stage3_param_persistence_threshold=0")
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole, stopped = make_recipe(tmp_path / "whole"), make_recipe(tmp_path / "stopped")
    nursery.run(whole, override, output=tmp_path / "whole.txt", ranks=2)
    output, folder = tmp_path / "stopped.txt", folder_of(stopped)
    slow = [*override, "train.checkpoint_every=1000"]  # so that only the stop saves
    pids = nursery.start(stopped, slow, output=output, ranks=2)
    wait_for(lambda: steps_in(folder) >= 8, output)
    os.kill(pids[0], signal.SIGTERM)  # one rank is enough: they agree
    assert nursery.wait(pids) == [75, 75], output.read_text()[-3000:]
    state = json.loads((checkpoints(folder)[-1] / "state.json").read_text())
    assert state["step"] >= 8 and state["stage_index"] == 1
    assert all(not process_exists(pid) for pid in pids)
    nursery.run(stopped, override, output=output, ranks=2)
    assert "continues at step" in output.read_text()
    assert weights(folder) == weights(folder_of(whole))
    assert curves(folder) == curves(folder_of(whole))


def test_a_rank_killed_in_the_middle_of_a_save_leaves_no_half_checkpoint(
    nursery, make_recipe, tmp_path
):
    """Rank 1 dies while files are written: DeepSpeed alone would leave a tag that rank 0 loads."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, killed = make_recipe(tmp_path / "whole"), make_recipe(tmp_path / "killed")
    nursery.run(whole, output=tmp_path / "whole.txt", ranks=2)
    output, folder = tmp_path / "killed.txt", folder_of(killed)
    pids = nursery.start(killed, output=output, ranks=2)
    wait_for(lambda: steps_in(folder) >= 8 and unfinished_save(folder), output)
    os.kill(pids[1], signal.SIGKILL)
    codes = nursery.wait(pids)
    assert codes[1] == -9 and codes[0] != 0
    assert any((path / "state.json").exists() for path in checkpoints(folder))
    nursery.run(killed, output=output, ranks=2)
    assert weights(folder) == weights(folder_of(whole))
    assert curves(folder) == curves(folder_of(whole))


def wait_for(condition, output: Path, seconds: float = 900) -> None:
    """Poll until `condition` holds; the runs are children of another process, so it waits by the clock."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, output.read_text()[-3000:]
        time.sleep(0.0005)


def steps_in(folder: Path) -> int:
    """Number of the newest recorded step."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0


def process_exists(pid: int) -> bool:
    """Whether a process is still there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def stopped(nursery, make_recipe, tmp_path) -> Path:
    """Recipe of a one-rank run that a STOP file ended in its sparse stage."""
    recipe, output = make_recipe(tmp_path), tmp_path / "output.txt"
    folder = folder_of(recipe)
    pids = nursery.start(recipe, output=output)
    wait_for(lambda: steps_in(folder) >= 7, output)
    (folder / "STOP").touch()
    assert nursery.wait(pids) == [75], output.read_text()[-3000:]
    assert not (folder / "STOP").exists()
    assert not (folder / "finished.json").exists()
    return recipe


def refusal(nursery, recipe: Path, overrides: list[str], ranks: int = 1) -> str:
    """What a start that must be refused prints: one line, exit code 2."""
    output = recipe.parent / "refused.txt"
    output.unlink(missing_ok=True)
    codes = nursery.wait(nursery.start(recipe, overrides, output=output, ranks=ranks))
    assert codes == [2] * ranks
    text = output.read_text()
    assert len(text.splitlines()) == 1 and text.startswith("error: "), text
    return text


def test_refusals_name_their_reason_and_leave_the_run_as_it_was(nursery, stopped, undisturbed):
    folder = folder_of(stopped)
    before = sorted(p for p in folder.rglob("*"))
    text = refusal(nursery, stopped, ["stages.1.backbone_lr=0.002"])
    assert "stages.1.backbone_lr was 0.001 and is 0.002" in text
    text = refusal(nursery, stopped, ["sparsity.top_k=5"])
    assert "sparsity.top_k was 4 and is 5" in text
    text = refusal(nursery, stopped, [], ranks=2)
    assert "was started with 1 ranks and cannot resume with 2" in text
    assert sorted(p for p in folder.rglob("*")) == before
    _damage_newest(folder)
    output = stopped.parent / "output.txt"
    nursery.run(stopped, ["train.checkpoint_every=3"], output=output)
    assert "is passed over: deepspeed/state/" in output.read_text()
    assert weights(folder) == weights(undisturbed[0])
    assert curves(folder) == curves(undisturbed[0])


def _damage_newest(folder: Path) -> None:
    """Cut a file of the newest checkpoint, as a torn write of the file system would."""
    largest = max(
        (checkpoints(folder)[-1] / "deepspeed").rglob("*.pt"), key=lambda p: p.stat().st_size
    )
    os.truncate(largest, largest.stat().st_size // 2)


def test_full_disk_during_a_save_is_one_sentence_and_leaves_the_last_checkpoint(
    nursery, stopped, undisturbed
):
    """The limit on file sizes makes the optimizer's file fail half-way, as a full disk does."""
    folder = folder_of(stopped)
    before = checkpoints(folder)
    state = (before[-1] / "state.json").read_bytes()
    output = stopped.parent / "full.txt"
    pids = nursery.start(
        stopped, ["train.checkpoint_every=1"], output=output, file_limit_bytes=1_000_000
    )
    assert nursery.wait(pids) == [1]
    errors = [line for line in output.read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in output.read_text()
    assert "could not be written" in errors[0] and "make room" in errors[0]
    assert checkpoints(folder) == before
    assert (before[-1] / "state.json").read_bytes() == state
    nursery.run(stopped, output=output)
    assert weights(folder) == weights(undisturbed[0])
    assert curves(folder) == curves(undisturbed[0])
