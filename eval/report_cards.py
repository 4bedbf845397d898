"""Below the verdict, the first screen of the report: headline figures, and the loss by length as a picture.

As the verdict they speak of the newest weights that were measured, at the budget they were trained for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .charts import Bar, interval_chart
from .report_arithmetic import dense_per_token, shape_of, sparse_per_token
from .report_blocks import Block, Card, Chart
from .report_data import RunFiles, duration
from .report_words import (
    length_name,
    listed,
    longbench_name,
    main_budget,
    main_pair,
    measured_lengths,
    measured_tasks,
    overall,
    pair_tasks,
    ruler_name,
    scored_results,
    signed,
    span,
    suite_name,
    suite_pairs,
    upper,
)

_COLOURS = {"non-inferior": 4, "undecided": 5, "inferior": 1}
"""Of a bar, by what its interval says of the margin, as places in the palette."""
_FIRST = {
    "original_dense": "the original model (A)",
    "converted_dense": "the converted model with full attention (B)",
}


def cards(run: RunFiles) -> list[Card]:
    """What was lost, what attention costs now, what was trained; only what was measured."""
    scored = [card for kind, one in scored_results(run) for card in _score_cards(run, kind, one)]
    read = [card for one in run.final("perplexity") for card in _perplexity_card(run, one)]
    return [*scored, *read, *_operations_card(run), *_training_cards(run)]


def lead(run: RunFiles) -> list[Block]:
    """Points lost at each length with the margin beside them; nothing where there is one figure only."""
    results = scored_results(run)
    several = sum(kind == "ruler" for kind, _ in results) > 1
    bars, first = [], set()
    for kind, result in results:
        pair = main_pair(result, main_budget(run, result))
        if pair is None:
            continue
        first.add(_FIRST[pair["first"]])
        for one in suite_pairs(pair):
            name = suite_name(one) if kind == "longbench" else "RULER"
            name = ruler_name(measured_tasks(result)) if kind == "ruler" and several else name
            for where, entry in _entries(kind, one):
                lost, colour = entry["lost"], _COLOURS.get(entry.get("verdict", ""), 0)
                bars.append(Bar(name + where, lost["estimate"], lost["low"], lost["high"], colour))
    if len(bars) < 2:
        return []
    caption = f"Points of 100 lost from {listed(sorted(first))} to the converted, sparse one (C)"
    margin = results[0][1].get("margin")
    if margin is not None:
        caption += (
            f", beside the margin of {margin:g} (dashed). Green is shown to be within it, orange to be "
            "beyond it; yellow is undecided"
        )
    chart = interval_chart(bars, x_label="points lost, with 95 % intervals", mark=margin)
    return [Chart(chart, f"{caption}.")]


def _entries(kind: str, pair: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    lengths = [] if kind == "longbench" else pair["lengths"]
    for entry in lengths:
        yield f" at {length_name(entry['length'])}", entry
    whole = overall(pair)
    if whole is not None and len(lengths) != 1:
        yield ", all lengths" if lengths else "", whole


def _score_cards(run: RunFiles, kind: str, result: dict[str, Any]) -> Iterator[Card]:
    top_k = main_budget(run, result)
    pair = main_pair(result, top_k)
    for one in suite_pairs(pair) if pair else []:
        entry = overall(one)
        if entry is not None:
            yield _score_card(kind, result, one, entry, top_k)


def _score_card(
    kind: str,
    result: dict[str, Any],
    pair: dict[str, Any],
    entry: dict[str, Any],
    top_k: int | None,
) -> Card:
    lengths, name = measured_lengths(result), longbench_name(pair)
    if kind == "ruler":
        name = ruler_name(measured_tasks(result))
        name += f" at {length_name(lengths[0])}" if len(lengths) == 1 else ""
    tasks = pair_tasks(pair)
    before, after = (_mean(result["arms"][pair[which]], tasks) for which in ("first", "second"))
    lost = entry["lost"]
    ends = {"low": -lost["high"], "high": -lost["low"]}
    detail = f"{before:.1f} to {after:.1f}; 95 % interval {span(ends, 1)}"
    if entry["unseen_share"] is not None:
        detail = f"{before:.1f}; no score changed, up to {upper(entry['unseen_share'])} could"
    return Card(signed(-lost["estimate"], 1), f"points, {name}, k = {top_k}", detail)


def _mean(arm: dict[str, Any], tasks: list[str]) -> float:
    """Over tasks and lengths alike, as differences are."""
    scores = [
        cell["score"]
        for by_task in arm["scores"].values()
        for task, cell in by_task.items()
        if task in tasks
    ]
    return sum(scores) / len(scores)


def _perplexity_card(run: RunFiles, result: dict[str, Any]) -> list[Card]:
    top_k = main_budget(run, result)
    pair = main_pair(result, top_k)
    if pair is None:
        return []
    before, after = (result["arms"][pair[which]]["perplexity"] for which in ("first", "second"))
    change = pair["change_pct"]
    detail = f"{before:.2f} to {after:.2f}; 95 % interval {span(change)} %"
    return [Card(f"{signed(change['estimate'])} %", f"perplexity, k = {top_k}", detail)]


def _operations_card(run: RunFiles) -> list[Card]:
    """What is saved, at the longest length that was measured."""
    longest: tuple[int, int, dict[str, int]] | None = None
    for kind in ("ruler", "perplexity"):
        for result in run.final(kind):
            shape, top_k = shape_of(result), main_budget(run, result)
            lengths = [int(n) for n in measured_lengths(result)] if kind == "ruler" else []
            length = max(lengths, default=result.get("row_len", 0))
            if shape and top_k and (longest is None or length > longest[0]):
                longest = length, top_k, shape
    if longest is None:
        return []
    length, top_k, shape = longest
    share = sparse_per_token(shape, length, top_k) / dense_per_token(shape, length)
    label = f"of dense attention's operations at {length_name(length)}, k = {top_k}"
    return [
        Card(f"{100 * share:.0f} %", label, "arithmetic, attention alone; says nothing of time")
    ]


def _training_cards(run: RunFiles) -> list[Card]:
    found: list[Card] = []
    stages = [
        (label, layers)
        for number, label in run.training_stages()
        if (layers := run.by_layer("learned_coverage", number))
    ]
    if stages:
        label, layers = stages[-1]
        worst = min(layers, key=lambda layer: layers[layer])
        mean = sum(layers.values()) / len(layers)
        detail = f"worst layer {layers[worst]:.3f} (layer {worst}), after {label}"
        found.append(Card(f"{mean:.3f}", "learned coverage, mean", detail))
    tokens = max((record.get("tokens", 0) for record in run.metrics), default=0)
    if tokens:
        trained = [done for done in run.done.values() if done.get("kind") in ("warmup", "sparse")]
        seconds = sum(map(duration, trained))
        detail = f"{seconds / 60:.1f} min of training" if seconds else ""
        found.append(Card(f"{tokens:,}", "training tokens", detail))
    return found
