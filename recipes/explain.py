"""One sentence for one mistake: pydantic's errors as dotted path, value and what to write instead.

Called by `recipes.load`. Unknown keys are reported before anything else, since a misspelt key is usually
also the reason why its right spelling is missing.
"""

from __future__ import annotations

import difflib
import json
import types
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

Path = tuple[str | int, ...]

_SIMPLE = {
    "missing": "this required key is missing",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text; put it in quotes",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be a section of keys",
    "model_type": "must be a section of keys",
    "model_attributes_type": "must be a section of keys",
    "union_tag_not_found": "the key `kind` is missing",
    "finite_number": "must be a finite number",
}
_BOUNDS = {
    "greater_than": ("gt", "must be greater than {}"),
    "greater_than_equal": ("ge", "must be at least {}"),
    "less_than": ("lt", "must be less than {}"),
    "less_than_equal": ("le", "must be at most {}"),
    "multiple_of": ("multiple_of", "must be a multiple of {}"),
    "too_short": ("min_length", "too short: at least {} needed"),
    "too_long": ("max_length", "too long: at most {} allowed"),
    "string_pattern_mismatch": ("pattern", "must match the pattern {}"),
    "literal_error": ("expected", "must be one of {}"),
    "union_tag_invalid": ("expected_tags", "must be one of {}"),
}


def explain(error: ValidationError, model: type[BaseModel], tree: dict[str, Any]) -> str:
    """The first mistake as `path=value: what is wrong; what to write`.

    Args:
        error: from validating `tree` against `model`.
        model: the top-level pydantic model.
        tree: the values that were validated.
    """
    details = error.errors(include_url=False)
    for detail in details:
        if detail["type"] == "extra_forbidden":
            return _unknown_key(_real_path(detail, tree), model, tree)
    # Every branch of a union reports its own error at the same place: say all of them.
    path = _real_path(details[0], tree)
    same = [d for d in details if _real_path(d, tree) == path]
    wishes = list(dict.fromkeys(_wish(d) for d in same))
    wish = " or ".join([wishes[0], *(w.removeprefix("must be ") for w in wishes[1:])])
    value = _get(tree, path)
    kind = details[0]["type"]
    if kind == "missing":
        return f"{dotted(path)}: {wish}"
    if kind == "value_error":
        return f"{dotted(path)}: {wish}" if path else wish
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        path = (*path, "kind")
        value = value.get("kind") if isinstance(value, dict) else None
    nearest = _nearest_allowed(value, same)
    return f"{dotted(path)}={shown(value)}: {wish}{nearest}"


def unknown_key_hint(
    key: str, section: type[BaseModel], prefix: Path, root: type[BaseModel]
) -> str:
    """Where a key that does not exist here was probably meant to go."""
    fields = list(section.model_fields)
    close = difflib.get_close_matches(key, fields, n=1, cutoff=0.6)
    if close:
        return f"the nearest valid key is {dotted((*prefix, close[0]))}"
    elsewhere = [path for path in _all_keys(root) if path[-1] == key]
    if elsewhere:
        return f"that key belongs at {dotted(elsewhere[0])}"
    return f"valid keys here are {', '.join(fields)}"


def dotted(path: Path) -> str:
    """`('stages', 1, 'steps')` as `stages.1.steps`."""
    return ".".join(str(part) for part in path)


def shown(value: Any) -> str:
    """A value as YAML would write it, on one line, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def section_at(model: type[BaseModel], tree: Any, path: Path) -> type[BaseModel] | None:
    """The model that describes `tree` at `path`; None where there is no section."""
    annotation: Any = model
    for part in path:
        here = _as_model(annotation, tree)
        if here is not None and isinstance(part, str):
            field = here.model_fields.get(part)
            annotation = field.annotation if field else None
        else:
            annotation = _item_type(annotation)
        tree = _get(tree, (part,))
    return _as_model(annotation, tree)


def _unknown_key(path: Path, model: type[BaseModel], tree: dict[str, Any]) -> str:
    prefix, key = path[:-1], str(path[-1])
    section = section_at(model, tree, prefix) or model
    hint = unknown_key_hint(key, section, prefix, model)
    return f"{dotted(path)}={shown(_get(tree, path))}: unknown key; {hint}"


def _wish(detail: Any) -> str:
    """What the value should have been, as the end of a sentence."""
    kind, ctx = detail["type"], detail.get("ctx", {})
    if kind == "missing" and isinstance(detail["loc"][-1], int):
        return "the list needs this entry too"
    if kind in _SIMPLE:
        return _SIMPLE[kind]
    if kind in _BOUNDS:
        name, text = _BOUNDS[kind]
        allowed = str(ctx[name]).replace(" or ", ", ").replace("'", "")
        return text.format(allowed).replace("one of ", "" if "," not in allowed else "one of ")
    return " ".join(str(detail["msg"]).removeprefix("Value error, ").split())


def _nearest_allowed(value: Any, details: list[Any]) -> str:
    """`; the nearest is x` for a misspelt choice."""
    names: list[str] = []
    for detail in details:
        ctx = detail.get("ctx", {})
        listed = str(ctx.get("expected") or ctx.get("expected_tags") or "")
        names += [n.strip(" '") for n in listed.replace(" or ", ",").split(",") if n.strip()]
    close = difflib.get_close_matches(str(value), names, n=1, cutoff=0.6)
    return f"; the nearest is {close[0]}" if close else ""


def _real_path(detail: Any, tree: Any) -> Path:
    """pydantic's location without the names of union branches, which are not in the recipe."""
    path: list[str | int] = []
    parts = detail["loc"]
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        in_dict = isinstance(tree, dict) and part in tree
        in_list = isinstance(tree, list) and isinstance(part, int) and part < len(tree)
        if in_dict or in_list:
            tree = tree[part]
        elif not (last and detail["type"] == "missing"):
            continue
        path.append(part)
    return tuple(path)


def _get(tree: Any, path: Path) -> Any:
    for part in path:
        if isinstance(tree, dict):
            tree = tree.get(part)
        elif isinstance(tree, list) and isinstance(part, int) and -len(tree) <= part < len(tree):
            tree = tree[part]
        else:
            return None
    return tree


def _as_model(annotation: Any, value: Any) -> type[BaseModel] | None:
    """The section a value belongs to; a stage is chosen by its `kind`."""
    choices = [t for t in _flat(annotation) if isinstance(t, type) and issubclass(t, BaseModel)]
    kind = value.get("kind") if isinstance(value, dict) else None
    for choice in choices:
        field = choice.model_fields.get("kind")
        if len(choices) > 1 and field and kind in get_args(field.annotation):
            return choice
    return choices[0] if choices else None


def _item_type(annotation: Any) -> Any:
    for choice in _flat(annotation):
        if get_origin(choice) in (list, tuple):
            return get_args(choice)[0]
    return None


def _flat(annotation: Any) -> list[Any]:
    """Members of a union, through Annotated."""
    if get_origin(annotation) is Annotated:
        return _flat(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [flat for arg in get_args(annotation) for flat in _flat(arg)]
    return [annotation]


def _all_keys(model: type[BaseModel], prefix: Path = ()) -> list[Path]:
    """Every key of the recipe as a path; list positions are written as N."""
    found: list[Path] = []
    for name, field in model.model_fields.items():
        found.append((*prefix, name))
        for choice in _flat(field.annotation):
            step: Path = (name,)
            if get_origin(choice) is list:
                choice, step = get_args(choice)[0], (name, "N")
            for section in _flat(choice):
                if isinstance(section, type) and issubclass(section, BaseModel):
                    found += _all_keys(section, (*prefix, *step))
    return found
