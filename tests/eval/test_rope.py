"""`model.rope` in an evaluation: one scaling in all four arms, in the results, and refusals without it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml

from dense2sparse.eval import benchmarks, run
from dense2sparse.eval.ruler_corpus import PUBLIC_DOMAIN, Corpus
from dense2sparse.model import convert
from dense2sparse.model.original import stretched
from dense2sparse.recipes.load import load
from dense2sparse.recipes.schema import Rope

STAGES = "  - {kind: ruler, tasks: [niah_single_1], lengths: [1024], samples: 1, top_k: [64]}"
ROPE = "model.rope={type: yarn, factor: 2}"


@pytest.fixture(scope="module")
def home(answering, tmp_path_factory, tokenizer):
    """A dense model with a window of 512 tokens, its conversion, and a recipe that asks for 1024."""
    home = tmp_path_factory.mktemp("rope")
    model = answering.lively_model()
    model.config.max_position_embeddings = 512
    answering.build_home(home, model, tokenizer, stages=STAGES)
    recipe = load(home / "recipe.yaml")
    long = stretched(home / "dense", Rope(factor=2), recipe.data.cache_dir)
    block = json.loads((home / "converted/config.json").read_text())[convert.CONFIG_KEY]
    config = json.loads((long / "config.json").read_text()) | {convert.CONFIG_KEY: block}
    (home / "long").mkdir()
    for file in (home / "converted").iterdir():
        (home / "long" / file.name).write_bytes(file.read_bytes())
    (home / "long/config.json").write_text(json.dumps(config))
    return home


@pytest.fixture(autouse=True)
def no_network(monkeypatch, ruler_like_words, works):
    """RULER's words are the made-up ones, with answers of three tokens."""
    templates = {
        family: replace(template, new_tokens=3)
        for family, template in ruler_like_words.templates.items()
    }
    corpus = Corpus(PUBLIC_DOMAIN, replace(ruler_like_words, templates=templates), works)
    monkeypatch.setattr(benchmarks, "read_corpus", lambda name, cache, **wanted: corpus)


def measure(home, checkpoint, output, *changes):
    given = ["--checkpoint", str(home / checkpoint), "--output", str(output)]
    return run.main([str(home / "recipe.yaml"), *given, *changes])


def test_a_length_above_the_window_is_refused_with_the_key_that_allows_it(home, tmp_path, capsys):
    assert measure(home, "converted", tmp_path) == 2
    error = capsys.readouterr().err
    assert "1024 is above the model's window of 512" in error and "model.rope" in error
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize(("checkpoint", "changes"), [("long", []), ("converted", [ROPE])])
def test_an_arm_with_other_positions_is_refused(home, tmp_path, capsys, checkpoint, changes):
    assert measure(home, checkpoint, tmp_path, *changes) == 2
    assert "was made with other positions" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.jsonl"))


def test_all_arms_answer_above_the_old_window_and_say_by_what_factor(home, tmp_path):
    assert measure(home, "long", tmp_path, ROPE) == 0
    result = json.loads((tmp_path / "eval/ruler/stage-0.json").read_text())
    rope = result["positions"]["rope"]
    assert (result["positions"]["window"], rope["rope_type"], rope["factor"]) == (1024, "yarn", 2)
    answers = {}
    for file in (tmp_path / "eval/ruler/stage-0").glob("*/predictions.jsonl"):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        assert all(512 < record["prompt_tokens"] <= 1024 for record in records)
        answers[file.parent.name] = [record["new_ids"] for record in records]
    assert len(answers) == 4 and len({str(ids) for ids in answers.values()}) == 1
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert recipe["model"]["rope"] == {"type": "yarn", "factor": 2.0, "original_window": None}


def test_rows_above_the_window_are_refused(home, tmp_path, capsys):
    assert measure(home, "converted", tmp_path, "data.row_len=1024") == 2
    assert "data.row_len=1024 is above the checkpoint's window of 512" in capsys.readouterr().err


def test_a_mistake_in_a_later_stage_is_refused_before_the_first_one_runs(home, tmp_path, capsys):
    later = "{kind: longbench, folder: nowhere, max_length: 300, tasks: [trec], suites: [v1]}"
    first = "{kind: ruler, tasks: [niah_single_1], lengths: [512], samples: 1}"
    for second, words in (
        (first.replace("512", "600"), "stages.1 (ruler): ruler length 600 is above"),
        (later, "stages.1 (longbench): "),
    ):
        assert measure(home, "converted", tmp_path / "out", f"stages=[{first}, {second}]") == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_folder_holds_results_of_one_checkpoint(home, tmp_path, capsys):
    short = (
        "stages=[{kind: ruler, tasks: [niah_single_1], lengths: [512], samples: 1, top_k: [64]}]"
    )
    assert measure(home, "converted", tmp_path, short) == 0
    before = (tmp_path / "eval/ruler/stage-0.json").read_bytes()
    assert measure(home, "long", tmp_path, ROPE) == 2
    assert "holds results of another checkpoint" in capsys.readouterr().err
    assert measure(home, "converted", tmp_path, short, "train.precision=bf16") == 2
    assert "belongs to another recipe (train.precision was" in capsys.readouterr().err
    assert (tmp_path / "eval/ruler/stage-0.json").read_bytes() == before
    (tmp_path / "eval/ruler/stage-3.json").write_bytes(before)
    assert measure(home, "converted", tmp_path, short) == 0
    assert "stage-3.json: the recipe has no such stage" in capsys.readouterr().out
    assert not (tmp_path / "eval/ruler/stage-3.json").exists()
    (tmp_path / "run.json").write_text("{}")
    assert measure(home, "converted", tmp_path, short) == 2
    assert "is the folder of another run" in capsys.readouterr().err


@pytest.mark.parametrize("factor", [1, 0.5, "four"])
def test_a_factor_that_stretches_nothing_is_refused_by_the_recipe(home, factor):
    tree = yaml.safe_load((home / "recipe.yaml").read_text())
    tree["model"]["rope"] = {"type": "yarn", "factor": factor}
    file = home / "other.yaml"
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=r"model\.rope\.factor"):
        load(file)
