"""Registers, spills and shared memory of every kernel, compiled without a GPU.

    python benchmarks/codegen.py --arch 90                all kernels for sm_90
    python benchmarks/codegen.py --only select attend --arch 80 90 100 --jobs 2 --json codegen.json

Runs the real launch code on tensors without memory (`device="meta"`) under a driver that only compiles, so
that signatures and specialisations are those of a real launch; reads the figures with the cuobjdump
that Triton brings. The cases, codegen_*.py, are lengths and head layouts that people have.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from codegen_backward import CASES as BACKWARD
from codegen_decode import CASES as DECODE
from codegen_forward import CASES as FORWARD
from codegen_kl import CASES as KL
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

CASES: dict[str, Callable[[], None]] = {**FORWARD, **DECODE, **BACKWARD, **KL}


@dataclass(frozen=True)
class Figures:
    """One compiled kernel."""

    case: str
    kernel: str
    arch: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    num_warps: int
    num_stages: int


class CompileOnly:
    """Stands where Triton's driver is: names a target, has no device."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        # Triton keeps compiled kernels by device, so each architecture is one.
        return self._arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> str:
        return "meta"


@contextlib.contextmanager
def compile_only(arch: int, note: Callable[[str, Any], None]) -> Iterator[None]:
    """Inside, every kernel launch compiles for `arch` and calls `note(kernel name, compiled)`."""
    run = JITFunction.run

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        note(self.fn.__name__, compiled)
        return compiled

    triton.runtime.driver.set_active(CompileOnly(arch))
    JITFunction.run = compile_instead
    try:
        yield
    finally:
        JITFunction.run = run


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack (spills) of the one kernel in a cubin."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no REG and STACK:\n{printed}")
    return int(found[1]), int(found[2])


def measure(arch: int, name: str) -> list[Figures]:
    """Compile the launches of one case; each kernel once, however often it is launched."""
    figures: dict[bytes, Figures] = {}

    def note(kernel: str, compiled: Any) -> None:
        cubin = compiled.asm["cubin"]
        if cubin not in figures:
            registers, spills = resource_usage(cubin)
            about = compiled.metadata
            figures[cubin] = Figures(
                name,
                kernel,
                arch,
                registers,
                spills,
                about.shared,
                about.num_warps,
                about.num_stages,
            )

    with compile_only(arch, note):
        CASES[name]()
    return list(figures.values())


def chosen(arch: int, only: list[str]) -> list[str]:
    """Names of the cases that hold one of `only`, and that the architecture can run."""
    names = [name for name in CASES if not only or any(part in name for part in only)]
    return [name for name in names if arch >= 89 or "float8" not in name]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[90], choices=[80, 90, 100])
    parser.add_argument("--only", nargs="+", default=[], help="parts of cases' names")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set, so nothing would be compiled: unset it", file=sys.stderr)
        return 2
    work = [(arch, name) for arch in options.arch for name in chosen(arch, options.only)]
    if not work:
        print(f"no case holds any of {options.only}: {', '.join(CASES)}", file=sys.stderr)
        return 2
    # Fresh processes: a fork of one that runs threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        found = pool.map(measure, *zip(*work, strict=True))
        figures = [one for part in found for one in part]
    width = max((len(one.case) for one in figures), default=0)
    for one in figures:
        print(
            f"{one.case:{width}} {one.kernel:24} sm_{one.arch:<4} {one.registers:4} registers "
            f"{one.spill_bytes:6} B spilled {one.shared_bytes:7} B shared  {one.num_warps} warps "
            f"{one.num_stages} stages"
        )
    if options.json:
        options.json.write_text(
            json.dumps(
                {"triton": triton.__version__, "kernels": [asdict(one) for one in figures]},
                indent=1,
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
