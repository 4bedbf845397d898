"""Which run folders a recipe may continue."""

import json

import pytest

from dense2sparse.recipes.load import fingerprint, load, resolved
from dense2sparse.train.identity import RUN_FILE, check_same_identity


@pytest.fixture
def begun(make_recipe, tmp_path):
    """A folder as the first moments of a run leave it, and a way to load the recipe with changes."""
    path = make_recipe(tmp_path)
    recipe = load(path, [])
    run_dir = tmp_path / "runs" / "tiny"
    run_dir.mkdir(parents=True)
    (run_dir / "recipe.json").write_text(json.dumps(resolved(recipe)))
    identity = {"fingerprint": fingerprint(recipe), "world_size": 1, "wandb_id": "x"}
    (run_dir / RUN_FILE).write_text(json.dumps(identity))
    return run_dir, lambda *changes: load(path, list(changes))


def test_a_start_that_was_refused_binds_to_nothing(begun):
    run_dir, recipe = begun
    check_same_identity(run_dir, recipe("sparsity.block_size=32"), world_size=2)


def test_once_converted_the_recipe_is_bound_but_for_stages_not_begun(begun):
    run_dir, recipe = begun
    (run_dir / "start").mkdir()
    (run_dir / "start" / "done.json").write_text("{}")
    with pytest.raises(ValueError, match="sparsity.block_size was 16 and is 32"):
        check_same_identity(run_dir, recipe("sparsity.block_size=32"), world_size=1)
    with pytest.raises(ValueError, match="started with 1 ranks and cannot resume with 2"):
        check_same_identity(run_dir, recipe(), world_size=2)
    check_same_identity(run_dir, recipe("stages.0.steps=99"), world_size=1)

    (run_dir / "stages" / "0-warmup").mkdir(parents=True)
    with pytest.raises(ValueError, match="stages.0.steps was .* and is 99"):
        check_same_identity(run_dir, recipe("stages.0.steps=99"), world_size=1)
