"""Cycles and bytes of every kernel from its SASS, without a GPU, and the times that follow from them.

    python benchmarks/registers/model.py                        both head layouts, H100
    python benchmarks/registers/model.py --only select sparse --gpu H200 --json cycles.json
    python benchmarks/registers/model.py --results FOLDER       beside the figures of kernels.py in it

Compiles each kernel for sm_90 with its defaults (width 128, blocks of 128, 16 kept), counts the
instructions of its main loop and predicts (rules: cycle_rules.py; counts: cycle_sass.py). Every time is a
prediction: what it is worth is the error beside what was measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import triton  # noqa: E402
from bench_data import Shape  # noqa: E402
from cycle_compile import COMPILED_LENGTH, Compiled, compile_operation  # noqa: E402
from cycle_kernels import ROLES  # noqa: E402
from cycle_operations import ENTRIES, Dense, measurements, predict  # noqa: E402
from cycle_rules import DEVICES  # noqa: E402
from cycle_table import kernel_records, kernel_table, operation_table  # noqa: E402

LAYOUTS = ((64, 4), (32, 8))


def _compile(operation: str, heads: int, groups: int, arch: int) -> Compiled:
    return compile_operation(operation, Shape(COMPILED_LENGTH, heads, groups, 128), arch)


def compile_all(operations: Sequence[str], arch: int, jobs: int) -> list[Compiled]:
    """Every operation in every layout, in processes of their own: Triton compiles in one."""
    work = [(name, *layout, arch) for name in operations for layout in LAYOUTS]
    # Fresh processes: a fork of one that runs threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        return list(pool.map(_compile, *zip(*work, strict=True)))


def needed(only: Sequence[str]) -> list[str]:
    """Operations to compile for the rows whose names hold one of `only`."""
    rows = [entry for name, entry in ENTRIES.items() if not only or any(x in name for x in only)]
    return [name for name in ROLES if any(name in entry.parts for entry in rows)]


def record(compiled: Sequence[Compiled], dense: Dense, results: Path) -> dict[str, Any]:
    """All that was counted and predicted, for both devices."""
    operations = [
        asdict(row) | {"error": row.error}
        for device in DEVICES.values()
        for row in predict(compiled, device, dense, measurements(results, device.name))
    ]
    return {
        "schema": 1,
        "triton": triton.__version__,
        "devices": [asdict(device) for device in DEVICES.values()],
        "dense": asdict(dense),
        "kernels": kernel_records(compiled),
        "operations": operations,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, default=90, choices=[90])
    parser.add_argument("--only", nargs="+", default=[], help="parts of operations' names")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--gpu", choices=list(DEVICES), default="H100", help="of the second table")
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).resolve().parents[1] / "results"
    )
    parser.add_argument("--dense-forward", type=float, default=620, help="TFLOP/s of dense bf16")
    parser.add_argument("--dense-training", type=float, default=520, help="with its backward pass")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set, so nothing would be compiled: unset it", file=sys.stderr)
        return 2
    operations = needed(options.only)
    if not operations:
        print(f"no operation holds any of {options.only}: {', '.join(ENTRIES)}", file=sys.stderr)
        return 2
    compiled = compile_all(operations, options.arch, options.jobs)
    dense = Dense(options.dense_forward * 1e12, options.dense_training * 1e12)
    print(f"Triton {triton.__version__}, sm_{options.arch}. Cycles of a multiprocessor a step.")
    print("\n".join(kernel_table(compiled)))
    device = DEVICES[options.gpu]
    measured = measurements(options.results, device.name)
    rows = predict(compiled, device, dense, measured)
    print(
        f"\nPredicted for one {device.name}; dense: {options.dense_forward:g} TFLOP/s, with backward "
        f"{options.dense_training:g}; unions {dict(measured.unions)}."
    )
    print("\n".join(operation_table(rows)))
    if options.json:
        options.json.write_text(json.dumps(record(compiled, dense, options.results), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
