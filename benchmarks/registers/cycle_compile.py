"""Compile the launches of one operation without a GPU, and keep what the prediction needs of each kernel.

Called by model.py, in processes of their own. Needs Triton outside its interpreter.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import triton
from bench_data import Shape
from codegen import compile_only, resource_usage
from cycle_kernels import ROLES, Role, launch
from cycle_rules import Device, Resources, Section, Step, main_loop, section, step
from cycle_sass import Instruction, Loop, find_loops, main_loops, parse

COMPILED_LENGTH = 1 << 17
"""Tokens; kernels differ by what divides sizes, not by sizes."""
DECODE_LENGTHS = (1 << 15, 1 << 17, 1 << 20)
"""Decoding has more launches the longer the cache is."""


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel of an operation."""

    operation: str
    heads: int
    groups: int
    name: str
    constants: dict[str, Any]
    """The constexpr arguments that are numbers, by name."""
    resources: Resources
    loop: str
    """Which loop was taken: `1 of 2`, in the order of SASS; empty if there is none."""
    main: Section
    around: Section | None
    """What runs once for all heads, where the main loop goes over them."""

    @property
    def role(self) -> Role | None:
        return ROLES[self.operation].get(self.name)


@dataclass(frozen=True)
class Compiled:
    """All kernels of one operation and layout."""

    operation: str
    heads: int
    groups: int
    kernels: list[Kernel]
    launches: dict[int, int]
    """Of Triton kernels in one call, by length; decoding's grow with it."""


def compile_operation(operation: str, shape: Shape, arch: int = 90) -> Compiled:
    """Each kernel once, however often it is launched."""
    kernels: dict[bytes, Kernel] = {}
    noted: list[str] = []

    def note(name: str, compiled: Any) -> None:
        noted.append(name)
        cubin = compiled.asm["cubin"]
        if cubin not in kernels:
            kernels[cubin] = _kernel(operation, shape, name, compiled)

    launches = {}
    for length in DECODE_LENGTHS if operation == "decode" else (shape.length,):
        noted.clear()
        with compile_only(arch, note):
            launch(operation, replace(shape, length=length))
        launches[length] = len(noted)
    return Compiled(operation, shape.heads, shape.groups, list(kernels.values()), launches)


def _kernel(operation: str, shape: Shape, name: str, compiled: Any) -> Kernel:
    cubin, about = compiled.asm["cubin"], compiled.metadata
    registers, spills = resource_usage(cubin)
    constants = constexprs(compiled)
    role = ROLES[operation].get(name)
    instructions = parse(disassemble(cubin))
    loop, main, around = sections(instructions, about.num_warps, constants, role)
    return Kernel(
        operation,
        shape.heads,
        shape.groups,
        name,
        constants,
        Resources(registers, spills, about.shared, about.num_warps),
        loop,
        main,
        around,
    )


def disassemble(cubin: bytes) -> str:
    """What Triton's own cuobjdump prints."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-sass", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def constexprs(compiled: Any) -> dict[str, Any]:
    """Constexpr arguments that are numbers, from the source that Triton keeps with a compiled kernel."""
    source = compiled.src
    names = source.fn.arg_names
    found = {
        names[path[0]]: value for path, value in source.constants.items() if isinstance(path, tuple)
    }
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def sections(
    instructions: Sequence[Instruction],
    num_warps: int,
    constants: Mapping[str, Any],
    role: Role | None,
) -> tuple[str, Section, Section | None]:
    """The main loop's name and work; the work around it, where it goes over heads."""
    loops = main_loops(instructions)
    if not loops:
        return "", section(instructions, num_warps, False), None
    taken = main_loop(instructions, [(one.first, one.last) for one in loops])
    main = loops[taken]
    name = f"{taken + 1} of {len(loops)}"
    body = instructions[main.first : main.last + 1]
    share = role.rare(constants) if role else 1.0
    inside = section(body, num_warps, True, rare_branches(body), share)
    if role is None or not role.heads_inside:
        return name, inside, None
    outer = [one for one in find_loops(instructions) if one.holds(main)]
    whole = min(outer, key=lambda one: one.last - one.first, default=Loop(0, len(instructions) - 1))
    before, after = (
        instructions[whole.first : main.first],
        instructions[main.last + 1 : whole.last + 1],
    )
    return name, inside, section([*before, *after], num_warps, False)


def rare_branches(body: Sequence[Instruction]) -> set[int]:
    """Numbers of the instructions that stand behind the most deeply nested forward branches of a loop."""
    number = {one.address: i for i, one in enumerate(body)}
    spans = []
    for i, one in enumerate(body):
        end = number.get(one.target) if one.target is not None and one.predicate else None
        if end is not None and end > i + 1:
            spans.append(range(i + 1, end))
    innermost = [
        span
        for span in spans
        if not any(span != other and set(other) <= set(span) for other in spans)
    ]
    return {i for span in innermost for i in span}


def program_step(kernel: Kernel, device: Device) -> tuple[Step, float, float]:
    """The main loop's step; cycles and FLOPs of the unit that repeats: a step, or all heads of one."""
    main = step(kernel.main, kernel.resources, device)
    flops = main.work.flops * kernel.resources.num_warps
    if kernel.around is None:
        return main, main.cycles, flops
    around = step(kernel.around, kernel.resources, device)
    heads = kernel.heads // kernel.groups
    more = around.work.flops * kernel.resources.num_warps
    return main, heads * main.cycles + around.cycles, heads * flops + more
