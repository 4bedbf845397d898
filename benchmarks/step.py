"""Training steps of whole models: tokens/s, MFU, memory and where the time goes, on one GPU.

    python benchmarks/step.py --preset second --json step.json     0.6B at 32K tokens, 2 minutes
    python benchmarks/step.py --preset full --json step.json       0.6B and layers of 4B, to 128K tokens
    python benchmarks/step.py --sizes 4B --lengths 32K --modes dense sparse --layers 12
    python benchmarks/step.py --dry                                on a CPU, interpreted, no speed

Four modes: dense; warmup frozen (full attention, KL, no backbone gradients); warmup trained; sparse.
Weights are random, modules are the package's own (step_model.py). A mode whose gradients through Triton
differ from those through torch gets no speed. With --json the measuring process is a child: where a kernel
hangs or breaks the device, another goes on. The file and the GPU hours projected from it: README.md here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_guard import UNFINISHED, at_most, begun, device_works, earlier, leave, supervise

CASE_S = 120.0
"""A case that takes longer, compilation included, hangs."""
PRESETS: dict[str, dict[str, Any]] = {
    "second": {"sizes": ["0.6B"], "lengths": ["32K"], "budget_s": 4.0},
    "full": {"sizes": ["0.6B", "4B"], "lengths": ["8K", "32K", "128K"], "budget_s": 6.0},
    "dry": {"sizes": ["tiny"], "lengths": ["56"], "budget_s": 0.0},
}
LAYERS = {"4B": 12}
"""Of which models only a part is run."""
Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 if a case failed; 2 for options that cannot be."""
    options = _options(arguments)
    if options.table is not None:
        found = json.loads(options.table.read_text())
        print(table(found["results"], found["projected"]))
        return 0
    if arguments is None and not options.dry and options.json is not None:
        code = supervise()
        if code is not None:
            return code
    if options.dry:
        # Triton reads it where a kernel is defined: before the modules below are imported.
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if not options.dry and not torch.cuda.is_available():
        print("no CUDA device here: use --dry to see that everything runs", file=sys.stderr)
        return 2
    return _measure(options)


def _measure(options: argparse.Namespace) -> int:
    import torch
    from bench_record import environment
    from step_model import MODES, SIZES
    from step_projection import projections
    from step_run import Runner, cases

    device = torch.device("cpu" if options.dry else "cuda")
    dtype = torch.float32 if options.dry else torch.bfloat16  # bf16 is wrong in the interpreter
    sizes = [SIZES[name] for name in options.sizes]
    parts = {**LAYERS, **dict.fromkeys(options.sizes if options.layers else (), options.layers)}
    sizes = [size.part(parts[size.name]) if size.name in parts else size for size in sizes]
    planned = cases(
        sizes, [_tokens(text) for text in options.lengths], options.modes or list(MODES)
    )
    speed = not (options.dry or options.check)
    runner = Runner(device, dtype, options.budget_s, options.data, speed, options.check)
    records, about = earlier(options.json, options.go_on), environment()
    for case in planned:
        if any(
            all(record[name] == value for name, value in case.key.items()) for record in records
        ):
            continue
        if time.time() > begun() + options.total_s:
            print("the time is over: what follows is left out", flush=True)
            break
        pending = {**case.key, "failed": True, "said": UNFINISHED}
        _write(options, about, [*records, pending], [])
        with at_most(None if options.dry else CASE_S):
            record = runner.run(case)
        records.append(record)
        print(_line(record), flush=True)
        _write(options, about, records, projections(records))
        if not device_works(runner.device.type):
            if options.json is not None:
                leave()
            break
    print(table(records, projections(records)))
    return 1 if any(record["failed"] for record in records) else 0


def table(records: Sequence[Record], projected: Sequence[Record]) -> str:
    """What was measured, where the time went, and the projected hours, for reading."""
    timed = [record for record in records if "tokens_per_s" in record]
    if not timed:
        return "no speed" if records else "nothing was measured"
    lines = [_line(record) for record in timed]
    lines += ["", "share of the device's time, per cent"]
    for record in timed:
        named = [f"{name} {100 * value:.1f}" for name, value in record["shares"].items() if value]
        lines.append(f"{_name(record)}  {', '.join(named)}")
    lines += [
        "",
        "GPU hours, projected for this GPU from the steps above, communication not included",
    ]
    for entry in projected:
        hours = entry["gpu_hours"]
        shown = entry["said"] if hours is None else f"{hours:10.1f} h  {entry['said']}"
        lines.append(f"{entry['recipe']:14} {entry['stage']:10} {shown}")
    lines += [_line(record) for record in records if "tokens_per_s" not in record]
    return "\n".join(lines)


def _name(record: Record) -> str:
    return f"{record['size']:5} {record['length']:>7} {record['mode']:14}"


def _line(record: Record) -> str:
    """A record for reading."""
    if "tokens_per_s" not in record:
        return f"{_name(record)}  {'FAILED ' if record['failed'] else ''}{record['said']}"
    mfu = record["mfu_pct"]
    shown = f"{record['step_ms']:9.1f} ms {record['tokens_per_s']:9.0f} tokens/s"
    shown += "" if mfu is None else f"  MFU {mfu:4.1f} %"
    shown += f"  {record['peak_gib']:6.1f} GiB"
    if record["layers"] != record["of_layers"]:
        whole = record["tokens_per_s_whole_model"]
        shown += f"  {record['layers']} of {record['of_layers']} layers; all: {whole:.0f} tokens/s"
    return f"{_name(record)} {shown}"


def _write(
    options: argparse.Namespace,
    about: Record,
    records: Sequence[Record],
    projected: Sequence[Record],
) -> None:
    if options.json is None:
        return
    from bench_record import write

    content = {
        "schema": 1,
        "gpu": about.get("gpu"),
        "environment": about,
        "dry": options.dry,
        "seconds": round(time.time() - begun(), 1),
        "optimizer": "torch AdamW on float32 masters, one GPU, no DeepSpeed",
        "results": list(records),
        "projected": list(projected),
    }
    write(options.json, content)


def _tokens(text: str) -> int:
    """'128K' is 131072."""
    return int(text[:-1]) << 10 if text[-1] in "kK" else int(text)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--preset", choices=["second", "full"], default="full")
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU, interpreted")
    parser.add_argument("--sizes", nargs="+", choices=["0.6B", "4B", "tiny"])
    parser.add_argument("--layers", type=int, help="run so many layers of each model")
    parser.add_argument("--lengths", nargs="+", help="tokens of a row: 8K 32K 128K")
    parser.add_argument(
        "--modes", nargs="+", choices=["dense", "sparse", "warmup frozen", "warmup trained"]
    )
    parser.add_argument(
        "--data", choices=["model", "random"], default="model", help="what selections look like"
    )
    parser.add_argument("--budget-s", type=float, help="seconds for timing one case")
    parser.add_argument(
        "--total-s", type=float, default=float("inf"), help="then begin nothing new"
    )
    parser.add_argument(
        "--continue", dest="go_on", action="store_true", help="measure what --json lacks"
    )
    parser.add_argument("--check", action="store_true", help="compare gradients only")
    parser.add_argument("--json", type=Path, help="results, with hardware and versions")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print a file of --json")
    options = parser.parse_args(arguments)
    if options.check:
        options.lengths = options.lengths or ["4K"]
    for key, value in PRESETS["dry" if options.dry else options.preset].items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    try:
        [_tokens(text) for text in options.lengths]
    except ValueError:
        parser.error(f"--lengths {' '.join(options.lengths)}: lengths look like 8K or 20000")
    return options


if __name__ == "__main__":
    sys.exit(main())
