"""Made documents with long-range recall: facts stated once in prose, asked for much later.

Plain prose teaches an index branch little about retrieval (docs/method.md); a mix with these does. A
document is a pure function of (seed, source name, its number), so the position is one integer. The prose
around the facts comes from the other sources of the recipe. Used by `data.loader`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .documents import Documents
from .recall_forms import FORMS, SHARES, Question, Scenario, key_number
from .recall_words import Rng, pick
from .stream import Tokenizer, source_key

SHORTEST_ROW = 256
"""Shorter rows hold no facts and questions worth a distance."""
POOL_CHARS = 1_500_000
"""Prose that is kept for filler."""
FULL_SHARE = 0.8
"""Share of the documents that fill a row; the others are shorter, down to a quarter of it."""

LONGEST_SENTENCE = 600
"""Characters of filler between two places where a fact may stand."""
NEAR = 16
"""Tokens that may stay unused before more filler is tried."""

ASK_STYLES = (
    "Question: {q}\nAnswer: {a}\n\n",
    "Q: {q}\nA: {a}\n\n",
    "User: {q}\nAssistant: {a}\n\n",
    '"{q}"\n\n"{a}"\n\n',
    "{q} {a}\n\n",
)
REQUESTS = (
    "Read this carefully; I will ask about it afterwards.",
    "Here is a text. Answer from it alone.",
    "Below you find some pages and a question about them.",
    "I need help finding something in what follows.",
)


@dataclass(frozen=True)
class Asked:
    """Where a question's answer stands in the text, and where its facts do (characters)."""

    question: Question
    at: int
    facts: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class RecallDocument:
    """A made text and what is asked in it."""

    text: str
    asked: tuple[Asked, ...]


class Filler:
    """Sentences of real prose with their token counts, and the words that occur in it."""

    def __init__(self, documents: Sequence[Documents], tokenizer: Tokenizer) -> None:
        texts = list(_beginnings(documents))
        self.sentences = [piece for text in texts for piece in _sentences(text)]
        if not self.sentences:
            raise ValueError("kind=recall found no prose in the other sources: the corpus is empty")
        counts = [len(ids) for ids in tokenizer.encode_many(self.sentences)]
        self._ends = np.cumsum(counts)
        found = sorted(set(re.findall(r"\b[a-z]{5,9}\b", " ".join(texts))))
        self.words = (
            found if len(found) >= 64 else [f"{a}{b}" for a in "bdfghklm" for b in _SYLLABLES]
        )

    def run(self, begin: int, num_tokens: int) -> list[str]:
        """Consecutive sentences from number `begin` on, of `num_tokens` tokens at most."""
        picked: list[str] = []
        while num_tokens > 0:
            before = self._ends[begin - 1] if begin else 0
            stop = int(np.searchsorted(self._ends, before + num_tokens, side="right"))
            picked += self.sentences[begin:stop]
            if stop < len(self.sentences):
                return picked
            num_tokens -= int(self._ends[-1] - before)  # past the end: go on at the beginning
            begin = 0
        return picked


_SYLLABLES = ("arel", "enor", "ilus", "ovan", "udrit", "aster", "omel", "ivern")


class RecallStream:
    """Endless stream of made documents; none is ever cut."""

    splits = False

    def __init__(
        self,
        name: str,
        documents: Sequence[Documents],
        tokenizer: Tokenizer,
        row_len: int,
        seed: int,
    ) -> None:
        self.name = name
        self._tokenizer, self._row_len = tokenizer, row_len
        self._key = source_key(seed, name)
        self._filler = Filler(documents, tokenizer)
        self._number = 0

    def take(self, room: int) -> np.ndarray:
        """The next document, (n,) int32 with n <= room; `room` is a whole row."""
        assert room == self._row_len, (room, self._row_len)
        tokens = make_tokens(
            [*self._key, self._number], self._filler, self._tokenizer, self._row_len
        )
        self._number += 1
        return tokens

    def state_dict(self) -> dict[str, Any]:
        return {"number": self._number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._number = state["number"]


def make_tokens(
    key: Sequence[int], filler: Filler, tokenizer: Tokenizer, row_len: int
) -> np.ndarray:
    """Tokens of the document with this key, BOS and EOS included: (n,) int32, n <= row_len."""
    return _fit(key, filler, tokenizer, row_len)[1]


def make_document(
    key: Sequence[int], filler: Filler, tokenizer: Tokenizer, row_len: int
) -> RecallDocument:
    """The document with this key as text, with the places of its facts and answers."""
    return _fit(key, filler, tokenizer, row_len)[0]


def _fit(
    key: Sequence[int], filler: Filler, tokenizer: Tokenizer, row_len: int
) -> tuple[RecallDocument, np.ndarray]:
    """Draw a document and give it as much filler as fits."""
    rng = np.random.default_rng(list(key))
    length = row_len
    if rng.random() > FULL_SHARE:
        length = int(rng.integers(row_len // 4, row_len + 1))
    length = max(length, SHORTEST_ROW)
    scenarios = _scenarios(rng, filler, tokenizer, length)
    layout = pick(rng, ("end", "throughout", "chat"))
    layout_seed = int(rng.integers(2**31))
    begin = int(rng.integers(len(filler.sentences)))
    room = length - _cost(scenarios, tokenizer)
    run = filler.run(begin, room)
    grown = False
    while True:
        document = _lay_out(np.random.default_rng(layout_seed), scenarios, run, layout, tokenizer)
        tokens = np.concatenate(list(tokenizer.document(document.text)))
        over = len(tokens) - length
        if over < -NEAR and not grown:  # the cost is an upper estimate: use what it left
            grown = True
            run = filler.run(begin, room - over)
        elif over <= 0:
            return document, tokens
        elif run:
            # A sentence's own count is off by little where it joins others: drop a few and repeat.
            grown = True
            run = run[: -max(1, over * len(run) // (2 * len(tokens)))]
        elif layout == "chat":
            layout = "end"
        elif len(scenarios) > 1:
            scenarios = scenarios[:1]
        elif scenarios[0].form != "key_number" or len(scenarios[0].facts) > 1:
            scenarios = [_smallest(rng, filler)]
        else:
            raise ValueError(
                f"row_len={row_len} is too short for kind=recall with this tokenizer: one fact and "
                f"its question take {len(tokens)} tokens"
            )


def _scenarios(rng: Rng, filler: Filler, tokenizer: Tokenizer, length: int) -> list[Scenario]:
    """Scenarios that together take at most about a third of the document."""
    names = list(FORMS)
    weights = np.array([SHARES.get(name, 1.0) for name in names])
    wanted = int(rng.integers(1, 4 + max(0, int(np.log2(length / 512)))))
    order = rng.choice(
        len(names), size=min(wanted, len(names)), replace=False, p=weights / weights.sum()
    )
    chosen: list[Scenario] = []
    for index in order:
        scenario = FORMS[names[int(index)]](rng, filler.words)
        if _cost([*chosen, scenario], tokenizer) <= length // 3:
            chosen.append(scenario)
    return chosen or [_smallest(rng, filler)]


def _smallest(rng: Rng, filler: Filler) -> Scenario:
    """One fact and one question."""
    scenario = key_number(rng, filler.words)
    asked = scenario.questions[0]
    question = Question(asked.text, asked.answer, asked.sentence, (0,))
    return Scenario("key_number", (scenario.facts[asked.needs[0]],), (question,))


def _cost(scenarios: Sequence[Scenario], tokenizer: Tokenizer) -> int:
    texts = [text for s in scenarios for text in s.facts]
    texts += [ASK_STYLES[0].format(q=q.text, a=q.sentence) for s in scenarios for q in s.questions]
    return sum(len(ids) + 1 for ids in tokenizer.encode_many(texts))


def _lay_out(
    rng: Rng, scenarios: Sequence[Scenario], run: Sequence[str], layout: str, tokenizer: Tokenizer
) -> RecallDocument:
    """Put facts between sentences of filler, and every question after the facts it needs."""
    slots = len(run)
    items: list[tuple[float, str, Any]] = []
    late: list[tuple[int, Question]] = []
    for number, scenario in enumerate(scenarios):
        places = rng.random(len(scenario.facts)) * slots
        for i, fact in enumerate(scenario.facts):
            items.append((float(places[i]), fact, (number, i)))
        for question in scenario.questions:
            after = max(float(places[i]) for i in question.needs)
            if layout == "throughout" and rng.random() < 0.7:
                items.append(
                    (after + rng.random() * (slots - after) + 1e-9, "", (number, question))
                )
            else:
                late.append((number, question))
    rng.shuffle(late)  # type: ignore[arg-type]
    style = pick(rng, ASK_STYLES)
    bare = bool(rng.random() < 0.5)
    writer = _Writer(style, bare)
    items.sort(key=lambda item: item[0])
    done = 0
    for place, fact, what in items:
        writer.prose("".join(run[done : int(place)]))
        done = max(done, int(place))
        if fact:
            writer.fact(what, fact, own_paragraph=bool(rng.random() < 0.25))
        else:
            writer.ask(*what)
    writer.prose("".join(run[done:]))
    chat = _chat(rng, writer, late, tokenizer) if layout == "chat" and late else None
    if chat is not None:
        return chat
    for number, question in late:
        writer.ask(number, question)
    return RecallDocument(writer.text.rstrip(), tuple(writer.asked))


class _Writer:
    """Text under construction; remembers where facts and answers stand."""

    def __init__(self, style: str, bare: bool) -> None:
        self.text = ""
        self.asked: list[Asked] = []
        self.spans: dict[tuple[int, int], tuple[int, int]] = {}
        self._style, self._bare = style, bare

    def prose(self, text: str) -> None:
        self.text += text

    def fact(self, key: tuple[int, int], text: str, own_paragraph: bool) -> None:
        if own_paragraph:
            self.break_paragraph()
        elif self.text and not self.text[-1].isspace():
            self.text += " "
        self.spans[key] = (len(self.text), len(self.text) + len(text))
        self.text += text + ("\n\n" if own_paragraph else " ")

    def ask(self, number: int, question: Question) -> None:
        self.break_paragraph()
        reply = question.answer if self._bare else question.sentence
        block = self._style.format(q=question.text, a="\0")
        at = len(self.text) + block.index("\0") + reply.rindex(question.answer)
        self.text += block.replace("\0", reply)
        self.asked.append(Asked(question, at, self.facts_of(number, question)))

    def facts_of(self, number: int, question: Question) -> tuple[tuple[int, int], ...]:
        return tuple(self.spans[number, i] for i in question.needs)

    def break_paragraph(self) -> None:
        if self.text.strip():
            self.text = self.text.rstrip() + "\n\n"


def _chat(
    rng: Rng, writer: _Writer, late: Sequence[tuple[int, Question]], tokenizer: Tokenizer
) -> RecallDocument | None:
    """The text as the first user turn, questions as turns; None if there is no fitting template."""
    request = pick(rng, REQUESTS) + "\n\n" if rng.random() < 0.7 else ""
    replies = [q.answer if rng.random() < 0.5 else q.sentence for _, q in late]
    body = writer.text.strip()
    messages = []
    for turn, ((_, question), reply) in enumerate(zip(late, replies, strict=True)):
        user = f"{request}{body}\n\n{question.text}" if turn == 0 else question.text
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
    text = tokenizer.chat(messages)
    if text is None:
        return None
    shift = text.find(body)
    at = shift + len(body)
    if shift < 0:  # a template that changes what users say
        return None
    lead = len(writer.text) - len(writer.text.lstrip())

    def moved(span: tuple[int, int]) -> tuple[int, int]:
        return (span[0] + shift - lead, span[1] + shift - lead)

    asked = [
        Asked(a.question, a.at + shift - lead, tuple(map(moved, a.facts))) for a in writer.asked
    ]
    for (number, question), reply in zip(late, replies, strict=True):
        at = text.find(question.text, at) + len(question.text)
        at = text.find(reply, at) + reply.rindex(question.answer)
        facts = tuple(map(moved, writer.facts_of(number, question)))
        asked.append(Asked(question, at, facts))
    return RecallDocument(text.rstrip(), tuple(asked))


def _beginnings(documents: Sequence[Documents]) -> Iterator[str]:
    """The first documents of each source, cut at an equal share of `POOL_CHARS`."""
    for source in documents:
        left = POOL_CHARS // len(documents)
        for _, text in source.read(0, None):
            yield text[:left]
            left -= len(text)
            if left <= 0:
                break


def _sentences(text: str) -> Iterator[str]:
    """Sentences with the blanks that follow them; joined they are the text.

    What has no full stops is cut every `LONGEST_SENTENCE` characters, after a blank if there is one.
    """
    for piece in re.findall(r"\S.*?(?:[.!?][\"')\]]*\s+|\n\s*\n|\Z)", text, flags=re.DOTALL):
        while len(piece) > LONGEST_SENTENCE:
            at = piece.rfind(" ", 1, LONGEST_SENTENCE) + 1 or LONGEST_SENTENCE
            yield piece[:at]
            piece = piece[at:]
        if piece:
            yield piece
