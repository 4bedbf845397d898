"""Causal attention of a chunk after cached keys from kernels that know only squares and no mask.

cuDNN's causal mask is aligned at the first key, so for T queries after S - T keys the past is attended
without a mask, T keys a piece (a kernel that plans for every shape then meets one shape, not one a chunk),
and the last T keys as a causal square. Pieces are joined by their log-sum-exps:

    lse = log sum_p exp(lse_p)          out = sum_p exp(lse_p - lse) out_p

Backward: a kernel given the joint out and lse recomputes P = exp(s - lse) and delta = sum(dout * out) of
the joint softmax, so its gradients for the keys of its piece are the true ones, and those of the queries
add up. Called by library_dense.py; a test plugs in torch's CPU kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kernel:
    """A library's forward and backward on one piece, mask or none; q (B, H, T, D), k and v (B, G, S, D).

    forward(q, k, v, scale, causal) -> (out, lse (B, H, T), state); `state` goes back into
    backward(grad, q, k, v, out, lse, state, scale, causal) -> (dq, dk, dv).
    """

    forward: Callable[..., tuple[Tensor, Tensor, Any]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def piecewise_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, kernel: Kernel
) -> tuple[Tensor, Tensor]:
    """Causal attention of the last T of S tokens: out (B, H, T, D), and lse (B, H, T) without gradient."""
    return _Piecewise.apply(q, k, v, scale, kernel)


def cut(num_queries: int, num_keys: int) -> list[tuple[int, int, bool]]:
    """Key ranges and whether the causal mask applies; the square last, a short piece first."""
    past = num_keys - num_queries
    bounds = [0, *range(past % num_queries or num_queries, past + 1, num_queries)] if past else [0]
    ranges = [(start, stop, False) for start, stop in zip(bounds, bounds[1:], strict=False)]
    return [*ranges, (past, num_keys, True)]


class _Piecewise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, kernel):
        ranges = cut(q.shape[2], k.shape[2])
        states = []
        out: Tensor | None = None
        lse: Tensor | None = None
        for start, stop, causal in ranges:
            part, part_lse, state = kernel.forward(
                q, k[:, :, start:stop], v[:, :, start:stop], scale, causal
            )
            states.append(state)
            if out is None or lse is None:
                # One piece alone stays as the library made it; the sum of several is kept in float32.
                out, lse = part if len(ranges) == 1 else part.to(part_lse.dtype), part_lse
                continue
            joint = torch.logaddexp(lse, part_lse)
            out.mul_((lse - joint).exp_()[..., None])
            out.addcmul_(part.to(out.dtype), (part_lse - joint).exp_()[..., None])
            lse = joint
        assert out is not None and lse is not None
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ranges, ctx.states, ctx.scale, ctx.kernel = ranges, states, scale, kernel
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, _grad_lse):
        q, k, v, out, lse = ctx.saved_tensors
        grad_q: Tensor | None = None
        grads_k, grads_v = [], []
        for (start, stop, causal), state in zip(ctx.ranges, ctx.states, strict=True):
            dq, dk, dv = ctx.kernel.backward(
                grad_out,
                q,
                k[:, :, start:stop],
                v[:, :, start:stop],
                out,
                lse,
                state,
                ctx.scale,
                causal,
            )
            if len(ctx.ranges) > 1:
                dq = dq.to(lse.dtype)
            grad_q = dq if grad_q is None else grad_q.add_(dq)
            grads_k.append(dk)
            grads_v.append(dv)
        assert grad_q is not None
        return grad_q.to(q.dtype), torch.cat(grads_k, 2), torch.cat(grads_v, 2), None, None


def _cudnn_forward(q, k, v, scale, causal):
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )
    # The log-sum-exp comes as (B, H, T, 1); items 6 and 7 are the unused dropout's seed and offset.
    return found[0], found[1].reshape(q.shape[:3]), (found[6], found[7])


def _cudnn_backward(grad, q, k, v, out, lse, state, scale, causal):
    lse = lse.reshape(*q.shape[:3], 1)
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse, *state, None, None, None, q.shape[2], k.shape[2], 0.0, causal,
        scale=scale,
    )  # fmt: skip


CUDNN = Kernel(_cudnn_forward, _cudnn_backward)
