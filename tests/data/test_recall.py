"""Made recall documents: answers can be found, stand after their facts, and sound like no benchmark."""

from __future__ import annotations

import re

import numpy as np
import pytest

from dense2sparse.data.documents import open_documents
from dense2sparse.data.recall import Filler, RecallStream, make_document, make_tokens
from dense2sparse.data.recall_forms import FORMS
from dense2sparse.data.stream import Tokenizer

ROW = 700
BENCHMARK_WORDING = (
    r"special magic",
    r"magic (number|word|uuid)",
    r"provided (text|context)",
    r"\bVAR\b",
    r"variables? (that )?(are |is )?assigned",
    r"most common words",
    r"coded (text|words)",
    r"memoriz",
    r"quiz you",
    r"grass is green",
    r"eat a sandwich",
    r"hidden within",
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tokenizer, source, write_prose):
    folder = tmp_path_factory.mktemp("prose")
    (folder / "a.txt").write_text(write_prose(200, seed=1))
    wrapped = Tokenizer(tokenizer)
    documents = [open_documents(source(path=str(folder)), folder)]
    return documents, wrapped, Filler(documents, wrapped)


@pytest.fixture(scope="module")
def documents(parts):
    _, wrapped, filler = parts
    return [make_document([0, 1, n], filler, wrapped, ROW) for n in range(80)]


def test_every_answer_stands_in_the_text_after_all_facts_it_needs(documents):
    assert sum(len(document.asked) for document in documents) > len(documents)
    for document in documents:
        assert document.asked
        for asked in document.asked:
            answer = asked.question.answer
            assert document.text[asked.at : asked.at + len(answer)] == answer
            assert asked.question.text in document.text[: asked.at]
            assert all(end <= asked.at for _, end in asked.facts)


def test_single_facts_hold_their_answer_word_for_word(documents):
    seen = set()
    for document in documents:
        for asked in document.asked:
            facts = [document.text[begin:end] for begin, end in asked.facts]
            assert all(fact.endswith(".") for fact in facts)
            if len(facts) == 1 and re.search(
                r"number|noted down|password|Where is", asked.question.text
            ):
                assert asked.question.answer in facts[0]
                seen.add(asked.question.text.split()[0])
    assert len(seen) >= 3


def test_distances_reach_over_most_of_a_row(documents):
    shares = [
        (asked.at - min(begin for begin, _ in asked.facts)) / len(document.text)
        for document in documents
        for asked in document.asked
    ]
    assert min(shares) < 0.2 and max(shares) > 0.85


def follow(dial: str, text: str) -> str:
    """What a dial shows, read from the text alone."""
    while (before := re.search(rf"Dial {dial} always follows dial (\w+)\.", text)) is not None:
        dial = before[1]
    return re.search(rf"Dial {dial} was turned to (\d+)\.", text)[1]


def test_chains_and_counts_are_true(parts):
    words = parts[2].words
    for seed in range(40):
        rng = np.random.default_rng(seed)
        dials = FORMS["assignments"](rng, words)
        for question in dials.questions:
            text = " ".join(dials.facts)
            if dial := re.match(r"What does dial (\w+)", question.text):
                assert follow(dial[1], text) == question.answer
            else:
                value = re.search(r"\d+", question.text)[0]
                names = re.findall(r"\w+", question.answer.replace(" and ", " "))
                every = set(re.findall(r"Dial (\w+) ", text))
                assert {d for d in every if follow(d, text) == value} == set(names)
        noted = FORMS["counted"](rng, words)
        birds = [re.search(r": (\w+)\.$", fact)[1] for fact in noted.facts]
        by_count = sorted(set(birds), key=birds.count, reverse=True)
        for question in noted.questions:
            if asked := re.match(r"How many times is an? (\w+) noted", question.text):
                assert birds.count(asked[1]) == int(question.answer)
            elif question.text.startswith("Which"):
                assert question.answer == by_count[0]
            else:
                assert re.findall(r"\w+", question.answer.replace(" and ", " ")) == by_count
        chain = FORMS["pointers"](rng, words)
        for question in chain.questions:
            at = re.search(r"the (\w+) drawer", question.text)[1]
            for _ in range(9):
                step = re.search(
                    rf"(?:in|From) the {at} drawer (?:says: look in|an arrow leads to) the (\w+)",
                    " ".join(chain.facts),
                )
                at = step[1] if step else at
            assert f"in the {at} drawer reads {question.answer} and" in chain.facts[-1]


def test_wording_is_unlike_the_benchmarks(documents):
    for document in documents:
        for pattern in BENCHMARK_WORDING:
            assert not re.search(pattern, document.text, re.IGNORECASE), pattern


def test_forms_and_layouts_all_occur(documents, parts):
    text = "\n".join(document.text for document in documents)
    for sign in ("dial", "drawer", "password", "noted", "number", "Where is", "How many"):
        assert sign in text, sign
    assert "<|user|>" in text and "Question:" in text and "Assistant:" in text
    for form in FORMS.values():
        for seed in range(30):
            scenario = form(np.random.default_rng(seed), parts[2].words)
            for question in scenario.questions:
                assert question.answer in question.sentence
                assert question.needs and max(question.needs) < len(scenario.facts)


def test_documents_fit_a_row_and_most_fill_it(parts):
    _, wrapped, filler = parts
    lengths = [len(make_tokens([0, 1, n], filler, wrapped, ROW)) for n in range(80)]
    assert max(lengths) <= ROW
    assert np.mean([length >= 0.93 * ROW for length in lengths]) > 0.65


def test_a_document_depends_on_its_key_alone(parts, tokenizer):
    documents, wrapped, filler = parts
    straight = RecallStream("made", documents, wrapped, ROW, seed=2)
    first = [straight.take(ROW) for _ in range(5)]
    resumed = RecallStream("made", documents, wrapped, ROW, seed=2)
    resumed.load_state_dict({"number": 3})
    assert np.array_equal(resumed.take(ROW), first[3])
    assert resumed.state_dict() == {"number": 4}
    other = RecallStream("made", documents, wrapped, ROW, seed=3)
    renamed = RecallStream("named", documents, wrapped, ROW, seed=2)
    for stream in (other, renamed):
        assert not np.array_equal(stream.take(ROW), first[0])


def test_each_document_ends_once(parts, tokenizer):
    _, wrapped, filler = parts
    for number in range(20):
        ids = make_tokens([1, number], filler, wrapped, ROW).tolist()
        assert ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[:-1]


def test_text_without_full_stops_still_gives_room_for_distance(parts, source, tmp_path):
    _, wrapped, _ = parts
    (tmp_path / "a.txt").write_text("harbour winter letter garden silence " * 4000)
    filler = Filler([open_documents(source(path=str(tmp_path)), tmp_path)], wrapped)
    assert max(map(len, filler.sentences)) <= 600
    assert len(make_tokens([1], filler, wrapped, ROW)) > 100


def test_a_source_without_text_is_refused(source, tmp_path, parts):
    (tmp_path / "a.txt").write_text("\n")
    empty = [open_documents(source(path=str(tmp_path)), tmp_path)]
    with pytest.raises(ValueError, match="found no prose in the other sources"):
        Filler(empty, parts[1])
