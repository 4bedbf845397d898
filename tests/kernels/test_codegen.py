"""Every kernel compiles for three generations of GPUs without one, within its registers.

In a process of its own, because this one runs Triton's interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPILL_BYTES = {80: 64, 90: 0, 100: 0}
"""Registers that may go to memory: none where speed is promised."""
SHARED_BYTES = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""What one program may have: on sm_80 the less that its consumer relatives have."""


CASES = {
    90: [
        "64/4-d128-b128-1024K",
        "64/4-d128-b128-k16-1024K",
        "28/4-d128",
        "8/4-d256",
        "select-4",
        "64/4-d128-i",
        # Those that have spilled in one Triton or another.
        "backward-32/8-d128-b128-128K-fast",
        "32/8-d128-i128-b",
        "9/3-d64-i128",
    ],
    80: ["attend-64/4", "select-4-d128-k16", "decode-9/3", "backward-9/3", "kl-9/3-d64-i64"],
    100: ["attend-64/4", "select-4-d128-k16", "decode-9/3", "backward-9/3", "kl-9/3-d64-i64"],
}
"""Parts of names of cases; `python benchmarks/codegen.py` compiles all of them."""


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile_within_their_budgets(arch, tmp_path):
    figures = tmp_path / "figures.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "benchmarks/codegen.py", "--arch", str(arch), "--jobs", "2"]
    run = subprocess.run(
        [*command, "--json", str(figures), "--only", *CASES[arch]],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    kernels = json.loads(figures.read_text())["kernels"]
    names = {one["kernel"] for one in kernels}
    assert names >= {"_select", "_merge", "_attend", "_block_scores", "_attend_piece"}
    assert names >= {"_key_gradients", "_query_gradients", "_delta", "_difference", "key_kernel"}
    spilled = [one for one in kernels if one["spill_bytes"] > SPILL_BYTES[arch]]
    assert not spilled, spilled
    large = [one for one in kernels if one["shared_bytes"] > SHARED_BYTES[arch]]
    assert not large, large


def test_the_interpreter_is_not_mistaken_for_a_compiler():
    run = subprocess.run(
        [sys.executable, "benchmarks/codegen.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and "unset it" in run.stderr
