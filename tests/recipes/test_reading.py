"""What a recipe's text means: scalars, anchors, overrides, and the fingerprint of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dense2sparse.recipes.deepspeed_keys import DeepspeedSection, ZeroOptimization
from dense2sparse.recipes.load import RecipeError, fingerprint, load, resolved, zero_stage
from dense2sparse.recipes.strict_yaml import dump, parse

QUICKSTART = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1e9", 1_000_000_000),
        ("1.5e3", 1500),
        ("1.0", 1.0),
        ("-3", -3),
        ("1_000", 1000),
        (".5", 0.5),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("010", "010"),
        ("0x10", "0x10"),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("", None),
        ("~", None),
        ("null", None),
        ("[4, 8]", [4, 8]),
        ("{a: 1}", {"a": 1}),
        ("1", 1),
    ],
)
def test_scalar(text: str, value: object) -> None:
    found = parse(text)
    assert found == value and type(found) is type(value)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(st.characters(codec="ascii", categories=["L", "N"])), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(PLAIN)
def test_dumped_values_are_read_back(value: object) -> None:
    assert parse(dump(value)) == value


def places(tree: object, prefix: str = "") -> list[str]:
    """Every dotted path of a recipe."""
    children = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    found = [prefix] if prefix else []
    for key, child in children:
        found += places(child, f"{prefix}.{key}" if prefix else str(key))
    return found


@settings(deadline=None)
@given(st.sampled_from(places(resolved(load(QUICKSTART)))), st.sampled_from(["", ".x"]), PLAIN)
def test_any_value_anywhere_is_taken_or_refused_in_one_sentence(
    place: str, below: str, value: object
) -> None:
    override = f"{place}{below}={json.dumps(value)}"
    try:
        fingerprint(load(QUICKSTART, [override]))
    except RecipeError as error:
        assert "\n" not in str(error)


@settings(deadline=None)
@given(st.text(max_size=60))
def test_no_text_makes_the_parser_crash(text: str) -> None:
    try:
        parse(text)
    except RecipeError as error:
        assert "\n" not in str(error)


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    text = QUICKSTART.read_text().replace(
        "stages:\n",
        "stages:\n  - &stage {kind: warmup, steps: 5, index_lr: 1e-3}\n"
        "  - {<<: *stage, steps: 6}\n",
    )
    (tmp_path / "r.yaml").write_text(text)
    first, second = load(tmp_path / "r.yaml").stages[:2]
    assert (first.steps, second.steps, second.index_lr) == (5, 6, 1e-3)


def test_overrides_change_values_and_make_sections() -> None:
    recipe = load(
        QUICKSTART,
        [
            "train.seed=3",
            "stages.2.steps=5",
            "wandb.mode=disabled",
            "wandb.tags=[a, b]",
            "deepspeed.zero_optimization.stage=2",
            "stages.2.steps=6",
        ],
    )
    assert (recipe.train.seed, recipe.stages[2].steps) == (3, 6)
    assert (recipe.wandb.mode, recipe.wandb.tags) == ("disabled", ["a", "b"])
    assert zero_stage(recipe) == 2


def test_zero_stage_is_1_unless_said(tmp_path: Path) -> None:
    text = QUICKSTART.read_text().split("deepspeed:")[0]
    (tmp_path / "r.yaml").write_text(text)
    recipe = load(tmp_path / "r.yaml")
    assert zero_stage(recipe) == 1
    assert resolved(recipe)["deepspeed"] == {"zero_optimization": {"stage": 1}}


@pytest.mark.parametrize(
    "override",
    [
        "output_dir=/elsewhere",
        "wandb.mode=disabled",
        "data.cache_dir=/c",
        "train.log_every=7",
        "train.measure_every=9",
        "train.probe_every=9",
        "train.probe_samples=9",
        "train.checkpoint_every=9",
        "train.keep_checkpoints=5",
    ],
)
def test_what_may_change_is_not_in_the_fingerprint(override: str) -> None:
    assert fingerprint(load(QUICKSTART, [override])) == fingerprint(load(QUICKSTART))


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "train.seed=9",
        "sparsity.top_k=8",
        "data.row_len=512",
        "stages.2.steps=9",
        "stages.5.samples=3",
        "deepspeed.zero_optimization.stage=2",
        "data.sources.0.weight=2",
    ],
)
def test_what_must_not_change_is_in_the_fingerprint(override: str) -> None:
    assert fingerprint(load(QUICKSTART, [override])) != fingerprint(load(QUICKSTART))


def test_fingerprint_of_the_first_stages_ignores_the_others() -> None:
    one, other = load(QUICKSTART), load(QUICKSTART, ["stages.2.steps=99"])
    assert fingerprint(one, 2) == fingerprint(other, 2)
    assert fingerprint(one, 3) != fingerprint(other, 3)
    assert fingerprint(one, len(one.stages)) == fingerprint(one)


def test_default_written_out_is_the_same_run() -> None:
    assert fingerprint(load(QUICKSTART, ["train.seed=0"])) == fingerprint(load(QUICKSTART))


def test_deepspeed_reads_every_key_that_is_let_through() -> None:
    """Against the installed DeepSpeed: a key it does not read would be silently ignored."""
    from deepspeed.runtime import config as ds
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    known = set(fields) | {field.alias for field in fields.values()}
    assert set(ZeroOptimization.model_fields) <= known
    read_by_its_own_config = {"zero_optimization", "aio", "comms_logger"}
    constants = {value for value in vars(ds).values() if isinstance(value, str)}
    assert set(DeepspeedSection.model_fields) - read_by_its_own_config <= constants
    for name in ("offload_optimizer", "offload_param"):
        ours, theirs = _section(ZeroOptimization, name), _section(DeepSpeedZeroConfig, name)
        assert set(ours.model_fields) <= set(theirs.model_fields)


def _section(model: Any, name: str) -> Any:
    """The model of an optional section."""
    choices = model.model_fields[name].annotation.__args__
    return next(choice for choice in choices if choice is not type(None))
