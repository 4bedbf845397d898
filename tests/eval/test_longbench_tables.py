"""LongBench's scores and tables: by hand, against the published averages, and without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dense2sparse.eval import longbench_score, metrics
from dense2sparse.eval.longbench_tasks import BUCKETS, TASKS, V2, bucket

# Task by task and average as THUDM/LongBench `2e00731` prints them, LongBench/README.md.
GPT_3_5 = {
    "narrativeqa": 23.6, "qasper": 43.3, "multifieldqa_en": 52.3, "multifieldqa_zh": 61.2,
    "hotpotqa": 51.6, "2wikimqa": 37.7, "musique": 26.9, "dureader": 28.7, "gov_report": 29.5,
    "qmsum": 23.4, "multi_news": 26.7, "vcsum": 16.0, "trec": 68.0, "triviaqa": 91.4, "samsum": 41.7,
    "lsht": 29.2, "passage_count": 4.5, "passage_retrieval_en": 71.0, "passage_retrieval_zh": 77.5,
    "lcc": 54.7, "repobench-p": 53.6,
}  # fmt: skip
CHATGLM3 = {
    "narrativeqa": 26.0, "qasper": 43.3, "multifieldqa_en": 51.7, "multifieldqa_zh": 62.3,
    "hotpotqa": 54.4, "2wikimqa": 44.9, "musique": 40.4, "dureader": 44.78, "gov_report": 36.8,
    "qmsum": 23.9, "multi_news": 27.9, "vcsum": 17.8, "trec": 79.0, "triviaqa": 87.1, "samsum": 38.2,
    "lsht": 42.0, "passage_count": 2.0, "passage_retrieval_en": 99.0, "passage_retrieval_zh": 94.0,
    "lcc": 57.66, "repobench-p": 54.76,
}  # fmt: skip


def record(task, prediction, references, **facts):
    """A prediction record as predict writes it; ids count up."""
    record.made += 1
    head = {"id": f"{task}/{record.made:05d}", "task": task, "facts": facts}
    return {**head, "prediction": prediction, "references": references}


record.made = 0


@pytest.mark.parametrize(
    ("means", "english", "chinese"), [(GPT_3_5, 44.0, 44.5), (CHATGLM3, 48.5, 52.8)]
)
def test_averages_equal_the_published_ones(means, english, chinese):
    table = longbench_score.v1_table(means)
    # Published from unrounded tasks: the last printed digit may differ by one.
    assert table["en"]["average"] == pytest.approx(english, abs=0.1)
    assert table["zh"]["average"] == pytest.approx(chinese, abs=0.1)
    assert [len(table[language]["categories"]) for language in ("en", "zh")] == [6, 6]


def test_there_is_no_average_while_a_task_is_missing():
    means = {name: value for name, value in GPT_3_5.items() if name not in ("lsht", "vcsum")}
    table = longbench_score.v1_table(means)
    assert table["en"]["average"] is not None and table["en"]["missing"] == []
    assert table["zh"]["average"] is None and table["zh"]["missing"] == ["vcsum", "lsht"]
    assert "summarization" not in table["zh"]["categories"]


@pytest.mark.parametrize(
    ("task", "prediction", "references", "facts", "expected"),
    [
        ("qasper", "It is green.", ["red", "it is green"], {}, 100.0),
        ("qasper_e", "", ["red"], {"bucket": "0-4k"}, 0.0),
        ("triviaqa", "\n\nParis\nPassage: London", ["Paris"], {}, 100.0),
        ("hotpotqa", "Paris\nLondon", ["Paris"], {}, 100 * 2 / 3),
        ("trec", "\nDate\nNumber", ["Date"], {"classes": ["Date", "Number"]}, 100.0),
        ("lsht", "Number", ["Date"], {"classes": ["Date", "Number"]}, 0.0),
        ("samsum", "a b\nc d", ["a b"], {}, 100 * 0.999999995),
        ("passage_count", "5, maybe 6", ["5"], {}, 50.0),
        ("passage_retrieval_en", "Paragraph 3", ["Paragraph 3"], {}, 100.0),
        ("passage_retrieval_zh", "段落3", ["段落3"], {}, 100.0),
        ("lcc", "\nreturn x\nmore", ["return x"], {}, 100.0),
        (V2, "**The correct answer is (B)**", ["B"], {}, 100.0),
        (V2, "B", ["B"], {}, 0.0),
    ],
)
def test_score_uses_the_tasks_metric_and_line_rule(task, prediction, references, facts, expected):
    assert longbench_score.score(record(task, prediction, references, **facts)) == pytest.approx(
        expected, abs=1e-9
    )


def test_a_right_answer_scores_100_and_an_empty_one_0_on_every_task():
    right = {"count": "7", "retrieval": "Paragraph 7", "retrieval_zh": "段落7"}
    for name, task in TASKS.items():
        if longbench_score.needs_jieba(name):
            continue
        answer = right.get(task.metric, "green")
        facts = {"classes": ["green", "red"]}
        assert longbench_score.score(record(name, answer, [answer], **facts)) > 99.999
        assert longbench_score.score(record(name, "", [answer], **facts)) == 0.0


def test_a_task_that_is_not_longbenchs_and_a_record_without_classes_are_refused():
    with pytest.raises(ValueError, match="'niah_single_1' is not a LongBench task"):
        longbench_score.score(record("niah_single_1", "x", ["x"]))
    with pytest.raises(ValueError, match=r"a record of trec names no classes: facts\.classes"):
        longbench_score.score(record("trec", "x", ["x"]))


def test_buckets_are_the_references():
    edges = [0, 3999, 4000, 7999, 8000, 10**6]
    assert [bucket(length) for length in edges] == [name for name in BUCKETS for _ in range(2)]


def test_e_is_averaged_by_category_in_each_bucket():
    names = [name for name, task in TASKS.items() if task.in_e]
    records = [
        record(f"{name}_e", "", ["x"], bucket=place)
        for place in ("0-4k", "4-8k")
        for name in names
        if (name, place) != ("lcc", "4-8k")
    ]
    scores = {one["id"]: float(names.index(one["task"].removesuffix("_e"))) for one in records}
    extra = record("qasper_e", "", ["x"], bucket="0-4k")
    table = longbench_score.tables([*records, extra], {**scores, extra["id"]: 90.0})["e"]
    # qasper is the first of the 13 (score 0), multifieldqa_en the second (1).
    assert table["tasks"]["qasper"] == {"0-4k": 45.0, "4-8k": 0.0, "8k+": None}
    assert table["samples"]["qasper"] == {"0-4k": 2, "4-8k": 1, "8k+": 0}
    first = table["buckets"]["0-4k"]
    by_hand = [(45 + 1) / 2, (2 + 3) / 2, (4 + 5) / 2, (6 + 7 + 8) / 3, (9 + 10) / 2, (11 + 12) / 2]
    assert list(first["categories"].values()) == pytest.approx(by_hand)
    assert first["average"] == pytest.approx(sum(by_hand) / 6)
    assert table["buckets"]["4-8k"]["average"] is None
    assert table["buckets"]["8k+"] == {"categories": {}, "average": None}


def test_version_2_is_split_by_difficulty_and_length_and_unreadable_answers_are_counted():
    records = [
        record(V2, f"The correct answer is ({said})", ["A"], difficulty=level, size=size)
        for said, level, size in [
            ("A", "easy", "short"),
            ("B", "easy", "medium"),
            ("A", "hard", "short"),
            ("D", "hard", "short"),
        ]
    ]
    records.append(record(V2, "A", ["A"], difficulty="hard", size="medium"))
    table = longbench_score.tables(records)["v2"]
    assert table["unreadable"] == 1
    cells = {
        name: (cell["score"], cell["samples"])
        for name, cell in table.items()
        if name != "unreadable"
    }
    assert cells == {
        "overall": (40.0, 5),
        "easy": (50.0, 2),
        "hard": (pytest.approx(100 / 3), 3),
        "short": (pytest.approx(200 / 3), 3),
        "medium": (0.0, 2),
        "long": (None, 0),
    }


def test_tables_count_what_was_cut_and_name_what_was_not_scored(monkeypatch):
    monkeypatch.setattr(metrics, "chinese_is_scorable", lambda: False)
    records = [
        {**record("qasper", " ", ["x"]), "cut_tokens": 12, "stopped": "end token"},
        {**record("qasper", "x", ["x"]), "cut_tokens": 0, "stopped": "budget"},
        record("vcsum", "好", ["好"]),
    ]
    table = longbench_score.tables(records)
    cell = table["tasks"]["qasper"]
    assert cell == {
        "score": 50.0,
        "samples": 2,
        "published": 200,
        "empty": 1,
        "at_limit": 1,
        "truncated": 1,
        "cut_tokens": 12,
    }
    assert (
        list(table["tasks"]) == ["qasper"] and "pip install jieba" in table["not_scored"]["vcsum"]
    )
    assert "e" not in table and "v2" not in table


def test_the_references_own_prediction_files_can_be_scored():
    line = {"pred": "Date", "answers": ["Date"], "all_classes": ["Date", "Number"], "length": 4100}
    made = longbench_score.from_reference("trec_e", 0, line)
    assert longbench_score.score(made) == 100.0
    assert made["facts"]["bucket"] == "4-8k"
    with pytest.raises(ValueError, match="line 3 of trec has no answers, length"):
        longbench_score.from_reference("trec", 2, {"pred": "", "all_classes": None})


def test_scores_are_made_without_torch():
    check = (
        "import sys, dense2sparse.eval.longbench_score, dense2sparse.eval.longbench_prompts;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'jieba')))"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
