"""What each kernel computes: how to launch it without a GPU, and the FLOPs that it really executes.

How many steps a kernel takes follows from its FLOPs: those executed over those that SASS has in one pass
of the main loop. So tiles, warps and stages may change freely; a new kernel with products needs a line in
ROLES.

Shapes: H query heads, G groups, N tokens, D head width, D_idx index width, k selected blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from bench_data import Shape

from dense2sparse.kernels import (
    triton_attend,
    triton_attend_backward,
    triton_decode,
    triton_kl,
    triton_kl_full,
    triton_select,
    triton_sparse_kl,
)

UNION_FACTORS = {1: 1.0, 4: 1.42, 8: 1.71, 16: 2.07, 32: 2.49, 64: 3.03}
"""Blocks that so many neighbours select, over k: results/unions-smollm2.json, index branch, 16 of 256
blocks, last quarter of the text; kernels.py takes these for long rows too."""

Constants = Mapping[str, Any]


def union_factor(tokens: float, factors: Mapping[int, float] = UNION_FACTORS) -> float:
    """Linear in the logarithm between the known sizes of a tile; beyond them as the last."""
    known = sorted(factors)
    tokens = min(max(tokens, 1.0), known[-1])
    low = max(one for one in known if one <= tokens)
    high = min(one for one in known if one >= tokens)
    if low == high:
        return factors[low]
    share = math.log(tokens / low) / math.log(high / low)
    return factors[low] + share * (factors[high] - factors[low])


def _edges(shape: Shape) -> float:
    """Pairs of one head in whole selected blocks: what kernels compute, masked or not."""
    return float(shape.length * min(shape.top_k * shape.block_size, shape.length))


def _over_unions(shape: Shape, constants: Constants) -> float:
    tokens = constants.get("TOKENS", constants.get("ROWS", 1))
    return _edges(shape) * union_factor(tokens, constants.get("UNIONS", UNION_FACTORS))


def _main(shape: Shape) -> float:
    """FLOPs a pair of one product of all query heads."""
    return 2.0 * shape.width * shape.heads


def _index(shape: Shape) -> float:
    """FLOPs a pair of one product of all index heads."""
    return 2.0 * shape.index_width * shape.groups


def _scratch(times: int) -> Callable[[Shape], float]:
    """Bytes of the KL's scratch, written or read `times`; none where it fits into the cache."""

    def moved(shape: Shape) -> float:
        fits = getattr(triton_kl_full, "SCRATCH_BYTES", 0) <= 50e6
        return 0.0 if fits else 2.0 * times * shape.groups * shape.pairs

    return moved


def _nothing(shape: Shape) -> float:
    return 0.0


@dataclass(frozen=True)
class Role:
    """What one kernel of an operation executes."""

    flops: Callable[[Shape, Constants], float]
    heads_inside: bool = False
    """The main loop goes over the heads of a group; what stands around it runs once for all of them."""
    moved: Callable[[Shape], float] = _nothing
    """Bytes from or to memory that no cache holds, beside the operation's own tensors."""
    rare: Callable[[Constants], float] = lambda constants: 1.0
    """How often the innermost code behind a forward branch runs, a step."""


_STUDENT = Role(lambda shape, c: _index(shape) * _over_unions(shape, c))
_BACKWARD = {
    # With atomics a fifth product makes dq, else a kernel of its own.
    "_key_gradients": Role(lambda s, c: (5 if c.get("ATOMIC") else 4) * _main(s) * _edges(s)),
    "_query_gradients": Role(lambda shape, c: 3 * _main(shape) * _over_unions(shape, c)),
}


def _index_pairs(shape: Shape, _: Constants) -> float:
    return _index(shape) * shape.pairs


ROLES: dict[str, dict[str, Role]] = {
    "select": {
        # The list is touched once a block, whatever the keys of a step.
        "_select": Role(_index_pairs, rare=lambda c: c.get("KEYS", 1) / c.get("BLOCK", 1)),
    },
    "sparse": {"_attend": Role(lambda shape, c: 2 * _main(shape) * _over_unions(shape, c))},
    "sparse backward": _BACKWARD,
    "sparse backward deterministic": _BACKWARD,
    "kl": {
        "_student": Role(_index_pairs),
        "_difference": Role(
            lambda shape, _: (_main(shape) + _index(shape)) * shape.pairs,
            heads_inside=True,
            moved=_scratch(1),
        ),
        "query_gradient_kernel": Role(_index_pairs, moved=_scratch(1)),
        "key_gradient_kernel": Role(_index_pairs, moved=_scratch(1)),
    },
    "sparse kl": {
        "student_kernel": _STUDENT,
        "difference_kernel": Role(
            lambda shape, c: (_main(shape) + 2 * _index(shape)) * _over_unions(shape, c)
        ),
        "key_kernel": Role(lambda shape, _: _index(shape) * _edges(shape)),
    },
    "decode": {
        # Sixteen columns at least, of which the index heads fill some.
        "_block_scores": Role(
            lambda shape, c: 2.0 * shape.index_width * c.get("HEADS", 16) * shape.length,
            moved=lambda shape: 2.0 * shape.index_width * shape.length,
        ),
    },
}
"""By operation and by the kernel's function; kernels without products are not here."""


def launch(operation: str, shape: Shape) -> None:
    """Launch the operation's kernels with their defaults, on tensors without memory."""
    _LAUNCHES[operation](shape)


def _tensors(shape: Shape, queries: int | None = None) -> dict[str, torch.Tensor]:
    """Heads after tokens in memory, as models have them."""

    def tensor(tokens: int, heads: int, width: int) -> torch.Tensor:
        size = (shape.batch, tokens, heads, width)
        return torch.empty(size, dtype=torch.bfloat16, device="meta").transpose(1, 2)

    length, queries = shape.length, queries or shape.length
    return {
        "q": tensor(queries, shape.heads, shape.width),
        "k": tensor(length, shape.groups, shape.width),
        "index_q": tensor(queries, shape.groups, shape.index_width),
        "index_k": tensor(length, 1, shape.index_width),
        "lse": torch.empty(shape.batch, shape.heads, queries, device="meta"),
        "ids": torch.empty(
            shape.batch, shape.groups, queries, shape.top_k, dtype=torch.int32, device="meta"
        ),
    }


def _select(shape: Shape) -> None:
    given = _tensors(shape)
    triton_select.select(
        given["index_q"], given["index_k"], None, block_size=shape.block_size, top_k=shape.top_k
    )


def _attend(shape: Shape) -> None:
    given = _tensors(shape)
    triton_attend.attend(
        given["q"], given["k"], given["k"], given["ids"], None,
        block_size=shape.block_size, scale=shape.width**-0.5,
    )  # fmt: skip


def _backward(deterministic: bool) -> Callable[[Shape], None]:
    def start(shape: Shape) -> None:
        given = _tensors(shape)
        q, k = given["q"], given["k"]
        triton_attend_backward.attend_backward(
            q, k, k, given["ids"], None, q, given["lse"], q, block_size=shape.block_size,
            scale=shape.width**-0.5, deterministic=deterministic,
        )  # fmt: skip

    return start


def _kl_inputs(shape: Shape) -> tuple[list[torch.Tensor], dict[str, Any]]:
    given = _tensors(shape)
    scales = {"scale": shape.width**-0.5, "index_scale": shape.index_width**-0.5}
    return [given[x] for x in ("q", "k", "lse", "index_q", "index_k")], {
        **scales,
        "need_grad": True,
    }


def _full_kl(shape: Shape) -> None:
    inputs, options = _kl_inputs(shape)
    triton_kl.full_kl(*inputs, None, **options)


def _sparse_kl(shape: Shape) -> None:
    inputs, options = _kl_inputs(shape)
    ids = _tensors(shape)["ids"]
    triton_sparse_kl.sparse_kl(*inputs, ids, None, block_size=shape.block_size, **options)


def _decode(shape: Shape) -> None:
    given = _tensors(shape, queries=1)
    triton_decode.sparse_decode(
        given["q"], given["k"], given["k"], given["index_q"], given["index_k"],
        block_size=shape.block_size, top_k=shape.top_k,
    )  # fmt: skip


_LAUNCHES: dict[str, Callable[[Shape], None]] = {
    "select": _select,
    "sparse": _attend,
    "sparse backward": _backward(False),
    "sparse backward deterministic": _backward(True),
    "kl": _full_kl,
    "sparse kl": _sparse_kl,
    "decode": _decode,
}
