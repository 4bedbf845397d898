"""Fixtures of the training tests: the tiny model, and one pair of processes for every ZeRO case."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
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
    trained["activation_checkpointing"] = True
    cases += [
        {"name": "whole-z1", "zero": 1, "stage": {"kind": "sparse"}, "uneven": True},
        {"name": "joint-warmup-z1", "zero": 1, "stage": trained},
        {
            "name": "measured-z3",
            "zero": 3,
            "stage": {"kind": "warmup", "steps": 3, "until_learned_coverage": 0.99},
            "train": {"measure_every": 1},
            "heldout": 3,
        },
    ]
    cases.append(
        {
            "name": "rarely-logged-z3",
            "zero": 3,
            "stage": {"kind": "warmup", "steps": 7},
            "train": {"log_every": 3, "measure_every": 2},
            "heldout": 1,
        }
    )
    for zero in (1, 2, 3):
        name = f"bf16-z{zero}"
        cases.append({"name": name, "zero": zero, "precision": "bf16", "stage": {"kind": "sparse"}})
    return _partitioned(cases)


def _triton_cases() -> list[dict]:
    """A step or two through the Triton kernels, under the interpreter that tests/conftest.py asks for."""
    cases = []
    for zero, recompute, steps in ((1, True, 1), (2, False, 1), (3, True, 2)):
        stage = {"kind": "sparse", "activation_checkpointing": recompute, "steps": steps}
        cases.append({"name": f"sparse-z{zero}-c{int(recompute)}", "zero": zero, "stage": stage})
    trained = {"kind": "warmup", "backbone": "trained", "backbone_lr": 1e-3, "steps": 2}
    trained["activation_checkpointing"] = True
    cases.append({"name": "warmup-z3", "zero": 3, "stage": {"kind": "warmup", "steps": 2}})
    cases.append({"name": "joint-warmup-z1", "zero": 1, "stage": trained})
    for case in cases:
        case["backend"] = "triton"
    return _partitioned(cases)


def _partitioned(cases: list[dict]) -> list[dict]:
    """The cases, ZeRO-3 with tiny weights partitioned too."""
    for case in cases:
        if case["zero"] == 3:
            # Tiny weights would otherwise stay whole on every rank, and nothing would be gathered.
            case["deepspeed"] = {
                "zero_optimization": {
                    "stage3_param_persistence_threshold": 0,
                    "stage3_prefetch_bucket_size": 5000,
                }
            }
    return cases


def run_worker(
    folder: Path, cases: list[dict], world_size: int, environment: dict[str, str], patience: type
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
    output = folder / "output-0.txt"
    codes = patience(processes).ended(output.read_text)
    assert codes == [0] * world_size, output.read_text()[-3000:]


@pytest.fixture(scope="session")
def start_folder(tiny, tmp_path_factory) -> Path:
    """A tiny converted model on disk, with a random index branch."""
    return tiny.save_converted(tmp_path_factory.mktemp("converted") / "start")


@pytest.fixture(scope="session")
def triton_results(start_folder, tmp_path_factory, test_environment, patience) -> dict[str, dict]:
    """What two ranks saw in every case of `_triton_cases`, by name."""
    import torch

    folder = tmp_path_factory.mktemp("zero-triton")
    (folder / "start").symlink_to(start_folder)
    cases = _triton_cases()
    run_worker(folder, cases, 2, test_environment, patience)
    return {c["name"]: torch.load(folder / f"{c['name']}.pt") for c in cases}


@pytest.fixture(scope="session")
def zero_results(
    tiny, start_folder, tmp_path_factory, test_environment, patience
) -> dict[str, dict]:
    """What two ranks saw in every case of `_cases`, by name."""
    import torch

    folder = tmp_path_factory.mktemp("zero")
    (folder / "start").symlink_to(start_folder)
    cases = _cases()
    run_worker(folder, cases, 2, test_environment, patience)
    return {c["name"]: torch.load(folder / f"{c['name']}.pt") for c in cases}


@pytest.fixture(scope="session")
def one_rank_results(
    tiny, start_folder, tmp_path_factory, test_environment, patience
) -> dict[str, dict]:
    """The same rows as two ranks see, on one rank."""
    import torch

    folder = tmp_path_factory.mktemp("one-rank")
    (folder / "start").symlink_to(start_folder)
    stage = {"kind": "sparse", "micro_batch_size": 4}
    cases = [{"name": f"sparse-z{zero}", "zero": zero, "stage": stage} for zero in (0, 1, 2, 3)]
    cases += [case for case in _cases() if case["name"] == "measured-z3"]
    run_worker(folder, cases, 1, test_environment, patience)
    return {c["name"]: torch.load(folder / f"{c['name']}.pt") for c in cases}


class Nursery:
    """Client of nursery.py."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, HERE / "nursery.py"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )

    def _ask(self, order: dict) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self,
        recipe: Path,
        overrides: Sequence[str] = (),
        *,
        output: Path,
        ranks: int = 1,
        file_limit_bytes: int | None = None,
    ) -> list[int]:
        """Start a run; pids of its ranks."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        pids = []
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            place.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            order = {
                "args": [str(recipe), *overrides],
                "env": place,
                "output": str(output),
                "file_limit_bytes": file_limit_bytes,
            }
            pids.append(self._ask(order))
        return pids

    def wait(self, pids: list[int]) -> list[int]:
        """Exit codes; a signal's number is negative."""
        return [self._ask({"wait": pid}) for pid in pids]

    def run(
        self, recipe: Path, overrides: Sequence[str] = (), *, output: Path, ranks: int = 1
    ) -> None:
        """A run that must end well."""
        codes = self.wait(self.start(recipe, overrides, output=output, ranks=ranks))
        assert codes == [0] * ranks, output.read_text()[-3000:]

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


@pytest.fixture(scope="session")
def nursery(tmp_path_factory, test_environment):
    """Starts runs without the ten seconds of imports."""
    server = Nursery(test_environment, tmp_path_factory.mktemp("nursery") / "errors.txt")
    yield server
    server.close()


@pytest.fixture(scope="session")
def tiny_inputs(tiny, tmp_path_factory) -> Path:
    """Folder with a tiny dense checkpoint, its tokenizer, and training and held-out text."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.save_dense(folder / "dense")
    tiny.write_corpus(folder / "text.txt", seed=1)
    tiny.write_corpus(folder / "heldout.txt", seed=2)
    return folder


@pytest.fixture(scope="session")
def make_recipe(tiny_inputs) -> Callable[[Path], Path]:
    """Writes the tiny recipe into a folder; its runs go to `runs` there. Returns the recipe's path."""
    return lambda folder: write_recipe(folder / "recipe.yaml", tiny_inputs, folder)


def write_recipe(path: Path, inputs: Path, output: Path) -> Path:
    """Write the tiny recipe."""
    path.write_text(
        f"""
name: tiny
output_dir: {output}/runs
model: {{path: {inputs}/dense}}
sparsity: {{block_size: 16, top_k: 4, index_dim: 32, dense_layers: [0], calibration_rows: 2}}
data:
  row_len: 128
  cache_dir: {inputs}/cache
  sources: [{{name: text, kind: text, path: {inputs}/text.txt}}]
  heldout: [{{name: heldout, kind: text, path: {inputs}/heldout.txt}}]
stages:
  - {{kind: warmup, steps: 5, index_lr: 1e-3, micro_batch_size: 2}}
  - {{kind: sparse, steps: 7, index_lr: 1e-3, backbone_lr: 1e-3, gradient_accumulation: 2,
     activation_checkpointing: true, weight_decay: 0.1}}
train: {{precision: fp32, log_every: 1, measure_every: 3, checkpoint_every: 2}}
wandb: {{mode: disabled}}
""",
        encoding="utf-8",
    )
    return path
