"""The evaluation stages of a recipe: what `train.run` and `eval.run` call.

Each writes under `run_dir/eval/<kind>/` and can be killed and run again. Predictions and losses are kept
per arm, checkpoint and precision (`<arm>-<fingerprint>-<dtype>`), so two stages never mix, and a stage
that meets the same ones and the same prompts again finds its answers there.
`stage-<n>.json` is the stage's result, written last by rank 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from ..data import corpora
from ..data.loader import heldout_rows
from ..model.convert import CONFIG_KEY
from ..model.execution import Execution
from ..model.geometry import Geometry
from ..recipes.schema import (
    PerplexityStage,
    ProbeStage,
    Recipe,
    RulerStage,
)
from . import perplexity, score
from . import probe as probing
from .arms import ArmRun, Models, arm_runs, checkpoint_fingerprint
from .generate import predict
from .prepare import Prompts, load, prepare
from .records import read_journals, write_json
from .report import write_report
from .ruler import LABEL, check_lengths, check_tasks
from .sources import ruler_words

NEEDLE_TASK = "niah_single_2"


@dataclass(frozen=True)
class EvalContext:
    """What an evaluation stage needs to know about the run."""

    recipe: Recipe
    run_dir: Path
    original: Path
    """Dense checkpoint as it was, with its tokenizer."""
    converted: Path
    """Converted checkpoint to measure."""
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    barrier: Callable[[], None]
    log: Callable[[dict[str, float]], None]
    """Records metrics; called on rank 0 only."""
    state: str | None = None
    """What `converted` is, where it is not what the recipe's training stages have reached."""

    def number(self, stage: Any) -> int:
        """Place of a stage in the recipe, from 0; by identity, since two stages may be equal."""
        for place, known in enumerate(self.recipe.stages):
            if known is stage:
                return place
        return self.recipe.stages.index(stage)

    def folder(self, kind: str) -> Path:
        """Where stages of a kind write."""
        return self.run_dir / "eval" / kind

    def say(self, line: str) -> None:
        """Progress, on rank 0."""
        if self.rank == 0:
            print(line, flush=True)

    def teller(self, what: str) -> Callable[[str], None]:
        """`say`, with what is going on before each line."""
        return lambda line: self.say(f"{what}: {line}")

    def models(self) -> Models:
        """The models behind the arms."""
        where: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        execution = Execution.of(self.recipe.execution)
        return Models(self.original, self.converted, **where, execution=execution)

    def tokenizer(self) -> Any:
        """The original checkpoint's tokenizer."""
        return AutoTokenizer.from_pretrained(self.original)

    def geometry(self) -> Geometry:
        """Blocks and budget of `converted`, which may be another checkpoint than the recipe would make.

        Raises:
            ValueError: not a converted checkpoint, or one of a form that is not supported.
        """
        config = AutoConfig.from_pretrained(self.converted)
        block = getattr(config, CONFIG_KEY, None)
        if not block:
            raise ValueError(
                f"{self.converted} has no {CONFIG_KEY} in its config.json: convert the model first"
            )
        return Geometry.from_config(block, config.num_hidden_layers)

    def keyed(self, models: Models, run: ArmRun, digest: str) -> str:
        """Folder of one arm's records for one set of prompts or rows, one checkpoint and one precision."""
        precision = str(self.dtype).removeprefix("torch.")
        if self.recipe.execution.index_precision != "input":  # it may select other blocks
            precision += f"-index-{self.recipe.execution.index_precision}"
        return f"{digest[:12]}/{run.label}-{models.fingerprint(run)[:12]}-{precision}"

    def finish(self, kind: str, stage: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Wait for all ranks, let rank 0 write the stage's result, and return it on every rank."""
        self.barrier()
        number = self.number(stage)
        path = self.folder(kind) / f"stage-{number}.json"
        if self.rank == 0:
            state = {"state": self.state, "after": _trained_before(self.recipe, number)}
            checkpoint = checkpoint_fingerprint(self.converted)
            head = {"kind": kind, "stage": number, **state, "checkpoint": checkpoint}
            head |= {"precision": str(self.dtype).removeprefix("torch.")}
            head |= {"index_precision": self.recipe.execution.index_precision}
            head |= {"checkpoint_top_k": self.geometry().top_k}
            write_json(path, {**head, **make()})
        self.barrier()
        return json.loads(path.read_text(encoding="utf-8"))


def run_probe(ctx: EvalContext, stage: ProbeStage) -> dict[str, Any]:
    """Oracle coverage by layer and oracle perplexity at each budget, and a needle score if asked for."""
    top_ks = _budgets(ctx, stage)
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
    needles = None
    if stage.needles:
        needles = _needles(ctx, stage, models, top_ks)
    models.release()

    def make() -> dict[str, Any]:
        budgets = probing.summarise(read_journals(folder), len(rows), top_ks)
        block = ctx.geometry().block_size
        for entry in budgets:
            name = f"eval/probe/oracle_coverage/k{entry['top_k']}"
            if "oracle_coverage" in entry["mean"]:
                ctx.log({name: entry["mean"]["oracle_coverage"]})
        head = {"rows": len(rows), "row_len": ctx.recipe.data.row_len, "block_size": block}
        return {**head, "budgets": budgets, "needles": needles}

    return ctx.finish("probe", stage, make)


def run_perplexity(ctx: EvalContext, stage: PerplexityStage) -> dict[str, Any]:
    """Perplexity of held-out rows in every arm and budget, compared pairwise by row."""
    runs = arm_runs(stage.arms, _budgets(ctx, stage))
    rows = _heldout(ctx, stage.rows)
    digest = perplexity.rows_digest(rows)
    models = ctx.models()
    folders = {run.label: ctx.folder("perplexity") / ctx.keyed(models, run, digest) for run in runs}
    for run in runs:
        left = len(rows) - len(read_journals(folders[run.label]))
        if left <= 0:
            continue
        model = models.of(run)
        with run.attention(model):
            perplexity.measure(
                model,
                rows,
                folders[run.label],
                rank=ctx.rank,
                world_size=ctx.world_size,
                progress=ctx.teller(f"perplexity {run.label}"),
            )
    models.release()

    def make() -> dict[str, Any]:
        arms = {run.label: perplexity.summarise(folders[run.label], len(rows)) for run in runs}
        for label, arm in arms.items():
            ctx.log({f"eval/perplexity/{label}": arm["perplexity"]})
        pairs = [
            {
                "meaning": meaning,
                "first": one.label,
                "second": two.label,
                "change_pct": perplexity.change_pct(arms[two.label], arms[one.label]).record(),
            }
            for meaning, one, two in score.comparisons(runs)
        ]
        head = {"rows": len(rows), "row_len": ctx.recipe.data.row_len, "rows_digest": digest}
        blocks = -(-ctx.recipe.data.row_len // ctx.geometry().block_size)
        return {**head, "blocks": blocks, "arms": arms, "comparisons": pairs}

    return ctx.finish("perplexity", stage, make)


def run_ruler(ctx: EvalContext, stage: RulerStage) -> dict[str, Any]:
    """RULER tasks on stored prompts in every arm; scores, paired differences and tests.

    Raises:
        ValueError: an unknown task, a length above the window, changed prompts or damaged predictions.
    """
    tasks = check_tasks(stage.tasks)
    check_lengths(stage.lengths, _window(ctx))
    runs = arm_runs(stage.arms, _budgets(ctx, stage))
    prompts = _prompts(ctx, tasks, stage.lengths, stage.samples, stage.seed)
    models = ctx.models()
    folders = _predict(ctx, prompts, runs, models)
    models.release()

    def make() -> dict[str, Any]:
        found = {label: read_journals(folder) for label, folder in folders.items()}
        arms = {}
        for run in runs:
            table = score.cells(prompts.samples, found[run.label])
            seconds = sum(found[run.label][one.id]["seconds"] for one in prompts.samples)
            arms[run.label] = {
                "arm": run.arm,
                "top_k": run.top_k,
                "scores": table,
                "means": score.means(table),
                "seconds": round(seconds, 1),
            }
            for length, by_task in table.items():
                for task, cell in by_task.items():
                    where = f"eval/ruler/{_short(int(length))}/{task}/{run.label}"
                    ctx.log({where: cell["score"]})
        pairs = [
            {
                "meaning": meaning,
                "first": one.label,
                "second": two.label,
                "lengths": score.compare(prompts.samples, found[one.label], found[two.label]),
                "flips": score.flips(prompts.samples, found[one.label], found[two.label]),
            }
            for meaning, one, two in score.comparisons(runs)
        ]
        return {
            "label": LABEL,
            "prompts": prompts.digest,
            "samples": stage.samples,
            "lengths": sorted(stage.lengths),
            "tasks": tasks,
            "skipped": prompts.skipped,
            "block_size": ctx.geometry().block_size,
            "arms": arms,
            "comparisons": pairs,
        }

    return ctx.finish("ruler", stage, make)


def run_longbench(ctx: EvalContext, stage: Any) -> dict[str, Any]:
    """LongBench's place in the pipeline: recorded as not measured."""
    reason = "LongBench is not part of this version; no score is claimed"
    ctx.say(f"longbench: not measured ({reason})")
    return ctx.finish("longbench", stage, lambda: {"measured": False, "reason": reason})


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


def _predict(
    ctx: EvalContext, prompts: Prompts, runs: list[ArmRun], models: Models
) -> dict[str, Path]:
    """Answers of every arm to every prompt; returns their folders by arm label."""
    home = ctx.folder("ruler") / "predictions"
    folders = {run.label: home / ctx.keyed(models, run, prompts.digest) for run in runs}
    wanted = {sample.id for sample in prompts.samples}
    for run in runs:
        if wanted <= read_journals(folders[run.label]).keys():
            continue
        model = models.of(run)
        with run.attention(model):
            predict(
                model,
                ctx.tokenizer(),
                prompts.samples,
                folders[run.label],
                prefill_chunk=ctx.recipe.execution.prefill_chunk,
                rank=ctx.rank,
                world_size=ctx.world_size,
                progress=ctx.teller(f"ruler {run.label}"),
            )
    return folders


def _needles(
    ctx: EvalContext, stage: ProbeStage, models: Models, top_ks: list[int]
) -> dict[str, Any]:
    """Score of single-needle prompts of a row's length, dense and with the oracle's blocks."""
    length = ctx.recipe.data.row_len
    check_lengths([length], _window(ctx))
    prompts = _prompts(ctx, [NEEDLE_TASK], [length], stage.needles, 42)
    runs = arm_runs(["converted_dense", "converted_oracle"], top_ks)
    folders = _predict(ctx, prompts, runs, models)
    ctx.barrier()
    scores = {}
    for run in runs:
        table = score.cells(prompts.samples, read_journals(folders[run.label]))
        scores[run.label] = score.means(table)
    return {"label": LABEL, "task": NEEDLE_TASK, "samples": stage.needles, "scores": scores}


def _prompts(
    ctx: EvalContext, tasks: list[str], lengths: list[int], samples: int, seed: int
) -> Prompts:
    """Prepared by rank 0, read by all."""
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


def _heldout(ctx: EvalContext, count: int) -> list[Any]:
    data = ctx.recipe.data
    if not data.heldout:
        raise ValueError("data.heldout is empty: name texts that the training sources do not hold")
    sources: Any = data.heldout
    return heldout_rows(
        sources, ctx.tokenizer(), row_len=data.row_len, count=count, cache_dir=data.cache_dir
    )


def _budgets(ctx: EvalContext, stage: Any) -> list[int]:
    """The stage's budgets, or the checkpoint's own.

    Raises:
        ValueError: a budget that leaves nothing to choose.
    """
    geometry = ctx.geometry()
    top_ks = sorted(set(stage.top_k)) or [geometry.top_k]
    forced = geometry.local_blocks + geometry.init_blocks
    if top_ks[0] < forced + 1:
        raise ValueError(
            f"stages.{ctx.number(stage)}.top_k={top_ks[0]} leaves nothing to choose: {forced} blocks are "
            f"always kept, so use at least {forced + 1}"
        )
    return top_ks


def _window(ctx: EvalContext) -> int | None:
    config = AutoConfig.from_pretrained(ctx.original).get_text_config()
    return getattr(config, "max_position_embeddings", None)


def _trained_before(recipe: Recipe, number: int) -> list[str]:
    """The training stages that had been run when this stage measured."""
    kinds = [(place, known.kind) for place, known in enumerate(recipe.stages[:number])]
    return [f"{place}-{kind}" for place, kind in kinds if kind in ("warmup", "sparse")]


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
