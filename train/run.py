"""One whole run: `deepspeed --module dense2sparse.train.run RECIPE [a.b=c ...]`.

The recipe is checked before torch is imported; a mistake in it is one sentence and exit code 2.
Then the stages run in order, each leaving `stages/<n>-<kind>/done.json`, so that the same command
again continues where the run stood.

Exit codes: 0 done, 2 a mistake of the user, 75 asked to stop and resumable, 1 failed.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..eval.errors import raised_here
from ..recipes.load import RecipeError, fingerprint, load, resolved
from .identity import check_same_identity

if TYPE_CHECKING:
    from .context import RunContext

BAD_RECIPE, FAILED = 2, 1
_DISK_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of every rank; always leaves through `_exit`."""
    options = _parse(arguments)
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        recipe = load(options.recipe, options.overrides)
        run_dir = Path(recipe.output_dir).resolve() / recipe.name
        check_same_identity(run_dir, recipe, world_size=world_size)
    except (RecipeError, ValueError, OSError) as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        _exit(BAD_RECIPE)
    _run_and_exit(recipe, run_dir, rank)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dense2sparse.train.run", description=__doc__)
    parser.add_argument("recipe", help="YAML recipe")
    parser.add_argument("overrides", nargs="*", help="a.b=value")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None)
    return parser.parse_intermixed_args(arguments)


def _exit(code: int) -> NoReturn:
    """Leave at once: interpreter shutdown can hang in a communication thread."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run_and_exit(recipe: Any, run_dir: Path, rank: int) -> NoReturn:
    """Run, tell what went wrong, leave with the right code."""
    from .stopping import Stopped

    context: RunContext | None = None
    code = FAILED
    try:
        context = open_run(recipe, run_dir)
        run_stages(context)
        code = 0
    except Stopped as stopped:
        code = int(stopped.code or 0)
        if context is not None and context.rank == 0:
            context.stop.consume_file()
            context.say("stopped; the same command continues")
    except BaseException as error:
        code = _explain(error, rank)
    try:
        if context is not None and context.metrics is not None:
            context.metrics.close(failed=code == FAILED)
        if code == 0:
            _leave_group()
    finally:
        _exit(code)


def _explain(error: BaseException, rank: int) -> int:
    """Print one sentence for a user's mistake and the traceback of anything else; the exit code."""
    import traceback

    from .checkpoint import CheckpointError

    if rank:
        # Rank 0 usually has the same to say; it ends first and takes this process along.
        time.sleep(3)
    prefix = f"error on rank {rank}: " if rank else "error: "
    if isinstance(error, CheckpointError):
        print(f"{prefix}{error}", file=sys.stderr)
        return FAILED
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        place = f" at {error.filename}" if error.filename else ""
        print(f"{prefix}{error.strerror}{place}: make room and start again", file=sys.stderr)
        return FAILED
    if isinstance(error, ValueError) and raised_here(error):
        print(f"{prefix}{error}", file=sys.stderr)
        return BAD_RECIPE
    traceback.print_exception(error)
    return FAILED


def _leave_group() -> None:
    """Close the process group on success; without it gloo's threads abort at random."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def open_run(recipe: Any, run_dir: Path) -> RunContext:
    """Start torch.distributed, make the run's folder and its records; every rank calls this."""
    import torch
    import transformers

    from ..eval.commit import repository_commit
    from ..eval.wandb_run import start_wandb
    from .context import RunContext
    from .engine import init_distributed
    from .environment import write_environment
    from .files import read_json, write_json
    from .identity import RUN_FILE
    from .metrics import Metrics
    from .stopping import StopRequests

    transformers.utils.logging.disable_progress_bar()
    stop = StopRequests(run_dir / "STOP")
    stop.install()
    _single_process_defaults()
    device = _device()
    init_distributed()
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mark, commit = fingerprint(recipe), repository_commit()
    metrics, wandb_id = None, ""
    if rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        if stop.consume_file():
            print("removed a STOP file from before this start", flush=True)
        known = read_json(run_dir / RUN_FILE)
        wandb_id = known["wandb_id"] if known else os.urandom(4).hex()
        # The recipe goes first: a fingerprint must never stand beside an older recipe.
        write_json(run_dir / "recipe.json", resolved(recipe))
        identity = {"fingerprint": mark, "world_size": world_size, "wandb_id": wandb_id}
        write_json(run_dir / RUN_FILE, identity)
        write_environment(run_dir / "environment.json", world_size=world_size, commit=commit)
        run = start_wandb(
            recipe.wandb,
            name=recipe.name,
            run_id=wandb_id,
            run_dir=run_dir,
            config={**resolved(recipe), "commit": commit, "world_size": world_size},
        )
        metrics = Metrics(run_dir / "metrics.jsonl", wandb=run)
    context = RunContext(
        recipe=recipe,
        run_dir=run_dir,
        fingerprint=mark,
        commit=commit,
        rank=rank,
        world_size=world_size,
        device=device,
        stop=stop,
        metrics=metrics,
        wandb_id=wandb_id,
    )
    context.barrier()
    return context


def _single_process_defaults() -> None:
    """Let one process run without a launcher."""
    if "RANK" not in os.environ:
        import socket

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def _device() -> Any:
    """This rank's device: its GPU, or the CPU."""
    import torch
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cuda":
        if "OMP_NUM_THREADS" not in os.environ:  # ranks of one machine share its cores
            ranks = int(os.environ.get("LOCAL_SIZE") or os.environ["WORLD_SIZE"])
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def run_stages(context: RunContext) -> None:
    """Run every stage that is not done yet, then write `finished.json`."""
    from .checkpoint import prune
    from .evaluate import run_evaluation_stage
    from .files import write_json
    from .loop import Position
    from .stages import TRAINING, read_done, run_training_stage
    from .start import prepare_start

    original, weights = prepare_start(context)
    position = Position()
    for index, stage in enumerate(context.recipe.stages):
        done = read_done(context, index)
        if stage.kind in TRAINING:
            if done is None:
                done = run_training_stage(context, index, source=weights, start=position)
            elif context.rank == 0:  # killed between the stage's mark and this
                prune(context.run_dir / "checkpoints", keep=0, stage_index=index)
            weights = context.stage_dir(index) / "hf"
            position = Position(0, done["global_step"], done["tokens"])
        elif done is None:
            run_evaluation_stage(
                context, index, original=original, converted=weights, position=position
            )
    if context.rank == 0:
        labels = [context.label(index) for index in range(len(context.recipe.stages))]
        finished = {
            "fingerprint": context.fingerprint,
            "stages": labels,
            "commit": context.commit,
        }
        write_json(context.run_dir / "finished.json", finished)
        context.say(f"finished: {context.run_dir}")
    context.barrier()


if __name__ == "__main__":
    main()
