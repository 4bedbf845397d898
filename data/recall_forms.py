"""What made documents state and ask: facts, and questions that only those facts answer.

Every form is a function (rng, words) -> `Scenario`. Facts are single sentences that can stand anywhere in
a text, in any order; a question names the facts that it needs. Names of people and places are drawn per
scenario, so nothing can be known beforehand. The wording is kept unlike the benchmarks that measure the
same skill later. `data.recall` places these in prose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .recall_words import (
    BIRDS,
    GOODS,
    OBJECTS,
    PLACES,
    ROOMS,
    THINGS,
    TREES,
    Rng,
    code,
    enumeration,
    number,
    people,
    pick,
    several,
    with_article,
)


@dataclass(frozen=True)
class Question:
    """A question, its bare answer, a full sentence that holds it, and the facts it needs."""

    text: str
    answer: str
    sentence: str
    """The answer in a sentence; `answer` stands in it as written."""
    needs: tuple[int, ...]
    """Indices into the scenario's facts."""


@dataclass(frozen=True)
class Scenario:
    """Facts that belong together and what is asked of them."""

    form: str
    facts: tuple[str, ...]
    questions: tuple[Question, ...]


def _asked(rng: Rng, count: int) -> list[int]:
    """Which of `count` keys are asked for: at least one, at most four."""
    return [int(i) for i in rng.permutation(count)[: int(rng.integers(1, min(count, 4) + 1))]]


def key_number(rng: Rng, words: Sequence[str]) -> Scenario:
    """Who -> number, with others of the same kind beside it."""
    thing = pick(rng, THINGS)
    count = int(rng.integers(1, 9))
    if rng.random() < 0.5:
        keys = people(rng, count)
        labels = [f"{key}'s {thing}" for key in keys]
    else:
        pairs = several(rng, words, 2 * count)
        labels = [f"the {a}-{b} {thing}" for a, b in zip(pairs[::2], pairs[1::2], strict=True)]
    make = number if rng.random() < 0.7 else code
    values = [make(rng) for _ in labels]
    state = pick(
        rng,
        (
            "Make a note that {k} carries the number {v}.",
            "It was settled that {k} would be listed under {v}.",
            "Whoever needs {k} must ask for {v}.",
            "On the register, {k} is entered as {v}.",
            "{v} is what they stamped on {k}.",
            "For {k} the clerk wrote down {v}.",
        ),
    )
    ask = pick(
        rng,
        (
            "Which number goes with {k}?",
            "Under what number is {k} to be found?",
            "What had been noted down for {k}?",
            "Please give the number that belongs to {k}.",
        ),
    )
    reply = pick(rng, ("The number for {k} is {v}.", "For {k} it was {v}.", "It is {v}."))
    facts = tuple(_capital(state.format(k=k, v=v)) for k, v in zip(labels, values, strict=True))
    questions = tuple(
        Question(
            ask.format(k=labels[i]),
            values[i],
            _capital(reply.format(k=labels[i], v=values[i])),
            (i,),
        )
        for i in _asked(rng, count)
    )
    return Scenario("key_number", facts, questions)


def key_word(rng: Rng, words: Sequence[str]) -> Scenario:
    """Place -> password, or a person -> nickname."""
    count = int(rng.integers(1, 7))
    values = several(rng, words, count)
    if rng.random() < 0.5:
        keys = several(rng, PLACES, count)
        state, ask = (
            pick(
                rng,
                (
                    'At the gate of {k} the watchman will only open to the word "{v}".',
                    'The password agreed on for {k} is "{v}".',
                    'Say "{v}" at {k} and they let you in.',
                ),
            ),
            pick(rng, ("Which password does {k} use?", "What must one say to be let in at {k}?")),
        )
    else:
        keys = people(rng, count)
        state, ask = (
            pick(
                rng,
                (
                    'Among friends {k} is known as "{v}".',
                    '{k} signs every letter with the name "{v}".',
                    'The dog of {k} answers to "{v}".',
                ),
            ),
            "",
        )
        ask = {
            "Among": "By which name do friends know {k}?",
            "{k} si": "With which name does {k} sign?",
            "The do": "To which name does the dog of {k} answer?",
        }[state[:6].strip()]
    facts = tuple(state.format(k=k, v=v) for k, v in zip(keys, values, strict=True))
    questions = tuple(
        Question(ask.format(k=keys[i]), values[i], f'It is "{values[i]}".', (i,))
        for i in _asked(rng, count)
    )
    return Scenario("key_word", facts, questions)


def who_where(rng: Rng, words: Sequence[str]) -> Scenario:
    """Who left what where; asked by person and thing, or by place."""
    count = int(rng.integers(1, 7))
    names, things = people(rng, count), several(rng, OBJECTS, count)
    spots = [f"the {pick(rng, ROOMS)} at {place}" for place in several(rng, PLACES, count)]
    state = pick(
        rng,
        (
            "{n} left the {t} in {s}.",
            "The {t} was hidden by {n} in {s}.",
            "In {s} stands the {t} that {n} forgot.",
        ),
    )
    facts, questions = [], []
    for n, t, s in zip(names, things, spots, strict=True):
        facts.append(state.format(n=n, t=t, s=s))
    for i in _asked(rng, count):
        n, t, s = names[i], things[i], spots[i]
        if rng.random() < 0.6:
            questions.append(Question(f"Where is the {t} of {n} now?", s, f"It is in {s}.", (i,)))
        else:
            questions.append(
                Question(f"Whose {t} can be found in {s}?", n, f"It belongs to {n}.", (i,))
            )
    return Scenario("who_where", tuple(facts), tuple(questions))


def inventory(rng: Rng, words: Sequence[str]) -> Scenario:
    """How many of which goods lie where."""
    places = several(rng, PLACES, int(rng.integers(1, 4)))
    stock = [
        {goods: int(rng.integers(2, 400)) for goods in several(rng, GOODS, int(rng.integers(2, 5)))}
        for _ in places
    ]
    state = pick(
        rng,
        ("The storehouse at {p} holds {g}.", "In {p} they counted {g}.", "{p} has in store {g}."),
    )
    facts = tuple(
        state.format(p=p, g=enumeration([f"{n} {goods}" for goods, n in held.items()]))
        for p, held in zip(places, stock, strict=True)
    )
    questions = []
    for i in _asked(rng, len(places)):
        goods, count = list(stock[i].items())[int(rng.integers(len(stock[i])))]
        questions.append(
            Question(
                f"How many {goods} are there at {places[i]}?",
                str(count),
                f"{places[i]} has {count} {goods}.",
                (i,),
            )
        )
    return Scenario("inventory", facts, tuple(questions))


def pointers(rng: Rng, words: Sequence[str]) -> Scenario:
    """A chain of notes, each naming the next; the last one holds the answer."""
    boxes = [f"the {word} drawer" for word in several(rng, words, int(rng.integers(2, 6)))]
    value = number(rng) if rng.random() < 0.5 else pick(rng, words)
    hop = pick(rng, ("A note in {a} says: look in {b}.", "From {a} an arrow leads to {b}."))
    facts = [hop.format(a=a, b=b) for a, b in zip(boxes, boxes[1:], strict=False)]
    facts.append(f"The paper in {boxes[-1]} reads {value} and nothing else.")
    questions = []
    for start in sorted({0, int(rng.integers(len(boxes)))}):
        questions.append(
            Question(
                f"Starting from {boxes[start]}, what does the last paper read?",
                value,
                f"It leads to {boxes[-1]}, and the paper there reads {value}.",
                tuple(range(start, len(facts))),
            )
        )
    return Scenario("pointers", tuple(facts), tuple(questions))


def assignments(rng: Rng, words: Sequence[str]) -> Scenario:
    """Dials that are set or follow another dial; all that show one value are asked for."""
    dials = several(rng, TREES, int(rng.integers(3, 9)))
    cut = int(rng.integers(2, len(dials)))
    groups = [dials[:cut], dials[cut:]]
    facts: list[str] = []
    questions: list[Question] = []
    for group in groups:
        value, begin = number(rng), len(facts)
        facts.append(f"Dial {group[0]} was turned to {value}.")
        for before, dial in zip(group, group[1:], strict=False):
            facts.append(f"Dial {dial} always follows dial {before}.")
        needs = tuple(range(begin, len(facts)))
        questions.append(
            Question(
                f"Name every dial that shows {value}.",
                enumeration(group),
                f"{value} is shown by {enumeration(group)}.",
                needs,
            )
        )
        last = group[-1]
        questions.append(
            Question(f"What does dial {last} show?", value, f"Dial {last} shows {value}.", needs)
        )
    return Scenario("assignments", tuple(facts), tuple(several(rng, questions, 2)))


def counted(rng: Rng, words: Sequence[str]) -> Scenario:
    """Single sightings to be counted, or compared, at the end."""
    birds = several(rng, BIRDS, int(rng.integers(2, 5)))
    counts = [int(c) for c in rng.permutation(np.arange(1, 8))[: len(birds)]]
    state = pick(rng, ("Seen from the tower: {b}.", "The log adds one more: {b}."))
    sightings = [bird for bird, count in zip(birds, counts, strict=True) for _ in range(count)]
    order = rng.permutation(len(sightings))
    facts = tuple(state.format(b=sightings[int(i)]) for i in order)
    of_bird = {b: tuple(i for i, j in enumerate(order) if sightings[int(j)] == b) for b in birds}
    most = birds[int(np.argmax(counts))]
    i = int(rng.integers(len(birds)))
    ordered = [birds[j] for j in np.argsort(counts)[::-1]]
    choices = (
        Question(
            f"How many times is {with_article(birds[i])} noted?",
            str(counts[i]),
            f"Noted: {counts[i]}.",
            of_bird[birds[i]],
        ),
        Question(
            "Which bird is noted more often than any other?",
            most,
            f"It is the {most}.",
            tuple(range(len(facts))),
        ),
        Question(
            "List the birds noted, the most frequent first.",
            enumeration(ordered),
            f"They are {enumeration(ordered)}.",
            tuple(range(len(facts))),
        ),
    )
    return Scenario("counted", facts, tuple(several(rng, choices, int(rng.integers(1, 3)))))


def quoted(rng: Rng, words: Sequence[str]) -> Scenario:
    """A phrase given once, to be repeated word for word."""
    count = int(rng.integers(1, 4))
    places = several(rng, PLACES, count)
    phrases = [" ".join(several(rng, words, int(rng.integers(4, 10)))) for _ in places]
    state = pick(
        rng,
        (
            'Over the door in {p} is carved: "{q}".',
            'The song they sing at {p} begins "{q}".',
            'Every letter from {p} ends with "{q}".',
        ),
    )
    ask = {
        "Over": "Which words are carved over the door in {p}?",
        "The ": "With which words does the song of {p} begin?",
        "Ever": "With which words do letters from {p} end?",
    }[state[:4]]
    facts = tuple(state.format(p=p, q=q) for p, q in zip(places, phrases, strict=True))
    questions = tuple(
        Question(ask.format(p=places[i]), phrases[i], f'The words are "{phrases[i]}".', (i,))
        for i in _asked(rng, count)
    )
    return Scenario("quoted", facts, questions)


def gathered(rng: Rng, words: Sequence[str]) -> Scenario:
    """Several facts about one person in different places, asked for together."""
    buyers = people(rng, int(rng.integers(1, 4)))
    things = several(rng, OBJECTS, 12)
    state = pick(rng, ("{n} bought {t}.", "To {n} they sent {t}.", "{n} came home with {t}."))
    ask = {"{n} b": "What did {n} buy?", "To {n": "What did they send to {n}?"}.get(
        state[:5], "What did {n} come home with?"
    )
    facts: list[str] = []
    questions: list[Question] = []
    for place, buyer in enumerate(buyers):
        mine = things[4 * place : 4 * place + int(rng.integers(2, 5))]
        needs = tuple(range(len(facts), len(facts) + len(mine)))
        facts += [state.format(n=buyer, t=with_article(t)) for t in mine]
        answer = enumeration([with_article(t) for t in mine])
        questions.append(Question(ask.format(n=buyer), answer, f"It was {answer}.", needs))
    return Scenario("gathered", tuple(facts), tuple(questions))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


FORMS: dict[str, Callable[[Rng, Sequence[str]], Scenario]] = {
    form.__name__: form
    for form in (
        key_number,
        key_word,
        who_where,
        inventory,
        pointers,
        assignments,
        counted,
        quoted,
        gathered,
    )
}
SHARES = {"key_number": 4.0, "key_word": 2.0, "who_where": 2.0, "gathered": 2.0}
"""How often a form is drawn; 1.0 where not named. Plain look-ups are what selection has to learn."""
