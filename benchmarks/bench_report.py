"""What the records of a run say together: break-even lengths and a short table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_goals import Predictions, goals

Record = dict[str, Any]
MODEL = Path(__file__).resolve().parent / "results" / "cycle-model.json"
PHASES = {"prefill": "layer", "decode": "decode"}


def break_even(records: Sequence[Record]) -> list[dict[str, Any]]:
    """First measured length from which the layer is faster than dense at every further one.

    Of several kinds of data the first that was measured counts. `tokens` is null where the longest length
    is still slower; layouts without a measured ratio are left out. kernels/break_even.py reads this list.
    """
    found = []
    layouts = sorted({(r["heads"], r["groups"], r["width"]) for r in records}, reverse=True)
    for heads, groups, width in layouts:
        for phase, operation in PHASES.items():
            ratios: dict[int, float] = {}
            for r in records:
                same = (r["heads"], r["groups"], r["width"]) == (heads, groups, width)
                ours = r["operation"] == operation and r["implementation"] == "triton"
                if same and ours and r["batch"] == 1 and "dense_ratio" in r:
                    ratios.setdefault(r["length"], r["dense_ratio"])
            if not ratios:
                continue
            tokens = None
            for length in sorted(ratios, reverse=True):
                if ratios[length] <= 1.0:
                    break
                tokens = length
            found.append(
                {"heads": heads, "groups": groups, "width": width, "phase": phase, "tokens": tokens}
            )
    return found


def slowest(records: Sequence[Record]) -> Record | None:
    """Ours with the smallest share of the floor, among the longest lengths that were timed."""
    timed = [r for r in records if r["ours"] and "floor_share" in r]
    if not timed:
        return None
    longest = max(r["length"] for r in timed)
    return min((r for r in timed if r["length"] == longest), key=lambda r: r["floor_share"])


def summary(records: Sequence[Record], predicted: Predictions | None = None) -> str:
    """Goals, what failed and break-even lengths, then a table of what is ours."""
    ours = [r for r in records if r["ours"]]
    failed = [r for r in ours if r["failed"]]
    lines = [
        *goals(records, predicted),
        f"{len(ours) - len(failed)} of {len(ours)} checks of ours passed",
        *(
            f"FAILED {r['operation']} {r['implementation']} {r['heads']}/{r['groups']} {r['length']} "
            f"{r['data']}: {r['check']}"
            for r in failed
        ),
    ]
    for entry in break_even(records):
        tokens = entry["tokens"]
        said = "not reached" if tokens is None else f"{tokens} tokens"
        lines.append(f"break-even {entry['phase']} {entry['heads']}/{entry['groups']}: {said}")
    return "\n".join([*lines, *_table([r for r in ours if "ms" in r], records)])


def _table(timed: Sequence[Record], records: Sequence[Record]) -> list[str]:
    """One line a timed record, columns aligned; empty without any."""
    head = ["operation", "heads", "length", "data", "ms", "TFLOP/s", "GB/s", "of floor", "x dense"]
    rows = [[*head, "x others"]] if timed else []
    for r in timed:
        share, ratio = r.get("floor_share"), r.get("dense_ratio")
        rows.append(
            [
                r["operation"] + r["implementation"].removeprefix("triton"),
                f"{r['heads']}/{r['groups']}",
                str(r["length"]),
                r["data"],
                f"{r['ms']:.3f}",
                f"{r['tflops']:.0f}",
                f"{r['gb_per_s']:.0f}",
                "" if share is None else f"{100 * share:.0f} %",
                "" if ratio is None else f"{ratio:.2f}",
                _against_others(records, r),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]


def _against_others(records: Sequence[Record], ours: Record) -> str:
    """Times of other implementations of the same operation on the same data, over ours."""
    keys = ("operation", "heads", "groups", "width", "length", "batch", "data")
    same = [r for r in records if not r["ours"] and all(r[key] == ours[key] for key in keys)]
    timed = [f"{r['ms'] / ours['ms']:.2f} {r['implementation']}" for r in same if "ms" in r]
    return "; ".join(timed)


def predictions(gpu: str, model: Path = MODEL) -> Predictions:
    """What registers/model.py --json predicted for a GPU, by its name; empty where it knows none such."""
    rows = json.loads(model.read_text())["operations"] if model.is_file() else []
    return {
        (row["operation"], f"{row['heads']}/{row['groups']}", row["length"]): row["ratio"]
        for row in rows
        if row["device"] in gpu
    }


def main() -> None:
    """Print the table of a file: python benchmarks/bench_report.py kernels.json"""
    import sys

    record = json.loads(Path(sys.argv[1]).read_text())
    gpu = (record.get("gpu") or {}).get("name", "")
    print(summary(record["results"], predictions(gpu)))


if __name__ == "__main__":
    main()
