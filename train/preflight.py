"""What a run will cost and whether it can work, without training: `dense2sparse preflight RECIPE`.

Checked for real: the recipe, the checkpoint and its shards, the tokenizer, the geometry, that the
data holds enough rows, what the benchmarks' prompts are made of, the disk. Computed: parameters,
FLOPs, memory for weights, gradients and optimizer. Projected, and labelled so: hours, and the memory
of activations. `--probe` also runs the recipe's oracle probe.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..recipes.load import RecipeError, fingerprint, load, zero_stage

if TYPE_CHECKING:
    from .sizes import Sizes

_ASSUMED_UTILISATION = 0.35
"""Share of the peak that the projection of hours assumes; a guess until steps are timed."""
_GIB = 2**30


def main(arguments: list[str] | None = None) -> int:
    """Entry point; 0 if the run can work, 2 with one sentence if not."""
    parser = argparse.ArgumentParser(prog="dense2sparse preflight", description=__doc__)
    parser.add_argument("recipe", help="YAML recipe")
    parser.add_argument("overrides", nargs="*", help="a.b=value")
    parser.add_argument("--ranks", type=int, default=None, help="devices; default those found here")
    parser.add_argument("--probe", action="store_true", help="run the recipe's oracle probe too")
    options = parser.parse_intermixed_args(arguments)
    try:
        recipe = load(options.recipe, options.overrides)
        for line in report(recipe, ranks=options.ranks):
            print(line, flush=True)
        if options.probe:
            probe(recipe)
    except (RecipeError, ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def report(recipe: Any, *, ranks: int | None = None) -> list[str]:
    """Check everything that can be checked before training and describe the run, line by line.

    Args:
        ranks: number of devices; None takes the GPUs of this machine, or one CPU rank.

    Raises:
        ValueError: the first thing that cannot work.
    """
    import torch

    from ..eval.checks import check_stages, read_sources
    from .start import find_original

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    ranks = ranks or max(1, torch.cuda.device_count())
    original = find_original(recipe)
    sizes, tokenizer, window = _read(recipe, original)
    check_stages(recipe, window)
    lines = [
        f"checkpoint   {original}",
        f"parameters   {sizes.backbone / 1e6:,.1f} M backbone, {sizes.index / 1e6:,.2f} M index branch",
        f"geometry     {len(sizes.sparse_layers)} of {sizes.layers} layers sparse, index width "
        f"{sizes.index_dim}, {recipe.sparsity.top_k} blocks of {recipe.sparsity.block_size} tokens a query",
        f"ranks        {ranks}, ZeRO stage {zero_stage(recipe)}, {recipe.train.precision}",
    ]
    lines += _data_lines(recipe, tokenizer, ranks)
    lines += [f"prompts      {said}" for said in read_sources(recipe, tokenizer, window)]
    lines += _stage_lines(recipe, sizes, ranks, device)
    return lines + _disk_lines(recipe, sizes)


def _read(recipe: Any, original: Path) -> tuple[Sizes, Any, int | None]:
    """Sizes of the converted model, the tokenizer and the model's window, without the weights."""
    from transformers import AutoConfig, AutoTokenizer

    from ..model.original import check_rows, positions
    from ..model.source import check_tokenizer
    from .sizes import converted_sizes
    from .start import read_part

    config = read_part(f"the config of {original}", AutoConfig.from_pretrained, original)
    tokenizer = read_part(f"the tokenizer of {original}", AutoTokenizer.from_pretrained, original)
    check_tokenizer(tokenizer, config)
    window = positions(config)["window"]
    check_rows(recipe, window)
    return converted_sizes(config, recipe.sparsity, name=str(original)), tokenizer, window


def _training(recipe: Any) -> list[tuple[int, Any]]:
    return [(n, s) for n, s in enumerate(recipe.stages) if s.kind in ("warmup", "sparse")]


def _data_lines(recipe: Any, tokenizer: Any, ranks: int) -> list[str]:
    """Open the data of every training stage and read one batch."""
    from ..data.loader import RowLoader

    lines = []
    for number, stage in _training(recipe):
        row_len = stage.row_len or recipe.data.row_len
        loader = RowLoader(
            recipe.data.sources,
            tokenizer,
            row_len=row_len,
            micro_batch_size=stage.micro_batch_size,
            seed=recipe.train.seed,
            rank=0,
            world_size=ranks,
            cache_dir=recipe.data.cache_dir,
        )
        batch = next(loader)
        documents = int(batch.document_ids.max()) + 1
        lines.append(
            f"data         stage {number}: rows of {row_len} tokens, first batch read "
            f"({documents} documents in its fullest row)"
        )
        loader.close()
    lines += _heldout_lines(recipe, tokenizer)
    return lines


def _heldout_lines(recipe: Any, tokenizer: Any) -> list[str]:
    """Read as many held-out rows of each length as the stage that wants most of them.

    Raises:
        ValueError: the held-out text holds fewer.
    """
    from ..data.loader import heldout_rows

    if not recipe.data.heldout:
        return []
    wanted: dict[int, int] = {}
    for stage in recipe.stages:
        if stage.kind in ("probe", "perplexity"):
            row_len, count = recipe.data.row_len, stage.rows
        elif stage.kind in ("warmup", "sparse"):
            row_len, count = stage.row_len or recipe.data.row_len, recipe.train.measure_rows
        else:
            continue
        wanted[row_len] = max(count, wanted.get(row_len, 0))
    lines = []
    for row_len, count in wanted.items():
        rows = heldout_rows(
            recipe.data.heldout,
            tokenizer,
            row_len=row_len,
            count=count,
            cache_dir=recipe.data.cache_dir,
        )
        lines.append(f"held-out     {len(rows)} rows of {row_len} tokens read")
    return lines


def _stage_lines(recipe: Any, sizes: Sizes, ranks: int, device: Any) -> list[str]:
    """Tokens, FLOPs, memory and projected time of each training stage."""
    from .flops import flops_per_token, peak_flops

    peak = peak_flops(device, recipe.train.precision)
    lines, hours = [], 0.0
    for number, stage in _training(recipe):
        row_len = stage.row_len or recipe.data.row_len
        rows = stage.micro_batch_size * stage.gradient_accumulation * ranks
        steps = stage.steps or -(-stage.tokens // (rows * row_len))
        tokens = steps * rows * row_len
        frozen = stage.backbone_lr is None
        mode = "warmup" if stage.kind == "warmup" else "sparse"
        flops = tokens * flops_per_token(
            sizes.cost, mode=mode, frozen=frozen, visible_keys=(row_len + 1) / 2
        )
        state, activations = memory_gib(recipe, stage, sizes, ranks)
        lines.append(
            f"stage {number:<6} {stage.kind}: {steps:,} steps, {tokens:,} tokens, {flops:.2e} FLOPs; "
            f"per rank {state:.2f} GiB weights, gradients and optimizer, projected {activations:.2f} GiB "
            "activations"
        )
        if peak is not None:
            hours += flops / (peak * _ASSUMED_UTILISATION * ranks) / 3600
    if peak is None:
        lines.append("time         no projection: this GPU's peak is not in train/flops.py")
    else:
        lines.append(
            f"time         projected {hours:.2f} h of training on {ranks} rank(s) at "
            f"{_ASSUMED_UTILISATION:.0%} of {peak / 1e12:,.2f} TFLOP/s (a projection, not a measurement)"
        )
    return lines


def memory_gib(recipe: Any, stage: Any, sizes: Sizes, ranks: int) -> tuple[float, float]:
    """Memory of one rank: (weights, gradients and optimizer), (activations, a projection).

    Bytes a parameter: fp32 4 weight + 4 gradient + 8 Adam; bf16 2 weight + 2 gradient, and in the
    optimizer 4 master + 4 gradient + 8 Adam. ZeRO 1 splits the optimizer, 2 its gradients too, 3
    the weights too.
    """
    zero, is_bf16 = zero_stage(recipe), recipe.train.precision == "bf16"
    trained = sizes.index + (0 if stage.backbone_lr is None else sizes.backbone)
    every = sizes.index + sizes.backbone
    weight = (2 if is_bf16 else 4) * every / (ranks if zero == 3 else 1)
    gradient = (2 if is_bf16 else 4) * trained / (ranks if zero >= 2 else 1)
    optimizer = (16 if is_bf16 else 12 if zero else 8) * trained / (ranks if zero else 1)
    tokens = stage.micro_batch_size * (stage.row_len or recipe.data.row_len)
    width = 2 if is_bf16 else 4
    # About 34 hidden widths of values are kept a layer and token; one where they are recomputed.
    kept = 34 * sizes.layers
    if stage.backbone_lr is None:
        kept = 34 + 2 * len(sizes.sparse_layers)
    elif stage.activation_checkpointing:
        kept = sizes.layers + 34
    return (weight + gradient + optimizer) / _GIB, tokens * sizes.hidden * kept * width / _GIB


def _disk_lines(recipe: Any, sizes: Sizes) -> list[str]:
    """Disk the run needs beside the original checkpoint.

    Raises:
        ValueError: there is less than that.
    """
    every = sizes.index + sizes.backbone
    stages = _training(recipe)
    exports = 4 * every * (1 + len(stages))
    largest = max(
        (sizes.index + (0 if s.backbone_lr is None else sizes.backbone) for _, s in stages),
        default=0,
    )
    weight = 2 if recipe.train.precision == "bf16" else 4
    checkpoints = (recipe.train.keep_checkpoints + 1) * (12 + weight) * largest
    needed = (exports + checkpoints) / _GIB
    place = Path(recipe.output_dir).resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / _GIB
    if free < needed:
        raise ValueError(
            f"output_dir={recipe.output_dir!r} has {free:.1f} GiB free and the run needs {needed:.1f} GiB: "
            "make room, choose another output_dir, or lower train.keep_checkpoints"
        )
    return [f"disk         {needed:.2f} GiB needed under {place}, {free:.1f} GiB free"]


def probe(recipe: Any) -> None:
    """Run the recipe's probe stage in a folder of its own, beside the run's.

    Raises:
        ValueError: the recipe has no probe stage.
    """
    import torch

    from ..eval.commit import repository_commit
    from .context import RunContext
    from .evaluate import run_evaluation_stage
    from .loop import Position
    from .start import prepare_start
    from .stopping import StopRequests

    places = [n for n, stage in enumerate(recipe.stages) if stage.kind == "probe"]
    if not places:
        raise ValueError("--probe needs a stage of kind `probe` in the recipe: add one")
    run_dir = (
        Path(recipe.output_dir).resolve() / f"{recipe.name}-preflight-{fingerprint(recipe)[:8]}"
    )
    context = RunContext(
        recipe=recipe,
        run_dir=run_dir,
        fingerprint=fingerprint(recipe),
        commit=repository_commit(),
        rank=0,
        world_size=1,
        device=torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"),
        stop=StopRequests(run_dir / "STOP"),
        metrics=None,
        wandb_id="",
    )
    original, converted = prepare_start(context)
    run_evaluation_stage(
        context, places[0], original=original, converted=converted, position=Position()
    )
    print(f"probe        results in {run_dir / 'eval' / 'probe'}")


if __name__ == "__main__":
    sys.exit(main())
