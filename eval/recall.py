"""Needle-block recall: did the sparse layers select the block that holds the needle, while they answered?

Answer positions are the queries that made the answer's tokens: the last token of the prompt and every new
token but the last. The decoding kernels return no block ids, so the ids are read in one more pass over the
answer positions alone, as a chunk behind the prompt that is still in the cache. It costs what reading that
many more tokens of the prompt would cost (30 of 131,072, say), and is not part of the recorded seconds.

Of a needle, the share of its tokens that lie in selected blocks counts, for each layer, group and position:
a needle across a block's end is half selected with one of its blocks, and a blind choice of blocks scores
the share of blocks that it takes. Where all blocks fit the budget they all count as selected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer

from ..model.attention import AttentionCall
from .arms import ArmRun
from .models import MODES


@torch.no_grad()
def answer_recall(
    model: Any,
    run: ArmRun,
    cache: Any,
    ids: Sequence[int],
    prompt_len: int,
    spans: Sequence[Sequence[int]],
    reread: Callable[[int], Any],
) -> dict[str, Any]:
    """Needle-block recall of one answer; the cache is used up.

    Args:
        run: an arm with a budget.
        cache: of the prompt and the new tokens but the last, as `generate` leaves it.
        ids: the prompt and all new tokens.
        spans: [first, last + 1) token places of the needles, all in the prompt.
        reread: makes a new cache of the first so many ids, for models whose cache cannot be cut back.

    Returns:
        `share` (mean over layers, groups, answer positions and needles), `first` (at the position that
        made the first token), `any` (at the best answer position), `by_layer` (the share of each),
        `kept` (selected blocks over visible blocks at the first position: what chance would give) and
        `positions`.
    """
    selected = answer_selection(model, run, cache, ids, prompt_len, reread)
    block_size = _geometry(model).block_size
    return summarise(selected, spans, block_size, num_blocks=-(-prompt_len // block_size))


def answer_selection(
    model: Any,
    run: ArmRun,
    cache: Any,
    ids: Sequence[int],
    prompt_len: int,
    reread: Callable[[int], Any],
) -> dict[int, Tensor | None]:
    """Layer -> (G, A, K) block ids at the A answer positions; None where all blocks fit the budget."""
    answers = len(ids) - prompt_len
    # One query alone would be a decoding step, which reports nothing: its predecessor goes along.
    queries = min(max(answers, 2), len(ids) - 1)
    begin = len(ids) - 1 - queries
    cache = _rewind(cache, begin, reread)
    call = AttentionCall(MODES[run.arm], top_k=run.top_k)
    tokens = torch.tensor([list(ids[begin:-1])], device=model.device)
    model.get_decoder()(input_ids=tokens, past_key_values=cache, use_cache=True, msa_call=call)
    found: dict[int, Tensor | None] = {}
    for layer in _geometry(model).sparse_layers:
        report = call.reports.get(layer)
        ids_of = None if report is None else report.block_ids
        found[layer] = None if ids_of is None else ids_of[0, :, -answers:].cpu()
    return found


def summarise(
    selected: dict[int, Tensor | None],
    spans: Sequence[Sequence[int]],
    block_size: int,
    *,
    num_blocks: int,
) -> dict[str, Any]:
    """The record of `answer_recall`, from layer -> (G, A, K) block ids (-1: none)."""
    shares, firsts, anys, kept, positions = {}, [], [], [], 0
    for layer, ids in selected.items():
        if ids is None:
            shares[str(layer)], chosen = 1.0, 1.0
            firsts.append(1.0)
            anys.append(1.0)
        else:
            hit = torch.stack([_covered(ids, span, block_size) for span in spans])
            positions = ids.shape[1]
            shares[str(layer)] = float(hit.mean())
            firsts.append(float(hit[..., 0].mean()))
            anys.append(float(hit.amax(-1).mean()))
            chosen = float((ids[:, 0] >= 0).sum(-1).double().mean()) / num_blocks
        kept.append(chosen)
    return {
        "share": _mean(shares.values()),
        "first": _mean(firsts),
        "any": _mean(anys),
        "kept": _mean(kept),
        "positions": positions,
        "by_layer": {layer: round(share, 4) for layer, share in shares.items()},
    }


def _covered(ids: Tensor, span: Sequence[int], block_size: int) -> Tensor:
    """(G, A) float64: share of the tokens [first, last) that lie in the blocks of ids (G, A, K)."""
    blocks = torch.arange(span[0], span[1]) // block_size
    return (ids[..., None] == blocks).any(-2).double().mean(-1)


def _rewind(cache: Any, length: int, reread: Callable[[int], Any]) -> Any:
    """A cache of the first `length` ids: this one cut back, or a new one where a layer cannot be cut.

    Layers with a sliding window have forgotten what came before it; models with such layers read the
    prompt once more, which doubles the cost of its prefill.
    """
    if all(type(layer) in (DynamicLayer, DynamicIndexedLayer) for layer in cache.layers):
        cache.crop(length - cache.get_seq_length())
        return cache
    return reread(length)


def _geometry(model: Any) -> Any:
    """Geometry of a converted model."""
    return next(
        module.msa_geometry for module in model.modules() if hasattr(module, "msa_geometry")
    )


def _mean(values: Any) -> float:
    many = list(values)
    return round(sum(many) / len(many), 4)
