"""The whole page on an invented run that has everything: each block, its numbers, what a file less does."""

from __future__ import annotations

import csv
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from dense2sparse.eval.report import write_report
from dense2sparse.eval.report_arithmetic import dense_per_token, sparse_per_token

WRITE = runpy.run_path(str(Path(__file__).with_name("report_run.py")))["write"]
RULER = "eval/ruler/stage-4.json"
PERPLEXITY = "eval/perplexity/stage-3.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Files by name of the invented run, made once."""
    folder = WRITE(tmp_path_factory.mktemp("invented"), samples=12)
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in files}


@pytest.fixture()
def page(source, tmp_path):
    """Report of the run with some files changed (a function of their JSON) or left out (None)."""

    def make(changes=None):
        for name, text in source.items():
            change = (changes or {}).get(name, lambda content: content)
            if change is None:
                continue
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".json"):
                content = json.loads(text)
                text = json.dumps(change(content) or content)
            (tmp_path / name).write_text(text, encoding="utf-8")
        return {
            kind: path.read_text(encoding="utf-8") for kind, path in write_report(tmp_path).items()
        }

    return make


SECTIONS = {
    "RULER": [RULER],
    "Needles: depth, and whether their block was selected": [RULER],
    "LongBench": ["eval/longbench/stage-5.json"],
    "Short tasks of lm-eval": [
        f"eval/lm-eval/{arm}/short.json"
        for arm in ("original_dense", "converted_dense", "converted_sparse-k16")
    ],
    "Perplexity on held-out text": ["eval/perplexity/stage-3.json"],
    "Quality against budget": [RULER, "eval/perplexity/stage-3.json"],
    "Index branch: learned coverage after each stage": ["metrics.jsonl"],
    "Outputs that were truncated, empty or at their limit": [RULER, "eval/longbench/stage-5.json"],
}


@pytest.mark.parametrize("kind", ["html", "markdown"])
def test_every_section_is_there(page, kind):
    text = page()[kind]
    for title in SECTIONS:
        assert (f"<h2>{title}</h2>" if kind == "html" else f"## {title}\n") in text, title


@pytest.mark.parametrize("title", SECTIONS)
def test_section_without_its_files_is_left_out(page, title):
    made = page(dict.fromkeys(SECTIONS[title]))
    assert f"## {title}\n" not in made["markdown"] and f"<h2>{title}</h2>" not in made["html"]


def without_what_is_new(content):
    """A RULER or perplexity result as an earlier version wrote it."""
    for name in ("margin", "positions", "corpus"):
        content.pop(name, None)
    for arm in content["arms"].values():
        for name in ("depths", "needles", "costs", "positions", "row_positions", "shape", "ruler"):
            arm.pop(name, None)
        for cells in arm.get("scores", {}).values():
            for cell in cells.values():
                for name in ("truncated", "at_limit"):
                    del cell[name]
    for pair in content["comparisons"]:
        pair.pop("overall", None)
        pair.get("change_pct", {}).pop("by_position", None)
        for flip in pair.get("flips", []):
            del flip["recall"]


def test_results_of_an_earlier_version_leave_blocks_out_and_are_not_recorded_as_none(page):
    older = dict.fromkeys((RULER, PERPLEXITY), without_what_is_new)
    text = page({**older, "eval/longbench/stage-5.json": None})["markdown"]
    assert "Positions" not in text and "wAvg" not in text
    assert "## Needles" not in text and "Perplexity by position" not in text
    assert "| not recorded | " in text and "arithmetic" in text
    assert "within the margin" not in text
    assert re.search(r"\| k = 16 \|  \| [\d.]+ \| [\d.]+ \| [^|]+ \|  \|  \|", text)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("non-inferior", "which is within the margin of 2.5 points"),
        ("inferior", "which is beyond the margin of 2.5 points"),
        ("undecided", "too few answers to say whether that is within the margin of 2.5 points"),
    ],
)
def test_first_sentence_has_loss_interval_margin_and_causes(page, said, words):
    lost = {"estimate": 7.04, "low": 3.06, "high": 11.94, "samples": 432, "confidence": 0.95}

    def change(content):
        content["margin"] = 2.5
        for pair in content["comparisons"]:
            if pair["meaning"] == "whole conversion":
                pair["overall"] |= {"lost": lost, "verdict": said, "unseen_share": None}
            if pair["meaning"] == "training drift":
                pair["overall"] |= {"lost": {**lost, "estimate": -0.04, "low": -1.0, "high": 1.0}}
                pair["overall"]["unseen_share"] = None

    made = page({RULER: change})
    first, causes = made["markdown"].split("**")[1:3]
    assert first.startswith(
        "Converted to read 16 blocks of 128 tokens, the model loses 7.0 points of the RULER mean of 6 "
        "tasks at 4K, 16K and 32K tokens (95 % interval 3.1 to 11.9, 432 paired answers), "
    )
    assert first.endswith(f"{words}.") and first.count(". ") == 0
    drift = (
        "training drift 0.0 (\N{MINUS SIGN}1.0 to 1.0; training moved the weights), budget cost "
    )
    assert f"By cause: {drift}" in causes and "only the best 16 blocks are read)" in causes
    tone = {"non-inferior": "good", "inferior": "bad", "undecided": "open"}[said]
    assert f'<div class="verdict {tone}">' in made["html"]


def test_gain_is_not_called_a_loss(page):
    lost = {"estimate": -0.5, "low": -1.5, "high": 0.5, "samples": 432, "confidence": 0.95}

    def change(content):
        for pair in content["comparisons"]:
            if pair["meaning"] == "whole conversion":
                pair["overall"] |= {"lost": lost, "unseen_share": None}

    first = page({RULER: change})["markdown"].split("**")[1]
    assert "the model gains 0.5 points of the RULER mean" in first
    assert "(95 % interval of what is lost \N{MINUS SIGN}1.5 to 0.5, 432 paired answers)" in first


def test_uninformative_cells_are_marked_and_no_others(page, source):
    arms = json.loads(source[RULER])["arms"]
    shown = ("converted_dense", "converted_sparse-k16")
    cells = [cell for arm in arms.values() for by in arm["scores"].values() for cell in by.values()]
    maps = [cell for name in shown for by in arms[name]["scores"].values() for cell in by.values()]
    pairs = json.loads(source[RULER])["comparisons"]
    kind = ("cost of sparsity", "converted_sparse-k16")
    pair = next(one for one in pairs if (one["meaning"], one["second"]) == kind)
    both = [task for entry in pair["lengths"] for task in entry["tasks"] if task["uninformative"]]
    expected = sum(cell["uninformative"] for cell in cells + maps) + len(both)
    ruler = page()["html"].split("<h2>RULER</h2>")[1].split("<h2>")[0]
    assert len(re.findall(r'<td class="[a-z ]*moot"', ruler)) == expected > len(both) > 0


def test_grid_of_depths_shows_the_stored_scores(page):
    def change(content):
        for label, arm in content["arms"].items():
            arm["depths"] = {"4096": [{"depth": 0.3, "score": 37.0, "samples": 5}]}
            if label == "converted_sparse-k16":
                arm["depths"]["131072"] = [{"depth": 0.9, "score": 12.4, "samples": 3}]

    text = page({RULER: change})["markdown"]
    assert "| 30 to 40 % | 37 |  |" in text and "| 90 to 100 % |  | 12 |" in text
    assert "| depth | 4K | 128K |" in text and "| 0 to 10 % |  |  |" in text


def test_flipped_answers_stand_side_by_side_with_what_was_selected(page, source):
    pairs = json.loads(source[RULER])["comparisons"]
    kind = ("cost of sparsity", "converted_sparse-k16")
    pair = next(one for one in pairs if (one["meaning"], one["second"]) == kind)
    flip = pair["flips"][0]
    made = page()
    found = re.search(
        rf"<code>{flip['id']}</code> wanted <b>(\d+)</b></p>(.*?)</div></div></div>",
        made["html"],
        re.S,
    )
    assert found and found[1] == flip["references"][0]
    assert "B converted, dense" in found[2] and "C converted, sparse, k = " in found[2]
    share = f"{100 * flip['recall'][1]:.0f}"
    assert f"needle&#x27;s block selected in {share} %" in made["html"]
    assert f"  B converted, dense (100): {flip['first'].strip()}" in made["markdown"]


def test_outputs_are_counted_from_the_cells(page, source):
    cells = [
        cell
        for by in json.loads(source[RULER])["arms"]["converted_sparse-k4"]["scores"].values()
        for cell in by.values()
    ]
    total, limit = (sum(cell[name] for cell in cells) for name in ("samples", "at_limit"))
    row = f"| RULER, stage 4: C converted, sparse, k = 4 | {total} | 0 | "
    assert row in page()["markdown"]
    assert f"| {limit} ({100 * limit / total:.1f} %) |" in page()["markdown"]


def test_longbench_names_what_is_missing_and_gives_no_average_then(page):
    text = page()["markdown"]
    assert (
        "Not measured: LongBench, vcsum (scored over Chinese words, `pip install jieba`)." in text
    )
    assert "no average, as published ones need narrativeqa" in text
    assert "average of the six" not in text and "Not measured: LongBench (" not in text


def test_same_numbers_stand_in_csv_once_each(page, source):
    rows = list(csv.DictReader(page()["csv"].splitlines()))
    keys = [tuple(row[name] for name in list(row)[:6]) for row in rows]
    assert len(set(keys)) == len(keys)
    arms = json.loads(source[RULER])["arms"]
    score = arms["converted_sparse-k16"]["scores"]["32768"]["vt"]["score"]
    key = ("ruler", "4", "32768", "vt", "converted_sparse-k16", "score")
    assert float(dict(zip(keys, rows, strict=True))[key]["value"]) == score
    kinds = {row["kind"] for row in rows}
    assert kinds == {"perplexity", "ruler", "longbench", "lm-eval"}
    assert any("at positions 16384 to 32768" in row["measure"] for row in rows)


def test_report_code_imports_neither_torch_nor_transformers():
    check = (
        "import sys, dense2sparse.eval.report; "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_map_of_changes_has_losses_negative_and_tinted_as_worse(page):
    def change(content):
        for pair in content["comparisons"]:
            for entry in pair["lengths"]:
                for task in entry["tasks"]:
                    task["uninformative"] = False
                    task["lost"] |= {"estimate": 0.0, "low": -1.0, "high": 1.0}
                    if (task["task"], entry["length"]) == ("vt", 16384):
                        task["lost"] |= {"estimate": 10.0, "low": 4.0, "high": 15.0}
                    if (task["task"], entry["length"]) == ("cwe", 16384):
                        task["lost"] |= {"estimate": -5.0, "low": -9.0, "high": -2.0}

    html = page({RULER: change})["html"]
    minus = "\N{MINUS SIGN}"
    lost = f'class="heat worse" style="--heat:50%"[^>]*>{minus}10.0<small>{minus}15.0 to {minus}4.0'
    assert len(re.findall(lost, html)) == 1
    won = r'class="heat" style="--heat:25%"[^>]*>\+5.0<small>\+2.0 to \+9.0'
    assert len(re.findall(won, html)) == 1


@pytest.mark.parametrize(
    ("moot", "words"),
    [
        (0, None),
        (8, None),
        (
            9,
            "But 9 of its 18 cells can hardly show a loss: both arms are below 10 or above 99 there.",
        ),
        (18, "But every one of its cells can hardly show a loss:"),
    ],
)
def test_verdict_warns_of_cells_that_cannot_show_a_loss(page, moot, words):
    def change(content):
        for pair in content["comparisons"]:
            pair["overall"]["uninformative"] = moot

    top = page({RULER: change})["markdown"].split("\n- ")[0]
    assert (f"\n\n{words}" in top) if words else "hardly" not in top


def test_cause_that_changed_no_answer_is_told_as_none(page):
    def change(content):
        for pair in content["comparisons"]:
            pair["overall"]["unseen_share"] = 0.01 if pair["meaning"] == "indexer error" else None

    def same(content):
        for pair in content["comparisons"]:
            pair["overall"]["unseen_share"] = 0.01

    assert "indexer error none." in page({RULER: change})["markdown"].split("\n- ")[0]
    assert "By cause" not in page({RULER: same})["markdown"].split("\n- ")[0]


def test_positions_are_told_once_where_all_stages_had_the_same(page):
    def other(content):
        content["positions"] = {"window": 8192, "rope": None}

    text = page()["markdown"]
    assert "Positions: window 32768, yarn, factor 4, the same in every arm." in text
    text = page({RULER: other})["markdown"]
    assert "Positions in ruler (stage 4): window 8192, the same in every arm." in text
    assert "Positions in perplexity (stage 3) and longbench (stage 5): window 32768, yarn" in text


def test_probe_during_training_is_a_curve_a_task_and_its_seconds_are_not(page):
    html = page()["html"].split("<h2>Training</h2>")[1].split("</section>")[0]
    chart = next(part for part in html.split("<figure") if "Probe during training" in part)
    assert chart.count("<polyline") == 3 and "probe_s" not in html
    for task in ("niah_single_2", "niah_multikey_3", "vt"):
        assert f"</i>{task}</span>" in chart


def test_rulers_own_figures_stand_beside_the_means_and_say_what_they_lack(page, source):
    own = json.loads(source[RULER])["arms"]["converted_dense"]["ruler"]
    text = page()["markdown"]
    columns = "|  | 4K | 16K | 32K | wAvg (inc) | wAvg (dec) | effective length |"
    row = f"| {own['wavg_inc']:.1f} | {own['wavg_dec']:.1f} | below 4K |"
    assert columns in text and row in text
    lacks = "the data is not NVIDIA's and not every length has all 13 tasks."
    assert f"They do not compare with published ones: {lacks}" in text

    def complete(content):
        content["corpus"] = "nvidia"
        for arm in content["arms"].values():
            arm["ruler"] |= {"all_tasks": True, "effective_length": 32768}

    text = page({RULER: complete})["markdown"]
    assert "| 32K (or more) |" in text and "They do not compare" not in text


def test_first_screen_has_losses_savings_and_a_picture_with_the_margin(page, source):
    arms = json.loads(source[RULER])["arms"]
    pairs = json.loads(source[RULER])["comparisons"]
    kind = ("whole conversion", "converted_sparse-k16")
    pair = next(one for one in pairs if (one["meaning"], one["second"]) == kind)
    made = page()
    top = made["markdown"].split("\n## ")[0]
    ends = [
        sum(cell["score"] for by in arms[label]["scores"].values() for cell in by.values()) / 18
        for label in ("original_dense", "converted_sparse-k16")
    ]
    lost = pair["overall"]["lost"]
    minus = "\N{MINUS SIGN}"
    assert lost["estimate"] == pytest.approx(ends[0] - ends[1])
    card = f"- **{minus}{lost['estimate']:.1f}** points, RULER mean of 6 tasks, k = 16 ("
    card += f"{ends[0]:.1f} to {ends[1]:.1f}; 95 % interval {minus}{lost['high']:.1f} to "
    assert card in top
    shape = arms["converted_sparse-k16"]["shape"]
    share = sparse_per_token(shape, 32768, 16) / dense_per_token(shape, 32768)
    assert f"- **{100 * share:.0f} %** of dense attention's operations at 32K, k = 16 (" in top
    for name in ("LongBench mean of 6 tasks", "LongBench-E qasper_e", "LongBench v2"):
        assert f"** points, {name}, k = 16 (" in top
    picture = made["html"].split("<nav>")[0].split("<figure>")[1]
    names = re.findall(r'class="row"[^>]*>([^<]+)<', picture)
    assert names == [
        *(f"RULER at {n}" for n in ("4K", "16K", "32K")),
        "RULER, all lengths",
        "LongBench",
        "LongBench-E",
        "LongBench v2",
    ]
    assert picture.count('<line class="mark"') == 1 and "the margin of 1 (dashed)" in picture


def test_operations_of_longbench_are_those_of_its_mean_prompt(page, source):
    def two_budgets(content):
        for label in ("converted_sparse", "converted_oracle"):
            content["arms"][f"{label}-k4"] = content["arms"][f"{label}-k16"]
        for arm in content["arms"].values():
            arm["shape"] = json.loads(source[RULER])["arms"]["converted_dense"]["shape"]
            cost = {"prompt_tokens": 8000.4, "prefill_s": 0.5, "s_per_new_token": 0.02}
            arm["costs"] = {"16384": cost}

    text = page({"eval/longbench/stage-5.json": two_budgets})["markdown"]
    shape = json.loads(source[RULER])["arms"]["converted_dense"]["shape"]
    share = 100 * sparse_per_token(shape, 8000, 4) / dense_per_token(shape, 8000)
    line = next(
        one for one in text.split("LongBench; seconds")[1].splitlines() if "16K, k = 4" in one
    )
    assert line.endswith(f" | {share:.0f} % | 0.5, 0.02 |")


def test_training_table_has_first_and_last_value_of_each_stage(page, source):
    records = [json.loads(line) for line in source["metrics.jsonl"].splitlines()]
    values = {
        n: [one["train/loss_kl"] for one in records if one["stage_index"] == n] for n in (1, 2)
    }
    cells = " | ".join(f"{many[-1]:.4g} ({many[0]:.4g})" for many in values.values())
    text = page()["markdown"]
    assert "| measure | 1-warmup | 2-sparse |" in text
    assert f"| train/loss_kl (KL) | {cells} |" in text
    assert "| probe/vt (vt) | " in text
