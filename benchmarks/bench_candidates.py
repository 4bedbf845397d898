"""Launch values that kernels.py --sweep tries; of operations with several kernels one kernel at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from bench_data import Inputs

from dense2sparse.kernels import (
    triton_attend_backward,
    triton_decode,
    triton_kl,
    triton_sparse_kl,
)
from dense2sparse.kernels.triton_support import Launch

ANY = 1 << 30


def _grid(
    rows: Sequence[int],
    keys: Sequence[int],
    most: int = ANY,
    stages: Sequence[int] = (1, 2, 3),
    warps: Sequence[int] = (4, 8),
) -> list[Launch]:
    """All combinations with at most `most` keys a step."""
    sizes = product(rows, [size for size in keys if size <= most], warps, stages)
    return [Launch(*values) for values in sizes]


def _likely(first: Sequence[Launch], rest: Sequence[Launch]) -> list[Any]:
    """`first`, which by their registers fit a multiprocessor best, then the others."""
    return [*first, *(one for one in rest if one not in first)]


def select_launches(inputs: Inputs) -> list[Any]:
    block = inputs.shape.block_size
    likely = [
        Launch(128, 128, 8, 2, programs=2),
        Launch(128, 64, 4, 2),
        Launch(64, 128, 4, 2),
        Launch(64, 64, 4, 3),
        Launch(128, 64, 8, 2, programs=2),
        Launch(128, 64, 8, 3),
    ]
    alone = _grid((64, 128, 256), (64, 128), block, (2, 3))
    together = [replace(one, programs=2) for one in alone if one.num_warps == 8]
    return _likely([replace(one, keys=min(one.keys, block)) for one in likely], alone + together)


def sparse_launches(inputs: Inputs) -> list[Any]:
    block = inputs.shape.block_size
    likely = [
        Launch(128, 64, 8, 3),
        Launch(64, 64, 4, 2),
        Launch(64, 64, 4, 3),
        Launch(128, 128, 8, 2),
    ]
    return _likely(
        [replace(one, keys=min(one.keys, block)) for one in likely],
        _grid((64, 128), (32, 64, 128), block, (2, 3)),
    )


def decode_launches(inputs: Inputs) -> list[Any]:
    """Pieces of the attention, then shares and tiles of the scores, then launches as they once were."""
    shape = inputs.shape
    usual = triton_decode.default_launch(
        shape.width,
        shape.index_width,
        shape.heads,
        shape.groups,
        shape.block_size,
        inputs.q.dtype,
    )
    pieces = [size for size in (32, 64, 128) if size <= shape.block_size]
    steps = product(pieces, (16, 32, 64), (2, 4, 8), (1, 3, 5))
    found = [
        replace(usual, piece=piece, attend=Launch(usual.attend.rows, keys, warps, stages))
        for piece, keys, warps, stages in steps
        if keys <= piece and stages - 1 <= piece // keys
    ]
    for programs, (keys, stages) in product(
        (128, 256, 264, 384, 512), ((64, 3), (64, 4), (64, 6), (128, 2), (128, 3))
    ):
        select = replace(usual.select, programs=programs, keys=keys, num_stages=stages)
        found.append(replace(usual, select=select))
    ordinary = replace(usual.select, overlap=False)
    found.append(replace(usual, repeated=ANY))
    found.append(replace(usual, select=ordinary))
    # No programmatic launch and the last top-k in a launch of its own: the first design.
    first = replace(ordinary, programs=264, keys=128, num_stages=3)
    return [*found, replace(usual, repeated=0), replace(usual, select=first, repeated=0)]


def backward_launches(deterministic: bool, inputs: Inputs) -> list[Any]:
    shape = inputs.shape
    repeats, block = shape.heads // shape.groups, shape.block_size
    usual = triton_attend_backward.default_launch(
        shape.width, repeats, block, inputs.q.dtype, deterministic
    )
    likely = [
        Launch(64, 64, 4, 2),
        Launch(32, 64, 4, 3),
        Launch(32, 64, 4, 2),
        Launch(64, 128, 8, 2),
        Launch(32, 128, 8, 4),
    ]
    by_key = _likely(likely, _grid((32, 64, 128), (32, 64, 128), block))
    found: list[Any] = [
        replace(usual, by_key=replace(one, keys=min(one.keys, block))) for one in by_key
    ]
    if deterministic:
        found += [replace(usual, by_query=one) for one in _grid((64, 128), (32, 64, 128), block)]
    return found + [replace(usual, chunk=size) for size in (512, 1024, 2048, 4096, 8192)]


def full_kl_launches(inputs: Inputs) -> list[Any]:
    shape = inputs.shape
    usual = triton_kl.default_launch(shape.width, shape.index_width, inputs.q.dtype)
    likely = [
        replace(usual, difference=Launch(64, 128, 4, 2, programs=3)),
        usual,
        replace(usual, difference=Launch(64, 128, 4, 3)),
        replace(usual, query=Launch(64, 64, 4, 3), key=Launch(64, 64, 4, 3)),
        replace(usual, student=Launch(128, 128, 4, 2)),
    ]
    return [
        *likely,
        *(replace(usual, difference=one) for one in _grid((64, 128), (64, 128))),
        *(replace(usual, student=one) for one in _grid((64, 128), (64, 128))),
        *(replace(usual, query=one) for one in _grid((64, 128), (32, 64, 128))),
        *(replace(usual, key=one) for one in _grid((32, 64, 128), (32, 64, 128))),
    ]


def sparse_kl_launches(inputs: Inputs) -> list[Any]:
    shape = inputs.shape
    block, repeats = shape.block_size, shape.heads // shape.groups
    usual = triton_sparse_kl.default_launch(
        shape.width, shape.index_width, repeats, block, inputs.q.dtype
    )
    likely = [
        replace(usual, difference=Launch(64, 64, 4, 2)),
        replace(usual, difference=Launch(64, 64, 4, 3)),
        replace(usual, difference=Launch(128, 64, 8, 2)),
        replace(usual, gradient=Launch(64, 64, 4, 3)),
        replace(usual, gradient=Launch(128, 128, 8, 3)),
    ]
    differences = [replace(usual, difference=one) for one in _grid((64, 128), (32, 64), block)]
    return [*likely, *(one for one in differences if one not in likely)]
