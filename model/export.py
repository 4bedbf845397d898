"""`dense2sparse export RUN`: the newest weights of a run as one folder to use or to publish.

    dense2sparse export runs/quickstart --out smollm2-sparse --dtype bf16

The folder is what `model.convert.load` reads, and plain transformers loads it as the dense model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from .convert import is_converted, load, save

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one sentence for a mistake."""
    parser = argparse.ArgumentParser(prog="dense2sparse export", description=__doc__)
    parser.add_argument("source", type=Path, help="run folder, or a converted folder")
    parser.add_argument("--out", type=Path, help="folder to write; default SOURCE/export")
    parser.add_argument("--to", choices=["hf"], default="hf", help="format")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    options = parser.parse_args(arguments)
    out = options.out or options.source / "export"
    try:
        source = newest_weights(options.source)
        if out.exists():
            raise ValueError(f"{out} exists: name another folder with --out")
        export(source, out, DTYPES[options.dtype])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{source} -> {out} ({options.dtype})")
    return 0


def newest_weights(folder: Path) -> Path:
    """The converted folder itself, or that of a run's last finished training stage.

    Raises:
        ValueError: neither a converted folder nor a run that has begun.
    """
    if is_converted(folder):
        return folder
    marks = sorted(folder.glob("stages/*/done.json"), key=_stage_number)
    finished = [mark.parent / "hf" for mark in marks if is_converted(mark.parent / "hf")]
    if finished:
        return finished[-1]
    if is_converted(folder / "start" / "hf"):
        return folder / "start" / "hf"
    raise ValueError(
        f"{folder} holds no converted model: give a run folder such as runs/quickstart"
    )


def export(source: Path, out: Path, dtype: torch.dtype) -> None:
    """Write the model and its tokenizer; the folder appears whole or not at all."""
    model = load(source, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(source)
    save(model, out, also=tokenizer)


def _stage_number(mark: Path) -> int:
    number = mark.parent.name.split("-")[0]
    return int(number) if number.isdigit() else -1


if __name__ == "__main__":
    sys.exit(main())
