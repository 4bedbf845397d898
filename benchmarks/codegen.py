"""Registers, spills and shared memory of every kernel, compiled without a GPU.

    python benchmarks/codegen.py --arch 90                all kernels for sm_90
    python benchmarks/codegen.py --only select --arch 80 90 100 --json codegen.json

Runs the real launch code on tensors without memory (`device="meta"`) under a driver that only compiles, so
that signatures and specialisations are those of a real launch; reads the figures with the cuobjdump
that Triton brings. The cases, codegen_*.py, are lengths and head layouts that people have.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
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


def measure(arch: int, only: str = "") -> list[Figures]:
    """Compile every case whose name contains `only`."""
    figures: dict[tuple[str, bytes], Figures] = {}
    for name, launch in CASES.items():
        if only not in name:
            continue

        def note(kernel: str, compiled: Any, case: str = name) -> None:
            cubin = compiled.asm["cubin"]
            if (case, cubin) in figures:
                return
            registers, spills = resource_usage(cubin)
            about = compiled.metadata
            figures[case, cubin] = Figures(
                case,
                kernel,
                arch,
                registers,
                spills,
                about.shared,
                about.num_warps,
                about.num_stages,
            )

        if arch < 89 and "float8" in name:
            continue
        with compile_only(arch, note):
            launch()
    return list(figures.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[90], choices=[80, 90, 100])
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set, so nothing would be compiled: unset it", file=sys.stderr)
        return 2
    figures = [one for arch in options.arch for one in measure(arch, options.only)]
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
