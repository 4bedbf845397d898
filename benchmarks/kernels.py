"""Every kernel and the whole sparse layer against the best dense attention, on this machine.

    python benchmarks/kernels.py --preset full --json kernels.json --plot kernels.svg
    python benchmarks/kernels.py --heads 64/4 --lengths 128K 1M --only dense select sparse layer
    python benchmarks/kernels.py --sweep --only sparse --heads 32/8 --lengths 128K   launch values compared
    python benchmarks/kernels.py --check                                             correctness only
    python benchmarks/kernels.py --dry                                               on a CPU, no speed
    python benchmarks/kernels.py --profile profile.txt --json kernels.json           kernels of the slowest

With --json the measuring process is a child: where a kernel hangs or breaks the device, another goes on.

Each result is checked against the float64 definition on sampled rows before it is timed; one that is wrong
gets no speed, and the exit code is 1. What is measured: bench_operations.py. The file: README.md here.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_guard import begun, earlier, leave, supervise

PRESETS: dict[str, dict[str, Any]] = {
    # The two calls of gpu.sh for a GPU that is lent for minutes.
    "first": {
        "heads": ["64/4", "32/8"],
        "lengths": ["32K", "128K", "1M"],
        "only": ["dense", "select", "sparse", "layer", "decode dense", "decode"],
        "data": ["model"],
        "without": ["flex attention", "flash-msa", "torch matmul, max, topk", "torch topk alone"],
        "budget_s": 0.25,
    },
    "second": {
        "heads": ["64/4", "32/8"],
        "lengths": ["32K", "128K"],
        "only": [
            "dense training",
            "sparse backward",
            "sparse kl",
            "training layer",
            "kl",
            "warmup trained",
            "warmup frozen",
        ],
        "data": ["model"],
        "without": ["triton quarter", "sdpa flash"],
        "budget_s": 0.3,
    },
    "full": {
        "heads": ["64/4", "32/8", "16/8", "28/4", "9/3"],
        "lengths": ["8K", "16K", "32K", "64K", "128K", "1M"],
        "data": ["model", "random"],
        "without": [],
        "budget_s": 0.5,
        "compiled_at": "32K",
        "train_up_to": "128K",
    },
    # Ragged last blocks and lengths with and without a choice.
    "check": {
        "heads": ["64/4", "32/8", "16/8", "28/4", "9/3"],
        "lengths": ["1000", "8K", "20001"],
        "data": ["model", "random"],
        "without": ["flex attention"],
        "budget_s": 1.0,
    },
    "dry": {
        "heads": ["6/2x16"],
        "lengths": ["52"],
        "data": ["model"],
        "without": [],
        "budget_s": 0.0,
    },
}
"""What the options are where they are not given."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 if a check of ours failed; 2 for options that cannot be."""
    options = _options(arguments)
    measures = not (options.dry or options.profile)
    if arguments is None and measures and options.json is not None:
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
    if options.profile is not None and not options.dry:
        from bench_profile import profile_timed

        return profile_timed(options.json, options.only, options.profile)
    return _sweep(options) if options.sweep else _measure(options)


def _measure(options: argparse.Namespace) -> int:
    import torch
    from bench_chart import chart
    from bench_record import environment, write
    from bench_report import break_even, summary
    from bench_run import Plan, Runner
    from bench_timing import Bench, ceilings

    device = torch.device("cpu" if options.dry else "cuda")
    dtype = torch.float16 if options.dry else torch.bfloat16  # bf16 is wrong in the interpreter
    bench = Bench(device, options.budget_s)
    speed = not (options.dry or options.check)
    found = ceilings(bench) if speed else None
    if found is not None:
        print(
            f"this machine: {found.flops / 1e12:.0f} TFLOP/s bf16, {found.fp8_flops / 1e12:.0f} fp8, "
            f"{found.bytes_per_s / 1e9:.0f} GB/s",
            flush=True,
        )
    about = environment()

    def save(records: list[dict[str, Any]]) -> None:
        record = {
            "schema": 1,
            "gpu": about.get("gpu"),
            "environment": about,
            "dry": options.dry,
            "ceilings": None if found is None else vars(found),
            "seconds": round(time.time() - begun(), 1),
            "break_even": break_even(records),
            "results": records,
        }
        if options.json is not None:
            write(options.json, record)
        if options.plot is not None:
            gpu = about.get("gpu") or {"name": "dry run: no speed"}
            title = f"{gpu['name']}, {about['date'][:10]}, {about['commit'][:12]}"
            options.plot.write_text(chart(records, title))

    plan = Plan(
        shapes=_shapes(options),
        data=options.data,
        only=options.only,
        without=options.without,
        ours_only=options.ours,
        selection=options.selection,
        speed=speed,
        seed=options.seed,
        compiled_at=None if options.compiled_at is None else _length(options.compiled_at),
        train_up_to=None if options.train_up_to is None else _length(options.train_up_to),
        ends_at=begun() + options.total_s,
    )
    runner = Runner(
        plan,
        bench,
        found,
        dtype,
        say=lambda text: print(text, flush=True),
        saved=save if options.json is not None else lambda records: None,
        lost=leave if options.json is not None and bench.cuda else lambda: None,
        records=earlier(options.json, options.go_on),
    )
    fine = runner.run()
    save(runner.records)
    print("dry: no speed" if options.dry else summary(runner.records))
    if options.dry and options.profile is not None:
        from bench_profile import profile_dry

        profile_dry(options.profile)
    return 0 if fine else 1


def _sweep(options: argparse.Namespace) -> int:
    import torch
    from bench_record import environment, write
    from bench_sweep import sweep
    from bench_timing import Bench

    device = torch.device("cpu" if options.dry else "cuda")
    dtype = torch.float16 if options.dry else torch.bfloat16
    about = environment()

    def save(entries: list[dict[str, Any]]) -> None:
        if options.json is not None:
            write(options.json, {"schema": 1, "environment": about, "sweep": entries})

    sweep(
        _shapes(options),
        options.data[0],
        options.only,
        Bench(device, options.budget_s),
        dtype,
        first=options.most or (3 if options.dry else None),
        part=_part(options.part),
        ends_at=begun() + options.total_s,
        saved=save,
        earlier=earlier(options.json, options.go_on, "sweep"),
    )
    if options.dry:
        print("dry: no speed")
    return 0


def _shapes(options: argparse.Namespace) -> list[Any]:
    from bench_data import Shape

    found = []
    # What was fastest before is used at 1M; the shortest rows count least, if time runs out.
    ascending = sorted(map(_length, options.lengths))
    for length in [*ascending[1:], ascending[0]]:
        for heads, groups, width in map(_layout, options.heads):
            size = {"block_size": options.block_size, "top_k": options.top_k}
            index_width = 16 if options.dry else 128
            found.append(
                Shape(
                    length,
                    heads,
                    groups,
                    width,
                    **size,
                    index_width=index_width,
                    batch=options.batch,
                )
            )
    return found


def _layout(text: str) -> tuple[int, int, int]:
    """'64/4' or '9/3x64': heads, groups and width (64 for 9/3, else 128, where not given)."""
    layout, _, width = text.partition("x")
    heads, groups = (int(part) for part in layout.split("/"))
    if groups < 1 or heads % groups:
        raise ValueError(f"--heads {text}: query heads must be a multiple of the groups")
    return heads, groups, int(width) if width else (64 if layout == "9/3" else 128)


def _length(text: str) -> int:
    """'128K' is 131072."""
    factor = {"K": 1 << 10, "M": 1 << 20}.get(text[-1].upper())
    return int(text) if factor is None else int(text[:-1]) * factor


def _part(text: str) -> tuple[int, int]:
    """'2/4' is the second of four parts: (1, 4)."""
    number, _, count = text.partition("/")
    if not 1 <= int(number) <= int(count):
        raise ValueError(f"--part {text}: parts are counted from 1/N to N/N")
    return int(number) - 1, int(count)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--preset", choices=["first", "second", "full"], default="full")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, interpreted")
    parser.add_argument("--check", action="store_true", help="correctness only")
    parser.add_argument("--sweep", action="store_true", help="compare launch values")
    parser.add_argument(
        "--profile", type=Path, metavar="FILE", help="profile --only, or the slowest, of --json"
    )
    parser.add_argument("--heads", nargs="+", help="64/4, or 9/3x64 with the width")
    parser.add_argument("--lengths", nargs="+", help="tokens: 8K 128K 1M 20001")
    parser.add_argument("--only", nargs="+", help="operations (bench_operations.py)")
    parser.add_argument("--ours", action="store_true", help="leave out what others offer")
    parser.add_argument("--without", nargs="*", help="implementations to leave out")
    parser.add_argument("--data", nargs="+", choices=["model", "random", "stored"])
    parser.add_argument("--selection", type=Path, help="tensors of unions.py --save, data 'stored'")
    parser.add_argument("--block-size", type=int)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--budget-s", type=float, help="seconds for timing one implementation")
    parser.add_argument(
        "--total-s", type=float, default=float("inf"), help="then begin nothing new"
    )
    parser.add_argument("--compiled-at", help="the one length at which FlexAttention is compiled")
    parser.add_argument("--train-up-to", help="longest length for what has gradients")
    parser.add_argument(
        "--continue", dest="go_on", action="store_true", help="measure what --json lacks"
    )
    parser.add_argument(
        "--most", type=int, help="of --sweep: only so many candidates, the likeliest"
    )
    parser.add_argument(
        "--part",
        metavar="I/N",
        default="1/1",
        help="of --sweep: every N-th candidate from the I-th on",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="results, with hardware and versions")
    parser.add_argument("--plot", type=Path, help="an SVG of the ratios")
    options = parser.parse_args(arguments)
    name = "dry" if options.dry else "check" if options.check else options.preset
    for key, value in PRESETS[name].items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    options.only = options.only or []
    options.block_size = options.block_size or (16 if options.dry else 128)
    options.top_k = options.top_k or (3 if options.dry else 16)
    if options.profile is not None and not options.dry and options.json is None:
        parser.error("--profile takes the slowest operation of --json FILE: name the file")
    try:
        [_layout(text) for text in options.heads], [_length(text) for text in options.lengths]
        _part(options.part)
    except ValueError as error:
        parser.error(
            f"{error}: heads look like 64/4 or 9/3x64, lengths like 8K, 1M or 20001, parts like 1/4"
        )
    if options.selection is not None:
        options.data = ["stored"]
        _take_stored_shape(options)
    return options


def _take_stored_shape(options: argparse.Namespace) -> None:
    """Heads and length are those of the file."""
    import torch

    stored = torch.load(options.selection, map_location="meta", weights_only=True)
    q, k = stored["q"], stored["k"]
    options.heads = [f"{q.shape[1]}/{k.shape[1]}x{q.shape[3]}"]
    options.lengths = [str(q.shape[2])]


if __name__ == "__main__":
    sys.exit(main())
