"""Stored prompts and predictions: checks on use, resume after a kill, sharding, stops."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dense2sparse.eval import prepare as prepare_module
from dense2sparse.eval.generate import AllFound, answer, end_tokens, greedy, predict
from dense2sparse.eval.prepare import load, prepare
from dense2sparse.eval.records import Journal, journal_path, read_journals, read_lines

TASKS = ["niah_single_1", "niah_multikey_1"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory, ruler_like_words, works, tokenizer):
    folder = tmp_path_factory.mktemp("prompts")
    return make(folder, ruler_like_words, works, tokenizer)


def make(folder, words, works, tokenizer, **changes):
    given = {"tasks": TASKS, "lengths": [512], "samples": 3, "seed": 1, **changes}
    return prepare(folder, tokenizer=tokenizer, words=words, works=works, **given)


@pytest.fixture(scope="module")
def short(prompts):
    """The same prompts with a budget of three tokens, so that a tiny model answers in no time."""
    return [replace(sample, new_tokens=3) for sample in prompts.samples]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_model, tokenizer, short):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert predict(tiny_model, tokenizer, short, folder) == len(short)
    return comparable(folder)


def comparable(folder):
    """Records by id, without the seconds."""
    return {
        name: {key: value for key, value in record.items() if key != "seconds"}
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


def test_preparing_again_changes_no_byte(prompts, ruler_like_words, works, tokenizer):
    before = {path: path.read_bytes() for path in prompts.folder.rglob("*") if path.is_file()}
    again = make(prompts.folder.parent, ruler_like_words, works, tokenizer)
    assert again == prompts
    assert before == {path: path.read_bytes() for path in before}


def test_changed_code_makes_other_prompts(
    tmp_path, monkeypatch, prompts, ruler_like_words, works, tokenizer
):
    for name in ("ruler.py", "ruler_tasks.py"):
        shutil.copy(Path(prepare_module.__file__).with_name(name), tmp_path)
    same = prepare_module.code_digest(tmp_path)
    manifest = json.loads((prompts.folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["code"] == same
    seen = {same}
    for name in ("ruler.py", "ruler_tasks.py"):
        with open(tmp_path / name, "a", encoding="utf-8") as file:
            file.write("CHANGED = True\n")
        seen.add(prepare_module.code_digest(tmp_path))
    assert len(seen) == 3
    monkeypatch.setattr(prepare_module, "code_digest", lambda folder: "other")
    few = {"tasks": ["niah_single_1"], "samples": 1}
    other = make(tmp_path, ruler_like_words, works, tokenizer, **few)
    monkeypatch.undo()
    again = make(tmp_path, ruler_like_words, works, tokenizer, **few)
    assert other.digest != again.digest and other.folder != again.folder
    assert other.samples == again.samples


def test_preparation_that_was_killed_goes_on(tmp_path, prompts, ruler_like_words, works, tokenizer):
    half = make(tmp_path, ruler_like_words, works, tokenizer)
    (half.folder / "manifest.json").unlink()
    (half.folder / "512" / "niah_single_1.jsonl").unlink()
    assert make(tmp_path, ruler_like_words, works, tokenizer).samples == prompts.samples


def test_task_that_does_not_fit_is_kept_with_its_reason(
    tmp_path, ruler_like_words, works, tokenizer
):
    made = make(tmp_path, ruler_like_words, works, tokenizer, tasks=["cwe", "niah_single_1"])
    assert [(skip["task"], skip["length"]) for skip in made.skipped] == [("cwe", 512)]
    assert "smallest form" in made.skipped[0]["reason"]
    assert {sample.task for sample in made.samples} == {"niah_single_1"}


def test_changed_prompt_file_is_refused(tmp_path, ruler_like_words, works, tokenizer):
    made = make(tmp_path, ruler_like_words, works, tokenizer)
    path = made.folder / "512" / "niah_single_1.jsonl"
    path.write_bytes(path.read_bytes().replace(b"secret", b"sacred", 1))
    with pytest.raises(ValueError, match="niah_single_1.jsonl is not the file that was prepared"):
        load(made.folder, tokenizer)


def test_prompts_of_another_tokenizer_are_refused(prompts, chat_tokenizer):
    with pytest.raises(ValueError, match="made for another tokenizer"):
        load(prompts.folder, chat_tokenizer)


def test_folder_without_prompts_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="holds no prepared prompts"):
        load(tmp_path, tokenizer)


def test_other_seed_goes_to_another_folder(tmp_path, prompts, ruler_like_words, works, tokenizer):
    other = make(tmp_path, ruler_like_words, works, tokenizer, seed=2)
    assert other.folder.name != prompts.folder.name


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
    made = [
        predict(tiny_model, tokenizer, short, tmp_path, rank=rank, world_size=2) for rank in (0, 1)
    ]
    assert comparable(tmp_path) == undisturbed
    assert sum(made) == len(short) - (4 if before == 1 else 2)


def test_stop_when_all_is_found_cannot_change_a_score(tiny_model, tokenizer, short):
    sample = replace(short[0], new_tokens=12)
    whole = answer(tiny_model, tokenizer, replace(sample, references=["\x00 never said"]))
    said = whole["prediction"].split()[0]
    stopped = answer(tiny_model, tokenizer, replace(sample, references=[said]))
    assert stopped["stopped"] == "all references found"
    assert stopped["new_tokens"] < whole["new_tokens"] == 12
    assert whole["prediction"].startswith(stopped["prediction"])
    assert stopped["score"] == 100.0 and said in whole["prediction"]


def test_stop_waits_for_every_reference(tokenizer):
    prompt = tokenizer("which")["input_ids"]
    half = torch.tensor([prompt + tokenizer("rain")["input_ids"]])
    both = torch.tensor([prompt + tokenizer("rain WIND")["input_ids"]])
    stop = AllFound(tokenizer, ["rain", "wind"], len(prompt))
    assert not stop(half, None).any()
    assert stop(both, None).all()


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


def test_checkpoint_defaults_do_not_touch_greedy_decoding(tiny_model, tokenizer):
    config = greedy(tiny_model, tokenizer, 7)
    assert (config.do_sample, config.num_beams, config.repetition_penalty) == (False, 1, 1.0)
    assert config.max_new_tokens == 7


def test_prompt_of_another_length_is_refused(tiny_model, tokenizer, short):
    with pytest.raises(ValueError, match="prepare the prompts again"):
        answer(tiny_model, tokenizer, replace(short[0], num_tokens=5))


def test_progress_tells_the_time_left(tmp_path, tiny_model, tokenizer, short):
    said = []
    predict(tiny_model, tokenizer, short, tmp_path, progress=said.append, every_s=0.0)
    assert said[-1].startswith(f"{len(short)}/{len(short)} prompts") and said[-1].endswith(
        "0 s left"
    )


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


def test_line_separators_inside_text_stay_one_record(tmp_path):
    text = "a\u2028b\x85c\rd\ne"
    with Journal(tmp_path / "rank-0-of-1.jsonl") as journal:
        journal.append({"id": "a", "text": text})
    assert read_lines(journal.path) == [{"id": "a", "text": text}]
    assert json.loads(journal.path.read_text(encoding="utf-8").strip("\n"))["text"] == text
