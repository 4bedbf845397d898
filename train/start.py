"""How a run begins: the dense checkpoint is found and converted once, into `start/hf`.

Rank 0 does the work, the others wait; `start/done.json` is written last. What is converted depends
on the recipe only (calibration rows come from the training data in the order of the seed), so a
start that was interrupted is simply made again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer

from ..data.loader import RowLoader
from ..eval.checks import check_stages, read_sources
from ..eval.errors import raised_here
from ..model import convert
from ..model.original import check_rows, find_original, positions
from ..model.source import check_tokenizer
from .checkpoint import CheckpointError
from .context import RunContext
from .files import read_json, sync_file, write_json


def prepare_start(context: RunContext) -> tuple[Path, Path]:
    """Find and convert the dense checkpoint if that is still to be done; every rank calls this.

    Returns:
        folder of the original dense model, and folder of its conversion.
    """
    mark = context.run_dir / "start" / "done.json"
    if context.rank == 0:
        done = read_json(mark)
        if done is None or not Path(done["original"]).is_dir():
            original = find_original(context.recipe)
            if done is None:
                _check_evaluation(context, original)
                _convert(context, original)
            write_json(mark, {"original": str(original), "commit": context.commit})
    context.barrier()
    done = read_json(mark)
    if done is None:
        raise ValueError(
            f"{mark} is not visible on rank {context.rank}: output_dir must be "
            "one path that all nodes share"
        )
    return Path(done["original"]), context.run_dir / "start" / "hf"


def _check_evaluation(context: RunContext, original: Path) -> None:
    """Refuse now what an evaluation stage would refuse after the training.

    Raises:
        ValueError: rows or prompts that do not fit the window, or a source that cannot be had.
    """
    config = read_part(f"the config of {original}", AutoConfig.from_pretrained, original)
    tokenizer = read_part(f"the tokenizer of {original}", AutoTokenizer.from_pretrained, original)
    window = positions(config)["window"]
    check_rows(context.recipe, window)
    check_stages(context.recipe, window)
    for said in read_sources(context.recipe, tokenizer, window):
        context.say(said)


def read_part(what: str, read: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """`read(*arguments, **options)`; what transformers refuses becomes one sentence, ours stay.

    Args:
        what: the part and its place, for the sentence: "the tokenizer of /models/x".

    Raises:
        ValueError: the first line of what transformers says, and what to do.
    """
    try:
        return read(*arguments, **options)
    except (ValueError, OSError, KeyError, TypeError, ImportError, StrictDataclassError) as error:
        if raised_here(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = f"{type(error).__name__}: {lines[0][:240]}" if lines else type(error).__name__
        raise ValueError(
            f"{what} cannot be read ({said}): copy the whole checkpoint folder again, or use one that "
            "the installed transformers knows"
        ) from None


def load_checked(original: Path) -> tuple[Any, Any]:
    """The dense model in float32 and its tokenizer, found to fit each other.

    Raises:
        ValueError: either cannot be read, or they do not fit.
    """
    tokenizer = read_part(f"the tokenizer of {original}", AutoTokenizer.from_pretrained, original)
    model = read_part(f"the model of {original}", convert.load_dense, original, dtype=torch.float32)
    check_tokenizer(tokenizer, model.config)
    return model, tokenizer


def calibration_rows(recipe: Any, tokenizer: Any) -> list[Any]:
    """The first training rows, one Batch each."""
    loader = RowLoader(
        recipe.data.sources,
        tokenizer,
        row_len=recipe.data.row_len,
        micro_batch_size=1,
        seed=recipe.train.seed,
        rank=0,
        world_size=1,
        cache_dir=recipe.data.cache_dir,
    )
    try:
        return list(islice(iter(lambda: next(loader), None), recipe.sparsity.calibration_rows))
    finally:
        loader.close()


def _convert(context: RunContext, original: Path) -> None:
    recipe = context.recipe
    context.say(f"converting {original}")
    model, tokenizer = load_checked(original)
    model.eval()
    if _fits(model, context.device):
        model.to(context.device)
    rows = _announced(context, calibration_rows(recipe, tokenizer))
    convert.convert(model, recipe.sparsity, rows, seed=recipe.train.seed)
    save_folder(model, tokenizer, context.run_dir / "start" / "hf")


def _fits(model: Any, device: torch.device) -> bool:
    """Whether a GPU has room to convert the float32 model; else the CPU does it, more slowly."""
    if device.type != "cuda":
        return False
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return torch.cuda.mem_get_info(device)[0] > 1.5 * size


def _announced(context: RunContext, rows: list[Any]) -> Iterator[Any]:
    """The rows, each with a line when it is asked for: converting takes minutes on CPU."""
    for number, row in enumerate(rows, start=1):
        context.say(f"conversion reads calibration row {number} of {len(rows)}")
        yield row


def save_folder(model: Any, tokenizer: Any, target: Path) -> None:
    """Write a converted model with its tokenizer and flush every file to the disk.

    Raises:
        CheckpointError: the disk is full or refuses; what was written is removed.
    """
    shutil.rmtree(target, ignore_errors=True)
    try:
        convert.save(model, target, also=tokenizer)
        for path in target.iterdir():
            if path.is_file():
                sync_file(path)
    except (OSError, SafetensorError) as error:
        for leftover in (target, target.with_name(f".{target.name}.partial")):
            shutil.rmtree(leftover, ignore_errors=True)
        first = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{target} could not be written ({first}): make room and start again, nothing else is lost"
        ) from None
