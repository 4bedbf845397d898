"""The report: holds the numbers, needs no network, escapes what models say, refuses what is no run."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser

import pytest

from dense2sparse.eval import report
from dense2sparse.eval.charts import Bar, Series, interval_chart, line_chart, ticks
from dense2sparse.eval.report import main, write_report
from dense2sparse.eval.report_words import signed


@pytest.fixture()
def written(made_up_run):
    return write_report(made_up_run)


class Balanced(HTMLParser):
    """Fails on a tag that is closed out of order."""

    VOID = frozenset({"meta", "line", "circle", "polyline", "polygon", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_html_holds_the_numbers_and_closes_its_tags(written):
    page = written["html"].read_text(encoding="utf-8")
    for number in (
        "24.111",
        "24.222",
        "24.333",
        "24.289",
        "+1.57<small>+0.57 to +2.57</small>",
        "83.4",
        "66.6",
        "0.9400",
        "0.9300",
    ):
        assert number in page, number
    for words in (
        "training drift",
        "indexer error",
        "cwe needs 1216 tokens",
        "no room",
        "2-sparse",
    ):
        assert words in page, words
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []


def test_verdict_names_costs_with_their_intervals(written):
    page = written["markdown"].read_text(encoding="utf-8")
    assert (
        "**Reading 16 blocks of 32 tokens instead of all, the converted model loses 16.8 points of RULER "
        "niah_single_1 at 1K tokens (95 % interval 15.8 to 17.8, 6 paired answers).**" in page
    )
    assert (
        "Reading 16 of 32 blocks, perplexity is 1.57 % higher than with full attention "
        "(95 % interval +0.57 to +2.57 %), by cause: training drift +0.46 % "
        "(\N{MINUS SIGN}0.54 to +1.46 %), budget cost +0.28 % (\N{MINUS SIGN}0.72 to +1.28 %) and "
        "indexer error +0.18 % (\N{MINUS SIGN}0.82 to +1.18 %)." in page
    )


def test_html_loads_nothing_from_elsewhere(written):
    page = written["html"].read_text(encoding="utf-8")
    assert not re.search(r"https?://|src=|@import|url\(|<script|<link", page)


def test_what_a_model_said_is_escaped(written):
    page = written["html"].read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


@pytest.mark.parametrize("kind", ["html", "markdown"])
def test_label_of_the_corpus_stands_in_every_form(written, kind):
    page = written[kind].read_text(encoding="utf-8")
    assert "ruler-pd, not comparable with published scores" in page


def test_csv_holds_every_measure_once(written):
    with open(written["csv"], encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = {(row["kind"], row["arm"], row["measure"], row["task"]): row for row in rows}
    assert len(found) == len(rows)
    key = ("perplexity", "converted_sparse-k16", "perplexity", "")
    assert float(found[key]["value"]) == 24.333
    key = ("ruler", "converted_sparse-k16", "score", "niah_single_1")
    assert float(found[key]["value"]) == 66.625
    drift = found[("perplexity", "original_dense > converted_dense", "training drift (%)", "")]
    assert (float(drift["low"]), float(drift["high"])) == pytest.approx((-0.54, 1.46))


def test_report_can_be_made_again_from_the_folder_alone(made_up_run, written, capsys):
    before = {kind: path.read_bytes() for kind, path in written.items()}
    assert main([str(made_up_run)]) == 0
    assert {kind: path.read_bytes() for kind, path in written.items()} == before
    assert "report.html" in capsys.readouterr().out


def test_run_without_results_says_that_nothing_was_measured(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({"name": "fresh"}), encoding="utf-8")
    page = write_report(tmp_path)["markdown"].read_text(encoding="utf-8")
    assert "Nothing has been measured yet" in page
    assert "Not measured: LongBench" in page and "Not measured: perplexity" in page


def test_unchanged_answers_are_not_called_no_loss(made_up_run):
    path = made_up_run / "eval" / "ruler" / "stage-4.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    entry = result["comparisons"][0]["lengths"][0]
    entry["unseen_share"] = 0.39
    entry["lost"] = {"estimate": 0.0, "low": 0.0, "high": 0.0, "samples": 6, "confidence": 0.95}
    path.write_text(json.dumps(result), encoding="utf-8")
    page = write_report(made_up_run)["markdown"].read_text(encoding="utf-8")
    assert "no score changed (up to 39 % could)" in page
    assert (
        "the converted model has the same score on every prompt of RULER niah_single_1 at 1K tokens "
        "(6 paired answers; up to 39 % could change)" in page
    )


@pytest.mark.parametrize("content", [None, "empty folder"])
def test_what_is_no_run_is_refused(tmp_path, content, capsys):
    folder = tmp_path / "nothing"
    if content:
        folder.mkdir()
    assert main([str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("eval/ruler/stage-4.json", "{", "stage-4.json is damaged"),
        ("eval/ruler/stage-4.json", "[1]", "stage-4.json is damaged (no JSON object)"),
        ("eval/ruler/stage-4.json", "{}", "stage-4.json names no stage"),
        ("eval/ruler/stage-4.json", '{"stage": 0}', "stage-4.json is damaged (it has no arms)"),
        ("eval/probe/stage-0.json", '{"stage": 0}', "stage-0.json is damaged (it has no budgets)"),
        ("recipe.json", "3", "recipe.json is damaged (no JSON object)"),
        ("metrics.jsonl", "7\n{}\n", "metrics.jsonl, line 1, is damaged"),
    ],
)
def test_damaged_file_is_refused_by_name(made_up_run, capsys, name, content, words):
    (made_up_run / name).parent.mkdir(exist_ok=True)
    (made_up_run / name).write_text(content, encoding="utf-8")
    assert main([str(made_up_run)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1


def test_disk_that_refuses_is_one_sentence(made_up_run, capsys, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(report, "write_text", full)
    assert main([str(made_up_run)]) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and error.count("\n") == 1


def test_value_error_of_a_library_keeps_its_traceback(made_up_run, monkeypatch):
    monkeypatch.setattr(report, "write_text", lambda path, text: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        main([str(made_up_run)])


def test_report_of_nothing_is_a_mistake_of_the_command():
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2


@pytest.fixture()
def longer_run(made_up_run):
    """As the quick start: perplexity of the start, then one after training, and two RULER stages."""
    recipe = {
        "name": "longer",
        "sparsity": {"top_k": 16, "block_size": 32, "init": "pca"},
        "stages": [{"kind": kind} for kind in ("perplexity", "warmup", "sparse", "perplexity")],
    }
    (made_up_run / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    folder = made_up_run / "eval"
    start = json.loads((folder / "perplexity/stage-3.json").read_text(encoding="utf-8"))
    start |= {"stage": 0, "after": []}
    for arm in ("original_dense", "converted_oracle-k16"):
        start["arms"].pop(arm)
    start["arms"]["converted_sparse-k16"]["perplexity"] = 29.5
    start["comparisons"] = start["comparisons"][-1:]
    start["comparisons"][0]["change_pct"] |= {"estimate": 21.75, "low": 20.5, "high": 23.25}
    (folder / "perplexity/stage-0.json").write_text(json.dumps(start), encoding="utf-8")
    second = json.loads((folder / "ruler/stage-4.json").read_text(encoding="utf-8"))
    second |= {"stage": 5, "samples": 3, "tasks": ["vt", "fwe"], "skipped": []}
    for arm, mean in zip(second["arms"].values(), (75.0, 72.5), strict=True):
        cell = arm["scores"]["1024"].pop("niah_single_1") | {"samples": 3}
        arm["scores"]["1024"] = {"fwe": {**cell, "score": mean}, "vt": {**cell, "score": mean}}
        arm["means"] = {"1024": mean}
    entry = second["comparisons"][0]["lengths"][0]
    entry["lost"] |= {"estimate": 2.5, "low": 1.5, "high": 3.5, "samples": 6}
    entry["tasks"] = [{**entry["tasks"][0], "task": name} for name in ("fwe", "vt")]
    (folder / "ruler/stage-5.json").write_text(json.dumps(second), encoding="utf-8")
    return made_up_run


def test_every_ruler_stage_behind_training_is_told_with_its_tasks(longer_run):
    files = write_report(longer_run)
    page = files["markdown"].read_text(encoding="utf-8")
    top = page.split("\n## ")[0]
    minus = "\N{MINUS SIGN}"
    assert "**Reading 16 blocks of 32 tokens instead of all, the converted model loses 2.5" in top
    assert "loses 2.5 points of the RULER mean of vt and fwe at 1K tokens" in top
    assert "loses 16.8 points of RULER niah_single_1 at 1K tokens" in top
    for card in (
        f"**{minus}16.8** points, RULER niah_single_1 at 1K, k = 16 (83.4 to 66.6; "
        f"95 % interval {minus}17.8 to {minus}15.8)",
        f"**{minus}2.5** points, RULER mean of vt and fwe at 1K, k = 16 (75.0 to 72.5; ",
    ):
        assert f"- {card}" in top, card
    for words in (
        "RULER niah_single_1: points lost at 1024 tokens",
        "RULER mean of vt and fwe: points lost at 1024 tokens",
        "RULER niah_single_1 (6 prompts a task): no single cell differs",
        "RULER mean of vt and fwe (3 prompts a task): no single cell differs",
        "RULER mean of vt and fwe: ruler-pd, not comparable with published scores. With 3 prompts a task",
        "Answers lost with sparse attention at k = 16: niah_single_1",
    ):
        assert words in page, words
    assert "RULER mean at" not in page and "mean over tasks" not in page
    table = files["csv"].read_text(encoding="utf-8")
    assert "mean of fwe + vt" in table and ",mean," not in table


def test_start_before_training_is_shown_by_name_and_not_as_the_result(longer_run):
    page = write_report(longer_run)["markdown"].read_text(encoding="utf-8")
    assert "before training: closed-form start; 8 held-out rows" in page
    assert "before training: closed-form start; per cent of perplexity" in page
    assert "after 1-warmup, 2-sparse; per cent of perplexity" in page
    assert (
        "Before training, the closed-form start had moved perplexity by +21.75 % "
        "(+20.50 to +23.25 %) at k = 16." in page
    )
    assert "Reading 16 of 32 blocks, perplexity is 1.57 % higher" in page
    assert "**+1.57 %** perplexity, k = 16 (24.22 to 24.33; " in page and "29.50 " not in page


def test_verdict_of_an_unfinished_run_says_what_was_measured(longer_run):
    for path in ("perplexity/stage-3.json", "ruler/stage-4.json", "ruler/stage-5.json"):
        (longer_run / "eval" / path).unlink()
    page = write_report(longer_run)["markdown"].read_text(encoding="utf-8")
    assert (
        "Measured before training: closed-form start, not yet at the end of training. "
        "Reading 16 of 32 blocks, perplexity is 21.75 % higher" in page
    )


def test_budget_of_the_measured_checkpoint_goes_before_the_recipes(made_up_run):
    path = made_up_run / "eval" / "perplexity" / "stage-3.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    result["checkpoint_top_k"] = 8
    result["arms"]["converted_sparse-k8"] = {**result["arms"]["converted_sparse-k16"]}
    result["comparisons"].append({**result["comparisons"][-1], "second": "converted_sparse-k8"})
    path.write_text(json.dumps(result), encoding="utf-8")
    page = write_report(made_up_run)["markdown"].read_text(encoding="utf-8")
    assert "Reading 8 of 32 blocks, perplexity is" in page
    assert "Reading 16 blocks of 32 tokens instead of all" in page, "the only budget it measured"


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (-3.2, 7.9), (0.9371, 0.9412), (10.0, 250_000.0)]
)
def test_ticks_are_inside_and_few(low, high):
    marks = ticks(low, high)
    assert 2 <= len(marks) <= 12
    assert all(low <= mark <= high for mark in marks)


def test_charts_of_one_point_or_equal_values_have_finite_coordinates():
    one = line_chart([Series("a", [(5.0, 2.0)])], x_label="x", y_label="y")
    flat = line_chart([Series("a", [(0.0, 0.0), (1.0, 0.0)])], x_label="x", y_label="y")
    bars = interval_chart([Bar("none", 0.0, 0.0, 0.0)], x_label="x")
    for svg in (one, flat, bars):
        assert svg.startswith("<svg") and "nan" not in svg and "inf" not in svg


def test_difference_that_rounds_to_zero_has_no_sign():
    assert (signed(-0.001), signed(0.0), signed(-0.01), signed(0.5, 1)) == (
        "0.00",
        "0.00",
        "\N{MINUS SIGN}0.01",
        "+0.5",
    )


def test_mark_outside_of_the_curve_is_not_drawn():
    points = [(40.0, 1.0), (80.0, 2.0)]
    chart = line_chart(
        [Series("a", points)], x_label="x", y_label="y", marks=[(2.0, "early"), (60.0, "inside")]
    )
    assert "inside" in chart and "early" not in chart


def test_doubling_axis_puts_equal_ratios_at_equal_distances():
    points = [(128.0, 1.0), (256.0, 1.5), (512.0, 2.0)]
    chart = line_chart([Series("a", points)], x_label="x", y_label="y", doubling=True)
    one, two, three = (float(x) for x in re.findall(r'<circle cx="([\d.]+)"', chart))
    assert two - one == pytest.approx(three - two, abs=0.2)


def test_band_goes_around_every_interval():
    points = [(1.0, 1.0), (2.0, 2.0)]
    chart = line_chart(
        [Series("a", points, band=[(0.5, 1.5), (1.5, 2.5)])], x_label="x", y_label="y"
    )
    outline = re.search(r'<polygon class="band"[^>]*points="([^"]+)"', chart)
    assert outline and len(outline[1].split()) == 4
