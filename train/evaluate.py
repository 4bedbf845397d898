"""Evaluation stages inside a run: handed over to `eval/stages.py`, with a `done.json` as others."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..eval import stages as evaluation
from ..eval.wandb_evaluation import Shown
from ..eval.wandb_run import WandbRun
from .context import RunContext
from .files import write_json
from .loop import Position
from .metrics import truncate


def run_evaluation_stage(
    context: RunContext, index: int, *, original: Path, converted: Path, position: Position
) -> None:
    """Run one evaluation stage on the weights the training has reached; every rank calls this.

    Args:
        original: folder of the dense model the run began with.
        converted: converted folder of the last training stage, or of the start.
        position: where training stands; evaluation numbers are recorded there.
    """
    stage, label = context.recipe.stages[index], context.label(index)
    context.say(f"{label} begins")
    begun = time.monotonic()
    if context.metrics is not None:  # what an interrupted start of this stage recorded
        context.metrics.reopen()
        truncate(context.metrics.path, stage_index=index, step=-1)

    def record(values: Mapping[str, float]) -> None:
        if context.metrics is not None:
            context.metrics.log(
                values,
                step=position.global_step,
                tokens=position.tokens,
                stage_index=index,
                stage=label,
            )

    given = evaluation.EvalContext(
        recipe=context.recipe,
        run_dir=context.run_dir,
        original=original,
        converted=converted,
        rank=context.rank,
        world_size=context.world_size,
        device=context.device,
        dtype=context.dtype,
        barrier=context.barrier,
        log=record,
    )
    summary = evaluation.run_stage(given, stage)
    if context.metrics is not None and context.metrics.wandb is not None:
        _show(context, context.metrics.wandb, index, summary, position)
    context.barrier()
    if context.rank == 0:
        done = {
            "stage_index": index,
            "kind": stage.kind,
            "seconds_since_start_or_resume": round(time.monotonic() - begun, 1),
            "summary": summary,
            "fingerprint": context.fingerprint_of(index),
            "commit": context.commit,
        }
        write_json(context.stage_dir(index) / "done.json", done)
    context.barrier()
    context.say(f"{label} done in {time.monotonic() - begun:.0f} s")


def _show(
    context: RunContext, run: WandbRun, index: int, summary: dict[str, Any], position: Position
) -> None:
    """Tables, report and artifacts of a finished stage, where its numbers stand."""
    head = {"step": position.global_step, "tokens": position.tokens, "stage": index}
    shown = Shown(run, context.recipe.name, head, context.commit)
    if summary["kind"] == "report":
        shown.report(summary["files"])
    else:
        shown.stage(summary, context.run_dir / "eval" / summary["kind"])
