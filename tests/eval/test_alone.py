"""`eval.run` before any model is loaded: which checkpoint, which stages, which recipes it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dense2sparse.eval import run
from dense2sparse.recipes.load import load, resolved

RECIPE = """
name: tiny
model: {path: dense}
sparsity: {block_size: 16, top_k: 4}
data:
  row_len: 128
  sources:
    - {name: prose, kind: text, path: prose.txt}
  heldout:
    - {name: other, kind: text, path: other.txt}
stages:
  - {kind: probe, rows: 2}
  - {kind: perplexity, rows: 3}
train: {precision: fp32}
"""


@pytest.fixture()
def recipe(tmp_path_factory):
    """A recipe's file."""
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    file.write_text(RECIPE, encoding="utf-8")
    return file


@pytest.mark.parametrize("module", ["run", "report"])
def test_recipes_and_reports_are_read_without_torch(module):
    check = f"import sys, dense2sparse.eval.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("sparsity.top_k=5", "sparsity.top_k was 4 and is 5"),
        ("model.revision=v2", "model.revision was null and is"),
        ("data.row_len=64", "data.row_len was 128 and is 64"),
        ("train.precision=bf16", "train.precision was"),
        ("stages.1.rows=2", "stages.1.rows was 3 and is 2"),
        ("data.cache_dir=elsewhere", "has no converted checkpoint"),
        ("train.log_every=3", "has no converted checkpoint"),
    ],
)
def test_another_recipe_is_not_measured_in_a_runs_folder(recipe, tmp_path, capsys, change, words):
    given = [str(recipe), f"output_dir={tmp_path}"]
    folder = tmp_path / "tiny"
    folder.mkdir()
    before = resolved(load(given[0], given[1:]))
    (folder / "recipe.json").write_text(json.dumps(before), encoding="utf-8")
    assert run.main([*given, change]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert [path.name for path in folder.iterdir()] == ["recipe.json"]


def test_mistakes_are_sentences_and_bugs_of_libraries_are_not(recipe, monkeypatch, capsys):
    def refuse(path, overrides):
        raise PermissionError(13, "Permission denied", str(path))

    given = str(recipe)
    monkeypatch.setattr(run, "load", refuse)
    assert run.main([given]) == 2
    error = capsys.readouterr().err
    assert "Permission denied" in error and error.count("\n") == 1
    monkeypatch.setattr(run, "load", lambda path, overrides: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        run.main([given])
    with pytest.raises(SystemExit) as end:
        run.main([])
    assert end.value.code == 2


def test_newest_checkpoint_is_the_last_finished_training_stage(tmp_path):
    for name in ("start/hf", "stages/1-warmup/hf", "stages/2-sparse/hf", "stages/10-sparse/hf"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text('{"sparse_attention_config": {}}')
    assert run.newest_checkpoint(tmp_path) == (tmp_path / "start/hf", -1)
    for name in ("1-warmup", "2-sparse"):
        (tmp_path / "stages" / name / "done.json").write_text("{}", encoding="utf-8")
    assert run.newest_checkpoint(tmp_path) == (tmp_path / "stages/2-sparse/hf", 2)


def test_newest_checkpoint_is_measured_only_by_the_stages_behind_it():
    kinds = [
        "probe",
        "perplexity",
        "warmup",
        "ruler",
        "sparse",
        "perplexity",
        "longbench",
        "report",
    ]
    recipe = SimpleNamespace(stages=[SimpleNamespace(kind=kind) for kind in kinds])
    assert run.stages_to_run(recipe, -1) == [0, 1]
    assert run.stages_to_run(recipe, 2) == [3]
    assert run.stages_to_run(recipe, 4) == [5, 6]
    assert run.stages_to_run(recipe, None) == [0, 1, 3, 5, 6]
    recipe.stages = recipe.stages[:3]
    with pytest.raises(ValueError, match="no evaluation stage behind the newest checkpoint"):
        run.stages_to_run(recipe, 2)


def test_a_mistake_on_one_rank_alone_is_told_too(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(run, "_SECONDS_FOR_RANK_0", 0)
    mark = tmp_path / "mark"
    given = ["--checkpoint", str(tmp_path / "gone"), "--mark", str(mark)]
    assert run.main([str(recipe), f"output_dir={tmp_path}", *given]) == 2
    assert capsys.readouterr().err.startswith("error on rank 1: --checkpoint ")
    assert not mark.exists()


@pytest.mark.parametrize(("own", "kept"), [(True, "new"), (False, "old")])
def test_a_folder_of_evaluations_is_described_by_the_newest(
    recipe, tmp_path, monkeypatch, own, kept
):
    for commit in ("old", "new"):
        monkeypatch.setattr("dense2sparse.eval.commit.repository_commit", lambda said=commit: said)
        run._describe(tmp_path, load(recipe, [f"train.seed={len(commit)}"]), own_folder=own)
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["commit"] == kept
