"""Starts the ranks of `predict` as processes, and kills them when told to (started by test_kill.py).

Forks each rank from a process that has imported torch already, so that a start costs no time. One JSON line
in ({"home", "run_dir", "samples", "meeting", "world_size", "kill"}), one out with the exit codes. `kill` is
[lines, seconds]: all ranks are killed so long after their journals hold so many lines.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from dense2sparse.eval import benchmarks
from dense2sparse.eval.arms import ArmRun

RUNS = [ArmRun("converted_dense"), ArmRun("converted_sparse", 4)]


def answering() -> Any:
    """The module beside this one."""
    place = Path(__file__).with_name("answering.py")
    spec = importlib.util.spec_from_file_location("answering_for_worker", place)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def rank_main(ours: Any, order: dict[str, Any], rank: int) -> None:
    """One rank: both arms, then rank 0 merges."""
    world_size = order["world_size"]
    barrier = lambda: None  # noqa: E731
    if world_size > 1:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{order['meeting']}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(minutes=30),
        )
        barrier = torch.distributed.barrier
    ctx = ours.context(
        Path(order["home"]),
        Path(order["run_dir"]),
        rank=rank,
        world_size=world_size,
        barrier=barrier,
    )
    prompts = ours.AskedSet(ours.read_samples(Path(order["samples"])))
    folders = benchmarks.answers(ctx, "ruler", prompts, RUNS)
    ctx.barrier()
    if rank == 0:
        benchmarks.results(ctx, "ruler", ctx.recipe.stages[0], prompts, folders)


def written(run_dir: Path) -> int:
    """Lines in all journals."""
    return sum(path.read_bytes().count(b"\n") for path in run_dir.rglob("rank-*.jsonl"))


def main() -> None:
    """Serve orders until the input ends."""
    torch.set_num_threads(1)
    ours = answering()
    gc.freeze()  # else each child collects all that was imported
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        children = []
        for rank in range(order["world_size"]):
            child = os.fork()
            if child == 0:
                sys.stdout = sys.stderr
                code = 1
                try:
                    rank_main(ours, order, rank)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            children.append(child)
        if order["kill"]:
            lines, seconds = order["kill"]
            while lines and written(Path(order["run_dir"])) < lines:
                time.sleep(0.002)
            time.sleep(seconds)
            for child in children:
                os.kill(child, signal.SIGKILL)  # not waited for yet, so the id is still its own
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    main()
