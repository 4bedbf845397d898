"""The index branch: two projections beside a family's own q, k, v (arXiv 2606.13392, section 2).

    q_idx = rope(norm(x W_q_idx))   (B, G, N, D_idx)      one index head per KV group
    k_idx = rope(norm(x W_k_idx))   (B, 1, N, D_idx)      one key head, shared by the groups

on x = stop_gradient(hidden_states). The branch is grafted onto the family's attention module by changing
its class to a subclass made here: q, k, v and everything else stay the family's own code, and the tensors
get the published names `self_attn.index_{q,k}_{proj,norm}.weight`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicIndexedLayer, StaticIndexedLayer

from .attention import AttentionCall, Mode
from .geometry import Geometry

INDEX_MODULES = ("index_q_proj", "index_k_proj", "index_q_norm", "index_k_norm")
"""Names of the index branch's children in an attention module."""


class IndexNorm(nn.Module):
    """RMSNorm over the index head, x / rms(x) * (1 + w), as in the released MiniMax-M3; w = 0 at start."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * (1.0 + self.weight.float())).to(x.dtype)


class IndexedAttention:
    """Mixin over a family's attention class: adds the index branch's q and k to its keyword arguments."""

    msa_geometry: Geometry
    msa_rotary: bool
    msa_mode: Mode
    msa_top_k: int | None
    layer_idx: int
    head_dim: int
    index_q_proj: nn.Linear
    index_k_proj: nn.Linear
    index_q_norm: IndexNorm
    index_k_norm: IndexNorm

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        msa_call: AttentionCall | None = None,
        **kwargs: Any,
    ):
        index_q, index_k = self.index_states(hidden_states, position_embeddings)
        cache_len = None
        if past_key_values is not None:
            layer = indexed_layer(past_key_values, self.layer_idx)
            index_k = layer.update_indexer(index_k[:, 0]).unsqueeze(1)
            if isinstance(layer, StaticIndexedLayer):
                cache_len = layer.indexer_cumulative_length
        return super().forward(  # type: ignore[misc]
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            msa_call=msa_call,
            index_q=index_q,
            index_k=index_k,
            cache_len=cache_len,
            **kwargs,
        )

    def index_states(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Index q (B, G, T, D_idx) and index k (B, 1, T, D_idx) of the new tokens."""
        x = hidden_states.detach()
        batch, length, _ = x.shape
        q = self.index_q_proj(x).view(batch, length, -1, self.msa_geometry.index_dim)
        k = self.index_k_proj(x).view(batch, length, 1, self.msa_geometry.index_dim)
        if self.msa_geometry.index_norm:
            q, k = self.index_q_norm(q), self.index_k_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if self.msa_rotary and position_embeddings is not None:
            q = rotate(self, q, *position_embeddings)
            k = rotate(self, k, *position_embeddings)
        return q, k


def rotate(attention: nn.Module | IndexedAttention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The family's own rotary embedding on heads x (B, H, T, W).

    A width that is a multiple of the main head width is rotated copy by copy, each as a main head is;
    of any other width the first rotary channels rotate and the rest pass through.
    """
    family = sys.modules[family_class(type(attention)).__module__]
    width, head = x.shape[-1], attention.head_dim
    assert isinstance(head, int)
    copies = width // head if width % head == 0 else 1
    heads = x.unflatten(-1, (copies, -1)).transpose(2, 3).flatten(1, 2)
    rotary = cos.shape[-1]
    turned, _ = family.apply_rotary_pos_emb(heads[..., :rotary], heads[:, :0, :, :rotary], cos, sin)
    heads = torch.cat([turned, heads[..., rotary:]], dim=-1)
    return heads.unflatten(1, (-1, copies)).transpose(2, 3).flatten(-2)


def family_class(attention_class: type) -> type:
    """The transformers class below a grafted one."""
    own = [c for c in attention_class.__mro__ if not issubclass(c, IndexedAttention)]
    return own[0]


def graft(attention: Any, geometry: Geometry) -> None:
    """Turn a family's attention module into one with an index branch; weights are zero."""
    weight = next(attention.parameters())
    hidden_size = attention.config.hidden_size
    factory: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    width = geometry.index_dim
    for name, heads in (("index_q_proj", geometry.num_index_heads), ("index_k_proj", 1)):
        projection = nn.Linear(hidden_size, heads * width, bias=geometry.index_bias, **factory)
        for parameter in projection.parameters():
            nn.init.zeros_(parameter)
        attention.add_module(name, projection)
    if geometry.index_norm:
        for name in ("index_q_norm", "index_k_norm"):
            attention.add_module(name, IndexNorm(width).to(**factory))
    base = type(attention)
    attention.__class__ = type(f"Indexed{base.__name__}", (IndexedAttention, base), {})
    layer = attention.layer_idx
    attention.msa_geometry = geometry
    attention.msa_rotary = layer in geometry.rotary_layers
    attention.msa_mode, attention.msa_top_k = "sparse", None


def indexed_layer(cache: Cache, layer: int) -> DynamicIndexedLayer | StaticIndexedLayer:
    """The cache layer that also keeps index keys; put in place while the layer is still empty.

    Raises:
        ValueError: the layer already holds keys without index keys, or is of a kind that cannot hold them.
    """
    while len(cache.layers) <= layer:
        cache.layers.append(DynamicIndexedLayer())
    found: Any = cache.layers[layer]
    if isinstance(found, DynamicIndexedLayer | StaticIndexedLayer):
        return found
    kind = type(found).__name__
    # A layer of fixed capacity may have its memory already, and still be empty.
    empty_yet = kind == "StaticLayer" and not int(found.cumulative_length)
    if not empty_yet and (kind != "DynamicLayer" or found.is_initialized):
        raise ValueError(
            f"layer {layer} of the cache is a {kind} without index keys: pass an empty DynamicCache or "
            "StaticCache, or none at all"
        )
    empty: DynamicIndexedLayer | StaticIndexedLayer = DynamicIndexedLayer()
    if kind == "StaticLayer":
        empty = StaticIndexedLayer(max_cache_len=found.max_cache_len)
        # `generate` would hand the model to torch.compile, which does not follow our layers.
        empty.is_compileable = False
    cache.layers[layer] = empty
    return empty
