"""Names, things and numbers of made documents, and how they are drawn; used by `data.recall_forms`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Rng = np.random.Generator
T = TypeVar("T")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(", ") if ", " in text else text.split())


FIRST_NAMES = _words(
    "Ada Bruno Clara Dorian Edith Felix Greta Hugo Ines Jasper Kora Leopold Mabel Nils Olive Percy "
    "Quentin Rosa Silas Thea Ulric Vera Walter Xenia Yusuf Zelda Amos Bertha Cyril Dora"
)
SURNAMES = _words(
    "Ashdown Birkett Calloway Denholm Everly Fenwick Garrick Holloway Ibbotson Jessop Kettle Larkin "
    "Merrow Northam Oakes Pellam Quill Ravens Stroud Tarrant Underhill Vane Wexley Yarrow Zimmer"
)
PLACES = _words(
    "Harrowby Penlake Dunmere Castleford Ostwick Brindle Marlowe Tidewell Greyholt Larkmoor Saltash "
    "Ferncliff Ravensea Thornby Wyke Alderney Coldbrook Eastmarch Hollin Kestrel-Bay"
)
THINGS = _words(
    "locker trunk cabin bicycle library-card mailbox safe carriage seat ticket receipt ledger "
    "telescope violin permit parcel"
)
OBJECTS = _words(
    "lantern compass teapot umbrella sextant hourglass notebook kettle mirror flute hammer scarf "
    "atlas candlestick basket inkwell whistle spyglass blanket chessboard"
)
ROOMS = _words(
    "attic cellar pantry greenhouse chapel stable boathouse workshop nursery gallery scullery "
    "observatory"
)
GOODS = _words(
    "barrels of salt, crates of apples, coils of rope, sacks of barley, jars of honey, bolts of linen, "
    "tins of tea, cords of firewood, casks of oil, bundles of reeds, boxes of nails, wheels of cheese"
)
BIRDS = _words(
    "heron kestrel wren plover magpie egret finch swallow bittern curlew nightjar dunlin"
)
TREES = _words("Hazel Rowan Birch Alder Cedar Larch Willow Maple Aspen Juniper Linden Sorrel")


def pick(rng: Rng, items: Sequence[str]) -> str:
    """One of `items`."""
    return items[int(rng.integers(len(items)))]


def several(rng: Rng, items: Sequence[T], count: int) -> list[T]:
    """`count` different ones of `items`."""
    return [items[int(i)] for i in rng.permutation(len(items))[:count]]


def number(rng: Rng) -> str:
    """A number of 3 to 7 digits."""
    digits = int(rng.integers(3, 8))
    return str(int(rng.integers(10 ** (digits - 1), 10**digits)))


def code(rng: Rng) -> str:
    """Groups of letters and digits joined by dashes."""
    alphabet = "0123456789abcdef" if rng.random() < 0.6 else "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"
    groups = [
        "".join(pick(rng, alphabet) for _ in range(int(rng.integers(3, 9))))
        for _ in range(int(rng.integers(2, 6)))
    ]
    return "-".join(groups)


def people(rng: Rng, count: int) -> list[str]:
    """`count` different full names."""
    first, last = several(rng, FIRST_NAMES, count), several(rng, SURNAMES, count)
    return [f"{a} {b}" for a, b in zip(first, last, strict=True)]


def enumeration(items: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def with_article(noun: str) -> str:
    """The noun with its article."""
    return f"{'an' if noun[0] in 'aeiou' or noun == 'hourglass' else 'a'} {noun}"
