"""Finished evaluations on a wandb run: tables, the report, and artifacts with the files behind them.

`train/evaluate.py` and `eval/run.py` call it on rank 0, after a stage has written its result. Converted
checkpoints are never uploaded: they have tens of gigabytes, and the fingerprint names them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..recipes.load import resolved
from .records import PREDICTIONS, read_predictions, write_json
from .wandb_run import WandbRun, start_wandb
from .wandb_tables import stage_tables

IDS = "wandb.json"
"""In a run's folder `eval/`: checkpoint -> id of the wandb run of its evaluations alone."""
_SAID = (
    "kind",
    "stage",
    "checkpoint",
    "state",
    "precision",
    "index_precision",
    "prompts",
    "rows_digest",
)


@dataclass(frozen=True)
class Shown:
    """Where evaluations of one state of the weights go."""

    run: WandbRun
    name: str
    """Of the recipe; artifacts are named by it."""
    head: Mapping[str, Any]
    """Of every point: `tokens` that the weights were trained for, and what else tells its place."""
    commit: str

    def log(self, values: Mapping[str, float]) -> None:
        """Record numbers; for `EvalContext.log` where no training run records them."""
        self.run.log({**self.head, **values})

    def stage(self, result: Mapping[str, Any], folder: Path) -> None:
        """A stage's tables, and an artifact with its result and merged predictions.

        Args:
            folder: of the stage's kind, with `stage-<n>.json` and, if it asks prompts, `stage-<n>/<arm>/`.
        """
        kind, stage = result["kind"], f"stage-{result['stage']}"
        homes = {path.parent.name: path.parent for path in folder.glob(f"{stage}/*/{PREDICTIONS}")}
        # The probe's needles are answered too, but their scores are its only table.
        named = result.get("arms") or (result.get("needles") or {}).get("scores", {})
        arms = [label for label in named if label in homes]
        predictions = {label: read_predictions(homes[label]) for label in arms}
        tables = stage_tables(result, predictions)
        if tables:
            whole = {f"eval/{kind}/{stage}/{name}": table for name, table in tables.items()}
            self.run.log_tables(self.head, whole)
        files = {f"{stage}.json": folder / f"{stage}.json"}
        for label in arms:
            here = sorted(path for path in homes[label].iterdir() if path.is_file())
            files |= {f"{label}/{path.name}": path for path in here}
        metadata = {key: result[key] for key in _SAID if result.get(key) is not None}
        self._keep(f"{self.name}-{result['stage']}-{kind}", "evaluation", files, metadata)

    def report(self, files: Mapping[str, str]) -> None:
        """The report as a page, and an artifact with all its forms.

        Args:
            files: paths by form, from `stages.write_the_report`.
        """
        paths = {Path(path).name: Path(path) for path in files.values()}
        self.run.log_page(self.head, "eval/report/html", Path(files["html"]))
        self._keep(f"{self.name}-report", "report", paths, {})

    def _keep(
        self, name: str, kind: str, files: Mapping[str, Path], metadata: Mapping[str, Any]
    ) -> None:
        where = {"tokens": self.head["tokens"], "commit": self.commit}
        self.run.log_artifact(name, kind, files, {**metadata, **where})


def start_alone(
    recipe: Any, run_dir: Path, *, converted: Path, checkpoint: str, commit: str
) -> Shown | None:
    """The wandb run of evaluations that are not part of a training run; None where wandb is disabled.

    The same checkpoint measured again into the same folder continues its wandb run.

    Args:
        converted: the measured folder.
        checkpoint: its fingerprint.

    Raises:
        ValueError: online without an account or a network, in one sentence.
    """
    if recipe.wandb.mode == "disabled":
        return None
    tokens = trained_tokens(converted)
    if tokens is None:
        print(
            f"{converted} does not say how many tokens it was trained for: its points in wandb stand at 0",
            flush=True,
        )
    told = {"checkpoint": checkpoint, "checkpoint_folder": str(converted), "trained_tokens": tokens}
    run = start_wandb(
        recipe.wandb,
        name=f"{recipe.name}-eval-{checkpoint[:8]}",
        run_id=_run_id(run_dir / "eval" / IDS, checkpoint),
        run_dir=run_dir,
        config={**resolved(recipe), **told, "commit": commit},
        group=recipe.name,
        job_type="evaluation",
    )
    return None if run is None else Shown(run, recipe.name, {"tokens": tokens or 0}, commit)


def trained_tokens(converted: Path) -> int | None:
    """Tokens that a run's converted folder was trained for, 0 at its start; None if nothing tells."""
    stage = converted.parent
    if (stage / "done.json").is_file():
        if stage.name == "start":
            return 0
        if stage.parent.name == "stages":
            return json.loads((stage / "done.json").read_text(encoding="utf-8"))["tokens"]
    return None


def _run_id(file: Path, checkpoint: str) -> str:
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if checkpoint not in known:
        known[checkpoint] = os.urandom(4).hex()
        write_json(file, known)
    return known[checkpoint]
