"""Recipes from disk: strict YAML, overrides, schema, and what a resumed run must agree on.

`load` is the one door; it needs yaml and pydantic only, so that a login node without torch can check a
recipe. Every mistake of the user comes out as a `RecipeError` with one sentence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from .deepspeed_keys import (
    DEFAULT_ZERO_STAGE,
    DeepspeedSection,
    refused_key,
    with_default_stage,
)
from .explain import explain
from .schema import Recipe
from .strict_yaml import RecipeError, dump, parse, read_recipe_file

__all__ = ["RecipeError", "as_yaml", "fingerprint", "load", "resolved", "zero_stage"]

# What may differ when a run is resumed: where things are kept, and what is written how often.
NOT_IN_FINGERPRINT = (
    ("output_dir",),
    ("wandb",),
    ("data", "cache_dir"),
    ("execution", "prefill_chunk"),
    ("execution", "debug"),
    ("train", "log_every"),
    ("train", "measure_every"),
    ("train", "probe_every"),
    ("train", "probe_samples"),
    ("train", "checkpoint_every"),
    ("train", "keep_checkpoints"),
)


def load(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: a YAML file.
        overrides: `a.b=value` and `stages.0.steps=5`; the value is YAML, and an empty one is null.

    Returns:
        The frozen recipe, `deepspeed.zero_optimization.stage` filled in.

    Raises:
        RecipeError: one sentence with the dotted path, the value and what is allowed.
    """
    tree = read_recipe_file(path)
    for override in overrides or []:
        _apply_override(tree, override)
    try:
        return _checked(tree)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Every value of the recipe, defaults included, as plain JSON types."""
    tree = recipe.model_dump(mode="json")
    tree["deepspeed"] = with_default_stage(tree["deepspeed"])
    return tree


def first_difference(
    before: dict[str, Any], now: dict[str, Any], counts: Callable[[str], bool]
) -> str | None:
    """The first dotted key, of those that count, in which two resolved recipes differ, with both values."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    for key in sorted(old.keys() | new.keys()):
        if counts(key) and old.get(key) != new.get(key):
            was, found = (
                json.dumps(one[key])[:80] if key in one else "absent" for one in (old, new)
            )
            return f"{key} was {was} and is {found}"
    return None


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of everything that is no section and no list of sections."""
    if isinstance(tree, dict):
        items: Any = tree.items()
    elif isinstance(tree, list) and any(isinstance(entry, dict) for entry in tree):
        items = enumerate(tree)
    else:
        yield prefix, tree
        return
    for key, value in items:
        yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))


def as_yaml(recipe: Recipe) -> str:
    """`resolved(recipe)` as YAML that `load` reads again."""
    return dump(resolved(recipe))


def zero_stage(recipe: Recipe) -> int:
    """ZeRO stage, 0 to 3."""
    zero = recipe.deepspeed.get("zero_optimization", {})
    return int(zero.get("stage", DEFAULT_ZERO_STAGE))


def fingerprint(recipe: Recipe, num_stages: int | None = None) -> str:
    """Checksum of everything that must be the same when a run is resumed.

    Paths, wandb and how often something is logged, measured or saved are left out
    (`NOT_IN_FINGERPRINT`); everything else counts, so another top-k or seed is another run.

    Args:
        recipe: a loaded recipe.
        num_stages: count only the first so many stages. A finished stage number i (from 0) is still
            valid if `fingerprint(recipe, i + 1)` is what it was: later stages may be changed, removed
            or appended without repeating it. None counts all, as the run's finished mark does.

    Returns:
        64 hexadecimal digits (SHA-256).
    """
    tree = resolved(recipe)
    for *sections, key in NOT_IN_FINGERPRINT:
        section = tree
        for name in sections:
            section = section[name]
        section.pop(key)
    tree["stages"] = tree["stages"][:num_stages]
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _checked(tree: dict[str, Any]) -> Recipe:
    recipe = _validate(Recipe, tree, tree)
    section = tree.get("deepspeed", {})
    refused = refused_key(section)
    if refused:
        raise RecipeError(refused)
    _validate(DeepspeedSection, section, section, prefix="deepspeed.")
    section = with_default_stage(section)
    if section["zero_optimization"]["stage"] == 0 and recipe.train.precision == "bf16":
        raise RecipeError(
            "deepspeed.zero_optimization.stage=0: with train.precision=bf16 DeepSpeed's first update is "
            "wrong at stage 0; use stage 1, or train.precision=fp32"
        )
    return recipe.model_copy(update={"deepspeed": section})


def _validate(
    model: type[BaseModel], section: dict[str, Any], tree: dict[str, Any], prefix: str = ""
) -> Any:
    """Validate as strict JSON: `"5"` is no number and `true` is no 1, but a list may be a tuple."""
    try:
        return model.model_validate_json(json.dumps(section), strict=True)
    except ValidationError as error:
        sentence = explain(error, model, tree)
        if prefix:
            sentence = _with_prefix(sentence, prefix)
        raise RecipeError(sentence) from None


def _with_prefix(sentence: str, prefix: str) -> str:
    """Put `deepspeed.` before the path and before the key that is named as the right one."""
    for phrase in ("the nearest valid key is ", "that key belongs at "):
        sentence = sentence.replace(phrase, phrase + prefix)
    return prefix + sentence


def _apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one value in place; sections that the recipe leaves out are made."""
    path, equals, text = override.partition("=")
    parts = path.split(".")
    if not equals or not all(parts):
        raise RecipeError(f"override {override!r}: write it as section.key=value")
    try:
        value = parse(text)
    except RecipeError as error:
        problem = str(error).removeprefix("line 1: ").removeprefix("line 1, ")
        raise RecipeError(f"override {override!r}: {problem}") from None
    here: Any = tree
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        key: str | int = part
        if isinstance(here, list):
            key = _list_index(here, part, override, ".".join(parts[:number]))
        elif not isinstance(here, dict):
            raise RecipeError(
                f"override {override!r}: {'.'.join(parts[:number])}={here!r:.60} is a value, "
                f"so it has no key {part!r}"
            )
        if last:
            here[key] = value
        elif isinstance(here, dict) and here.get(key) is None:
            here[key] = {}
        if not last:
            here = here[key]


def _list_index(entries: list[Any], part: str, override: str, path: str) -> int:
    if not part.isdecimal() or int(part) >= len(entries):
        last = len(entries) - 1
        allowed = f"a number from 0 to {last}" if entries else "nothing, for it is empty"
        raise RecipeError(f"override {override!r}: {path} is a list; {part!r} must be {allowed}")
    return int(part)
