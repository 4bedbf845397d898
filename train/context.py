"""What every part of one run shares: recipe, folder, this process's place among the ranks."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..recipes.load import fingerprint
from .metrics import Metrics
from .stopping import StopRequests


@dataclass(frozen=True)
class RunContext:
    """One process of one run."""

    recipe: Any
    """recipes.schema.Recipe, resolved and checked."""
    run_dir: Path
    fingerprint: str
    commit: str
    rank: int
    world_size: int
    device: torch.device
    stop: StopRequests
    metrics: Metrics | None
    """Rank 0 only."""
    wandb_id: str

    def fingerprint_of(self, index: int) -> str:
        """Checksum of the recipe up to and with one stage: what that stage's results depend on."""
        return fingerprint(self.recipe, index + 1)

    def say(self, text: str) -> None:
        """Print one line on rank 0."""
        if self.rank == 0:
            print(text, flush=True)

    def stage_dir(self, index: int) -> Path:
        """Folder of a stage: its place in the recipe's list, from 0, and its kind."""
        return self.run_dir / "stages" / self.label(index)

    def label(self, index: int) -> str:
        """`1-warmup`: how a stage is called in folders, records and messages."""
        return f"{index}-{self.recipe.stages[index].kind}"

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the forward pass."""
        return torch.bfloat16 if self.recipe.train.precision == "bf16" else torch.float32

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            if self.device.type == "cuda":
                dist.barrier(device_ids=[self.device.index])
            else:
                dist.barrier()


def warn(text: str) -> None:
    """Print one line on the error stream."""
    print(text, file=sys.stderr, flush=True)
