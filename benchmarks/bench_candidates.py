"""Launch values that kernels.py --sweep tries; of operations with several kernels one kernel at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from bench_data import Inputs

from dense2sparse.kernels import triton_attend_backward, triton_kl, triton_sparse_kl
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


def select_launches(inputs: Inputs) -> list[Any]:
    return _grid((64, 128, 256), (64, 128), inputs.shape.block_size, (2, 3))


def sparse_launches(inputs: Inputs) -> list[Any]:
    return _grid((64, 128), (32, 64, 128), inputs.shape.block_size, (2, 3))


def decode_launches(inputs: Inputs) -> list[Any]:
    repeats = inputs.shape.heads // inputs.shape.groups
    keys = [size for size in (16, 32, 64, 128) if size <= inputs.shape.block_size]
    return [
        Launch(max(16, 1 << (repeats - 1).bit_length()), size, warps, 1)
        for size, warps in product(keys, (1, 2, 4, 8))
    ]


def backward_launches(deterministic: bool, inputs: Inputs) -> list[Any]:
    shape = inputs.shape
    repeats, block = shape.heads // shape.groups, shape.block_size
    usual = triton_attend_backward.default_launch(
        shape.width, repeats, block, inputs.q.dtype, deterministic
    )
    if deterministic:
        return [replace(usual, by_query=one) for one in _grid((64, 128), (32, 64, 128), block)]
    found = [replace(usual, by_key=one) for one in _grid((32, 64, 128), (32, 64, 128), block)]
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


def sparse_kl_launches(deterministic: bool, inputs: Inputs) -> list[Any]:
    shape = inputs.shape
    block = shape.block_size
    usual = triton_sparse_kl.default_launch(shape.width, shape.index_width, block, inputs.q.dtype)
    if deterministic:  # rows are those of the student: one union serves both
        rows = (usual.student.rows,)
        return [replace(usual, query_tile=one) for one in _grid(rows, (32, 64, 128), block)]
    return [replace(usual, key_tile=one) for one in _grid((32, 64, 128), (32, 64, 128), block)]
