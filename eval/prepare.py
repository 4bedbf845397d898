"""Prompts, made once and stored: every arm and every rank reads the same bytes.

    <folder>/manifest.json        what the prompts were made from, and each file's checksum; written last
    <folder>/<length>/<task>.jsonl
    <folder>/<length>/<task>.skip.json      a task that cannot fit the length, with the reason

A killed run goes on with the tasks it had not written. Reading checks the checksums.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .records import read_lines, to_lines, write_json, write_text
from .ruler import LABEL, DoesNotFit, Generator, Sample, tokenizer_fingerprint
from .sources import RulerWords

_MADE_BY = ("ruler.py", "ruler_tasks.py")
"""Sources that decide what a prompt says, how it is sized and how answers to it are scored."""


@dataclass(frozen=True)
class Prompts:
    """A stored prompt set. `skipped`: task and length that do not go together, and why."""

    folder: Path
    digest: str
    samples: list[Sample]
    skipped: list[dict[str, Any]]


def prepare(
    folder: Path,
    *,
    tokenizer: Any,
    words: RulerWords,
    works: dict[str, str],
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    seed: int,
    progress: Callable[[str], None] = lambda line: None,
) -> Prompts:
    """Make what is missing of a prompt set under `folder`, then load it.

    The set's own folder is named by what it is made from, so other tokenizers' sets stand beside it.

    Raises:
        ValueError: a stored prompt file was changed, or the tokenizer cannot be used.
    """
    identity = _identity(tokenizer, words, works, tasks, lengths, samples, seed)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    home = folder / f"prompts-{digest[:12]}"
    if not (home / "manifest.json").is_file():
        generator = Generator(words, works, tokenizer)
        for length in lengths:
            for task in tasks:
                progress(f"prompts: {task} at {length} tokens")
                _make(home, generator, task, length, samples, seed)
        files = sorted(path for path in home.rglob("*.json*") if path.name != "manifest.json")
        checksums = {str(path.relative_to(home)): _checksum(path) for path in files}
        write_json(home / "manifest.json", {**identity, "digest": digest, "files": checksums})
    return load(home, tokenizer)


def load(home: Path, tokenizer: Any) -> Prompts:
    """Read a prompt set after checking it.

    Raises:
        ValueError: no manifest, a changed or missing file, or prompts made for another tokenizer.
    """
    manifest_path = home / "manifest.json"
    if not manifest_path.is_file():
        raise ValueError(
            f"{home} holds no prepared prompts (manifest.json is missing): prepare again"
        )
    manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    if manifest["tokenizer"] != tokenizer_fingerprint(tokenizer):
        raise ValueError(
            f"the prompts in {home} were made for another tokenizer: prepare them again with this one"
        )
    for name, checksum in manifest["files"].items():
        path = home / name
        if not path.is_file() or _checksum(path) != checksum:
            raise ValueError(
                f"{path} is not the file that was prepared (sha256 differs): delete {home} and run again"
            )
    samples = [
        Sample.from_record(record)
        for name in manifest["files"]
        if name.endswith(".jsonl")
        for record in read_lines(home / name)
    ]
    skipped = [
        json.loads((home / name).read_text(encoding="utf-8"))
        for name in manifest["files"]
        if name.endswith(".skip.json")
    ]
    return Prompts(home, manifest["digest"], sorted(samples, key=lambda one: one.id), skipped)


def _identity(
    tokenizer: Any,
    words: RulerWords,
    works: dict[str, str],
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    seed: int,
) -> dict[str, Any]:
    corpus = hashlib.sha256(json.dumps(sorted(works.items())).encode()).hexdigest()
    return {
        "code": code_digest(Path(__file__).parent),
        "label": LABEL,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "words": words.digest,
        "corpus": corpus,
        "works": sorted(works),
        "tasks": sorted(tasks),
        "lengths": sorted(lengths),
        "samples": samples,
        "seed": seed,
    }


def code_digest(folder: Path) -> str:
    """sha256 over the prompts' sources in `folder`, so that changed code never meets old prompts."""
    digest = hashlib.sha256()
    for name in _MADE_BY:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _make(
    home: Path, generator: Generator, task: str, length: int, samples: int, seed: int
) -> None:
    """Write one task's file, or the reason why there is none; nothing if either is there already."""
    target = home / str(length) / f"{task}.jsonl"
    reason = target.with_suffix(".skip.json")
    if target.is_file() or reason.is_file():
        return
    try:
        made = [generator.sample(task, length, seed, index) for index in range(samples)]
    except DoesNotFit as error:
        write_json(reason, {"task": task, "length": length, "reason": str(error)})
        return
    write_text(target, to_lines(sample.record() for sample in made))


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
