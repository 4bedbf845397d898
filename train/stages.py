"""One training stage from its starting weights to its export.

    stages/<n>-<kind>/hf/        full-precision weights; the next stage starts from them
    stages/<n>-<kind>/done.json  written last; a stage that has it is skipped

Checkpoints of a finished stage are removed: its export replaces them.
"""

from __future__ import annotations

import gc
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from ..data.loader import RowLoader, heldout_rows
from ..model import convert
from ..model.execution import Execution
from ..recipes.load import zero_stage
from . import checkpoint
from .context import RunContext, warn
from .engine import (
    deepspeed_config,
    masters,
    parameter_groups,
    set_checkpointing,
    start_engine,
    stop_engine,
)
from .files import read_json, write_json
from .flops import model_cost, peak_flops
from .loop import Position, StageLoop
from .losses import Objective, check_head
from .metrics import truncate
from .probe import ProbePrompts, TrainingProbe, probe_prompts
from .start import save_folder

TRAINING = ("warmup", "sparse")
"""Kinds of stage that train; the others evaluate."""


def row_len_of(recipe: Any, stage: Any) -> int:
    """Tokens per row of a training stage."""
    return stage.row_len or recipe.data.row_len


def num_steps_of(recipe: Any, stage: Any, world_size: int) -> int:
    """Optimizer steps of a stage at most; a token budget is rounded up to a step."""
    if stage.steps is not None:
        return stage.steps
    rows = stage.micro_batch_size * stage.gradient_accumulation * world_size
    return math.ceil(stage.tokens / (rows * row_len_of(recipe, stage)))


def run_training_stage(
    context: RunContext, index: int, *, source: Path, start: Position
) -> dict[str, Any]:
    """Run one training stage, or what is left of it; every rank calls this.

    Args:
        index: place in the recipe's list of stages.
        source: converted folder the stage starts from.
        start: where the run stood when the stage began (its `step` is 0).

    Returns:
        The content of the stage's `done.json`.
    """
    recipe, stage = context.recipe, context.recipe.stages[index]
    gc.collect()  # the engine of the stage before
    _seed(recipe.train.seed + index)
    if stage.activation_checkpointing and stage.backbone_lr is None:
        context.say(f"{context.label(index)}: a frozen backbone keeps no activations to recompute")
    prompts = probe_prompts(context, source)
    model = convert.load(source, dtype=torch.float32, execution=Execution.of(recipe.execution))
    check_head(model)
    set_checkpointing(model, stage)
    index_branch = convert.index_parameters(model)
    sparse_layers = convert.geometry_of(model).sparse_layers
    cost = model_cost(model, {name for name, _ in index_branch})
    engine = _engine(context, stage, model, index_branch)
    tokenizer = AutoTokenizer.from_pretrained(source)
    loader = _loader(context, index, tokenizer)
    position = Position(0, start.global_step, start.tokens)
    _resume(context, index, engine, loader, position)
    loop = StageLoop(
        engine=engine,
        stage=stage,
        train=recipe.train,
        loader=loader,
        heldout=_heldout(context, stage, tokenizer),
        label=context.label(index),
        stage_index=index,
        row_len=row_len_of(recipe, stage),
        num_steps=num_steps_of(recipe, stage, context.world_size),
        sparse_layers=sparse_layers,
        cost=cost,
        peak=peak_flops(context.device, recipe.train.precision),
        rank=context.rank,
        world_size=context.world_size,
        device=context.device,
        metrics=context.metrics,
        stop=context.stop,
        save=lambda at: _save(context, index, engine, loader, at),
        say=context.say,
        probe=_probe(context, engine, prompts),
    )
    with context.stop.at_step_boundaries():
        ended_by = loop.run(position)
        export(context, engine, source=source, target=context.stage_dir(index) / "hf")
        done = {
            "stage_index": index,
            "kind": stage.kind,
            "ended_by": ended_by,
            "steps": position.step,
            "global_step": position.global_step,
            "tokens": position.tokens,
            "seconds": round(position.seconds, 1),
            "world_size": context.world_size,
            "fingerprint": context.fingerprint_of(index),
            "commit": context.commit,
        }
        if context.rank == 0:
            write_json(context.stage_dir(index) / "done.json", done)
            checkpoint.prune(context.run_dir / "checkpoints", keep=0, stage_index=index)
        context.barrier()
    loader.close()
    stop_engine(engine)
    return done


def _seed(seed: int) -> None:
    """Seed every generator that a stage might draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _engine(context: RunContext, stage: Any, model: Any, index_branch: list[Any]) -> Any:
    recipe = context.recipe
    groups = parameter_groups(stage, index_branch, convert.backbone_parameters(model))
    config = deepspeed_config(
        recipe.deepspeed,
        zero_stage=zero_stage(recipe),
        precision=recipe.train.precision,
        stage=stage,
        world_size=context.world_size,
    )
    return start_engine(Objective(model), groups, config=config, betas=stage.betas)


def _probe(context: RunContext, engine: Any, prompts: ProbePrompts | None) -> TrainingProbe | None:
    if prompts is None:
        return None
    place = {"rank": context.rank, "world_size": context.world_size}
    return TrainingProbe(engine, prompts, device=context.device, **place)


def _loader(context: RunContext, index: int, tokenizer: Any) -> RowLoader:
    recipe, stage = context.recipe, context.recipe.stages[index]
    return RowLoader(
        recipe.data.sources,
        tokenizer,
        row_len=row_len_of(recipe, stage),
        micro_batch_size=stage.micro_batch_size,
        # Each stage reads the data in another order, so that it does not repeat the last one's rows.
        seed=recipe.train.seed + 1_000_003 * index,
        rank=context.rank,
        world_size=context.world_size,
        cache_dir=recipe.data.cache_dir,
    )


def _heldout(context: RunContext, stage: Any, tokenizer: Any) -> list[Any]:
    recipe = context.recipe
    if not recipe.data.heldout:
        if stage.until_learned_coverage is not None:
            raise ValueError(
                "until_learned_coverage is measured on held-out rows: name some in data.heldout"
            )
        return []
    return heldout_rows(
        recipe.data.heldout,
        tokenizer,
        row_len=row_len_of(recipe, stage),
        count=recipe.train.measure_rows,
        cache_dir=recipe.data.cache_dir,
    )


def _save(
    context: RunContext, index: int, engine: Any, loader: RowLoader, position: Position
) -> None:
    root = context.run_dir / "checkpoints"
    state = {
        "stage_index": index,
        "stage_step": position.step,
        "step": position.global_step,
        "tokens": position.tokens,
        "seconds": round(position.seconds, 1),
        "world_size": context.world_size,
        "fingerprint": context.fingerprint_of(index),
        "commit": context.commit,
        "wandb_id": context.wandb_id,
    }
    checkpoint.save(
        engine,
        root,
        step=position.global_step,
        state=state,
        rank_state={"loader": loader.state_dict()},
        frozen=context.recipe.stages[index].backbone_lr is None,
    )
    if context.rank == 0:
        checkpoint.prune(root, keep=context.recipe.train.keep_checkpoints, stage_index=index)
    context.barrier()


def _resume(
    context: RunContext, index: int, engine: Any, loader: RowLoader, position: Position
) -> None:
    """Continue at the stage's newest complete checkpoint, if it has one; moves `position` there."""
    root = context.run_dir / "checkpoints"
    found = checkpoint.newest(root, stage_index=index, warn=warn if context.rank == 0 else None)
    if found is not None:
        checkpoint.check_same_run(
            found.state, fingerprint=context.fingerprint_of(index), world_size=context.world_size
        )
        mine = checkpoint.load(engine, found)
        loader.load_state_dict(mine["loader"])
        checkpoint.restore_random_state(mine["random"])
        position.step = found.state["stage_step"]
        position.global_step = found.state["step"]
        position.tokens = found.state["tokens"]
        position.seconds = found.state["seconds"]
        context.say(f"{context.label(index)} continues at step {position.step}")
    if context.metrics is not None:
        context.metrics.reopen()
        truncate(
            context.metrics.path,
            stage_index=index,
            step=position.global_step if found is not None else -1,
        )
    context.barrier()


def export(context: RunContext, engine: Any, *, source: Path, target: Path) -> None:
    """Write the engine's float32 master weights as a converted folder; every rank calls this.

    Rank 0 reads the folder the stage started from and replaces every trained weight, so frozen ones
    keep their bytes; the other ranks only help to gather.
    """
    model = convert.load(source, dtype=torch.float32) if context.rank == 0 else None
    places = dict(model.named_parameters()) if model is not None else {}
    for name, value in masters(engine):
        if model is not None:
            places[name].data.copy_(value.to(places[name].device).view_as(places[name]))
    if model is not None:
        save_folder(model, AutoTokenizer.from_pretrained(source), target)
    context.barrier()


def read_done(context: RunContext, index: int) -> dict[str, Any] | None:
    """A finished stage's mark, or None."""
    return read_json(context.stage_dir(index) / "done.json")
