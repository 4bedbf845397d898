"""LongBench's tasks and records: published numbers, the recipe's names, refusals, forms of a folder."""

from __future__ import annotations

import json
import runpy
import zipfile
from pathlib import Path

import pytest

from dense2sparse.eval import longbench_records
from dense2sparse.eval.longbench_tasks import TASKS, V2, chosen, suite_of
from dense2sparse.recipes import stages as recipe_stages

_ROWS = runpy.run_path(str(Path(__file__).with_name("longbench_rows.py")))
row_of, folder_of = _ROWS["row_of"], _ROWS["folder_of"]
ROW_V2 = _ROWS["ROW_V2"]


def test_the_suites_have_the_published_numbers_of_tasks_and_records():
    assert [len(chosen([suite])) for suite in ("v1", "e", "v2")] == [21, 13, 1]
    assert sum(task.records for task in TASKS.values()) == 4750
    assert sum(task.language == "zh" for task in TASKS.values()) == 5
    assert len(chosen(["v1", "e", "v2"])) == len(set(chosen(["v1", "e", "v2", "e"])))
    assert {suite_of(name) for name in chosen(["e"])} == {"e"}


def test_the_recipe_knows_the_same_tasks():
    assert list(TASKS) == list(recipe_stages.LONGBENCH_TASKS)
    absent = {name for name, task in TASKS.items() if not task.in_e}
    assert absent == set(recipe_stages.NOT_IN_LONGBENCH_E)


def test_the_recipe_refuses_a_task_that_no_suite_has():
    for suites in (["e"], ["v2"], ["e", "v2"]):
        with pytest.raises(ValueError, match=r"`tasks` names lsht, .* add v1"):
            recipe_stages.LongbenchStage(kind="longbench", suites=suites, tasks=["lsht"])
    recipe_stages.LongbenchStage(kind="longbench", suites=["e"], tasks=["trec"])


@pytest.mark.parametrize(
    ("suites", "tasks", "words"),
    [
        (["v1"], ["hotpot"], "'hotpot' does not exist, did you mean 'hotpotqa'"),
        (["v3"], [], "longbench.suites: 'v3' does not exist"),
        (["e"], ["musique"], "musique is not part of the chosen suites"),
    ],
)
def test_unknown_tasks_and_suites_are_refused_with_the_nearest(suites, tasks, words):
    with pytest.raises(ValueError, match=words):
        chosen(suites, tasks)


@pytest.mark.parametrize("task", ["qasper", "trec_e", V2])
def test_every_missing_field_is_refused_by_name(tmp_path, task):
    for field in row_of(task):
        row = row_of(task)
        del row[field]
        name = "longbench_v2" if task == V2 else task
        folder = folder_of(tmp_path / field, **{name: [row_of(task), row]})
        with pytest.raises(ValueError, match=rf"record 2, has no field {field}; .*hf download"):
            longbench_records.read(task, folder)


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        ("qasper", {"answers": []}, r"has answers=\[\], expected a list of texts"),
        ("qasper", {"answers": "green"}, 'has answers="green", expected a list'),
        ("qasper", {"context": None}, "has context=null, expected a text"),
        ("qasper", {"length": "12"}, 'has length="12", expected a whole number'),
        ("trec", {"all_classes": None}, "has all_classes=null, expected a list of texts"),
        (V2, {"answer": "E"}, 'has answer="E", expected one of A, B, C, D'),
        (V2, {"difficulty": "Hard"}, "expected one of easy, hard"),
        (V2, {"length": "huge"}, "expected one of short, medium, long"),
    ],
)
def test_a_field_of_the_wrong_kind_is_refused(tmp_path, task, changes, words):
    name = "longbench_v2" if task == V2 else task
    folder = folder_of(tmp_path, **{name: [row_of(task, **changes)]})
    with pytest.raises(ValueError, match=words) as error:
        longbench_records.read(task, folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("task", ["qasper", "qasper_e"])
def test_records_of_another_task_are_refused_under_either_name_of_their_own(tmp_path, task):
    rows = [row_of(task), row_of(task, _id="r1", dataset="qasper_e")]
    assert longbench_records.read(task, folder_of(tmp_path / "own", **{task: rows})).records == rows
    rows[1] = row_of("trec", _id="r1")
    folder = folder_of(tmp_path / "mixed", **{task: rows})
    with pytest.raises(
        ValueError, match='record 2, has dataset="trec", expected "qasper": the file'
    ):
        longbench_records.read(task, folder)


@pytest.mark.parametrize("task", ["qasper", V2])
def test_a_record_that_stands_twice_is_refused(tmp_path, task):
    rows = [row_of(task, _id=name) for name in ("a", "b", "a")]
    folder = folder_of(tmp_path, **{"longbench_v2" if task == V2 else task: rows})
    with pytest.raises(
        ValueError, match=r'record 3, has the _id of record 1 \("a"\) and would count'
    ):
        longbench_records.read(task, folder)


def test_a_damaged_record_is_named_by_its_number(tmp_path):
    (tmp_path / "qasper.jsonl").write_text(json.dumps(row_of("qasper")) + '\n{"input": "Whi\n')
    with pytest.raises(ValueError, match=r"qasper\.jsonl, record 2, is damaged") as error:
        longbench_records.read("qasper", tmp_path)
    assert "column 11" in str(error.value) and "line 1" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b'{"input": \n', b"[1]", b"\xff", b"{}{}\n"])
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path, content):
    (tmp_path / "qasper.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"qasper\.jsonl.*get it again, `hf download") as error:
        longbench_records.read("qasper", tmp_path)
    assert not isinstance(error.value, longbench_records.RecordsMissing)


def test_a_folder_is_read_as_files_as_data_and_as_the_published_archive(tmp_path):
    # A line separator inside a text is no end of line in JSON lines.
    rows = [
        row_of("qasper", context="one\u2028two\x85three"),
        row_of("qasper", answers=[3], _id="r1"),
    ]
    plain = folder_of(tmp_path / "plain", qasper=rows)
    folder_of(tmp_path / "nested" / "data", qasper=rows)
    (tmp_path / "zipped").mkdir()
    with zipfile.ZipFile(tmp_path / "zipped" / "data.zip", "w") as archive:
        archive.write(plain / "qasper.jsonl", "data/qasper.jsonl")
    found = [
        longbench_records.read("qasper", tmp_path / name) for name in ("plain", "nested", "zipped")
    ]
    assert all(one.records == rows for one in found)
    assert len({one.sha256 for one in found}) == 1
    (tmp_path / "data.json").write_text(json.dumps([ROW_V2]))
    assert longbench_records.read(V2, tmp_path).records == [ROW_V2]
