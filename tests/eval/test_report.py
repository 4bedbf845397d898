"""The report: holds the numbers, needs no network, escapes what models say, refuses what is no run."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser

import pytest

from dense2sparse.eval.charts import Bar, Series, interval_chart, line_chart, ticks
from dense2sparse.eval.report import main, write_report
from dense2sparse.eval.report_results import signed


@pytest.fixture()
def written(made_up_run):
    return write_report(made_up_run)


class Balanced(HTMLParser):
    """Fails on a tag that is closed out of order."""

    VOID = frozenset({"meta", "line", "circle", "polyline", "br"})

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
        "Reading 16 of 32 blocks, perplexity is 1.57 % higher than with full attention "
        "(95 % interval +0.57 to +2.57 %), and the RULER mean at 1024 tokens is 16.8 points lower "
        "(95 % interval \N{MINUS SIGN}17.8 to \N{MINUS SIGN}15.8 points)." in page
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
    assert "no answer changed (up to 39 % could)" in page
    assert "the RULER mean at 1024 tokens is the same in all 6 answers" in page


@pytest.mark.parametrize("content", [None, "empty folder"])
def test_what_is_no_run_is_refused(tmp_path, content, capsys):
    folder = tmp_path / "nothing"
    if content:
        folder.mkdir()
    assert main([str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_damaged_result_is_refused_by_name(made_up_run, capsys):
    (made_up_run / "eval" / "ruler" / "stage-4.json").write_text("{", encoding="utf-8")
    assert main([str(made_up_run)]) == 2
    assert "stage-4.json is damaged" in capsys.readouterr().err


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
