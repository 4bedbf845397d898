"""Whether a run's folder belongs to this recipe and these ranks; checked before torch is imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..recipes.load import NOT_IN_FINGERPRINT, fingerprint, first_difference, resolved
from ..recipes.schema import Recipe

RUN_FILE = "run.json"
"""Fingerprint, number of ranks and wandb id of a run's folder."""
_STATES = "checkpoints/step-*/state.json"


def check_same_identity(run_dir: Path, recipe: Any, *, world_size: int) -> None:
    """Refuse to continue a folder that another recipe or another number of ranks began.

    Stages that have not begun yet may differ: they can be changed, dropped or added without repeating
    the finished ones. A start that was refused, or died before the conversion was done, binds to
    nothing: whatever is corrected may be run under the same name.

    Raises:
        ValueError: one sentence that names the first key that differs.
    """
    file = run_dir / RUN_FILE
    if not file.exists() or not _has_begun(run_dir):
        return
    known = json.loads(file.read_text(encoding="utf-8"))
    if known["fingerprint"] != fingerprint(recipe):
        before = json.loads((run_dir / "recipe.json").read_text(encoding="utf-8"))
        if not _same_so_far(before, recipe, num_begun_stages(run_dir)):
            raise ValueError(
                f"{run_dir} belongs to another recipe ({_difference(before, resolved(recipe))}): "
                "give this run another `name`, or remove the folder"
            )
    if known["world_size"] != world_size and not _training_is_done(run_dir, recipe):
        raise ValueError(
            f"{run_dir} was started with {known['world_size']} ranks and cannot resume with "
            f"{world_size}: start it with {known['world_size']} ranks, or give this run another `name`"
        )


def _has_begun(run_dir: Path) -> bool:
    """Whether the folder holds anything that a recipe has made."""
    return (run_dir / "start" / "done.json").exists() or num_begun_stages(run_dir) > 0


def num_begun_stages(run_dir: Path) -> int:
    """One more than the last stage that left a folder or a checkpoint."""
    begun = [int(p.name.split("-")[0]) for p in (run_dir / "stages").glob("*-*")]
    begun += [json.loads(p.read_text())["stage_index"] for p in run_dir.glob(_STATES)]
    return max(begun, default=-1) + 1


def _same_so_far(before: dict[str, Any], recipe: Any, num_stages: int) -> bool:
    """Whether the saved recipe agrees with this one in all but stages that have not begun."""
    try:
        old = Recipe.model_validate_json(json.dumps(before))
    except ValueError:  # saved by a version with other keys
        return False
    if len(recipe.stages) < num_stages:
        return False
    return fingerprint(old, num_stages) == fingerprint(recipe, num_stages)


def _training_is_done(run_dir: Path, recipe: Any) -> bool:
    """Whether only evaluation is left, which any number of ranks may do."""
    return all(
        (run_dir / "stages" / f"{number}-{stage.kind}" / "done.json").exists()
        for number, stage in enumerate(recipe.stages)
        if stage.kind in ("warmup", "sparse")
    )


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first key of the fingerprint that differs, with both values."""
    free = [".".join(path) for path in NOT_IN_FINGERPRINT]

    def counts(key: str) -> bool:
        return not any(f"{key}.".startswith(f"{name}.") for name in free)

    return first_difference(before, now, counts) or (
        "its keys are the same, but this version reads them otherwise"
    )
