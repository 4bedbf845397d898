"""One rank of the ZeRO tests: trains a tiny model in many configurations and writes what it saw.

    python worker_zero.py FOLDER RANK WORLD_SIZE

FOLDER holds `start` (a converted model) and `cases.json`: cases with the keys name, zero, stage,
and optional precision, uneven, train, heldout, backend. Rank 0 writes `<name>.pt` per case: records of
metrics.jsonl, masters by name before and after, live weights and buffers, how many KLs were computed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from dense2sparse.kernels import ops
from dense2sparse.model import convert
from dense2sparse.model.execution import Execution
from dense2sparse.train import engine as engines
from dense2sparse.train.flops import model_cost
from dense2sparse.train.loop import Position, StageLoop
from dense2sparse.train.losses import Objective
from dense2sparse.train.metrics import Metrics, read_records
from dense2sparse.train.stopping import StopRequests


def load_tiny():
    """The module next to this file; importing by name would need the folder on the path."""
    place = Path(__file__).with_name("tiny.py")
    spec = importlib.util.spec_from_file_location("tiny_for_training_tests", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def batches_of(tiny, case: dict, rank: int, world_size: int) -> list:
    """Micro batches of this rank: rank r takes every w-th of one global list of rows."""
    count = case["micro_batches"] * case["stage"].get("micro_batch_size", 2)
    # Uneven: some rows hold two documents or no targets in one half, so micro batches differ in targets.
    splits = [40, None, None, 100] if case.get("uneven") else [None]
    places = [n * world_size + rank for n in range(count)]
    mine = [tiny.rows(1, seed=n, split=splits[n % len(splits)]) for n in places]
    if case.get("uneven"):
        for place, row in zip(places, mine, strict=True):
            row.targets[:, : 30 * (place % 4)] = -100
    size = case["stage"].get("micro_batch_size", 2)
    return [tiny.join(mine[at : at + size]) for at in range(0, count, size)]


def whole_parameters(engine, zero: int) -> dict[str, torch.Tensor]:
    """Copies of the module's own parameters; ZeRO-3 gathers them first."""
    import deepspeed

    named = list(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters([p for _, p in named], enabled=zero == 3):
        return {name: p.detach().clone() for name, p in named}


def run_case(tiny, folder: Path, case: dict, rank: int, world_size: int) -> None:
    """Train one case with the real loop."""
    stage = tiny.stage(**case["stage"])
    torch.manual_seed(0)
    execution = Execution(backend=case.get("backend", "auto"))
    model = convert.load(folder / "start", execution=execution)
    index = convert.index_parameters(model)
    sparse_layers = convert.geometry_of(model).sparse_layers
    cost = model_cost(model, {name for name, _ in index})
    engines.set_checkpointing(model, stage)
    groups = engines.parameter_groups(stage, index, convert.backbone_parameters(model))
    config = engines.deepspeed_config(
        case.get("deepspeed", {}),
        zero_stage=case["zero"],
        precision=case.get("precision", "fp32"),
        stage=stage,
        world_size=world_size,
    )
    engine = engines.start_engine(Objective(model), groups, config=config, betas=stage.betas)
    before = {name: value.clone().cpu() for name, value in engines.masters(engine)}
    records = folder / f"{case['name']}.jsonl"
    metrics = Metrics(records) if rank == 0 else None
    case.setdefault("micro_batches", stage.gradient_accumulation)
    loop = StageLoop(
        engine=engine,
        stage=stage,
        train=tiny.train_section(**case.get("train", {})),
        loader=tiny.Rows(batches_of(tiny, case, rank, world_size)),
        heldout=[tiny.rows(1, seed=900 + n) for n in range(case.get("heldout", 0))],
        label=f"0-{stage.kind}",
        stage_index=0,
        row_len=tiny.ROW_LEN,
        num_steps=stage.steps,
        sparse_layers=sparse_layers,
        cost=cost,
        peak=1e12,
        rank=rank,
        world_size=world_size,
        device=torch.device("cpu"),
        metrics=metrics,
        stop=StopRequests(folder / "STOP"),
        save=lambda position: None,
        say=lambda text: None,
    )
    computed, usual = [], ops.index_kl

    def watched(*tensors, **options):
        computed.append(options)
        return usual(*tensors, **options)

    ops.index_kl = watched
    ended_by = loop.run(Position())
    ops.index_kl = usual
    after = {name: value.clone().cpu() for name, value in engines.masters(engine)}
    live = whole_parameters(engine, case["zero"])
    buffers = {n: b.clone() for n, b in engine.module.named_buffers() if b.is_floating_point()}
    if rank == 0:
        metrics.close()
        content = {
            "records": read_records(records),
            "before": before,
            "after": after,
            "live": live,
            "buffers": buffers,
            "ended_by": ended_by,
            "num_kls": len(computed),
        }
        torch.save(content, folder / f"{case['name']}.pt")
    engines.stop_engine(engine)


def main() -> None:
    folder, rank, world_size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    engines.skip_shared_memory_build()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=30),
    )
    import deepspeed

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    tiny = load_tiny()
    for case in json.loads((folder / "cases.json").read_text()):
        run_case(tiny, folder, case, rank, world_size)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
