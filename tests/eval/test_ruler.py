"""RULER prompts: size, spans, modes, determinism, score, refusals."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dense2sparse.eval.ruler import (
    DoesNotFit,
    Generator,
    check_corpus,
    check_lengths,
    check_tasks,
    encode,
)
from dense2sparse.eval.ruler_lists import CommonWords
from dense2sparse.eval.ruler_material import Dice, Haystack, Material, PairList
from dense2sparse.eval.ruler_score import final_answer, hits, score, score_record, settled
from dense2sparse.eval.ruler_sizing import largest
from dense2sparse.eval.ruler_tasks import TASKS

SEARCHING = [name for name in TASKS if name not in ("cwe", "fwe")]


@pytest.fixture(scope="module")
def generator(ruler_corpus, tokenizer):
    return Generator(ruler_corpus, tokenizer)


def one(generator, task, length, seed=42, index=0):
    return next(generator.samples(task, length, seed, index + 1, index))


def record(sample, prediction):
    return {**sample.record(), "prediction": prediction}


@pytest.mark.parametrize("task", TASKS)
def test_an_oracle_scores_100_and_an_empty_answer_0(generator, task):
    for sample in generator.samples(task, 2048, 42, 2):
        everything = ", ".join(sample.references).upper()
        assert score_record(record(sample, everything)) == 100.0
        assert score_record(record(sample, "")) == 0.0
        part = score_record(record(sample, sample.references[0]))
        # One of several references is enough for a question, and for nothing else.
        wanted = 100.0 if task.startswith("qa") else 100.0 / len(sample.references)
        assert part == pytest.approx(wanted)


@given(
    task=st.sampled_from(list(TASKS)),
    length=st.integers(1024, 6000),
    index=st.integers(0, 400),
    seed=st.integers(0, 5),
)
@settings(max_examples=40, deadline=None)
def test_prompt_and_generation_fill_the_length_and_never_exceed_it(
    ruler_corpus, tokenizer, task, length, index, seed
):
    try:
        sample = one(Generator(ruler_corpus, tokenizer), task, length, seed, index)
    except DoesNotFit:
        assert task == "cwe" and length < 1700, "only the word list may be too long"
        return
    ids = encode(tokenizer, sample.prompt, chat=False)
    assert len(ids) == sample.num_tokens
    assert sample.num_tokens + sample.new_tokens <= length
    # One more unit (a document, a line with two long ids, a list entry) would not fit, or 1/200 is left.
    assert sample.num_tokens + sample.new_tokens > length - max(200, length / 100)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("task", SEARCHING)
def test_spans_hold_the_needles(ruler_corpus, tokenizer, chat_tokenizer, task, chat):
    chosen = chat_tokenizer if chat else tokenizer
    sample = one(Generator(ruler_corpus, chosen), task, 2048, index=1)
    ids = encode(chosen, sample.prompt, chat=chat)
    shown = [chosen.decode(ids[first:last]) for first, last in sample.spans]
    if task == "vt":
        assert len(shown) == 5 and all(text.strip().startswith("VAR ") for text in shown)
        assert all(any(name in text for text in shown) for name in sample.references)
    elif task.startswith("qa"):
        assert len(shown) == 1 and sample.references[0] in shown[0]
        assert shown[0].strip().startswith("The fact of")
    else:
        assert len(shown) == TASKS[task].num_queries * TASKS[task].num_values
        assert all(text.strip().startswith("One of the secret") for text in shown)
        assert all(any(value in text for text in shown) for value in sample.references)
        others = [chosen.decode(ids[first:last]) for first, last in sample.decoys]
        assert len(others) == TASKS[task].num_keys * TASKS[task].num_values - len(shown)
        assert all("One of the secret" in text for text in others)
        assert not any(value in text for text in others for value in sample.references)


def test_counting_tasks_have_no_spans(generator):
    assert [one(generator, task, 2048).spans for task in ("cwe", "fwe")] == [[], []]


def test_number_of_references_is_the_published_one(generator):
    wanted = {"niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3}
    for task in TASKS:
        if not task.startswith("qa"):
            assert len(one(generator, task, 2048).references) == wanted.get(task, 1), task


def test_frequent_words_answer_is_the_three_most_frequent(generator):
    sample = one(generator, "fwe", 2048)
    words = sample.prompt.split()
    coded = {word: words.count(word) for word in set(words) if len(word) == 6 and word.isalpha()}
    counts = sorted((coded[word] for word in sample.references), reverse=True)
    others = [count for word, count in coded.items() if word not in sample.references]
    assert counts == sorted(set(counts), reverse=True)
    assert min(counts) > max(others)


def test_common_words_answer_is_the_ten_most_common_behind_a_worked_example(generator):
    sample = one(generator, "cwe", 2048)
    assert sample.prompt.count("A list of words.") == 2
    listed = sample.prompt.rsplit("A list of words.", 1)[1].split()
    assert all(listed.count(word) == 6 for word in sample.references)


def test_common_words_beyond_the_list_need_a_longer_list(ruler_corpus):
    size = len(Material(ruler_corpus, None, len).list_words) + 1
    with pytest.raises(DoesNotFit, match="longer word list"):
        CommonWords().draft(Dice(0), size, 8192, 0, Material(ruler_corpus, None, len))
    more = replace(ruler_corpus, more_words=tuple(f"word{n}" for n in range(2 * size)))
    draft = CommonWords().draft(Dice(0), size, 8192, 0, Material(more, None, len))
    assert all(word.startswith("word") for word in draft.references)


def test_question_stands_with_its_document_and_documents_are_all_different(generator):
    sample = one(generator, "qa_1", 1024, index=3)
    assert sample.prompt.count("The fact of ") == len(set(sample.prompt.split("Text ")[1:]))
    assert sample.references[0] in sample.prompt


def test_question_of_ten_documents_keeps_those_it_rests_on_where_ten_do_not_fit(
    ruler_corpus, tokenizer
):
    questions = ruler_corpus.questions["qa_1"]
    asked = replace(
        questions.items[0],
        documents=tuple(range(1, 60)),
        related=(),
        evidence=((40, 0, 9), (50, 0, 9)),
    )
    few = replace(ruler_corpus, questions={"qa_2": replace(questions, items=(asked,))})
    sample = one(Generator(few, tokenizer), "qa_2", 600)
    assert 2 <= sample.prompt.count("Text ") < 59
    assert questions.documents[40] in sample.prompt and questions.documents[50] in sample.prompt


def test_same_name_same_prompt_other_name_other_prompt(generator):
    sample = one(generator, "niah_single_2", 1024, 42, 5)
    assert sample == one(generator, "niah_single_2", 1024, 42, 5)
    for seed, index in ((43, 5), (42, 6)):
        assert sample.prompt != one(generator, "niah_single_2", 1024, seed, index).prompt


def test_native_samples_depend_neither_on_order_nor_on_the_other_tasks(
    generator, ruler_corpus, tokenizer
):
    names = ["vt", "niah_multikey_2", "qa_1", "fwe"]
    alone = {name: list(generator.samples(name, 1024, 7, 3)) for name in names}
    fresh = Generator(ruler_corpus, tokenizer)
    for name in reversed(names):
        assert [one(fresh, name, 1024, 7, index) for index in (2, 1, 0)] == alone[name][::-1]


def test_needles_of_one_prompt_are_all_different(generator):
    for index in range(5):
        sample = one(generator, "niah_multikey_2", 3000, index=index)
        lines = sample.prompt.split("\n")
        keys = [line.split(" for ")[1].split(" is")[0] for line in lines if "One of" in line]
        assert len(keys) > 20 and len(keys) == len(set(keys))


def test_chat_template_counts_inside_the_length(ruler_corpus, chat_tokenizer):
    sample = one(Generator(ruler_corpus, chat_tokenizer), "vt", 1024)
    assert sample.chat and sample.mode == "chat"
    assert "<|assistant|>\nAnswer:" in sample.prompt
    ids = encode(chat_tokenizer, sample.prompt, chat=True)
    assert len(ids) == sample.num_tokens <= 1024 - 30


def test_reasoning_has_no_prefix_and_an_eighth_of_the_length(ruler_corpus, chat_tokenizer):
    sample = one(Generator(ruler_corpus, chat_tokenizer, mode="reasoning"), "niah_single_1", 2048)
    assert sample.prompt.endswith("<|assistant|>\n") and sample.new_tokens == 256
    assert 2048 - 40 < sample.num_tokens + sample.new_tokens <= 2048
    asked = Generator(ruler_corpus, chat_tokenizer, mode="reasoning", reasoning_tokens=700)
    assert one(asked, "niah_single_1", 2048).new_tokens == 700
    with pytest.raises(DoesNotFit, match="2048 are given"):
        tight = Generator(ruler_corpus, chat_tokenizer, mode="reasoning", reasoning_tokens=2040)
        one(tight, "niah_single_1", 2048)


def test_chat_template_that_opens_a_thought_is_refused_with_an_answer_prefix(
    ruler_corpus, chat_tokenizer
):
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace(
        "<|assistant|>\n", "<|assistant|>\n<think>\n"
    )
    with pytest.raises(ValueError, match="set `mode: reasoning`"):
        one(Generator(ruler_corpus, chat_tokenizer), "fwe", 1024)
    assert one(Generator(ruler_corpus, chat_tokenizer, mode="reasoning"), "fwe", 1024)


@pytest.mark.parametrize(
    ("mode", "words"), [("chat", "needs a tokenizer"), ("chatty", "not known")]
)
def test_mode_that_the_tokenizer_does_not_have_is_refused(ruler_corpus, tokenizer, mode, words):
    with pytest.raises(ValueError, match=words):
        Generator(ruler_corpus, tokenizer, mode=mode)


@pytest.mark.parametrize(
    ("text", "answer"),
    [("<think>7</think> 8", " 8"), ("7</think>8", "8"), ("<think>7", ""), ("7", "")],
)
def test_only_what_follows_a_thought_is_an_answer(text, answer):
    assert final_answer(text, "reasoning") == answer
    assert final_answer(text, "chat") == text


@pytest.mark.parametrize(
    ("prediction", "references", "metric", "wanted"),
    [
        ("It is PARIS.", ["Paris", "city of light"], "part", 100.0),
        ("It is PARIS.", ["Paris", "city of light"], "all", 50.0),
        ("12\x0034", ["1234"], "all", 0.0),
        ("  12 and 34 ", ["12", "34", "56", "78"], "all", 50.0),
        ("nothing", ["Paris", "Lyon"], "part", 0.0),
    ],
)
def test_score_is_the_published_substring_match(prediction, references, metric, wanted):
    assert score(hits(prediction, references), metric) == wanted
    assert settled(prediction, references, metric, "base") == (wanted == 100.0)
    assert not settled(prediction, references, metric, "reasoning")


def test_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="metric='most' is not known"):
        score([True], "most")


def test_task_that_cannot_fit_says_how_much_it_needs(generator):
    with pytest.raises(
        DoesNotFit, match=r"cwe needs \d+ tokens in its smallest form, 512 are given"
    ):
        one(generator, "cwe", 512)


def test_unknown_task_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'niah_single_1'"):
        check_tasks(["niah_singel_1"])


def test_no_task_means_all_thirteen():
    assert check_tasks([]) == list(TASKS) and len(TASKS) == 13


@pytest.mark.parametrize(
    ("lengths", "words"), [([8192], "above the model's window of 4096"), ([100], "short")]
)
def test_length_outside_the_window_is_refused(lengths, words):
    with pytest.raises(ValueError, match=words):
        check_lengths(lengths, 4096)


@pytest.mark.parametrize(
    ("named", "corpus", "parity", "words"),
    [
        (["qa_1"], "ruler-pd", "native", "set `corpus: nvidia`"),
        ([], "ruler-pd", "nvidia", "set `corpus: nvidia`"),
        ([], "nvidia", "exact", "use native or nvidia"),
    ],
)
def test_corpus_that_cannot_give_what_is_asked_is_refused(named, corpus, parity, words):
    with pytest.raises(ValueError, match=words):
        check_corpus(named, corpus, parity)
    check_corpus([], "ruler-pd", "native")


def test_question_task_without_questions_is_left_out_with_the_reason(ruler_corpus, tokenizer):
    plain = replace(ruler_corpus, name="ruler-pd", questions={})
    with pytest.raises(DoesNotFit, match="qa_2 needs questions .* set `corpus: nvidia`"):
        one(Generator(plain, tokenizer), "qa_2", 4096)


def test_tokenizer_without_offsets_is_refused(ruler_corpus):
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="fast tokenizer"):
        Generator(ruler_corpus, Slow())


def test_short_haystack_is_refused():
    with pytest.raises(ValueError, match="at least 1000"):
        Haystack({"little": "too few words"})


def test_haystack_repeats_where_it_ends(works):
    haystack = Haystack(works)
    text = " ".join(haystack.sentences(9000, Dice(3))).split()
    assert len(text) == 9000 and text[:1000] == text[4000:5000]


def test_keys_stand_in_alphabetical_order_also_where_one_adjective_begins_another():
    adjectives = ["old", "old-fashioned", "older", "big", "old-f"]
    nouns = ["hat", "fan", "guard", "fashioned-hat"]
    made = PairList(adjectives, nouns)
    wanted = sorted({f"{adjective}-{noun}" for adjective in adjectives for noun in nouns})
    assert [made[place] for place in range(len(made))] == wanted


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
