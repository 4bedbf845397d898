"""How each RULER task family makes one example of a given size.

A draft is a pure function of (random state, size): `ruler.py` searches the size that fills a length.
Parameters are the published ones (RULER, NVIDIA 26.3); the text of templates, needles and noise comes in
from `sources.py`.

Differences from the published generator, all meant by the label `ruler-pd`: public-domain haystack, a
start in the haystack that is drawn per sample, sentences split by punctuation, another random order.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import re
import string
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from .sources import RulerWords

DEPTHS = tuple(round(100 * step / 39) for step in range(40))
_NUMBER_DIGITS = 7
_TOKENS_PER_CODED_WORD = 50  # published size of the coded vocabulary: (length - 50) // 50
_EXAMPLE_SHARE = 4  # a one-shot example takes at most 1/4 of a length, and 500 tokens as published


@dataclass(frozen=True)
class Draft:
    """One example before it is tokenised; every needle occurs exactly once in `question`."""

    question: str
    answer_prefix: str
    references: tuple[str, ...]
    needles: tuple[str, ...] = ()


@dataclass(frozen=True)
class Needles:
    """Parameters of the needle family."""

    haystack: Literal["noise", "essay", "needles"]
    key: Literal["words", "uuids"] = "words"
    value: Literal["numbers", "uuids"] = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1
    family: str = "niah"

    @property
    def min_size(self) -> int:
        """Words of essay or lines of noise that can hold the needles."""
        return 40 if self.haystack == "essay" else self.num_keys * self.num_values

    def draft(self, rng: random.Random, size: int, length: int, material: Material) -> Draft:
        """`size`: words of essay, lines of noise, or distracting needles."""
        words = material.words
        made: set[str] = set()
        values: dict[str, list[str]] = {}
        for _ in range(max(self.num_keys, self.num_queries)):
            key = _distinct(rng, self.key, made, words)
            values[key] = [_distinct(rng, self.value, made, words) for _ in range(self.num_values)]
        needles = [
            words.needle.format(type_needle_v=self.value, key=key, value=value)
            for key, many in values.items()
            for value in many
        ]
        rng.shuffle(needles)
        asked = rng.sample(list(values), self.num_queries)
        context = self._context(rng, size, needles, made, material)
        query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
        question, prefix = words.templates["niah"].question, words.templates["niah"].answer_prefix
        kind: str = self.value
        if self.num_queries * self.num_values == 1:
            question, prefix, kind = _singular(question), _singular(prefix), kind[:-1]
        return Draft(
            question.format(type_needle_v=kind, context=context, query=query),
            prefix.format(type_needle_v=kind, query=query),
            tuple(value for key in asked for value in values[key]),
            tuple(needles),
        )

    def _context(
        self, rng: random.Random, size: int, needles: list[str], made: set[str], material: Material
    ) -> str:
        if self.haystack == "essay":
            depths = sorted(rng.sample(DEPTHS, len(needles)))
            sentences = material.haystack.sentences(rng.random(), size)
            places = [int(len(sentences) * depth / 100) for depth in depths]
            for place, needle in reversed(list(zip(places, needles, strict=True))):
                sentences.insert(place, needle)
            return " ".join(sentences)
        if self.haystack == "noise":
            lines = [material.words.noise] * size
        else:
            lines = [
                material.words.needle.format(
                    type_needle_v=self.value,
                    key=_distinct(rng, self.key, made, material.words),
                    value=_distinct(rng, self.value, made, material.words),
                )
                for _ in range(size)
            ]
        for place, needle in zip(
            sorted(rng.sample(range(size), len(needles)), reverse=True), needles, strict=True
        ):
            lines.insert(place, needle)
        return "\n".join(lines)


@dataclass(frozen=True)
class Tracking:
    """Variable tracking: one chain of assignments in noise, after a worked example."""

    num_hops: int = 4
    family: str = "variable_tracking"
    min_size: int = 1

    def draft(self, rng: random.Random, size: int, length: int, material: Material) -> Draft:
        """`size`: lines of noise."""
        allowed = min(500, length // _EXAMPLE_SHARE)
        question, prefix, names, _ = self._chain(random.Random(0), 0, 3, material)
        room = allowed - material.count_tokens(question + prefix + " ".join(names))
        lines = max(0, room // max(1, material.count_tokens(material.words.tracking_noise)))
        question, prefix, names, _ = self._chain(rng, lines, 3, material)
        example = f"{question}{prefix} {' '.join(names)}\n\n"
        question, prefix, names, chain = self._chain(rng, size, 5, material)
        return Draft(f"{example}\n\n{question}", prefix, names, chain)

    def _chain(
        self, rng: random.Random, size: int, letters: int, material: Material
    ) -> tuple[str, str, tuple[str, ...], tuple[str, ...]]:
        """Question, answer prefix, the variables, the assignments."""
        names: list[str] = []
        while len(names) < self.num_hops + 1:
            name = "".join(rng.choices(string.ascii_uppercase, k=letters))
            if name not in names:
                names.append(name)
        value = str(rng.randint(10000, 99998))
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {new} = VAR {old} " for old, new in itertools.pairwise(names)]
        noise = [material.words.tracking_noise] * size
        if size <= len(chain):
            noise = [f"{part}." for line in noise for part in line.split(".") if part.strip()]
        places = sorted(rng.randrange(len(noise) + 1) for _ in chain)
        for shift, (place, assignment) in enumerate(zip(places, chain, strict=True)):
            noise.insert(place + shift, assignment)
        template = material.words.templates[self.family]
        blanks = {
            "context": " ".join(noise).replace(". \n", ".\n"),
            "query": value,
            "num_v": len(names),
        }
        assignments = tuple(assignment.strip() for assignment in chain)
        prefix = template.answer_prefix.format(**blanks)
        return template.question.format(**blanks), prefix, tuple(names), assignments


@dataclass(frozen=True)
class CommonWords:
    """Ten common words in a numbered list, after a worked example."""

    num_common: int = 10
    family: str = "common_words_extraction"
    min_size: int = 20

    def draft(self, rng: random.Random, size: int, length: int, material: Material) -> Draft:
        """`size`: different words in the list; below 4096 tokens the published 6/1 form."""
        template = material.words.templates[self.family]
        shown, common, uncommon = (40, 10, 3) if length >= 4096 else (20, 3, 1)
        example, answers = self._list(rng, shown, common, uncommon, material)
        common, uncommon = (30, 3) if length >= 4096 else (6, 1)
        context, references = self._list(rng, size, common, uncommon, material)
        solved = template.question.format(context=example, query="") + template.answer_prefix
        solved += " ".join(f"{place}. {word}" for place, word in enumerate(answers, start=1))
        question = template.question.format(context=context, query="")
        return Draft(f"{solved}\n{question}", template.answer_prefix, tuple(references))

    def _list(
        self, rng: random.Random, size: int, common: int, uncommon: int, material: Material
    ) -> tuple[str, list[str]]:
        words = material.list_words
        drawn = rng.sample(words, min(size, len(words)))
        frequent = drawn[: self.num_common]
        listed = frequent * common + drawn[self.num_common :] * uncommon
        rng.shuffle(listed)
        return " ".join(f"{place}. {word}" for place, word in enumerate(listed, 1)), frequent


@dataclass(frozen=True)
class FrequentWords:
    """Three most frequent coded words of a zeta-distributed text (alpha 2.0)."""

    word_len: int = 6
    family: str = "freq_words_extraction"
    min_size: int = 100

    def draft(self, rng: random.Random, size: int, length: int, material: Material) -> Draft:
        """`size`: words that are drawn, before rounding down."""
        template = material.words.templates[self.family]
        wanted = (length - template.new_tokens) // _TOKENS_PER_CODED_WORD
        coded: list[str] = []
        while len(coded) < wanted:
            word = "".join(rng.choices(string.ascii_lowercase, k=self.word_len))
            if word not in coded:
                coded.append(word)
        coded[0] = "..."
        counts = [int(size / rank**2 / (math.pi**2 / 6)) for rank in range(1, wanted + 1)]
        listed = [word for word, count in zip(coded, counts, strict=True) for _ in range(count)]
        rng.shuffle(listed)
        question = template.question.format(context=" ".join(listed), query="")
        return Draft(question, template.answer_prefix, tuple(coded[1:4]))


Family = Needles | Tracking | CommonWords | FrequentWords

TASKS: dict[str, Family] = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", value="uuids"),
    "niah_multikey_1": Needles("essay", num_keys=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", key="uuids", value="uuids"),
    "niah_multivalue": Needles("essay", num_values=4),
    "niah_multiquery": Needles("essay", num_queries=4, num_keys=4),
    "vt": Tracking(),
    "cwe": CommonWords(),
    "fwe": FrequentWords(),
}


class Haystack:
    """Running text of several works, read as words from any sentence start on."""

    def __init__(self, works: Mapping[str, str]) -> None:
        """`works`: text by name; ValueError if there are fewer than 1,000 words."""
        self._words = " ".join(works[name] for name in sorted(works)).split()
        if len(self._words) < 1000:
            raise ValueError(
                f"the haystack corpus has {len(self._words)} words: RULER prompts need at least 1000"
            )
        ends = re.compile(r"[.!?][\"'”’)]*$")
        self._starts = [0] + [
            place + 1 for place, word in enumerate(self._words[:-1]) if ends.search(word)
        ]

    def sentences(self, where: float, size: int) -> list[str]:
        """`size` words from the sentence start at share `where` of the text on, as sentences."""
        start = self._starts[int(where * len(self._starts))]
        words = [self._words[(start + step) % len(self._words)] for step in range(size)]
        return re.split(r"(?<=[.!?])\s+", " ".join(words))


@dataclass(frozen=True)
class Material:
    """What every draft is made from."""

    words: RulerWords
    haystack: Haystack
    count_tokens: Callable[[str], int]

    @functools.cached_property
    def list_words(self) -> list[str]:
        """All words of the common-words task, sorted."""
        return sorted({*self.words.nouns, *self.words.adjectives, *self.words.verbs})


def _distinct(
    rng: random.Random,
    kind: Literal["words", "numbers", "uuids"],
    made: set[str],
    words: RulerWords,
) -> str:
    """A random key or value that no other needle of the example has."""
    while True:
        if kind == "numbers":
            value = str(rng.randint(10 ** (_NUMBER_DIGITS - 1), 10**_NUMBER_DIGITS - 1))
        elif kind == "words":
            value = f"{rng.choice(words.adjectives)}-{rng.choice(words.nouns)}"
        else:
            value = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        if value not in made:
            made.add(value)
            return value


def _singular(template: str) -> str:
    """The published rewrite of the needle template where one value is asked for."""
    for old, new in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
        template = template.replace(old, new)
    return template
