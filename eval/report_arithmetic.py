"""Operations of attention per token, by formula: arithmetic of the definition, no time and no measurement.

Two products of width d over the keys that a query reads (scores and values) are 4 H d operations a key; the
index branch scores every visible key once, 2 H_idx d_idx (arXiv 2606.13392, section 2). Averaged over a
row of N tokens a query sees (N + 1) / 2 keys, so that dense attention is 2 H d N a token for long rows.
Projections, feed-forward layers and the output layer are the same in every arm and are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def shape_of(result: Mapping[str, Any]) -> dict[str, int] | None:
    """Of the converted model that a stage measured; None in results of an earlier version."""
    shapes = [arm.get("shape") or {} for arm in result["arms"].values()]
    return next((shape for shape in shapes if "block_size" in shape), None)


def dense_per_token(shape: Mapping[str, int], length: int) -> float:
    """Operations of all layers' dense attention, per token, averaged over a row of `length` tokens."""
    return shape["layers"] * _read(shape, (length + 1) / 2)


def sparse_per_token(shape: Mapping[str, int], length: int, top_k: int) -> float:
    """The same with `top_k` blocks in the sparse layers, the index branch's scores included.

    Where all blocks fit the budget nothing is chosen: attention is dense and the index branch rests.
    """
    if top_k * shape["block_size"] >= length:
        return dense_per_token(shape, length)
    visible = (length + 1) / 2
    index = 2.0 * shape["index_heads"] * shape["index_width"] * visible
    kept = _read(shape, mean_keys(length, top_k * shape["block_size"]))
    dense = (shape["layers"] - shape["sparse_layers"]) * _read(shape, visible)
    return dense + shape["sparse_layers"] * (index + kept)


def mean_keys(length: int, budget: int) -> float:
    """Keys that a query reads on average over a row: all it sees, at most `budget` tokens."""
    short = min(length, budget)
    return (short * (short + 1) / 2 + (length - short) * budget) / length


def operations(count: float) -> str:
    """`1.23 G` and the like."""
    for size, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {name}"
    return f"{count:.3g}"


def _read(shape: Mapping[str, int], keys: float) -> float:
    return 4.0 * shape["query_heads"] * shape["head_width"] * keys
