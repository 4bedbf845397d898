"""Masks as document ids: what our attention function gets from transformers instead of a score mask.

transformers calls `document_mask` once a forward pass and hands what it returns to every layer with full
attention; `attention.attend` reads it there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask


def document_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Document ids (B, S) int32 of a padded or packed batch, or None where each row is one document.

    A new document starts where a token does not see its predecessor (packing) and where the padding mask
    changes. So left padding is a document of its own, and the blocks of a left-padded prompt start at its
    first real token (trap 4). Layers with a sliding window get the mask of transformers' own SDPA path.

    With a cache of fixed capacity: (B, 1, 1, S), for one new token that same SDPA mask, else int32 ids with
    -1 where the cache is empty. Of four dimensions, since transformers would take two for a padding mask.
    """
    if local_size is not None:
        if mask_function is not None:
            kwargs["mask_function"] = mask_function
        if device is not None:
            kwargs["device"] = device
        kwargs.update(attention_mask=attention_mask, local_size=local_size)
        return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, **kwargs)
    fixed = isinstance(q_offset, Tensor) or kv_length > q_offset + q_length
    if fixed and q_length == 1:
        assert mask_function is not None
        kwargs.update(mask_function=mask_function, device=device, allow_is_causal_skip=False)
        kwargs.update(attention_mask=attention_mask)
        return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, **kwargs)
    capacity, kv_length = kv_length, int(q_offset) + q_length
    starts = torch.zeros(batch_size, kv_length, dtype=torch.bool, device=device)
    if attention_mask is not None:
        known = attention_mask[:, :kv_length] if fixed else attention_mask[:, -kv_length:]
        padding = known.to(device=device, dtype=torch.bool)
        starts[:, 1:] |= padding[:, 1:] != padding[:, :-1]
    # Packing is found from whole rows of position ids, so it needs every query at hand.
    if mask_function is not None and q_length == kv_length and kv_length > 1:
        here = torch.arange(1, kv_length, device=device)
        rows = torch.arange(batch_size, device=device)[:, None]
        sees = mask_function(rows, torch.zeros_like(rows), here[None], here[None] - 1)
        starts[:, 1:] |= ~torch.as_tensor(sees, device=device).expand(batch_size, kv_length - 1)
    if fixed:
        ids = starts.cumsum(dim=1, dtype=torch.int32)
        return torch.nn.functional.pad(ids, (0, capacity - kv_length), value=-1)[:, None, None]
    return starts.cumsum(dim=1, dtype=torch.int32) if bool(starts.any()) else None


def filled_part(
    mask: Tensor, key: Tensor, value: Tensor, index_k: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Document ids, keys, values and index keys of the filled part of a cache of fixed capacity.

    Args:
        mask: (B, 1, 1, S) int32, from `document_mask`.

    Raises:
        ValueError: an attention mask of another length than the keys.
    """
    if mask.shape[-1] != key.shape[2]:
        raise ValueError(f"attention_mask covers {mask.shape[-1]} tokens, not {key.shape[2]} keys")
    filled = int((mask[0, 0, 0] >= 0).sum())
    index_k = None if index_k is None else index_k[:, :, :filled]
    return mask[:, 0, 0, :filled], key[:, :, :filled], value[:, :, :filled], index_k


def check_step_mask(mask: Tensor, num_queries: int, fixed: bool) -> None:
    """Refuse masks of four dimensions that are no `document_mask`.

    Args:
        fixed: the layer's cache has a fixed capacity, or the layer needs none to follow the mask.

    Raises:
        ValueError: another mask.
    """
    if mask.dtype != torch.bool or num_queries != 1 or not fixed:
        raise ValueError(
            f"{mask.dtype} mask of shape {tuple(mask.shape)}: give a padding mask (B, S), or document_ids "
            "in the call"
        )
