"""Loss of held-out rows in an arm: one record a row, so that arms are compared row by row and by position.

Each document of a row is run alone, so every arm sees exactly the same context whatever it thinks of
packing. Logits are made in chunks; the whole (N, vocabulary) matrix never exists. Losses are summed by
position in the document, in buckets that double: what sparsity costs shows where a document is longer than
the budget, and a mean over positions hides it behind the easy first tokens.

With `prefill_chunk` a document is read that many tokens at a time, through the model's cache. That takes
the memory of answering a prompt of its length: every layer's keys and values, and the activations of a
chunk. In one pass it is one layer's activations of the whole document, and no cache.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from .records import Journal, journal_path, read_journals
from .statistics import Interval, paired_ratio

CHUNK = 512
"""Rows of logits that exist at once."""
FIRST_EDGE = 128
"""Tokens in the first bucket of positions; the second ends at twice as many, and so on."""


class Row(Protocol):
    """A held-out row (data.loader.Batch with B = 1)."""

    input_ids: Tensor
    document_ids: Tensor
    targets: Tensor


def measure(
    model: Any,
    rows: Sequence[Row],
    folder: Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[str], None] = lambda line: None,
    prefill_chunk: int | None = None,
) -> int:
    """Append the loss of this rank's rows that have none in `folder`; returns how many were run.

    Args:
        prefill_chunk: tokens of a document that are read at a time; the same losses up to rounding.
    """
    done = read_journals(folder)
    mine = [(row_id(place), row) for place, row in enumerate(rows)][rank::world_size]
    left = [(name, row) for name, row in mine if name not in done]
    if not left:
        return 0
    meter = LossMeter(model, prefill_chunk)
    with Journal(journal_path(folder, rank, world_size)) as journal:
        for count, (name, row) in enumerate(left, start=1):
            begun = time.perf_counter()
            positions = meter.by_position(row)
            seconds = time.perf_counter() - begun
            journal.append(
                {
                    "id": name,
                    "loss": math.fsum(loss for loss, _ in positions),
                    "tokens": sum(tokens for _, tokens in positions),
                    "positions": positions,
                    "seconds": round(seconds, 3),
                }
            )
            progress(f"row {count}/{len(left)}, {seconds:.1f} s")
    return len(left)


class LossMeter:
    """Next-token losses of documents, logits in chunks."""

    def __init__(self, model: Any, prefill_chunk: int | None = None) -> None:
        """Try a few tokens to see whether the output layer alone makes the logits.

        Families that scale or cap them (Granite, Cohere, Gemma) go through the model's own forward
        pass, whole logits and all; so no family has to be listed.

        Args:
            prefill_chunk: tokens of a document that are read at a time; None reads it in one pass.
        """
        self._model, self._chunk = model, prefill_chunk
        few = torch.arange(1, 5, device=model.device)[None]
        with torch.no_grad():
            hidden = model.get_decoder()(input_ids=few, use_cache=False).last_hidden_state
            ours = model.get_output_embeddings()(hidden).float()
            theirs = model(input_ids=few, use_cache=False).logits.float()
        self._plain = torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3)

    def row(self, row: Row) -> tuple[float, int]:
        """Summed loss of a row in nats, and its number of target tokens."""
        found = self.by_position(row)
        return math.fsum(loss for loss, _ in found), sum(tokens for _, tokens in found)

    @torch.no_grad()
    def by_position(self, row: Row) -> list[tuple[float, int]]:
        """(summed loss in nats, target tokens) of each bucket of positions in the document.

        Position n is the target behind n + 1 tokens of context; see `bucket`.
        """
        sums: list[tuple[float, int]] = []
        for ids, targets in documents(row):
            if not bool((targets != -100).any()):
                continue
            losses = self.document(ids, targets).double().cpu()
            kept = (targets != -100).cpu()
            place, first = 0, 0
            while first < len(ids):
                first, last = bucket(place)
                if place == len(sums):
                    sums.append((0.0, 0))
                loss, tokens = sums[place]
                loss += float(losses[first:last].sum())
                sums[place] = (loss, tokens + int(kept[first:last].sum()))
                place, first = place + 1, last
        return sums

    @torch.no_grad()
    def document(self, ids: Tensor, targets: Tensor, **arguments: Any) -> Tensor:
        """(N,) float32 loss of each target of one document, 0 where it is -100.

        Args:
            ids, targets: (N,) int64.
            arguments: further ones of the forward pass, for example `msa_call`; the pass is then one over
                the whole document, since a call serves one pass.
        """
        ids, targets = ids.to(self._model.device), targets.to(self._model.device)
        chunk = self._chunk or len(ids)
        if arguments or chunk >= len(ids):
            return self._part(ids, targets, use_cache=False, **arguments)[0]
        losses, cache = [], None
        for part, goal in zip(ids.split(chunk), targets.split(chunk), strict=True):
            found, cache = self._part(part, goal, use_cache=True, past_key_values=cache)
            losses.append(found)
        return torch.cat(losses)

    def _part(self, ids: Tensor, targets: Tensor, **arguments: Any) -> tuple[Tensor, Any]:
        """(N,) float32 losses of tokens behind what the cache holds, and the cache."""
        if not self._plain:
            output = self._model(input_ids=ids[None], **arguments)
            losses = functional.cross_entropy(output.logits[0].float(), targets, reduction="none")
            return losses, output.past_key_values
        head = self._model.get_output_embeddings()
        output = self._model.get_decoder()(input_ids=ids[None], **arguments)
        parts = zip(output.last_hidden_state[0].split(CHUNK), targets.split(CHUNK), strict=True)
        every = [
            functional.cross_entropy(head(part).float(), goal, reduction="none")
            for part, goal in parts
        ]
        return torch.cat(every), output.past_key_values


def bucket(place: int) -> tuple[int, int]:
    """[first, last) positions of a bucket: 0 to 128, then to 256, 512 and so on.

    The same for every length, so that documents of different lengths go together.
    """
    return FIRST_EDGE * 2 ** (place - 1) if place else 0, FIRST_EDGE * 2**place


def documents(row: Row) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, targets) of each document in a row of B = 1."""
    bounds = torch.nonzero(row.document_ids[0, 1:] != row.document_ids[0, :-1])[:, 0] + 1
    ids = row.input_ids[0].tensor_split(bounds.cpu())
    return zip(ids, row.targets[0].tensor_split(bounds.cpu()), strict=True)


def summarise(folder: Path, num_rows: int) -> dict[str, Any]:
    """Perplexity of one arm and its rows.

    Raises:
        ValueError: rows are missing.
    """
    records = read_journals(folder)
    wanted = [row_id(place) for place in range(num_rows)]
    missing = [name for name in wanted if name not in records]
    if missing:
        raise ValueError(
            f"{folder} has no loss of {len(missing)} of {num_rows} rows: run the stage again"
        )
    losses = [records[name]["loss"] for name in wanted]
    tokens = [records[name]["tokens"] for name in wanted]
    mean = sum(losses) / sum(tokens)
    seconds = sum(records[name]["seconds"] for name in wanted)
    found = {
        "loss": mean,
        "perplexity": math.exp(mean),
        "row_losses": losses,
        "row_tokens": tokens,
        "seconds": round(seconds, 1),
    }
    rows: list[Any] = [records[name].get("positions") for name in wanted]
    if all(rows):  # a folder of an earlier version has sums only
        found |= {"row_positions": rows, "positions": _positions(rows)}
    return found


@dataclass(frozen=True)
class Change:
    """How one arm's perplexity differs from another's in per cent, overall and by position."""

    overall: Interval
    by_position: list[dict[str, Any]]
    """`first`, `last`, and the interval over the rows that reach so far; empty where not recorded."""

    def record(self) -> dict[str, Any]:
        """As stored in result files."""
        return {**self.overall.record(), "by_position": self.by_position}


def change_pct(arm: dict[str, Any], base: dict[str, Any], *, seed: int = 0) -> Change:
    """Perplexity of `arm` against `base` in per cent, paired by row; positive is worse."""
    gaps = [new - old for new, old in zip(arm["row_losses"], base["row_losses"], strict=True)]
    buckets = []
    if "row_positions" in arm and "row_positions" in base:
        for place in range(max(map(len, base["row_positions"]))):
            pairs = [
                (new[place][0] - old[place][0], old[place][1])
                for new, old in zip(arm["row_positions"], base["row_positions"], strict=True)
                if place < len(old) and old[place][1]
            ]
            if pairs:
                change = _percent([gap for gap, _ in pairs], [count for _, count in pairs], seed)
                first, last = bucket(place)
                buckets.append({"first": first, "last": last, **change.record()})
    return Change(_percent(gaps, base["row_tokens"], seed), buckets)


def _percent(gaps: Sequence[float], tokens: Sequence[int], seed: int) -> Interval:
    gap = paired_ratio(gaps, tokens, seed=seed)
    estimate, low, high = (100 * math.expm1(value) for value in (gap.estimate, gap.low, gap.high))
    return Interval(estimate, low, high, gap.samples, gap.confidence)


def _positions(rows: Sequence[Sequence[Sequence[float]]]) -> list[dict[str, Any]]:
    """Perplexity by bucket over all rows that reach it."""
    table = []
    for place in range(max(map(len, rows))):
        here = [row[place] for row in rows if place < len(row) and row[place][1]]
        if here:
            tokens = sum(int(count) for _, count in here)
            loss = math.fsum(total for total, _ in here) / tokens
            first, last = bucket(place)
            head = {"first": first, "last": last, "rows": len(here), "tokens": tokens}
            table.append({**head, "loss": loss, "perplexity": math.exp(loss)})
    return table


def rows_digest(rows: Sequence[Row]) -> str:
    """Checksum of the rows' tokens and bounds; losses of other rows are kept apart by it."""
    digest = hashlib.sha256()
    for row in rows:
        for part in (row.input_ids.long(), row.document_ids.long(), row.targets.long()):
            digest.update(part.cpu().numpy().tobytes())
    return digest.hexdigest()


def row_id(place: int) -> str:
    """Id of a held-out row in the journals."""
    return f"row-{place:05d}"
