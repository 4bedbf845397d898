"""The stages that answer prompts: RULER and LongBench, in every arm on the same stored prompts.

Prompts, then answers (eval/predict.py), then tables (eval/score.py); each can be killed and goes on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from ..recipes.schema import LongbenchStage, RulerStage
from . import longbench, longbench_score, score, tables
from .arms import ArmRun, arm_runs
from .context import EvalContext
from .generate import Prompt
from .models import Models, attending
from .predict import claim, merge, predict, share
from .prepare import Prompts, load, prepare
from .progress import Speed, estimate, told, trial
from .records import read_journals, write_json
from .ruler import check_lengths, check_tasks
from .ruler_corpus import PUBLIC_DOMAIN, read_corpus
from .tables import Predictions

_RULER_OPTIONS = ("seed", "corpus", "parity", "mode", "reasoning_tokens")


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
    options = {name: getattr(stage, name) for name in _RULER_OPTIONS}
    prompts = ruler_prompts(ctx, tasks, stage.lengths, stage.samples, **options)
    folders = answers(ctx, "ruler", prompts, runs) if prompts.samples else {}

    def make() -> dict[str, Any]:
        head = {
            "label": prompts.label,
            "corpus": stage.corpus,
            "prompts": prompts.digest,
            "samples": stage.samples,
            "lengths": sorted(stage.lengths),
            "tasks": tasks,
            "skipped": prompts.skipped,
            "block_size": ctx.geometry().block_size,
        }
        if not folders:
            reason = "; ".join(skipped_reasons(prompts))
            return {**head, "measured": False, "reason": reason}
        return {**head, "measured": True, **results(ctx, "ruler", stage, prompts, folders)[0]}

    return ctx.finish("ruler", stage, make)


def run_longbench(ctx: EvalContext, stage: LongbenchStage) -> dict[str, Any]:
    """LongBench's suites in every arm, and why what is not measured is not.

    Raises:
        ValueError: bad records, a length above the window, changed prompts or damaged predictions.
    """
    runs = arm_runs(stage.arms, ctx.budgets(stage))
    longbench.check_max_length(stage.max_length, ctx.window())
    prompts, missing = _longbench_prompts(ctx, stage)
    for entry in missing:
        ctx.say(f"longbench: {entry['task']} {entry['reason']}")
    folders = answers(ctx, "longbench", prompts, runs) if prompts.samples else {}

    def make() -> dict[str, Any]:
        head = {"prompts": prompts.digest, "sources": prompts.sources, "missing": missing}
        if not folders:
            reason = missing[0]["reason"].removeprefix("not measured: ")
            return {**head, "measured": False, "reason": reason}
        found, scored = results(ctx, "longbench", stage, prompts, folders)
        for label, arm in found["arms"].items():
            records = list(scored[label].values())
            scores = {record["id"]: record["score"] for record in records}
            arm["longbench"] = longbench_score.tables(records, scores)
        return {**head, "measured": True, "label": "LongBench", **found}

    return ctx.finish("longbench", stage, make)


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
    left: dict[ArmRun, list[Prompt]] = {}
    for run in runs:
        many = [one for one in prompts.samples if one.id not in answered[run.label]]
        if many:
            left[run] = many
    speeds: dict[str, Speed] = {}
    for run in list(left):
        model = models.of(run)
        with attending(model, run):
            if run.arm not in speeds and ctx.rank == 0:
                speeds[run.arm] = trial(model, max(one.num_tokens for one in left[run]))
                _tell_estimate(ctx, kind, speeds, left)
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
        del left[run]
    models.release()
    return folders


def results(
    ctx: EvalContext, kind: str, stage: Any, prompts: PromptSet, folders: dict[str, Path]
) -> tuple[dict[str, Any], dict[str, Predictions]]:
    """Merges predictions into the stage's folder and scores them; rank 0 only.

    Returns:
        `arms`, `comparisons` and `margin` of the stage's result, each arm with its `costs` and the `shape`
        that its operations are counted from; and each arm's scored predictions.
    """
    home = ctx.folder(kind) / f"stage-{ctx.number(stage)}"
    arms = {
        label: score.scored(merge(folder, prompts.samples, home / label))
        for label, folder in folders.items()
    }
    found = score.evaluate(arms, margin=ctx.margin())
    for label, arm in found["arms"].items():
        journals = read_journals(folders[label])
        costs = tables.costs({one.id: journals[one.id] for one in prompts.samples})
        arm["shape"] = ctx.shape(arm["arm"])
        arm["costs"] = costs
        arm["seconds"] = round(sum(cost["seconds"] for cost in costs.values()), 1)
    return found, arms


def ruler_prompts(
    ctx: EvalContext,
    tasks: list[str],
    lengths: list[int],
    samples: int,
    *,
    seed: int = 42,
    corpus: str = PUBLIC_DOMAIN,
    parity: str = "native",
    **options: Any,
) -> Prompts:
    """RULER's prompts, prepared by rank 0 and read by all. `options`: of `prepare`."""
    tokenizer = ctx.tokenizer()
    home = ctx.folder("ruler") / "prompts"
    note = home / "newest.json"
    made: Prompts | None = None
    if ctx.rank == 0:
        wanted: dict[str, Any] = {"tasks": tasks, "lengths": lengths, "parity": parity}
        made = prepare(
            home,
            tokenizer=tokenizer,
            corpus=read_corpus(corpus, ctx.recipe.data.cache_dir, **wanted),
            samples=samples,
            seed=seed,
            progress=ctx.say,
            **wanted,
            **options,
        )
        write_json(note, {"folder": made.folder.name})
    ctx.barrier()
    if made is None:
        name = json.loads(note.read_text(encoding="utf-8"))["folder"]
        made = load(home / name, tokenizer)
    for reason in skipped_reasons(made):
        ctx.say(f"ruler: left out: {reason}")
    ctx.barrier()
    return made


def skipped_reasons(prompts: Prompts) -> list[str]:
    """Why tasks have no prompts, each reason once: what a corpus lacks, it lacks at every length."""
    return list(dict.fromkeys(entry["reason"] for entry in prompts.skipped))


def _longbench_prompts(
    ctx: EvalContext, stage: LongbenchStage
) -> tuple[longbench.Prepared, list[dict[str, str]]]:
    """LongBench's prompts without those that could not be scored here, and what is missing."""
    tokenizer = ctx.tokenizer()
    home = ctx.folder("longbench") / "prompts"
    note = home / "newest.json"
    if ctx.rank == 0:
        made = longbench.prepare(
            home,
            tokenizer=tokenizer,
            suites=stage.suites,
            tasks=stage.tasks,
            records=None if stage.folder is None else Path(stage.folder),
            cache_dir=ctx.recipe.data.cache_dir,
            max_length=stage.max_length,
            window=ctx.window(),
            samples=stage.samples,
            seed=stage.seed,
            chat=stage.chat,
            progress=ctx.say,
        )
        write_json(note, {"folder": made.folder.name, "missing": made.missing})
    ctx.barrier()
    told = json.loads(note.read_text(encoding="utf-8"))
    made = longbench.load(home / told["folder"], tokenizer)
    ctx.barrier()
    unscorable = longbench_score.not_scorable(sorted({one.task for one in made.samples}))
    without = {entry["task"] for entry in unscorable}
    samples = [one for one in made.samples if one.task not in without]
    return replace(made, samples=samples), told["missing"] + unscorable


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
    ctx: EvalContext, kind: str, speeds: dict[str, Speed], left: dict[ArmRun, list[Prompt]]
) -> None:
    """What is still to be done and about how long it takes; `speeds`: of the arms timed so far."""
    seconds = 0.0
    for run, many in left.items():
        known = [speeds[run.arm]] if run.arm in speeds else speeds.values()
        seconds += max(estimate(speed, many, ctx.world_size) for speed in known)
    count = sum(map(len, left.values()))
    slowest = max(len(share(many, 0, ctx.world_size)) for many in left.values())
    said = (
        f"{kind}: {count} answers in {len(left)} arms, up to {slowest} an arm on each of "
        f"{ctx.world_size} ranks, about {told(seconds)} if every answer is as long as allowed"
    )
    if any(run.arm not in speeds for run in left):
        said += f" and no other arm is slower than {', '.join(speeds)}"
    ctx.say(said)
