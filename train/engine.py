"""One DeepSpeed engine per training stage.

Weights pass from stage to stage by a full-precision export, never by flipping `requires_grad` on a
live engine: each ZeRO stage goes wrong in its own way there (docs/log.md). Only torch's AdamW is
used: it needs no compiler and its update is the same in every ZeRO stage.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .losses import Objective
from .schedule import ScheduleFields, lr_factor


class StageFields(Protocol):
    """The fields of a recipe's training stage that shape its engine."""

    kind: str
    micro_batch_size: int
    gradient_accumulation: int
    index_lr: float
    backbone_lr: float | None
    index_schedule: ScheduleFields
    backbone_schedule: ScheduleFields
    weight_decay: float
    betas: tuple[float, float]
    gradient_clipping: float


def init_distributed() -> None:
    """Start torch.distributed from the launcher's variables (RANK, WORLD_SIZE, MASTER_ADDR, ...)."""
    import deepspeed

    skip_shared_memory_build()
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that newer torch versions rename.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # Rank 0 fetches and converts a model while the others wait in a barrier.
    deepspeed.init_distributed(timeout=timedelta(hours=4), verbose=False)


def skip_shared_memory_build() -> None:
    """Keep DeepSpeed from compiling its CPU all-reduce (a minute with g++ and ninja; gloo does the work).

    The table is private to DeepSpeed; where it is gone, the build simply happens.
    """
    import deepspeed

    table = getattr(deepspeed.ops, "__compatible_ops__", None)
    if isinstance(table, dict) and "deepspeed_shm_comm" in table:
        table["deepspeed_shm_comm"] = False


def deepspeed_config(
    section: dict[str, Any], *, zero_stage: int, precision: str, stage: StageFields, world_size: int
) -> dict[str, Any]:
    """The DeepSpeed configuration of one stage: the recipe's section plus what the recipe says elsewhere.

    Args:
        section: the recipe's `deepspeed` section, already checked.
        precision: "fp32" or "bf16"; bf16 keeps float32 masters and reduces gradients in float32.
    """
    config = copy.deepcopy(section)
    config.setdefault("zero_optimization", {})["stage"] = zero_stage
    config.update(
        train_micro_batch_size_per_gpu=stage.micro_batch_size,
        gradient_accumulation_steps=stage.gradient_accumulation,
        train_batch_size=stage.micro_batch_size * stage.gradient_accumulation * world_size,
        gradient_clipping=stage.gradient_clipping,
        bf16={"enabled": precision == "bf16"},
        steps_per_print=2**31 - 1,
    )
    config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    config.setdefault("communication_data_type", "fp32")
    # Offloading would insist on DeepSpeed's own Adam, which has to be compiled.
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    return config


def parameter_groups(
    stage: StageFields,
    index: list[tuple[str, nn.Parameter]],
    backbone: list[tuple[str, nn.Parameter]],
) -> list[dict[str, Any]]:
    """AdamW groups: per branch, weight matrices with decay and vectors (norms, biases) without.

    Sets `requires_grad`: frozen parameters are left out of the groups and get no gradient. An empty
    group is left out, because ZeRO 1 and 2 fail on it.
    """
    train_backbone = stage.backbone_lr is not None
    for _, parameter in backbone:
        parameter.requires_grad_(train_backbone)
    for _, parameter in index:
        parameter.requires_grad_(True)
    branches = [("index", index, stage.index_lr)]
    if train_backbone:
        branches.append(("backbone", backbone, stage.backbone_lr))  # type: ignore[arg-type]
    groups = []
    for branch, named, lr in branches:
        for is_matrix in (True, False):
            members = [p for _, p in named if (p.dim() >= 2) == is_matrix]
            if members:
                decay = stage.weight_decay if is_matrix else 0.0
                groups.append(
                    {"params": members, "lr": lr, "weight_decay": decay, "branch": branch}
                )
    return groups


def set_checkpointing(model: Any, stage: Any) -> None:
    """Recompute activations in the backward pass where the stage asks for it.

    Never with a frozen backbone: nothing flows back through it, so nothing is kept for it, and under
    ZeRO-3 the recomputation would see other metadata than the forward pass did.
    """
    if stage.activation_checkpointing and stage.backbone_lr is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def start_engine(
    objective: Objective,
    groups: list[dict[str, Any]],
    *,
    config: dict[str, Any],
    betas: tuple[float, float],
) -> Any:
    """Wrap a float32 objective in an engine; float32 masters start from its exact weights.

    With bf16, DeepSpeed rounds the module first and takes the masters from the rounded weights, and
    it rounds float32 buffers too (rotary frequencies: wrong angles at long rows). Both are put
    back.
    """
    import deepspeed

    optimizer = torch.optim.AdamW(groups, betas=betas, eps=1e-8)
    is_bf16 = config["bf16"]["enabled"]
    exact = (
        {n: p.data for n, p in objective.named_parameters() if p.requires_grad} if is_bf16 else {}
    )
    buffers = {n: b.detach().clone() for n, b in objective.named_buffers() if b.is_floating_point()}
    with contextlib.redirect_stdout(io.StringIO()):  # memory reports of every group, unasked
        engine, *_ = deepspeed.initialize(
            model=objective, optimizer=optimizer, config=config, dist_init_required=False
        )
    if is_bf16:
        _set_masters(engine, exact)
        for name, buffer in engine.module.named_buffers():
            if name in buffers:
                buffer.data = buffers[name].to(buffer.device)
    return engine


def _set_masters(engine: Any, exact: dict[str, Tensor]) -> None:
    """Give each float32 master the value it had before the module was rounded."""
    from deepspeed.utils import safe_set_full_fp32_param

    for name, parameter in engine.module.named_parameters():
        if name in exact:
            safe_set_full_fp32_param(parameter, exact[name].to(engine.device))


def masters(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and whole float32 value of every trained parameter; every rank calls this (collective).

    Names are those of the language model (without the objective's prefix). Values are on the
    engine's device and valid until the next one is asked for.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        value = safe_get_full_fp32_param(parameter)
        if value is None:  # fp32 with ZeRO 0: the parameter is its own master
            value = parameter.detach()
        yield name.removeprefix("model."), value.detach()


def set_learning_rates(
    engine: Any, stage: StageFields, *, step: int, total_steps: int
) -> dict[str, float]:
    """Set the rates of one step (counted from 0 in its stage) and return them by branch."""
    rates = {
        "index": stage.index_lr
        * lr_factor(stage.index_schedule, step=step, total_steps=total_steps)
    }
    if stage.backbone_lr is not None:
        factor = lr_factor(stage.backbone_schedule, step=step, total_steps=total_steps)
        rates["backbone"] = stage.backbone_lr * factor
    for group in engine.optimizer.param_groups:
        group["lr"] = rates[group["branch"]]
    return rates


def stop_engine(engine: Any) -> None:
    """Release the engine's memory and hooks; the stage is over."""
    engine.destroy()
    with contextlib.suppress(RuntimeError):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
