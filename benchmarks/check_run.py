"""Are the kernels right on this device? Every public operation in every setting, against float64.

    python benchmarks/check_run.py --json checks.json      all settings, in processes side by side
    python benchmarks/check_run.py --only "sparse_attention" --settings packed
    python benchmarks/check_run.py --dry                   small, on a CPU, interpreted

A check that hangs or breaks the device costs only itself: it runs in a child that writes down what it
begins, and another one goes on behind it (bench_guard.py). What is checked: check_operations.py in the
settings of check_settings.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_guard import UNFINISHED, at_most, begun, device_works, earlier, leave, supervise

CASE_S = 60.0
"""A check that takes longer, compilation included, hangs."""
Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 if a check failed; 2 for options that cannot be."""
    options = _options(arguments)
    if options.table is not None:
        print(summary(json.loads(options.table.read_text())["results"]))
        return 0
    if options.dry:
        # Triton reads it where a kernel is defined: before the modules below are imported.
        os.environ["TRITON_INTERPRET"] = "1"
    from check_settings import SETTINGS

    chosen = [one.name for one in SETTINGS if not options.settings or one.name in options.settings]
    unknown = set(options.settings) - {one.name for one in SETTINGS}
    if unknown:
        names = ", ".join(one.name for one in SETTINGS)
        print(f"--settings {' '.join(sorted(unknown))}: there are {names}", file=sys.stderr)
        return 2
    if len(chosen) > 1 and options.json is not None:
        return _side_by_side(options, chosen)
    if arguments is None and options.json is not None and not options.dry:
        code = supervise()
        if code is not None:
            return code
    return _check(options, chosen)


def _side_by_side(options: argparse.Namespace, chosen: list[str]) -> int:
    """A process a setting, at most `--jobs` at once: most of their time is compilation."""
    waiting, running, code = list(chosen), {}, 0
    records: list[Record] = []
    while waiting or running:
        while waiting and len(running) < options.jobs:
            name = waiting.pop(0)
            part = options.json.with_name(f".{options.json.stem}-{name.replace(' ', '-')}.json")
            command = [sys.executable, *sys.argv, "--settings", name, "--json", str(part)]
            running[subprocess.Popen(command)] = part
        done = [process for process in running if process.poll() is not None]
        for process in done:
            part = running.pop(process)
            code = max(code, 1 if process.returncode else 0)
            if part.is_file():
                records += json.loads(part.read_text())["results"]
                part.unlink()
        if not done:
            time.sleep(0.05)
    from bench_record import environment

    _write(options, environment(), records)
    print(summary(records), flush=True)
    return code


def _check(options: argparse.Namespace, chosen: list[str]) -> int:
    import torch
    from bench_record import environment
    from check_operations import CHECKS, Skip
    from check_settings import SETTINGS, small

    device = torch.device("cpu" if options.dry else "cuda")
    if not options.dry and not torch.cuda.is_available():
        print("no CUDA device here: use --dry to see that everything runs", file=sys.stderr)
        return 2
    records, about = earlier(options.json, options.go_on), environment()
    known = {(record["setting"], record["operation"]) for record in records}
    for setting in SETTINGS:
        for name, check in CHECKS.items():
            unwanted = options.only and not any(part in name for part in options.only)
            if setting.name not in chosen or unwanted or (setting.name, name) in known:
                continue
            if time.time() > begun() + options.total_s:
                print("the time is over: what follows is left out", flush=True)
                break
            record: Record = {"setting": setting.name, "operation": name, "failed": False}
            _write(options, about, [*records, record | {"check": UNFINISHED, "failed": True}])
            start = time.perf_counter()
            lost = False
            with at_most(None if options.dry else CASE_S):
                try:
                    verdict = check(small(setting) if options.dry else setting, device)
                    record["check"], record["failed"] = str(verdict), not verdict.fine
                except Skip as reason:
                    record["check"] = f"left out: {reason}"
                except Exception as error:  # the others go on
                    said = (str(error).strip() or "no message").splitlines()[0][:300]
                    record |= {"check": f"{type(error).__name__}: {said}", "failed": True}
                lost = not device_works(device.type)
            record["seconds"] = round(time.perf_counter() - start, 2)
            records.append(record)
            print(_line(record), flush=True)
            _write(options, about, records)
            if lost:
                if options.json is None:
                    break
                leave()
    return 1 if any(record["failed"] for record in records) else 0


def _line(record: Record) -> str:
    state = "FAILED" if record["failed"] else "ok    "
    return f"{state} {record['setting']:12} {record['operation']:32} {record['check']}"


def summary(records: Sequence[Record]) -> str:
    """How many passed, and every one that did not."""
    failed = [record for record in records if record["failed"]]
    left_out = sum(record["check"].startswith("left out") for record in records)
    passed = len(records) - len(failed) - left_out
    lines = [f"{passed} of {len(records)} checks passed, {left_out} do not apply"]
    return "\n".join([*lines, *map(_line, failed)])


def _write(options: argparse.Namespace, about: Record, records: Sequence[Record]) -> None:
    if options.json is None:
        return
    from bench_record import write

    content = {"schema": 1, "environment": about, "dry": options.dry}
    write(options.json, {**content, "results": list(records)})


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dry", action="store_true", help="small rows on a CPU, interpreted")
    parser.add_argument("--only", nargs="+", default=[], help="parts of operations' names")
    parser.add_argument("--settings", nargs="+", default=[], help="names in check_settings.py")
    parser.add_argument("--jobs", type=int, default=6, help="processes at once")
    parser.add_argument(
        "--total-s", type=float, default=float("inf"), help="then begin nothing new"
    )
    parser.add_argument(
        "--continue", dest="go_on", action="store_true", help="check what --json lacks"
    )
    parser.add_argument("--json", type=Path, help="results, with hardware and versions")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print a file of --json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
