"""What is carried to a machine without network, in calls of a bounded size, and put together there.

`carry.py` plans the calls and writes them here (`plan`, `write_calls`); there, `convert_on_gpu.sh` starts
this file, which needs nothing but Python:

    python benchmarks/carry_parts.py receive 2 --home HOME     checks what call 2 brought and keeps it
    python benchmarks/carry_parts.py complete --home HOME      says what has not come yet

A call is a folder `call-N` with pieces of files and the manifest of all calls, `manifest.json`:
{"calls": number, "files": [{"name", "bytes", "sha256", "pieces": [{"name", "bytes", "sha256", "call"}]}]}.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 1 << 20
MANIFEST = "manifest.json"


class CarryError(ValueError):
    """What cannot be carried or did not arrive; one sentence."""


@dataclass(frozen=True)
class Piece:
    """Bytes [begin, begin + size) of a file, in one call."""

    file: str
    begin: int
    size: int
    call: int


def plan(sizes: Sequence[tuple[str, int]], *, room: int) -> list[Piece]:
    """As few calls as hold the files, about equally full, in the order of the files, which are cut between.

    Args:
        sizes: (name, bytes) of the files; what must arrive with the first call comes first.
        room: bytes of one call that are free for pieces.

    Raises:
        CarryError: there is no room at all.
    """
    if room < MIB:
        raise CarryError(
            f"a call has {room / MIB:.1f} MiB left for parts, and 1 MiB is the least: the tree that "
            "travels with every call is too large, so ignore or remove some of it, or raise --limit-mib"
        )
    total = sum(size for _, size in sizes)
    room = -(-total // -(-total // room)) if total else room
    pieces, call, free = [], 1, room
    for file, size in sizes:
        begin = 0
        while begin < size:
            if not free:
                call, free = call + 1, room
            taken = min(size - begin, free)
            pieces.append(Piece(file, begin, taken, call))
            begin, free = begin + taken, free - taken
    return pieces


def write_calls(store: Path, pieces: Sequence[Piece], folder: Path) -> dict[str, Any]:
    """Write `folder/call-N`, leaving what is there and whole; older calls and pieces are removed.

    Args:
        store: where the files lie by name.

    Returns:
        The manifest, which is in every call.
    """
    files: dict[str, dict[str, Any]] = {}
    wanted: dict[Path, Piece] = {}
    for piece in pieces:
        source = store / piece.file
        whole = files.setdefault(
            piece.file,
            {
                "name": piece.file,
                "bytes": source.stat().st_size,
                "sha256": sha256(source),
                "pieces": [],
            },
        )
        number = len(whole["pieces"]) + 1
        cut = piece.size < whole["bytes"]
        name = piece.file.replace("/", "--") + (f".part-{number}" if cut else "")
        digest = sha256(source, piece.begin, piece.size) if cut else whole["sha256"]
        kept = {"name": name, "bytes": piece.size, "sha256": digest, "call": piece.call}
        whole["pieces"].append(kept)
        target = folder / f"call-{piece.call}" / name
        wanted[target] = piece
        if not is_whole(target, kept):
            _copy(source, target, piece.begin, piece.size)
    calls = max((piece.call for piece in pieces), default=0)
    manifest = {"calls": calls, "files": list(files.values())}
    for number in range(1, calls + 1):
        target = folder / f"call-{number}" / MANIFEST
        target.write_text(json.dumps(manifest, indent=1) + "\n")
        wanted[target] = pieces[0]
    for path in folder.glob("call-*/*"):
        if path not in wanted:
            path.unlink()
    for path in folder.glob("call-*"):
        if not any(path.iterdir()):
            path.rmdir()
    return manifest


def receive(call: int, source: Path, home: Path) -> list[str]:
    """Check every piece of a call, keep it under `home`, and put together the files that are now whole.

    Args:
        source: the folder with `call-N`.
        home: gets `manifest.json`, `pieces/` and `files/`.

    Returns:
        Names of the files that became whole.

    Raises:
        CarryError: a piece that is missing or broken, by name, or a call of another preparation.
    """
    folder = source / f"call-{call}"
    manifest = _manifest(folder)
    _same_preparation(manifest, home)
    mine = [p for file in manifest["files"] for p in file["pieces"] if p["call"] == call]
    broken = [said for piece in mine if (said := trouble(folder / piece["name"], piece))]
    if broken:
        raise CarryError(
            f"call {call}: {len(broken)} of {len(mine)} parts did not arrive whole ({'; '.join(broken)}): "
            "run benchmarks/carry.sh again and carry this call again"
        )
    for piece in mine:
        target = home / "pieces" / piece["name"]
        if not is_whole(target, piece):
            _copy(folder / piece["name"], target, 0, piece["bytes"])
    (home / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return _join(manifest, home)


def complete(home: Path) -> None:
    """Refuse to go on while something has not come.

    Raises:
        CarryError: what is missing, and which calls bring it.
    """
    manifest = _manifest(home)
    missing = [file for file in manifest["files"] if not (home / "files" / file["name"]).is_file()]
    if missing:
        have = {path.name for path in (home / "pieces").glob("*")}
        calls = {p["call"] for file in missing for p in file["pieces"] if p["name"] not in have}
        raise CarryError(
            f"{missing[0]['name']} and {len(missing) - 1} other files are not complete in {home}: receive "
            f"call {' and '.join(map(str, sorted(calls)))} first"
        )


def trouble(path: Path, piece: dict[str, Any]) -> str:
    """What is wrong with a piece, "" if nothing."""
    if not path.is_file():
        return f"{piece['name']} is missing"
    size = path.stat().st_size
    if size != piece["bytes"]:
        return f"{piece['name']} has {size:,} bytes and not {piece['bytes']:,}"
    if sha256(path) != piece["sha256"]:
        return f"{piece['name']} has another sha256"
    return ""


def is_whole(path: Path, piece: dict[str, Any]) -> bool:
    """Whether a file is there with the right size and hash."""
    return not trouble(path, piece)


def sha256(path: Path, begin: int = 0, size: int | None = None) -> str:
    """Of a file, or of `size` bytes of it."""
    digest = hashlib.sha256()
    left = path.stat().st_size - begin if size is None else size
    with open(path, "rb") as handle:
        handle.seek(begin)
        while left and (chunk := handle.read(min(left, MIB))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CarryError(
            f"{folder} has no manifest that can be read ({type(error).__name__}): carry the folder of this "
            "call, and receive it first"
        ) from None


def _same_preparation(manifest: dict[str, Any], home: Path) -> None:
    if (home / MANIFEST).is_file() and _manifest(home) != manifest:
        raise CarryError(
            f"{home} holds calls of another preparation: remove it and receive all calls again"
        )


def _join(manifest: dict[str, Any], home: Path) -> list[str]:
    """Make every file whose pieces are all there and that is not made yet; pieces are removed."""
    made = []
    for file in manifest["files"]:
        target = home / "files" / file["name"]
        pieces = [home / "pieces" / piece["name"] for piece in file["pieces"]]
        if not is_whole(target, file) and all(piece.is_file() for piece in pieces):
            target.parent.mkdir(parents=True, exist_ok=True)
            joining = target.with_name(f".{target.name}.{os.getpid()}")
            with open(joining, "wb") as out:
                for piece in pieces:
                    with open(piece, "rb") as handle:
                        shutil.copyfileobj(handle, out, MIB)
            if sha256(joining) != file["sha256"]:
                joining.unlink()
                raise CarryError(
                    f"{file['name']} has another sha256 than its manifest says though all {len(pieces)} "
                    "parts are right: run benchmarks/carry.sh again"
                )
            os.replace(joining, target)
            made.append(file["name"])
        if target.is_file():
            for piece in pieces:
                piece.unlink(missing_ok=True)
    return made


def _copy(source: Path, target: Path, begin: int, size: int) -> None:
    """Copy a part of a file; the target is whole or not there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    with open(source, "rb") as handle, open(temporary, "wb") as out:
        handle.seek(begin)
        left = size
        while left and (chunk := handle.read(min(left, MIB))):
            out.write(chunk)
            left -= len(chunk)
    os.replace(temporary, target)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 2 with one sentence on stderr where something did not arrive."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("receive", "complete"))
    parser.add_argument("call", nargs="?", type=int, default=1)
    parser.add_argument("--source", type=Path, default=Path(".carry"))
    parser.add_argument("--home", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        if options.action == "complete":
            complete(options.home)
            print(f"all files are in {options.home}/files")
            return 0
        made = receive(options.call, options.source, options.home)
    except CarryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"call {options.call} arrived whole; {len(made)} files are complete with it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
