"""The step loop of one training stage: micro batches, records, measurements, checkpoints, end."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..model.attention import AttentionCall, Mode
from .engine import set_learning_rates
from .flops import ModelCost, flops_per_token, peak_memory_gib
from .gradients import branch_norms
from .metrics import Metrics, Progress, layer_name
from .stopping import Stopped, StopRequests

_MEASURES = ("coverage", "oracle_coverage", "learned_coverage", "block_recall", "score_recall")


class TrainingError(ValueError):
    """Training cannot go on for a reason the user can act on."""


@dataclass
class Position:
    """Where a run stands; `step` counts within the stage, the others over all training stages."""

    step: int = 0
    global_step: int = 0
    tokens: int = 0
    seconds: float = field(default=0.0, compare=False)
    """Time in this stage's loop, over all starts, less what kills took away."""


@dataclass
class StepSums:
    """What the micro batches of one logged step add up to on this rank."""

    lm: Tensor | None = None
    kl: dict[int, Tensor] = field(default_factory=dict)

    def add(self, lm: Tensor | None, reports: dict[int, Any]) -> None:
        """Take in one micro batch; stays on the device."""
        if lm is not None:
            self.lm = lm if self.lm is None else self.lm + lm
        for layer, report in reports.items():
            value = report.kl.detach().float()
            self.kl[layer] = value if layer not in self.kl else self.kl[layer] + value


def average_over_ranks(values: Sequence[float] | Tensor, device: torch.device) -> list[float]:
    """Mean of each number over the ranks, in float64 (float32 where the backend has no float64)."""
    tensor = torch.as_tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        tensor = tensor / dist.get_world_size()
    return tensor.tolist()


@dataclass
class StageLoop:
    """Everything the steps of one stage need; built by `stages.py`, driven by `run`."""

    engine: Any
    stage: Any
    train: Any
    loader: Any
    heldout: Sequence[Any]
    label: str
    stage_index: int
    row_len: int
    num_steps: int
    sparse_layers: Sequence[int]
    cost: ModelCost
    peak: float | None
    rank: int
    world_size: int
    device: torch.device
    metrics: Metrics | None
    stop: StopRequests
    save: Callable[[Position], None]
    say: Callable[[str], None]
    probe: Callable[[], dict[str, float]] | None = None
    """Answers prompts every `train.probe_every` steps (probe.py)."""

    def __post_init__(self) -> None:
        self.frozen = self.stage.backbone_lr is None
        self.mode: Mode = "warmup" if self.stage.kind == "warmup" else "sparse"
        share = self.cost.num_sparse_layers if self.stage.kl_reduction == "mean" else 1
        self.kl_scale = self.stage.kl_weight / share
        self.kl_fraction = getattr(self.stage, "kl_fraction", 1.0)
        per_rank = self.stage.micro_batch_size * self.stage.gradient_accumulation * self.row_len
        self.tokens_per_step = per_rank * self.world_size

    def run(self, position: Position) -> str:
        """Make the stage's remaining steps; `position` moves along.

        Returns:
            Why the stage ended: "steps" or "coverage".

        Raises:
            Stopped: after a request to stop, with a checkpoint written.
        """
        progress = Progress(self.label, self.num_steps) if self.rank == 0 else None
        seconds, steps_since = 0.0, 0
        before, entered = position.seconds, time.perf_counter()
        reached = position.step == 0 and self._measure(position)
        if position.global_step == 0:
            self._ask(position)
        while position.step < self.num_steps and not reached:
            if self.stop.agreed(self.device):
                if position.step:
                    self.save(position)
                self.say(f"asked to stop: saved at step {position.step} of {self.label}")
                raise Stopped()
            logged = self._is_due(position.step + 1)
            begun = time.perf_counter()
            values, visible = self._step(position, logged)
            seconds, steps_since = seconds + time.perf_counter() - begun, steps_since + 1
            if logged:
                pace = seconds / steps_since
                self._record(position, values, pace, visible, progress)
                seconds, steps_since = 0.0, 0
            ended = position.step == self.num_steps
            if ended or position.step % self.train.measure_every == 0:
                reached = self._measure(position)
            self._ask(position)
            position.seconds = before + time.perf_counter() - entered
            if not ended and not reached and position.step % self.train.checkpoint_every == 0:
                self.save(position)
        position.seconds = before + time.perf_counter() - entered
        if progress is not None:
            progress.end()
        return "coverage" if reached else "steps"

    def _is_due(self, step: int) -> bool:
        """Whether the step of this number (from 1) is recorded.

        The first, the last, every n-th, and those behind which a checkpoint is written: recorded
        steps are checked for numbers that are not finite, and such weights must not be kept.
        """
        every = (self.train.log_every, self.train.checkpoint_every)
        return step == 1 or step == self.num_steps or any(step % n == 0 for n in every)

    def _step(self, position: Position, logged: bool) -> tuple[dict[str, float], float]:
        """One optimizer step. Returns the numbers of a logged step and the mean of visible keys."""
        batches = [next(self.loader) for _ in range(self.stage.gradient_accumulation)]
        targets = self._count_targets(batches)
        normaliser = max(1.0, targets / (self.world_size * len(batches)))
        rates = set_learning_rates(
            self.engine, self.stage, step=position.step, total_steps=self.num_steps
        )
        self.engine.train()
        sums = StepSums()
        for number, batch in enumerate(batches):
            if number:
                self.engine.step()  # counts a micro batch; it updates nothing before the last one
            place = (self.train.seed, position.global_step, number, self.rank)
            kl_seed = random.Random(repr(place)).getrandbits(40)
            self._micro_batch(batch, normaliser, sums if logged else None, kl_seed)
        # Before the update, so that numbers which are not finite never reach the weights.
        norms = branch_norms(self.engine) if logged else {}
        values = self._losses(sums, len(batches), position, norms) if logged else {}
        self.engine.step()
        position.step += 1
        position.global_step += 1
        position.tokens += self.tokens_per_step
        if not logged:
            return {}, 0.0
        visible = float(torch.cat([b.position_ids.flatten() for b in batches]).double().mean()) + 1
        values["data/target_tokens"] = targets
        for branch, rate in rates.items():
            values[f"train/lr/{branch}"] = rate
        for branch, norm in norms.items():
            values[f"train/grad_norm/{branch}"] = norm
        values["train/grad_norm/total"] = math.sqrt(sum(norm**2 for norm in norms.values()))
        return values, visible

    def _count_targets(self, batches: Sequence[Any]) -> int:
        """Target tokens of the step over all ranks."""
        count = torch.tensor(sum(int((b.targets >= 0).sum()) for b in batches), device=self.device)
        if self.world_size > 1:
            dist.all_reduce(count, op=dist.ReduceOp.SUM)
        return int(count.item())

    def _call(self, batch: Any, **fields: Any) -> AttentionCall:
        # The ids stay on the CPU: so the pass learns where documents end without waiting for the device.
        return AttentionCall(mode=self.mode, document_ids=batch.document_ids, **fields)

    def _inputs(self, batch: Any) -> dict[str, Tensor]:
        return {
            "input_ids": batch.input_ids.to(self.device),
            "position_ids": batch.position_ids.to(self.device),
            "targets": batch.targets.to(self.device),
        }

    def _micro_batch(
        self, batch: Any, normaliser: float, sums: StepSums | None, kl_seed: int
    ) -> None:
        """Forward and backward of one micro batch.

        The engine divides the loss by the accumulation; the attached KL never passes through the
        loss, so its weight carries that division itself. Rank averaging covers both: it is on
        gradients.
        """
        weight = 1.0 if self.frozen else self.kl_scale / self.stage.gradient_accumulation
        sampled = {"kl_fraction": self.kl_fraction, "kl_seed": kl_seed}
        call = self._call(batch, kl_weight=weight, attach_kl=not self.frozen, **sampled)
        loss, lm = self.engine(
            **self._inputs(batch),
            call=call,
            normaliser=normaliser,
            kl_scale=self.kl_scale if self.frozen else None,
            with_lm=sums is not None,
        )
        self.engine.backward(loss)  # an attached KL is computed there
        missing = [layer for layer, report in call.reports.items() if report.kl is None]
        if missing:
            raise TrainingError(
                f"{self.label} computed no KL for layers {', '.join(map(str, missing))}: no gradient came "
                "back through their outputs, so their index branch is not trained"
            )
        if sums is not None:
            sums.add(lm, call.reports)
        call.reports.clear()

    def _losses(
        self, sums: StepSums, num_batches: int, position: Position, norms: dict[str, float]
    ) -> dict[str, float]:
        """Losses of a logged step, averaged over micro batches and ranks; all must be finite."""
        if sums.lm is None or not sums.kl:
            raise TrainingError(
                f"{self.label} reports no KL: the checkpoint has no sparse layer, see "
                "sparsity.dense_layers"
            )
        layers = sorted(sums.kl)
        stacked = torch.stack([sums.lm, *(sums.kl[layer] for layer in layers)]) / num_batches
        lm, *kls = average_over_ranks(stacked.double(), self.device)
        kl = sum(kls) / (len(kls) if self.stage.kl_reduction == "mean" else 1)
        if not math.isfinite(lm + kl + sum(norms.values())):
            raise TrainingError(
                f"the loss or its gradient is not finite at step {position.step + 1} of {self.label} "
                f"(lm {lm}, kl {kl}, gradient norms {norms}): "
                "lower index_lr or backbone_lr, or turn gradient_clipping on"
            )
        values = {
            "train/loss_lm": lm,
            "train/loss_kl": kl,
            "train/loss_total": lm + self.stage.kl_weight * kl,
        }
        values.update({layer_name("kl", n): v for n, v in zip(layers, kls, strict=True)})
        return values

    def _record(
        self,
        position: Position,
        values: dict[str, float],
        pace: float,
        visible: float,
        progress: Progress | None,
    ) -> None:
        """Add speed and memory to a step's numbers, write them, show the progress line."""
        tokens_per_s = self.tokens_per_step / pace
        values["perf/tokens_per_s"], values["perf/step_s"] = tokens_per_s, pace
        if self.peak is not None:
            per_token = flops_per_token(
                self.cost,
                mode=self.mode,
                frozen=self.frozen,
                visible_keys=visible,
                kl_fraction=self.kl_fraction,
            )
            achieved = per_token * tokens_per_s / self.world_size
            values["perf/mfu_pct"] = 100.0 * achieved / self.peak
        peak = torch.tensor(peak_memory_gib(self.device), device=self.device)
        if self.world_size > 1:
            dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        values["memory/peak_gib"] = float(peak.item())
        self._log(position, values)
        if progress is not None:
            progress.show(
                position.step,
                loss=values["train/loss_lm"],
                kl=values["train/loss_kl"],
                tokens_per_s=tokens_per_s,
            )

    def _log(self, position: Position, values: dict[str, float]) -> None:
        if self.metrics is not None:
            self.metrics.log(
                values,
                step=position.global_step,
                tokens=position.tokens,
                stage_index=self.stage_index,
                stage=self.label,
            )

    def _measure(self, position: Position) -> bool:
        """Measure the selection on held-out rows, record it; whether the stage's threshold is passed.

        Each rank takes every w-th row; every rank runs as many forward passes as the others (ZeRO-3
        gathers weights collectively), the surplus ones with weight 0.
        """
        if not self.heldout:
            return False
        names = ["heldout/loss_lm", "select/mean_union_blocks"]
        names += [layer_name(m, layer) for layer in self.sparse_layers for m in _MEASURES]
        sums, counts = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        self.engine.eval()
        for turn in range(math.ceil(len(self.heldout) / self.world_size)):
            place = turn * self.world_size + self.rank
            found = self._measure_row(self.heldout[place % len(self.heldout)])
            if place < len(self.heldout):
                for name, value in found.items():
                    sums[name], counts[name] = sums[name] + value, counts[name] + 1
        self.engine.train()
        # The list is the same on every rank, also where a row had nothing to choose from.
        both = average_over_ranks([*sums.values(), *counts.values()], self.device)
        totals = zip(names, both[: len(names)], both[len(names) :], strict=True)
        values = {name: total / count for name, total, count in totals if count}
        values.update(summaries(values))
        self._log(position, values)
        worst = values.get("index/learned_coverage_min")
        if worst is not None:
            self.say(
                f"{self.label}  step {position.step}  learned coverage mean "
                f"{values['index/learned_coverage_mean']:.4f}, worst layer {worst:.4f}"
            )
        threshold = self.stage.until_learned_coverage
        return threshold is not None and worst is not None and worst > threshold

    def _ask(self, position: Position) -> None:
        """Record what the probe's prompts score, where this step is one of theirs."""
        if self.probe is not None and position.global_step % self.train.probe_every == 0:
            self._log(position, self.probe())

    @torch.no_grad()
    def _measure_row(self, batch: Any) -> dict[str, float]:
        """Held-out loss and every layer's measures on one row, on this rank."""
        call = self._call(batch, measure=True)
        count = max(1, int((batch.targets >= 0).sum()))
        _, lm = self.engine(**self._inputs(batch), call=call, normaliser=float(count))
        values = {"heldout/loss_lm": float(lm)}
        measured = {n: r.measures for n, r in call.reports.items() if r.measures is not None}
        if measured:
            unions = [m.tile_union for m in measured.values()]
            values["select/mean_union_blocks"] = sum(unions) / len(unions)
        for layer, measures in measured.items():
            for name in _MEASURES:
                values[layer_name(name, layer)] = getattr(measures, name)
        return values


def summaries(values: dict[str, float]) -> dict[str, float]:
    """Means over the layers, and the worst layer's learned coverage."""
    found: dict[str, float] = {}
    for measure in _MEASURES:
        layers = [v for name, v in values.items() if name.startswith(f"index/{measure}/layer_")]
        if layers:
            found[f"index/{measure}_mean"] = sum(layers) / len(layers)
            if measure == "learned_coverage":
                found["index/learned_coverage_min"] = min(layers)
    return found
