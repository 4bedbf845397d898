"""Presets of ruler stages: lengths and samples in one word; what is named beside it goes first."""

from __future__ import annotations

from pathlib import Path

import pytest

from dense2sparse.launch.plan import plan_text
from dense2sparse.recipes.load import RecipeError, as_yaml, load
from dense2sparse.recipes.schema import Recipe

K = 1024
PUBLISHED = {
    "smoke": ([1 * K, 2 * K], 5),
    "quick": ([4 * K, 16 * K, 32 * K], 50),
    "paper": ([4 * K, 8 * K, 16 * K, 32 * K, 64 * K, 128 * K], 500),
}


def recipe_with(tmp_path: Path, ruler: str, *overrides: str) -> Recipe:
    """A recipe of one ruler stage."""
    path = tmp_path / "one.yaml"
    path.write_text(
        "name: one\nmodel: {path: here}\ndata: {sources: [{name: a, kind: recall}]}\n"
        f"stages:\n  - {ruler}\n"
    )
    return load(path, list(overrides))


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_is_its_lengths_and_samples(tmp_path: Path, preset: str) -> None:
    stage = recipe_with(tmp_path, f"{{kind: ruler, preset: {preset}}}").stages[0]
    assert stage.kind == "ruler"
    assert (stage.lengths, stage.samples) == PUBLISHED[preset]


def test_what_is_named_beside_a_preset_goes_before_it(tmp_path: Path) -> None:
    stage = recipe_with(tmp_path, "{kind: ruler, preset: paper, samples: 7}").stages[0]
    assert stage.kind == "ruler"
    assert (stage.lengths, stage.samples) == (PUBLISHED["paper"][0], 7)
    stage = recipe_with(tmp_path, "{kind: ruler, preset: paper}", "stages.0.lengths=[2048]").stages[
        0
    ]
    assert stage.kind == "ruler"
    assert (stage.lengths, stage.samples) == ([2048], 500)


def test_a_preset_can_be_chosen_on_the_command_line(tmp_path: Path) -> None:
    stage = recipe_with(tmp_path, "{kind: ruler}", "stages.0.preset=smoke").stages[0]
    assert stage.kind == "ruler"
    assert (stage.lengths, stage.samples) == PUBLISHED["smoke"]


def test_plan_shows_the_values_behind_a_preset_and_reads_them_back(tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path, "{kind: ruler, preset: quick}")
    text = plan_text(recipe, "runs/one")
    assert "preset quick: all tasks; lengths 4096 16384 32768, 50 prompts each, 4 arms" in text
    assert "samples: 50" in text and "preset: quick" in text
    (tmp_path / "again.yaml").write_text(as_yaml(recipe))
    assert load(tmp_path / "again.yaml") == recipe


def test_plan_tells_what_longbench_will_read(tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path, "{kind: longbench, suites: [v1, e], samples: 3}")
    line = "suites v1 e; all tasks, 3 records each, 4 arms, top-k 16"
    assert line in plan_text(recipe, "runs/one")


@pytest.mark.parametrize("given", ["papers", "5", "[smoke]"])
def test_a_preset_that_does_not_exist_is_one_sentence(tmp_path: Path, given: str) -> None:
    with pytest.raises(RecipeError, match=r"stages\.0\.preset=.*smoke.*quick.*paper") as told:
        recipe_with(tmp_path, f"{{kind: ruler, preset: {given}}}")
    assert "\n" not in str(told.value)
