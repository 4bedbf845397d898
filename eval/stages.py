"""The evaluation stages of a recipe: what `train.run` and `eval.run` call.

Each writes under `run_dir/eval/<kind>/` and can be killed and run again. Predictions and losses are kept
per arm, checkpoint and precision (`<arm>-<fingerprint>-<dtype>`), so two stages never mix, and a stage
that meets the same ones and the same prompts again finds its answers there.
`stage-<n>.json` is the stage's result, written last by rank 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..data.loader import heldout_rows
from ..recipes.schema import PerplexityStage, ProbeStage
from . import perplexity
from . import probe as probing
from .arms import ArmRun, arm_runs, comparisons
from .benchmarks import answers, results, ruler_prompts, run_longbench, run_ruler
from .context import EvalContext
from .models import attending
from .records import read_journals
from .report import write_report
from .ruler import check_lengths
from .wandb_tables import curves

__all__ = [
    "EvalContext",
    "run_longbench",
    "run_perplexity",
    "run_probe",
    "run_report",
    "run_ruler",
    "run_stage",
    "write_the_report",
]

NEEDLE_TASK = "niah_single_2"


def run_stage(ctx: EvalContext, stage: Any) -> dict[str, Any]:
    """Run one evaluation stage of any kind and record its curves; returns its result, on every rank."""
    runners: dict[str, Callable[[EvalContext, Any], dict[str, Any]]] = {
        "probe": run_probe,
        "perplexity": run_perplexity,
        "ruler": run_ruler,
        "longbench": run_longbench,
        "report": run_report,
    }
    result = runners[stage.kind](ctx, stage)
    followed = curves(result)
    if followed and ctx.rank == 0:
        ctx.log(followed)
    return result


def run_probe(ctx: EvalContext, stage: ProbeStage) -> dict[str, Any]:
    """Oracle coverage by layer and oracle perplexity at each budget, and a needle score if asked for."""
    top_ks = ctx.budgets(stage)
    rows = _heldout(ctx, stage.rows)
    models = ctx.models()
    ceiling = ArmRun("converted_dense")
    folder = ctx.folder("probe") / ctx.keyed(models, ceiling, perplexity.rows_digest(rows))
    probing.probe(
        lambda: models.of(ceiling),
        rows,
        top_ks,
        folder,
        rank=ctx.rank,
        world_size=ctx.world_size,
        progress=ctx.say,
    )
    models.release()
    needles = _needles(ctx, stage, top_ks) if stage.needles else None

    def make() -> dict[str, Any]:
        budgets = probing.summarise(read_journals(folder), len(rows), top_ks)
        block = ctx.geometry().block_size
        head = {"rows": len(rows), "row_len": ctx.recipe.data.row_len, "block_size": block}
        return {**head, "budgets": budgets, "needles": needles}

    return ctx.finish("probe", stage, make)


def run_perplexity(ctx: EvalContext, stage: PerplexityStage) -> dict[str, Any]:
    """Perplexity of held-out rows in every arm and budget, compared pairwise by row."""
    runs = arm_runs(stage.arms, ctx.budgets(stage))
    rows = _heldout(ctx, stage.rows)
    digest = perplexity.rows_digest(rows)
    models = ctx.models()
    folders = {run.label: ctx.folder("perplexity") / ctx.keyed(models, run, digest) for run in runs}
    for run in runs:
        left = len(rows) - len(read_journals(folders[run.label]))
        if left <= 0:
            continue
        model = models.of(run)
        with attending(model, run):
            perplexity.measure(
                model,
                rows,
                folders[run.label],
                rank=ctx.rank,
                world_size=ctx.world_size,
                prefill_chunk=ctx.recipe.execution.prefill_chunk,
                progress=ctx.teller(f"perplexity {run.label}"),
            )
    models.release()

    def make() -> dict[str, Any]:
        arms = {
            run.label: perplexity.summarise(folders[run.label], len(rows))
            | {"shape": ctx.shape(run.arm)}
            for run in runs
        }
        pairs = [
            {
                "meaning": meaning,
                "first": one.label,
                "second": two.label,
                "change_pct": perplexity.change_pct(arms[two.label], arms[one.label]).record(),
            }
            for meaning, one, two in comparisons(runs)
        ]
        head = {"rows": len(rows), "row_len": ctx.recipe.data.row_len, "rows_digest": digest}
        blocks = -(-ctx.recipe.data.row_len // ctx.geometry().block_size)
        return {**head, "blocks": blocks, "arms": arms, "comparisons": pairs}

    return ctx.finish("perplexity", stage, make)


def run_report(ctx: EvalContext, stage: Any) -> dict[str, Any]:
    """The report of everything that is under the run's folder."""
    return {"kind": "report", "stage": ctx.number(stage), "files": write_the_report(ctx)}


def write_the_report(ctx: EvalContext) -> dict[str, str]:
    """Rank 0 writes the report's files; returns their paths (empty on other ranks)."""
    written: dict[str, str] = {}
    if ctx.rank == 0:
        written = {name: str(path) for name, path in write_report(ctx.run_dir).items()}
        ctx.say(f"report: {written['html']}")
    ctx.barrier()
    return written


def _needles(ctx: EvalContext, stage: ProbeStage, top_ks: list[int]) -> dict[str, Any]:
    """Score of single-needle prompts of a row's length, dense and with the oracle's blocks."""
    length = ctx.recipe.data.row_len
    check_lengths([length], ctx.window())
    prompts = ruler_prompts(ctx, [NEEDLE_TASK], [length], stage.needles)
    if not prompts.samples:
        raise ValueError(
            f"stages.{ctx.number(stage)}.needles: {prompts.skipped[0]['reason']}: raise data.row_len or "
            "set needles to 0"
        )
    runs = arm_runs(["converted_dense", "converted_oracle"], top_ks)
    folders = answers(ctx, "ruler", prompts, runs)
    ctx.barrier()
    scores = {}
    if ctx.rank == 0:
        found, _ = results(ctx, "probe", stage, prompts, folders)
        scores = {label: arm["means"] for label, arm in found["arms"].items()}
    return {"label": prompts.label, "task": NEEDLE_TASK, "samples": stage.needles, "scores": scores}


def _heldout(ctx: EvalContext, count: int) -> list[Any]:
    data = ctx.recipe.data
    if not data.heldout:
        raise ValueError("data.heldout is empty: name texts that the training sources do not hold")
    sources: Any = data.heldout
    return heldout_rows(
        sources, ctx.tokenizer(), row_len=data.row_len, count=count, cache_dir=data.cache_dir
    )
