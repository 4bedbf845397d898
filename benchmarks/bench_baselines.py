"""What others compute the same with: torch's dense attention, FlexAttention, flash-msa, plain torch.

Each maker takes Inputs and returns a call without arguments, or raises `Skip` with the reason.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from bench_data import Inputs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

Call = Callable[[], Any]
FLEX_TABLE_BYTES = 2 << 30
"""FlexAttention needs a table of queries times blocks; beyond this it is left out."""
SCORES_BYTES = 4 << 30
"""Materialised block scores beyond this are left out."""
CHUNK = 2048
"""Queries whose token scores exist at once in the torch selection."""


class Skip(Exception):
    """This baseline does not run here; the message says why."""


def sdpa(backend: SDPBackend, inputs: Inputs) -> Call:
    """Causal attention by one of torch's fused kernels."""
    need_cuda(inputs)
    q, k, v = inputs.q, inputs.k, inputs.v

    def call() -> tuple[Tensor]:
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=inputs.scale, enable_gqa=True
            )
        return (out,)

    return call


def library(inputs: Inputs) -> Call:
    """The library path of this package (kernels/library_dense.py)."""
    from dense2sparse.kernels.library_dense import dense_attention

    return functools.partial(dense_attention, inputs.q, inputs.k, inputs.v, scale=inputs.scale)


def library_forward(inputs: Inputs, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Output of the library path, to differentiate."""
    from dense2sparse.kernels.library_dense import dense_attention

    return dense_attention(q, k, v, scale=inputs.scale)[0]


def sdpa_forward(backend: SDPBackend, inputs: Inputs, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Output of one of torch's fused kernels, to differentiate."""
    need_cuda(inputs)
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=inputs.scale, enable_gqa=True
        )


def library_decode(inputs: Inputs) -> Call:
    """One token through the library path."""
    from dense2sparse.kernels.library_dense import dense_attention

    offset = inputs.shape.length - 1
    tensors = inputs.q, inputs.k, inputs.v
    return functools.partial(dense_attention, *tensors, scale=inputs.scale, query_offset=offset)


def sdpa_decode(backend: SDPBackend, inputs: Inputs) -> Call:
    """One token: the heads of a group are the queries of one call, so keys are read once."""
    need_cuda(inputs)
    q = inputs.q.unflatten(1, (inputs.shape.groups, -1))[:, :, :, 0]  # (B, G, R, D)
    k, v = inputs.k, inputs.v

    def call() -> tuple[Tensor]:
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(q, k, v, scale=inputs.scale)
        return (out.flatten(1, 2).unsqueeze(2),)

    return call


def matmul_decode(inputs: Inputs) -> Call:
    """One token: two matrix products and a softmax."""
    q = inputs.q.unflatten(1, (inputs.shape.groups, -1))[:, :, :, 0]

    def call() -> tuple[Tensor]:
        weights = (q @ inputs.k.transpose(-1, -2) * inputs.scale).softmax(-1)
        return ((weights @ inputs.v).flatten(1, 2).unsqueeze(2),)

    return call


def torch_select(inputs: Inputs) -> Call:
    """Matrix product, block maximum and torch.topk, in chunks of queries."""
    shape = inputs.shape
    block, length = shape.block_size, shape.length
    if length % block:
        raise Skip("whole blocks only")
    if shape.batch * shape.groups * CHUNK * length * 4 > 4 * SCORES_BYTES:
        raise Skip("token scores of a chunk are too large")
    position = torch.arange(length, device=inputs.q.device)

    def call() -> Tensor:
        found = []
        for start in range(0, length, CHUNK):
            stop = min(start + CHUNK, length)
            keys = inputs.index_k[:, :, :stop]
            scores = inputs.index_q[:, :, start:stop] @ keys.transpose(-1, -2)
            scores.masked_fill_(position[None, :stop] > position[start:stop, None], -math.inf)
            scores = torch.nn.functional.pad(scores, (0, -stop % block), value=-math.inf)
            best = scores.unflatten(-1, (-1, block)).amax(-1)
            best.scatter_(
                -1, (position[start:stop] // block).expand(best.shape[:3])[..., None], math.inf
            )
            found.append(_ids(best, shape.top_k))
        return torch.cat(found, dim=2)

    return call


def topk_alone(inputs: Inputs) -> Call:
    """torch.topk on block scores that are there already; its result is not checked."""
    shape = inputs.shape
    size = (shape.batch, shape.groups, shape.length, shape.num_blocks)
    if math.prod(size) * 4 > SCORES_BYTES:
        raise Skip(f"block scores would take {math.prod(size) * 4 / 2**30:.0f} GiB")
    scores = torch.randn(size, device=inputs.q.device)
    return lambda: scores.topk(min(shape.top_k, shape.num_blocks), dim=-1)


def flex(inputs: Inputs) -> Call:
    """FlexAttention with the same selection: lists of blocks for 128 queries, a table for each query."""
    need_cuda(inputs)
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    shape, ids = inputs.shape, inputs.block_ids
    assert ids is not None
    if shape.length % 128 or shape.block_size % 128:
        raise Skip("lengths and blocks in multiples of 128 only")
    if math.prod(ids.shape[:3]) * shape.num_blocks > FLEX_TABLE_BYTES:
        raise Skip(f"its mask needs a table of queries x blocks, over {FLEX_TABLE_BYTES >> 30} GiB")
    chosen = torch.zeros(*ids.shape[:3], shape.num_blocks + 1, dtype=torch.bool, device=ids.device)
    chosen = chosen.scatter_(-1, (ids + 1).long(), True)[..., 1:].contiguous()
    block, repeats = shape.block_size, shape.heads // shape.groups

    def support(b: Any, h: Any, query: Any, key: Any) -> Any:
        return chosen[b, h // repeats, query, key // block] & (key <= query)

    tiles = chosen.unflatten(2, (-1, 128)).any(dim=3).repeat_interleave(repeats, dim=1)
    counts = tiles.sum(-1, dtype=torch.int32)
    order = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    mask = BlockMask.from_kv_blocks(
        counts, order.contiguous(), BLOCK_SIZE=(128, block), mask_mod=support
    )
    torch._dynamo.reset()  # else the ninth shape would run uncompiled
    compiled = torch.compile(flex_attention, dynamic=False)

    def call() -> tuple[Tensor]:
        return (
            compiled(
                inputs.q,
                inputs.k,
                inputs.v,
                block_mask=mask,
                scale=inputs.scale,
                enable_gqa=True,
            ),
        )

    return call


def flash_msa(inputs: Inputs) -> Call:
    """poolsideai/flash-msa, the whole layer; head width and block 128 only."""
    need_cuda(inputs)
    if importlib.util.find_spec("flash_msa") is None:
        raise Skip("flash_msa is not installed")
    shape = inputs.shape
    if (shape.width, shape.index_width, shape.block_size) != (128, 128, 128):
        raise Skip("head width and block 128 only")
    if inputs.data == "model-like":
        raise Skip("it selects by itself: random or stored data only")
    from flash_msa import flash_msa_func

    size = (shape.batch, shape.length, shape.heads, shape.width)

    def call() -> tuple[Tensor]:
        out, _ = flash_msa_func(
            inputs.index_q,
            inputs.index_k,
            inputs.q,
            inputs.k,
            inputs.v,
            shape.top_k * shape.block_size,
            inputs.scale,
        )
        return (out.reshape(size).transpose(1, 2),)

    return call


def _ids(block_scores: Tensor, top_k: int) -> Tensor:
    """Ascending, -1 padded ids of the best blocks."""
    count = block_scores.shape[-1]
    best = block_scores.topk(min(top_k, count), dim=-1)
    ids = torch.where(best.values > -math.inf, best.indices, count).sort(dim=-1).values
    ids = torch.where(ids < count, ids, -1).to(torch.int32)
    return torch.nn.functional.pad(ids, (0, top_k - ids.shape[-1]), value=-1)


def need_cuda(inputs: Inputs) -> None:
    """Raises:
    Skip: the inputs are not on a GPU.
    """
    if inputs.q.device.type != "cuda":
        raise Skip("needs a GPU")
