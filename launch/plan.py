"""What a recipe will do, as text: called by `dense2sparse plan`, without torch."""

from __future__ import annotations

from typing import Any

from ..recipes.load import as_yaml, fingerprint, zero_stage
from ..recipes.schema import Recipe


def plan_text(recipe: Recipe, run_dir: str) -> str:
    """The resolved recipe as YAML, then one paragraph a stage.

    Args:
        recipe: a loaded recipe.
        run_dir: folder of the run.
    """
    lines = [as_yaml(recipe).rstrip(), "", f"Stages of {recipe.name}, under {run_dir}:"]
    for number, stage in enumerate(recipe.stages):
        lines.append(f"  {number} {stage.kind:<10} {stage_line(recipe, stage)}")
    lines.append(
        f"ZeRO stage {zero_stage(recipe)}, {recipe.train.precision}; block size "
        f"{recipe.sparsity.block_size}, top-k {recipe.sparsity.top_k}; "
        f"fingerprint {fingerprint(recipe)[:12]}"
    )
    return "\n".join(lines)


def stage_line(recipe: Recipe, stage: Any) -> str:
    """One stage in words: attention, what trains, tokens, and when it ends."""
    if stage.kind in ("warmup", "sparse"):
        return _training_line(recipe, stage)
    top_k = _words(getattr(stage, "top_k", None) or [recipe.sparsity.top_k])
    if stage.kind == "probe":
        needles = f", {stage.needles} needle prompts" if stage.needles else ""
        return f"oracle selection at top-k {top_k}; {stage.rows} held-out rows{needles}; trains nothing"
    if stage.kind == "perplexity":
        return (
            f"{stage.rows} held-out rows x {recipe.data.row_len:,} tokens, "
            f"{len(stage.arms)} arms, top-k {top_k}"
        )
    if stage.kind == "ruler":
        tasks = _words(stage.tasks) if stage.tasks else "all tasks"
        preset = f"preset {stage.preset}: " if stage.preset else ""
        return (
            f"{preset}{tasks}; lengths {_words(stage.lengths)}, {stage.samples} prompts each, "
            f"{len(stage.arms)} arms, top-k {top_k}"
        )
    if stage.kind == "longbench":
        tasks = _words(stage.tasks) if stage.tasks else "all tasks"
        records = "all records" if stage.samples is None else f"{stage.samples} records each"
        return f"suites {_words(stage.suites)}; {tasks}, {records}, {len(stage.arms)} arms, top-k {top_k}"
    return "report.html from everything above"


def tokens_per_step(recipe: Recipe, stage: Any) -> int:
    """Tokens of one optimizer step on one rank."""
    row_len = stage.row_len or recipe.data.row_len
    return stage.micro_batch_size * stage.gradient_accumulation * row_len


def _training_line(recipe: Recipe, stage: Any) -> str:
    step = tokens_per_step(recipe, stage)
    frozen = stage.kind == "warmup" and stage.backbone == "frozen"
    trains = f"index branch (lr {stage.index_lr:g})"
    if not frozen:
        trains += f" and backbone (lr {stage.backbone_lr:g})"
    if stage.steps is not None:
        ends = f"{stage.steps:,} steps x {step:,} tokens = {stage.steps * step:,} tokens per rank"
    else:
        ends = f"{stage.tokens:,} tokens over all ranks, {step:,} a step and rank"
    if stage.until_learned_coverage is not None:
        ends += f", or learned coverage above {stage.until_learned_coverage:g} in every layer"
    attention = (
        "full attention" if stage.kind == "warmup" else f"top-{recipe.sparsity.top_k} blocks"
    )
    return f"{attention}; trains {trains}; ends after {ends}"


def _words(values: list[Any]) -> str:
    return " ".join(str(value) for value in values)
