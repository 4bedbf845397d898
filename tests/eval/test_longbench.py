"""LongBench's prompt sets: stored once, resumable, checked, and honest about what is not in them."""

from __future__ import annotations

import json
import runpy
import socket
from pathlib import Path

import pytest

from dense2sparse.eval import longbench, longbench_score, metrics
from dense2sparse.eval.generate import answer
from dense2sparse.eval.longbench_prompts import Builder
from dense2sparse.eval.longbench_tasks import V2
from dense2sparse.eval.longbench_templates import Template

_ROWS = runpy.run_path(str(Path(__file__).with_name("longbench_rows.py")))
row_of, folder_of = _ROWS["row_of"], _ROWS["folder_of"]
V1 = Template("Text:\n{context}\n\nAsked: {input}\nAnswer:", 32)
LETTERS = Template("<$DOC$>\n$Q$\n$C_A$ $C_B$ $C_C$ $C_D$", 128)


@pytest.fixture()
def no_words(monkeypatch):
    """Made-up templates, so that a test needs no network."""
    monkeypatch.setattr(
        longbench, "templates", lambda tasks, cache: {t: LETTERS if t == V2 else V1 for t in tasks}
    )


@pytest.fixture()
def no_hub(monkeypatch):
    """A hub that cannot be reached, at once."""

    def refuse(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def prepare(home: Path, tokenizer, **changes):
    """`longbench.prepare` with small defaults."""
    given_ = {"suites": ["v1"], "tasks": ["qasper"], "records": None, "cache_dir": home / "cache"}
    given_ |= {"max_length": 256, "window": 2048}
    return longbench.prepare(home / "prompts", tokenizer=tokenizer, **{**given_, **changes})


def test_a_prompt_set_is_stored_once_and_read_back(tmp_path, chat_tokenizer, no_words, monkeypatch):
    rows = [row_of("qasper", _id=f"r{n}", context="rain falls " * (5 + 30 * n)) for n in range(6)]
    few = [row_of("trec", _id=f"t{n}") for n in range(2)]
    folder = folder_of(tmp_path / "data", qasper=rows, qasper_e=rows, trec=few)
    wanted = {"suites": ["v1", "e"], "tasks": ["qasper", "trec"], "records": folder}
    first = prepare(tmp_path, chat_tokenizer, **wanted)
    assert [one["task"] for one in first.missing] == ["trec_e"]
    assert len(first.samples) == 14 and len({one.id for one in first.samples}) == 14
    assert {one.facts.get("bucket") for one in first.samples if one.task == "qasper_e"} == {"0-4k"}
    assert first.sources["qasper"]["records"] == first.sources["qasper"]["taken"] == 6
    again = longbench.load(first.folder, chat_tokenizer)
    assert (again.samples, again.digest) == (first.samples, first.digest)
    monkeypatch.setattr(longbench, "Builder", None)  # nothing is made a second time
    assert prepare(tmp_path, chat_tokenizer, **wanted) == first


def test_a_killed_preparation_goes_on_with_the_task_it_had_not_written(
    tmp_path, tokenizer, no_words, monkeypatch
):
    folder = folder_of(tmp_path / "data", qasper=[row_of("qasper")], hotpotqa=[row_of("hotpotqa")])
    wanted = {"tasks": ["qasper", "hotpotqa"], "records": folder}
    whole = prepare(tmp_path / "undisturbed", tokenizer, **wanted)

    class Dies(Builder):
        def samples(self, places, records):
            if self.task == "hotpotqa":
                raise KeyboardInterrupt
            return super().samples(places, records)

    monkeypatch.setattr(longbench, "Builder", Dies)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, tokenizer, **wanted)
    written = next((tmp_path / "prompts").glob("*/qasper.jsonl")).stat().st_mtime_ns
    monkeypatch.setattr(longbench, "Builder", Builder)
    after = prepare(tmp_path, tokenizer, **wanted)
    assert after.samples == whole.samples
    assert (after.folder / "qasper.jsonl").stat().st_mtime_ns == written


def test_changed_prompts_and_another_tokenizer_are_refused(
    tmp_path, tokenizer, chat_tokenizer, no_words
):
    folder = folder_of(tmp_path / "data", qasper=[row_of("qasper")])
    made = prepare(tmp_path, tokenizer, records=folder)
    with pytest.raises(ValueError, match="were made for another tokenizer"):
        longbench.load(made.folder, chat_tokenizer)
    file = made.folder / "qasper.jsonl"
    file.write_text(file.read_text().replace("green", "grey!"))
    with pytest.raises(ValueError, match="is not the file that was prepared"):
        longbench.load(made.folder, tokenizer)


def test_a_draw_depends_on_the_seed_and_not_on_other_tasks(tmp_path, tokenizer, no_words):
    rows = {name: [row_of(name, _id=f"r{n}") for n in range(40)] for name in ("qasper", "hotpotqa")}
    folder = folder_of(tmp_path / "data", **rows)
    wanted = {"records": folder, "samples": 5}
    both = prepare(tmp_path, tokenizer, **wanted, tasks=["hotpotqa", "qasper"])
    alone = prepare(tmp_path, tokenizer, **wanted, tasks=["qasper"])
    assert [one for one in both.samples if one.task == "qasper"] == alone.samples
    assert len(alone.samples) == 5
    other = prepare(tmp_path, tokenizer, **wanted, tasks=["qasper"], seed=7)
    assert {one.index for one in other.samples} != {one.index for one in alone.samples}


def test_other_records_have_other_names_and_the_same_ones_share_them(tmp_path, tokenizer, no_words):
    made = []
    for text in ("rain falls", "wind blows"):
        rows = [row_of("qasper", context=text), row_of("qasper", _id="same")]
        folder = folder_of(tmp_path / text, qasper=rows, hotpotqa=[row_of("hotpotqa")])
        made.append(prepare(tmp_path, tokenizer, records=folder))
    more = prepare(tmp_path, tokenizer, tasks=["qasper", "hotpotqa"], records=folder)
    ids = [{one.id for one in each.samples} for each in (*made, more)]
    assert len(ids[0] & ids[1]) == 1  # the second record is the same
    assert ids[1] < ids[2]
    assert len({one.folder for one in (*made, more)}) == 3
    # Predictions are kept by this digest and by id, so sets that overlap share them.
    assert made[0].digest == made[1].digest == more.digest
    assert prepare(tmp_path, tokenizer, records=folder, max_length=100).digest != more.digest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_length": 2048}, "longbench.max_length=2048 is not below the model's window of 2048"),
        ({"max_length": None, "window": None}, "names no window"),
        (
            {"chat": True},
            "longbench.chat=true, but the checkpoint's tokenizer has no chat template",
        ),
        ({"max_length": 2040}, "the model's window is 2048: set longbench.max_length below"),
    ],
)
def test_what_the_model_cannot_hold_is_refused(tmp_path, tokenizer, no_words, changes, words):
    long = row_of("qasper", context="rain falls " * 3000)
    folder = folder_of(tmp_path / "data", qasper=[long])
    with pytest.raises(ValueError, match=words):
        prepare(tmp_path, tokenizer, records=folder, **changes)


def test_the_default_length_leaves_room_in_the_window():
    assert longbench.check_max_length(None, 32768) == 32768 - 1024
    assert longbench.check_max_length(None, 512) == 256


@pytest.mark.usefixtures("no_hub")
def test_an_unreachable_hub_names_every_task_with_its_command(tmp_path, tokenizer):
    made = prepare(tmp_path, tokenizer, suites=["v1", "v2"], tasks=["qasper", "trec"])
    assert made.samples == []
    assert [one["task"] for one in made.missing] == ["qasper", "trec", "v2"]
    for one in made.missing:
        assert one["reason"].startswith("not measured: the hub cannot be reached")
        assert (
            "`hf download THUDM/LongBench" in one["reason"] and "longbench.folder" in one["reason"]
        )
    assert "LongBench-v2 data.json" in made.missing[2]["reason"]


def test_an_absent_file_does_not_hide_the_ones_that_are_there(tmp_path, tokenizer, no_words):
    folder = folder_of(tmp_path / "data", trec=[row_of("trec")])
    made = prepare(tmp_path, tokenizer, tasks=["qasper", "trec"], records=folder)
    assert [one.task for one in made.samples] == ["trec"]
    assert "holds no TASK.jsonl for it: `hf download" in made.missing[0]["reason"]
    with pytest.raises(ValueError, match=r"longbench.folder=\S*nowhere is not a folder: `hf down"):
        prepare(tmp_path, tokenizer, records=tmp_path / "nowhere")


def test_chinese_tasks_are_named_and_left_out_without_jieba(
    tmp_path, tokenizer, no_words, monkeypatch
):
    monkeypatch.setattr(metrics, "chinese_is_scorable", lambda: False)
    rows = {name: [row_of(name)] for name in ("dureader", "lsht", "qasper")}
    folder = folder_of(tmp_path / "data", **rows)
    made = prepare(tmp_path, tokenizer, tasks=list(rows), records=folder)
    assert {one.task for one in made.samples} == {"lsht", "qasper"}
    assert made.missing == [
        {
            "task": "dureader",
            "reason": "not measured: scored over Chinese words, `pip install jieba==0.42.1`",
        }
    ]


def test_an_answer_is_scored_from_its_record_alone(tmp_path, chat_tokenizer, tiny_model, no_words):
    short = {
        name: [row_of(name, context=text, _id=text) for text in ("green", "rain falls " * 400)]
        for name in ("trec", "qasper_e")
    }
    folder = folder_of(tmp_path / "data", **short, longbench_v2=[row_of(V2)])
    made = prepare(
        tmp_path, chat_tokenizer, suites=["v1", "e", "v2"], tasks=["trec", "qasper"], records=folder
    )
    answers = [answer(tiny_model, chat_tokenizer, one) for one in made.samples]
    records = [json.loads(json.dumps(one)) for one in answers]
    assert all("prompt" not in one and one["benchmark"] == "longbench" for one in records)
    table = longbench_score.tables(records)
    assert set(table["tasks"]) == {"trec", "qasper_e", V2} and {"v1", "e", "v2"} <= set(table)
    assert [table["tasks"][name]["truncated"] for name in ("trec", "qasper_e", V2)] == [1, 1, 0]
    right = [{**one, "prediction": one["references"][0]} for one in records if one["task"] != V2]
    assert [longbench_score.score(one) for one in right] == [100.0] * 4
