"""Greedy answers to stored prompts, one JSON line a sample, resumable and shared between ranks.

Samples are put longest first; rank r takes every world_size-th of them. Batch 1, so there is no padding
and block boundaries stay where they were in training. Generation ends at any of the model's end tokens,
at the task's published budget, or as soon as every reference has been said: more text cannot change a
substring score.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from .records import Journal, journal_path, read_journals
from .ruler import Sample, encode, hits, score


class AllFound(StoppingCriteria):
    """Stops once every reference occurs in the generated text (batch 1)."""

    def __init__(self, tokenizer: Any, references: Sequence[str], prompt_len: int) -> None:
        self._tokenizer = tokenizer
        self._references = references
        self._prompt_len = prompt_len

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """(B, N) ids so far -> (B,) bool."""
        text = decode(self._tokenizer, input_ids[0, self._prompt_len :])
        done = all(hits(text, self._references))
        return torch.full((input_ids.shape[0],), done, device=input_ids.device)


def predict(
    model: Any,
    tokenizer: Any,
    samples: Sequence[Sample],
    folder: Path,
    *,
    prefill_chunk: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[str], None] = lambda line: None,
    every_s: float = 15.0,
) -> int:
    """Answer this rank's share of `samples` that has no answer in `folder` yet; returns how many were made.

    `model` is anything with transformers' `generate`, in the attention mode that the caller has set.
    Prompts longer than `prefill_chunk` tokens are read that many at a time.

    Raises:
        ValueError: a damaged line in `folder`, or a prompt that this tokenizer splits otherwise.
    """
    done = read_journals(folder)
    ordered = sorted(samples, key=lambda one: (-one.num_tokens, one.id))
    mine = [one for one in ordered[rank::world_size] if one.id not in done]
    clock = _Clock(mine, progress, every_s)
    with Journal(journal_path(folder, rank, world_size)) as journal:
        for sample in mine:
            journal.append(answer(model, tokenizer, sample, prefill_chunk))
            clock.tick(sample)
    return len(mine)


@torch.no_grad()
def answer(
    model: Any, tokenizer: Any, sample: Sample, prefill_chunk: int | None = None
) -> dict[str, Any]:
    """One prediction record: text, hits, score, why it stopped, seconds.

    Raises:
        ValueError: the tokenizer gives another number of tokens than when the prompt was prepared.
    """
    ids = encode(tokenizer, sample.prompt, chat=sample.chat)
    if len(ids) != sample.num_tokens:
        raise ValueError(
            f"prompt {sample.id} has {len(ids)} tokens, {sample.num_tokens} when it was prepared: "
            "prepare the prompts again with this tokenizer"
        )
    input_ids = torch.tensor([ids], device=model.device)
    stops = StoppingCriteriaList([AllFound(tokenizer, sample.references, len(ids))])
    config = greedy(model, tokenizer, sample.new_tokens)
    if prefill_chunk is not None and len(ids) > prefill_chunk:
        config.prefill_chunk_size = prefill_chunk
    begun = time.perf_counter()
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        generation_config=config,
        stopping_criteria=stops,
    )
    seconds = time.perf_counter() - begun
    new = output[0, len(ids) :]
    text = decode(tokenizer, new)
    found = hits(text, sample.references)
    return {
        "id": sample.id,
        "task": sample.task,
        "length": sample.length,
        "prediction": text,
        "references": sample.references,
        "hits": found,
        "score": score(found),
        "stopped": _why_stopped(model, tokenizer, new, found, sample.new_tokens),
        "prompt_tokens": len(ids),
        "new_tokens": len(new),
        "seconds": round(seconds, 3),
    }


def greedy(model: Any, tokenizer: Any, new_tokens: int) -> GenerationConfig:
    """Greedy decoding whatever the checkpoint's own defaults are, with all its end tokens."""
    ends = end_tokens(model, tokenizer)
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        max_new_tokens=new_tokens,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        use_cache=True,
    )


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Every end token of the generation config, the model config and the tokenizer."""
    found: set[int] = set()
    configs = (getattr(model, "generation_config", None), model.config, tokenizer)
    for config in configs:
        ids = getattr(config, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or [])
    return sorted(found)


def decode(tokenizer: Any, ids: Tensor) -> str:
    """Text of generated ids without special tokens, spaces as they are."""
    return tokenizer.decode(
        ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def _why_stopped(
    model: Any, tokenizer: Any, new: Tensor, found: Sequence[bool], budget: int
) -> str:
    if len(new) and int(new[-1]) in end_tokens(model, tokenizer):
        return "end token"
    if all(found):
        return "all references found"
    return "budget" if len(new) >= budget else "stopped early"


class _Clock:
    """A line now and then: how far, how fast, how long it still takes."""

    def __init__(
        self, samples: Sequence[Sample], progress: Callable[[str], None], every_s: float
    ) -> None:
        self._left_tokens = self._all_tokens = sum(one.num_tokens for one in samples)
        self._left = self._all = len(samples)
        self._progress, self._every_s = progress, every_s
        self._begun = self._last = time.perf_counter()

    def tick(self, sample: Sample) -> None:
        self._left_tokens -= sample.num_tokens
        self._left -= 1
        now = time.perf_counter()
        if now - self._last < self._every_s and self._left:
            return
        self._last = now
        done = self._all_tokens - self._left_tokens
        left_s = (now - self._begun) / max(1, done) * self._left_tokens
        self._progress(
            f"{self._all - self._left}/{self._all} prompts, "
            f"{(now - self._begun) / (self._all - self._left):.1f} s each, {left_s:.0f} s left"
        )
