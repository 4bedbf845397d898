"""The stages that answer prompts: RULER and LongBench in every arm, needle blocks, tables from files."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from dense2sparse.eval import benchmarks, models, score, stages
from dense2sparse.eval.longbench_templates import Template
from dense2sparse.eval.progress import Speed
from dense2sparse.eval.ruler_corpus import PUBLIC_DOMAIN, Corpus
from dense2sparse.eval.wandb_tables import stage_tables

HERE = Path(__file__).parent
LONGBENCH_ROWS = runpy.run_path(str(HERE / "longbench_rows.py"))
STAGES = """
  - {kind: ruler, tasks: [niah_single_1], lengths: [512], samples: 2, top_k: [4, 64]}
  - {kind: longbench, folder: {home}/longbench, max_length: 600, tasks: [qasper, trec]}
"""


@pytest.fixture(scope="module")
def home(answering, tmp_path_factory, tokenizer):
    home = tmp_path_factory.mktemp("benchmarks")
    answering.build_home(home, answering.lively_model(), tokenizer, stages=STAGES)
    (home / "longbench").mkdir()
    return home


@pytest.fixture()
def context(answering, home, tmp_path):
    return lambda **changes: answering.context(home, tmp_path / "run", **changes)


@pytest.fixture(autouse=True)
def no_network(monkeypatch, ruler_like_words, works):
    """RULER's words are the made-up ones, with answers of four tokens."""
    templates = {
        family: replace(template, new_tokens=4)
        for family, template in ruler_like_words.templates.items()
    }
    corpus = Corpus(PUBLIC_DOMAIN, replace(ruler_like_words, templates=templates), works)
    monkeypatch.setattr(benchmarks, "read_corpus", lambda name, cache, **wanted: corpus)


def stage_of(context, kind):
    return next(stage for stage in context.recipe.stages if stage.kind == kind)


def test_ruler_scores_every_arm_on_the_same_prompts(context):
    logged = {}
    ctx = context(log=logged.update)
    result = stages.run_stage(ctx, stage_of(ctx, "ruler"))
    assert result["label"] == "ruler-pd, not comparable with published scores"
    assert list(result["arms"]) == [
        "original_dense",
        "converted_dense",
        "converted_sparse-k4",
        "converted_oracle-k4",
        "converted_sparse-k64",
        "converted_oracle-k64",
    ]
    folders = sorted((ctx.run_dir / "eval/ruler/predictions").glob("*/*/rank-0-of-1.jsonl"))
    said = {path.parent.name.rsplit("-", 2)[0]: path.read_text("utf-8") for path in folders}
    texts = {
        label: [json.loads(line)["prediction"] for line in said[label].splitlines()]
        for label in said
    }
    assert texts["original_dense"] == texts["converted_dense"] == texts["converted_sparse-k64"]
    assert texts["converted_dense"] == texts["converted_oracle-k64"]
    assert "eval/ruler/512/niah_single_1/converted_sparse-k4" in logged


def test_ruler_tasks_that_do_not_fit_are_told_and_a_stage_of_them_is_not_measured(
    context, ruler_like_words, works, monkeypatch, capsys
):
    long = {
        family: replace(template, new_tokens=600)
        for family, template in ruler_like_words.templates.items()
    }
    corpus = Corpus(PUBLIC_DOMAIN, replace(ruler_like_words, templates=long), works)
    monkeypatch.setattr(benchmarks, "read_corpus", lambda name, cache, **wanted: corpus)
    monkeypatch.setattr(models, "load", None)
    ctx = context()
    result = stages.run_stage(ctx, stage_of(ctx, "ruler"))
    reason = "niah_single_1 needs 600 tokens in its smallest form, 512 are given"
    assert (result["measured"], result["reason"]) == (False, reason)
    assert result["skipped"] == [{"task": "niah_single_1", "length": 512, "reason": reason}]
    assert f"ruler: left out: {reason}" in capsys.readouterr().out
    assert not list(ctx.run_dir.rglob("predictions*")), "no empty predictions"
    assert stage_tables(result, {}) == {}


def test_longbench_without_records_is_recorded_as_not_measured(context):
    ctx = context()
    result = stages.run_longbench(ctx, stage_of(ctx, "longbench"))
    assert result["measured"] is False and "hf download" in result["reason"]
    assert [entry["task"] for entry in result["missing"]] == ["qasper", "trec"]


def test_a_longbench_folder_that_is_not_there_is_refused_before_a_model_is_loaded(
    context, monkeypatch, home
):
    monkeypatch.setattr(models, "load_dense", None)
    ctx = context()
    stage = stage_of(ctx, "longbench").model_copy(update={"folder": str(home / "gone")})
    with pytest.raises(ValueError, match=r"longbench.folder=\S*gone is not a folder"):
        stages.run_longbench(ctx, stage)
    assert not list(ctx.run_dir.rglob("*.json")), "no result"


def test_longbench_is_answered_and_scored_where_records_lie(context, tmp_path, monkeypatch):
    template = Template("{context} Asked: {input} Answer:", 4)
    monkeypatch.setattr(
        benchmarks.longbench, "templates", lambda names, cache: dict.fromkeys(names, template)
    )
    rows = [LONGBENCH_ROWS["row_of"]("qasper", _id=f"r{place}") for place in range(3)]
    rows = [{**row, "context": "rain falls wind blows " * 20} for row in rows]
    rows[1]["context"] *= 20  # above max_length
    folder = LONGBENCH_ROWS["folder_of"](tmp_path / "records", qasper=rows)
    ctx = context()
    stage = stage_of(ctx, "longbench").model_copy(update={"folder": str(folder), "top_k": [4]})
    changed = [stage if known.kind == "longbench" else known for known in ctx.recipe.stages]
    logged = {}
    ctx = context(recipe=ctx.recipe.model_copy(update={"stages": changed}), log=logged.update)
    result = stages.run_stage(ctx, stage)
    assert result["measured"] and [one["task"] for one in result["missing"]] == ["trec"]
    assert len(result["arms"]) == 4 and len(result["comparisons"]) == 5
    arm = result["arms"]["converted_sparse-k4"]
    cell = arm["scores"]["600"]["qasper"]
    assert (cell["samples"], cell["truncated"]) == (3, 1)
    assert arm["longbench"]["tasks"]["qasper"]["score"] == pytest.approx(cell["score"])
    assert arm["needles"] is None and "eval/longbench/600/qasper/converted_dense" in logged
    home = ctx.folder("longbench") / "stage-1"
    assert score.main([str(home)]) == 0
    again = json.loads((home / "scores.json").read_text(encoding="utf-8"))
    assert again["comparisons"][0]["overall"] == result["comparisons"][0]["overall"]


def test_tables_are_made_again_from_the_stage_s_files_alone(context, capsys):
    ctx = context()
    result = stages.run_ruler(ctx, stage_of(ctx, "ruler"))
    home = ctx.folder("ruler") / "stage-0"
    assert score.main([str(home), "--margin", "2.0"]) == 0
    again = json.loads((home / "scores.json").read_text(encoding="utf-8"))
    assert again["comparisons"] == result["comparisons"]
    for label, arm in again["arms"].items():
        known = result["arms"][label]
        assert arm == {key: known[key] for key in arm}
        assert known["costs"]["512"]["peak_gib"] > 0 and known["costs"]["512"]["prefill_s"] > 0
    said = capsys.readouterr().out
    assert "training drift (original_dense - converted_dense): +0.00 points lost" in said


def test_needle_blocks_are_recorded_while_the_selecting_arms_answer(context):
    ctx = context()
    result = stages.run_ruler(ctx, stage_of(ctx, "ruler"))
    for label, arm in result["arms"].items():
        if not label.startswith(("converted_sparse", "converted_oracle")):
            assert arm["needles"] is None
            continue
        cell = arm["needles"]["lengths"]["512"]["niah_single_1"]
        assert list(arm["needles"]["layers"]) == ["1"], "layer 0 is dense"
        if label.endswith("k64"):
            assert cell["share"] == cell["kept"] == 1.0
        else:
            assert cell["kept"] < 0.3 and 0 <= cell["share"] <= cell["any"] <= 1


def test_predictions_of_another_checkpoint_are_refused_before_a_model_is_loaded(
    context, monkeypatch
):
    ctx = context()
    stage = stage_of(ctx, "ruler")
    stages.run_ruler(ctx, stage)
    monkeypatch.setattr(models, "load_dense", None)
    monkeypatch.setattr(models, "load", None)
    for note in ctx.folder("ruler").glob("predictions/*/converted_sparse-k4-*/arm.json"):
        known = json.loads(note.read_text(encoding="utf-8"))
        note.write_text(json.dumps({**known, "checkpoint": "0" * 64}), encoding="utf-8")
    with pytest.raises(ValueError, match="are of another checkpoint .000000000000"):
        stages.run_ruler(ctx, stage)


def test_estimate_is_told_as_each_arm_is_timed_and_not_when_all_is_there(
    context, capsys, monkeypatch
):
    # A dense arm takes 1 s an answer, one that selects 3 s.
    seconds = iter([1.0, 1.0, 3.0, 3.0])
    monkeypatch.setattr(benchmarks, "trial", lambda model, longest: Speed(0.0, next(seconds), 0.0))
    monkeypatch.setattr(Speed, "prompt_s", lambda speed, sample: speed.s_per_step)
    ctx = context()
    stage = stage_of(ctx, "ruler")
    stages.run_ruler(ctx, stage)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ruler")]
    assert sum("prompts, " in line for line in lines) == 6
    told = [line for line in lines if "answers in" in line]
    limit = " if every answer is as long as allowed"
    slower = " and no other arm is slower than original_dense"
    arms = ", up to 2 an arm on each of 1 ranks, about "
    assert told == [
        f"ruler: 12 answers in 6 arms{arms}12 s{limit}{slower}",
        f"ruler: 10 answers in 5 arms{arms}10 s{limit}{slower}, converted_dense",
        f"ruler: 8 answers in 4 arms{arms}24 s{limit}{slower}, converted_dense, converted_sparse",
        f"ruler: 6 answers in 3 arms{arms}18 s{limit}",
    ]
    assert lines.index(told[0]) == 0 and lines.index(told[2]) == 4, "before the arm's answers"
    stages.run_ruler(ctx, stage)
    assert "ruler" not in capsys.readouterr().out
