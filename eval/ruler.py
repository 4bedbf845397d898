"""RULER prompts: all 13 tasks at any length, as NVIDIA makes them or made faster, and scored alike.

    Generator(corpus, tokenizer).samples(task, length, seed, count)

`parity: nvidia` repeats NVIDIA's generator draw by draw and gives its bytes; `parity: native` has the same
tasks, each sample a function of (task, length, seed, index, tokenizer, corpus) alone. Either way
prompt + generation <= length. Every sample says where its needles stand, in tokens. `label` goes wherever a
score goes. Parts: ruler_tasks (what is hidden), ruler_sizing (how long), ruler_prompt (templates, tokens),
ruler_corpus (texts), ruler_score. Called by `prepare.py`; `check_*` by the stages before anything else.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .ruler_corpus import NVIDIA, PUBLIC_DOMAIN, QUESTION_FILES, Corpus
from .ruler_material import DoesNotFit, Draft, Haystack, Material
from .ruler_prompt import Prompter, encode, generation_tokens, tokenizer_fingerprint
from .ruler_score import hits, score
from .ruler_sizing import NativeSizing, published_drafts, too_long
from .ruler_tasks import TASKS

__all__ = [
    "LABEL",
    "MIN_LENGTH",
    "PARITIES",
    "TASKS",
    "DoesNotFit",
    "Generator",
    "Sample",
    "check_corpus",
    "check_lengths",
    "check_tasks",
    "encode",
    "hits",
    "label_of",
    "score",
    "tokenizer_fingerprint",
]

LABEL = "ruler-pd, not comparable with published scores"
MIN_LENGTH = 512
PARITIES = ("native", "nvidia")


@dataclass(frozen=True)
class Sample:
    """One stored prompt.

    `spans` are the tokens [first, last) of the needles that the answer rests on, in the prompt's ids;
    `decoys` those of needles that are not asked for. cwe and fwe have neither.
    `metric`: `all` or `part` (ruler_score). `mode`: base, chat or reasoning (ruler_prompt).
    """

    id: str
    task: str
    length: int
    index: int
    prompt: str
    num_tokens: int
    new_tokens: int
    references: list[str]
    spans: list[list[int]]
    chat: bool
    metric: str = "all"
    mode: str = "base"
    decoys: list[list[int]] = field(default_factory=list)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Sample:
        """Back from the stored JSON."""
        return cls(**record)

    def record(self) -> dict[str, Any]:
        """As stored."""
        return asdict(self)


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
                f"use lengths up to {window}, or convert with model.rope, which stretches it"
            )


def check_corpus(named: Iterable[str], corpus: str, parity: str) -> None:
    """Refuse what a corpus cannot give. `named`: the tasks that were asked for by name.

    Raises:
        ValueError: a question task without questions, or NVIDIA's prompts without NVIDIA's data.
    """
    if parity not in PARITIES:
        raise ValueError(f"parity={parity!r} is not known: use {' or '.join(PARITIES)}")
    if parity == NVIDIA and corpus != NVIDIA:
        raise ValueError(
            f"parity={NVIDIA} needs the data that NVIDIA uses, not corpus={corpus}: set `corpus: {NVIDIA}`"
        )
    asked = [task for task in named if task in QUESTION_FILES]
    if corpus == PUBLIC_DOMAIN and asked:
        raise ValueError(
            f"ruler task {asked[0]} has its questions in corpus {NVIDIA} only: set `corpus: {NVIDIA}`, "
            "or leave the task out"
        )


def label_of(corpus: str, parity: str) -> str:
    """What to write beside a score."""
    if corpus == PUBLIC_DOMAIN:
        return LABEL
    made = "prompts as NVIDIA makes them" if parity == NVIDIA else "own sizing and seeds"
    return f"RULER on NVIDIA's data, {made}"


class Generator:
    """Makes the samples of one corpus, tokenizer and mode."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Any,
        *,
        mode: str = "auto",
        parity: str = "native",
        reasoning_tokens: int | None = None,
    ) -> None:
        """See `ruler_prompt` for modes; `reasoning_tokens` replaces an eighth of the length.

        Raises:
            ValueError: a tokenizer without character offsets or without the template that `mode` needs, a
                haystack of fewer than 1,000 words, or a corpus that lacks what `parity` needs.
        """
        check_corpus((), corpus.name, parity)
        self._corpus, self._parity = corpus, parity
        self._reasoning_tokens = reasoning_tokens
        self._prompter = Prompter(tokenizer, mode, strip_prefix=parity != NVIDIA)
        punkt = corpus.punkt if parity == NVIDIA else None
        haystack = Haystack(corpus.works, punkt)
        self._material = Material(corpus, haystack, self._prompter.count)
        self._sizing = NativeSizing(self._material, self._prompter.tokens)

    def samples(
        self, task: str, length: int, seed: int, count: int, first: int = 0
    ) -> Iterator[Sample]:
        """Samples with index first to count - 1 of a task; `parity: nvidia` makes those before, too.

        Raises:
            DoesNotFit: not even the smallest form fits, or the corpus lacks what the task needs.
        """
        lacking = self._corpus.lacks(task)
        if lacking:
            raise DoesNotFit(lacking)
        family = TASKS[task]
        published = self._corpus.words.templates[family.family].new_tokens
        new_tokens = generation_tokens(
            published, length, self._prompter.mode, self._reasoning_tokens
        )
        if new_tokens >= length:
            raise too_long(task, new_tokens, length)
        drafts: Iterator[Draft]
        if self._parity == NVIDIA:
            made = published_drafts(
                task, length, seed, self._material, self._prompter.tokens, new_tokens
            )
            drafts = itertools.islice(made, first, count)
        else:
            drafts = (
                self._sizing.draft(task, length, seed, index, new_tokens)
                for index in range(first, count)
            )
        for index, draft in enumerate(drafts, start=first):
            placed = self._prompter.placed(draft)
            assert placed.num_tokens + new_tokens <= length, "a prompt exceeds its length"
            yield Sample(
                id=f"{task}/{length}/{index:05d}",
                task=task,
                length=length,
                index=index,
                prompt=placed.prompt,
                num_tokens=placed.num_tokens,
                new_tokens=new_tokens,
                references=list(draft.references),
                spans=placed.spans,
                chat=self._prompter.mode != "base",
                metric=family.metric,
                mode=self._prompter.mode,
                decoys=placed.decoys,
            )
