"""The KL of a sparse layer that travels with its output: computed once, where the output's gradient comes.

In the forward pass it would be computed twice under activation checkpointing, since that runs twice; what
the first one made would be thrown away. In the backward pass there is one, whatever recomputes the layer.

Called by attention.py. Traps 1 and 2 of the method: the output carries the gradient, so a checkpoint cannot
drop it, and hooks of a sharded optimizer see it like any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class AttachKL(torch.autograd.Function):
    """Identity on the layer's output; its backward computes the KL and feeds it to the index branch.

    Of what is saved the attention's own backward keeps q, k and lse anyway; index q and k take the place of
    their gradients, which a KL made in the forward pass would have to keep.
    """

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        index_q: Tensor,
        index_k: Tensor,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        block_ids: Tensor | None,
        compute: Any,
        weight: float,
        report: Any,
    ) -> Tensor:
        """`out`, as a view.

        Args:
            out: the layer's attention output, any shape.
            index_q, index_k: of the layer; the KL is differentiated by them.
            q, k, lse, block_ids: without gradients; what else the KL is of.
            compute: makes the KL, a scalar, of (index_q, index_k, q, k, lse, block_ids).
            weight: of the KL's gradient.
            report: its `kl` is set in the backward pass.
        """
        ctx.save_for_backward(index_q, index_k, q, k, lse, block_ids)
        ctx.compute, ctx.weight, ctx.report = compute, weight, report
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        index_q, index_k, *rest = ctx.saved_tensors  # once: a checkpointed layer is recomputed here
        needed = ctx.needs_input_grad[1:3]
        pairs = zip((index_q, index_k), needed, strict=True)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(need) for x, need in pairs]
            kl = ctx.compute(*leaves, *rest)
        ctx.report.kl = kl.detach()
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        made = torch.autograd.grad(kl, wanted, torch.full_like(kl, ctx.weight)) if wanted else ()
        found = iter(made)
        return grad_out, *(next(found) if need else None for need in needed), *[None] * 7
