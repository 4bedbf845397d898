"""Predictions: greedy answers, shares of ranks, resume, whose predictions a folder holds, merging."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from dense2sparse.eval.arms import ArmRun
from dense2sparse.eval.generate import FOUND, MEASURED, answer, end_tokens, generate
from dense2sparse.eval.models import attending
from dense2sparse.eval.predict import claim, merge, predict, share
from dense2sparse.eval.records import (
    Journal,
    journal_path,
    read_journals,
    read_lines,
    read_predictions,
)
from dense2sparse.eval.score import score_of
from dense2sparse.kernels import ops
from dense2sparse.model import convert
from dense2sparse.model.execution import Dispatch


@pytest.fixture(scope="module")
def tiny_model(answering):
    return answering.lively_model()


@pytest.fixture(scope="module")
def short(answering, tokenizer, ruler_like_words):
    """Prompts with a budget of three tokens, so that a tiny model answers in no time."""
    return answering.prompts(tokenizer, ruler_like_words.nouns, 6)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_model, tokenizer, short):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert predict(tiny_model, tokenizer, short, folder) == len(short)
    return comparable(folder)


@pytest.fixture(scope="module")
def converted(answering, tmp_path_factory, tiny_model, tokenizer):
    """A converted model, random index branch, 16 tokens a block."""
    home = answering.build_home(tmp_path_factory.mktemp("converted"), tiny_model, tokenizer)
    return convert.load(home / "converted", dtype=torch.float32, mode="dense").eval()


def comparable(folder):
    """Records by id, without what differs from run to run."""
    return {
        name: {key: value for key, value in record.items() if key not in MEASURED}
        for name, record in read_journals(folder).items()
    }


def test_prompts_read_in_chunks_get_the_same_answers(
    tmp_path, tiny_model, tokenizer, short, undisturbed, monkeypatch
):
    lengths = []
    forward = tiny_model.forward

    def watched(*args, **kwargs):
        lengths.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(tiny_model, "forward", watched)
    predict(tiny_model, tokenizer, short, tmp_path, prefill_chunk=100)
    assert max(lengths) == 100
    assert comparable(tmp_path) == undisturbed


def test_generation_equals_greedy_search_by_hand(tiny_model, tokenizer, short):
    sample = short[0]
    ids = torch.tensor([tokenizer(sample.prompt)["input_ids"]])
    made = []
    with torch.no_grad():
        for _ in range(sample.new_tokens):
            made.append(int(tiny_model(ids).logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([[made[-1]]])], dim=1)
    record = answer(tiny_model, tokenizer, sample)
    assert record["prediction"] == tokenizer.decode(made, skip_special_tokens=True)
    assert record["stopped"] == "budget" and record["new_tokens"] == 3


def test_torn_last_line_is_dropped_and_its_sample_answered_again(
    tmp_path, tiny_model, tokenizer, short, undisturbed
):
    predict(tiny_model, tokenizer, short, tmp_path)
    path = journal_path(tmp_path, 0, 1)
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    for cut in (len(lines[-1]) // 2, 1, len(lines[-1]) + 5):
        path.write_bytes(content[:-cut])
        predict(tiny_model, tokenizer, short, tmp_path)
        assert comparable(tmp_path) == undisturbed
        assert path.read_bytes().count(b"\n") == len(short)


def test_damaged_line_in_the_middle_is_refused(tmp_path, tiny_model, tokenizer, short):
    predict(tiny_model, tokenizer, short[:3], tmp_path)
    path = journal_path(tmp_path, 0, 1)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:20] + b"\n" + lines[2])
    with pytest.raises(ValueError, match="line 2, is damaged"):
        predict(tiny_model, tokenizer, short, tmp_path)


@pytest.mark.parametrize("before", [1, 3])
def test_ranks_share_the_prompts_and_may_change_in_number(
    tmp_path, tiny_model, tokenizer, short, undisturbed, before
):
    # The first run is one of `before` ranks and finishes only rank 0's share.
    predict(tiny_model, tokenizer, short[:4], tmp_path, rank=0, world_size=before)
    met = {"answered": frozenset(read_journals(tmp_path)), "world_size": 2}
    made = [predict(tiny_model, tokenizer, short, tmp_path, rank=rank, **met) for rank in (0, 1)]
    assert abs(made[0] - made[1]) <= 1
    assert comparable(tmp_path) == undisturbed
    assert sum(made) == len(short) - (4 if before == 1 else 2)


def test_stop_when_all_is_found_cannot_change_a_score(tiny_model, tokenizer, short):
    sample = replace(short[0], new_tokens=12)
    whole = answer(tiny_model, tokenizer, replace(sample, references=["\x00 never said"]))
    said = whole["prediction"].split()[0]
    stopped = answer(tiny_model, tokenizer, replace(sample, references=[said]))
    assert stopped["stopped"] == FOUND
    assert stopped["new_tokens"] < whole["new_tokens"] == 12
    assert whole["prediction"].startswith(stopped["prediction"])
    assert score_of(stopped) == score_of({**whole, "references": [said]}) == 100.0


def test_every_end_token_ends_an_answer(tiny_model, tokenizer, short):
    first = answer(tiny_model, tokenizer, short[0])
    with torch.no_grad():
        ids = torch.tensor([tokenizer(short[0].prompt)["input_ids"]])
        spoken = int(tiny_model(ids).logits[0, -1].argmax())
    before = tiny_model.generation_config.eos_token_id
    tiny_model.generation_config.eos_token_id = [5, spoken]
    try:
        assert {1, 5, spoken} <= set(end_tokens(tiny_model, tokenizer))
        ended = answer(tiny_model, tokenizer, short[0])
    finally:
        tiny_model.generation_config.eos_token_id = before
    assert (first["stopped"], ended["stopped"]) == ("budget", "end token")
    assert ended["new_tokens"] == 1


def test_prompt_of_another_length_is_refused(tiny_model, tokenizer, short):
    with pytest.raises(ValueError, match="prepare the prompts again"):
        answer(tiny_model, tokenizer, replace(short[0], num_tokens=5))


def test_progress_tells_the_time_left(tmp_path, tiny_model, tokenizer, short):
    said = []
    predict(tiny_model, tokenizer, short, tmp_path, progress=said.append, every_s=0.0)
    assert f" {len(short)}/{len(short)} prompts, " in said[-1] and said[-1].endswith(" 0 s left")
    assert [line.split()[0].count("\N{FULL BLOCK}") for line in said] == [3, 6, 10, 13, 16, 20]


def test_reader_never_touches_another_rank_s_file(tmp_path):
    with Journal(journal_path(tmp_path, 0, 2)) as journal:
        journal.append({"id": "a"})
    other = journal_path(tmp_path, 1, 2)
    other.write_bytes(b'{"id": "b"}\n{"id": "c"')
    assert list(read_journals(tmp_path)) == ["a", "b"]
    assert other.read_bytes().endswith(b'{"id": "c"')


def test_a_kill_at_any_byte_costs_at_most_the_last_record(tmp_path):
    path = tmp_path / "rank-0-of-1.jsonl"
    records = [{"id": str(place), "text": "é\u2028" * place} for place in range(4)]
    with Journal(path) as journal:
        for record in records:
            journal.append(record)
    content = path.read_bytes()
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        whole = content[:cut].count(b"\n")
        with Journal(path) as journal:
            assert journal.records == records[:whole]
            for record in records[whole:]:
                journal.append(record)
        assert path.read_bytes() == content


def test_a_journal_has_one_writer(tmp_path):
    path = journal_path(tmp_path, 0, 1)
    with Journal(path) as journal:
        journal.append({"id": "a"})
        with pytest.raises(
            ValueError, match="another evaluation is writing to .*rank-0-of-1.jsonl"
        ):
            Journal(path)
        journal.append({"id": "b"})
    with Journal(path) as journal:
        assert [record["id"] for record in journal.records] == ["a", "b"]


def test_line_separators_inside_text_stay_one_record(tmp_path):
    text = "a\u2028b\x85c\rd\ne"
    with Journal(tmp_path / "rank-0-of-1.jsonl") as journal:
        journal.append({"id": "a", "text": text})
    assert read_lines(journal.path) == [{"id": "a", "text": text}]
    assert json.loads(journal.path.read_text(encoding="utf-8").strip("\n"))["text"] == text


def test_answers_equal_those_of_transformers_generate(tiny_model, tokenizer, short):
    for sample in short[:2]:
        ids = tokenizer(sample.prompt)["input_ids"]
        given = torch.tensor([ids])
        theirs = tiny_model.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            max_new_tokens=9,
            pad_token_id=0,
        )
        made = generate(tiny_model, ids, new_tokens=9, ends=end_tokens(tiny_model, tokenizer))
        assert made.ids == theirs[0, len(ids) :].tolist()


def test_logits_are_made_for_the_last_position_only(tiny_model, monkeypatch):
    shapes = []
    hook = tiny_model.lm_head.register_forward_hook(
        lambda module, inputs, output: shapes.append(output.shape[1])
    )
    generate(tiny_model, list(range(2, 52)), new_tokens=3, prefill_chunk=20)
    hook.remove()
    assert shapes == [1] * 5, "three chunks and two steps"


def test_stop_token_ends_an_answer_but_never_begins_it(tiny_model, tokenizer, short):
    free = answer(tiny_model, tokenizer, replace(short[0], new_tokens=6))
    first = free["new_ids"][0]
    sample = replace(short[0], new_tokens=6, stop_ids=[first], benchmark="longbench")
    held = answer(tiny_model, tokenizer, sample)
    assert held["new_ids"][0] != first
    later = next((one for one in held["new_ids"][1:] if one != held["new_ids"][0]), None)
    assert later is not None, "the tiny model repeats itself: take another prompt"
    sample = replace(sample, stop_ids=[first, later])
    ended = answer(tiny_model, tokenizer, sample)
    assert ended["stopped"] == "end token"
    assert ended["new_ids"] == held["new_ids"][: held["new_ids"].index(later) + 1]


def test_other_benchmarks_are_not_cut_short_by_a_reference(tiny_model, tokenizer, short):
    sample = replace(short[0], new_tokens=6)
    said = answer(tiny_model, tokenizer, sample)["prediction"][:2]
    found = answer(tiny_model, tokenizer, replace(sample, references=[said]))
    whole = answer(tiny_model, tokenizer, replace(sample, references=[said], benchmark="longbench"))
    assert (found["stopped"], whole["stopped"]) == (FOUND, "budget")


def test_prompt_above_the_window_is_refused_not_cut(tiny_model, tokenizer, short):
    sample = replace(short[0], new_tokens=2048 - short[0].num_tokens + 1)
    with pytest.raises(ValueError, match="needs 2049 tokens with its answer, above the model's wi"):
        answer(tiny_model, tokenizer, sample)


def test_longest_prompts_come_first_over_all_ranks(short):
    shares = [share(short, rank, 2) for rank in (0, 1)]
    together = [one for pair in zip(*shares, strict=True) for one in pair]
    assert [one.num_tokens for one in together] == sorted(
        (one.num_tokens for one in short), reverse=True
    )


def test_ranks_that_met_before_miss_no_prompt_when_one_is_far_ahead(
    tmp_path, tiny_model, tokenizer, short
):
    """Rank 1 starts when rank 0 is done: what rank 0 has answered since must not move its share."""
    met = {"answered": frozenset(), "world_size": 2}
    for rank in (0, 1):
        predict(tiny_model, tokenizer, short, tmp_path, rank=rank, **met)
    assert read_journals(tmp_path).keys() == {one.id for one in short}


def test_folder_of_another_checkpoint_is_refused(tmp_path):
    identity = {"arm": "converted_sparse", "top_k": 4, "checkpoint": "a" * 64, "precision": "fp32"}
    claim(tmp_path, identity)
    claim(tmp_path, identity, write=False)
    with pytest.raises(
        ValueError, match="of another checkpoint .aaaaaaaaaaaa…, now bbbbbbbbbbbb…."
    ):
        claim(tmp_path, {**identity, "checkpoint": "b" * 64})
    (tmp_path / "arm.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is damaged"):
        claim(tmp_path, identity)
    (tmp_path / "arm.json").unlink()
    journal_path(tmp_path, 0, 1).write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="no arm.json that says of which checkpoint"):
        claim(tmp_path, identity)


def test_merged_file_is_sorted_and_has_no_times(tmp_path, tiny_model, tokenizer, short):
    with pytest.raises(ValueError, match="6 of 6 prompts have no prediction"):
        merge(tmp_path, short, tmp_path / "stage")
    predict(tiny_model, tokenizer, short, tmp_path)
    merged = merge(tmp_path, short[:5], tmp_path / "stage")
    assert list(merged) == sorted(one.id for one in short[:5])
    for record in merged.values():
        assert not set(MEASURED) & set(record) and "prompt" not in record
    assert read_predictions(tmp_path / "stage") == merged


def test_before_training_and_at_full_budget_all_arms_say_the_same_tokens(
    tiny_model, converted, tokenizer, short, monkeypatch
):
    """A = B; C and D with all blocks = B, through selection: the shortcut to dense attention is off."""
    monkeypatch.setattr(Dispatch, "runs_dense", lambda *args, **kwargs: False)
    used = []
    for name in ("select_blocks", "select_by_mass", "sparse_attention", "sparse_decode"):
        operation = getattr(ops, name)
        monkeypatch.setattr(
            ops,
            name,
            lambda *args, name=name, to=operation, **kw: used.append(name) or to(*args, **kw),
        )
    blocks = -(-max(one.num_tokens + 8 for one in short) // 16)
    for sample in (replace(one, new_tokens=8) for one in short):
        said = {"A": answer(tiny_model, tokenizer, sample)["new_ids"]}
        for letter, run in (
            ("B", ArmRun("converted_dense")),
            ("C", ArmRun("converted_sparse", blocks)),
            ("D", ArmRun("converted_oracle", blocks)),
        ):
            with attending(converted, run):
                said[letter] = answer(converted, tokenizer, sample, run=run)["new_ids"]
        assert said["A"] == said["B"] == said["C"] == said["D"]
    assert set(used) == {"select_blocks", "select_by_mass", "sparse_attention", "sparse_decode"}


def test_small_budget_does_change_what_is_said(converted, tokenizer, short):
    """So that the test above can fail: two blocks of sixteen give other tokens."""
    said = []
    for run in (ArmRun("converted_dense"), ArmRun("converted_sparse", 2)):
        with attending(converted, run):
            said.append(
                [
                    answer(converted, tokenizer, replace(one, new_tokens=8))["new_ids"]
                    for one in short
                ]
            )
    assert said[0] != said[1]
