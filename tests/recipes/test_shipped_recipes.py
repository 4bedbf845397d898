"""Every recipe in the repository loads, says whether it was run, and survives a round trip."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dense2sparse.recipes.load import as_yaml, fingerprint, load, resolved, zero_stage

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def test_all_recipes_are_found() -> None:
    assert [recipe.stem for recipe in RECIPES] == [
        "llama-3.1-8b",
        "quickstart",
        "qwen3-0.6b",
        "qwen3-30b-a3b",
        "qwen3-4b",
        "smollm2-135m",
        "smollm2-8k",
    ]


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipe_loads_under_the_name_of_its_file(file: Path) -> None:
    recipe = load(file)
    assert recipe.name == file.stem
    assert [stage.kind for stage in recipe.stages][-1] == "report"
    assert zero_stage(recipe) in (1, 2, 3)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_resolved_recipe_loads_as_the_same_recipe(file: Path, tmp_path: Path) -> None:
    recipe = load(file)
    (tmp_path / "again.yaml").write_text(as_yaml(recipe))
    again = load(tmp_path / "again.yaml")
    assert resolved(again) == resolved(recipe)
    assert fingerprint(again) == fingerprint(recipe)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipe_without_a_run_says_so(file: Path) -> None:
    rows = (ROOT / "recipes" / "README.md").read_text().splitlines()
    row = next(line for line in rows if line.startswith(f"| `{file.name}`"))
    assert row.rstrip(" |").endswith("unrun") == ("# UNRUN" in file.read_text())


def test_loading_needs_no_heavy_library() -> None:
    code = (
        "import sys; from dense2sparse.recipes.load import load; "
        f"load({str(RECIPES[1])!r}); "
        "heavy = {'torch', 'numpy', 'transformers', 'datasets', 'wandb'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_key_is_explained_where_it_is_declared() -> None:
    from dense2sparse.recipes import schema

    sections = [s for s in vars(schema).values() if isinstance(s, type)]
    sections = [s for s in sections if issubclass(s, schema.Section) and s is not schema.Section]
    unexplained = [
        f"{section.__name__}.{name}"
        for section in sections
        for name, field in section.model_fields.items()
        if not field.description and name != "kind"
    ]
    named_by_their_section = {
        f"Recipe.{name}" for name in ("model", "sparsity", "data", "train", "wandb")
    } | {f"Wandb.{name}" for name in ("mode", "project", "entity", "group", "tags")}
    assert set(unexplained) <= named_by_their_section


def test_plain_yaml_reads_the_recipes_too() -> None:
    """Editors and other tools read them with a plain loader: same keys, same text."""
    for file in RECIPES:
        assert yaml.safe_load(file.read_text())["name"] == file.stem
