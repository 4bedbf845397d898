"""Shape of the sparse attention on one checkpoint: resolved from the recipe and the model, and checked.

The geometry is saved in the converted folder's config under the published names
(`sparse_attention_config`, as in the released MiniMax-M3 configuration), plus a few keys of our own that
say what the index branch copies from the main branch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol


class SparsityLike(Protocol):
    """The recipe's `sparsity` section, or anything with the same fields."""

    @property
    def block_size(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def local_blocks(self) -> int: ...
    @property
    def init_blocks(self) -> int: ...
    @property
    def index_dim(self) -> int | None: ...
    @property
    def dense_layers(self) -> list[int] | Literal["auto"]: ...
    @property
    def init(self) -> Literal["pca", "random"]: ...
    @property
    def index_norm(self) -> bool | Literal["auto"]: ...


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What every sparse layer needs to know."""

    block_size: int
    top_k: int
    local_blocks: int
    init_blocks: int
    num_index_heads: int
    index_dim: int
    index_scale: float
    """Scale of the index scores inside the softmax of the KL."""
    index_norm: bool
    """RMSNorm on index q and k, per head, weight stored as w in x * (1 + w)."""
    index_bias: bool
    """Bias on the index projections: only where the main branch has one."""
    num_layers: int
    sparse_layers: tuple[int, ...]
    rotary_layers: tuple[int, ...]
    """Sparse layers whose main branch is rotated; the others use no positions at all."""
    argument_bridge: bool
    """The family's decoder layer drops our arguments: see bridge.py."""

    def to_config(self) -> dict[str, Any]:
        """The `sparse_attention_config` block of config.json."""
        frequency = [int(layer in self.sparse_layers) for layer in range(self.num_layers)]
        return {
            "use_sparse_attention": True,
            "sparse_index_dim": self.index_dim,
            "sparse_num_index_heads": self.num_index_heads,
            "sparse_topk_blocks": self.top_k,
            "sparse_block_size": self.block_size,
            "sparse_init_block": self.init_blocks,
            "sparse_local_block": self.local_blocks,
            "sparse_score_type": "max",
            "sparse_attention_freq": frequency,
            "sparse_disable_index_value": frequency,
            "sparse_index_scale": self.index_scale,
            "sparse_index_norm": self.index_norm,
            "sparse_index_bias": self.index_bias,
            "sparse_index_rope": [int(n in self.rotary_layers) for n in range(self.num_layers)],
            "sparse_argument_bridge": self.argument_bridge,
        }

    @classmethod
    def from_config(cls, block: dict[str, Any], num_layers: int) -> Geometry:
        """Read the block back.

        Keys of our own may be missing: the defaults are the published form (norm, no bias, rotary in
        every sparse layer, scale 1 / sqrt(D_idx)).

        Raises:
            ValueError: a published key is missing or has a value that is not supported, or the layer
                lists do not fit the model.
        """
        try:
            frequency = block["sparse_attention_freq"]
            rope = block.get("sparse_index_rope", frequency)
            geometry = cls(
                block_size=block["sparse_block_size"],
                top_k=block["sparse_topk_blocks"],
                local_blocks=block["sparse_local_block"],
                init_blocks=block["sparse_init_block"],
                num_index_heads=block["sparse_num_index_heads"],
                index_dim=block["sparse_index_dim"],
                index_scale=block.get("sparse_index_scale", block["sparse_index_dim"] ** -0.5),
                index_norm=block.get("sparse_index_norm", True),
                index_bias=block.get("sparse_index_bias", False),
                num_layers=len(frequency),
                sparse_layers=tuple(n for n, flag in enumerate(frequency) if flag),
                rotary_layers=tuple(n for n, flag in enumerate(rope) if flag),
                argument_bridge=block.get("sparse_argument_bridge", False),
            )
        except KeyError as missing:
            raise ValueError(
                f"sparse_attention_config has no {missing}: save the model again with this package"
            ) from None
        meant = {
            "use_sparse_attention": True,
            "sparse_score_type": "max",
            "sparse_disable_index_value": frequency,
        }
        for key, value in meant.items():
            if block.get(key, value) != value:
                raise ValueError(f"{key}={block[key]!r} is not supported: it must be {value!r}")
        if len(frequency) != num_layers:
            raise ValueError(
                f"sparse_attention_freq lists {len(frequency)} layers, the model has {num_layers}"
            )
        return geometry


def head_width(config: Any) -> int:
    """Width of a main attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def check_heads(config: Any) -> None:
    """Refuse models whose heads cannot carry an index branch per KV group.

    Raises:
        ValueError: multi-head attention (nothing is shared), heads that do not divide, or a wrapper
            around a text model (vision, audio).
    """
    if config.get_text_config() is not config:
        raise ValueError(
            f"model type {config.model_type} wraps a text model: save its text model alone and convert that"
        )
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        raise ValueError(
            f"model type {config.model_type} has no attention heads: use a GQA transformer"
        )
    groups = getattr(config, "num_key_value_heads", None) or heads
    if heads % groups:
        raise ValueError(
            f"num_attention_heads={heads} is no multiple of num_key_value_heads={groups}: "
            "use a model whose query heads share KV heads evenly"
        )
    if heads == groups:
        raise ValueError(
            f"num_key_value_heads={groups} equals num_attention_heads: with multi-head attention an index "
            "head per KV head costs as much as it saves, use a grouped-query (GQA) model"
        )


def resolve_index_dim(config: Any, sparsity: SparsityLike) -> int:
    """Width of the index heads, defaults filled in.

    Raises:
        ValueError: a width that the start in closed form cannot produce.
    """
    width, groups = head_width(config), config.num_key_value_heads
    if sparsity.init == "random":
        chosen = sparsity.index_dim or max(128, width)
        if chosen < width:
            raise ValueError(
                f"sparsity.index_dim={chosen} is below the head width {width}: use {width} or more"
            )
        return chosen
    largest = groups * width
    chosen = sparsity.index_dim or min(largest, math.ceil(128 / width) * width)
    if chosen % width:
        raise ValueError(
            f"sparsity.index_dim={chosen} is no multiple of the head width {width}: with init=pca use "
            f"{max(1, round(chosen / width)) * width}, or init=random"
        )
    if chosen > largest:
        raise ValueError(
            f"sparsity.index_dim={chosen} is more than the {groups} KV heads of width {width} can fill: "
            f"with init=pca use at most {largest}, or init=random"
        )
    return chosen


def resolve_sparse_layers(sparsity: SparsityLike, num_layers: int, full: list[int]) -> list[int]:
    """Layers that become sparse: the full-attention ones that are not kept dense.

    Args:
        full: layers that attend to the whole prefix (no sliding window).

    Raises:
        ValueError: a dense layer that does not exist, or nothing left to convert.
    """
    if sparsity.dense_layers == "auto":
        dense = set(range(3 if num_layers >= 30 else math.ceil(num_layers / 10)))
    else:
        dense = set(sparsity.dense_layers)
        wrong = sorted(n for n in dense if not 0 <= n < num_layers)
        if wrong:
            raise ValueError(
                f"sparsity.dense_layers names layer {wrong[0]}, the model has layers 0 to {num_layers - 1}"
            )
    sparse = [layer for layer in full if layer not in dense]
    if not sparse:
        raise ValueError(
            f"no layer is left to convert: {len(full)} of {num_layers} layers have full attention and "
            f"sparsity.dense_layers keeps {sorted(dense)} dense"
        )
    return sparse
