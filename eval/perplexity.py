"""Loss of held-out rows in an arm: one record a row, so that arms are compared row by row.

Each document of a row is run alone, so every arm sees exactly the same context whatever it thinks of
packing. Logits are made in chunks; the whole (N, vocabulary) matrix never exists.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from .records import Journal, journal_path, read_journals
from .statistics import Interval, paired_ratio

CHUNK = 512
"""Rows of logits that exist at once."""


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
) -> int:
    """Append the loss of this rank's rows that have none in `folder`; returns how many were run."""
    done = read_journals(folder)
    mine = [(row_id(place), row) for place, row in enumerate(rows)][rank::world_size]
    left = [(name, row) for name, row in mine if name not in done]
    if not left:
        return 0
    meter = LossMeter(model)
    with Journal(journal_path(folder, rank, world_size)) as journal:
        for count, (name, row) in enumerate(left, start=1):
            begun = time.perf_counter()
            loss, tokens = meter.row(row)
            seconds = time.perf_counter() - begun
            journal.append(
                {"id": name, "loss": loss, "tokens": tokens, "seconds": round(seconds, 3)}
            )
            progress(f"row {count}/{len(left)}, {seconds:.1f} s")
    return len(left)


class LossMeter:
    """Next-token losses of documents, logits in chunks."""

    def __init__(self, model: Any) -> None:
        """Try a few tokens to see whether the output layer alone makes the logits.

        Families that scale or cap them (Granite, Cohere, Gemma) go through the model's own forward
        pass, whole logits and all; so no family has to be listed.
        """
        self._model = model
        few = torch.arange(1, 5, device=model.device)[None]
        with torch.no_grad():
            ours = model.get_output_embeddings()(self._hidden(few, {})).float()
            theirs = model(input_ids=few, use_cache=False).logits.float()
        self._plain = torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3)

    @torch.no_grad()
    def row(self, row: Row) -> tuple[float, int]:
        """Summed loss of a row in nats, and its number of target tokens."""
        total, tokens = 0.0, 0
        for ids, targets in documents(row):
            kept = int((targets != -100).sum())
            if kept:
                total += float(self.document(ids, targets).sum(dtype=torch.float64))
                tokens += kept
        return total, tokens

    @torch.no_grad()
    def document(self, ids: Tensor, targets: Tensor, **arguments: Any) -> Tensor:
        """(N,) float32 loss of each target of one document, 0 where it is -100.

        Args:
            ids, targets: (N,) int64.
            arguments: further ones of the forward pass, for example `msa_call`.
        """
        ids, targets = ids.to(self._model.device)[None], targets.to(self._model.device)
        if not self._plain:
            logits = self._model(input_ids=ids, use_cache=False, **arguments).logits[0]
            return functional.cross_entropy(logits.float(), targets, reduction="none")
        head = self._model.get_output_embeddings()
        hidden = self._hidden(ids, arguments)[0]
        parts = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
        losses = [
            functional.cross_entropy(head(part).float(), goal, reduction="none")
            for part, goal in parts
        ]
        return torch.cat(losses)

    def _hidden(self, ids: Tensor, arguments: dict[str, Any]) -> Tensor:
        """(1, N, hidden width) after the final norm."""
        decoder = self._model.get_decoder()
        return decoder(input_ids=ids, use_cache=False, **arguments).last_hidden_state


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
    return {
        "loss": mean,
        "perplexity": math.exp(mean),
        "row_losses": losses,
        "row_tokens": tokens,
        "seconds": round(seconds, 1),
    }


def change_pct(arm: dict[str, Any], base: dict[str, Any], *, seed: int = 0) -> Interval:
    """Perplexity of `arm` against `base` in per cent, paired by row; positive is worse."""
    gaps = [new - old for new, old in zip(arm["row_losses"], base["row_losses"], strict=True)]
    gap = paired_ratio(gaps, base["row_tokens"], seed=seed)
    estimate, low, high = (100 * math.expm1(value) for value in (gap.estimate, gap.low, gap.high))
    return Interval(estimate, low, high, gap.samples, gap.confidence)


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
