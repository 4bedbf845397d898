"""Is a result right? Sampled query rows against the definition in float64, before anything is timed.

The definition is that of kernels/reference.py, computed for single rows, so that it fits at a million
tokens. A low-precision result may be off by twice what plain torch of the same dtype is, and two units in
the last place; selections are compared outside the margin within which float32 sums may differ.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bench_data import Inputs
from torch import Tensor

LSE_TOLERANCE = 2e-3
"""Of a log-sum-exp; bf16 products are exact and summed in float32."""
SCORE_MARGIN = 1e-5
"""Of an index score, relative to the largest |q| |k|: 128 products summed in float32 in any order."""


@dataclass(frozen=True)
class Verdict:
    """`error` is the largest error over the allowed one; above 1, or with a complaint, the check failed."""

    error: float
    complaint: str = ""
    checked: bool = True

    @property
    def fine(self) -> bool:
        return not self.complaint and self.error <= 1.0

    def __str__(self) -> str:
        if not self.checked:
            return "not checked"
        return self.complaint or f"error is {self.error:.2f} of what is allowed"


def sampled_rows(length: int, block_size: int) -> list[int]:
    """First and last tokens, both sides of block bounds, and some between."""
    middle = length // 2 // block_size * block_size
    wanted = [0, block_size - 1, block_size, middle - 1, middle, length * 3 // 4 + 1, length - 1]
    return sorted({row for row in wanted if 0 <= row < length})


def check_attention(
    inputs: Inputs,
    out: Tensor,
    lse: Tensor | None,
    block_ids: Tensor | None,
    left_out: Collection[tuple[int, int]] = (),
) -> Verdict:
    """Output and log-sum-exp of sampled rows; `block_ids=None` is full attention.

    Queries are the last tokens of the row: all of them, or one in decoding.

    Args:
        left_out: (row of the batch, group) that are not looked at.
    """
    shape = inputs.shape
    if out.shape != inputs.q.shape:
        return Verdict(math.inf, f"out has shape {tuple(out.shape)}, not {tuple(inputs.q.shape)}")
    offset = shape.length - inputs.q.shape[2]
    worst = {"out": 0.0, "plain": 0.0, "lse": 0.0, "size": 0.0}
    for row in sampled_rows(inputs.q.shape[2], shape.block_size):
        for batch in range(shape.batch):
            for group in range(shape.groups):
                if (batch, group) in left_out:
                    continue
                ids = None if block_ids is None else block_ids[batch, group, row]
                found = _row_errors(inputs, out, lse, batch, group, row, offset + row, ids)
                worst = {name: max(worst[name], found[name]) for name in worst}
    if not all(math.isfinite(value) for value in worst.values()):
        return Verdict(math.inf, "a value is not finite")
    unit = torch.finfo(inputs.q.dtype).eps * worst["size"]
    allowed = 2 * worst["plain"] + 2 * unit
    return Verdict(max(worst["out"] / allowed, worst["lse"] / LSE_TOLERANCE))


def _row_errors(
    inputs: Inputs,
    out: Tensor,
    lse: Tensor | None,
    batch: int,
    group: int,
    row: int,
    position: int,
    ids: Tensor | None,
) -> dict[str, float]:
    repeats = inputs.shape.heads // inputs.shape.groups
    heads = slice(group * repeats, (group + 1) * repeats)
    q, k, v = inputs.q[batch, heads, row], inputs.k[batch, group], inputs.v[batch, group]
    if ids is None:
        k, v = k[: position + 1], v[: position + 1]
    else:
        tokens = selected_tokens(ids, inputs.shape.block_size, position)
        k, v = k[tokens], v[tokens]
    scores = q.double() @ k.double().T * inputs.scale
    right = scores.softmax(-1) @ v.double()
    plain = (q @ k.T * inputs.scale).softmax(-1) @ v
    found = out[batch, heads, row].double()
    errors = {
        "out": (found - right).abs().max(),
        "plain": (plain.double() - right).abs().max(),
        "size": right.abs().max(),
        "lse": torch.zeros(()),
    }
    if lse is not None:
        errors["lse"] = (lse[batch, heads, row].double() - scores.logsumexp(-1)).abs().max()
    # NaN would vanish in max(): make it infinite.
    values = {name: float(value) for name, value in errors.items()}
    return {name: math.inf if math.isnan(value) else value for name, value in values.items()}


def selected_tokens(ids: Tensor, block_size: int, position: int) -> Tensor:
    """Visible tokens of the selected blocks."""
    kept = ids[ids >= 0].long()
    tokens = (kept[:, None] * block_size + torch.arange(block_size, device=ids.device)).flatten()
    return tokens[tokens <= position]


def block_scores(inputs: Inputs, batch: int, group: int, row: int, position: int) -> Tensor:
    """(C,) float64 scores of the visible blocks, the own one infinite."""
    block = inputs.shape.block_size
    keys = inputs.index_k[batch, 0, : position + 1].double()
    scores = keys @ inputs.index_q[batch, group, row].double()
    scores = torch.nn.functional.pad(scores, (0, -len(scores) % block), value=-math.inf)
    best = scores.unflatten(0, (-1, block)).amax(-1)
    best[-1] = math.inf
    return best


def margin_of(inputs: Inputs, batch: int, group: int, row: int, position: int) -> float:
    """What two ways of summing may differ by."""
    keys = inputs.index_k[batch, 0, : position + 1].float().norm(dim=-1).max()
    return SCORE_MARGIN * float(keys * inputs.index_q[batch, group, row].float().norm())


def check_selection(inputs: Inputs, block_ids: Tensor, margin_factor: float = 1.0) -> Verdict:
    """Ids of sampled rows: form, and every block that is certainly among the best, or certainly not."""
    shape = inputs.shape
    for row in sampled_rows(shape.length, shape.block_size):
        for batch in range(shape.batch):
            for group in range(shape.groups):
                ids = block_ids[batch, group, row].long()
                scores = block_scores(inputs, batch, group, row, row)
                margin = margin_factor * margin_of(inputs, batch, group, row, row)
                complaint = _complaint(ids, scores, shape.top_k, margin)
                if complaint:
                    return Verdict(math.inf, f"query {row}, group {group}: {complaint}")
    return Verdict(0.0)


def _complaint(ids: Tensor, scores: Tensor, top_k: int, margin: float) -> str:
    count = min(top_k, len(scores))
    kept = ids[:count]
    if bool((ids[count:] != -1).any()) or bool((kept < 0).any()):
        return f"{int((ids >= 0).sum())} blocks where {count} can be kept"
    if bool((kept[1:] <= kept[:-1]).any()) or int(kept[-1]) != len(scores) - 1:
        return "ids do not ascend to the query's own block"
    threshold = scores.topk(count).values[-1]
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[kept] = True
    if bool((scores[mask] < threshold - margin).any()):
        return "a block is kept that is not among the best"
    if bool((scores[~mask] > threshold + margin).any()):
        return "a block is missing that is among the best"
    return ""


def check_decode(inputs: Inputs, out: Tensor) -> Verdict:
    """Output of the newest token; groups whose selection hangs on rounding are left out."""
    shape = inputs.shape
    position = shape.length - 1
    ids = inputs.q.new_full((shape.batch, shape.groups, 1, shape.top_k), -1, dtype=torch.int32)
    unsure = set()
    for batch in range(shape.batch):
        for group in range(shape.groups):
            scores = block_scores(inputs, batch, group, 0, position)
            best = scores.topk(min(shape.top_k + 1, len(scores)))
            margin = margin_of(inputs, batch, group, 0, position)
            if len(best.values) > shape.top_k and float(-best.values[-2:].diff()) <= margin:
                unsure.add((batch, group))
            kept = best.indices[: shape.top_k]
            ids[batch, group, 0, : len(kept)] = kept.to(torch.int32)
    if len(unsure) == shape.batch * shape.groups:
        return Verdict(math.inf, "every selection hangs on rounding here: use another --seed")
    return check_attention(inputs, out, None, ids, unsure)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, memory from torch.empty and its kin starts as NaN or the largest integer."""
    before = [(o, n, getattr(o, n)) for o, n in _MAKERS]

    def filled(make: Any) -> Any:
        def made(*args: Any, **options: Any) -> Tensor:
            tensor = make(*args, **options)
            if tensor.is_floating_point():
                return tensor.fill_(math.nan)
            return tensor if tensor.dtype == torch.bool else tensor.fill_(_largest(tensor.dtype))

        return made

    try:
        for owner, name, make in before:
            setattr(owner, name, filled(make))
        yield
    finally:
        for owner, name, make in before:
            setattr(owner, name, make)


_MAKERS: tuple[tuple[Any, str], ...] = (
    (torch, "empty"),
    (torch, "empty_like"),
    (Tensor, "new_empty"),
)


def _largest(dtype: torch.dtype) -> int:
    return torch.iinfo(dtype).max
