"""Every public operation of kernels/ops.py through Triton against its definition in float64, on small rows.

Each check runs an operation on the whole of one setting's tensors (check_settings.py) and compares all of
what comes out, gradients included, with kernels/reference.py in float64. Results may be off by twice, and
gradients by three times, what plain torch in the same dtype is, and by two units in the last place.
Whatever repeats to the bit by promise is run twice. Called by check_run.py.

Shapes: B batch, H query heads, G groups, T queries, S keys, D head width, C blocks, K selected blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from bench_checks import LSE_TOLERANCE, SCORE_MARGIN, Verdict, poisoned
from check_settings import Row, Setting, make_row
from torch import Tensor

from dense2sparse.kernels import ops, reference
from dense2sparse.kernels.fp8 import round_index

FP8_MARGIN = 50.0
"""Times the margin of float32 sums: Hopper sums e4m3 products with about 14 bits of the largest of 32, so
128 products of normal numbers may lack 5e-4 of |q| |k|."""
KL_TOLERANCE = 2e-3
"""Of the KL's value, relative: products of 16 bits are exact and summed in float32."""
Fault = str


class Skip(Exception):
    """Not for this device; the message says why."""


# Comparison.


def _distance(found: Tensor, right: Tensor) -> float:
    error = float((found.detach().double() - right.detach().double()).abs().max())
    return math.inf if math.isnan(error) else error


def _off(name: str, found: Tensor, plain: Tensor, right: Tensor, times: float) -> Verdict:
    """`found` against `right` (float64), by what `plain`, torch in the same dtype, is off."""
    if found.shape != right.shape:
        return Verdict(math.inf, f"{name} has shape {tuple(found.shape)}, not {tuple(right.shape)}")
    unit = torch.finfo(found.dtype).eps * float(right.abs().max())
    share = _distance(found, right) / (times * _distance(plain, right) + 2 * unit)
    return Verdict(share, f"{name} is off by {share:.2f} of what is allowed" if share > 1 else "")


def _worst(verdicts: list[Verdict]) -> Verdict:
    faults = [one for one in verdicts if not one.fine]
    return faults[0] if faults else max(verdicts, key=lambda one: one.error)


def _same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> Verdict:
    equal = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return Verdict(0.0, "" if equal else "two runs differ")


@contextmanager
def _deterministic(on: bool) -> Iterator[None]:
    """Ask for kernels that repeat to the bit; torch fills its own empty tensors meanwhile, as we do."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


# Selection.


def _right_ids(setting: Setting, row: Row) -> Tensor:
    return reference.select_blocks(
        row.index_q.double(), row.index_k.double(), **setting.budget,
        document_ids=row.document_ids, query_offset=row.offset,
    )  # fmt: skip


def _selection(setting: Setting, row: Row, ids: Tensor, margin_factor: float = 1.0) -> Verdict:
    """Sets equal to the definition's but for blocks whose scores lie within rounding of the threshold."""
    right = _right_ids(setting, row)
    if ids.shape != right.shape or ids.dtype != torch.int32:
        return Verdict(math.inf, f"ids are {tuple(ids.shape)} {ids.dtype}")
    padded = ids < 0
    if not torch.equal(padded, right < 0) or bool((ids < -1).any()):
        return Verdict(math.inf, "another number of blocks than can be kept")
    if bool(((ids[..., 1:] <= ids[..., :-1]) & ~padded[..., 1:]).any()):
        return Verdict(math.inf, "ids do not ascend")
    scores = _block_scores(row, setting.block_size)  # (B, G, T, C)
    count = scores.shape[-1]

    def chosen(found: Tensor) -> Tensor:
        mask = torch.zeros(*found.shape[:3], count + 1, dtype=torch.bool, device=found.device)
        return mask.scatter_(-1, (found + 1).clamp(max=count).long(), True)[..., 1:]

    ours, theirs = chosen(ids), chosen(right)
    # A block that is kept whatever its score says nothing about where the others are cut off.
    block, current = torch.arange(count, device=ids.device), right.amax(-1, keepdim=True)
    forced = (block > current - setting.local_blocks) | (block < setting.init_blocks)
    threshold = scores.masked_fill(~theirs | forced, math.inf).amin(-1, keepdim=True)
    keys = row.index_k.double().norm(dim=-1).amax()
    margin = margin_factor * SCORE_MARGIN * keys * row.index_q.double().norm(dim=-1)[..., None]
    off = torch.where(ours != theirs, (scores - threshold).abs() / margin, 0.0)
    wrong = int((off > 1).any(-1).sum())
    return Verdict(
        float(off.max()), f"{wrong} queries differ, one by {off.max():.1f} margins" if wrong else ""
    )


def _block_scores(row: Row, block_size: int) -> Tensor:
    """(B, G, T, C) float64 block maxima, -inf where nothing is visible."""
    tokens, queries, device = row.k.shape[2], row.q.shape[2], row.q.device
    scores = row.index_q.double() @ row.index_k.double().transpose(-1, -2)
    visible = reference.visibility(queries, tokens, row.offset, row.document_ids, device)
    scores = scores.masked_fill(~visible[:, None], -math.inf)
    blocks = reference.key_blocks(tokens, block_size, row.document_ids, device)
    found = scores.new_full((*scores.shape[:3], int(blocks.max()) + 1), -math.inf)
    return found.scatter_reduce(-1, blocks[:, None, None].expand_as(scores), scores, "amax")


def _check_select(setting: Setting, device: torch.device) -> Verdict:
    row = make_row(setting, device)
    where: dict[str, Any] = {"document_ids": row.document_ids, "query_offset": row.offset}
    ids = ops.select_blocks(row.index_q, row.index_k, **setting.budget, **where, backend="triton")
    return _selection(setting, row, ids)


def _check_select_fp8(setting: Setting, device: torch.device) -> Verdict:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise Skip("no fp8 here")
    if setting.dtype == torch.float32:
        raise Skip("scores of float32 are not rounded to fp8")
    row = make_row(setting, device)
    where: dict[str, Any] = {"document_ids": row.document_ids, "query_offset": row.offset}
    ids = ops.select_blocks(
        row.index_q, row.index_k, **setting.budget, **where, precision="fp8", backend="triton"
    )
    index_q, index_k = round_index(
        row.index_q, row.index_k, block_size=setting.block_size, document_ids=row.document_ids
    )
    rounded = replace(row, index_q=index_q, index_k=index_k)
    return _selection(setting, rounded, ids, FP8_MARGIN)


def _check_select_by_mass(setting: Setting, device: torch.device) -> Verdict:
    """Blocks by true mass: the mass kept may lack what rounding of the scores costs, and no more."""
    row = make_row(setting, device)
    common: dict[str, Any] = {
        **setting.budget, "document_ids": row.document_ids, "query_offset": row.offset,
    }  # fmt: skip
    ids = ops.select_by_mass(row.q, row.k, **common, backend="triton")
    right = reference.select_by_mass(row.q.double(), row.k.double(), **common)
    scores = reference._main_scores(
        row.q.double(), row.k.double(), None, None, row.document_ids, row.offset, 0
    )
    mass = scores.softmax(-1).mean(dim=2)  # (B, G, T, S)
    where: dict[str, Any] = {
        "block_size": setting.block_size, "document_ids": row.document_ids,
        "query_offset": row.offset,
    }  # fmt: skip
    kept = [_mass_of(mass, one, **where) for one in (ids, right)]
    lacking = float((kept[1] - kept[0]).max())
    return Verdict(
        lacking / 1e-3, f"{lacking:.1e} of the mass is missing" if lacking > 1e-3 else ""
    )


def _mass_of(mass: Tensor, ids: Tensor, *, block_size: int, document_ids, query_offset) -> Tensor:
    queries, keys = mass.shape[2:]
    support = reference._support(
        queries, keys, block_size, ids, document_ids, query_offset, mass.device
    )
    return (mass * support).sum(-1)


# Attention.


def _plain_attention(row: Row, support: Tensor, tensors: list[Tensor]) -> Tensor:
    """Softmax attention in the tensors' own dtype, everything materialised: out (B, H, T, D)."""
    q, k, v = tensors
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = grouped @ k.unsqueeze(2).transpose(-1, -2) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~support.unsqueeze(2), -math.inf).softmax(-1)
    return (weights @ v.unsqueeze(2)).flatten(1, 2)


def _attention(
    setting: Setting, row: Row, ids: Tensor | None, call: Callable[..., tuple[Tensor, Tensor]]
) -> Verdict:
    """Output, log-sum-exp and gradients of `call(q, k, v)`."""
    shape: dict[str, Any] = {"block_size": setting.block_size if ids is not None else 1}
    where: dict[str, Any] = {"document_ids": row.document_ids, "query_offset": row.offset}
    support = reference._support(
        row.q.shape[2], row.k.shape[2], shape["block_size"], ids, row.document_ids, row.offset,
        row.q.device,
    )  # fmt: skip
    wide = _leaves(row.q.double(), row.k.double(), row.v.double())
    right, right_lse = reference.sparse_attention(*wide, ids, **shape, **where)
    right_grads = torch.autograd.grad(right, wide, row.grad.double())
    plain_leaves = _leaves(row.q, row.k, row.v)
    plain = _plain_attention(row, support, plain_leaves)
    plain_grads = torch.autograd.grad(plain, plain_leaves, row.grad)
    leaves = [tensor.detach().requires_grad_() for tensor in (row.q, row.k, row.v)]
    with poisoned():
        out, lse = call(*leaves)
        grads = torch.autograd.grad(out, leaves, row.grad)
    found = [_off("out", out.detach(), plain.detach(), right.detach(), 2)]
    error = _distance(lse, right_lse.detach()) / LSE_TOLERANCE
    found.append(Verdict(error, f"lse is off by {error:.2f} of what is allowed" * (error > 1)))
    for name, one, other, exact in zip("qkv", grads, plain_grads, right_grads, strict=True):
        found.append(_off(f"d{name}", one, other, exact, 3))
    return _worst(found)


def _check_dense(setting: Setting, device: torch.device) -> Verdict:
    row = make_row(setting, device)
    where: dict[str, Any] = {"document_ids": row.document_ids, "query_offset": row.offset}

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return ops.dense_attention(q, k, v, **where, backend="triton")

    return _attention(setting, row, None, call)


def _check_sparse(deterministic: bool, setting: Setting, device: torch.device) -> Verdict:
    row = make_row(setting, device)
    ids = _right_ids(setting, row)
    options: dict[str, Any] = {
        "block_size": setting.block_size, "document_ids": row.document_ids,
        "query_offset": row.offset, "backend": "triton",
    }  # fmt: skip

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return ops.sparse_attention(q, k, v, ids, **options)

    with _deterministic(deterministic):
        verdict = _attention(setting, row, ids, call)
        if not deterministic or not verdict.fine:
            return verdict
        twice = []
        for _ in range(2):
            leaves = _leaves(row.q, row.k, row.v)
            out, lse = call(*leaves)
            twice.append((out, lse, *torch.autograd.grad(out, leaves, row.grad)))
        return _worst([verdict, _same(*twice)])


# The KL.


def _plain_kl(row: Row, support: Tensor, index_q: Tensor, index_k: Tensor) -> Tensor:
    """reference.index_kl in the tensors' own dtype."""
    grouped = row.q.unflatten(1, (row.k.shape[1], -1))
    scores = grouped @ row.k.unsqueeze(2).transpose(-1, -2) * row.q.shape[-1] ** -0.5
    teacher = scores.masked_fill(~support.unsqueeze(2), -math.inf).softmax(-1).mean(dim=2)
    student = index_q @ index_k.transpose(-1, -2) * index_q.shape[-1] ** -0.5
    log_student = student.masked_fill(~support, -math.inf).log_softmax(-1)
    log_student = torch.where(support, log_student, 0.0)
    gap = torch.xlogy(teacher, teacher) - teacher * log_student
    return gap.float().sum(-1).mean()


def _check_kl(
    selected: bool, deterministic: bool, setting: Setting, device: torch.device
) -> Verdict:
    row = make_row(setting, device, whole=True)
    ids = _right_ids(setting, row) if selected else None
    chosen: dict[str, Any] = {"document_ids": row.document_ids}
    if selected:
        chosen |= {"block_ids": ids, "block_size": setting.block_size}
    support = reference._support(
        row.q.shape[2], row.k.shape[2], setting.block_size, ids, row.document_ids, 0, device
    )
    lse = reference._main_scores(
        row.q, row.k, None, ids, row.document_ids, 0, setting.block_size
    ).logsumexp(-1).flatten(1, 2)  # fmt: skip
    wide = _leaves(row.index_q.double(), row.index_k.double())
    right = reference.index_kl(row.q.double(), row.k.double(), lse.double(), *wide, **chosen)
    right_grads = torch.autograd.grad(right, wide)
    plain_leaves = _leaves(row.index_q, row.index_k)
    plain_grads = torch.autograd.grad(_plain_kl(row, support, *plain_leaves), plain_leaves)

    def run() -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in (row.index_q, row.index_k)]
        kl = ops.index_kl(row.q, row.k, lse, *leaves, **chosen, backend="triton")
        return kl.detach(), *torch.autograd.grad(kl, leaves)

    with _deterministic(deterministic):
        with poisoned():
            kl, *grads = run()
        repeats = [_same(run(), run())] if deterministic or not selected else []
    right = right.detach()
    error = _distance(kl, right) / (KL_TOLERANCE * max(float(right), 0.05))
    found = [Verdict(error, f"the KL is {float(kl):.6f}, not {float(right):.6f}" * (error > 1))]
    for name, one, other, exact in zip(
        ("dq_idx", "dk_idx"), grads, plain_grads, right_grads, strict=True
    ):
        found.append(_off(name, one, other, exact, 3))
    return _worst(found + repeats)


# Decoding.


def _check_decode(ragged: bool, setting: Setting, device: torch.device) -> Verdict:
    """The newest token; `ragged`: rows of unequal lengths in a cache whose end is never read."""
    row = make_row(replace(setting, offset=setting.tokens - 1), device)
    lengths = None
    largest = float(row.v.abs().max())
    if ragged:
        each = [setting.tokens - 97 * (n + 1) % setting.tokens for n in range(setting.batch)]
        lengths = torch.tensor(each, dtype=torch.int32, device=device)
        for number, length in enumerate(each):
            for tensor in (row.k, row.v, row.index_k):
                tensor[number, :, length:] = math.nan
    tensors = row.q, row.k, row.v, row.index_q, row.index_k
    common: dict[str, Any] = {
        **setting.budget, "document_ids": row.document_ids, "lengths": lengths,
    }  # fmt: skip
    right = reference.sparse_decode(*(tensor.double() for tensor in tensors), **common)
    plain = reference.sparse_decode(*tensors, **common)
    with poisoned():
        out = ops.sparse_decode(*tensors, **common, backend="triton")
    again = ops.sparse_decode(*tensors, **common, backend="triton")
    # The reference sums in float32; what its rounded weights would cost is a unit of the largest value.
    unit = torch.finfo(out.dtype).eps * largest
    error = _distance(out, right) / (2 * _distance(plain, right) + 2 * unit)
    verdict = Verdict(error, f"out is off by {error:.2f} of what is allowed" * (error > 1))
    return _worst([verdict, _same((out,), (again,))])


CHECKS: dict[str, Callable[[Setting, torch.device], Verdict]] = {
    "select_blocks": _check_select,
    "select_blocks fp8": _check_select_fp8,
    "select_by_mass": _check_select_by_mass,
    "dense_attention": _check_dense,
    "sparse_attention": lambda setting, device: _check_sparse(False, setting, device),
    "sparse_attention deterministic": lambda s, device: _check_sparse(True, s, device),
    "index_kl": lambda setting, device: _check_kl(False, False, setting, device),
    "index_kl selected": lambda setting, device: _check_kl(True, False, setting, device),
    "index_kl selected deterministic": lambda s, device: _check_kl(True, True, s, device),
    "sparse_decode": lambda setting, device: _check_decode(False, setting, device),
    "sparse_decode lengths": lambda setting, device: _check_decode(True, setting, device),
}
"""By the public operation's name and what is special."""
