"""RULER's two counting tasks: common words of a numbered list, frequent words of a coded text.

Both need the whole text at once, so they have no needle. Called through `ruler_tasks.TASKS`.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .ruler_material import Dice, DoesNotFit, Draft, Material

_PUBLISHED_FORM = 4096
"""Shorter lengths have a smaller worked example and fewer repetitions."""
_TOKENS_PER_CODED_WORD = 50
_ZETA_2 = float(np.pi**2 / 6)


@dataclass(frozen=True)
class CommonWords:
    """Ten common words in a numbered list, after a worked example."""

    num_common: int = 10
    family: ClassVar[str] = "common_words_extraction"
    metric: ClassVar[str] = "all"
    min_size: ClassVar[int] = 20
    """Different words in the list: half of them common. The published search begins at 10."""
    probe_size: ClassVar[int] = 4096
    """Size of the list from which the published search learns what a word costs."""

    def step(self, length: int) -> int:
        """Smallest size, and by how much a prompt that is too long shrinks, as published."""
        return 10

    def draft(self, dice: Dice, size: int, length: int, index: int, material: Material) -> Draft:
        """`size`: different words in the list."""
        template = material.words.templates[self.family]
        shown, often, seldom = (40, 10, 3) if length >= _PUBLISHED_FORM else (20, 3, 1)
        example, answers = self._list(dice, shown, often, seldom, material)
        often, seldom = (30, 3) if length >= _PUBLISHED_FORM else (6, 1)
        context, references = self._list(dice, size, often, seldom, material)
        blanks = {"num_cw": self.num_common, "query": ""}
        solved = (template.question + template.answer_prefix).format(context=example, **blanks)
        question = template.question.format(context=context, **blanks)
        prefix = template.answer_prefix.format(**blanks)
        return Draft(f"{solved} {_numbered(answers)}\n{question}", prefix, tuple(references))

    def _list(
        self, dice: Dice, size: int, often: int, seldom: int, material: Material
    ) -> tuple[str, list[str]]:
        words: list[str] | tuple[str, ...] = list(material.list_words)
        dice.shuffle(words)  # type: ignore[arg-type]
        if size > len(words):
            words = material.corpus.more_words
        if size > len(words):
            raise DoesNotFit(
                f"cwe of {size} different words needs a longer word list than the corpus was read with"
            )
        drawn = dice.stream.sample(words, size)
        common = drawn[: self.num_common]
        listed = common * often + drawn[self.num_common :] * seldom
        dice.shuffle(listed)
        return _numbered(listed), common


@dataclass(frozen=True)
class FrequentWords:
    """Three most frequent coded words of a zeta-distributed text (alpha 2.0)."""

    word_len: int = 6
    family: ClassVar[str] = "freq_words_extraction"
    metric: ClassVar[str] = "all"
    min_size: ClassVar[int] = 100

    def step(self, length: int) -> int:
        """Change of size in the published search, tokens // 32."""
        return length // 32

    def draft(self, dice: Dice, size: int, length: int, index: int, material: Material) -> Draft:
        """`size`: words that are drawn, before rounding down."""
        template = material.words.templates[self.family]
        return self.text(size, self.vocabulary(dice, length - template.new_tokens), dice, material)

    def vocabulary(self, dice: Dice, room: int) -> list[str]:
        """Coded words by falling frequency; the first stands for noise.

        `room`: tokens of the prompt; one word in 50 tokens, and never fewer than noise and three answers.
        """
        wanted = max(4, room // _TOKENS_PER_CODED_WORD)
        coded: list[str] = []
        kinds: set[str] = set()
        while len(coded) < wanted or len(kinds) < wanted:
            coded.append("".join(dice.stream.choices(string.ascii_lowercase, k=self.word_len)))
            kinds.add(coded[-1])
        vocabulary = sorted(kinds)
        dice.shuffle(vocabulary)
        vocabulary[0] = "..."
        return vocabulary

    def text(self, size: int, vocabulary: list[str], dice: Dice, material: Material) -> Draft:
        """The prompt of `size` words with this vocabulary; draws nothing."""
        template = material.words.templates[self.family]
        ranks = np.arange(1, len(vocabulary) + 1)
        counts = (size * (ranks**-2.0) / _ZETA_2).astype(int)
        listed = [
            word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)
        ]
        dice.shuffle(listed)
        question = template.question.format(context=" ".join(listed), query="")
        return Draft(question, template.answer_prefix, tuple(vocabulary[1:4]))


def _numbered(words: list[str]) -> str:
    return " ".join(f"{place}. {word}" for place, word in enumerate(words, start=1))
