"""Evaluations in wandb: rows from hand-written results, and a real offline run that is read back."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from dense2sparse.eval import benchmarks, run, stages, wandb_tables
from dense2sparse.eval.ruler_corpus import PUBLIC_DOMAIN, Corpus
from dense2sparse.eval.wandb_evaluation import trained_tokens
from dense2sparse.eval.wandb_tables import curves, stage_tables

HERE = Path(__file__).parent
WANDB_FILE = runpy.run_path(str(HERE.parent / "wandb_file.py"))
TOKENS = 12345
ASKED = "{kind: ruler, tasks: [niah_single_1], lengths: [512], samples: 2"
STAGES = f"""  heldout: [{{name: other, kind: text, path: HOME/other.txt}}]
stages:
  - {{kind: perplexity, rows: 2, arms: [original_dense, converted_sparse]}}
  - {ASKED}, arms: [converted_dense, converted_sparse]}}
  - {{kind: report}}
train: {{precision: fp32}}
wandb: {{tags: [tiny]}}
"""
INTERVAL = {"estimate": 1.5, "low": -0.5, "high": 3.5, "samples": 8, "confidence": 0.95}


@pytest.fixture(scope="module")
def home(answering, tmp_path_factory, tokenizer, ruler_like_words, works):
    """A checkpoint as a run leaves it, measured once by `eval.run` with wandb offline."""
    home = tmp_path_factory.mktemp("wandb")
    answering.build_home(home, answering.lively_model(), tokenizer)
    recipe = home / "recipe.yaml"
    head = recipe.read_text("utf-8").partition("train:")[0]
    recipe.write_text(head + STAGES.replace("HOME", str(home)), encoding="utf-8")
    stage = home / "runs/earlier/stages/2-sparse"
    shutil.copytree(home / "converted", stage / "hf")
    (stage / "done.json").write_text(json.dumps({"stage_index": 2, "tokens": TOKENS}))
    (home / "other.txt").write_text(works["made-up"], encoding="utf-8")
    templates = {
        family: replace(template, new_tokens=4)
        for family, template in ruler_like_words.templates.items()
    }
    words = replace(ruler_like_words, templates=templates)
    corpus = Corpus(PUBLIC_DOMAIN, words, works)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
            patch.delenv(name, raising=False)
        patch.setenv("WANDB_DATA_DIR", str(home / "staging"))
        patch.setattr(benchmarks, "read_corpus", lambda name, cache, **wanted: corpus)
        assert evaluate(home) == 0
        yield home


def evaluate(
    home: Path,
    *overrides: str,
    checkpoint: str = "runs/earlier/stages/2-sparse/hf",
    output: str = "out",
) -> int:
    """The evaluation alone; a second one finds every answer and loads no model."""
    where = ["--checkpoint", str(home / checkpoint), "--output", str(home / output)]
    return run.main([str(home / "recipe.yaml"), *overrides, *where])


def offline_runs(home: Path, output: str = "out") -> list[Path]:
    """The `.wandb` files, oldest first."""
    found = home.glob(f"{output}/wandb/offline-run-*/*.wandb")
    return sorted(found, key=lambda file: file.stat().st_mtime)


@pytest.fixture(scope="module")
def recorded(home):
    """What the first evaluation recorded: the run, its points, its artifacts, its folder of files."""
    file = offline_runs(home)[0]
    found = list(WANDB_FILE["records"](file))
    by_kind = {kind: [] for kind in ("run", "artifact")}
    for record in found:
        kind = record.WhichOneof("record_type")
        if kind in by_kind:
            by_kind[kind].append(getattr(record, kind))
    return SimpleNamespace(
        run=by_kind["run"][0],
        config={item.key: item.value_json for item in by_kind["run"][0].config.update},
        points=WANDB_FILE["history"](file),
        artifacts={one.name: one for one in by_kind["artifact"] if one.type != "run_table"},
        files=file.parent / "files",
        id=file.stem.removeprefix("run-"),
    )


def logged(recorded, name):
    """The one point that has a name."""
    (point,) = [point for point in recorded.points if name in point]
    return point


def table(recorded, name):
    """Rows of a table as dictionaries."""
    content = json.loads((recorded.files / logged(recorded, name)[name]["path"]).read_text("utf-8"))
    return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


def test_the_run_says_what_it_evaluates(home, recorded):
    assert (recorded.run.job_type, recorded.run.project) == ("evaluation", "dense2sparse")
    assert recorded.run.run_group == "tiny" and list(recorded.run.tags) == ["tiny"]
    stage = json.loads((home / "out/eval/ruler/stage-1.json").read_text("utf-8"))
    assert json.loads(recorded.config["checkpoint"]) == stage["checkpoint"]
    assert json.loads(recorded.config["name"]) == "tiny"


def test_every_point_stands_at_the_tokens_of_the_checkpoint(recorded):
    assert {point["tokens"] for point in recorded.points} == {TOKENS}
    names = {name for point in recorded.points for name in point}
    assert "eval/ruler/512/niah_single_1/converted_dense" in names
    assert "eval/ruler/512/mean/converted_sparse-k4" in names
    assert "eval/ruler/points_lost/cost_of_sparsity/converted_sparse-k4" in names
    assert "eval/perplexity/change_pct/whole_conversion/converted_sparse-k4" in names


def test_tables_hold_the_numbers_of_the_result_files(home, recorded):
    result = json.loads((home / "out/eval/ruler/stage-1.json").read_text("utf-8"))
    for row in table(recorded, "eval/ruler/stage-1/scores"):
        cell = result["arms"][row["arm"]]["scores"][str(row["length"])][row["task"]]
        assert (row["score"], row["samples"]) == (cell["score"], 2)
    (pair,) = result["comparisons"]
    total = table(recorded, "eval/ruler/stage-1/comparisons")[0]
    assert (total["length"], total["points_lost"]) == (None, pair["overall"]["lost"]["estimate"])
    rows = table(recorded, "eval/perplexity/stage-0/arms")
    assert [row["arm"] for row in rows] == ["original_dense", "converted_sparse-k4"]


def test_answers_stand_side_by_side_with_needle_recall(home, recorded):
    rows = table(recorded, "eval/ruler/stage-1/answers")
    said = home / "out/eval/ruler/stage-1/converted_sparse-k4/predictions.jsonl"
    for row, line in zip(rows, said.read_text("utf-8").splitlines(), strict=True):
        record = json.loads(line)
        assert row["id"] == record["id"] and row["references"] == record["references"][0]
        assert row["converted_sparse-k4 prediction"] == record["prediction"]
        assert row["converted_sparse-k4 needle recall"] == pytest.approx(record["needle"]["any"])
        assert "converted_dense prediction" in row and "converted_dense needle recall" not in row


def test_artifacts_hold_results_and_predictions_but_no_weights(home, recorded):
    assert recorded.artifacts.keys() == {"tiny-0-perplexity", "tiny-1-ruler", "tiny-report"}
    ruler = recorded.artifacts["tiny-1-ruler"]
    paths = {entry.path: Path(entry.local_path) for entry in ruler.manifest.contents}
    arms = ("converted_dense", "converted_sparse-k4")
    inside = {f"{arm}/{name}" for arm in arms for name in ("arm.json", "predictions.jsonl")}
    assert paths.keys() == {"stage-1.json", *inside}
    for name, path in paths.items():
        original = home / "out/eval/ruler" / ("" if name == "stage-1.json" else "stage-1") / name
        assert path.read_bytes() == original.read_bytes()
    result = json.loads((home / "out/eval/ruler/stage-1.json").read_text("utf-8"))
    metadata = json.loads(ruler.metadata)
    for key in ("kind", "stage", "checkpoint", "prompts"):
        assert metadata[key] == result[key]
    assert metadata["tokens"] == TOKENS and metadata["commit"]
    report = {entry.path for entry in recorded.artifacts["tiny-report"].manifest.contents}
    assert report == {"report.html", "report.md", "results.csv"}


def test_the_report_is_a_page_in_wandb(home, recorded):
    page = recorded.files / logged(recorded, "eval/report/html")["eval/report/html"]["path"]
    assert page.read_text("utf-8") == (home / "out/report.html").read_text("utf-8")


def test_the_same_evaluation_again_continues_its_wandb_run(home, recorded):
    assert evaluate(home) == 0
    again = offline_runs(home)[-1]
    assert again.stem == f"run-{recorded.id}" and len(offline_runs(home)) > 1
    points = WANDB_FILE["history"](again)
    assert [point.keys() - {"_timestamp", "_runtime"} for point in points] == [
        point.keys() - {"_timestamp", "_runtime"} for point in recorded.points
    ]


def test_another_checkpoint_is_another_wandb_run_and_unknown_tokens_are_said(
    home, recorded, capsys
):
    shutil.copytree(home / "converted", home / "foreign")
    config = json.loads((home / "foreign/config.json").read_text("utf-8"))
    (home / "foreign/config.json").write_text(json.dumps({**config, "note": "another"}))
    short = "stages=[{kind: perplexity, rows: 1, arms: [converted_dense]}]"
    assert evaluate(home, short, checkpoint="foreign", output="other") == 0
    other = offline_runs(home, "other")[-1]
    assert other.stem != f"run-{recorded.id}"
    assert {point["tokens"] for point in WANDB_FILE["history"](other)} == {0}
    assert "does not say how many tokens it was trained for" in capsys.readouterr().out


def test_an_evaluation_outlives_wandbs_own_process(home, monkeypatch, capsys):
    known, measure = (home / "out/eval/wandb.json").read_bytes(), stages.run_stage

    def kill_and_measure(ctx, stage):
        for child in psutil.Process().children():
            if "wandb-core" in child.name():
                child.kill()
                child.wait()
        return measure(ctx, stage)

    monkeypatch.setattr(stages, "run_stage", kill_and_measure)
    assert evaluate(home) == 0
    assert capsys.readouterr().err.count("warning: wandb failed") == 1
    assert (home / "out/eval/wandb.json").read_bytes() == known


def test_disabled_never_imports_wandb(home, monkeypatch):
    before = offline_runs(home)
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would raise
    assert evaluate(home, "wandb.mode=disabled") == 0
    assert offline_runs(home) == before


@pytest.mark.parametrize(
    ("place", "done", "tokens"),
    [
        ("stages/2-sparse/hf", {"tokens": 77}, 77),
        ("start/hf", {"original": "x"}, 0),
        ("stages/2-sparse/hf", None, None),
        ("models/hf", {"tokens": 77}, None),
    ],
)
def test_tokens_of_a_checkpoint_are_known_in_a_runs_folder_only(tmp_path, place, done, tokens):
    folder = tmp_path / place
    folder.mkdir(parents=True)
    if done is not None:
        (folder.parent / "done.json").write_text(json.dumps(done), encoding="utf-8")
    assert trained_tokens(folder) == tokens


def test_comparisons_have_a_row_for_everything_each_length_and_each_task():
    lost = {"lost": INTERVAL, "uninformative": 1, "verdict": "inconclusive"}
    task = {"task": "vt", "lost": INTERVAL, "p": 0.25, "p_holm": 0.5, "uninformative": True}
    pair = {"meaning": "indexer error", "first": "x", "second": "y", "overall": lost}
    pair["lengths"] = [{"length": 1024, **lost, "tasks": [task]}]
    columns, rows = wandb_tables.comparisons({"comparisons": [pair]})
    found = [dict(zip(columns, row, strict=True)) for row in rows]
    assert [(row["length"], row["task"]) for row in found] == [
        (None, None),
        (1024, None),
        (1024, "vt"),
    ]
    assert [row["verdict"] for row in found] == ["inconclusive", "inconclusive", None]
    assert [(row["p"], row["p_holm"]) for row in found] == [(None, None), (None, None), (0.25, 0.5)]
    assert {(row["points_lost"], row["low"], row["high"]) for row in found} == {(1.5, -0.5, 3.5)}

    other = {"overall": lost, "lengths": []}
    _, rows = wandb_tables.comparisons(
        {"comparisons": [{**pair, "suite": "v1", "suites": {"v2": other}}]}
    )
    assert [row[3] for row in rows] == ["v1", "v1", "v1", "v2"], "suites are judged apart"


def test_scores_tell_the_share_of_right_answers_with_its_interval():
    right = {"estimate": 0.5, "low": 0.25, "high": 0.75, "samples": 4}
    cell = {"score": 62.5, "samples": 4, "all_right": right, "uninformative": False}
    cell |= {"empty": 1, "at_limit": 2, "truncated": 3}
    arms = {"converted_dense": {"scores": {"2048": {"cwe": cell}}}}
    columns, rows = wandb_tables.scores({"arms": arms})
    (row,) = [dict(zip(columns, row, strict=True)) for row in rows]
    assert (row["arm"], row["length"], row["task"]) == ("converted_dense", 2048, "cwe")
    assert (row["score"], row["samples"], row["all_right_pct"]) == (62.5, 4, 50.0)
    assert (row["all_right_low"], row["all_right_high"]) == (25.0, 75.0)
    assert (row["empty"], row["at_limit"], row["truncated"]) == (1, 2, 3)


def record(number, task="vt", **changes):
    name = f"{task}/{number:05d}"
    head = {"id": name, "task": task, "length": 1024, "metric": "all", "references": ["seven"]}
    return name, {**head, "prediction": "seven", **changes}


def test_answers_are_capped_evenly_and_long_texts_are_cut(monkeypatch):
    monkeypatch.setattr(wandb_tables, "MOST_ANSWERS", 4)
    monkeypatch.setattr(wandb_tables, "LONGEST_TEXT", 3)
    many = dict(
        [*(record(n) for n in range(9)), *(record(n, "cwe") for n in range(9)), record(0, "fwe")]
    )
    columns, rows = wandb_tables.answers({"original_dense": many})
    found = [dict(zip(columns, row, strict=True)) for row in rows]
    assert [row["id"] for row in found] == ["cwe/00000", "fwe/00000", "vt/00000"]
    assert {row["original_dense prediction"] for row in found} == {"sev\N{HORIZONTAL ELLIPSIS}"}
    assert {row["original_dense score"] for row in found} == {100.0}, "the whole answer is scored"


def test_probe_tables_have_a_row_for_each_budget_and_layer():
    layers = {"coverage": {"2": 0.5, "10": 0.25}, "oracle_coverage": {"2": 0.75, "10": 0.5}}
    budget = {"top_k": 4, "loss": 3.5, "dense_loss": 3.25, "loss_gap": INTERVAL, "layers": layers}
    result = {"kind": "probe", "budgets": [budget], "needles": None}
    tables = stage_tables(result, {})
    assert tables["layers"].columns == ("top_k", "layer", "coverage", "oracle_coverage")
    assert tables["layers"].rows == [(4, 2, 0.5, 0.75), (4, 10, 0.25, 0.5)]
    assert tables["budgets"].rows == [(4, 3.25, 3.5, 1.5, -0.5, 3.5, 8)]
    needles = {"samples": 5, "scores": {"converted_dense": {"512": 80.0}}}
    assert stage_tables({**result, "needles": needles}, {})["needles"].rows == [
        ("converted_dense", 512, 80.0, 5)
    ]


def test_perplexity_tables_go_by_position():
    bucket = {"first": 128, "last": 256, "rows": 3, "tokens": 300, "perplexity": 9.0, "loss": 2.2}
    arm = {"perplexity": 10.0, "loss": 2.3, "positions": [bucket]}
    change = {**INTERVAL, "by_position": [{"first": 128, "last": 256, **INTERVAL, "estimate": 2.5}]}
    pair = {"meaning": "budget cost", "first": "x", "second": "y", "change_pct": change}
    result = {"kind": "perplexity", "rows": 3, "row_len": 256, "arms": {"y": arm}}
    result["comparisons"] = [pair]
    tables = stage_tables(result, {})
    assert tables["positions"].rows == [("y", 128, 256, 3, 300, 9.0, 2.2)]
    assert [row[3:6] for row in tables["comparisons"].rows] == [(None, None, 1.5), (128, 256, 2.5)]
    assert curves(result) == {
        "eval/perplexity/y": 10.0,
        "eval/perplexity/change_pct/budget_cost/y": 1.5,
    }


def test_curves_of_the_probe_are_its_coverage_and_its_needles():
    needles = {"task": "niah_single_2", "scores": {"converted_oracle-k4": {"1024": 75.0}}}
    budgets = [{"top_k": 4, "mean": {"oracle_coverage": 0.9}}, {"top_k": 8, "mean": {}}]
    result = {"kind": "probe", "budgets": budgets, "needles": needles}
    assert curves(result) == {
        "eval/probe/oracle_coverage/k4": 0.9,
        "eval/probe/1k/niah_single_2/converted_oracle-k4": 75.0,
    }
    assert list(curves({**result, "needles": None})) == ["eval/probe/oracle_coverage/k4"]


def test_longbench_categories_are_listed_by_suite():
    v1 = {"en": {"categories": {"code": 40.0}, "average": None, "missing": ["qasper"]}}
    buckets = {"0-4k": {"categories": {"code": 50.0}, "average": 50.0}}
    v2 = {"overall": {"score": 25.0, "samples": 4}, "easy": {"score": None}, "unreadable": 1}
    arms = {"x": {"longbench": {"v1": v1, "e": {"buckets": buckets}, "v2": v2}}}
    assert wandb_tables.categories({"arms": arms}).rows == [
        ("x", "v1", "en", "code", 40.0),
        ("x", "e", "0-4k", "code", 50.0),
        ("x", "e", "0-4k", "average", 50.0),
        ("x", "v2", "overall", None, 25.0),
    ]
    missed = {"kind": "longbench", "measured": False, "reason": "no records"}
    assert stage_tables(missed, {}) == {} and curves(missed) == {}
