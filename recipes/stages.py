"""Stages of a recipe: what trains, what measures, in the order of the list `stages`; part of schema.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from .section import Section

Arm = Literal["original_dense", "converted_dense", "converted_sparse", "converted_oracle"]
ALL_ARMS: tuple[Arm, ...] = (
    "original_dense",
    "converted_dense",
    "converted_sparse",
    "converted_oracle",
)
RulerTask = Literal[
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa_1",
    "qa_2",
]
RULER_TASKS: tuple[str, ...] = get_args(RulerTask)
"""What `eval/ruler_tasks.py` knows; a test compares them."""
RULER_PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"lengths": [1024, 2048], "samples": 5},
    "quick": {"lengths": [4096, 16384, 32768], "samples": 50},
    "paper": {"lengths": [4096, 8192, 16384, 32768, 65536, 131072], "samples": 500},
}
"""Lengths and samples that go together; `paper` is what published scores are made of."""


LongbenchTask = Literal[
    "narrativeqa",
    "qasper",
    "multifieldqa_en",
    "multifieldqa_zh",
    "hotpotqa",
    "2wikimqa",
    "musique",
    "dureader",
    "gov_report",
    "qmsum",
    "multi_news",
    "vcsum",
    "trec",
    "triviaqa",
    "samsum",
    "lsht",
    "passage_count",
    "passage_retrieval_en",
    "passage_retrieval_zh",
    "lcc",
    "repobench-p",
]
LONGBENCH_TASKS: tuple[str, ...] = get_args(LongbenchTask)
NOT_IN_LONGBENCH_E = (
    "narrativeqa",
    "multifieldqa_zh",
    "musique",
    "dureader",
    "qmsum",
    "vcsum",
    "lsht",
    "passage_retrieval_zh",
)
"""What `eval/longbench_tasks.py` knows; a test compares them."""


def _each_once(values: list[Any]) -> list[Any]:
    """Refuse a list that names something twice: results are kept by these names."""
    for place, value in enumerate(values):
        if value in values[:place]:
            raise ValueError(f"names {value} twice: name it once")
    return values


Once = AfterValidator(_each_once)
Arms = Annotated[list[Arm], Field(min_length=1), Once]


class Schedule(Section):
    """Learning rates over one stage."""

    shape: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay after the ramp."""
    ramp: float = Field(0.03, ge=0, le=1)
    """Share of the stage's steps that ramp up linearly from zero."""
    final: float = Field(0.1, ge=0, le=1)
    """Learning rate at the end, as a share of the peak."""


class TrainingStage(Section):
    """What a warm-up and a sparse stage have in common."""

    tokens: int | None = Field(None, ge=1)
    """End after this many training tokens over all ranks (rounded up to a step)."""
    steps: int | None = Field(None, ge=1)
    """End after this many optimizer steps."""
    until_learned_coverage: float | None = Field(None, gt=0, lt=1)
    """End early once every sparse layer's learned coverage on held-out rows is above this."""
    row_len: int | None = Field(None, ge=32)
    """Tokens per row in this stage; default data.row_len."""
    micro_batch_size: int = Field(1, ge=1)
    """Rows per rank and forward pass."""
    gradient_accumulation: int = Field(1, ge=1)
    """Forward passes per optimizer step."""
    index_lr: float = Field(1e-3, gt=0)
    """Peak learning rate of the index branch."""
    backbone_lr: float | None = Field(None, gt=0)
    """Peak learning rate of the backbone, where it is trained."""
    index_schedule: Schedule = Schedule()
    """Schedule of the index branch."""
    backbone_schedule: Schedule = Schedule()
    """Schedule of the backbone."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay of the weight matrices; norms and biases have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW betas."""
    kl_weight: float = Field(1.0, gt=0)
    """Lambda in L = L_LM + lambda * KL."""
    kl_reduction: Literal["sum", "mean"] = "sum"
    """How the layers' KL are put together; `mean` makes lambda num_sparse_layers times weaker."""
    gradient_clipping: float = Field(1.0, ge=0)
    """Clip the global gradient norm; 0 turns clipping off."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass; block ids of the forward pass are kept."""

    @model_validator(mode="after")
    def _ends(self) -> TrainingStage:
        if (self.tokens is None) == (self.steps is None):
            raise ValueError("set exactly one of `tokens` and `steps`")
        return self


class WarmupStage(TrainingStage):
    """Full attention; the index branch is distilled from it over the whole causal row."""

    kind: Literal["warmup"]
    backbone: Literal["frozen", "trained"] = "frozen"
    """Whether the backbone learns too."""
    kl_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the query tiles whose KL is computed, drawn anew in each step and layer; unbiased."""

    @model_validator(mode="after")
    def _backbone_lr(self) -> WarmupStage:
        if self.backbone == "trained" and self.backbone_lr is None:
            raise ValueError("backbone=trained needs `backbone_lr`")
        if self.backbone == "frozen" and self.backbone_lr is not None:
            raise ValueError("`backbone_lr` has no effect with backbone=frozen: remove it")
        return self


class SparseStage(TrainingStage):
    """Top-k attention; every weight is trained, the KL is over the selected tokens."""

    kind: Literal["sparse"]
    index_lr: float = Field(1e-4, gt=0)
    """Peak learning rate of the index branch."""
    backbone_lr: float | None = Field(5e-6, gt=0)
    """Peak learning rate of the backbone."""

    @model_validator(mode="after")
    def _trains_backbone(self) -> SparseStage:
        if self.backbone_lr is None:
            raise ValueError("a sparse stage trains the backbone: set `backbone_lr`")
        return self


class ProbeStage(Section):
    """Oracle probe, training-free: what the dense checkpoint would keep at each top-k."""

    kind: Literal["probe"]
    top_k: Annotated[list[int], Once] = Field(default_factory=list)
    """Budgets to probe; default sparsity.top_k."""
    rows: int = Field(2, ge=1)
    """Held-out rows for coverage and perplexity."""
    needles: int = Field(0, ge=0)
    """Needle prompts of data.row_len tokens; 0 leaves the needle score out."""


class PerplexityStage(Section):
    """Perplexity of held-out rows in every arm, at one or more budgets."""

    kind: Literal["perplexity"]
    rows: int = Field(8, ge=1)
    """Held-out rows of data.row_len tokens."""
    top_k: Annotated[list[int], Once] = Field(default_factory=list)
    """Budgets of the sparse and oracle arms; default sparsity.top_k."""
    arms: Arms = Field(list(ALL_ARMS))
    """Arms to measure."""


class RulerStage(Section):
    """RULER tasks on stored prompts, the same ones in every arm."""

    kind: Literal["ruler"]
    tasks: Annotated[list[RulerTask], Once] = Field(default_factory=list)
    """Task names; default all 13, of which `ruler-pd` has no qa_1 and qa_2."""
    preset: Literal["smoke", "quick", "paper"] | None = None
    """Lengths and samples in one word (RULER_PRESETS); `lengths` and `samples` go before it."""
    lengths: Annotated[
        list[Annotated[int, Field(ge=512, le=1 << 20)]], Field(min_length=1), Once
    ] = [4096]
    """Prompt plus generation lengths in tokens, chat template included."""
    samples: int = Field(50, ge=1)
    """Prompts per task and length."""
    top_k: Annotated[list[int], Once] = Field(default_factory=list)
    """Budgets of the sparse and oracle arms; default sparsity.top_k."""
    arms: Arms = Field(list(ALL_ARMS))
    """Arms to measure."""
    corpus: Literal["ruler-pd", "nvidia"] = "ruler-pd"
    """Text of the prompts: public-domain, not comparable with published scores; or the benchmark's own."""
    parity: Literal["native", "nvidia"] = "native"
    """`nvidia`: prompts are NVIDIA's to the byte, which needs `corpus: nvidia`; `native`: own seeds."""
    mode: Literal["auto", "base", "chat", "reasoning"] = "auto"
    """What stands around a question (eval/ruler_prompt.py); auto: chat where there is a chat template."""
    reasoning_tokens: int | None = Field(None, ge=1)
    """Tokens that `mode: reasoning` may generate, inside the length; default an eighth of it."""
    seed: int = Field(42, ge=0)
    """Seed of the prompts."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        preset = given.get("preset")
        return {**RULER_PRESETS.get(preset, {}), **given} if isinstance(preset, str) else given

    @model_validator(mode="after")
    def _fits_together(self) -> RulerStage:
        if self.parity == "nvidia" and self.corpus != "nvidia":
            raise ValueError(f"parity=nvidia needs `corpus: nvidia`, not corpus={self.corpus}")
        asked = [task for task in self.tasks if task in ("qa_1", "qa_2")]
        if self.corpus != "nvidia" and asked:
            raise ValueError(
                f"`tasks` names {asked[0]}, whose questions are in `corpus: nvidia` only: set it, or leave "
                "the task out"
            )
        if self.reasoning_tokens is not None and self.mode != "reasoning":
            raise ValueError(f"`reasoning_tokens` has no effect with mode={self.mode}: remove it")
        return self


class LongbenchStage(Section):
    """LongBench (version 1, E, version 2) on stored prompts, the same ones in every arm.

    Tasks whose records cannot be had, or whose metric lacks a package, are reported as not measured.
    """

    kind: Literal["longbench"]
    suites: Annotated[list[Literal["v1", "e", "v2"]], Field(min_length=1), Once] = ["v1"]
    """`v1`: 21 tasks; `e`: LongBench-E, 13 tasks by length; `v2`: 503 four-choice questions."""
    tasks: Annotated[list[LongbenchTask], Once] = Field(default_factory=list)
    """Tasks of v1 and e, without `_e`; default all of them."""
    folder: str | None = None
    """Folder with the data set's files (<task>.jsonl, data/, data.zip, data.json); default the hub."""
    max_length: int | None = Field(None, ge=256)
    """Longer prompts lose their middle, before the chat template; default the model's window less 1024
    (v2: at most 120000)."""
    samples: int | None = Field(None, ge=1)
    """At most this many records per task, drawn by `seed`; default all, as published scores need."""
    chat: bool | None = None
    """Chat template on the tasks that the reference gives one; default where the tokenizer has one."""
    top_k: Annotated[list[int], Once] = Field(default_factory=list)
    """Budgets of the sparse and oracle arms; default sparsity.top_k."""
    arms: Arms = Field(list(ALL_ARMS))
    """Arms to measure."""
    seed: int = Field(42, ge=0)
    """Seed of the draw where `samples` is set."""

    @model_validator(mode="after")
    def _tasks_in_suites(self) -> LongbenchStage:
        for task in self.tasks:
            if "v1" not in self.suites and ("e" not in self.suites or task in NOT_IN_LONGBENCH_E):
                raise ValueError(
                    f"`tasks` names {task}, which is in none of suites={self.suites}: add v1"
                )
        return self


class ReportStage(Section):
    """HTML report of everything under the run's folder."""

    kind: Literal["report"]
    margin: float = Field(1.0, gt=0, le=100)
    """Points (of 100) that the conversion may cost a benchmark's mean and still be called non-inferior."""


Stage = Annotated[
    WarmupStage
    | SparseStage
    | ProbeStage
    | PerplexityStage
    | RulerStage
    | LongbenchStage
    | ReportStage,
    Field(discriminator="kind"),
]
