"""The benchmarks themselves: they run to their end, count right, and give no speed to a wrong result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_chart import chart
from bench_checks import check_attention, check_selection, poisoned
from bench_data import Shape, measured_factor, model_like_ids, random_inputs, union_factors
from bench_operations import OPERATIONS
from bench_report import break_even, slowest, summary
from bench_run import Plan, Runner, some_heads
from bench_table import Implementation, Operation
from bench_timing import Bench, Ceilings
from hypothesis import given, settings
from hypothesis import strategies as st
from step_model import MODES

from dense2sparse.kernels import reference
from dense2sparse.kernels.break_even import read

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SMALL = Shape(70, 4, 2, 16, block_size=16, top_k=3, index_width=16)


def small_inputs(shape: Shape = SMALL):
    return random_inputs(shape, dtype=torch.float32, device=CPU, seed=0)


def table(name: str) -> Operation:
    return next(operation for operation in OPERATIONS if operation.name == name)


def run_only(monkeypatch, *implementations: Implementation) -> tuple[bool, list[dict]]:
    """The dense operation with these implementations, timed on the CPU."""
    operation = replace(table("dense"), implementations=implementations)
    monkeypatch.setattr("bench_run.OPERATIONS", (operation,))
    plan = Plan([SMALL], ["random"])
    runner = Runner(
        plan, Bench(CPU, 0.0), Ceilings(1e9, 1e9, 1e9), torch.float32, lambda line: None
    )
    return runner.run(), runner.records


def right(inputs, launch):
    return lambda: reference.dense_attention(inputs.q, inputs.k, inputs.v, scale=inputs.scale)


def wrong(inputs, launch):
    def call():
        out, lse = right(inputs, launch)()
        out[0, 3, -1] += 0.01
        return out, lse

    return call


def broken(inputs, launch):
    raise RuntimeError("no such kernel")


def check(inputs, result):
    return check_attention(inputs, *result, None)


def test_one_command_runs_to_its_end_on_a_cpu(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        ["bash", ROOT / "benchmarks" / "gpu.sh", "dry", tmp_path],
        capture_output=True,
        text=True,
        env=environment,
        timeout=3600,
    )
    files = sorted(tmp_path.iterdir())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("dry: no speed") and "checks passed" in done.stdout
    assert len(files) <= 8 and sum(file.stat().st_size for file in files) < 1 << 20
    record = json.loads((tmp_path / "kernels.json").read_text())
    assert record["dry"] and not any("ms" in one for one in record["results"])
    ours = [one for one in record["results"] if one["ours"]]
    wanted = {operation.name for operation in OPERATIONS if "dense" not in operation.name}
    assert {one["operation"] for one in ours} == wanted
    assert not any(one["failed"] for one in ours)
    xml.etree.ElementTree.parse(tmp_path / "kernels.svg")
    steps = json.loads((tmp_path / "step.json").read_text())
    assert [one["mode"] for one in steps["results"]] == list(MODES)
    assert not any(one["failed"] or "tokens_per_s" in one for one in steps["results"])
    assert all(one["gpu_hours"] is None for one in steps["projected"])


def test_benchmark_needs_none_of_the_training_packages():
    blocked = ("deepspeed", "wandb", "datasets", "pytest", "hypothesis", "pydantic")
    code = (
        "import sys\n"
        f"for name in {blocked}: sys.modules[name] = None\n"
        "sys.modules['transformers'] = None\n"
        "import bench_profile, bench_sweep\n"
        "del sys.modules['transformers']\n"
        "import step_run, step_projection"
    )
    paths = os.pathsep.join([str(ROOT / "benchmarks"), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_without_a_gpu_the_benchmark_says_how_to_try_it():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "kernels.py", "--preset", "first"],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        timeout=60,
    )
    assert done.returncode == 2
    assert "--dry" in done.stderr


def test_a_wrong_result_gets_no_speed_and_the_others_still_run(monkeypatch):
    fine, records = run_only(
        monkeypatch, Implementation("wrong", wrong, check), Implementation("right", right, check)
    )
    assert not fine
    assert records[0]["failed"] and "ms" not in records[0]
    assert not records[1]["failed"] and records[1]["ms"] > 0


def test_a_foreign_library_that_fails_does_not_fail_the_run(monkeypatch):
    fine, records = run_only(monkeypatch, Implementation("theirs", broken, check, ours=False))
    assert fine
    assert records[0]["check"] == "RuntimeError: no such kernel"


def test_dense_attention_of_some_heads_stands_for_all_where_time_is_short(monkeypatch):
    operation = replace(table("dense"), implementations=(Implementation("right", right, check),))
    monkeypatch.setattr("bench_run.OPERATIONS", (operation,))
    runner = Runner(
        Plan([SMALL], ["random"]), Bench(CPU, 0.0), Ceilings(1.0, 1.0, 1.0), torch.float32, print
    )
    assert runner.run()
    assert runner.records[0]["timed_heads"] == 1


def test_some_heads_are_a_smaller_layer_of_their_own():
    inputs = small_inputs()
    part = some_heads(inputs, 2)
    whole, _ = reference.dense_attention(inputs.q, inputs.k, inputs.v)
    out, _ = reference.dense_attention(part.q, part.k, part.v)
    assert torch.allclose(out, whole[:, :2], atol=1e-6)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(1, 150), st.sampled_from([16, 32]), st.integers(1, 5))
def test_selected_pairs_are_those_of_the_definition(length, block_size, top_k):
    shape = Shape(length, 1, 1, 16, block_size=block_size, top_k=top_k)
    position = torch.arange(length)
    past = torch.minimum(position // block_size, torch.tensor(top_k - 1)) * block_size
    assert shape.selected_pairs == int((past + position % block_size + 1).sum())
    assert shape.pairs == length * (length + 1) // 2


def test_made_selections_are_valid_and_share_as_much_as_measured():
    shape = Shape(4100, 8, 2, 64, block_size=32, top_k=8)
    wanted, _ = measured_factor(shape.num_blocks, shape.top_k)
    ids = model_like_ids(shape, factor=wanted, device=CPU)
    current = torch.arange(shape.length) // shape.block_size
    count = (ids >= 0).sum(-1)
    assert torch.equal(count, torch.minimum(current + 1, torch.tensor(8)).expand_as(count))
    assert torch.equal(ids.max(-1).values.long(), current.expand(1, 2, -1))
    later, earlier = ids[..., 1:], ids[..., :-1]
    assert ((later > earlier) | (later == -1)).all()
    factors = union_factors(ids, shape.block_size)
    assert abs(factors["16"] - wanted) < 0.15 * wanted
    assert factors["4"] < factors["16"] < factors["32"]


def test_union_factor_counts_blocks_once_and_only_where_there_is_a_choice():
    ids = torch.full((1, 1, 64, 2), -1, dtype=torch.int32)
    ids[..., :32, 0] = 0
    ids[:, :, 32:48] = torch.tensor([0, 2], dtype=torch.int32)
    ids[:, :, 48::2] = torch.tensor([0, 3], dtype=torch.int32)
    ids[:, :, 49::2] = torch.tensor([1, 3], dtype=torch.int32)
    assert union_factors(ids, 16, (16,)) == {"16": 1.25}


@pytest.mark.parametrize("pool", [torch.amax, torch.sum])
def test_unions_rank_blocks_as_the_definition_does(pool):
    from unions import ranked_blocks

    scores = torch.rand(2, 96, 6, generator=torch.Generator().manual_seed(0))
    current = torch.arange(96) // 16
    expected = reference.top_blocks(scores, current.expand(2, 96), 3, 1, 0)
    found = ranked_blocks(scores, 16, 3)[:, 48:].sort(-1).values
    assert torch.equal(found, expected[:, 48:].long())


@pytest.mark.parametrize("fault", ["another block", "order", "missing", "not the own block"])
def test_a_wrong_selection_is_noticed(fault):
    inputs = small_inputs()
    ids = reference.select_blocks(inputs.index_q, inputs.index_k, block_size=16, top_k=3)
    assert check_selection(inputs, ids).fine
    last = ids[0, 1, -1]
    if fault == "another block":
        others = [block for block in range(4) if block not in last.tolist()]
        last[:2] = torch.tensor(others, dtype=torch.int32)
    elif fault == "order":
        last[:2] = last[:2].flip(0)
    elif fault == "missing":
        last[2] = -1
    else:
        last[2] = 5
    assert not check_selection(inputs, ids).fine


def test_memory_is_poisoned_only_inside():
    before = torch.empty
    with poisoned():
        assert torch.empty(3).isnan().all()
        assert torch.ones(2).new_empty(2, dtype=torch.int32).eq(2**31 - 1).all()
    assert torch.empty is before


def ratio(length: int, value: float, operation: str = "layer", **more) -> dict:
    return {
        "operation": operation,
        "implementation": "triton",
        "ours": True,
        "heads": 32,
        "groups": 8,
        "width": 128,
        "batch": 1,
        "length": length,
        "data": "model-like",
        "dense_ratio": value,
        "floor_ms": 1.0,
        "floor_share": 0.5,
        **more,
    }


def test_break_even_is_where_sparse_stays_faster():
    records = [ratio(8192, 1.2), ratio(16384, 0.9), ratio(32768, 1.1), ratio(65536, 2.0)]
    records.append(ratio(8192, 0.5, "decode"))
    entry = {"heads": 32, "groups": 8, "width": 128}
    assert break_even(records) == [
        {**entry, "phase": "prefill", "tokens": 32768},
        {**entry, "phase": "decode", "tokens": None},
    ]


def test_break_even_of_a_file_is_what_dispatch_reads(tmp_path):
    file = tmp_path / "kernels.json"
    entries = break_even([ratio(8192, 0.8), ratio(16384, 1.5), ratio(8192, 0.5, "decode")])
    file.write_text(json.dumps({"gpu": {"name": "some GPU"}, "break_even": entries}))
    (found,) = read(file)
    assert (found.device, found.phase, found.tokens) == ("some GPU", "prefill", 16384)


def test_slowest_is_the_farthest_from_its_floor_at_the_longest_length():
    records = [ratio(8192, 1.0, floor_share=0.1), ratio(65536, 2.0), ratio(65536, 2.0, "decode")]
    records[2]["floor_share"] = 0.3
    assert slowest(records) is records[2]
    assert slowest([]) is None


def test_summary_says_how_much_faster_than_others_and_what_failed():
    timed = {"ms": 2.0, "tflops": 1.0, "gb_per_s": 1.0, "failed": False, "check": ""}
    ours = ratio(8192, 1.5, **timed)
    theirs = {**ours, "ours": False, "implementation": "theirs", "ms": 5.0}
    failed = {
        **ours,
        "implementation": "triton fp8",
        "failed": True,
        "check": "a value is not finite",
    }
    del failed["ms"]
    printed = summary([ours, theirs, failed])
    assert "2.50 theirs" in printed
    assert "1 of 2 checks of ours passed" in printed
    assert "FAILED layer triton fp8 32/8 8192 model-like: a value is not finite" in printed


def test_chart_shows_every_measured_ratio():
    records = [ratio(8192, 0.8), ratio(131072, 4.5), ratio(8192, 1.4, "decode")]
    records += [ratio(length, 1.0, "dense", ours=False, floor_ms=4.0) for length in (8192, 131072)]
    picture = xml.etree.ElementTree.fromstring(chart(records, "a <GPU>"))
    tips = [node.text for node in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert sorted(tips) == [
        "32/8 triton model-like: 0.80x at 8192",
        "32/8 triton model-like: 4.50x at 131072",
        "32/8 triton: 1.40x at 8192",
    ]
