"""Entries of kernels.py's table that have gradients: backward passes, the KL, and whole training layers.

    dense backward, dense training   the best library: what the others are compared with
    sparse backward                  gradients of q, k and v from what the forward pass left
    kl, sparse kl                    value and gradients of the index branch, full rows or selected blocks
    training layer                   selection, sparse attention, its KL, and the backward pass of both
    warmup trained, warmup frozen    full attention and its KL, with and without the backbone's gradients

Layers go through kernels/ops.py and autograd as the model's own layers do; the rest calls the kernels.
Where the data brings block ids, a layer runs its selection and attends to the given ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import bench_baselines as others
import torch
from bench_candidates import backward_launches, full_kl_launches, sparse_kl_launches
from bench_checks import Verdict, check_attention, check_selection
from bench_data import Inputs
from bench_gradients import Left, check_backward, check_kl, check_kl_value, first_fault
from bench_table import (
    Call,
    Implementation,
    Operation,
    backward_flops,
    dense_flops,
    full_kl_flops,
    index_bytes,
    kl_bytes,
    sparse_flops,
    sparse_kl_flops,
    training_bytes,
    training_flops,
    warmup_flops,
    whole_bytes,
)
from torch import Tensor
from torch.nn.attention import SDPBackend

from dense2sparse.kernels import ops, triton_attend_backward, triton_kl, triton_sparse_kl
from dense2sparse.kernels.library_dense import dense_attention
from dense2sparse.kernels.triton_attend import attend

FRACTION = 0.25
"""Share of the query tiles in the sampled KL."""


@dataclass
class Made:
    """What a layer or a part of it returns; what is None was not part of it."""

    left: Left
    grads: tuple[Tensor, Tensor, Tensor] | None = None
    kl: tuple[Tensor, Tensor, Tensor] | None = None
    selected: Tensor | None = None
    """Ids that selection found, which may not be those that were attended to."""


def _kl_scales(inputs: Inputs) -> dict[str, Any]:
    return {"scale": inputs.scale, "index_scale": inputs.shape.index_width**-0.5}


def _grad_out(inputs: Inputs) -> Tensor:
    """Independent normal gradient of the output, in its layout."""
    generator = torch.Generator(inputs.q.device).manual_seed(1)
    return torch.empty_like(inputs.q).normal_(generator=generator)


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


# Dense, by libraries.


Forward = Callable[[Inputs, Tensor, Tensor, Tensor], Tensor]


def _dense_backward(forward: Forward, inputs: Inputs, launch: Any) -> Call:
    leaves, grad = _leaves(inputs.q, inputs.k, inputs.v), _grad_out(inputs)
    out = forward(inputs, *leaves)

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, grad, retain_graph=True)

    return call


def _dense_training(forward: Forward, inputs: Inputs, launch: Any) -> Call:
    leaves, grad = _leaves(inputs.q, inputs.k, inputs.v), _grad_out(inputs)
    return lambda: torch.autograd.grad(forward(inputs, *leaves), leaves, grad)


def _dense_left(inputs: Inputs) -> Left:
    out, lse = dense_attention(inputs.q, inputs.k, inputs.v, scale=inputs.scale)
    return Left(out, lse, _grad_out(inputs), None)


def _right_dense(inputs: Inputs, grads: Any) -> Verdict:
    return check_backward(inputs, _dense_left(inputs), grads)


# Ours: parts.


def _sparse_left(inputs: Inputs) -> Left:
    ids, block_size = inputs.block_ids, inputs.shape.block_size
    assert ids is not None
    tensors = inputs.q, inputs.k, inputs.v, ids, None
    out, lse, _ = attend(*tensors, block_size=block_size, scale=inputs.scale)
    return Left(out, lse, _grad_out(inputs), ids)


def _sparse_backward(deterministic: bool, inputs: Inputs, launch: Any) -> Call:
    left = _sparse_left(inputs)
    ids = left.block_ids
    assert ids is not None

    def call() -> Made:
        grads = triton_attend_backward.attend_backward(
            inputs.q,
            inputs.k,
            inputs.v,
            ids,
            None,
            left.out,
            left.lse,
            left.grad_out,
            block_size=inputs.shape.block_size,
            scale=inputs.scale,
            deterministic=deterministic,
            launch=launch,
        )
        return Made(left, grads)

    return call


def _full_kl(fraction: float, inputs: Inputs, launch: Any) -> Call:
    left = _dense_left(inputs)
    left.out = left.grad_out = left.out[:0]  # not needed further: memory
    return lambda: Made(left, kl=_full_kl_of(inputs, left, fraction, launch))


def _full_kl_of(inputs: Inputs, left: Left, fraction: float, launch: Any) -> Any:
    return triton_kl.full_kl(
        inputs.q,
        inputs.k,
        left.lse,
        inputs.index_q,
        inputs.index_k,
        None,
        **_kl_scales(inputs),
        need_grad=True,
        fraction=fraction,
        launch=launch,
    )


def _sparse_kl(inputs: Inputs, launch: Any) -> Call:
    left = _sparse_left(inputs)
    left.out = left.grad_out = left.out[:0]
    return lambda: Made(left, kl=_sparse_kl_of(inputs, left, launch))


def _sparse_kl_of(inputs: Inputs, left: Left, launch: Any) -> Any:
    assert left.block_ids is not None
    return triton_sparse_kl.sparse_kl(
        inputs.q,
        inputs.k,
        left.lse,
        inputs.index_q,
        inputs.index_k,
        left.block_ids,
        None,
        **_kl_scales(inputs),
        block_size=inputs.shape.block_size,
        need_grad=True,
        launch=launch,
    )


# Ours: whole layers.


def _training_layer(inputs: Inputs, launch: Any) -> Call:
    q, k, v, index_q, index_k = _leaves(
        inputs.q, inputs.k, inputs.v, inputs.index_q, inputs.index_k
    )
    grad = _grad_out(inputs)
    size: dict[str, Any] = {"block_size": inputs.shape.block_size}
    common: dict[str, Any] = {"backend": "triton"}

    def call() -> Made:
        with torch.no_grad():
            selected = ops.select_blocks(index_q, index_k, **inputs.budget, **common)
        ids = selected if inputs.block_ids is None else inputs.block_ids
        out, lse = ops.sparse_attention(q, k, v, ids, scale=inputs.scale, **size, **common)
        value = ops.index_kl(
            q, k, lse, index_q, index_k, **_kl_scales(inputs), block_ids=ids, **size, **common
        )
        found = _both_gradients(out, value, grad, [q, k, v, index_q, index_k])
        return Made(Left(out.detach(), lse, grad, ids), found[:3], (value, *found[3:]), selected)

    return call


def _warmup(fraction: float, frozen: bool, inputs: Inputs, launch: Any) -> Call:
    index = _leaves(inputs.index_q, inputs.index_k)
    main = [inputs.q, inputs.k, inputs.v]
    main = main if frozen else _leaves(*main)
    grad = _grad_out(inputs)

    def call() -> Made:
        out, lse = dense_attention(*main, scale=inputs.scale)
        value = ops.index_kl(
            main[0],
            main[1],
            lse,
            index[0],
            index[1],
            **_kl_scales(inputs),
            fraction=fraction,
            backend="triton",
        )
        left = Left(out.detach(), lse, grad, None)
        if frozen:
            grad_q, grad_k = torch.autograd.grad(value, index)
            return Made(left, kl=(value, grad_q, grad_k))
        found = _both_gradients(out, value, grad, [*main, *index])
        return Made(left, found[:3], (value, *found[3:]))

    return call


def _both_gradients(out: Tensor, kl: Tensor, grad: Tensor, leaves: list[Tensor]) -> Any:
    return torch.autograd.grad((out, kl), leaves, (grad, torch.ones_like(kl)))


# Checks.


def _right(inputs: Inputs, made: Made, fraction: float = 1.0) -> Verdict:
    """Everything that was made."""
    left, found = made.left, []
    if made.selected is not None:
        found.append(check_selection(inputs, made.selected))
    if len(left.out):
        found.append(check_attention(inputs, left.out, left.lse, left.block_ids))
    if made.grads is not None:
        found.append(check_backward(inputs, left, made.grads))
    if made.kl is not None:
        kl = tuple(tensor.detach() for tensor in made.kl)
        found.append(check_kl(inputs, left, kl, **_sampled(inputs, fraction)))  # type: ignore[arg-type]
    return first_fault(*found)


def _sampled(inputs: Inputs, fraction: float) -> dict[str, Any]:
    """Tile and weight of a sampled KL, from the kernel's own launch values."""
    if fraction == 1.0:
        return {}
    shape = inputs.shape
    launch = triton_kl.default_launch(shape.width, shape.index_width, inputs.q.dtype)
    num_tiles = -(-shape.length // launch.tile)
    return {"tile": launch.tile, "weight": num_tiles / max(1, round(fraction * num_tiles))}


def _right_full_kl(inputs: Inputs, made: Made) -> Verdict:
    def value_of(part: Inputs, left: Left) -> Tensor:
        return _full_kl_of(part, left, 1.0, None)[0]

    return first_fault(_right(inputs, made), check_kl_value(inputs, made.left, value_of))


def _right_sparse_kl(inputs: Inputs, made: Made) -> Verdict:
    def value_of(part: Inputs, left: Left) -> Tensor:
        return _sparse_kl_of(part, left, None)[0]

    return first_fault(_right(inputs, made), check_kl_value(inputs, made.left, value_of))


def _libraries(make: Callable[..., Call]) -> tuple[Implementation, ...]:
    return tuple(
        Implementation(name, partial(make, forward), _right_dense, ours=False)
        for name, forward in (
            ("library", others.library_forward),
            ("sdpa cudnn", partial(others.sdpa_forward, SDPBackend.CUDNN_ATTENTION)),
            ("sdpa flash", partial(others.sdpa_forward, SDPBackend.FLASH_ATTENTION)),
        )
    )


def _warmups(frozen: bool) -> tuple[Implementation, ...]:
    return tuple(
        Implementation(
            name,
            partial(_warmup, fraction, frozen),
            partial(_right, fraction=fraction),
            flops=partial(warmup_flops, fraction, frozen),
        )
        for name, fraction in (("triton", 1.0), ("triton quarter", FRACTION))
    )


TRAINING: tuple[Operation, ...] = (
    Operation(
        "dense backward",
        flops=lambda shape: backward_flops(dense_flops(shape)),
        moved=training_bytes,
        implementations=_libraries(_dense_backward),
        by_group=True,
        training=True,
    ),
    Operation(
        "dense training",
        flops=lambda shape: dense_flops(shape) + backward_flops(dense_flops(shape)),
        moved=training_bytes,
        implementations=_libraries(_dense_training),
        by_group=True,
        training=True,
    ),
    Operation(
        "sparse backward",
        flops=lambda shape: backward_flops(sparse_flops(shape)),
        moved=training_bytes,
        implementations=tuple(
            Implementation(
                name,
                partial(_sparse_backward, deterministic),
                _right,
                candidates=partial(backward_launches, deterministic),
            )
            for name, deterministic in (("triton", False), ("triton deterministic", True))
        ),
        dense="dense backward",
        by_selection=True,
        training=True,
    ),
    Operation(
        "sparse kl",
        flops=sparse_kl_flops,
        moved=kl_bytes,
        implementations=(
            Implementation("triton", _sparse_kl, _right_sparse_kl, candidates=sparse_kl_launches),
        ),
        dense="dense training",
        by_selection=True,
        training=True,
    ),
    Operation(
        "training layer",
        flops=training_flops,
        moved=lambda shape: training_bytes(shape) + index_bytes(shape, shape.length),
        implementations=(Implementation("triton", _training_layer, _right),),
        dense="dense training",
        by_selection=True,
        training=True,
    ),
    Operation(
        "kl",
        flops=full_kl_flops,
        moved=kl_bytes,
        implementations=(
            Implementation(
                "triton", partial(_full_kl, 1.0), _right_full_kl, candidates=full_kl_launches
            ),
            Implementation(
                "triton quarter",
                partial(_full_kl, FRACTION),
                partial(_right, fraction=FRACTION),
                flops=lambda shape: FRACTION * full_kl_flops(shape),
            ),
        ),
        dense="dense training",
        training=True,
    ),
    Operation(
        "warmup trained",
        flops=partial(warmup_flops, 1.0, False),
        moved=training_bytes,
        implementations=_warmups(frozen=False),
        dense="dense training",
        training=True,
    ),
    Operation(
        "warmup frozen",
        flops=partial(warmup_flops, 1.0, True),
        moved=whole_bytes,
        implementations=_warmups(frozen=True),
        dense="dense training",
        training=True,
    ),
)
"""Dense ones before those that are compared with them."""
