"""Are gradients and the KL right? Sampled query rows and keys against the definition in float64.

A query's gradient needs its own row only. A key's gradient needs every query that sees it: their
probabilities are made from the log-sum-exp that the forward pass left (checked in bench_checks.py), and
their index log-sum-exp is made here in float32 chunks. A gradient may be off by three times what plain
torch of the same dtype is, and two units in the last place. The KL's value, a mean over all rows, is
checked on the row's first tokens, for which the kernels run again.

Shapes: R heads of a group, N tokens, S tokens that a query sees, M queries that see a key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from bench_checks import Verdict, sampled_rows, selected_tokens
from bench_data import Inputs
from torch import Tensor

MOST_QUERIES = {False: 20_000, True: 40_000}
"""Keys that more queries see are left out of the KL's check, which needs each query's whole support: full
rows, and (True) selected blocks."""
CHUNK = 512
"""Query rows whose index scores exist at once."""
VALUE_TOKENS = 4096
"""First tokens on which the KL's value is checked."""
VALUE_TOLERANCE = 2e-3
"""Of the KL, relative: bf16 products are exact and summed in float32."""


@dataclass
class Left:
    """What a forward pass leaves for the backward pass."""

    out: Tensor
    lse: Tensor
    """(B, H, N) natural logarithm."""
    grad_out: Tensor
    block_ids: Tensor | None
    """None: full attention."""


@dataclass
class Worst:
    """Largest errors of one gradient so far."""

    found: float = 0.0
    plain: float = 0.0
    size: float = 0.0

    def add(self, found: Tensor, plain: Tensor, right: Tensor) -> None:
        """Take in one sample; NaN counts as infinite."""
        if not right.numel():
            return
        error = float((found.double() - right).abs().max())
        self.found = max(self.found, math.inf if math.isnan(error) else error)
        self.plain = max(self.plain, float((plain.double() - right).abs().max()))
        self.size = max(self.size, float(right.abs().max()))

    def over_allowed(self, dtype: torch.dtype) -> float:
        """Error over the allowed one."""
        allowed = 3 * self.plain + 2 * torch.finfo(dtype).eps * self.size
        return self.found / allowed if allowed else (math.inf if self.found else 0.0)


def _verdict(worst: dict[str, Worst], dtype: torch.dtype) -> Verdict:
    shares = {name: one.over_allowed(dtype) for name, one in worst.items()}
    name = max(shares, key=lambda name: shares[name])
    complaint = (
        "" if shares[name] <= 1 else f"{name} is off by {shares[name]:.2f} of what is allowed"
    )
    return Verdict(shares[name], complaint)


def _heads(inputs: Inputs, group: int) -> slice:
    repeats = inputs.shape.heads // inputs.shape.groups
    return slice(group * repeats, (group + 1) * repeats)


def _seen(inputs: Inputs, block_ids: Tensor | None, batch: int, group: int, row: int) -> Tensor:
    """(S,) tokens in the row's support."""
    if block_ids is None:
        return torch.arange(row + 1, device=inputs.q.device)
    return selected_tokens(block_ids[batch, group, row], inputs.shape.block_size, row)


def _seeing(inputs: Inputs, block_ids: Tensor | None, batch: int, group: int, key: int) -> Tensor:
    """(M,) queries in whose support a key is."""
    later = torch.arange(key, inputs.shape.length, device=inputs.q.device)
    if block_ids is None:
        return later
    block = key // inputs.shape.block_size
    return later[(block_ids[batch, group, key:] == block).any(-1)]


def _some_groups(inputs: Inputs) -> list[int]:
    return sorted({0, inputs.shape.groups - 1})


# Attention.


def check_backward(inputs: Inputs, left: Left, grads: tuple[Tensor, Tensor, Tensor]) -> Verdict:
    """dq of sampled rows, dk and dv of sampled keys, in the first and the last group."""
    shape = inputs.shape
    for name, grad, of in zip("qkv", grads, (inputs.q, inputs.k, inputs.v), strict=True):
        if grad.shape != of.shape:
            return Verdict(math.inf, f"d{name} has shape {tuple(grad.shape)}")
    worst = {"dq": Worst(), "dk": Worst(), "dv": Worst()}
    for token in sampled_rows(shape.length, shape.block_size):
        for batch in range(shape.batch):
            for group in _some_groups(inputs):
                found = grads[0][batch, _heads(inputs, group), token]
                worst["dq"].add(found, *_query_gradient(inputs, left, batch, group, token))
                pairs = _key_gradients(inputs, left, batch, group, token)
                for name, grad, pair in zip(("dk", "dv"), grads[1:], pairs, strict=True):
                    worst[name].add(grad[batch, group, token], *pair)
    return _verdict(worst, inputs.q.dtype)


def _query_gradient(
    inputs: Inputs, left: Left, batch: int, group: int, row: int
) -> tuple[Tensor, Tensor]:
    """dq (R, D) of a row as plain torch makes it, and in float64."""
    heads = _heads(inputs, group)
    tokens = _seen(inputs, left.block_ids, batch, group, row)
    q, grad = inputs.q[batch, heads, row], left.grad_out[batch, heads, row]
    k, v = inputs.k[batch, group, tokens], inputs.v[batch, group, tokens]
    out = left.out[batch, heads, row]

    def made(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, out: Tensor | None) -> Tensor:
        weights = (q @ k.T * inputs.scale).softmax(-1)
        pulls = grad @ v.T
        pull = (weights * pulls if out is None else grad * out).sum(-1, keepdim=True)
        return weights * (pulls - pull) @ k * inputs.scale

    wide = made(q.double(), k.double(), v.double(), grad.double(), None)
    return made(q, k, v, grad, out), wide


def _key_gradients(
    inputs: Inputs, left: Left, batch: int, group: int, key: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """dk and dv (D,) of a key, each as plain torch makes it and in float64."""
    queries = _seeing(inputs, left.block_ids, batch, group, key)
    k, v = inputs.k[batch, group, key], inputs.v[batch, group, key]
    sums = [torch.zeros_like(k, dtype=torch.float64) for _ in range(4)]
    heads = _heads(inputs, group)
    for head in range(heads.start, heads.stop):
        q, grad, out = (x[batch, head, queries] for x in (inputs.q, left.grad_out, left.out))
        lse = left.lse[batch, head, queries]
        for number, wide in enumerate((lambda x: x, Tensor.double)):
            scores = wide(q) @ wide(k) * inputs.scale
            # log-sum-exps are float32 everywhere
            summed = lse.double() if number else lse
            weights = (scores.to(summed.dtype) - summed).exp().to(scores.dtype)
            pull = (wide(grad) * wide(out)).sum(-1)
            inner = weights * (wide(grad) @ wide(v) - pull)
            sums[number] += (inner @ wide(q)).double() * inputs.scale
            sums[2 + number] += (weights @ wide(grad)).double()
    plain_k, right_k, plain_v, right_v = (
        x.to(k.dtype) if n % 2 == 0 else x for n, x in enumerate(sums)
    )
    return (plain_k, right_k), (plain_v, right_v)


# The KL.


def check_kl(
    inputs: Inputs,
    left: Left,
    kl: tuple[Tensor, Tensor, Tensor],
    *,
    tile: int | None = None,
    weight: float = 1.0,
) -> Verdict:
    """Value finite and not negative; dq_idx of sampled rows, dk_idx of sampled keys.

    Args:
        left: `lse` and `block_ids` count.
        tile: only some tiles of so many query tokens were taken, each for `weight` tiles: rows of the
            others are zero, and keys are not looked at.
    """
    shape = inputs.shape
    value, grad_q, grad_k = kl
    if not bool(torch.isfinite(value)) or float(value) < -1e-4:
        return Verdict(math.inf, f"the KL is {float(value)}")
    if grad_q.shape != inputs.index_q.shape or grad_k.shape != inputs.index_k.shape:
        return Verdict(math.inf, f"shapes {tuple(grad_q.shape)} and {tuple(grad_k.shape)}")
    worst = {"dq_idx": Worst(), "dk_idx": Worst()}
    share = weight / (shape.batch * shape.groups * shape.length) * shape.index_width**-0.5
    for token in sampled_rows(shape.length, shape.block_size):
        for batch in range(shape.batch):
            for group in _some_groups(inputs):
                found = grad_q[batch, group, token]
                if tile is not None and not _taken(grad_q, batch, token, tile):
                    continue
                plain, right = _index_query_gradient(inputs, left, batch, group, token)
                worst["dq_idx"].add(found, plain * share, right * share)
            pair = None if tile is not None else _index_key_gradient(inputs, left, batch, token)
            if pair is not None:
                worst["dk_idx"].add(grad_k[batch, 0, token], *(x * share for x in pair))
    return _verdict(worst, inputs.q.dtype)


def _taken(grad_q: Tensor, batch: int, token: int, tile: int) -> bool:
    first = token // tile * tile
    return bool((grad_q[batch, :, first : first + tile] != 0).any())


def _differences(
    inputs: Inputs, left: Left, batch: int, group: int, row: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Student minus teacher (S,) and index keys (S, D_idx) of a row: of plain torch, then in float64."""
    tokens = _seen(inputs, left.block_ids, batch, group, row)
    q, k = inputs.q[batch, _heads(inputs, group), row], inputs.k[batch, group, tokens]
    index_q, index_k = inputs.index_q[batch, group, row], inputs.index_k[batch, 0, tokens]
    for wide in (lambda x: x, Tensor.double):
        teacher = (wide(q) @ wide(k).T * inputs.scale).softmax(-1).mean(0)
        student = (wide(index_k) @ wide(index_q) * inputs.shape.index_width**-0.5).softmax(-1)
        yield student - teacher, wide(index_k)


def _index_query_gradient(
    inputs: Inputs, left: Left, batch: int, group: int, row: int
) -> tuple[Tensor, Tensor]:
    """dq_idx (D_idx,) without its factor, of plain torch and in float64; both wide."""
    made = [(d @ k).double() for d, k in _differences(inputs, left, batch, group, row)]
    return made[0], made[1]


def _index_key_gradient(
    inputs: Inputs, left: Left, batch: int, key: int
) -> tuple[Tensor, Tensor] | None:
    """dk_idx (D_idx,) without its factor, of plain torch and in float64; None: too many queries."""
    shape = inputs.shape
    queries = [_seeing(inputs, left.block_ids, batch, g, key) for g in range(shape.groups)]
    if max(len(rows) for rows in queries) > MOST_QUERIES[left.block_ids is not None]:
        return None
    sums = [torch.zeros(shape.index_width, dtype=torch.float64, device=inputs.q.device)] * 2
    for group, rows in enumerate(queries):
        if not len(rows):
            continue
        index_q, index_k = inputs.index_q[batch, group, rows], inputs.index_k[batch, 0, key]
        index_lse = _index_lse(inputs, left.block_ids, batch, group, rows)
        lse = left.lse[batch, _heads(inputs, group)][:, rows]  # (R, M)
        q, k = inputs.q[batch, _heads(inputs, group)], inputs.k[batch, group, key]
        for number, wide in enumerate((lambda x: x, Tensor.double)):
            scores = torch.stack([wide(head[rows]) @ wide(k) for head in q]) * inputs.scale
            teacher = (scores.double() - lse.double()).exp().mean(0)
            student = wide(index_q) @ wide(index_k) * shape.index_width**-0.5
            difference = (student.double() - index_lse).exp() - teacher
            added = difference.to(wide(index_q).dtype) @ wide(index_q)
            sums[number] = sums[number] + added.double()
    return sums[0], sums[1]


def _index_lse(
    inputs: Inputs, block_ids: Tensor | None, batch: int, group: int, rows: Tensor
) -> Tensor:
    """(M,) float64 from float32 sums: log-sum-exp of the student over each row's support."""
    block, found = inputs.shape.block_size, []
    keys = inputs.index_k[batch, 0].float()
    for part in rows.split(CHUNK):
        q = inputs.index_q[batch, group, part].float() * inputs.shape.index_width**-0.5
        if block_ids is None:
            tokens = torch.arange(int(part[-1]) + 1, device=rows.device)
            scores = (q @ keys[: len(tokens)].T).masked_fill_(tokens > part[:, None], -math.inf)
        else:
            ids = block_ids[batch, group, part].long()  # (m, K)
            tokens = (ids[..., None] * block + torch.arange(block, device=rows.device)).flatten(1)
            hidden = (tokens < 0) | (tokens > part[:, None])
            gathered = keys[tokens.clamp(0, len(keys) - 1)]  # (m, K * block, D_idx)
            scores = (gathered @ q[..., None])[..., 0].masked_fill_(hidden, -math.inf)
        found.append(scores.logsumexp(-1).double())
    return torch.cat(found)


def check_kl_value(
    inputs: Inputs, left: Left, value_of: Callable[[Inputs, Left], Tensor]
) -> Verdict:
    """The value on the first tokens of the row, from `value_of`, against the definition in float64."""
    length = min(inputs.shape.length, VALUE_TOKENS)
    ids = left.block_ids
    part = replace(
        inputs,
        shape=replace(inputs.shape, length=length),
        **{n: getattr(inputs, n)[:, :, :length] for n in ("q", "k", "v", "index_q", "index_k")},
        block_ids=None if ids is None else ids[:, :, :length],
    )
    short = Left(left.out, left.lse[:, :, :length], left.grad_out, part.block_ids)
    found, right = float(value_of(part, short)), _kl_value(part)
    error = abs(found - right) / (VALUE_TOLERANCE * max(abs(right), 0.05))
    complaint = "" if error <= 1 else f"the KL of {length} tokens is {found:.6f}, not {right:.6f}"
    return Verdict(math.inf if math.isnan(error) else error, complaint)


def _kl_value(inputs: Inputs) -> float:
    """reference.index_kl in chunks of rows."""
    shape, total = inputs.shape, 0.0
    key = torch.arange(shape.length, device=inputs.q.device)
    for batch in range(shape.batch):
        for group in range(shape.groups):
            q, k = inputs.q[batch, _heads(inputs, group)], inputs.k[batch, group].double()
            index_k = inputs.index_k[batch, 0].double()
            for rows in key.split(CHUNK):
                support = key <= rows[:, None]
                if inputs.block_ids is not None:
                    ids = inputs.block_ids[batch, group, rows].long()
                    chosen = torch.zeros(len(rows), shape.num_blocks + 1, device=key.device)
                    chosen.scatter_(1, ids + 1, 1.0)
                    support &= chosen[:, 1:].bool()[:, key // shape.block_size]
                scores = q[:, rows].double() @ k.T * inputs.scale
                teacher = scores.masked_fill_(~support, -math.inf).softmax(-1).mean(0)
                student = inputs.index_q[batch, group, rows].double() @ index_k.T
                student = (student * shape.index_width**-0.5).masked_fill_(~support, -math.inf)
                gap = torch.xlogy(teacher, teacher) - teacher * student.log_softmax(-1).masked_fill(
                    ~support, 0.0
                )
                total += float(gap.sum())
    return total / (shape.batch * shape.groups * shape.length)


def first_fault(*verdicts: Verdict) -> Verdict:
    """The first that is not fine, else the one nearest to failing."""
    faults: list[Any] = [one for one in verdicts if not one.fine]
    return faults[0] if faults else max(verdicts, key=lambda one: one.error)
