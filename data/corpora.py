"""Real English texts by name, fetched once from packages, checksummed, cached, never committed.

| work       | text                                  | comes with                | licence               |
|------------|---------------------------------------|---------------------------|-----------------------|
| botchan    | Soseki, translated 1919, novel        | sentencepiece 0.2.3 sdist | public domain; Apache |
| lcet10     | Library of Congress workshop, 1992    | brotli 1.2.1 sdist        | US government; MIT    |
| alice29    | Carroll, Alice in Wonderland          | brotli 1.2.1 sdist        | public domain; MIT    |
| asyoulik   | Shakespeare, As You Like It, play     | brotli 1.2.1 sdist        | public domain; MIT    |
| plrabn12   | Milton, Paradise Lost, verse          | brotli 1.2.1 sdist        | public domain; MIT    |
| six novels | Austen                                | Debian r-cran-janeaustenr | public domain; MIT    |

Corpora are disjoint where it matters: nothing of `prose` or `austen` (for training) is in `heldout`
or `ruler-pd` (for measuring). All but `austen` need PyPI only. `read` is the only door;
`data.documents` and the evaluation's haystack come through it.
"""

from __future__ import annotations

import bz2
import difflib
import hashlib
import lzma
import re
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .fetch import FetchError, apt_download, lock, pip_download, write_atomically


@dataclass(frozen=True)
class Work:
    """One text: where it lies, what it must hash to, and where the author's words begin and end."""

    package: str
    member: str
    sha256: str
    begins: str
    """First line, with its indentation."""
    ends: str | None = None
    """Beginning of the first line that is not the author's any more."""
    layout: str = "blank_lines"
    """How paragraphs are told apart: blank_lines, short_lines (no blank lines kept) or verse."""


SDISTS = {
    "brotli==1.2.1": "02b2f7b5a83485efe448a44ddf7983def05c3bb1dcf917d4f7154070260e13de",
    "sentencepiece==0.2.3": "21618ad31f0453a1ebf5ec58defed99758d54af0b670546ecac639ddd8b86fbd",
}
AUSTEN_PACKAGE = "r-cran-janeaustenr"
AUSTEN_NOVELS = (  # in the order of the records of its data file
    "emma",
    "mansfield_park",
    "northanger_abbey",
    "persuasion",
    "pride_and_prejudice",
    "sense_and_sensibility",
)

WORKS = {
    "botchan": Work(
        "sentencepiece==0.2.3",
        "test/botchan.txt",
        "464bd5300c24fce16fcc4555d4231a57632caae4d0090ad6aa92854a3b227ba7",
        "CHAPTER I",
        "[A: Insitent]",
        "short_lines",
    ),
    "lcet10": Work(
        "brotli==1.2.1",
        "tests/testdata/lcet10.txt",
        "5314ba1dbb03f471df88bec6cd120a938ef60d0fd3511c5c1dce61bf7463245f",
        "                            Acknowledgements",
        "                          Appendix I:  PROGRAM",
    ),
    "alice29": Work(
        "brotli==1.2.1",
        "tests/testdata/alice29.txt",
        "7467306ee0feed4971260f3c87421154a05be571d944e9cb021a5713700c38f0",
        "                            CHAPTER I",
        "                             THE END",
    ),
    "asyoulik": Work(
        "brotli==1.2.1",
        "tests/testdata/asyoulik.txt",
        "eaa3526fe53859f34ecdf255712f9ecf0b2c903451d4755b2edaa2e2599cb0fc",
        "ACT I",
        None,
        "verse",
    ),
    "plrabn12": Work(
        "brotli==1.2.1",
        "tests/testdata/plrabn12.txt",
        "07e2e0b461af78c7c647cb53dab39de560198e16f799b4516eccf0fbd69f764c",
        "Book I",
        "[The End]",
        "verse",
    ),
    "emma": Work(
        AUSTEN_PACKAGE,
        "emma",
        "dd08b340a56ad4a0a00718d5682528a5a5886ae0aef91c9e0fa528074fa64b75",
        "EMMA",
    ),
    "mansfield_park": Work(
        AUSTEN_PACKAGE,
        "mansfield_park",
        "e0e9ef3863ea77f51f6070062ee0dd50ad9b933223880617629e4e4963ea40ff",
        "MANSFIELD PARK",
    ),
    "northanger_abbey": Work(
        AUSTEN_PACKAGE,
        "northanger_abbey",
        "8618a5acf5be50cc6e9b7680c7469fb6012649ab08c709dfc63c6367989fd31d",
        "NORTHANGER ABBEY",
    ),
    "persuasion": Work(
        AUSTEN_PACKAGE,
        "persuasion",
        "726513a6c18bb678427bcbcf7c72d0d20816a67c25b0471b26ddcabf3ebac140",
        "Persuasion",
    ),
    "pride_and_prejudice": Work(
        AUSTEN_PACKAGE,
        "pride_and_prejudice",
        "2e44edaa4946d64ad541c68e0224f5d672f43bf3ce2a8a0b0637ad5e02fc6eb3",
        "PRIDE AND PREJUDICE",
    ),
    "sense_and_sensibility": Work(
        AUSTEN_PACKAGE,
        "sense_and_sensibility",
        "0996d90842bbe8093f3b8142c1e77d1b20cff52d1d0615f3ed67733653e74e26",
        "SENSE AND SENSIBILITY",
    ),
}

CORPORA: dict[str, tuple[str, ...]] = {
    "prose": ("botchan", "lcet10"),
    "heldout": ("alice29",),
    "ruler-pd": ("alice29", "asyoulik", "plrabn12"),
    "austen": AUSTEN_NOVELS,
}


def read(name: str, works: Sequence[str] | None, cache_dir: str | Path) -> dict[str, str]:
    """Texts of a corpus, in the order asked for; fetched at the first call, then from the cache.

    Args:
        name: a key of `CORPORA`.
        works: works of that corpus; None for all of them.
        cache_dir: the texts lie under `cache_dir/corpora`; several processes may ask at once.

    Returns:
        work -> text, one paragraph (or line of verse) per line, paragraphs parted by blank lines.

    Raises:
        ValueError: unknown corpus or work, a text that cannot be fetched, or one that is damaged.
    """
    if name not in CORPORA:
        raise ValueError(f"corpus={name!r} is not known{_nearest(name, CORPORA)}")
    for work in works or ():
        if work not in CORPORA[name]:
            raise ValueError(f"corpus {name!r} has no work {work!r}{_nearest(work, CORPORA[name])}")
    if works is not None and not works:
        raise ValueError(
            f"works=[] leaves nothing of corpus {name!r}: name works or remove the key"
        )
    return {work: _tidy(work, _raw(work, Path(cache_dir))) for work in works or CORPORA[name]}


def checksum(name: str, works: Sequence[str] | None = None) -> str:
    """Sha256 over the checksums of a corpus's works: a fingerprint that needs no download."""
    joined = "\n".join(WORKS[work].sha256 for work in works or CORPORA[name])
    return hashlib.sha256(joined.encode()).hexdigest()


def _nearest(given: str, known: Sequence[str] | dict) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (known: {', '.join(known)})"


def _raw(work: str, cache_dir: Path) -> bytes:
    """The work's bytes as published, verified; fetches every work of its package at once."""
    folder = cache_dir / "corpora"
    path = folder / f"{work}.txt"
    if not path.exists():
        with lock(folder):
            if not path.exists():  # another process may have fetched it meanwhile
                for left in folder.glob(".*.tmp"):  # of a run that was killed
                    left.unlink()
                _fetch(WORKS[work].package, folder)
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != WORKS[work].sha256:
        raise ValueError(f"{path} is damaged (its sha256 is not {work}'s): delete it and run again")
    return content


def _fetch(package: str, folder: Path) -> None:
    """Download `package` and store its works; nothing is stored that has another checksum."""
    with tempfile.TemporaryDirectory() as scratch:
        if package == AUSTEN_PACKAGE:
            root = apt_download(package, Path(scratch))
            data = root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
            texts = dict(zip(AUSTEN_NOVELS, _r_strings(data.read_bytes()), strict=False))
        else:
            archive = pip_download(package, Path(scratch), sha256=SDISTS[package])
            texts = _unpack(archive, package)
        for work, text in texts.items():
            if hashlib.sha256(text).hexdigest() != WORKS[work].sha256:
                raise FetchError(
                    f"the text {work!r} in {package} is not the one this version was made with "
                    "(sha256 differs): use another corpus or update dense2sparse"
                )
            try:
                write_atomically(folder / f"{work}.txt", text)
            except OSError as error:
                raise FetchError(
                    f"{folder} cannot be written ({error.strerror}): free it"
                ) from None


def _unpack(archive: Path, package: str) -> dict[str, bytes]:
    """The works that lie in a source archive."""
    root = package.replace("==", "-")
    texts = {}
    with tarfile.open(archive) as tar:
        for work, where in WORKS.items():
            if where.package == package:
                handle = tar.extractfile(f"{root}/{where.member}")
                if handle is None:
                    raise FetchError(f"{package} holds no {where.member}: update dense2sparse")
                texts[work] = handle.read()
    return texts


def _r_strings(data: bytes) -> Iterator[bytes]:
    """Character vectors of an R lazy-load file, each as its lines joined by newlines.

    A record is a 4-byte big-endian length, then `2` + bzip2, `Z` + xz, or bare zlib. Inside is R's XDR
    serialisation, version 3: a 23-byte head (format, versions, encoding), a string vector's type and
    length, then each string as flags, length (-1: missing) and bytes.
    """
    at = 0
    codec: Any
    while at < len(data):
        kind = data[at + 4 : at + 5]
        if kind == b"2":
            codec, body = bz2.BZ2Decompressor(), data[at + 5 :]
        elif kind == b"Z":
            codec, body = lzma.LZMADecompressor(), data[at + 5 :]
        else:
            codec, body = zlib.decompressobj(), data[at + 4 :]
        record = codec.decompress(body)
        at = len(data) - len(codec.unused_data)
        kind_of_value, count = struct.unpack_from(">II", record, 23)
        if kind_of_value & 0xFF != 16:
            raise FetchError("the Austen data file has an unknown form: update dense2sparse")
        lines, position = [], 31
        for _ in range(count):
            size = struct.unpack_from(">i", record, position + 4)[0]
            position += 8
            lines.append(record[position : position + max(size, 0)])
            position += max(size, 0)
        yield b"\n".join(lines)


def _tidy(work: str, raw: bytes) -> str:
    """Strip what is not the author's and join hard-wrapped lines into paragraphs."""
    where = WORKS[work]
    lines = raw.decode("utf-8-sig").splitlines()
    stripped = [line.strip() for line in lines]
    start = [line.rstrip() for line in lines].index(where.begins)
    stop = len(lines)
    if where.ends is not None:
        stop = next(i for i in range(start, stop) if stripped[i].startswith(where.ends.strip()))
    body = stripped[start:stop]
    if where.layout == "verse":
        text = "\n".join(re.sub(r"\s+", " ", line) for line in body)
        return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    paragraphs, current = [], []
    for line in body:
        if line:
            current.append(line)
        # Without blank lines a paragraph ends where a sentence does on a line that was not full.
        ends = not line or (where.layout == "short_lines" and len(line) < 62 and line[-1] in '.?!"')
        if (ends or line.startswith("CHAPTER")) and current:
            paragraphs.append(re.sub(r"\s+", " ", " ".join(current)))
            current = []
    if current:
        paragraphs.append(re.sub(r"\s+", " ", " ".join(current)))
    return "\n\n".join(paragraphs) + "\n"
