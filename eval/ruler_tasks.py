"""RULER's thirteen tasks, and the two families that hide something in a text: needles and variables.

A draft is a function of (dice, size): `ruler_sizing.py` looks for the size that fills a length. Parameters
and the order of draws are the published ones (NVIDIA/RULER c3f5e3b); the words of templates, needles and
noise come in from `sources.py`. `ruler_lists.py` and `ruler_questions.py` hold the other families.
"""

from __future__ import annotations

import string
import uuid
from dataclasses import dataclass
from typing import ClassVar, Literal

from .ruler_lists import CommonWords, FrequentWords
from .ruler_material import Dice, Draft, Material, Redraw, places
from .ruler_questions import Documents

DEPTHS = tuple(round(100 * step / 39) for step in range(40))
_NUMBER_DIGITS = 7


@dataclass(frozen=True)
class Needles:
    """Sentences with a key and a value; the values of some keys are asked for."""

    haystack: Literal["noise", "essay", "needles"]
    key: Literal["words", "uuids"] = "words"
    value: Literal["numbers", "uuids"] = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1
    family: ClassVar[str] = "niah"
    metric: ClassVar[str] = "all"

    @property
    def min_size(self) -> int:
        """Words of essay or lines that can hold the needles."""
        return 40 if self.haystack == "essay" else self.num_keys * self.num_values

    def step(self, length: int) -> int:
        """Smallest size, and by how much a prompt that is too long shrinks, as published."""
        if self.haystack == "essay":
            return 500
        return 25 if length >= 4096 else 5

    def draft(self, dice: Dice, size: int, length: int, index: int, material: Material) -> Draft:
        """`size`: words of essay, or lines of noise or of other needles."""
        keys: list[str] = []
        values: list[list[str]] = []
        for _ in range(self.num_keys):
            keys.append(_random(dice, self.key, material))
            values.append([_random(dice, self.value, material) for _ in range(self.num_values)])
        by_key = [
            [self._needle(key, value, material) for value in many]
            for key, many in zip(keys, values, strict=True)
        ]
        needles = [needle for many in by_key for needle in many]
        dice.shuffle(needles)
        context = self._context(dice, size, needles, material)
        asked = dice.stream.sample(range(self.num_keys), self.num_queries)
        names = [keys[place] for place in asked]
        query = ", ".join(names[:-1]) + ", and " + names[-1] if len(names) > 1 else names[0]
        template = material.words.templates[self.family]
        question, prefix, kind = template.question, template.answer_prefix, str(self.value)
        if self.num_queries * self.num_values == 1:
            question, prefix, kind = _singular(question), _singular(prefix), kind[:-1]
        question = question.format(type_needle_v=kind, context=context, query=query)
        wanted = [needle for place in asked for needle in by_key[place]]
        return Draft(
            question,
            prefix.format(type_needle_v=kind, query=query),
            tuple(value for place in asked for value in values[place]),
            needles=places(question, wanted),
            decoys=places(question, [needle for needle in needles if needle not in wanted]),
        )

    def _context(self, dice: Dice, size: int, needles: list[str], material: Material) -> str:
        if self.haystack == "essay":
            sentences = material.haystack.sentences(size, dice)
            depths = dice.stream.sample(DEPTHS, len(needles))
            cuts = sorted(int(len(sentences) * (depth / 100)) for depth in depths)
            parts, before = [], 0
            for cut, needle in zip(cuts, needles, strict=True):
                parts += [" ".join(sentences[before:cut]), needle]
                before = cut
            return " ".join([*parts, " ".join(sentences[before:])])
        if self.haystack == "noise":
            lines = [material.words.noise] * size
        else:
            lines = []
            for _ in range(size):
                key = _random(dice, self.key, material)
                lines.append(self._needle(key, _random(dice, self.value, material), material))
        chosen = sorted(dice.stream.sample(range(size), len(needles)), reverse=True)
        for place, needle in zip(chosen, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)

    def _needle(self, key: str, value: str, material: Material) -> str:
        return material.words.needle.format(type_needle_v=self.value, key=key, value=value)


@dataclass(frozen=True)
class Tracking:
    """Variable tracking: one chain of assignments in noise, after a worked example."""

    num_hops: int = 4
    family: ClassVar[str] = "variable_tracking"
    metric: ClassVar[str] = "all"
    min_size: ClassVar[int] = 5
    """Lines that can hold the five assignments."""
    example_tokens: ClassVar[int] = 500
    example_step: ClassVar[int] = 5

    def step(self, length: int) -> int:
        """As `Needles.step`."""
        return 10 if length >= 4096 else 5

    def draft(self, dice: Dice, size: int, length: int, index: int, material: Material) -> Draft:
        """`size`: lines of noise. Without the worked example: see `with_example`."""
        return self._chain(dice, size, 5, None, material)

    def example(self, dice: Dice, size: int, material: Material) -> Draft:
        """A solved question with shorter names and a fixed number, to be varied for every prompt."""
        return self._chain(dice, size, 3, _EXAMPLE_NUMBER, material)

    def with_example(self, dice: Dice, draft: Draft, example: Draft) -> Draft:
        """The draft behind the example, whose names and number are drawn anew."""
        shown = solved(example)
        for name in shown.split()[-self.num_hops - 1 :]:
            shown = shown.replace(name, _name(dice, len(name)))
        shown = shown.replace(_EXAMPLE_NUMBER, dice.five_digits()) + "\n"
        needles = tuple((first + len(shown), last + len(shown)) for first, last in draft.needles)
        return Draft(shown + draft.question, draft.answer_prefix, draft.references, needles)

    def _chain(
        self, dice: Dice, size: int, letters: int, number: str | None, material: Material
    ) -> Draft:
        wanted = self.num_hops + 1
        names = [_name(dice, letters) for _ in range(wanted)]
        while len(set(names)) < wanted:
            names.append(_name(dice, letters))
        value = number or dice.five_digits()
        if len(names) > wanted:
            # The published generator begins a second chain here and trips over it.
            if number is None:
                dice.five_digits()
            raise Redraw
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {new} = VAR {old} " for old, new in zip(names, names[1:], strict=False)]
        if size < len(chain):
            raise Redraw
        lines = [material.words.tracking_noise.rstrip("\n")] * size
        chosen = sorted(dice.stream.sample(range(size), len(chain)))
        for shift, (place, assignment) in enumerate(zip(chosen, chain, strict=True)):
            lines.insert(place + shift, assignment)
        context = "\n".join(lines).replace(". \n", ".\n")
        template = material.words.templates[self.family]
        blanks = {"context": context, "query": value, "num_v": wanted}
        question = template.question.format(**blanks)
        needles = places(question, [assignment.strip() for assignment in chain])
        return Draft(question, template.answer_prefix.format(**blanks), tuple(names), needles)


_EXAMPLE_NUMBER = "12345"

Family = Needles | Tracking | CommonWords | FrequentWords | Documents

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
    "qa_1": Documents("qa_1"),
    "qa_2": Documents("qa_2"),
}


def solved(example: Draft) -> str:
    """A worked example as it stands before the question."""
    return f"{example.question}{example.answer_prefix} {' '.join(example.references)}\n"


def _random(dice: Dice, kind: Literal["words", "numbers", "uuids"], material: Material) -> str:
    low = 10 ** (_NUMBER_DIGITS - 1)
    if kind == "numbers":
        return dice.once(lambda: str(dice.stream.randint(low, 10 * low - 1)))
    if kind == "words":
        return dice.once(lambda: dice.stream.choice(material.keys))
    return dice.once(lambda: str(uuid.UUID(int=dice.stream.getrandbits(128), version=4)))


def _name(dice: Dice, letters: int) -> str:
    return dice.once(lambda: "".join(dice.stream.choices(string.ascii_uppercase, k=letters)))


def _singular(template: str) -> str:
    """The published rewrite of the needle template where one value is asked for."""
    for old, new in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
        template = template.replace(old, new)
    return template
