"""Strict YAML for recipes: what could be misread is refused with its line, in one sentence.

Differences from `yaml.safe_load`, which keeps the last of two equal keys, reads `1e-4` as text, `no` as
false and `1:30` as 90:

- a key that stands twice, a tag (`!!python/...`, `!!str`) and a second document are refused;
- only `true` and `false` are booleans, only decimal numbers are numbers; `1e9` is a whole number and
  `1e-4` a fraction; dates stay text;
- input that is not a mapping, not UTF-8, empty, over 1 MB, nested too deeply, or that repeats anchors
  until it explodes, is refused.

Called by `recipes.load`. Anchors, aliases and merge keys (`<<`) work.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1_000_000
MAX_VALUES = 50_000
MAX_DEPTH = 40


class RecipeError(ValueError):
    """A recipe that cannot be used; the text is one sentence for the user."""


def read_recipe_file(path: str | Path) -> dict[str, Any]:
    """Read and parse one recipe file.

    Args:
        path: the YAML file.

    Returns:
        The top-level mapping, made of dict, list, str, int, float, bool and None only.

    Raises:
        RecipeError: the file is missing, too large, not text, or not a strict YAML mapping.
    """
    file = Path(path)
    try:
        if file.is_dir():
            raise RecipeError(f"{path}: this is a folder; name a recipe file (*.yaml)")
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise RecipeError(
                f"{path}: the file has {size} bytes, but a recipe has at most {MAX_BYTES}; "
                "is this the right file?"
            )
        raw = file.read_bytes()
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe file; recipes/ holds the shipped ones") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path}: not a text file: byte {error.start} is not UTF-8; a recipe is UTF-8 YAML"
        ) from None
    try:
        tree = parse(text)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    if tree is None:
        raise RecipeError(f"{path}: the file is empty; a recipe needs name, model, data and stages")
    if not isinstance(tree, dict):
        found = "a list" if isinstance(tree, list) else f"the single value {tree!r:.60}"
        raise RecipeError(f"{path}: a recipe is a mapping of keys, but this is {found}")
    return tree


def parse(text: str) -> Any:
    """Parse one YAML value strictly (also used for the right side of an override).

    Raises:
        RecipeError: with the line, but without a file name.
    """
    try:
        tree = yaml.load(text, Loader=_StrictLoader)
        _check_size(tree)
    except yaml.reader.ReaderError as error:
        raise RecipeError(
            f"not a text file: character #x{ord(error.character):04x} at position "
            f"{error.position} is not allowed in YAML"
            if isinstance(error.character, str)
            else "not a text file"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "unknown line"
        raise RecipeError(f"{where}: not valid YAML: {error.problem or error.context}") from None
    except RecursionError:
        raise RecipeError(f"nested too deeply; a recipe has at most {MAX_DEPTH} levels") from None
    return tree


def dump(tree: Any) -> str:
    """YAML that `parse` reads back as the same values."""
    return yaml.dump(tree, Dumper=_StrictDumper, sort_keys=False, allow_unicode=True, width=100)


def _check_size(tree: Any) -> None:
    """Bound depth and number of values with aliases expanded, before anything walks the tree."""
    count = 0
    todo = [(tree, 1)]
    while todo:
        value, depth = todo.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise RecipeError(f"nested too deeply; a recipe has at most {MAX_DEPTH} levels")
        if count > MAX_VALUES:
            raise RecipeError(f"over {MAX_VALUES} values once its anchors are expanded; use fewer")
        if isinstance(value, dict):
            todo.extend((child, depth + 1) for child in value.values())
        elif isinstance(value, list):
            todo.extend((child, depth + 1) for child in value)


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader without tags, repeated keys, and YAML 1.1's surprising scalars."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise RecipeError(
                f"line {event.start_mark.line + 1}: the tag {_plain_tag(event.tag)!r} is not allowed; "
                "write the plain value"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        return super().construct_mapping(node, deep=deep)

    def flatten_mapping(self, node: Any) -> None:
        # Checked here because a merge key may be overridden on purpose: only keys as written count.
        self._refuse_bad_keys(node)
        super().flatten_mapping(node)

    def _refuse_bad_keys(self, node: Any) -> None:
        if getattr(node, "checked", False):
            return  # an aliased mapping comes back here after its merge keys were expanded
        node.checked = True
        first_line: dict[str, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f"line {line}: a key must be plain text, not a list or mapping")
            key = key_node.value
            if key in first_line:
                raise RecipeError(
                    f"line {line}: the key {key!r} stands twice (first in line {first_line[key]}); "
                    "remove one"
                )
            first_line[key] = line
            if key_node.tag != "tag:yaml.org,2002:merge":
                key_node.tag = "tag:yaml.org,2002:str"

    def construct_number(self, node: Any) -> int | float:
        text = node.value.replace("_", "")
        if re.fullmatch(r"[-+]?[0-9]+", text):
            if len(text) > 400:
                raise RecipeError(
                    f"line {node.start_mark.line + 1}: a number of {len(text)} digits"
                )
            return int(text)
        value = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        if not math.isfinite(value):
            raise RecipeError(
                f"line {node.start_mark.line + 1}: {node.value} is not a finite number"
            )
        # 1e9 tokens is a count; 1.0 stays a fraction.
        return int(value) if "e" in text.lower() and value.is_integer() else value


def _plain_tag(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^(?:[-+]?(?:0|[1-9][0-9_]*)(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?
        |[-+]?\.[0-9]+(?:[eE][-+]?[0-9]+)?
        |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^(?:<<)$"), ["<"])
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _StrictLoader.construct_number)


class _StrictDumper(yaml.SafeDumper):
    """SafeDumper that quotes what only this module's parser reads as a number."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        number = re.fullmatch(r"[-+]?[0-9._]+([eE][-+]?[0-9]+)?", text)
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="'" if number else None)


_StrictDumper.add_representer(str, _StrictDumper.represent_text)
