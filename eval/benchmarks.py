"""The stages that answer prompts: RULER and LongBench, in every arm on the same stored prompts.

Prompts, then answers (eval/predict.py), then tables (eval/score.py); each can be killed and goes on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ..data import corpora
from ..recipes.schema import RulerStage
from . import score, tables
from .arms import ArmRun, arm_runs
from .context import EvalContext
from .generate import Prompt
from .models import Models, attending
from .predict import claim, merge, predict, share
from .prepare import Prompts, load, prepare
from .progress import estimate, told, trial
from .records import read_journals, write_json
from .ruler import LABEL, check_lengths, check_tasks
from .sources import ruler_words


class PromptSet(Protocol):
    """Stored prompts of any benchmark; `digest` names them."""

    @property
    def digest(self) -> str: ...
    @property
    def samples(self) -> Sequence[Prompt]: ...


def run_ruler(ctx: EvalContext, stage: RulerStage) -> dict[str, Any]:
    """RULER tasks on stored prompts in every arm; scores, paired differences and tests.

    Raises:
        ValueError: an unknown task, a length above the window, changed prompts or damaged predictions.
    """
    tasks = check_tasks(stage.tasks)
    check_lengths(stage.lengths, ctx.window())
    runs = arm_runs(stage.arms, ctx.budgets(stage))
    prompts = ruler_prompts(ctx, tasks, stage.lengths, stage.samples, stage.seed)
    folders = answers(ctx, "ruler", prompts, runs)

    def make() -> dict[str, Any]:
        return {
            "label": LABEL,
            "prompts": prompts.digest,
            "samples": stage.samples,
            "lengths": sorted(stage.lengths),
            "tasks": tasks,
            "skipped": prompts.skipped,
            "block_size": ctx.geometry().block_size,
            **results(ctx, "ruler", prompts, folders),
        }

    return ctx.finish("ruler", stage, make)


def run_longbench(ctx: EvalContext, stage: Any) -> dict[str, Any]:
    """LongBench's place in the pipeline: recorded as not measured."""
    reason = "LongBench is not part of this version; no score is claimed"
    ctx.say(f"longbench: not measured ({reason})")
    return ctx.finish("longbench", stage, lambda: {"measured": False, "reason": reason})


def answers(
    ctx: EvalContext, kind: str, prompts: PromptSet, runs: Sequence[ArmRun]
) -> dict[str, Path]:
    """Answers of every arm to every prompt; returns the arms' folders by label, on every rank.

    Raises:
        ValueError: a folder with predictions of something else, or a damaged line in it.
    """
    models = ctx.models()
    home = ctx.folder(kind) / "predictions"
    folders = {run.label: home / ctx.keyed(models, run, prompts.digest) for run in runs}
    for run in runs:
        identity = _identity(ctx, models, run, prompts)
        claim(folders[run.label], identity, write=ctx.rank == 0)
    # All ranks read before any writes, so that they share out the same prompts.
    answered = {label: read_journals(folder).keys() for label, folder in folders.items()}
    ctx.barrier()
    left = {
        run: [one for one in prompts.samples if one.id not in answered[run.label]] for run in runs
    }
    told_already = False
    for run in (run for run in runs if left[run]):
        model = models.of(run)
        with attending(model, run):
            if not told_already and ctx.rank == 0:
                _tell_estimate(ctx, kind, model, left)
            told_already = True
            predict(
                model,
                ctx.tokenizer(),
                left[run],
                folders[run.label],
                run=run,
                answered=answered[run.label],
                prefill_chunk=ctx.recipe.execution.prefill_chunk,
                rank=ctx.rank,
                world_size=ctx.world_size,
                progress=ctx.teller(f"{kind} {run.label}"),
            )
    models.release()
    return folders


def results(
    ctx: EvalContext, kind: str, prompts: PromptSet, folders: dict[str, Path]
) -> dict[str, Any]:
    """Merged predictions, scored: `arms`, `comparisons` and `margin` of a stage's result. Rank 0 only."""
    arms = {}
    for label, folder in folders.items():
        merged = merge(folder, prompts.samples)
        arms[label] = score.scored({record["id"]: record for record in merged})
    found = score.evaluate(arms, margin=ctx.margin())
    for label, arm in found["arms"].items():
        journals = read_journals(folders[label])
        costs = tables.costs({one.id: journals[one.id] for one in prompts.samples})
        arm["costs"] = costs
        arm["seconds"] = round(sum(cost["seconds"] for cost in costs.values()), 1)
        for length, by_task in arm["scores"].items():
            for task, cell in by_task.items():
                ctx.log({f"eval/{kind}/{_short(int(length))}/{task}/{label}": cell["score"]})
    return found


def ruler_prompts(
    ctx: EvalContext, tasks: list[str], lengths: list[int], samples: int, seed: int
) -> Prompts:
    """RULER's prompts, prepared by rank 0 and read by all."""
    tokenizer = ctx.tokenizer()
    home = ctx.folder("ruler") / "prompts"
    cache = ctx.recipe.data.cache_dir
    note = home / "newest.json"
    made: Prompts | None = None
    if ctx.rank == 0:
        made = prepare(
            home,
            tokenizer=tokenizer,
            words=ruler_words(cache),
            works=corpora.read("ruler-pd", None, cache),
            tasks=tasks,
            lengths=lengths,
            samples=samples,
            seed=seed,
            progress=ctx.say,
        )
        write_json(note, {"folder": made.folder.name})
    ctx.barrier()
    if made is None:
        name = json.loads(note.read_text(encoding="utf-8"))["folder"]
        made = load(home / name, tokenizer)
    ctx.barrier()
    return made


def _identity(ctx: EvalContext, models: Models, run: ArmRun, prompts: PromptSet) -> dict[str, Any]:
    """What decides an arm's predictions, beside the prompts' text."""
    return {
        "label": run.label,
        "arm": run.arm,
        "top_k": run.top_k,
        "checkpoint": models.fingerprint(run),
        "precision": ctx.precision,
        "prompts": prompts.digest,
    }


def _tell_estimate(
    ctx: EvalContext, kind: str, model: Any, left: dict[ArmRun, list[Prompt]]
) -> None:
    """What is going to be done and about how long it takes, before it begins."""
    every = [one for samples in left.values() for one in samples]
    speed = trial(model, max(one.num_tokens for one in every))
    seconds = estimate(speed, every, ctx.world_size)
    slowest = max(map(len, (share(many, 0, ctx.world_size) for many in left.values())))
    ctx.say(
        f"{kind}: {len(every)} answers in {sum(map(bool, left.values()))} arms, up to {slowest} an arm on "
        f"each of {ctx.world_size} ranks, about {told(seconds)} if every answer is as long as allowed"
    )


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 and length else str(length)
