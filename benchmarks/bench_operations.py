"""The table of what kernels.py measures: operations, their arithmetic, and who computes them.

A new operation (a backward pass, the KL) is one more entry of OPERATIONS: useful FLOPs and bytes of its
definition, its implementations with ours first, a check for each, and candidates of launch values.

Shapes: B batch, H query heads, G groups, N tokens, D head width, D_idx index width, k selected blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import bench_baselines as others
import torch
from bench_checks import Verdict, check_attention, check_decode, check_selection
from bench_data import Inputs, Shape
from torch.nn.attention import SDPBackend

from dense2sparse.kernels.fp8 import quantize_index, round_index
from dense2sparse.kernels.triton_attend import attend
from dense2sparse.kernels.triton_decode import decode
from dense2sparse.kernels.triton_select import select
from dense2sparse.kernels.triton_support import Launch, target_arch

Call = Callable[[], Any]
BYTES = 2
"""Of a bf16 number."""
BF16_MARGIN = 200.0
"""Times the margin of float32 sums: scores rounded to bf16, as plain torch leaves them."""
FP8_MARGIN = 16.0
"""The same for e4m3 products, which Hopper sums with about 14 bits."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation."""

    name: str
    make: Callable[[Inputs, Any], Call]
    """Takes inputs and launch values (None: the defaults); may raise bench_baselines.Skip."""
    check: Callable[[Inputs, Any], Verdict]
    ours: bool = True
    fp8: bool = False
    compiled: bool = False
    """Compiles for a long time at every new shape; see Plan.compiled_at."""


@dataclass(frozen=True)
class Operation:
    """What is computed, by whom."""

    name: str
    flops: Callable[[Shape], float]
    moved: Callable[[Shape], float]
    """Bytes that must be read or written at least once."""
    implementations: tuple[Implementation, ...]
    fp8_flops: Callable[[Shape], float] = lambda shape: 0.0
    """The part of the FLOPs that implementations marked fp8 do in fp8."""
    dense: str | None = None
    """The operation whose best time this one is compared with."""
    by_selection: bool = False
    """Depends on what is selected, so it is measured for every kind of data."""
    decode: bool = False
    """One query a row; timed through a CUDA graph over several copies of the inputs."""
    candidates: Callable[[Inputs], Sequence[Any]] = lambda inputs: ()
    """Launch values that --sweep tries."""


def _tensors(shape: Shape, queries: int, keys: float) -> float:
    """Bytes of q and out of `queries` tokens, and of k and v of `keys` tokens of each group."""
    wide = 2 * queries * shape.heads + 2 * keys * shape.groups
    return shape.batch * wide * shape.width * BYTES


def _index(shape: Shape, queries: int) -> float:
    """Bytes of index q, index k and block ids."""
    read = (queries * shape.groups + shape.length) * shape.index_width * BYTES
    return shape.batch * (read + queries * shape.groups * shape.top_k * 4)


def dense_flops(shape: Shape) -> float:
    return 4 * shape.width * shape.heads * shape.pairs


def select_flops(shape: Shape) -> float:
    return 2 * shape.index_width * shape.groups * shape.pairs


def sparse_flops(shape: Shape) -> float:
    return 4 * shape.width * shape.heads * shape.selected_pairs


def _whole(shape: Shape) -> float:
    return _tensors(shape, shape.length, shape.length)


def _kept(shape: Shape) -> int:
    return min(shape.length, shape.top_k * shape.block_size)


# Ours.


def _select(inputs: Inputs, launch: Any) -> Call:
    return partial(select, inputs.index_q, inputs.index_k, None, **inputs.budget, launch=launch)


def _select_fp8(inputs: Inputs, launch: Any) -> Call:
    """Rounding to fp8 included."""
    if target_arch() < 89:
        raise others.Skip("this device has no fp8")
    index_q, index_k, budget = inputs.index_q, inputs.index_k, inputs.budget

    def call() -> torch.Tensor:
        q8, k8, factors = quantize_index(index_q, index_k, block_size=budget["block_size"])
        return select(q8, k8, None, **budget, key_scales=factors, launch=launch)

    return call


def _sparse(inputs: Inputs, launch: Any) -> Call:
    assert inputs.block_ids is not None
    tensors = inputs.q, inputs.k, inputs.v, inputs.block_ids, None
    sizes: dict[str, Any] = {"block_size": inputs.shape.block_size, "scale": inputs.scale}
    return partial(attend, *tensors, **sizes, launch=launch)


def _layer(choose: Callable[[Inputs, Any], Call], inputs: Inputs, launch: Any) -> Call:
    """Selection, then attention: over the ids given with the data, where there are such."""
    chosen = choose(inputs, None)
    shape = inputs.shape

    def call() -> tuple[Any, ...]:
        found = chosen()
        ids = found if inputs.block_ids is None else inputs.block_ids
        out, lse, _ = attend(
            inputs.q,
            inputs.k,
            inputs.v,
            ids,
            None,
            block_size=shape.block_size,
            scale=inputs.scale,
            launch=launch,
        )
        return out, lse, ids, found

    return call


def _decode(inputs: Inputs, launch: Any) -> Call:
    arguments = inputs.q, inputs.k, inputs.v, inputs.index_q, inputs.index_k, None, None
    return partial(decode, *arguments, **inputs.budget, scale=inputs.scale, launch=launch)


# Checks.


def _right_selection(inputs: Inputs, ids: Any) -> Verdict:
    return check_selection(inputs, ids)


def _rounded(inputs: Inputs) -> Inputs:
    """The same with the index tensors that fp8 ranks by."""
    index_q, index_k = round_index(
        inputs.index_q, inputs.index_k, block_size=inputs.shape.block_size
    )
    return replace(inputs, index_q=index_q, index_k=index_k)


def _right_dense(inputs: Inputs, result: Any) -> Verdict:
    return check_attention(inputs, result[0], result[1] if len(result) > 1 else None, None)


def _right_sparse(inputs: Inputs, result: Any) -> Verdict:
    lse = result[1] if len(result) > 1 else None
    return check_attention(inputs, result[0], lse, inputs.block_ids)


def _right_layer(inputs: Inputs, result: Any, fp8: bool = False) -> Verdict:
    out, lse, ids, found = result
    if fp8:
        selection = check_selection(_rounded(inputs), found, FP8_MARGIN)
    else:
        selection = check_selection(inputs, found)
    return selection if not selection.fine else check_attention(inputs, out, lse, ids)


def _unchecked(inputs: Inputs, result: Any) -> Verdict:
    return Verdict(0.0, checked=False)


# Launch values to try.


def _launches(
    rows: Sequence[int], keys: Sequence[int], warps: Sequence[int], most: int
) -> list[Any]:
    sizes = product(rows, [size for size in keys if size <= most], warps, (2, 3))
    return [Launch(*values) for values in sizes]


def _select_launches(inputs: Inputs) -> list[Any]:
    return _launches((64, 128, 256), (64, 128), (4, 8), inputs.shape.block_size)


def _sparse_launches(inputs: Inputs) -> list[Any]:
    return _launches((64, 128), (32, 64, 128), (4, 8), inputs.shape.block_size)


def _decode_launches(inputs: Inputs) -> list[Any]:
    repeats = inputs.shape.heads // inputs.shape.groups
    keys = [size for size in (16, 32, 64, 128) if size <= inputs.shape.block_size]
    return [
        Launch(max(16, 1 << (repeats - 1).bit_length()), size, warps, 1)
        for size, warps in product(keys, (1, 2, 4, 8))
    ]


def _other(name: str, make: Callable[[Inputs], Call], check: Any) -> Implementation:
    return Implementation(name, lambda inputs, launch: make(inputs), check, ours=False)


OPERATIONS: tuple[Operation, ...] = (
    Operation(
        "dense",
        flops=dense_flops,
        moved=_whole,
        implementations=(
            _other("library", others.library, _right_dense),
            _other("sdpa cudnn", partial(others.sdpa, SDPBackend.CUDNN_ATTENTION), _right_dense),
            _other("sdpa flash", partial(others.sdpa, SDPBackend.FLASH_ATTENTION), _right_dense),
        ),
    ),
    Operation(
        "select",
        flops=select_flops,
        fp8_flops=select_flops,
        moved=lambda shape: _index(shape, shape.length),
        implementations=(
            Implementation("triton", _select, _right_selection),
            Implementation(
                "triton fp8",
                _select_fp8,
                lambda inputs, ids: check_selection(_rounded(inputs), ids, FP8_MARGIN),
                fp8=True,
            ),
            _other(
                "torch matmul, max, topk",
                others.torch_select,
                lambda inputs, ids: check_selection(inputs, ids, BF16_MARGIN),
            ),
            _other("torch topk alone", others.topk_alone, _unchecked),
        ),
        candidates=_select_launches,
    ),
    Operation(
        "sparse",
        flops=sparse_flops,
        moved=_whole,
        implementations=(
            Implementation("triton", _sparse, _right_sparse),
            replace(_other("flex attention", others.flex, _right_sparse), compiled=True),
        ),
        dense="dense",
        by_selection=True,
        candidates=_sparse_launches,
    ),
    Operation(
        "layer",
        flops=lambda shape: select_flops(shape) + sparse_flops(shape),
        fp8_flops=select_flops,
        moved=lambda shape: _whole(shape) + _index(shape, shape.length),
        implementations=(
            Implementation("triton", partial(_layer, _select), _right_layer),
            Implementation(
                "triton fp8",
                partial(_layer, _select_fp8),
                partial(_right_layer, fp8=True),
                fp8=True,
            ),
            _other("flash-msa", others.flash_msa, _right_sparse),
        ),
        dense="dense",
        by_selection=True,
    ),
    Operation(
        "decode dense",
        flops=lambda shape: 4 * shape.batch * shape.width * shape.heads * shape.length,
        moved=lambda shape: _tensors(shape, 1, shape.length),
        implementations=(
            _other("library", others.library_decode, _right_dense),
            _other(
                "sdpa cudnn", partial(others.sdpa_decode, SDPBackend.CUDNN_ATTENTION), _right_dense
            ),
            _other(
                "sdpa flash", partial(others.sdpa_decode, SDPBackend.FLASH_ATTENTION), _right_dense
            ),
            _other("torch matmul", others.matmul_decode, _right_dense),
        ),
        decode=True,
    ),
    Operation(
        "decode",
        flops=lambda shape: (
            shape.batch
            * (
                2 * shape.index_width * shape.groups * shape.length
                + 4 * shape.width * shape.heads * _kept(shape)
            )
        ),
        moved=lambda shape: _tensors(shape, 1, _kept(shape)) + _index(shape, 1),
        implementations=(
            Implementation("triton", _decode, lambda inputs, out: check_decode(inputs, out)),
        ),
        dense="decode dense",
        decode=True,
        candidates=_decode_launches,
    ),
)
"""Dense ones before those that are compared with them."""
