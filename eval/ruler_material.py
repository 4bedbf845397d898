"""What every RULER task draws on: dice, drafts, running text, word lists.

All randomness of a prompt comes from one `Dice`, in the order in which NVIDIA's generator draws. In
`parity: nvidia` one pair of dice serves a whole task, so the prompts are NVIDIA's to the byte; in
`parity: native` every sample has its own, so it depends on nothing but its name.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import random
import re
from collections.abc import Callable, Mapping, MutableSequence, Sequence
from dataclasses import dataclass

import numpy as np

from .ruler_corpus import Corpus
from .ruler_punkt import PunktModel, sentences
from .sources import RulerWords


class DoesNotFit(ValueError):
    """The smallest form of a task is longer than the length; the task is left out with this reason."""


class Redraw(Exception):
    """A draw that gives no prompt; the next one is made with less filling, as published."""


class Dice:
    """Random draws of a task (published) or of a sample (native)."""

    def __init__(self, seed: int, *, distinct: bool = False) -> None:
        self.stream = random.Random(seed)
        self._numbers = np.random.RandomState(seed % 2**32)
        self._seed = seed
        self._used: set[str] | None = set() if distinct else None

    @classmethod
    def named(cls, name: str) -> Dice:
        """Dice that depend on a name only, and give no key, value or variable twice."""
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        return cls(seed, distinct=True)

    def once(self, draw: Callable[[], str]) -> str:
        """A draw; another one where the first gives what these dice gave before and must not."""
        while True:
            value = draw()
            if self._used is None:
                return value
            if value not in self._used:
                self._used.add(value)
                return value

    def shuffle(self, items: MutableSequence[str]) -> None:
        """Shuffle in place; equally long lists always in the same way, as published."""
        random.Random(self._seed).shuffle(items)

    def five_digits(self) -> str:
        """A number as variable tracking assigns it."""
        return str(self._numbers.randint(10000, 99999))


@dataclass(frozen=True)
class Draft:
    """One example before it is tokenised.

    `needles` are the characters [first, last) of `question` that the answer rests on, `decoys` those of
    needles that are not asked for.
    """

    question: str
    answer_prefix: str
    references: tuple[str, ...]
    needles: tuple[tuple[int, int], ...] = ()
    decoys: tuple[tuple[int, int], ...] = ()


class Haystack:
    """Running text of a corpus, of any number of words: it repeats where it ends."""

    def __init__(self, works: Mapping[str, str], punkt: PunktModel | None = None) -> None:
        """With `punkt`: always from the beginning, sentences as published. Without: from a drawn sentence.

        Raises:
            ValueError: fewer than 1,000 words.
        """
        text = " ".join(works[name] for name in sorted(works))
        self._words = re.sub(r"\s+", " ", text).split(" ")
        if len(self._words) < 1000:
            raise ValueError(
                f"the haystack corpus has {len(self._words)} words: RULER prompts need at least 1000"
            )
        self._punkt = punkt
        ends = re.compile(r"[.!?][\"'”’)]*$")
        self._starts = [0] + [
            place + 1 for place, word in enumerate(self._words[:-1]) if ends.search(word)
        ]
        self._last: tuple[int, tuple[str, ...]] | None = None

    def sentences(self, size: int, dice: Dice) -> list[str]:
        """The first `size` words from where this haystack begins, as sentences."""
        if self._punkt is not None:
            return list(self._published(size))
        first = dice.stream.randrange(len(self._starts))
        found: list[str] = []
        for number in itertools.count(first):
            begin = self._starts[number % len(self._starts)]
            after = (number + 1) % len(self._starts)
            end = self._starts[after] if after else len(self._words)
            words = self._words[begin : min(end, begin + size)]
            found.append(" ".join(words))
            size -= len(words)
            if size <= 0:
                return found
        raise AssertionError("the count has no end")

    def _published(self, size: int) -> tuple[str, ...]:
        assert self._punkt is not None
        if self._last is None or self._last[0] != size:  # one size serves all samples of a task
            repeats = -(-size // len(self._words))
            words = (self._words * repeats)[:size] if repeats > 1 else self._words[:size]
            self._last = size, tuple(sentences(" ".join(words).strip(), self._punkt))
        return self._last[1]


class PairList:
    """All `adjective-noun` keys in alphabetical order, six million of them, without making them."""

    def __init__(self, adjectives: Sequence[str], nouns: Sequence[str]) -> None:
        self._nouns = sorted(set(nouns))
        # Keys of `old` and `old-fashioned` stand among one another; all other adjectives stand in a row.
        heads: list[list[str]] = []
        for adjective in sorted(set(adjectives), key=lambda word: word + "-"):
            if heads and adjective.startswith(heads[-1][0] + "-"):
                heads[-1].append(adjective)
            else:
                heads.append([adjective])
        self._heads = heads
        sizes = [len(self._group(place)) for place in range(len(heads))]
        self._ends = list(itertools.accumulate(sizes))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> str:
        """The key at a place from 0 on."""
        place = bisect.bisect_right(self._ends, index)
        return self._group(place)[index - (self._ends[place - 1] if place else 0)]

    def _group(self, place: int) -> _Row | list[str]:
        head = self._heads[place]
        if len(head) == 1:
            return _Row(head[0], self._nouns)
        return sorted({f"{adjective}-{noun}" for adjective in head for noun in self._nouns})


class _Row:
    """Keys of one adjective."""

    def __init__(self, adjective: str, nouns: Sequence[str]) -> None:
        self._adjective, self._nouns = adjective, nouns

    def __len__(self) -> int:
        return len(self._nouns)

    def __getitem__(self, index: int) -> str:
        return f"{self._adjective}-{self._nouns[index]}"


@dataclass(frozen=True)
class Material:
    """What every draft is made from. `count_tokens` counts a text alone, without special tokens."""

    corpus: Corpus
    haystack: Haystack
    count_tokens: Callable[[str], int]

    @property
    def words(self) -> RulerWords:
        """The benchmark's own words."""
        return self.corpus.words

    @functools.cached_property
    def keys(self) -> PairList:
        """Keys of needles."""
        return PairList(self.words.adjectives, self.words.nouns)

    @functools.cached_property
    def list_words(self) -> list[str]:
        """All words of the common-words task, sorted."""
        return sorted({*self.words.nouns, *self.words.adjectives, *self.words.verbs})


def places(text: str, needles: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Characters [first, last) of every needle wherever it occurs."""
    found = []
    for needle in needles:
        first = text.find(needle)
        while first >= 0:
            found.append((first, first + len(needle)))
            first = text.find(needle, first + 1)
    return tuple(found)
