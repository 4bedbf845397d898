"""Gradient norms of the index branch and of the backbone, before clipping, under every ZeRO stage.

DeepSpeed reports one norm for all weights. The two branches are separate parameter groups here, and
each of its optimizers can give a norm per group between the last backward pass of a step and
`engine.step()`. Where the gradients lie, and whether a group's norm still has to be summed over
ranks, differs by optimizer:

    fp32, ZeRO 0          plain AdamW; gradients are averaged and whole on every rank
    bf16, ZeRO 1          BF16_Optimizer; float32 gradients are averaged and whole on every rank
    ZeRO 1 and 2          each rank holds a partition; its norm function sums over ranks
    ZeRO 3                the same, one norm per sub-group of a parameter group
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def branch_norms(engine: Any) -> dict[str, float]:
    """L2 norm of each branch's gradient over all ranks, float32; every rank calls this.

    Call it after the step's last `backward` and before `step`.

    Returns:
        {"index": ..., "backbone": ...} for the branches that are trained.
    """
    optimizer = engine.optimizer
    squares: dict[str, float] = {}
    for group, norm in zip(_groups(optimizer), _group_norms(optimizer), strict=True):
        branch = group["branch"]
        squares[branch] = squares.get(branch, 0.0) + float(norm) ** 2
    return {branch: math.sqrt(square) for branch, square in squares.items()}


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    """Parameter group of each entry of `_group_norms`."""
    groups = optimizer.param_groups
    if hasattr(optimizer, "sub_group_to_group_id"):
        owners = optimizer.sub_group_to_group_id
        return [groups[owners[number]] for number in range(len(optimizer.fp16_groups))]
    return list(groups)


def _group_norms(optimizer: Any) -> list[Any]:
    """Global gradient norm of each group, from the optimizer that DeepSpeed chose."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return [
            _norm([p.grad for p in group["params"] if p.grad is not None])
            for group in optimizer.param_groups
        ]
    if hasattr(optimizer, "fp32_groups_gradients"):
        return [_norm(gradients) for gradients in optimizer.fp32_groups_gradients]
    if hasattr(optimizer, "_get_norm_groups"):
        return optimizer._get_norm_groups()
    if hasattr(optimizer, "averaged_gradients"):
        if optimizer.cpu_offload:
            return [
                optimizer.complete_grad_norm_calculation_for_cpu_offload(params)
                for params in optimizer.params_in_partition
            ]
        return [
            optimizer.get_grad_norm_direct(optimizer.averaged_gradients[number], params)
            for number, params in enumerate(optimizer.params_in_partition)
        ]
    raise RuntimeError(
        f"no way is known to read gradient norms from {type(optimizer).__name__}: this DeepSpeed is newer "
        "than train/gradients.py"
    )


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    """L2 norm of several tensors taken as one vector, in float32."""
    if not gradients:
        return torch.zeros(())
    return torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(g.detach().float()) for g in gradients])
    )
