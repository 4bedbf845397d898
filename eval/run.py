"""The evaluation stages of a recipe alone, on any converted checkpoint.

    dense2sparse eval RECIPE [a.b=c ...]                       on this machine's devices
    dense2sparse eval RECIPE --checkpoint FOLDER [--output FOLDER]

The command starts this module once, or through the DeepSpeed launcher; ranks share the prompts.

Without `--checkpoint` the run's newest checkpoint is measured by the stages that stand right behind it in
the recipe, and results go to the run's folder, whose recipe it must be (or name a folder with `--output`).
With it, every evaluation stage measures that checkpoint, and results go to a folder of their own.

Every number is in the stages' results; wandb gets them in a run of its own, job type `evaluation`, at
the tokens that the checkpoint was trained for.

The recipe is checked before torch is imported. Exit codes: 0 done, 2 a mistake of the user, 75 asked to
stop; what was answered is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..recipes.load import first_difference, load, resolved
from .errors import sentence

if TYPE_CHECKING:
    from .context import EvalContext
    from .wandb_evaluation import Shown

EVALUATIONS = ("probe", "perplexity", "ruler", "longbench")
TRAININGS = ("warmup", "sparse")
_BAD_INPUT, _STOPPED = 2, 75
_DECIDES_RESULTS = ("model", "sparsity", "data", "stages", "train.precision")
_DECIDES_NOTHING = ("data.cache_dir",)
_SECONDS_FOR_RANK_0 = 3
"""Rank 0 usually has the same to say; it ends first and takes this process along."""
_LONGEST_WAIT = timedelta(hours=12)
"""How long ranks that are done wait for the slowest; an evaluation has no collective in between."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; returns the exit code."""
    options = _parse(arguments)
    rank = int(os.environ.get("RANK", "0"))
    try:
        recipe = load(options.recipe, options.overrides)
        if options.checkpoint:
            converted, trained = options.checkpoint.resolve(), None
        else:
            run_dir = Path(recipe.output_dir).resolve() / recipe.name
            if not options.output:
                check_same_recipe(run_dir, recipe)
            converted, trained = newest_checkpoint(run_dir)
        numbers = stages_to_run(recipe, trained)
        run_stages(_context(recipe, options, converted, numbers), numbers)
    except (ValueError, OSError) as error:
        said = sentence(error)
        if said is None:
            raise
        if rank:
            time.sleep(_SECONDS_FOR_RANK_0)
        where = f" on rank {rank}" if rank else ""
        print(f"error{where}: {said}", file=sys.stderr, flush=True)
        return _BAD_INPUT
    if options.mark and os.environ.get("LOCAL_RANK", "0") == "0":
        options.mark.parent.mkdir(parents=True, exist_ok=True)
        options.mark.touch()
    return 0


def run_stages(context: EvalContext, numbers: Sequence[int]) -> None:
    """The evaluation stages with these places in the recipe, then the report; wandb gets all of it."""
    from . import stages

    shown = _start_wandb(context) if context.rank == 0 else None
    if shown is not None:
        context = replace(context, log=shown.log)
    failed = True
    try:
        for number in numbers:
            stage = context.recipe.stages[number]
            context.say(f"{number}-{stage.kind} begins")
            result = stages.run_stage(context, stage)
            if shown is not None:
                shown.stage(result, context.folder(stage.kind))
        files = stages.write_the_report(context)
        if shown is not None:
            shown.report(files)
        failed = False
    finally:
        if shown is not None:
            shown.run.finish(failed=failed)


def stages_to_run(recipe: Any, trained: int | None) -> list[int]:
    """Places of the evaluation stages to run.

    Args:
        trained: place of the training stage that made the checkpoint (-1: the start, before all of them);
            the stages between it and the next training stage are chosen. None: all of them.

    Raises:
        ValueError: there is none.
    """
    chosen = []
    begin = 0 if trained is None else trained + 1
    for number, stage in list(enumerate(recipe.stages))[begin:]:
        if stage.kind in EVALUATIONS:
            chosen.append(number)
        elif stage.kind in TRAININGS and trained is not None:
            break
    if not chosen:
        where = "" if trained is None else " behind the newest checkpoint"
        raise ValueError(
            f"the recipe has no evaluation stage{where}: add one of {', '.join(EVALUATIONS)} to it, "
            "or name a folder with --checkpoint"
        )
    return chosen


def newest_checkpoint(run_dir: Path) -> tuple[Path, int]:
    """The converted folder that the run's training has reached, and its stage's place (-1: the start).

    Raises:
        ValueError: the run has none yet.
    """
    from ..model.export import newest_weights  # imports torch

    try:
        found = newest_weights(run_dir)
    except ValueError as error:
        raise ValueError(
            f"{run_dir} has no converted checkpoint: run the recipe first, or name a folder with "
            "--checkpoint"
        ) from error
    number = found.parent.name.split("-")[0]
    return found, int(number) if number.isdigit() else -1


def check_same_recipe(run_dir: Path, recipe: Any, *, but: tuple[str, ...] = ()) -> None:
    """Refuse to write results of another recipe into a run's folder; `but`: sections that may differ.

    Raises:
        ValueError: one sentence with the first key that decides results and differs.
    """
    file = run_dir / "recipe.json"
    if not file.is_file():
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): start the run again") from error

    def counts(key: str) -> bool:
        return _decides(key) and key.split(".")[0] not in but

    different = first_difference(before, resolved(recipe), counts)
    if different is not None:
        raise ValueError(
            f"{run_dir} belongs to another recipe ({different}): give the recipe it was made with, or "
            "name another folder with --output"
        )


def check_own_folder(run_dir: Path, recipe: Any, checkpoint: str) -> None:
    """Refuse to put results into a folder of something else: its report would present both as one.

    Args:
        checkpoint: fingerprint of what is to be measured.

    Raises:
        ValueError: the folder is a training run's, or has results of another checkpoint, model, data or
            precision.
    """
    if (run_dir / "run.json").is_file() and run_dir != Path(
        recipe.output_dir
    ).resolve() / recipe.name:
        raise ValueError(
            f"--output {run_dir} is the folder of another run: name a folder of its own"
        )
    for file in sorted(run_dir.glob("eval/*/stage-*.json")):
        known = json.loads(file.read_text(encoding="utf-8")).get("checkpoint")
        if known not in (None, checkpoint):
            raise ValueError(
                f"{run_dir} holds results of another checkpoint ({known[:8]}, now {checkpoint[:8]}): name "
                "another folder with --output"
            )
    check_same_recipe(run_dir, recipe, but=("stages", "sparsity"))


def _decides(key: str) -> bool:
    """Whether results depend on a dotted key."""
    inside = any(f"{key}.".startswith(f"{name}.") for name in _DECIDES_RESULTS)
    return inside and key not in _DECIDES_NOTHING


def _context(
    recipe: Any, options: argparse.Namespace, converted: Path, numbers: Sequence[int]
) -> EvalContext:
    rank = int(os.environ.get("RANK", "0"))
    run_dir = Path(recipe.output_dir).resolve() / recipe.name
    if not (converted / "config.json").is_file():
        raise ValueError(
            f"--checkpoint {converted} holds no config.json: give a converted model's folder"
        )
    import torch
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    from ..model.convert import is_converted
    from ..model.original import check_positions, check_rows, positions
    from .checks import check_stages, read_sources
    from .context import EvalContext
    from .models import checkpoint_fingerprint

    logging.disable_progress_bar()  # one bar for every model that is loaded, between our own lines
    if not is_converted(converted):
        raise ValueError(
            f"{converted} is a dense model: convert it first, or give a converted folder"
        )
    checkpoint = checkpoint_fingerprint(converted)
    if options.output:
        run_dir = options.output.resolve()
    elif options.checkpoint:
        run_dir = run_dir.with_name(f"{recipe.name}-eval-{checkpoint[:8]}")
    own_folder = bool(options.checkpoint or options.output)
    if own_folder:
        check_own_folder(run_dir, recipe, checkpoint)
    device, barrier = _join_ranks(torch)
    original = _original(recipe, run_dir, rank, barrier)
    check_positions(original, converted)
    window = positions(AutoConfig.from_pretrained(original))["window"]
    check_rows(recipe, window)
    check_stages(recipe, window, numbers)
    precise = recipe.train.precision == "fp32"
    if rank == 0:
        tokenizer = AutoTokenizer.from_pretrained(original)
        for said in read_sources(recipe, tokenizer, window, numbers):
            print(said, flush=True)
        _describe(run_dir, recipe, own_folder=own_folder)
    return EvalContext(
        recipe=recipe,
        run_dir=run_dir,
        original=original,
        converted=converted,
        rank=rank,
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        device=device,
        dtype=torch.float32 if precise else torch.bfloat16,
        barrier=barrier,
        log=lambda values: None,
        state="checkpoint " + "/".join(converted.parts[-2:]) if options.checkpoint else None,
    )


def _start_wandb(context: EvalContext) -> Shown | None:
    from .commit import repository_commit
    from .models import checkpoint_fingerprint
    from .wandb_evaluation import start_alone

    return start_alone(
        context.recipe,
        context.run_dir,
        converted=context.converted,
        checkpoint=checkpoint_fingerprint(context.converted),
        commit=repository_commit(),
    )


def _join_ranks(torch: Any) -> tuple[Any, Callable[[], None]]:
    """This rank's device, and a barrier over all ranks."""
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device, lambda: None
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=_LONGEST_WAIT)
    return device, torch.distributed.barrier


def _original(recipe: Any, run_dir: Path, rank: int, barrier: Callable[[], None]) -> Path:
    """The dense checkpoint: the one the run began with, else found as the recipe says."""
    from ..model.original import find_original

    mark = run_dir / "start" / "done.json"
    if mark.is_file():
        known = Path(json.loads(mark.read_text(encoding="utf-8")).get("original", ""))
        if known.is_dir():
            return known
    if rank == 0:
        find_original(recipe)
    barrier()
    return find_original(recipe)


def _describe(run_dir: Path, recipe: Any, *, own_folder: bool) -> None:
    """Recipe and environment beside the results, where a training run has not written them.

    A folder of evaluations alone is described by the newest of them.
    """
    from importlib.metadata import version

    from .commit import repository_commit
    from .records import write_json

    newest = own_folder and not (run_dir / "run.json").is_file()
    if newest:
        _drop_stale(run_dir, recipe)
    if newest or not (run_dir / "recipe.json").is_file():
        write_json(run_dir / "recipe.json", resolved(recipe))
    if newest or not (run_dir / "environment.json").is_file():
        names = ("dense2sparse", "torch", "transformers")
        packages = {name: version(name) for name in names}
        date = datetime.now(UTC).isoformat(timespec="seconds")
        environment = {"date": date, "commit": repository_commit(), "packages": packages}
        write_json(run_dir / "environment.json", environment)


def _drop_stale(run_dir: Path, recipe: Any) -> None:
    """Remove results of stages that the recipe has not: answers stay, so they can be made again."""
    named = {f"{stage.kind}/stage-{number}.json" for number, stage in enumerate(recipe.stages)}
    for file in sorted(run_dir.glob("eval/*/stage-*.json")):
        if f"{file.parent.name}/{file.name}" not in named:
            print(f"removed {file}: the recipe has no such stage", flush=True)
            file.unlink()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dense2sparse eval", description=__doc__)
    parser.add_argument("recipe", help="YAML recipe")
    parser.add_argument("overrides", nargs="*", help="a.b=value")
    parser.add_argument(
        "--checkpoint", type=Path, help="converted folder; default the run's newest"
    )
    parser.add_argument("--output", type=Path, help="where results go")
    parser.add_argument(
        "--mark", type=Path, help="file that is made at the very end; the launcher looks for it"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0)
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    for asked in (signal.SIGTERM, signal.SIGINT):  # the wandb run is closed, and no traceback told
        signal.signal(asked, lambda number, frame: sys.exit(_STOPPED))
    sys.exit(main())
