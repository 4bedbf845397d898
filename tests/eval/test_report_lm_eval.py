"""What lm-eval left, in the report: arms side by side, differences paired where that can be."""

from __future__ import annotations

import csv
import json
import math

import pytest

from dense2sparse.eval.report import main, write_report
from dense2sparse.eval.report_lm_eval import Score, lost, scores_of
from dense2sparse.eval.statistics import paired_bootstrap

A, B, C = "original_dense", "converted_dense", "converted_sparse-k16"
RIGHT = {A: 70, B: 68, C: 64}
QUESTIONS = 100


def content(arm: str, **changes) -> dict:
    """A file of the command: one task with answers, one group of two tasks, one perplexity."""
    values = {str(n): float(n < RIGHT[arm]) for n in range(QUESTIONS)}
    share = RIGHT[arm] / QUESTIONS
    error = math.sqrt(share * (1 - share) / (QUESTIONS - 1))
    accuracy = {"alias": "arc", "acc,none": share, "acc_stderr,none": error}
    perplexity = {"word_perplexity,none": 20.0 - share, "word_perplexity_stderr,none": "N/A"}
    known = {"prompts": "feed", "scores": {"acc,none": values}}
    tasks = ("arc_easy", "mmlu_law", "mmlu_maths")
    return {
        "checkpoint": "aa" if arm == A else "cc",
        "arm": arm,
        "precision": "bf16",
        "lm_eval": "0.4.13",
        "limit": QUESTIONS,
        "num_fewshot": 5,
        "chat": False,
        "results": {**dict.fromkeys((*tasks, "mmlu"), accuracy), "wikitext": perplexity},
        "group_subtasks": {"mmlu": ["mmlu_law", "mmlu_maths"]},
        "higher_is_better": {"wikitext": {"word_perplexity": False}},
        "answers": dict.fromkeys(tasks, known),
        **changes,
    }


@pytest.fixture()
def made(tmp_path):
    """Writes files of lm-eval and the report; returns the report's texts."""

    def make(*files: dict):
        for place, one in enumerate(files):
            home = tmp_path / "eval" / "lm-eval" / one["arm"]
            home.mkdir(parents=True, exist_ok=True)
            (home / f"{place}.json").write_text(json.dumps(one), encoding="utf-8")
        written = write_report(tmp_path)
        return {kind: path.read_text(encoding="utf-8") for kind, path in written.items()}

    return make


def test_arms_stand_side_by_side_and_are_compared_answer_by_answer(made):
    page = made(*map(content, (C, A, B)))
    text = page["markdown"]
    assert (
        "### lm-eval 0.4.13, the first 100 questions of each task, 5 examples in a prompt, bf16"
        in text
    )
    assert "| task | A original, dense | B converted, dense | C converted, sparse, k = 16 |" in text
    error = math.sqrt(0.7 * 0.3 / 99)
    assert f"| arc_easy (acc) | 0.7000 (± {error:.4f}, 100 questions) | 0.6800" in text
    assert "| task | training drift | cost of sparsity, k = 16 | whole conversion, k = 16 |" in text
    gaps = [1.0] * 6 + [0.0] * 94
    interval = paired_bootstrap({"": gaps}, unseen=1.0)
    whole = f"+0.0600 (+{interval.low:.4f} to +{interval.high:.4f}) |"
    assert next(one for one in text.splitlines() if "arc_easy (acc) | +" in one).endswith(whole)
    assert "unpaired" not in next(one for one in text.splitlines() if "| mmlu (acc) | +" in one)
    assert text.index("| mmlu (acc)") < text.index("| mmlu_law (acc)"), "parts come after the mean"
    assert "<summary>Tasks that the means above are made of</summary>" in page["html"]


def test_csv_has_scores_errors_and_differences(made):
    rows = list(csv.DictReader(made(*map(content, (A, B, C)))["csv"].splitlines()))
    keys = [(row["task"], row["arm"], row["measure"]) for row in rows]
    assert len(set(keys)) == len(keys) and {row["kind"] for row in rows} == {"lm-eval"}
    found = [row for row in rows if row["arm"] == f"{A} > {C}" and row["task"] == "arc_easy"]
    assert len(found) == 1 and float(found[0]["value"]) == pytest.approx(0.06)
    assert found[0]["samples"] == "100" and "paired" in found[0]["measure"]


@pytest.mark.parametrize(
    "change",
    [
        {"answers": {}},
        {"answers": {"arc_easy": {"prompts": "feed", "scores": {"acc,none": {"0": 0.64}}}}},
        {"answers": {"arc_easy": {**content(C)["answers"]["arc_easy"], "prompts": "other"}}},
    ],
)
def test_without_the_same_answered_questions_a_difference_is_called_unpaired(made, change):
    text = made(content(B), content(C, **change))["markdown"]
    line = next(one for one in text.splitlines() if "| arc_easy (acc) | +" in one)
    half = 1.96 * math.sqrt((0.68 * 0.32 + 0.64 * 0.36) / 99)
    assert f"+0.0400 (\N{MINUS SIGN}{half - 0.04:.4f} to +{0.04 + half:.4f}, unpaired) |" in line


def test_samples_whose_mean_is_not_the_score_make_no_pairs():
    """A corpus-level metric may log a value a sample all the same."""
    odd = content(B)
    odd["results"]["arc_easy"] = {"acc,none": 0.5, "acc_stderr,none": 0.05}
    assert scores_of(odd)["arc_easy", "acc,none"].samples == {}
    assert len(scores_of(odd)["mmlu", "acc,none"].samples) == 2 * QUESTIONS


def test_a_loss_is_positive_also_where_less_is_better():
    low, high = Score(10.0, 0.1, True), Score(12.0, 0.1, True)
    interval, paired = lost(low, high)
    assert interval is not None and (interval.estimate, paired) == (2.0, False)
    assert lost(low, None) == (None, False)
    assert lost(Score(1.0, None), Score(2.0, None)) == (None, False)


def test_other_settings_or_weights_are_not_compared(made):
    text = made(content(A), content(B), content(C, limit=None), content(C, checkpoint="dd"))[
        "markdown"
    ]
    assert "training drift" in text and "cost of sparsity" not in text.split("## Short tasks")[1]
    assert text.count("### lm-eval 0.4.13") == 3
    assert "bf16, checkpoint dd" in text and "bf16, checkpoint cc" in text
    assert "| task | whole conversion, k = 16 |" in text, "A goes with every weights measured alike"


@pytest.mark.parametrize("content", ['{"results": {}}', '{"arm": "converted_dense"}', "["])
def test_damaged_file_is_refused_by_name(tmp_path, capsys, content):
    path = tmp_path / "eval/lm-eval/converted_dense/arc.json"
    path.parent.mkdir(parents=True)
    path.write_text(content, encoding="utf-8")
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and error.count("\n") == 1
