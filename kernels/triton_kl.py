"""KL of the index branch in Triton: the backend's operation, over full rows or selected blocks.

Value and gradients are made together in the forward pass, where the teacher is at hand; the backward pass
scales them. Kernels: triton_kl_full.py (warm-up), triton_sparse_kl.py (sparse stage). Definition:
reference.index_kl and arXiv 2606.13392, section 3.

Shapes: B batch, H query heads, G groups (= index heads), T = S tokens, L tiles of query tokens, M taken.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from .documents import DocumentIds, key_starts
from .triton_kl_full import FullLaunch, FullRows, default_launch
from .triton_sparse_kl import sparse_kl

LOG2_E = math.log2(math.e)


class TritonKL(torch.autograd.Function):
    """Scalar KL; the gradients of index q and k are made in the forward pass."""

    @staticmethod
    def forward(ctx, index_q, index_k, kernel, need_grad):
        kl, grad_q, grad_k = kernel(index_q, index_k, need_grad)
        if grad_q is not None:
            # Gradients of a mean over tokens underflow in float16, which bfloat16 holds in half the memory.
            saved = torch.bfloat16 if index_q.dtype == torch.bfloat16 else torch.float32
            ctx.save_for_backward(grad_q.to(saved), grad_k.to(saved))
            ctx.dtypes = (index_q.dtype, index_k.dtype)
        return kl

    @staticmethod
    def backward(ctx, grad):
        grad_q, grad_k = ctx.saved_tensors
        dtype_q, dtype_k = ctx.dtypes
        return (grad * grad_q).to(dtype_q), (grad * grad_k).to(dtype_k), None, None


def index_kl(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    *,
    scale: float | None = None,
    index_scale: float | None = None,
    block_ids: Tensor | None = None,
    block_size: int | None = None,
    document_ids: DocumentIds = None,
    fraction: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """See reference.index_kl; a float32 scalar, differentiable in index_q and index_k only.

    Two calls give the same bits.

    Args:
        lse: (B, H, T), over the same support as `block_ids`.
        fraction, seed: full rows only, see full_kl.
    """
    q, k, lse, starts = q.detach(), k.detach(), lse.detach(), key_starts(document_ids)
    scales = {
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "index_scale": index_q.shape[-1] ** -0.5 if index_scale is None else index_scale,
    }
    assert block_ids is None or fraction == 1.0

    def kernel(index_q: Tensor, index_k: Tensor, need_grad: bool):
        inputs = (q, k, lse, index_q, index_k)
        options: dict[str, Any] = {"need_grad": need_grad, **scales}
        if block_ids is None:
            return full_kl(*inputs, starts, fraction=fraction, seed=seed, **options)
        assert block_size is not None
        return sparse_kl(*inputs, block_ids, starts, block_size=block_size, **options)

    need_grad = torch.is_grad_enabled() and (index_q.requires_grad or index_k.requires_grad)
    return TritonKL.apply(index_q, index_k, kernel, need_grad)


def full_kl(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    starts: Tensor | None,
    *,
    scale: float,
    index_scale: float,
    need_grad: bool,
    fraction: float = 1.0,
    seed: int = 0,
    launch: FullLaunch | None = None,
    tiles: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Mean over rows and index heads of KL(teacher || student) over all visible tokens.

    Args:
        q: (B, H, T, D); k: (B, G, T, D); index_q: (B, G, T, D_idx); index_k: (B, 1, T, D_idx): one dtype,
            any strides with contiguous channels.
        lse: (B, H, T) natural log-sum-exp of dense attention.
        starts: (B, T) int32, first position of each token's document, or None.
        fraction: share of query tiles that are computed, drawn from `seed`; value and gradients are divided
            by the share that was taken, hence unbiased. Tiles not taken cost nothing, their dq_idx is 0.
        tiles: (B, M) int32 ascending, the query tiles to compute; overrules `fraction`.

    Returns:
        KL, scalar float32; its gradients with respect to index_q and index_k, float32, or None.
    """
    q, k, index_q, index_k = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, index_q, index_k)
    )
    lse = lse.float().contiguous()
    starts = None if starts is None else starts.contiguous()
    launch = launch or default_launch(q.shape[3], index_q.shape[3], q.dtype)
    batch, groups, num_tokens, index_width = index_q.shape
    num_tiles = triton.cdiv(num_tokens, launch.tile)
    if tiles is None:
        tiles = taken_tiles(num_tiles, batch, fraction, seed, q.device)
    total, grad_q, grad_k = FullRows(q, k, lse, index_q, index_k, starts, tiles, launch).run(
        scale * LOG2_E, index_scale * LOG2_E, need_grad
    )
    # Each tile stands for num_tiles / taken tiles; the kernels count in log2 units.
    weight = num_tiles / tiles.shape[1] / (batch * groups * num_tokens)
    kl = (total * (weight * math.log(2.0))).float()
    if grad_q is None or grad_k is None:
        return kl, None, None
    if tiles.shape[1] < num_tiles:
        taken, grad_q = grad_q, grad_q.new_zeros(batch, groups, num_tiles, grad_q.shape[3])
        grad_q.scatter_(2, tiles.long()[:, None, :, None].expand_as(taken), taken)
    grad_q = grad_q.view(batch, groups, -1, index_width)[:, :, :num_tokens]
    return kl, grad_q * (weight * index_scale), grad_k.mul_(weight * index_scale)


def tiles_at(offsets: Tensor, num_tiles: int, num_taken: int) -> Tensor:
    """floor((i * num_tiles + offset) / num_taken), evenly spread: (B, num_taken) int32 ascending.

    Each tile is taken by exactly num_taken of the offsets 0 .. num_tiles - 1, so a uniform offset takes
    every tile with equal probability, at a cost that hardly depends on the offset.
    """
    place = torch.arange(num_taken, device=offsets.device)
    return ((place * num_tiles + offsets[:, None]) // num_taken).to(torch.int32)


def taken_tiles(
    num_tiles: int, batch: int, fraction: float, seed: int, device: torch.device
) -> Tensor:
    """Tiles of query tokens to compute: (B, M) int32, M = round(fraction * num_tiles), at least 1."""
    assert 0.0 < fraction <= 1.0
    num_taken = max(1, round(fraction * num_tiles))
    if num_taken == num_tiles:
        return torch.arange(num_tiles, device=device, dtype=torch.int32).expand(batch, -1)
    generator = torch.Generator(device).manual_seed(seed)
    offsets = torch.randint(num_tiles, (batch,), generator=generator, device=device)
    return tiles_at(offsets, num_tiles, num_taken)
