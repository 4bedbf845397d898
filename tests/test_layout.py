"""The shape of the repository: who may import whom, which folders are packages, how long a file may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "recipes": set(),
    "kernels": set(),
    "data": set(),
    "model": {"kernels"},
    "train": {"eval", "model", "data", "recipes"},
    "eval": {"model", "data", "recipes"},
    "launch": {"recipes"},
}
# Outside packages of the folders that must load where the heavy ones are missing or unwanted.
MAY_IMPORT_OUTSIDE = {
    "recipes": {"yaml", "pydantic"},
    "launch": set(),
    "kernels": {"torch", "triton"},
}
NEVER = {"data": {"transformers", "deepspeed", "wandb"}, "model": {"deepspeed", "wandb"}}
MAX_LINES = 450
MAX_FUNCTION_LINES = 70  # the aim is 60


def tracked(pattern: str) -> list[Path]:
    """Files of the repository, also new ones; never what git ignores."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", pattern],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return sorted(ROOT / line for line in listing.stdout.splitlines() if (ROOT / line).exists())


SOURCES = [file for file in tracked("*.py") if file.parent.name in MAY_IMPORT]
SOURCES = [file for file in SOURCES if file.parent.parent == ROOT]
PYTHON = tracked("*.py")


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_every_folder_has_sources() -> None:
    assert {file.parent.name for file in SOURCES} == set(MAY_IMPORT)


@pytest.mark.parametrize("file", SOURCES, ids=name)
def test_folder_imports_only_what_its_place_allows(file: Path) -> None:
    ours: set[str] = set()
    outside: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 2:
            assert node.module, "from .. import x hides which folder is meant"
            ours.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            outside.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1, "imports reach at most one folder up"
        elif isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
    folder = file.parent.name
    assert "dense2sparse" not in outside, "inside the package imports are relative"
    assert ours - {folder} <= MAY_IMPORT[folder]
    foreign = outside - sys.stdlib_module_names
    assert foreign <= MAY_IMPORT_OUTSIDE.get(folder, foreign)
    assert not foreign & NEVER.get(folder, set())


def test_only_the_root_is_a_package_with_a_file() -> None:
    assert [name(file) for file in tracked("*__init__.py")] == ["__init__.py"]


def test_package_list_equals_the_tree() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setup["package-dir"] == {"dense2sparse": "."}
    assert set(setup["packages"]) == {"dense2sparse", *(f"dense2sparse.{f}" for f in MAY_IMPORT)}


def test_test_files_have_unique_names() -> None:
    names = [file.name for file in PYTHON if file.name.startswith("test_")]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("file", PYTHON, ids=name)
def test_file_is_short_and_says_what_it_is(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    assert ast.get_docstring(ast.parse(text)), "a file begins with what it is for"
    assert file.stem not in ("utils", "helpers", "common", "misc")


@pytest.mark.parametrize("file", SOURCES, ids=name)
def test_functions_are_short(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            doc = ast.get_docstring(node, clean=False) or ""
            body = node.end_lineno - node.lineno + 1 - len(doc.splitlines())  # type: ignore[operator]
            assert body <= MAX_FUNCTION_LINES, f"{node.name} has {body} lines without its docstring"


def test_hugging_face_kernels_are_not_shadowed() -> None:
    """With a kernels/__init__.py, `import kernels` from the root would find ours instead of theirs."""
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            "import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not found.stdout.strip().startswith(str(ROOT / "kernels"))


def test_readme_names_only_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text()
    assert not re.search(r"@[A-Z]+@", text), "a placeholder was left"
    tree = re.search(r"```(?:text)?\n(\S*/\n(?:.*\n)*?)```", text)
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    named = set(links)
    folder = ""
    for line in tree[1].splitlines() if tree else []:
        entry = line.replace("│", " ").replace("├──", "   ").replace("└──", "   ").split("#")[0]
        for word in entry.split():
            if word.endswith("/"):
                folder = word.strip("/")
            elif re.fullmatch(r"[\w.-]+\.(py|sh|yaml|md|toml|example)", word):
                inside = ROOT / folder / word
                named.add(
                    word if not inside.exists() and (ROOT / word).exists() else f"{folder}/{word}"
                )
    assert named, "the README holds links or a tree"
    assert not [path for path in sorted(named) if not (ROOT / path).exists()]


def test_scripts_can_be_started() -> None:
    for script in [*tracked("launch/*.sh"), ROOT / ".ci" / "run"]:
        is_part = script.name.startswith("_")
        assert bool(script.stat().st_mode & 0o111) != is_part, script
        assert script.read_text().startswith("# shellcheck" if is_part else "#!/usr/bin/env bash")


def test_pinned_versions_satisfy_the_package() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {}
    for file in ("requirements.txt", "requirements-test.txt"):
        for line in (ROOT / "launch" / file).read_text().splitlines():
            if line and not line.startswith("#"):
                package, version = line.split("==")
                assert package.lower() not in pins, f"{package} is pinned twice"
                pins[package.lower()] = version
    script = (ROOT / "launch" / "_environment.sh").read_text()
    for package in ("torch", "numpy"):
        found = re.search(rf"\b{package.upper()}_VERSION=([\d.]+)", script)
        assert found
        pins[package] = found[1]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    for requirement in map(Requirement, wanted):
        assert pins[requirement.name.lower()] in requirement.specifier, str(requirement)
