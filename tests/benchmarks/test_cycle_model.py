"""The cycle model: SASS is read right, predictions move the right way, and every operation has its row.

The parser and the rules are tested on listings made here; one kernel is compiled from end to end, in a
process of its own, because this one runs Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "registers"))

import cycle_operations as operations  # noqa: E402
from bench_data import Shape  # noqa: E402
from bench_operations import OPERATIONS  # noqa: E402
from cycle_compile import Compiled, Kernel, rare_branches, sections  # noqa: E402
from cycle_kernels import ROLES, UNION_FACTORS, union_factor  # noqa: E402
from cycle_replay import COPY_CYCLES, SHARED_CYCLES  # noqa: E402
from cycle_rules import DEVICES, Resources, section, step  # noqa: E402
from cycle_sass import find_loops, main_loops, parse, total  # noqa: E402
from cycle_table import kernel_table, operation_table  # noqa: E402

H100, H200 = DEVICES["H100"], DEVICES["H200"]
HELD = Resources(registers=168, spill_bytes=0, shared_bytes=65536, num_warps=8)


def listing(*lines: str, stall: int = 1) -> str:
    """As cuobjdump prints it: 16 bytes an instruction, the control word on a line of its own.

    A line may end in `!w2` (writes scoreboard 2) or `!m2` (waits for it).
    """
    printed = ["\tcode for sm_90a", "\t\tFunction : some_kernel"]
    for number, line in enumerate(lines):
        code, _, board = line.partition(" !")
        written = int(board[1:]) if board.startswith("w") else 7
        waits_for = 1 << int(board[1:]) if board.startswith("m") else 0
        control = (stall | written << 5 | 7 << 8 | waits_for << 11) << 41
        printed.append(f"        /*{16 * number:04x}*/   {code} ;   /* 0x0000000000007b1d */")
        printed.append(f"                         /* 0x{control:016x} */")
    return "\n".join(printed)


PRODUCT = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"
NESTED = listing(
    "S2R R0, SR_TID.X",
    "LDG.E.128 R4, desc[UR4][R2.64]",  # 1: outer loop
    "FADD R1, R1, R2",  # 2: inner loop
    PRODUCT,
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "LDS.128 R8, [R9]",
    "@P0 BRA 0x20",
    "STG.E.64 desc[UR4][R2.64], R8",
    "@!P1 BRA 0x10",
    "@P2 EXIT",
    "EXIT",
    "MOV R1, R2",  # moved behind the end
    "BRA 0x10",
    "BRA 0xd0",
)


def loop_of(*body: str, stall: int = 1) -> str:
    return listing(*body, "@P0 BRA 0x0", "EXIT", stall=stall)


def step_of(*body: str, resources: Resources = HELD, device=H100, stall: int = 1):
    instructions = parse(loop_of(*body, stall=stall))
    return step(section(instructions[:-1], resources.num_warps, True), resources, device)


def test_nested_loops_are_found_and_code_behind_the_end_is_none():
    instructions = parse(NESTED)
    assert [(one.first, one.last) for one in find_loops(instructions)] == [(2, 6), (1, 8)]
    assert [(one.first, one.last) for one in main_loops(instructions)] == [(2, 6)]
    assert instructions[6].predicate == "@P0" and instructions[6].target == 0x20


def test_what_stands_around_a_loop_over_heads_is_the_enclosing_loop():
    role = ROLES["kl"]["_difference"]
    name, main, around = sections(parse(NESTED), 8, {}, role)
    assert name == "1 of 1" and main.whole.instructions == 5
    assert around is not None and around.whole.instructions == 3
    assert sections(parse(NESTED), 8, {}, replace(role, heads_inside=False))[2] is None


def test_of_several_copies_the_one_with_fewest_instructions_counts():
    masked = ["ISETP.GT.AND P1, PT, R1, R2, PT"] * 9
    code = listing(*masked, PRODUCT, "@P0 BRA 0x0", "NOP", PRODUCT, "@P0 BRA 0xc0", "EXIT")
    name, main, _ = sections(parse(code), 8, {}, None)
    assert name == "2 of 2" and main.whole.instructions == 2


@pytest.mark.parametrize(
    "line, expected",
    [
        ("FFMA R1, R2, R3, R4", {"fma": 1}),
        ("IMAD.MOV.U32 R1, RZ, RZ, R2", {"fma": 2}),
        ("@!P0 FMNMX R1, R2, R3, !PT", {"alu": 2}),
        ("F2FP.BF16.F32.PACK_AB R1, R2, R3", {"alu": 2}),
        ("MUFU.EX2 R1, R2", {"special": 8}),
        ("UIADD3 UR4, UR4, 0x1, URZ", {}),
        ("SHFL.BFLY PT, R1, R2, 0x2, 0x1f", {"shared_bytes": 128}),
        ("LDS.64 R2, [R4]", {"shared_bytes": 256}),
        ("LDSM.16.M88.4 R4, [R8]", {"shared_bytes": 512}),
        ("LDG.E.128 R4, desc[UR4][R2.64]", {"global_bytes": 512}),
        ("LDG.E R4, desc[UR4][R2.64]", {"table_bytes": 128}),
        (
            "LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64]",
            {"shared_bytes": 512, "global_bytes": 512},
        ),
        (
            "REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R4",
            {"atomic_bytes": 512},
        ),
        ("STL.64 [R1+0x8], R2", {"spill_bytes": 256}),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", {"barriers": 1}),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x1", {"waits": 1}),
        ("UTMALDG.2D [UR8], [UR4]", {"bulk_copies": 1}),
    ],
)
def test_instructions_are_classed_and_their_bytes_counted(line, expected):
    work = total(parse(listing(line, stall=3)))
    costs = {name: value for name, value in vars(work).items() if value}
    assert costs == {"instructions": 1, "stalls": 3, **expected}


def test_a_product_costs_its_columns_and_its_operands():
    """One warpgroup: 64 x 128 x 16 products at 2048 a cycle; 128 bytes of operands a cycle."""
    from_shared = step_of(PRODUCT, resources=replace(HELD, num_warps=4)).parts
    assert (from_shared.tensor, from_shared.product) == (64, 64)
    assert from_shared.shared == 32 * (128 + 64) / 128
    narrow = "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"
    few = step_of(narrow, resources=replace(HELD, num_warps=4)).parts
    assert (few.tensor, few.product) == (16, 24)
    registers = narrow.replace("gdesc", "R40, gdesc")
    assert step_of(registers, resources=replace(HELD, num_warps=4)).parts.product == 16
    fp8 = total(parse(listing("QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR8], R24, gsb0")))
    assert (fp8.tensor * 4, fp8.flops * 4) == (64, 2 * 64 * 128 * 32)


def test_a_program_that_waits_at_once_takes_the_sum_and_one_that_waits_late_does_not():
    barrier, wait = "BAR.SYNC.DEFER_BLOCKING 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    ranking = ["FMNMX R1, R2, R3, !PT"] * 100
    at_once = step_of(barrier, PRODUCT, wait, *ranking)
    late = step_of(barrier, PRODUCT, *ranking, wait)
    assert at_once.limit == "wait"
    # Either the product or the ranking is hidden, whichever is shorter.
    assert 100 <= at_once.cycles - late.cycles <= 200
    one_behind = wait.replace("0x0", "0x1")
    assert step_of(barrier, PRODUCT, one_behind, *ranking).cycles < at_once.cycles
    two = step_of(barrier, PRODUCT, wait, *ranking, resources=replace(HELD, registers=120))
    assert two.cycles < at_once.cycles


def test_copies_are_waited_for_unless_they_were_asked_for_a_pass_ahead():
    copy, commit = "LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64]", "LDGDEPBAR"
    at_once = step_of("BAR.SYNC 0x0", copy, commit, "DEPBAR.LE SB0, 0x0").cycles
    ahead = step_of("BAR.SYNC 0x0", copy, commit, "DEPBAR.LE SB0, 0x1").cycles
    assert at_once >= COPY_CYCLES and ahead < at_once * 0.6
    # Two programs hide each other's wait.
    held = replace(HELD, registers=100)
    assert step_of("BAR.SYNC 0x0", copy, commit, "DEPBAR.LE SB0, 0x0", resources=held).cycles == (
        at_once / 2
    )


def test_results_are_waited_for_where_a_scoreboard_says_so():
    read = "LDS.128 R8, [R9]"
    free = step_of("BAR.SYNC 0x0", read, "FADD R1, R8, R8").cycles
    held = step_of("BAR.SYNC 0x0", f"{read} !w2", "FADD R1, R8, R8 !m2").cycles
    assert held - free >= SHARED_CYCLES - 8


def test_more_work_never_takes_less_time():
    body = ["BAR.SYNC.DEFER_BLOCKING 0x0", PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, 0x0"]
    times = []
    for more in ("FADD R1, R2, R3", "MUFU.EX2 R1, R2", PRODUCT, "LDG.E.128 R4, desc[UR4][R2.64]"):
        body += [more] * 50
        times.append(step_of(*body).cycles)
    assert times == sorted(times)
    assert step_of(*body, stall=9).cycles >= times[-1]
    fast_cache = replace(H100, cache_bytes_per_s=2 * H100.cache_bytes_per_s)
    assert step_of(*body, device=fast_cache).cycles <= times[-1]


def test_more_registers_and_shared_memory_leave_room_for_fewer_programs():
    assert [replace(HELD, registers=number).programs for number in (64, 128, 129, 255)] == [
        3, 2, 1, 1,
    ]  # fmt: skip
    assert replace(HELD, registers=32, shared_bytes=113 << 10).programs == 2
    assert replace(HELD, registers=32, shared_bytes=227 << 10).programs == 1


def test_code_behind_an_inner_forward_branch_counts_as_often_as_it_runs():
    body = parse(
        listing(
            "@P1 BRA 0x60", "FADD R1, R1, R1", "@P2 BRA 0x50", "FADD R1, R1, R1",
            "FADD R1, R1, R1", "NOP", "NOP",
        )
    )  # fmt: skip
    assert rare_branches(body) == {3, 4}
    assert section(body, 8, True, rare_branches(body), 0.5).whole.instructions == 6


def made(operation: str, heads: int = 64, groups: int = 4) -> Compiled:
    """All kernels of an operation, with one and the same loop."""
    code = parse(loop_of("BAR.SYNC.DEFER_BLOCKING 0x0", PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, 0x0"))
    kernels = [
        Kernel(operation, heads, groups, name, {"TOKENS": 8}, HELD, *sections(code, 8, {}, role))
        for name, role in ROLES[operation].items()
    ]
    return Compiled(operation, heads, groups, kernels, dict.fromkeys(operations.LENGTHS, 4))


COMPILED = [made(name, *layout) for name in ROLES for layout in ((64, 4), (32, 8))]


def test_every_operation_of_the_kernel_benchmark_has_a_row():
    ours = {
        operation.name + implementation.name.removeprefix("triton")
        for operation in OPERATIONS
        for implementation in operation.implementations
        if implementation.name in ("triton", "triton deterministic")
    }
    rows = operations.predict(COMPILED, H100, operations.Dense(), operations.Measured())
    assert {row.operation for row in rows} == ours
    table = operation_table(rows)
    assert all(any(line.startswith(name + " ") for line in table) for name in ours)
    kernels = kernel_table(COMPILED)
    assert all(any(name in line for line in kernels) for role in ROLES.values() for name in role)
    assert len(table) + len(kernels) + 3 <= 60


def test_every_goal_has_a_prediction_beside_it():
    rows = operations.predict(COMPILED, H100, operations.Dense(), operations.Measured())
    aimed = {(row.operation, f"{row.heads}/{row.groups}", row.length) for row in rows if row.goal}
    assert aimed == {(goal.operation, goal.heads, goal.length) for goal in operations.GOALS}


def test_longer_rows_take_longer_and_faster_memory_never_does():
    for slow, fast in zip(
        operations.predict(COMPILED, H100, operations.Dense(), operations.Measured()),
        operations.predict(COMPILED, H200, operations.Dense(), operations.Measured()),
        strict=True,
    ):
        assert fast.seconds <= slow.seconds and slow.floor_s > 0
    for operation in ROLES:
        lengths = [
            operations.part_seconds(made(operation), Shape(length, 64, 4, 128), H100)
            for length in operations.LENGTHS
        ]
        assert lengths == sorted(lengths)


def test_unions_grow_with_the_tile():
    factors = [union_factor(tokens) for tokens in (1, 4, 6, 8, 12, 16, 64, 128)]
    assert factors == sorted(factors)
    assert factors[1] == UNION_FACTORS[4] and factors[-1] == UNION_FACTORS[64]


def test_measurements_stand_beside_predictions(tmp_path):
    sizes = {"heads": 64, "groups": 4, "width": 128, "length": 131072, "batch": 1}
    sizes |= {"block_size": 128, "top_k": 16, "index_width": 128, "implementation": "triton"}
    unions = {"4": 1.5, "16": 2.0}
    records = [
        {"operation": "select", "ms": 20.0, "data": "random", **sizes},
        {"operation": "select", "ms": 10.0, "data": "model", **sizes, "union_factor": unions},
        {"operation": "select", "ms": 1.0, "data": "model", **sizes, "width": 64},
        {"operation": "select", "failed": "no memory", "data": "model", **sizes},
    ]
    run = {"schema": 1, "gpu": {"name": "NVIDIA H100 80GB HBM3"}, "results": records}
    (tmp_path / "kernels.json").write_text(json.dumps(run))
    (tmp_path / "other.json").write_text("[]")
    measured = operations.measurements(tmp_path, "H100")
    assert measured.seconds == {("select", 64, 4, 131072): 0.010}
    assert measured.unions == {1: 1.0, 4: 1.5, 16: 2.0}
    assert operations.measurements(tmp_path, "H200").seconds == {}
    row = next(
        row
        for row in operations.predict(COMPILED, H100, operations.Dense(), measured)
        if row.measured_s
    )
    assert row.error == pytest.approx(row.seconds / 0.010 - 1)
    assert "10 (" in "\n".join(operation_table([row]))


def test_one_kernel_from_its_source_to_the_table(tmp_path):
    figures = tmp_path / "cycles.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, ROOT / "benchmarks/registers/model.py", "--only", "select"]
    run = subprocess.run(
        [*command, "--json", figures], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "_select" in run.stdout and "1024K" in run.stdout
    kernels = json.loads(figures.read_text())["kernels"]
    assert [one["kernel"] for one in kernels] == ["_select", "_select"]
    for one in kernels:
        keys, rows = one["constants"]["KEYS"], one["constants"]["ROWS"]
        # Rows times keys times width products; index keys of one step from memory.
        assert one["cycles"]["tensor"] == rows * keys * 128 / 2048
        assert one["a_warp"]["global_bytes"] * one["num_warps"] == keys * 128 * 2
        assert one["step_cycles"] >= one["cycles"]["tensor"] and one["a_warp"]["alu"] > 0


def test_the_interpreter_is_not_mistaken_for_a_compiler():
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks/registers/model.py"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and "unset it" in run.stderr
