"""RULER's two question tasks: the documents a question needs, among many that it does not.

Called through `ruler_tasks.TASKS`. The needles are the characters of the documents that the answer rests
on: the answers themselves (SQuAD) or the supporting sentences (HotpotQA).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .ruler_corpus import Question, Questions
from .ruler_material import Dice, DoesNotFit, Draft, Material, Redraw


@dataclass(frozen=True)
class Documents:
    """A question behind numbered documents; a sample's question is the one with its index."""

    task: str
    family: ClassVar[str] = "qa"
    metric: ClassVar[str] = "part"
    min_size: ClassVar[int] = 1

    def step(self, length: int) -> int:
        """Smallest size, and by how much a prompt that is too long shrinks, as published."""
        return 10

    def draft(self, dice: Dice, size: int, length: int, index: int, material: Material) -> Draft:
        """`size`: documents. Fewer than belong to the question: those it rests on come first."""
        lacking = material.corpus.lacks(self.task)
        if lacking:
            raise DoesNotFit(lacking)
        questions = material.corpus.questions[self.task]
        asked = questions.items[index % len(questions.items)]
        chosen = [str(place) for place in self._chosen(dice, size, asked, questions)]
        dice.shuffle(chosen)
        documents = [int(place) for place in chosen]
        template = material.words.templates[self.family]
        parts = [
            material.words.document.format(i=number, document=questions.documents[place])
            for number, place in enumerate(documents, start=1)
        ]
        question = template.question.format(context="\n\n".join(parts), query=asked.text)
        prefix = template.answer_prefix.format(query=asked.text)
        at = template.question.index("{context}")
        needles = []
        for place, part in zip(documents, parts, strict=True):
            inside = at + len(part) - len(questions.documents[place])
            needles += [
                (inside + first, inside + last)
                for document, first, last in asked.evidence
                if document == place
            ]
            at += len(part) + 2
        return Draft(question, prefix, asked.answers, tuple(needles))

    def smallest(self, index: int, material: Material) -> int:
        """Documents without which the question cannot be answered."""
        items = material.corpus.questions[self.task].items
        return max(1, len(_needed(items[index % len(items)])))

    def _chosen(self, dice: Dice, size: int, asked: Question, questions: Questions) -> list[int]:
        """Places of the documents, not yet shuffled; the draws are the published ones."""
        total = len(questions.documents)
        own, related = asked.documents, asked.related
        if size >= total:
            return (list(range(total)) * -(-size // total))[:size]
        if size < len(own):
            needed = _needed(asked)
            if size < len(needed):
                raise Redraw
            ordered = sorted(own, key=lambda place: place not in needed)
            return ordered[:size]
        if size - len(own) > len(related):
            taken = {*own, *related}
            others = [place for place in range(total) if place not in taken]
            wanted = max(0, size - len(own) - len(related))
            return [*own, *related, *dice.stream.sample(others, wanted)]
        return [*own, *dice.stream.sample(related, size - len(own))]


def _needed(asked: Question) -> set[int]:
    return {document for document, _, _ in asked.evidence}
