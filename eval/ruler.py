"""RULER prompts on public-domain text: sized to fill a length, with the tokens of every needle, and scored.

A sample is a pure function of (task, length, seed, index, tokenizer, corpus). Its prompt is as long as
fits, so that prompt + generation <= length. The score is RULER's: the share of references that occur in
the output, whatever the case. `LABEL` goes wherever a score goes.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .ruler_tasks import TASKS, Draft, Haystack, Material
from .sources import RulerWords

LABEL = "ruler-pd, not comparable with published scores"
MIN_LENGTH = 512
_CONTROL = re.compile(r"[\x00-\x1f]")
_FINGERPRINT_TEXT = (
    "The quick brown fox, 1234567 of them; naïve café — VAR QXZ = 98765.\n\n  Twice?"
)


@dataclass(frozen=True)
class Sample:
    """One stored prompt. `needle_spans` are [first, last + 1) token places in the prompt."""

    id: str
    task: str
    length: int
    index: int
    prompt: str
    num_tokens: int
    new_tokens: int
    references: list[str]
    needle_spans: list[list[int]]
    chat: bool

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Sample:
        """Back from the stored JSON."""
        return cls(**record)

    def record(self) -> dict[str, Any]:
        """As stored."""
        return asdict(self)


class DoesNotFit(ValueError):
    """The smallest form of a task is longer than the length; the task is left out with this reason."""


def check_tasks(names: Iterable[str]) -> list[str]:
    """The names, all tasks where there is none.

    Raises:
        ValueError: a name that is no task, with the nearest one.
    """
    chosen = list(names) or list(TASKS)
    for name in chosen:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"ruler task {name!r} does not exist: did you mean {near!r}? Known: {', '.join(TASKS)}"
            )
    return chosen


def check_lengths(lengths: Sequence[int], window: int | None) -> None:
    """Refuse a length that is too short for any task, or above the model's window (ValueError)."""
    for length in lengths:
        if length < MIN_LENGTH:
            raise ValueError(
                f"ruler length {length} is too short: use at least {MIN_LENGTH} tokens"
            )
        if window is not None and length > window:
            raise ValueError(
                f"ruler length {length} is above the model's window of {window} tokens: "
                f"use lengths up to {window}, or a checkpoint whose config has a longer window"
            )


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 of what decides a prompt's tokens: vocabulary, chat template, special ids, a probe text."""
    content = [
        sorted(tokenizer.get_vocab().items()),
        getattr(tokenizer, "chat_template", None),
        [tokenizer.bos_token_id, tokenizer.eos_token_id],
        tokenizer(_FINGERPRINT_TEXT)["input_ids"],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class Generator:
    """Makes the samples of one corpus and tokenizer."""

    def __init__(self, words: RulerWords, works: dict[str, str], tokenizer: Any) -> None:
        """`works`: text by name. ValueError for a tokenizer without character offsets."""
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                "RULER prompts need a fast tokenizer (tokenizer.json), which knows where each token stands "
                "in the text: save the checkpoint with one"
            )
        self.words = words
        self.tokenizer = tokenizer
        self.chat = bool(getattr(tokenizer, "chat_template", None))
        self._material = Material(words, Haystack(works), lambda text: len(self._encode(text)))

    def sample(self, task: str, length: int, seed: int, index: int) -> Sample:
        """The index-th sample of a task.

        Raises:
            DoesNotFit: not even the smallest form fits; the message names both sizes.
        """
        family = TASKS[task]
        new_tokens = self.words.templates[family.family].new_tokens

        def prompt_of(size: int) -> tuple[str, Draft]:
            rng = random.Random(f"{task}/{length}/{seed}/{index}")
            draft = family.draft(rng, size, length, self._material)
            return self._prompt(draft), draft

        def cost(size: int) -> int:
            return len(self._encode(prompt_of(size)[0])) + new_tokens

        size = largest(cost, length, family.min_size)
        if size is None:
            raise DoesNotFit(
                f"{task} needs {cost(family.min_size)} tokens in its smallest form, {length} are given"
            )
        prompt, draft = prompt_of(size)
        spans = self._spans(prompt, draft.needles)
        return Sample(
            id=f"{task}/{length}/{index:05d}",
            task=task,
            length=length,
            index=index,
            prompt=prompt,
            num_tokens=len(self._encode(prompt)),
            new_tokens=new_tokens,
            references=list(draft.references),
            needle_spans=spans,
            chat=self.chat,
        )

    def _prompt(self, draft: Draft) -> str:
        if not self.chat:
            return draft.question + draft.answer_prefix
        turns = [{"role": "user", "content": draft.question}]
        opened = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        return opened + draft.answer_prefix.lstrip()

    def _encode(self, prompt: str) -> list[int]:
        return encode(self.tokenizer, prompt, chat=self.chat)

    def _spans(self, prompt: str, needles: Sequence[str]) -> list[list[int]]:
        encoded = self.tokenizer(
            prompt, add_special_tokens=not self.chat, return_offsets_mapping=True
        )
        spans = []
        for needle in needles:
            first = prompt.index(needle)
            last = first + len(needle)
            assert prompt.find(needle, first + 1) < 0, "a needle occurs twice"
            inside = [
                place
                for place, (start, end) in enumerate(encoded["offset_mapping"])
                if start < last and end > first and end > start
            ]
            spans.append([inside[0], inside[-1] + 1])
        return spans


def encode(tokenizer: Any, prompt: str, *, chat: bool) -> list[int]:
    """Token ids of a stored prompt; a chat template brings its own special tokens."""
    return tokenizer(prompt, add_special_tokens=not chat)["input_ids"]


def largest(cost: Callable[[int], int], limit: int, low: int, high: int = 1 << 24) -> int | None:
    """Largest size with cost(size) <= limit, for a cost that grows with size; None if `low` is too much.

    Guesses by slope between known ends, halves in turn: some six evaluations where bisection takes twenty.
    """
    low_cost = cost(low)
    if low_cost > limit:
        return None
    probe = max(2 * low, low + 8)
    while probe < high:
        probe_cost = cost(probe)
        if probe_cost > limit:
            high, high_cost = probe, probe_cost
            break
        slope = max((probe_cost - low_cost) / (probe - low), 1e-3)
        low, low_cost = probe, probe_cost
        probe = min(low + max(8, int(1.05 * (limit - low_cost) / slope)), 64 * low)
    else:
        return low
    halve = False
    while high - low > 1:
        share = 0.5 if halve else (limit - low_cost) / max(1, high_cost - low_cost)
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        middle_cost = cost(middle)
        if middle_cost <= limit:
            low, low_cost = middle, middle_cost
        else:
            high, high_cost = middle, middle_cost
        halve = not halve
    return low


def clean(text: str) -> str:
    """A prediction as RULER scores it: control characters are line ends, the ends are stripped."""
    return _CONTROL.sub("\n", text.strip()).strip()


def hits(text: str, references: Sequence[str]) -> list[bool]:
    """Which references occur in the output, whatever the case."""
    lowered = clean(text).lower()
    return [reference.lower() in lowered for reference in references]


def score(found: Sequence[bool]) -> float:
    """RULER's score of one sample, 0 to 100: the mean over its references."""
    return 100.0 * sum(found) / len(found)
