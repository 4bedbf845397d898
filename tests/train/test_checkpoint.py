"""What counts as a whole checkpoint, which ones stay, and that random states come back."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from dense2sparse.train import checkpoint
from dense2sparse.train.checkpoint import CheckpointError
from dense2sparse.train.files import write_json


class FakeCheckpointEngine:
    """Writes as DeepSpeed's does; fails on the n-th file if told so."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at, self.calls = fails_at, 0

    def save(self, state_dict: dict, path: str) -> None:
        self.calls += 1
        if self.calls == self.fails_at:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        torch.save(state_dict, path)


class FakeEngine:
    """The part of a DeepSpeed engine that saving uses."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.checkpoint_engine = FakeCheckpointEngine(fails_at)

    def save_checkpoint(self, folder, *, tag, save_latest, exclude_frozen_parameters):
        assert not save_latest
        place = Path(folder) / tag
        place.mkdir(parents=True)
        for name in ("model.pt", "optimizer.pt"):
            self.checkpoint_engine.save({"x": torch.arange(5)}, path=str(place / name))


def save(root: Path, step: int, *, stage_index: int = 0, fails_at: int | None = None) -> Path:
    state = {"stage_index": stage_index, "step": step, "world_size": 1, "fingerprint": "f"}
    rank_state = {"loader": {"rows": step}}
    engine = FakeEngine(fails_at)
    return checkpoint.save(
        engine, root, step=step, state=state, rank_state=rank_state, frozen=False
    )


def newest_step(root: Path, stage_index: int = 0, **options) -> int | None:
    found = checkpoint.newest(root, stage_index=stage_index, **options)
    return found.state["step"] if found else None


def test_newest_is_the_last_complete_one_of_the_stage(tmp_path):
    assert newest_step(tmp_path / "none") is None
    for step in (2, 10):
        save(tmp_path, step)
    save(tmp_path, 20, stage_index=1)
    (tmp_path / "step-000030" / "deepspeed").mkdir(parents=True)  # killed during the save
    assert newest_step(tmp_path) == 10
    assert newest_step(tmp_path, 1) == 20
    assert newest_step(tmp_path, 2) is None


@pytest.mark.parametrize("harm", ["shorter", "longer", "missing", "other bytes"])
def test_a_damaged_one_is_passed_over_with_a_word(tmp_path, harm):
    save(tmp_path, 1)
    file = save(tmp_path, 2) / "deepspeed" / "state" / "optimizer.pt"
    content = file.read_bytes()
    if harm == "missing":
        file.unlink()
    else:
        changed = {"shorter": content[:-1], "longer": content + b"x"}
        file.write_bytes(changed.get(harm, content[:-1] + bytes([content[-1] ^ 1])))
    said: list[str] = []
    assert newest_step(tmp_path, warn=said.append) == 1
    assert len(said) == 1 and "step-000002 is passed over" in said[0] and "optimizer.pt" in said[0]


def test_manifest_names_every_file(tmp_path):
    folder = save(tmp_path, 7)
    state = json.loads((folder / "state.json").read_text())
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(state["files"]) == files - {"state.json"}
    assert "ranks/rank-00000.pt" in files
    assert all(entry["size"] > 0 and entry["sha256"] for entry in state["files"].values())


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_full_disk_removes_what_was_written_and_keeps_the_one_before(tmp_path, fails_at):
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="step 2 could not be written.*No space left"):
        save(tmp_path, 2, fails_at=fails_at)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert newest_step(tmp_path) == 1


def test_a_whole_checkpoint_of_the_same_step_is_not_written_again(tmp_path):
    """A stop right after a periodic save: removing the good one first could lose it."""
    folder = save(tmp_path, 3)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert save(tmp_path, 3, fails_at=1) == folder
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    (folder / "deepspeed" / "state" / "model.pt").write_bytes(b"torn")
    save(tmp_path, 3)
    assert newest_step(tmp_path) == 3


def test_an_error_that_is_no_full_disk_is_not_hidden(tmp_path):
    engine = FakeEngine()

    def broken(state_dict, path):
        raise RuntimeError("shape mismatch")

    engine.checkpoint_engine.save = broken
    with pytest.raises(RuntimeError, match="shape mismatch"):
        checkpoint.save(
            engine, tmp_path, step=1, state={"stage_index": 0}, rank_state={}, frozen=False
        )


def test_a_failed_state_file_leaves_no_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(CheckpointError, match="make room"):
        save(tmp_path, 2)
    assert newest_step(tmp_path) == 1 and not (tmp_path / "step-000002").exists()


def test_prune_keeps_the_newest_of_the_stage_and_removes_rests(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    save(tmp_path, 9, stage_index=1)
    (tmp_path / "step-000008").mkdir()
    checkpoint.prune(tmp_path, keep=2, stage_index=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-000002",
        "step-000003",
        "step-000009",
    ]
    checkpoint.prune(tmp_path, keep=0, stage_index=0)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000009"]


def test_another_number_of_ranks_or_recipe_is_refused():
    state = {"world_size": 2, "fingerprint": "a"}
    checkpoint.check_same_run(state, fingerprint="a", world_size=2)
    with pytest.raises(CheckpointError, match="started with 2 ranks and cannot resume with 4"):
        checkpoint.check_same_run(state, fingerprint="a", world_size=4)
    with pytest.raises(CheckpointError, match="belongs to another recipe"):
        checkpoint.check_same_run(state, fingerprint="b", world_size=2)


def draw() -> tuple:
    return random.random(), np.random.rand(), float(torch.rand(())), float(np.random.randn())


def test_random_states_come_back_through_a_file(tmp_path):
    np.random.randn()  # leaves half of a pair cached, which is state too
    torch.save(checkpoint.random_state(), tmp_path / "random.pt")
    before = draw()
    assert draw() != before
    checkpoint.restore_random_state(torch.load(tmp_path / "random.pt", weights_only=True))
    assert draw() == before


def test_write_json_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "state.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]
