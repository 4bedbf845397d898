"""One rank of the probe's tests: the real loop on a tiny model, with and without a probe between its steps.

    python worker_probe.py FOLDER RANK WORLD_SIZE

FOLDER holds `start` (a converted model) and `cases.json`: cases with the keys name, zero, precision, probe,
deepspeed. Rank r writes `<name>-<r>.pt`: digests of everything that training goes on from, and the records.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from dense2sparse.eval.arms import ArmRun
from dense2sparse.eval.generate import answer
from dense2sparse.eval.models import attending
from dense2sparse.eval.ruler import Sample, encode
from dense2sparse.model import convert
from dense2sparse.train import engine as engines
from dense2sparse.train.checkpoint import random_state
from dense2sparse.train.flops import model_cost
from dense2sparse.train.loop import Position, StageLoop
from dense2sparse.train.losses import Objective
from dense2sparse.train.metrics import Metrics, read_records
from dense2sparse.train.probe import ProbePrompts, TrainingProbe
from dense2sparse.train.stopping import StopRequests

LETTERS = "abcdefgh"


def load_tiny():
    """The module next to this file; importing by name would need the folder on the path."""
    place = Path(__file__).with_name("tiny.py")
    spec = importlib.util.spec_from_file_location("tiny_for_training_tests", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def prompts_of(tokenizer) -> ProbePrompts:
    """Three prompts of one task and five of another, of unequal lengths; a letter is often found."""
    made = {}
    for task, count, new_tokens in (("niah_single_2", 3, 9), ("vt", 5, 4)):
        made[task] = []
        for number in range(count):
            rng = random.Random(f"{task} {number}")
            prompt = "".join(rng.choices(LETTERS, k=180 + 17 * number))
            sample = Sample(
                id=f"{task}-{number}",
                task=task,
                length=512,
                index=number,
                prompt=prompt,
                num_tokens=len(encode(tokenizer, prompt, chat=False)),
                new_tokens=new_tokens,
                references=list(LETTERS[:3]),
                spans=[],
                chat=False,
            )
            made[task].append(sample)
    return ProbePrompts(tokenizer, made)


class Watched:
    """A probe that draws random numbers, as a prompt's source or a library might, and keeps answers."""

    def __init__(self, probe: TrainingProbe, place: tuple[int, int]) -> None:
        self.probe, self.place, self.answers = probe, place, []
        probe.answer, self._answer = self.answer, probe.answer

    def answer(self, model, sample: Sample) -> str:
        random.random(), np.random.rand(), torch.rand(3)
        said = self._answer(model, sample)
        self.answers.append((sample.id, said))
        return said

    def __call__(self) -> dict[str, float]:
        self.answers.clear()
        return self.probe()


def digest(content) -> str:
    """sha256 of what torch.save writes of it, tensors on their own."""
    seen = hashlib.sha256()

    def walk(value) -> None:
        if isinstance(value, torch.Tensor):
            seen.update(str((value.dtype, tuple(value.shape))).encode())
            seen.update(
                value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            )
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                seen.update(str(key).encode())
                walk(value[key])
        elif isinstance(value, list | tuple):
            seen.update(str(len(value)).encode())
            for one in value:
                walk(one)
        else:
            seen.update(repr(value).encode())

    walk(content)
    return seen.hexdigest()


def optimizer_tensors(engine) -> list:
    """Every state tensor of the torch optimizer under DeepSpeed's, in the order of its parameters."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return [
        [parameter.detach(), inner.state.get(parameter, {})]
        for group in inner.param_groups
        for parameter in group["params"]
    ]


def run_case(tiny, folder: Path, case: dict, rank: int, world_size: int) -> None:
    """Train one case with the real loop, then say what it left."""
    stage = tiny.stage("sparse", steps=2, activation_checkpointing=True, gradient_accumulation=2)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    model = convert.load(folder / "start")
    index = convert.index_parameters(model)
    cost = model_cost(model, {name for name, _ in index})
    engines.set_checkpointing(model, stage)
    config = engines.deepspeed_config(
        case["deepspeed"],
        zero_stage=case["zero"],
        precision=case["precision"],
        stage=stage,
        world_size=world_size,
    )
    groups = engines.parameter_groups(stage, index, convert.backbone_parameters(model))
    engine = engines.start_engine(Objective(model), groups, config=config, betas=stage.betas)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    place = {"rank": rank, "world_size": world_size}
    probe = TrainingProbe(engine, prompts_of(tokenizer), device=torch.device("cpu"), **place)
    watched = Watched(probe, (rank, world_size))
    records = folder / f"{case['name']}.jsonl"
    metrics = Metrics(records) if rank == 0 else None
    batches = [tiny.rows(1, seed=10 * number + rank) for number in range(3)]
    loader = tiny.Rows(batches)
    loop = StageLoop(
        engine=engine,
        stage=stage,
        train=tiny.train_section(probe_every=case["probe"], measure_every=2),
        loader=loader,
        heldout=[tiny.rows(1, seed=900)],
        label="0-sparse",
        stage_index=0,
        row_len=tiny.ROW_LEN,
        num_steps=stage.steps,
        sparse_layers=convert.geometry_of(model).sparse_layers,
        cost=cost,
        peak=None,
        device=torch.device("cpu"),
        metrics=metrics,
        stop=StopRequests(folder / "STOP"),
        save=lambda position: None,
        say=lambda text: None,
        probe=watched if case["probe"] else None,
        **place,
    )
    loop.run(Position())
    modes = [(m.msa_mode, m.msa_top_k) for m in model.modules() if hasattr(m, "msa_mode")]
    content = {
        "random": digest(random_state()),
        "optimizer": digest(optimizer_tensors(engine)),
        "masters": digest([(name, value.clone()) for name, value in engines.masters(engine)]),
        "modes": modes + [engine.module.training],
        "loader": loader._next,
    }
    live = live_weights(engine, case["zero"])
    content["live"] = digest(live)
    if case["probe"]:
        content["answers"] = list(watched.answers)
        if rank == 0:
            content["plain"] = plain_answers(folder, live, probe, case["precision"])
    if metrics is not None:
        metrics.close()
        content["records"] = read_records(records)
    torch.save(content, folder / f"{case['name']}-{rank}.pt")
    engines.stop_engine(engine)


def live_weights(engine, zero: int) -> dict[str, torch.Tensor]:
    """Copies of the module's own parameters; ZeRO-3 gathers them first."""
    import deepspeed

    if zero == 3:  # what was gathered ahead is in flight and cannot be gathered again
        engine.optimizer.parameter_offload.get_param_coordinator().reset_step()
    named = list(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters([p for _, p in named], enabled=zero == 3):
        return {name.removeprefix("model."): p.detach().clone() for name, p in named}


def plain_answers(folder: Path, live: dict, probe: TrainingProbe, precision: str) -> dict[str, str]:
    """What a model without an engine answers with these weights, by eval/generate.py alone."""
    model = convert.load(
        folder / "start", dtype=torch.bfloat16 if precision == "bf16" else torch.float32
    )
    model.load_state_dict(live, strict=False)
    model.eval()
    prompts = probe._prompts
    with attending(model, ArmRun("converted_sparse")):
        return {
            sample.id: answer(model, prompts.tokenizer, sample)["prediction"]
            for samples in prompts.by_task.values()
            for sample in samples
        }


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
