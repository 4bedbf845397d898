"""What every evaluation stage needs to know about the run it belongs to.

`eval/run.py` makes it for evaluations alone, `train/evaluate.py` inside a run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from ..model.convert import CONFIG_KEY
from ..model.execution import Execution
from ..model.geometry import Geometry
from ..model.original import positions
from ..recipes.schema import Recipe
from .arms import ArmRun
from .models import Models, checkpoint_fingerprint
from .records import write_json
from .score import DEFAULT_MARGIN


@dataclass(frozen=True)
class EvalContext:
    """What an evaluation stage needs to know about the run."""

    recipe: Recipe
    run_dir: Path
    original: Path
    """Dense checkpoint as it was, with its tokenizer."""
    converted: Path
    """Converted checkpoint to measure."""
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    barrier: Callable[[], None]
    log: Callable[[dict[str, float]], None]
    """Records metrics; called on rank 0 only."""
    state: str | None = None
    """What `converted` is, where it is not what the recipe's training stages have reached."""

    def number(self, stage: Any) -> int:
        """Place of a stage in the recipe, from 0; by identity, since two stages may be equal."""
        for place, known in enumerate(self.recipe.stages):
            if known is stage:
                return place
        return self.recipe.stages.index(stage)

    def folder(self, kind: str) -> Path:
        """Where stages of a kind write."""
        return self.run_dir / "eval" / kind

    def say(self, line: str) -> None:
        """Progress, on rank 0."""
        if self.rank == 0:
            print(line, flush=True)

    def teller(self, what: str) -> Callable[[str], None]:
        """`say`, with what is going on before each line."""
        return lambda line: self.say(f"{what}: {line}")

    def models(self) -> Models:
        """The models behind the arms."""
        where: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        execution = Execution.of(self.recipe.execution)
        return Models(self.original, self.converted, **where, execution=execution)

    def tokenizer(self) -> Any:
        """The original checkpoint's tokenizer."""
        return AutoTokenizer.from_pretrained(self.original)

    def geometry(self) -> Geometry:
        """Blocks and budget of `converted`, which may be another checkpoint than the recipe would make.

        Raises:
            ValueError: not a converted checkpoint, or one of a form that is not supported.
        """
        config = AutoConfig.from_pretrained(self.converted)
        block = getattr(config, CONFIG_KEY, None)
        if not block:
            raise ValueError(
                f"{self.converted} has no {CONFIG_KEY} in its config.json: convert the model first"
            )
        return Geometry.from_config(block, config.num_hidden_layers)

    def shape(self, arm: str) -> dict[str, int]:
        """`attention_shape` of the checkpoint behind an arm; from its config, no model need be loaded."""
        path = self.original if arm == "original_dense" else self.converted
        return attention_shape(AutoConfig.from_pretrained(path))

    @property
    def precision(self) -> str:
        """Of the weights, and of the index scores where that is another."""
        precision = str(self.dtype).removeprefix("torch.")
        if self.recipe.execution.index_precision != "input":  # it may select other blocks
            precision += f"-index-{self.recipe.execution.index_precision}"
        return precision

    def keyed(self, models: Models, run: ArmRun, digest: str) -> str:
        """Folder of one arm's records for one set of prompts or rows, one checkpoint and one precision."""
        return f"{digest[:12]}/{run.label}-{models.fingerprint(run)[:12]}-{self.precision}"

    def finish(self, kind: str, stage: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Wait for all ranks, let rank 0 write the stage's result, and return it on every rank."""
        self.barrier()
        number = self.number(stage)
        path = self.folder(kind) / f"stage-{number}.json"
        if self.rank == 0:
            head = {
                "kind": kind,
                "stage": number,
                "state": self.state,
                "after": _trained_before(self.recipe, number),
                "checkpoint": checkpoint_fingerprint(self.converted),
                "precision": str(self.dtype).removeprefix("torch."),
                "index_precision": self.recipe.execution.index_precision,
                "checkpoint_top_k": self.geometry().top_k,
                "positions": positions(AutoConfig.from_pretrained(self.original)),
            }
            write_json(path, {**head, **make()})
        self.barrier()
        return json.loads(path.read_text(encoding="utf-8"))

    def budgets(self, stage: Any) -> list[int]:
        """The stage's budgets, or the checkpoint's own.

        Raises:
            ValueError: a budget that leaves nothing to choose.
        """
        geometry = self.geometry()
        top_ks = sorted(set(stage.top_k)) or [geometry.top_k]
        forced = geometry.local_blocks + geometry.init_blocks
        if top_ks[0] < forced + 1:
            raise ValueError(
                f"stages.{self.number(stage)}.top_k={top_ks[0]} leaves nothing to choose: {forced} blocks "
                f"are always kept, so use at least {forced + 1}"
            )
        return top_ks

    def margin(self) -> float:
        """Points that may be lost, as the recipe's report stage says."""
        return next(
            (stage.margin for stage in self.recipe.stages if stage.kind == "report"), DEFAULT_MARGIN
        )

    def window(self) -> int | None:
        """Positions that the original checkpoint was made for."""
        return positions(AutoConfig.from_pretrained(self.original))["window"]


def attention_shape(config: Any) -> dict[str, int]:
    """What the arithmetic of an attention layer depends on, from a model's config.

    Returns:
        `layers`, `query_heads`, `head_width`; of a converted model also `sparse_layers`, `index_heads`,
        `index_width` and `block_size`.
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    found = {
        "layers": text.num_hidden_layers,
        "query_heads": heads,
        "head_width": getattr(text, "head_dim", None) or text.hidden_size // heads,
    }
    sparse = getattr(config, CONFIG_KEY, None)
    if sparse:
        found["sparse_layers"] = sum(sparse["sparse_attention_freq"])
        found["index_heads"] = sparse["sparse_num_index_heads"]
        found["index_width"] = sparse["sparse_index_dim"]
        found["block_size"] = sparse["sparse_block_size"]
    return found


def _trained_before(recipe: Recipe, number: int) -> list[str]:
    """The training stages that had been run when this stage measured."""
    kinds = [(place, known.kind) for place, known in enumerate(recipe.stages[:number])]
    return [f"{place}-{kind}" for place, kind in kinds if kind in ("warmup", "sparse")]
