"""Every public operation in every kind of row, against float64: what check_run.py runs on a GPU.

Here in the interpreter on small rows; with the mark `gpu` whole, on the device.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from check_operations import CHECKS, Skip
from check_settings import SETTINGS, make_row, small

from dense2sparse.kernels import ops

ROOT = Path(__file__).resolve().parents[2]
BY_NAME = {setting.name: setting for setting in SETTINGS}
PUBLIC = (
    "select_blocks", "select_by_mass", "dense_attention", "sparse_attention", "index_kl", "sparse_decode",
)  # fmt: skip


@pytest.mark.parametrize("operation", [name for name in CHECKS if "fp8" not in name])
@pytest.mark.parametrize("setting", ["narrow", "float16"])
def test_operation_is_right_interpreted(setting: str, operation: str) -> None:
    verdict = CHECKS[operation](small(BY_NAME[setting]), torch.device("cpu"))
    assert verdict.fine, str(verdict)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("operation", CHECKS)
@pytest.mark.parametrize("setting", BY_NAME)
def test_operation_is_right_on_the_gpu(setting: str, operation: str) -> None:
    try:
        verdict = CHECKS[operation](BY_NAME[setting], torch.device("cuda"))
    except Skip as reason:
        pytest.skip(str(reason))
    assert verdict.fine, str(verdict)


def test_settings_hold_what_training_and_serving_meet():
    assert all(any(name.startswith(one) for name in CHECKS) for one in PUBLIC)
    assert len({(one.heads, one.groups) for one in SETTINGS}) >= 3
    assert len({one.width for one in SETTINGS}) >= 2
    assert (
        len({one.block_size for one in SETTINGS}) >= 2 and len({one.top_k for one in SETTINGS}) >= 2
    )
    assert {one.dtype for one in SETTINGS} == {torch.bfloat16, torch.float16, torch.float32}
    assert any(one.documents > 1 and one.batch > 1 for one in SETTINGS)
    assert any(one.documents > 1 and one.offset for one in SETTINGS)
    assert all(one.tokens % one.block_size for one in SETTINGS), "the last block is ragged"
    for one in [*SETTINGS, *map(small, SETTINGS)]:
        assert one.tokens // one.documents > one.top_k * one.block_size, "there is a choice"
    row = make_row(BY_NAME["packed"], torch.device("cpu"))
    assert row.document_ids is not None and len(row.document_ids.unique()) == 4
    assert not torch.equal(*row.document_ids), "documents end elsewhere in each row"


@pytest.mark.parametrize(
    "operation", ["select_blocks", "sparse_attention", "index_kl", "sparse_decode"]
)
def test_a_wrong_operation_is_noticed(monkeypatch, operation):
    right = getattr(ops, operation)

    def wrong(*tensors, backend, **options):
        found = right(*tensors, **options, backend="reference")
        if operation == "select_blocks":
            return found.roll(1, dims=1)
        if operation == "sparse_attention":
            return found[0] * 1.01, found[1]
        return found * 1.01

    monkeypatch.setattr(ops, operation, wrong)
    setting = replace(small(BY_NAME["cached keys"]), dtype=torch.float32)
    assert not CHECKS[operation](setting, torch.device("cpu")).fine


def test_a_check_that_breaks_its_process_costs_only_itself(tmp_path):
    """The device is lost in one operation: another process goes on behind it, and the file says which."""
    script = tmp_path / "run.py"
    script.write_text(
        "import os, sys\n"
        "import bench_record, check_operations, check_run\n"
        "bench_record.environment = dict\n"
        "from bench_checks import Verdict\n"
        "check_run.CASE_S, check_run.device_works = 5.0, lambda device: True\n"
        "def breaks(setting, device): os._exit(75)\n"
        "def fine(setting, device): return Verdict(0.0)\n"
        "check_operations.CHECKS = {'first': fine, 'second': breaks, 'third': fine}\n"
        "import torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "sys.exit(check_run.main())\n"
    )
    file = tmp_path / "checks.json"
    command = [sys.executable, script, "--settings", "narrow", "--json", file]
    paths = f"{ROOT / 'benchmarks'}:{ROOT / '.typing'}"
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONPATH": paths}, timeout=600
    )
    found = {one["operation"]: one["failed"] for one in json.loads(file.read_text())["results"]}
    assert done.returncode == 1, done.stdout + done.stderr
    assert found == {"first": False, "second": True, "third": False}
