"""The table of what kernels.py measures: operations, their arithmetic, and who computes them.

A new operation is one more entry of OPERATIONS: useful FLOPs and bytes of its definition, its
implementations with ours first, a check for each, and candidates of launch values. Here: selection,
attention and decoding; gradients and the KL are in bench_training.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import bench_baselines as others
import torch
from bench_candidates import decode_launches, select_launches, sparse_launches
from bench_checks import Verdict, check_attention, check_decode, check_selection
from bench_data import Inputs, Shape
from bench_table import (
    Call,
    Implementation,
    Operation,
    dense_flops,
    index_bytes,
    select_flops,
    sparse_flops,
    tensor_bytes,
    whole_bytes,
)
from bench_training import TRAINING
from torch.nn.attention import SDPBackend

from dense2sparse.kernels.fp8 import quantize_index, round_index
from dense2sparse.kernels.triton_attend import attend
from dense2sparse.kernels.triton_decode import decode
from dense2sparse.kernels.triton_select import select
from dense2sparse.kernels.triton_support import target_arch

BF16_MARGIN = 200.0
"""Times the margin of float32 sums: scores rounded to bf16, as plain torch leaves them."""
FP8_MARGIN = 16.0
"""The same for e4m3 products, which Hopper sums with about 14 bits."""


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


def _other(name: str, make: Callable[[Inputs], Call], check: Any) -> Implementation:
    return Implementation(name, lambda inputs, launch: make(inputs), check, ours=False)


FORWARD: tuple[Operation, ...] = (
    Operation(
        "dense",
        flops=dense_flops,
        moved=whole_bytes,
        implementations=(
            _other("library", others.library, _right_dense),
            _other("sdpa cudnn", partial(others.sdpa, SDPBackend.CUDNN_ATTENTION), _right_dense),
            _other("sdpa flash", partial(others.sdpa, SDPBackend.FLASH_ATTENTION), _right_dense),
        ),
        by_group=True,
    ),
    Operation(
        "select",
        flops=select_flops,
        fp8_flops=select_flops,
        moved=lambda shape: index_bytes(shape, shape.length),
        implementations=(
            Implementation("triton", _select, _right_selection, candidates=select_launches),
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
    ),
    Operation(
        "sparse",
        flops=sparse_flops,
        moved=whole_bytes,
        implementations=(
            Implementation("triton", _sparse, _right_sparse, candidates=sparse_launches),
            replace(_other("flex attention", others.flex, _right_sparse), compiled=True),
        ),
        dense="dense",
        by_selection=True,
    ),
    Operation(
        "layer",
        flops=lambda shape: select_flops(shape) + sparse_flops(shape),
        fp8_flops=select_flops,
        moved=lambda shape: whole_bytes(shape) + index_bytes(shape, shape.length),
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
        moved=lambda shape: tensor_bytes(shape, 1, shape.length),
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
        moved=lambda shape: tensor_bytes(shape, 1, _kept(shape)) + index_bytes(shape, 1),
        implementations=(
            Implementation("triton", _decode, check_decode, candidates=decode_launches),
        ),
        dense="decode dense",
        decode=True,
    ),
)
OPERATIONS = FORWARD + TRAINING
"""Dense ones before those that are compared with them."""
