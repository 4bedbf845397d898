"""Which results lead the report, what is not averaged, and what is told where few arms were measured."""

from __future__ import annotations

import csv
import json
import runpy
from pathlib import Path

import pytest

from dense2sparse.eval import score
from dense2sparse.eval.report import write_report
from dense2sparse.eval.report_data import read_run

RUN = runpy.run_path(str(Path(__file__).with_name("report_run.py")))
ARMS = ("original_dense", "converted_dense", "converted_sparse-k16")
HEAD = {"state": None, "after": ["1-warmup", "2-sparse"], "checkpoint": "c0ffee" * 10}
HEAD |= {"precision": "bfloat16", "index_precision": "float32", "block_size": 128}


def ruler(stage: int, *, samples: int = 4, lengths=(4096,), tasks=("vt", "fwe"), labels=ARMS):
    """A RULER result over invented answers."""
    made = RUN["_ruler"](list(labels), samples, tuple(tasks), tuple(lengths))
    return {**made, **HEAD, "stage": stage}


def longbench(answers: dict[str, tuple[float, int]]):
    """A LongBench result; by task the share that B loses of A's answers, and how many there are."""
    arms = {}
    for label in ARMS[:2]:
        records = {}
        for task, (lost, count) in answers.items():
            for number in range(count):
                wrong = label == ARMS[1] and number < lost * count
                name, wanted = f"{task}/{number:05d}", "B" if task == "v2" else "the harbour"
                right = "The correct answer is (B)" if task == "v2" else wanted
                records[name] = {"id": name, "task": task, "length": 4096, "references": [wanted]}
                records[name]["prediction"] = "else" if wrong else right
        arms[label] = score.scored(records)
    return score.evaluate(arms, margin=1.0)


def write(folder: Path, **results) -> Path:
    """A run with these results: kind_stage = result."""
    for name, result in results.items():
        kind, stage = name.split("_")
        path = folder / f"eval/{kind}/stage-{stage}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**result, "stage": int(stage)}), encoding="utf-8")
    return folder


def top(folder: Path) -> str:
    """The Markdown up to the first section."""
    return write_report(folder)["markdown"].read_text(encoding="utf-8").split("\n## ")[0]


@pytest.mark.parametrize("better", [{"samples": 6}, {"lengths": (16384,)}])
def test_better_evidence_of_the_same_tasks_leads(tmp_path, better):
    """First by answers, then by length, whichever stage came first."""
    for name, stages in (("one", (1, 2)), ("two", (2, 1))):
        results = {f"ruler_{stages[0]}": ruler(1), f"ruler_{stages[1]}": ruler(2, **better)}
        head = top(write(tmp_path / name, **results)).split("**")[1]
        assert ("12 paired answers" if "samples" in better else "at 16K tokens") in head


def test_suites_of_longbench_are_compared_and_judged_apart():
    """v1 loses nothing; E loses every answer, v2 one of ten."""
    found = longbench(
        {"qasper": (0, 400), "qasper_e": (1, 20), "hotpotqa": (0, 400), "v2": (0.1, 50)}
    )
    pair = found["comparisons"][0]
    assert pair["suite"] == "v1" and pair["overall"]["verdict"] == "non-inferior"
    assert pair["overall"]["lost"]["samples"] == 800 and pair["overall"]["lost"]["estimate"] == 0
    losses = {name: one["overall"]["lost"]["estimate"] for name, one in pair["suites"].items()}
    assert losses == {"e": 100.0, "v2": 10.0}
    assert pair["suites"]["e"]["overall"]["verdict"] == "inferior"
    assert found["arms"]["converted_dense"]["means"]["4096"] == pytest.approx(100.0)


def test_suites_stand_apart_in_the_report_and_in_csv(tmp_path):
    folder = RUN["write"](tmp_path, samples=1)
    page = write_report(folder)
    text = page["markdown"].read_text(encoding="utf-8")
    for name in ("LongBench mean of 6 tasks", "LongBench-E qasper_e", "LongBench v2"):
        assert f" of {'the ' * ('mean' in name)}{name} (" in text
        assert f"{name}: points lost, with 95 % intervals from " in text
    rows = list(csv.DictReader(page["csv"].read_text(encoding="utf-8").splitlines()))
    whole = [row for row in rows if row["kind"] == "longbench" and row["length"] == "all"]
    assert {row["task"] for row in whole if row["low"]} == {
        "LongBench",
        "LongBench-E",
        "LongBench v2",
    }


def test_csv_has_tests_of_cells_and_verdicts_of_means(tmp_path):
    result = ruler(1)
    page = write_report(write(tmp_path, ruler_1=result))
    rows = list(csv.DictReader(page["csv"].read_text(encoding="utf-8").splitlines()))
    pair = next(one for one in result["comparisons"] if one["meaning"] == "whole conversion")
    named = [row for row in rows if row["measure"] == "whole conversion (points lost)"]
    cell = next(row for row in named if row["task"] == "vt")
    task = next(one for one in pair["lengths"][0]["tasks"] if one["task"] == "vt")
    for key in ("worse", "better", "p", "p_holm"):
        assert float(cell[key]) == task[key]
    whole = next(row for row in named if row["length"] == "all")
    assert (whole["verdict"], whole["margin"]) == (pair["overall"]["verdict"], "1.0")
    assert [row["value"] for row in rows if row["measure"] == "seconds"] == ["180.0"] * len(ARMS)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (
            ARMS[:2],
            "Only a part was measured, training drift (A to B: training moved the weights): the second",
        ),
        (
            ("converted_oracle-k16", "converted_sparse-k16"),
            "Only a part was measured, indexer error (D to C: the index branch chose others): the second",
        ),
    ],
)
def test_part_that_was_compared_alone_is_told_by_its_name(tmp_path, labels, words):
    page = top(write(tmp_path, ruler_1=ruler(1, labels=labels)))
    assert page.split("**")[1].startswith(words)


def test_mean_without_uninformative_cells_stands_below_the_costs(tmp_path):
    result = ruler(1, samples=12, tasks=("vt", "niah_single_1"))
    pair = next(one for one in result["comparisons"] if one["meaning"] == "whole conversion")
    entry = pair["lengths"][0]  # one length: its own entry is shown
    entry["uninformative"] = 1
    entry["lost_informative"] = {"estimate": 7.06, "low": 1.0, "high": 13.0}
    text = write_report(write(tmp_path, ruler_1=result))["markdown"].read_text(encoding="utf-8")
    said = "Points lost without cells where both arms are below 10 or above 99: whole conversion, k = 16 "
    assert f"{said}7.1 (1.0 to 13.0)." in text


def test_precision_stands_in_the_head_of_a_result(tmp_path):
    text = write_report(write(tmp_path, ruler_1=ruler(1)))["markdown"].read_text(encoding="utf-8")
    assert "after 1-warmup, 2-sparse, bfloat16, index scores in float32\n" in text
    plain = {**ruler(1), "index_precision": "input"}
    text = write_report(write(tmp_path, ruler_1=plain))["markdown"].read_text(encoding="utf-8")
    assert "2-sparse, bfloat16\n" in text


@pytest.mark.parametrize("other", [{"checkpoint": "0ther"}, {"state": "elsewhere"}])
def test_results_of_other_weights_are_not_taken_for_the_newest(tmp_path, other):
    state = {"state": "checkpoint from a folder"}
    older = {**ruler(1), **state, **other}
    run = read_run(write(tmp_path, ruler_1=older, ruler_2={**ruler(2), **state}))
    assert [one["stage"] for one in run.final("ruler")] == [2]
    text = write_report(tmp_path)["markdown"].read_text(encoding="utf-8")
    if "checkpoint" in other:
        assert "folder (checkpoint 0ther)" in text and "folder (checkpoint c0ffeec0)" in text


def test_share_that_cannot_be_excluded_is_never_called_none(tmp_path):
    result = ruler(1)
    for pair in result["comparisons"]:
        pair["overall"]["unseen_share"] = 0.001
    assert "up to <1 % could change" in top(write(tmp_path, ruler_1=result))
