"""What an entry of the benchmark's table is, and the arithmetic and traffic of the operations in it.

The entries: bench_operations.py (selection, attention, decoding) and bench_training.py (gradients, KL).
FLOPs are those of the definition, never of padding, unions or work that is done twice.

Shapes: B batch, H query heads, G groups, N tokens, D head width, D_idx index width, k selected blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench_checks import Verdict
from bench_data import Inputs, Shape

Call = Callable[[], Any]
BYTES = 2
"""Of a bf16 number."""


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
    flops: Callable[[Shape], float] | None = None
    """Where it does another amount of work than the operation says."""
    candidates: Callable[[Inputs], Sequence[Any]] = lambda inputs: ()
    """Launch values that --sweep tries."""


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
    by_group: bool = False
    """Dense attention: one group stands for all where all of them would take too long."""
    decode: bool = False
    """One query a row; timed through a CUDA graph over several copies of the inputs."""
    training: bool = False
    """Has gradients; measured up to Plan.train_up_to tokens."""


def tensor_bytes(shape: Shape, queries: int, keys: float) -> float:
    """Bytes of q and out of `queries` tokens, and of k and v of `keys` tokens of each group."""
    wide = 2 * queries * shape.heads + 2 * keys * shape.groups
    return shape.batch * wide * shape.width * BYTES


def index_bytes(shape: Shape, queries: int) -> float:
    """Bytes of index q, index k and block ids."""
    read = (queries * shape.groups + shape.length) * shape.index_width * BYTES
    return shape.batch * (read + queries * shape.groups * shape.top_k * 4)


def whole_bytes(shape: Shape) -> float:
    """Bytes of q, k, v and out."""
    return tensor_bytes(shape, shape.length, shape.length)


def dense_flops(shape: Shape) -> float:
    return 4 * shape.width * shape.heads * shape.pairs


def select_flops(shape: Shape) -> float:
    return 2 * shape.index_width * shape.groups * shape.pairs


def sparse_flops(shape: Shape) -> float:
    return 4 * shape.width * shape.heads * shape.selected_pairs


def backward_flops(forward: float) -> float:
    """Five matrix products for two."""
    return 2.5 * forward


def kl_flops(shape: Shape, pairs: float) -> float:
    """Teacher's scores, and four products of index width: scores twice (once summed), two gradients."""
    return (2 * shape.width * shape.heads + 8 * shape.index_width * shape.groups) * pairs


def sparse_kl_flops(shape: Shape) -> float:
    return kl_flops(shape, shape.selected_pairs)


def full_kl_flops(shape: Shape) -> float:
    return kl_flops(shape, shape.pairs)


def warmup_flops(fraction: float, frozen: bool, shape: Shape) -> float:
    dense = dense_flops(shape)
    return dense + (0 if frozen else backward_flops(dense)) + fraction * full_kl_flops(shape)


def training_flops(shape: Shape) -> float:
    sparse = sparse_flops(shape)
    return select_flops(shape) + sparse + backward_flops(sparse) + sparse_kl_flops(shape)


def training_bytes(shape: Shape) -> float:
    """q, k, v, out read; the gradient of out read, of q, k, v written."""
    return 2 * whole_bytes(shape)


def kl_bytes(shape: Shape) -> float:
    """q, k and the log-sum-exp read; index q and k read, their float32 gradients written."""
    tokens, index = shape.batch * shape.length, (shape.groups + 1) * shape.index_width
    main = (shape.heads + shape.groups) * shape.width * BYTES + 4 * shape.heads
    return tokens * (main + index * (BYTES + 4))
