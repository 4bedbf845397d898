"""Fixtures of the training tests: the tiny model, and one pair of processes for every ZeRO case."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module tiny.py."""
    spec = importlib.util.spec_from_file_location("tiny_for_training_tests", HERE / "tiny.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def test_environment() -> dict[str, str]:
    """Environment of child processes: CPU, one thread, the installed package."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE"))}
    return {**environment, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def _cases() -> list[dict]:
    """Every combination that the tests compare; see worker_zero.py for the keys."""
    cases: list[dict] = []
    for zero in (0, 1, 2, 3):
        for recompute in (False, True):
            sparse = {"kind": "sparse", "activation_checkpointing": recompute}
            cases.append(
                {"name": f"sparse-z{zero}-c{int(recompute)}", "zero": zero, "stage": sparse}
            )
        cases.append({"name": f"warmup-z{zero}", "zero": zero, "stage": {"kind": "warmup"}})
        accumulated = {"kind": "sparse", "micro_batch_size": 1, "gradient_accumulation": 2}
        cases.append({"name": f"gas-z{zero}", "zero": zero, "stage": accumulated, "uneven": True})
    trained = {"kind": "warmup", "backbone": "trained", "backbone_lr": 1e-3}
    cases += [
        {"name": "whole-z1", "zero": 1, "stage": {"kind": "sparse"}, "uneven": True},
        {"name": "joint-warmup-z1", "zero": 1, "stage": trained},
        {
            "name": "measured-z3",
            "zero": 3,
            "stage": {"kind": "warmup", "steps": 6, "until_learned_coverage": 0.05},
            "train": {"measure_every": 1},
            "heldout": 3,
        },
    ]
    for zero in (1, 2, 3):
        name = f"bf16-z{zero}"
        cases.append({"name": name, "zero": zero, "precision": "bf16", "stage": {"kind": "sparse"}})
    return cases


def run_worker(
    folder: Path, cases: list[dict], world_size: int, environment: dict[str, str]
) -> None:
    """Run worker_zero.py on `world_size` ranks."""
    (folder / "cases.json").write_text(json.dumps(cases))
    processes = []
    for rank in range(world_size):
        with (folder / f"output-{rank}.txt").open("w") as output:
            command = [sys.executable, HERE / "worker_zero.py", folder, str(rank), str(world_size)]
            processes.append(
                subprocess.Popen(command, stdout=output, stderr=output, env=environment)
            )
    codes = [process.wait(timeout=400) for process in processes]
    assert codes == [0] * world_size, (folder / "output-0.txt").read_text()[-3000:]


@pytest.fixture(scope="session")
def start_folder(tiny, tmp_path_factory) -> Path:
    """A tiny converted model on disk, with a random index branch."""
    return tiny.save_converted(tmp_path_factory.mktemp("converted") / "start")


@pytest.fixture(scope="session")
def zero_results(tiny, start_folder, tmp_path_factory, test_environment) -> dict[str, dict]:
    """What two ranks saw in every case of `_cases`, by name."""
    import torch

    folder = tmp_path_factory.mktemp("zero")
    (folder / "start").symlink_to(start_folder)
    cases = _cases()
    run_worker(folder, cases, 2, test_environment)
    return {c["name"]: torch.load(folder / f"{c['name']}.pt") for c in cases}


@pytest.fixture(scope="session")
def one_rank_results(tiny, start_folder, tmp_path_factory, test_environment) -> dict[str, dict]:
    """The same rows as two ranks see, on one rank."""
    import torch

    folder = tmp_path_factory.mktemp("one-rank")
    (folder / "start").symlink_to(start_folder)
    stage = {"kind": "sparse", "micro_batch_size": 4}
    cases = [{"name": f"sparse-z{zero}", "zero": zero, "stage": stage} for zero in (0, 1, 2, 3)]
    run_worker(folder, cases, 1, test_environment)
    return {c["name"]: torch.load(folder / f"{c['name']}.pt") for c in cases}
