"""Metrics: every name that a run may record, `metrics.jsonl`, Weights & Biases and the progress
line.

The loop and the evaluation stages hand plain numbers to `Metrics.log`; a name that is not declared
here is refused. Only rank 0 builds a `Metrics`.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from ..data.fetch import write_atomically
from ..eval.wandb_run import WandbRun

NAMES: dict[str, str] = {
    "train/loss_lm": "LM loss, nats per target token, over all ranks and micro batches of the step",
    "train/loss_kl": "KL put together over the sparse layers as the recipe says (sum or mean), nats",
    "train/loss_total": "loss_lm + kl_weight * loss_kl",
    "heldout/loss_lm": "LM loss on the held-out rows of a measurement, in the stage's attention",
    "train/grad_norm/backbone": "norm of the backbone's gradient before clipping, over all ranks",
    "train/grad_norm/index": "the same for the index branch",
    "train/grad_norm/total": "the same for every trained weight",
    "train/lr/backbone": "learning rate of the backbone in this step",
    "train/lr/index": "learning rate of the index branch in this step",
    "data/target_tokens": "tokens that had a target in this step, all ranks",
    "index/kl/layer_NN": "KL(teacher || student) of one layer, nats",
    "index/coverage/layer_NN": "attention mass in the selected blocks",
    "index/oracle_coverage/layer_NN": "attention mass in the best blocks of the same number",
    "index/learned_coverage/layer_NN": "coverage above the forced blocks, as a share of the oracle's",
    "index/block_recall/layer_NN": "share of the best blocks that were selected",
    "index/score_recall/layer_NN": "attention mass of the best blocks that were selected, as a share",
    "index/coverage_mean": "mean over the sparse layers",
    "index/oracle_coverage_mean": "mean over the sparse layers",
    "index/learned_coverage_mean": "mean over the sparse layers",
    "index/learned_coverage_min": "worst sparse layer",
    "index/block_recall_mean": "mean over the sparse layers",
    "index/score_recall_mean": "mean over the sparse layers",
    "select/mean_union_blocks": "blocks that a tile of neighbouring queries selects together, mean",
    "perf/tokens_per_s": "training tokens per second, all ranks, since the last record",
    "perf/mfu_pct": "analytic model FLOP/s over the device's peak, per cent (train/flops.py)",
    "perf/step_s": "seconds per optimizer step since the last record",
    "perf/probe_s": "seconds of one probe during training, which are in no other number of speed",
    "memory/peak_gib": "largest peak of any rank: CUDA allocations, or resident memory on CPU",
    "probe/TASK": "RULER score of the probe during training (train/probe.py), 0 to 100",
    "eval/TASK": "results of the evaluation stages, for example eval/ruler/1k/niah_single_1",
}
"""Every name with its meaning; `NN` is a layer number of two digits or more."""

_EVAL = r"eval/(?:probe|perplexity|ruler|longbench|report)(?:/[a-z0-9_.-]+)+"
_OPEN = {"eval/TASK": _EVAL, "probe/TASK": r"probe/[a-z0-9_]+"}
_DECLARED = re.compile(
    "|".join(_OPEN.get(name, re.escape(name).replace("NN", r"\d{2,}")) for name in NAMES)
)


def layer_name(measure: str, layer: int) -> str:
    """Name of a per-layer series, for example `index/kl/layer_07`."""
    return f"index/{measure}/layer_{layer:02d}"


def check_names(values: Mapping[str, float]) -> None:
    """Refuse a metric that is not declared above, or that is no number."""
    for name, value in values.items():
        if not _DECLARED.fullmatch(name):
            raise ValueError(f"metric {name!r} is not declared in train/metrics.py")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"metric {name!r} must be a number, not {type(value).__name__}")


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a `metrics.jsonl`; a torn last line (the process was killed) is left out."""
    if not path.exists():
        return []
    records = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines):
        if not line:
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines) - 1:
                break
            raise ValueError(f"{path}, line {number + 1} is damaged: {error.msg}") from None
    return records


def truncate(path: Path, *, stage_index: int, step: int) -> None:
    """Drop what a resumed run will record again, so that no step stands twice.

    Kept: records of earlier stages, and those of this stage up to the checkpoint's global `step`.
    """
    if not path.exists():
        return
    kept = [
        record
        for record in read_records(path)
        if record["stage_index"] < stage_index
        or (record["stage_index"] == stage_index and record["step"] <= step)
    ]
    lines = "".join(json.dumps(record) + "\n" for record in kept)
    write_atomically(path, lines.encode("utf-8"))


def _drop_torn_line(path: Path) -> None:
    """Cut what a killed process left of its last line, so that the next record starts a new one."""
    if path.exists():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)


class Metrics:
    """Writes each record to `metrics.jsonl` and to wandb; the same numbers in both."""

    def __init__(self, path: Path, *, wandb: WandbRun | None = None) -> None:
        """
        Args:
            path: the `metrics.jsonl` of the run; opened for appending at the first record.
            wandb: the started run, or None to write the file only.
        """
        self.path = path
        self.wandb = wandb
        self._file: TextIO | None = None

    def log(
        self, values: Mapping[str, float], *, step: int, tokens: int, stage_index: int, stage: str
    ) -> None:
        """Record `values` at a global step; numbers that are not finite are left out of the file.

        Args:
            step, tokens: over all training stages so far.
            stage_index, stage: place in the recipe's list and folder name, `1` and `1-sparse`.
        """
        check_names(values)
        head = {"step": step, "tokens": tokens, "stage_index": stage_index, "stage": stage}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if self._file is None:
            _drop_torn_line(self.path)
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(json.dumps({**head, **finite}) + "\n")
        self._file.flush()
        if self.wandb is not None:
            self.wandb.log({"step": step, "tokens": tokens, "stage": stage_index, **finite})

    def reopen(self) -> None:
        """Forget the open file; the next record opens it again (used around `truncate`)."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def close(self, *, failed: bool = False) -> None:
        """Close the file and the wandb run."""
        self.reopen()
        if self.wandb is not None:
            self.wandb.finish(failed=failed)


def duration(seconds: float) -> str:
    """Seconds as `45s`, `3m10s` or `2h05m`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Progress:
    """One line that tells where a stage stands: rewritten on a terminal, appended in a log."""

    def __init__(
        self,
        label: str,
        total_steps: int,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label, self._total = label, total_steps
        self._stream = stream if stream is not None else sys.stdout
        self._clock, self._begun = clock, clock()
        self._first_step: int | None = None
        self._width = 0

    def show(
        self, step: int, *, loss: float, kl: float, tokens_per_s: float, note: str = ""
    ) -> None:
        """Print the line of `step` (steps made in this stage; resumed ones do not count as speed)."""
        now = self._clock()
        if self._first_step is None:
            self._first_step, self._begun = step, now
            left = "?"
        else:
            pace = (now - self._begun) / max(1, step - self._first_step)
            left = duration(pace * (self._total - step))
        digits = len(str(self._total))
        text = (
            f"{self._label}  step {step:>{digits}}/{self._total}  lm {loss:.4f}  kl {kl:.4f}  "
            f"{tokens_per_s:,.0f} tok/s  {left} left{note}"
        )
        if self._stream.isatty():
            self._stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def end(self) -> None:
        """Leave the line on the terminal and go to the next."""
        if self._stream.isatty() and self._width:
            self._stream.write("\n")
            self._stream.flush()
