"""Oracle probe: what the dense weights would keep at each budget, before anything is trained.

The model attends with the blocks of its own largest attention mass. Per layer that gives the oracle
coverage, and over the whole model the perplexity: the ceiling for any indexer at this (block, k). Beside it
stand the measures of the index branch as it is now, which in the start checkpoint is the closed form.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..model.attention import AttentionCall
from .perplexity import LossMeter, Row, documents
from .records import Journal, journal_path, read_journals
from .statistics import paired_ratio

MEASURES = ("coverage", "oracle_coverage", "learned_coverage", "block_recall", "score_recall")


def probe_row(meter: LossMeter, row: Row, top_k: int | None) -> dict[str, Any]:
    """One row at one budget; `top_k=None` is full attention.

    Returns:
        loss (nats, summed), tokens, and layers: {layer: {measure: mean over documents by tokens}}.
        `coverage`, `learned_coverage` and the recalls are those of the index branch.
    """
    total, tokens = 0.0, 0
    sums: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    weights: dict[int, int] = defaultdict(int)
    for ids, targets in documents(row):
        count = int((targets != -100).sum())
        if not count:
            continue
        tokens += count
        if top_k is None:
            losses = meter.document(ids, targets, msa_call=AttentionCall("dense"))
            total += float(losses.sum(dtype=torch.float64))
            continue
        oracle = AttentionCall("oracle", top_k=top_k)
        losses = meter.document(ids, targets, msa_call=oracle)
        total += float(losses.sum(dtype=torch.float64))
        # In dense mode the measured selection is the index branch's, against the same true mass.
        measured = AttentionCall("dense", top_k=top_k, measure=True)
        meter.document(ids, targets, msa_call=measured)
        for layer, report in measured.reports.items():
            if report.measures is None:
                continue  # a document shorter than the budget leaves nothing to choose
            weights[layer] += count
            for name, value in asdict(report.measures).items():
                sums[layer][name] += count * value
    layers = {
        str(layer): {name: value / weights[layer] for name, value in sums[layer].items()}
        for layer in sorted(sums)
    }
    return {"loss": total, "tokens": tokens, "layers": layers}


def probe(
    load_model: Callable[[], Any],
    rows: Sequence[Row],
    top_ks: Sequence[int],
    folder: Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[str], None] = lambda line: None,
) -> None:
    """Probe this rank's rows at every budget and dense; append what `folder` does not hold yet.

    Args:
        load_model: gives the converted model; called only if something is missing.
    """
    stored = read_journals(folder)
    budgets = (None, *top_ks)
    mine = list(enumerate(rows))[rank::world_size]
    left = [
        (place, row, k) for place, row in mine for k in budgets if record_id(place, k) not in stored
    ]
    if not left:
        return
    meter = LossMeter(load_model())
    with Journal(journal_path(folder, rank, world_size)) as journal:
        for place, row, top_k in left:
            name = record_id(place, top_k)
            progress(f"probe: {name}")
            journal.append({"id": name, **probe_row(meter, row, top_k)})


def summarise(
    records: dict[str, dict[str, Any]], num_rows: int, top_ks: Sequence[int]
) -> list[dict[str, Any]]:
    """One entry a budget: perplexity change of the oracle, and each measure by layer, mean and worst."""
    dense = [records[record_id(place, None)] for place in range(num_rows)]
    tokens = [record["tokens"] for record in dense]
    entries = []
    for top_k in top_ks:
        rows = [records[record_id(place, top_k)] for place in range(num_rows)]
        gaps = [row["loss"] - base["loss"] for row, base in zip(rows, dense, strict=True)]
        entries.append(
            {
                "top_k": top_k,
                "loss": sum(row["loss"] for row in rows) / sum(tokens),
                "dense_loss": sum(row["loss"] for row in dense) / sum(tokens),
                "loss_gap": paired_ratio(gaps, tokens).record(),
                **_by_layer(rows),
            }
        )
    return entries


def record_id(place: int, top_k: int | None) -> str:
    """Id of a probed row in the journal."""
    return f"row-{place:05d}/{'dense' if top_k is None else f'k{top_k}'}"


def _by_layer(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over rows by layer, then mean and worst over layers."""
    layers = sorted({layer for row in rows for layer in row["layers"]}, key=int)
    table: dict[str, dict[str, float]] = {}
    for measure in MEASURES:
        for layer in layers:
            values = [row["layers"][layer][measure] for row in rows if layer in row["layers"]]
            table.setdefault(measure, {})[layer] = sum(values) / len(values)
    means = {name: sum(values.values()) / len(values) for name, values in table.items()}
    worst = {name: min(values.values()) for name, values in table.items()}
    return {"layers": table, "mean": means, "worst": worst}
