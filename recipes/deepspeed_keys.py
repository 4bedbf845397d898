"""The `deepspeed:` section: keys that DeepSpeed 0.19.8 reads and that a recipe may set.

DeepSpeed passes unknown top-level keys silently, so the section is checked against the models below with
the same sentences as the rest of the recipe. Three more kinds of key are refused with their reason: those
that the recipe sets itself (`OWNED`), those that DeepSpeed has removed or that this project does not use
(`NOT_USED`), and those that would have no effect at the chosen ZeRO stage.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from .explain import shown
from .schema import Section

DEFAULT_ZERO_STAGE: Literal[1] = 1

OWNED: dict[str, str] = {
    "train_batch_size": "stages.N.micro_batch_size and stages.N.gradient_accumulation",
    "train_micro_batch_size_per_gpu": "stages.N.micro_batch_size",
    "gradient_accumulation_steps": "stages.N.gradient_accumulation",
    "gradient_clipping": "stages.N.gradient_clipping",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "fp16": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "optimizer": "stages.N.index_lr, stages.N.backbone_lr, stages.N.betas and stages.N.weight_decay",
    "scheduler": "stages.N.index_schedule and stages.N.backbone_schedule",
    "steps_per_print": "train.log_every",
    "activation_checkpointing": "stages.N.activation_checkpointing",
    "zero_allow_untested_optimizer": "nothing, the optimizer is always torch's AdamW",
    "wandb": "wandb.mode and wandb.project",
}

_MONITOR = "metrics go to wandb and metrics.jsonl through the `wandb` section"
_REMOVED = "DeepSpeed has removed this feature"
NOT_USED: dict[str, str] = {
    "tensorboard": _MONITOR,
    "csv_monitor": _MONITOR,
    "comet": _MONITOR,
    "flops_profiler": "MFU is computed analytically and is always reported",
    "elasticity": _REMOVED,
    "nebula": _REMOVED,
    "compression_training": _REMOVED,
    "amp": _REMOVED,
    "curriculum_learning": _REMOVED,
    "sparse_attention": f"{_REMOVED}; the `sparsity` section is what you want",
    "data_efficiency": "documents are packed by the `data` section",
    "autotuning": "it would restart this run with other settings",
    "checkpoint": "checkpoints are kept by train.checkpoint_every and train.keep_checkpoints",
    "pipeline": "there is no pipeline parallelism here",
    "tensor_parallel": "there is no tensor parallelism here",
    "hybrid_engine": "it is for reinforcement learning",
}


class OffloadOptimizer(Section):
    """ZeRO-Offload of optimizer states."""

    device: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = None
    buffer_count: int = Field(4, ge=0)
    pin_memory: bool = True
    pipeline_read: bool = False
    pipeline_write: bool = False
    fast_init: bool = False
    ratio: float = Field(1.0, ge=0, le=1)

    @property
    def active(self) -> bool:
        return self.device != "none"


class OffloadParam(Section):
    """ZeRO-3 offload of parameters."""

    device: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = None
    buffer_count: int = Field(5, ge=0)
    buffer_size: int = Field(100_000_000, ge=0)
    max_in_cpu: int = Field(1_000_000_000, ge=0)
    pin_memory: bool = True


class ZeroOptimization(Section):
    """How optimizer states, gradients and weights are split over the ranks."""

    stage: Literal[0, 1, 2, 3] = DEFAULT_ZERO_STAGE
    overlap_comm: bool | None = None
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: int = Field(500_000_000, gt=0)
    allgather_partitions: bool = True
    allgather_bucket_size: int = Field(500_000_000, gt=0)
    round_robin_gradients: bool = False
    sub_group_size: int = Field(1_000_000_000, gt=0)
    offload_optimizer: OffloadOptimizer | None = None
    offload_param: OffloadParam | None = None
    zero_hpz_partition_size: int = Field(1, ge=1)
    memory_efficient_linear: bool = True
    stage3_max_live_parameters: int = Field(1_000_000_000, ge=0)
    stage3_max_reuse_distance: int = Field(1_000_000_000, ge=0)
    stage3_prefetch_bucket_size: int = Field(50_000_000, ge=0)
    stage3_param_persistence_threshold: int = Field(100_000, ge=0)
    stage3_model_persistence_threshold: int = Field(2**63 - 1, ge=0)
    stage3_module_granularity_threshold: int = Field(0, ge=0)
    stage3_use_all_reduce_for_fetch_params: bool = False
    stage3_allgather_sequential: bool = False
    stage3_gather_16bit_weights_on_model_save: bool = False

    @model_validator(mode="after")
    def _keys_have_an_effect(self) -> ZeroOptimization:
        only_stage_3 = ("stage3_", "offload_param", "zero_hpz", "memory_efficient_linear")
        idle = sorted(k for k in self.model_fields_set if k.startswith(only_stage_3))
        if self.stage != 3 and idle:
            raise ValueError(
                f"{idle[0]} has no effect at stage={self.stage}: remove it, or use stage=3"
            )
        if self.stage < 2 and self.offload_optimizer and self.offload_optimizer.active:
            raise ValueError(
                f"offload_optimizer is supported at stage 2 and 3 only, not at stage={self.stage}"
            )
        for name in ("offload_optimizer", "offload_param"):
            offload = getattr(self, name)
            if offload and offload.device == "nvme" and not offload.nvme_path:
                raise ValueError(
                    f"{name}.device=nvme needs {name}.nvme_path, a folder on that disk"
                )
        return self


class CommsLogger(Section):
    """Logs of collective operations."""

    enabled: bool = False
    verbose: bool = False
    prof_all: bool = True
    prof_ops: list[str] = Field(default_factory=list)
    debug: bool = False


class Aio(Section):
    """Asynchronous reads and writes of nvme offload."""

    block_size: int = Field(1_048_576, ge=1)
    queue_depth: int = Field(8, ge=1)
    intra_op_parallelism: int = Field(1, ge=1)
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: bool = False


class DeepspeedSection(Section):
    """Top level of the `deepspeed:` section."""

    zero_optimization: ZeroOptimization = ZeroOptimization()
    communication_data_type: Literal["fp32", "bf16", "fp16"] | None = None
    prescale_gradients: bool = False
    gradient_predivide_factor: float = Field(1.0, gt=0)
    zero_force_ds_cpu_optimizer: bool = True
    aio: Aio | None = None
    comms_logger: CommsLogger | None = None
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False

    @model_validator(mode="after")
    def _offload_works_with_torch_adamw(self) -> DeepspeedSection:
        offload = self.zero_optimization.offload_optimizer
        if offload and offload.active and self.zero_force_ds_cpu_optimizer:
            raise ValueError(
                "zero_optimization.offload_optimizer needs the key zero_force_ds_cpu_optimizer: false, "
                "because the optimizer is torch's AdamW"
            )
        return self


def refused_key(section: dict[str, Any]) -> str | None:
    """Sentence about a key that may never be set, or None.

    Args:
        section: the `deepspeed:` section as written.
    """
    for key, value in section.items():
        place = f"deepspeed.{key}={shown(value)}"
        if key in OWNED:
            return f"{place}: the recipe sets this itself; use {OWNED[key]} instead"
        if key in NOT_USED:
            return f"{place}: not used here ({NOT_USED[key]}); remove it"
    return None


def with_default_stage(section: dict[str, Any]) -> dict[str, Any]:
    """The section with `zero_optimization.stage` filled in; its other values as written."""
    zero = {"stage": DEFAULT_ZERO_STAGE, **section.get("zero_optimization", {})}
    return {**section, "zero_optimization": zero}
