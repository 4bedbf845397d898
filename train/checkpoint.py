"""Checkpoints that survive kill -9 at any moment, also during a save.

    checkpoints/step-000123/   deepspeed/state/...  what DeepSpeed writes
                               ranks/rank-00000.pt  random states and data position of one rank
                               state.json           written last: the checkpoint exists when it does

DeepSpeed itself writes in place and moves its `latest` pointer before the last rank is done;
killing a rank there leaves a tag that some ranks load and others do not. So the pointer is ours:
`state.json` names every file with its size (small ones with their checksum), is written by rename
after all files are synced, and all ranks agree on the newest complete checkpoint before any of them
loads.
"""

from __future__ import annotations

import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from .files import read_json, sha256, sync_file, sync_folder, write_json

_TAG = "state"
_HASHED_UP_TO_BYTES = 1 << 20
_WRITE_FAILURES = re.compile(
    r"No space left|File too large|Disk quota|PytorchStreamWriter|inline_container|write failed|"
    r"unexpected pos|\[Errno (?:27|28|122)\]"
)


class CheckpointError(ValueError):
    """A checkpoint cannot be written or used; the message says why and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint: its folder and the content of its `state.json`."""

    path: Path
    state: dict[str, Any]


def folder_of(root: Path, step: int) -> Path:
    """Folder of the checkpoint at a global step."""
    return root / f"step-{step:06d}"


def _step_folders(root: Path) -> list[Path]:
    """Checkpoint folders, newest first, complete or not."""
    found = [(int(p.name[5:]), p) for p in root.glob("step-*") if p.name[5:].isdigit()]
    return [path for _, path in sorted(found, reverse=True)]


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Size of every file under `folder`, and the checksum of the small ones."""
    entries: dict[str, dict[str, Any]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        size = path.stat().st_size
        entry: dict[str, Any] = {"size": size}
        if size <= _HASHED_UP_TO_BYTES:
            entry["sha256"] = sha256(path)
        entries[path.relative_to(folder).as_posix()] = entry
    return entries


def fault(folder: Path, state: dict[str, Any]) -> str | None:
    """What is wrong with a checkpoint's files, or None if all stand as its manifest says."""
    for name, entry in state["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
        if "sha256" in entry and sha256(path) != entry["sha256"]:
            return f"{name} has another checksum"
    return None


def _is_whole(folder: Path, stage_index: int) -> bool:
    """Whether a folder already holds a complete checkpoint of this stage."""
    state = read_json(folder / "state.json")
    return (
        state is not None and state["stage_index"] == stage_index and fault(folder, state) is None
    )


def random_state() -> dict[str, Any]:
    """Random states of this process, as plain lists and tensors."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (str(name), [int(k) for k in keys], int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Set the random states that `random_state` read."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _agreed(value: int, op: Any = None) -> int:
    """One number that all ranks share: the minimum, unless another reduction is given."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(tensor, op=op or dist.ReduceOp.MIN)
    return int(tensor.item())


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


class _WriteGuard:
    """Records a failed write instead of raising, so that DeepSpeed's barriers are still reached.

    A rank that raised inside `save_checkpoint` would leave its peers in a barrier for ever. Every
    file is also synced here, by the rank that wrote it.
    """

    def __init__(self, checkpoint_engine: Any) -> None:
        self._engine, self._save = checkpoint_engine, checkpoint_engine.save
        self.failure: str | None = None

    def __enter__(self) -> _WriteGuard:
        self._engine.save = self._guarded
        return self

    def __exit__(self, *exc: object) -> None:
        del self._engine.save  # the class's own method shows again

    def _guarded(self, state_dict: Any, path: str) -> None:
        self.attempt(lambda: self._save(state_dict, path), Path(path))

    def attempt(self, write: Any, path: Path) -> None:
        """Run one write and sync its file; keep the first failure's message."""
        if self.failure is not None:
            return
        try:
            write()
            sync_file(path)
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _WRITE_FAILURES.search(str(error)):
                raise
            self.failure = str(error).strip().split("\n")[0]


def _reason(failure: str | None) -> str:
    """What the user should know of a failed write; torch's writer says only that bytes are missing."""
    if failure is None:
        return "another rank could not write"
    if "inline_container" in failure or "PytorchStreamWriter" in failure:
        return "the disk is full or a size limit is reached"
    return failure


def save(
    engine: Any,
    root: Path,
    *,
    step: int,
    state: dict[str, Any],
    rank_state: dict[str, Any],
    frozen: bool,
) -> Path:
    """Write one checkpoint; every rank calls this.

    Args:
        engine: the stage's DeepSpeed engine.
        root: the run's `checkpoints` folder, one path for all ranks.
        step: global step; names the folder.
        state: what all ranks share, JSON-serialisable; goes into `state.json`.
        rank_state: what this rank alone holds (data position); random states are added.
        frozen: leave the backbone out; it stands in the folder the stage started from.

    Raises:
        CheckpointError: on all ranks if any could not write; the incomplete folder is removed and
            the previous checkpoint stays as it was.
    """
    folder = folder_of(root, step)
    if _agreed(int(_is_whole(folder, state["stage_index"]))):
        return folder  # asked to stop right after a save: never remove a good one to write it again
    guard = _WriteGuard(engine.checkpoint_engine)
    if _rank() == 0:
        try:
            shutil.rmtree(folder, ignore_errors=True)  # rest of a save that was killed
            (folder / "ranks").mkdir(parents=True)
        except OSError as error:
            guard.failure = str(error)
    if _agreed(int(guard.failure is None)):
        with guard:
            engine.save_checkpoint(
                str(folder / "deepspeed"),
                tag=_TAG,
                save_latest=False,
                exclude_frozen_parameters=frozen,
            )
        rank_file = folder / "ranks" / f"rank-{_rank():05d}.pt"
        content = {**rank_state, "random": random_state()}
        guard.attempt(lambda: torch.save(content, rank_file), rank_file)
    all_written = _agreed(int(guard.failure is None))
    if all_written and _rank() == 0:
        try:
            for inner in sorted(p for p in folder.rglob("*") if p.is_dir()):
                sync_folder(inner)
            write_json(folder / "state.json", {**state, "files": _manifest(folder)})
            sync_folder(root)
        except OSError as error:
            guard.failure = str(error)
    if not _agreed(int(guard.failure is None)):
        if _rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint at step {step} could not be written to {root} ({_reason(guard.failure)}): "
            "make room and start again, the checkpoints before it are whole"
        )
    return folder


def newest(root: Path, *, stage_index: int, warn: Any = None) -> Checkpoint | None:
    """The newest complete checkpoint of a stage that every rank can read whole; None if there is none.

    Args:
        root: the run's `checkpoints` folder.
        stage_index: place of the stage in the recipe's list.
        warn: called with one sentence for each checkpoint that is passed over as damaged.
    """
    below: float = float("inf")
    while True:
        found: Checkpoint | None = None
        for folder in _step_folders(root):
            state = read_json(folder / "state.json")
            if state is None or state["stage_index"] != stage_index or state["step"] >= below:
                continue
            wrong = fault(folder, state)
            if wrong is None:
                found = Checkpoint(folder, state)
                break
            if warn is not None:
                warn(f"checkpoint {folder.name} is passed over: {wrong}")
        step = found.state["step"] if found else -1
        common = _agreed(step)
        if _agreed(int(step == common)):
            return found
        if common < 0:
            return None
        # Some rank holds only an older one: look again from there on.
        below = common + 1


def check_same_run(state: dict[str, Any], *, fingerprint: str, world_size: int) -> None:
    """Refuse a checkpoint of another recipe or another number of ranks."""
    if state["world_size"] != world_size:
        raise CheckpointError(
            f"this run was started with {state['world_size']} ranks and cannot resume with "
            f"{world_size}: start it with {state['world_size']} ranks, or under another name"
        )
    if state["fingerprint"] != fingerprint:
        raise CheckpointError(
            "the checkpoint belongs to another recipe: use the recipe saved as recipe.json, "
            "or another name"
        )


def load(engine: Any, checkpoint: Checkpoint) -> dict[str, Any]:
    """Load a checkpoint into a fresh engine of the same stage; returns this rank's own state.

    Random states are set by the caller, after everything else that draws random numbers.
    """
    path, _ = engine.load_checkpoint(
        str(checkpoint.path / "deepspeed"), tag=_TAG, load_module_strict=False
    )
    if path is None:
        raise CheckpointError(f"DeepSpeed found nothing to load in {checkpoint.path}")
    rank_file = checkpoint.path / "ranks" / f"rank-{_rank():05d}.pt"
    return torch.load(rank_file, weights_only=True)


def prune(root: Path, *, keep: int, stage_index: int | None = None) -> None:
    """Remove what is no longer needed; rank 0 calls this after a new checkpoint is complete.

    Removed: unfinished folders, and complete ones beyond the `keep` newest (of one stage, if
    given). `state.json` goes first, so that a kill during the removal leaves no checkpoint that
    looks whole.
    """
    kept = 0
    for folder in _step_folders(root):
        state = read_json(folder / "state.json")
        if state is not None:
            if stage_index is not None and state["stage_index"] != stage_index:
                continue
            if kept < keep:
                kept += 1
                continue
            (folder / "state.json").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
