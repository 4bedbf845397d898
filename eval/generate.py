"""The greedy answer to one stored prompt, in the attention mode that the caller has set.

Batch 1: there is no padding, so blocks begin where they did in training. The prompt is read in chunks,
logits are made for the last position only, and generation ends at any of the model's end tokens, at a
stop token of the task, at the task's published budget or, in RULER, as soon as the score is full: more
text cannot change it. A prompt is never cut here; what does not fit is refused.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .arms import ArmRun
from .recall import answer_recall
from .ruler import encode
from .ruler_score import settled

FOUND = "found"
MEASURED = ("prefill_s", "decode_s", "peak_gib")
"""Keys of a record that differ from run to run; all others are decided by checkpoint and prompt."""
_NOT_KEPT = ("prompt", "num_tokens", "new_tokens", "decoys")


class Prompt(Protocol):
    """A stored prompt of any benchmark (ruler.Sample, longbench.LongbenchSample).

    May also have `spans` (list of [first, last + 1) token places that hold the needles), `stop_ids` (token
    ids that end the answer; its first token is then neither of them nor an end token) and `benchmark`
    (default `ruler`).
    """

    @property
    def id(self) -> str: ...
    @property
    def prompt(self) -> str: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def new_tokens(self) -> int: ...
    @property
    def references(self) -> list[str]: ...
    @property
    def chat(self) -> bool: ...
    def record(self) -> dict[str, Any]: ...


@dataclass
class Generated:
    """What `generate` made: new ids (an end token included), why it stopped, and the cache it used.

    `cache` holds the prompt and all new tokens but the last.
    """

    ids: list[int] = field(default_factory=list)
    stopped: str = "budget"
    prefill_s: float = 0.0
    decode_s: float = 0.0
    cache: Any = None


def answer(
    model: Any,
    tokenizer: Any,
    sample: Prompt,
    *,
    run: ArmRun | None = None,
    prefill_chunk: int | None = None,
) -> dict[str, Any]:
    """One prediction record: what the sample says of itself, the text, why it stopped, seconds, memory.

    Args:
        run: the arm that `model` attends as; with it, whether the blocks of the needles were selected
            is recorded for the arms that select (eval/recall.py).
        prefill_chunk: tokens of the prompt that are read at a time; None reads it whole.

    Raises:
        ValueError: the tokenizer gives another number of tokens than when the prompt was prepared, or
            prompt and answer do not fit the model's window.
    """
    ids = encode(tokenizer, sample.prompt, chat=sample.chat)
    _check(sample, len(ids), window(model))
    device = torch.device(model.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    stops = list(getattr(sample, "stop_ids", None) or [])
    made = generate(
        model,
        ids,
        new_tokens=sample.new_tokens,
        ends=end_tokens(model, tokenizer) + stops,
        not_empty=bool(stops),
        enough=_enough(tokenizer, sample),
        prefill_chunk=prefill_chunk,
    )
    peak_gib = _peak_gib(device)
    kept = {key: value for key, value in sample.record().items() if key not in _NOT_KEPT}
    record = {
        **kept,
        "prediction": _text(tokenizer, made),
        "stopped": made.stopped,
        "prompt_tokens": len(ids),
        "limit": sample.new_tokens,
        "new_tokens": len(made.ids),
        "new_ids": made.ids,
        "prefill_s": round(made.prefill_s, 4),
        "decode_s": round(made.decode_s, 4),
        "peak_gib": round(peak_gib, 3),
    }
    needles = spans(sample)
    if run is not None and run.top_k is not None and needles:
        every = ids + made.ids

        def reread(length: int) -> Any:
            return prefill(model, every[:length], prefill_chunk)[1]

        record["needle"] = answer_recall(model, run, made.cache, every, len(ids), needles, reread)
    return record


@torch.no_grad()
def generate(
    model: Any,
    ids: Sequence[int],
    *,
    new_tokens: int,
    ends: Sequence[int] = (),
    not_empty: bool = False,
    enough: Callable[[list[int]], str | None] = lambda new: None,
    prefill_chunk: int | None = None,
) -> Generated:
    """Greedy decoding by arg max, whatever the checkpoint's own generation defaults are.

    Args:
        ids: the prompt, at least one token.
        ends: token ids that end the answer.
        not_empty: none of `ends` may be the first token.
        enough: asked after every token; a reason ends the answer.
    """
    made = Generated()
    begun = _now(model)
    logits, made.cache = prefill(model, ids, prefill_chunk)
    if not_empty:
        logits = logits.clone()
        logits[list(ends)] = -torch.inf
    made.prefill_s = _now(model) - begun
    begun = _now(model)
    while True:
        made.ids.append(int(logits.argmax()))
        reason = "end token" if made.ids[-1] in ends else enough(made.ids)
        if reason is not None or len(made.ids) >= new_tokens:
            made.stopped = reason or "budget"
            break
        logits, made.cache = prefill(model, made.ids[-1:], cache=made.cache)
    made.decode_s = _now(model) - begun
    return made


@torch.no_grad()
def prefill(
    model: Any, ids: Sequence[int], chunk: int | None = None, cache: Any = None
) -> tuple[Tensor, Any]:
    """Read tokens behind what the cache holds; returns the last one's logits (V,) and the cache.

    Logits are asked for the last position of each chunk alone: 131,072 positions of a vocabulary of
    128K would be 33 GB in bf16. A family whose forward pass cannot do that makes those of one chunk.
    """
    tokens = torch.tensor([list(ids)], device=model.device)
    last_only = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    for part in tokens.split(chunk or len(ids), dim=1):
        output = model(input_ids=part, past_key_values=cache, use_cache=True, **last_only)
        cache = output.past_key_values
    return output.logits[0, -1], cache


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Every end token of the generation config, the model config and the tokenizer."""
    found: set[int] = set()
    configs = (getattr(model, "generation_config", None), model.config, tokenizer)
    for config in configs:
        ids = getattr(config, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or [])
    return sorted(found)


def spans(sample: Prompt) -> list[list[int]]:
    """[first, last + 1) token places of a sample's needles; empty where it has none."""
    return getattr(sample, "spans", None) or []


def window(model: Any) -> int | None:
    """Positions that the model was made for."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of generated ids without special tokens, spaces as they are."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _check(sample: Prompt, num_tokens: int, limit: int | None) -> None:
    if num_tokens != sample.num_tokens:
        raise ValueError(
            f"prompt {sample.id} has {num_tokens} tokens, {sample.num_tokens} when it was prepared: "
            "prepare the prompts again with this tokenizer"
        )
    needed = num_tokens + sample.new_tokens
    if limit is not None and needed > limit:
        raise ValueError(
            f"prompt {sample.id} needs {needed} tokens with its answer, above the model's window of "
            f"{limit}: leave out this length, nothing is cut here"
        )


def _enough(tokenizer: Any, sample: Prompt) -> Callable[[list[int]], str | None]:
    """Why an answer may end before its budget, asked after every token."""
    if getattr(sample, "benchmark", "ruler") != "ruler" or not sample.references:
        return lambda new: None
    metric, mode = getattr(sample, "metric", "all"), getattr(sample, "mode", "base")

    def ask(new: list[int]) -> str | None:
        said = decode(tokenizer, new)
        return FOUND if settled(said, sample.references, metric, mode) else None

    return ask


def _text(tokenizer: Any, made: Generated) -> str:
    """The answer's text; an end token is none of it, also where the tokenizer does not call it special."""
    ids = made.ids[:-1] if made.stopped == "end token" else made.ids
    return decode(tokenizer, ids)


def _now(model: Any) -> float:
    """Seconds, once the device has done what it was given."""
    if torch.device(model.device).type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _peak_gib(device: torch.device) -> float:
    """Peak memory of this sample on a GPU; without one, that of the process until now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
