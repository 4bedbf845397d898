"""Reads the `.wandb` file of an offline run, for tests: LevelDB-style blocks of protobuf records."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768


def records(path: Path) -> Iterator[Any]:
    """Every record of the file, in order."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:  # no room for a header: padding up to the next block
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        place += 7
        whole += data[place : place + length]
        place += length
        if kind in (1, 4):  # a full record, or the last piece of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def history(path: Path) -> list[dict[str, Any]]:
    """What was logged, one dictionary a point; tables and pages are dictionaries with their `path`."""
    points = []
    for record in records(path):
        if record.WhichOneof("record_type") != "history":
            continue
        point: dict[str, Any] = {}
        for item in record.history.item:
            name, *inner = [item.key] if item.key else item.nested_key
            value = json.loads(item.value_json)
            if inner:
                point.setdefault(name, {})["/".join(inner)] = value
            else:
                point[name] = value
        points.append(point)
    return points
