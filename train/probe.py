"""A few RULER prompts answered while training goes on: what the sparse model can do at this step.

Every `train.probe_every` steps, counted over all training stages, and once before the first: three tasks at
data.row_len, arm C (the weights as they are now, blocks of the index branch), into `probe/<task>`. Training
is not disturbed: weights are only read, random states are put back, the data is another. The ranks share
the prompts and take every token together, because ZeRO-3 gathers the weights of each pass from all of them;
a rank whose answer has ended goes on until the last one's has. Called by `stages.py` and `loop.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoTokenizer

from ..eval.arms import ArmRun
from ..eval.generate import decode, end_tokens, generate
from ..eval.models import attending
from ..eval.prepare import Prompts, load, prepare
from ..eval.ruler import Sample, check_lengths, encode
from ..eval.ruler_corpus import PUBLIC_DOMAIN, read_corpus
from ..eval.ruler_score import score_record, settled
from ..model.original import positions
from .checkpoint import random_state, restore_random_state
from .context import RunContext
from .files import read_json, write_json

TASKS = ("niah_single_2", "niah_multikey_3", "vt")
"""One needle in text, one needle among needles, a chain of assignments."""
INSTEAD = {"niah_multikey_3": "niah_multikey_1"}
"""What is asked where a task cannot be made: its keys are long, and rows may be short."""
SEED = 42


@dataclass(frozen=True)
class ProbePrompts:
    """Prompts by task, the same on every rank, and the tokenizer they were made with."""

    tokenizer: Any
    by_task: Mapping[str, Sequence[Sample]]


class TrainingProbe:
    """Answers the prompts with an engine's weights; every rank calls it at the same step."""

    def __init__(
        self,
        engine: Any,
        prompts: ProbePrompts,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device,
    ) -> None:
        self._engine, self._prompts = engine, prompts
        self._rank, self._world_size, self._device = rank, world_size, device

    def __call__(self) -> dict[str, float]:
        """`probe/<task>`, the mean score from 0 to 100, and `perf/probe_s`; the same on every rank."""
        begun = time.perf_counter()
        totals = [0.0] * len(self._prompts.by_task)
        with self._undisturbed() as model:
            for number, samples in enumerate(self._prompts.by_task.values()):
                for turn in range(-(-len(samples) // self._world_size)):
                    place = turn * self._world_size + self._rank
                    # A rank with no prompt left repeats one, so that all make the same passes.
                    found = self._score(model, samples[place % len(samples)])
                    totals[number] += found if place < len(samples) else 0.0
        summed = self._over_ranks(totals, dist.ReduceOp.SUM)
        means = {
            f"probe/{task}": total / len(samples)
            for (task, samples), total in zip(self._prompts.by_task.items(), summed, strict=True)
        }
        return {**means, "perf/probe_s": time.perf_counter() - begun}

    def answer(self, model: Any, sample: Sample) -> str:
        """The greedy answer to a prompt, ended as eval/generate.py does; token by token with the others."""
        tokenizer = self._prompts.tokenizer
        ends = end_tokens(model, tokenizer)
        length: int | None = None

        def enough(new: list[int]) -> str | None:
            nonlocal length
            if length is None and new[-1] in ends:
                length = len(new) - 1
            elif length is None:
                said = decode(tokenizer, new)
                if settled(said, sample.references, sample.metric, sample.mode):
                    length = len(new)
            (done,) = self._over_ranks([float(length is not None)], dist.ReduceOp.MIN)
            return "every rank is done" if done else None

        # The prompt is read whole: ranks whose prompts fall into other numbers of chunks would not meet,
        # and a training row of this length needs more memory.
        ids = encode(tokenizer, sample.prompt, chat=sample.chat)
        made = generate(model, ids, new_tokens=sample.new_tokens, enough=enough)
        return decode(tokenizer, made.ids[:length])

    def _score(self, model: Any, sample: Sample) -> float:
        return score_record({**sample.record(), "prediction": self.answer(model, sample)})

    @contextmanager
    def _undisturbed(self) -> Iterator[Any]:
        """The language model as arm C; modes and random states are put back."""
        module = self._engine.module
        was_training, before = module.training, random_state()
        module.eval()
        _forget_prefetched(self._engine)
        try:
            with attending(module.model, ArmRun("converted_sparse")):
                yield module.model
        finally:
            module.train(was_training)
            restore_random_state(before)

    def _over_ranks(self, values: Sequence[float], op: Any) -> list[float]:
        if self._world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float32, device=self._device)
        dist.all_reduce(tensor, op=op)
        return tensor.tolist()


def _forget_prefetched(engine: Any) -> None:
    """ZeRO-3: release weights that were gathered ahead, and begin a new pass; else nothing.

    DeepSpeed does this where a pass enters through the engine's own module; these enter below it, and must
    not meet what was gathered before the last update.
    """
    offload = getattr(engine.optimizer, "parameter_offload", None)
    if offload is not None:
        offload.get_param_coordinator().reset_step()


def probe_prompts(context: RunContext, source: Path) -> ProbePrompts | None:
    """Make or find the prompts of a run's probe, before a model is loaded; every rank calls this.

    Args:
        source: a folder with the tokenizer and the configuration.

    Returns:
        None where the recipe asks for no probe.

    Raises:
        ValueError: a row length that no prompt fits, or a source of prompts that cannot be had.
    """
    every, length = context.recipe.train.probe_every, context.recipe.data.row_len
    if every is None:
        return None
    window = positions(AutoConfig.from_pretrained(source))["window"]
    try:
        check_lengths([length], window)
    except ValueError as error:
        raise ValueError(
            f"train.probe_every={every} asks prompts as long as data.row_len, but {error}"
        ) from None
    tokenizer = AutoTokenizer.from_pretrained(source)
    home = context.run_dir / "eval" / "ruler" / "prompts"
    note = home / "probe.json"
    if context.rank == 0:
        before = random_state()
        write_json(note, {"folders": _prepare(context, tokenizer, home)})
        restore_random_state(before)
    context.barrier()
    sets = [load(home / name, tokenizer) for name in (read_json(note) or {})["folders"]]
    context.barrier()
    found = {task: [s for one in sets for s in one.samples if s.task == task] for task in _names()}
    by_task = {task: samples for task, samples in found.items() if samples}
    skipped = {one["task"]: one["reason"] for prompts in sets for one in prompts.skipped}
    for task, reason in skipped.items():
        context.say(f"probe leaves out {task}: {reason}")
    if not by_task:
        raise ValueError(
            f"train.probe_every={every}: no probe prompt fits data.row_len={length} with this tokenizer; "
            "use longer rows, or probe_every: null"
        )
    return ProbePrompts(tokenizer, by_task)


def _names() -> tuple[str, ...]:
    return (*TASKS, *INSTEAD.values())


def _prepare(context: RunContext, tokenizer: Any, home: Path) -> list[str]:
    """Prompt sets of the tasks, and of those that stand in for what could not be made; rank 0 only."""
    recipe = context.recipe

    def made(tasks: Sequence[str]) -> Prompts:
        wanted: dict[str, Any] = {"tasks": tasks, "lengths": [recipe.data.row_len]}
        corpus = read_corpus(PUBLIC_DOMAIN, recipe.data.cache_dir, **wanted)
        return prepare(
            home,
            tokenizer=tokenizer,
            corpus=corpus,
            samples=recipe.train.probe_samples,
            seed=SEED,
            progress=context.say,
            **wanted,
        )

    first = made(TASKS)
    others = [INSTEAD[one["task"]] for one in first.skipped if one["task"] in INSTEAD]
    return [one.folder.name for one in ([first, made(others)] if others else [first])]
